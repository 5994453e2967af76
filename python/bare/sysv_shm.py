# System V shared memory under semaphores, bare: the textbook's bounded buffer, one for each way.
# The trap: nobody hears that a peer died, and all of it outlives all its users until somebody
# removes it: ipcs shows it, ipcrm -M KEY ends the segment, ipcrm -S KEY a semaphore.
#     python sysv_shm.py serve 7000 64 block & sleep 1
#     python sysv_shm.py ping 7000 64 block 100000
import errno
import os

import rounds
import sysv_ipc

SLOTS, SLOT_BYTES = 4, 8192
STRIDE = 4 + SLOT_BYTES  # a slot: its size (0: the end), and its bytes
KEY_MAX = 1 << 30


class Way:
    def __init__(self, key: int, flags: int, slots: memoryview, block: bool) -> None:
        self.slots = slots
        self.free = sysv_ipc.Semaphore(key, flags, 0o600, SLOTS)  # counts slots, as `full` does
        self.full = sysv_ipc.Semaphore(key + 1, flags, 0o600, 0)
        self.free.block = self.full.block = block
        self.next = 0


# What a semaphore counts is also seen: who has got a full slot sees all that was put into it.
def step(semaphore: sysv_ipc.Semaphore) -> bool:
    try:
        semaphore.acquire()
    except sysv_ipc.BusyError:
        return False
    return True


def take(way: Way, rest: memoryview) -> int | None:
    if not step(way.full):
        return None
    slot = way.slots[way.next % SLOTS * STRIDE :][:STRIDE]
    way.next += 1
    count = min(int.from_bytes(slot[:4], "little"), len(rest))
    rest[:count] = slot[4 : 4 + count]
    way.free.release()
    return count


def put(way: Way, rest: memoryview) -> int | None:
    if not step(way.free):
        return None
    slot = way.slots[way.next % SLOTS * STRIDE :][:STRIDE]
    way.next += 1
    count = min(len(rest), SLOT_BYTES)
    slot[:4] = count.to_bytes(4, "little")
    slot[4 : 4 + count] = rest[:count]
    way.full.release()
    return count


def moves(come: Way, go: Way) -> tuple[rounds.Move, rounds.Move]:
    receive = rounds.whole("semop", lambda rest: take(come, rest))
    return receive, rounds.whole("semop", lambda rest: put(go, rest))


def attach(key: int, flags: int) -> sysv_ipc.SharedMemory:
    try:
        return sysv_ipc.SharedMemory(key, flags, 0o600, 2 * SLOTS * STRIDE if flags else 0)
    except sysv_ipc.ExistentialError:  # sysv_ipc's errors have no errno
        rounds.fail("shmget", os.strerror(errno.EEXIST if flags else errno.ENOENT))


def serve(words: rounds.Words) -> None:
    key = rounds.number(words.address, 1, KEY_MAX)
    segment = attach(key, sysv_ipc.IPC_CREX)
    at = memoryview(segment).cast("B")
    c2s = Way(key, sysv_ipc.IPC_CREX, at, words.block)
    s2c = Way(key + 2, sysv_ipc.IPC_CREX, at[SLOTS * STRIDE :], words.block)
    rounds.say(f"ready {key}")
    read_all, write_all = moves(c2s, s2c)
    message = memoryview(bytearray(words.size))
    while read_all(message):
        write_all(message)
    segment.remove()
    for semaphore in (c2s.free, c2s.full, s2c.free, s2c.full):
        semaphore.remove()


def ping(words: rounds.Words) -> None:
    key = rounds.number(words.address, 1, KEY_MAX)
    at = memoryview(attach(key, 0)).cast("B")
    c2s, s2c = Way(key, 0, at, words.block), Way(key + 2, 0, at[SLOTS * STRIDE :], words.block)
    read_all, write_all = moves(s2c, c2s)
    rounds.measure(words, write_all, read_all)
    put(c2s, memoryview(b""))  # the end


if __name__ == "__main__":
    rounds.run("KEY", serve, ping)
