"""System V shared memory with semaphores: `sysv-shm`, the textbook's bounded buffer.

Pick it to learn it, or to meet a program that has it. It copies a byte twice, as a pipe does, and
pays two system calls for each slot at either end; the ring of `shm` pays none.

Meeting: `meeting`; the server makes for each client a segment, with a buffer for each direction,
and two counting semaphores for each buffer: how many slots are full, and how many are free. Its
answer names them, and the client, the last to attach, marks the segment for removal: the kernel
removes it when both have gone, however they go.

Why this is correct although Python says nothing about memory order: a reader touches a slot only
after its semop(2) has taken a unit that the writer's semop gave after filling it. Each is a system
call that takes the semaphore's lock in the kernel, and to take a lock that another has released
orders all memory before the one before all after the other, on every processor. A flag in the
memory itself would need atomic instructions, which Python does not have.

The trap: semaphores count up to 32,767, so they count slots, not bytes. SEM_UNDO would undo a dead
peer's work under the living one. And acquire(timeout) of sysv_ipc ignores its timeout wherever
SEMAPHORE_TIMEOUT_SUPPORTED is False, as in its wheels: a watcher (sysv_watcher) wakes the sleeper
instead, by giving a unit that stands for nothing.

Copy with it: errors, system, meeting, unix_address, sysv_objects, sysv_watcher, sysv_stream (and
frame, session, client, server for the calls). Python needs sysv_ipc.
Run: python -m ipc_bridge.peer serve sysv-shm:///tmp/demo.shm
"""

import contextlib
import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

import sysv_ipc

from ipc_bridge.errors import ProtocolError
from ipc_bridge.system import END, WOULD_BLOCK, Buffer, Wait
from ipc_bridge.transports.sysv_objects import REMOVED, Journal, Object, remove
from ipc_bridge.transports.sysv_stream import Part, SysvStream, SysvTransport, Way

SLOTS = 16  # of a buffer: enough that a writer and a reader seldom wait for each other
SLOT_BYTES = 16 << 10  # with its head; a system call costs as much as copying some KiB
HEAD = struct.Struct("<II")  # of a slot: how many bytes follow, and 0
CHUNK_BYTES = SLOT_BYTES - HEAD.size
BUFFER_BYTES = SLOTS * SLOT_BYTES


class Half(NamedTuple):
    """One direction's semaphores."""

    full: sysv_ipc.Semaphore
    free: sysv_ipc.Semaphore

    def remove(self) -> None:
        """Idempotent, whoever was first."""
        remove(self.full)
        remove(self.free)


