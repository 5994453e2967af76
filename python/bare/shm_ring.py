# Shared memory, bare: a ring of slots for each way, without a lock, and while both spin without a
# system call. Nothing is faster; pick it where a core may poll.
# The trap: bytes, then a flag, is not enough. Compiler and processor may store the flag first, or
# load the bytes first, unless the flag is stored with release and loaded with acquire. Python has
# no atomics and promises no order, so it calls gcc's library, where each is a function. And nobody
# hears that a peer died, or that it waits the other way: both must block, or both spin.
#     python shm_ring.py serve /dev/shm/it 64 spin & sleep 1
#     python shm_ring.py ping /dev/shm/it 64 spin 100000
import ctypes
import mmap
import os
from dataclasses import dataclass

import rounds

SLOTS, SLOT_BYTES, LINE_BYTES = 16, 16384, 64
STRIDE = LINE_BYTES + SLOT_BYTES  # of a slot: a cache line for its flag, and its bytes
WAY_BYTES = SLOTS * STRIDE
ACQUIRE, RELEASE = 2, 3  # as gcc numbers them
SYS_FUTEX = {"x86_64": 202, "aarch64": 98}[os.uname().machine]  # of Linux, for each processor
FUTEX_WAIT, FUTEX_WAKE = 0, 1
libc = ctypes.CDLL(None)
with rounds.checked("dlopen"):
    atomic = ctypes.PyDLL("libatomic.so.1")  # Debian's libatomic1
load, store = atomic.__atomic_load_4, atomic.__atomic_store_4
load.restype = ctypes.c_uint32


@dataclass
class Way:
    memory: memoryview
    flags: list[ctypes.c_void_p]  # 0: free, the writer's; else the reader's: its size, and 1
    block: bool
    next: int = 0


# acquire: pairs with hand_over's release. Who has a slot sees all that was done to it before.
def wait_for(flag: ctypes.c_void_p, filled: bool, block: bool) -> int:
    while True:
        now: int = load(flag, ACQUIRE)
        if (now != 0) == filled:
            return now
        if block:  # sleep, unless it has changed by now: the kernel looks again, futex(2)
            libc.syscall(SYS_FUTEX, flag, FUTEX_WAIT, now, None, None, 0)


# release: what was done to the slot is done before it is the other's.
def hand_over(flag: ctypes.c_void_p, filled: int, block: bool) -> None:
    store(flag, filled, RELEASE)
    if block:
        libc.syscall(SYS_FUTEX, flag, FUTEX_WAKE, 1, None, None, 0)


def take(way: Way, rest: memoryview) -> int:
    slot = way.next % SLOTS
    way.next += 1
    size = wait_for(way.flags[slot], True, way.block) - 1  # 0: the end
    count = min(size, len(rest), SLOT_BYTES)
    rest[:count] = way.memory[slot * STRIDE + LINE_BYTES :][:count]
    hand_over(way.flags[slot], 0, way.block)
    return count


def put(way: Way, rest: memoryview) -> int:
    slot = way.next % SLOTS
    way.next += 1
    count = min(len(rest), SLOT_BYTES)
    wait_for(way.flags[slot], False, way.block)
    way.memory[slot * STRIDE + LINE_BYTES :][:count] = rest[:count]
    hand_over(way.flags[slot], count + 1, way.block)
    return count


def moves(come: Way, go: Way) -> tuple[rounds.Move, rounds.Move]:
    receive = rounds.whole("take", lambda rest: take(come, rest))
    return receive, rounds.whole("put", lambda rest: put(go, rest))


def attach(words: rounds.Words, flags: int) -> tuple[Way, Way]:
    with rounds.checked("open"):
        fd = os.open(words.address, os.O_RDWR | flags, 0o600)
    with rounds.checked("fallocate"):
        os.posix_fallocate(fd, 0, 2 * WAY_BYTES)  # now: later it would be SIGBUS
    shared = mmap.mmap(fd, 2 * WAY_BYTES)
    first = ctypes.addressof(ctypes.c_char.from_buffer(shared))
    at = [ctypes.c_void_p(first + i * STRIDE) for i in range(2 * SLOTS)]
    memory = memoryview(shared)
    c2s = Way(memory[:WAY_BYTES], at[:SLOTS], words.block)
    return c2s, Way(memory[WAY_BYTES:], at[SLOTS:], words.block)


def serve(words: rounds.Words) -> None:
    c2s, s2c = attach(words, os.O_CREAT | os.O_EXCL)  # filled with zeros: all is free
    rounds.say(f"ready {words.address}")
    read_all, write_all = moves(c2s, s2c)
    message = memoryview(bytearray(words.size))
    while read_all(message):
        write_all(message)
    with rounds.checked("unlink"):
        os.unlink(words.address)


def ping(words: rounds.Words) -> None:
    c2s, s2c = attach(words, 0)
    read_all, write_all = moves(s2c, c2s)
    rounds.measure(words, write_all, read_all)
    put(c2s, memoryview(b""))  # the end


if __name__ == "__main__":
    rounds.run("PATH", serve, ping)