class ShmStream(Way):
    """A buffer to read and a buffer to write: the client's is the first of the segment."""

    scheme = "sysv-shm"
    shape = struct.Struct("<II")  # slots, bytes of a slot

    @staticmethod
    def offer() -> tuple[int, ...]:
        return SLOTS, SLOT_BYTES

    @staticmethod
    def parts(shape: tuple[int, ...]) -> list[Part]:
        """The semaphores to the server and to the client, each way `full` and `free`; and the
        segment."""
        if shape != (SLOTS, SLOT_BYTES):
            return []
        found = [Part(sysv_ipc.Semaphore, at, of) for at, of in enumerate((0, SLOTS, 0, SLOTS))]
        return [*found, Part(sysv_ipc.SharedMemory, 0, 2 * BUFFER_BYTES)]

    def __init__(
        self,
        life_line: socket.socket,
        objects: Sequence[Object],
        shape: tuple[int, ...],
        wait: Wait,
        key: int,
        journal: Journal | None,
    ) -> None:
        SysvStream.__init__(self, life_line, objects, wait, key, journal)
        is_server = journal is not None
        to_server, to_client = Half(*objects[0:2]), Half(*objects[2:4])
        self._in, self._out = (to_server, to_client) if is_server else (to_client, to_server)
        self._segment = objects[4]
        if self._segment.size < 2 * BUFFER_BYTES:
            raise ProtocolError(f"a segment of {self._segment.size} bytes")
        if not is_server:
            remove(self._segment)  # both are attached: it goes with the last of them
        self._memory = memoryview(self._segment).cast("B")
        for semaphore in (*self._in, self._out.free):
            semaphore.block = False
        self._sleeper = sysv_ipc.Semaphore(self._in.full.key)  # the same one, to sleep on
        self._in_at, self._out_at = (0, BUFFER_BYTES) if is_server else (BUFFER_BYTES, 0)
        self._in_slot = self._out_slot = 0
        self._at = self._size = 0  # of the slot being read: the next byte to give, and the end
        self._rest: int | None = None  # slots still full, once the peer has gone
        self._false: list[None] = []  # units that stand for no slot, by `_wake`
        self._begin()

    def try_read(self, buffer: memoryview) -> int:
        with self._lock:
            if self._at == self._size:
                taken = self._take_left() if self._over else self._take_now()
                if taken <= 0:
                    return taken
            count = min(self._size - self._at, len(buffer))
            start = self._in_at + self._in_slot * SLOT_BYTES + HEAD.size + self._at
            buffer[:count] = self._memory[start : start + count]
            self._at += count
            if self._at == self._size:
                self._in_slot = (self._in_slot + 1) % SLOTS
                if not self._over:
                    self._give_back()
            return count

    def try_write(self, buffers: Sequence[Buffer]) -> int:
        if self._over:
            return END
        done = index = at = 0
        for _ in range(SLOTS):
            if index == len(buffers):
                break
            try:
                self._out.free.acquire()
            except sysv_ipc.BusyError:
                self._fulls += not done
                return done or WOULD_BLOCK
            except REMOVED:
                return self._removed()
            size, index, at = self._fill(buffers, index, at)
            try:
                self._out.full.release()
            except REMOVED:
                return self._removed()
            except ValueError:
                raise ProtocolError("the peer has set our semaphore") from None
            self._out_slot = (self._out_slot + 1) % SLOTS
            done += size
        self._fulls = 0
        return done

    def _fill(self, buffers: Sequence[Buffer], index: int, at: int) -> tuple[int, int, int]:
        """Fill the next slot from byte `at` of buffer `index` on; its size, and where that ends."""
        start = self._out_at + self._out_slot * SLOT_BYTES
        size = 0
        while size < CHUNK_BYTES and index < len(buffers):
            piece = memoryview(buffers[index])[at : at + CHUNK_BYTES - size]
            here = start + HEAD.size + size
            self._memory[here : here + len(piece)] = piece
            size += len(piece)
            at += len(piece)
            if at == len(buffers[index]):
                index, at = index + 1, 0
        HEAD.pack_into(self._memory, start, size, 0)
        return size, index, at

    def _take_now(self) -> int:
        """Take the next full slot, if there is one: 1, WOULD_BLOCK or END."""
        try:
            self._in.full.acquire()
        except sysv_ipc.BusyError:
            return END if self._interrupted else WOULD_BLOCK
        except REMOVED:
            return END
        return 1 if self._open_slot() else WOULD_BLOCK

    def _take_left(self) -> int:
        """As `_take_now`, of what a peer has left: the semaphores have gone with it."""
        if not self._rest:
            return END
        self._rest -= 1
        self._measure()
        return 1

    def _open_slot(self) -> bool:
        """A unit is taken: does it stand for a slot? Then that is the one to read."""
        if self._false:
            self._false.pop()
            return False
        self._measure()
        return True

    def _measure(self) -> None:
        start = self._in_at + self._in_slot * SLOT_BYTES
        size, _ = HEAD.unpack_from(self._memory, start)  # read once: a peer may change it
        if not 0 < size <= CHUNK_BYTES:
            raise ProtocolError(f"a slot of {size} bytes")
        self._at, self._size = 0, size
        self._fulls = 0  # the peer is at work

    def _give_back(self) -> None:
        try:
            self._in.free.release()
        except REMOVED:
            self._removed()
        except ValueError:
            raise ProtocolError("the peer has set our semaphore") from None

    def _has_some(self) -> bool:
        return self._at != self._size

    def _take_one(self) -> None:
        self._sleeper.acquire()
        self._open_slot()

    def _wake(self) -> None:
        self._false.append(None)
        try:
            self._in.full.release()
        except sysv_ipc.PermissionsError:  # closed to us: its end wakes, too
            remove(self._in.full)
        except (sysv_ipc.Error, ValueError, OSError):
            pass

    def _take_rest(self) -> None:
        full = 0
        with contextlib.suppress(sysv_ipc.Error, OSError):
            full = self._in.full.value - len(self._false)
        self._rest = max(0, min(full, SLOTS))

    def _remove_in(self) -> None:
        self._in.remove()
        remove(self._segment)  # already marked, unless the client never came

    def _remove_out(self) -> None:
        self._out.remove()

    def close(self) -> None:
        was_open = not self._closed
        super().close()
        if was_open:
            self._memory.release()
            self._segment.detach()


class SysvShm(SysvTransport):
    """`sysv-shm:///path`: a socket to meet at, and for each client a segment and four semaphores,
    all 0600."""

    way = ShmStream
