"""System V message queues: `sysv-queue`, the textbook's other IPC.

Pick it to learn it, or where it is there already: it keeps messages whole, and in C++ it
wakes as cheaply as a pipe. A Unix socket does more: it has a descriptor, an end-of-file and no
limit of the machine's.

Meeting: `meeting`; the server makes a pair of queues for each client, and its answer names them.
The stream of bytes goes through them in chunks, so that any payload passes through any queue.

The trap: msgrcv(2) waits for a message and for nothing else: neither for a time nor for the peer's
end. So a watcher (sysv_watcher) that knows both sends the sleeper a message of another type. And
msgsnd(2) would wait for room for ever, so it never waits here: who finds the queue full reads its
own meanwhile (else two writers would wait for each other), and tries again.

Copy with it: errors, system, meeting, unix_address, sysv_objects, sysv_watcher, sysv_stream (and
frame, session, client, server for the calls). Python needs sysv_ipc.
Run: python -m ipc_bridge.peer serve sysv-queue:///tmp/demo.queue
"""

import contextlib
import errno
import socket
import struct
from collections.abc import Sequence

import sysv_ipc

from ipc_bridge.errors import Error, ProtocolError, SystemError
from ipc_bridge.system import END, WOULD_BLOCK, Buffer, Wait
from ipc_bridge.transports.sysv_objects import REMOVED, Journal, Object, limit, refusal, remove
from ipc_bridge.transports.sysv_stream import Part, SysvStream, SysvTransport, Way

DATA, WAKE = 1, 2  # types of messages: a chunk of the stream; nothing, for whoever sleeps
CHUNK_BYTES_MAX = 64 << 10  # of a message, where the machine allows more: more gains nothing
CHUNKS_PER_WRITE = 16  # then the caller has a look at its input and its deadline


class QueueStream(Way):
    """A queue to read and a queue to write."""

    scheme = "sysv-queue"
    shape = struct.Struct("<I")  # bytes of a chunk

    @staticmethod
    def offer() -> tuple[int, ...]:
        chunk_bytes = min(limit("msgmax"), limit("msgmnb") // 2, CHUNK_BYTES_MAX)
        return (max(1, chunk_bytes),)

    @staticmethod
    def parts(shape: tuple[int, ...]) -> list[Part]:
        """The queue to the server, and that to the client."""
        (chunk_bytes,) = shape
        if not 0 < chunk_bytes <= CHUNK_BYTES_MAX:
            return []
        return [Part(sysv_ipc.MessageQueue, number, chunk_bytes) for number in (0, 1)]

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
        to_server, to_client = objects
        is_server = journal is not None
        self._in, self._out = (to_server, to_client) if is_server else (to_client, to_server)
        (self._chunk_bytes,) = shape
        self._left = memoryview(b"")  # taken out of the queue, and not given yet
        self._begin()

    def try_read(self, buffer: memoryview) -> int:
        with self._lock:
            if not self._left:
                if self._over:
                    return END
                try:
                    chunk, kind = self._in.receive(False)
                except sysv_ipc.BusyError:
                    return END if self._interrupted else WOULD_BLOCK
                except REMOVED:
                    return END
                except OSError as error:
                    raise _broken(error) from None
                if kind == WAKE:
                    return WOULD_BLOCK
                self._take(chunk, kind)
            count = min(len(self._left), len(buffer))
            buffer[:count] = self._left[:count]
            self._left = self._left[count:]
            return count

    def try_write(self, buffers: Sequence[Buffer]) -> int:
        if self._over:
            return END
        done = index = at = 0
        for _ in range(CHUNKS_PER_WRITE):
            chunk, index, at = self._gather(buffers, index, at)
            if not chunk:
                break
            try:
                self._out.send(chunk, False, DATA)
            except sysv_ipc.BusyError:
                self._fulls += not done
                return done or WOULD_BLOCK
            except REMOVED:
                return self._removed()
            except OSError as error:
                if error.errno == errno.EINVAL:  # as above: which of them is a matter of the moment
                    return self._removed()
                raise refusal("msgsnd", error) from None
            done += len(chunk)
        self._fulls = 0
        return done

    def _has_some(self) -> bool:
        return bool(self._left)

    def _take_one(self) -> None:
        try:
            chunk, kind = self._in.receive()
        except OSError as error:
            raise _broken(error) from None
        if kind != WAKE:
            self._take(chunk, kind)

    def _take(self, chunk: bytes, kind: int) -> None:
        if kind != DATA or not chunk:
            raise ProtocolError(f"a message of type {kind} and {len(chunk)} bytes")
        self._fulls = 0  # the peer is at work
        self._left = memoryview(chunk)

    def _gather(self, buffers: Sequence[Buffer], index: int, at: int) -> tuple[Buffer, int, int]:
        """The next chunk, from byte `at` of buffer `index` on, and where it ends."""
        pieces: list[Buffer] = []
        room = self._chunk_bytes
        while room and index < len(buffers):
            buffer = buffers[index]
            piece = buffer if not at and len(buffer) <= room else memoryview(buffer)[at : at + room]
            pieces.append(piece)
            room -= len(piece)
            at += len(piece)
            if at == len(buffer):
                index, at = index + 1, 0
        return pieces[0] if len(pieces) == 1 else b"".join(pieces), index, at

    def _wake(self) -> None:
        try:
            self._in.send(b"", False, WAKE)
        except sysv_ipc.PermissionsError:  # closed to us: its end wakes, too
            remove(self._in)
        except (sysv_ipc.Error, OSError):  # a full queue wakes, too
            pass

    def _take_rest(self) -> None:
        chunks = [bytes(self._left)]
        with contextlib.suppress(sysv_ipc.Error, OSError):
            while True:
                chunk, kind = self._in.receive(False)
                if kind == DATA:
                    chunks.append(chunk)
        self._left = memoryview(b"".join(chunks))

    def _remove_in(self) -> None:
        remove(self._in)

    def _remove_out(self) -> None:
        remove(self._out)


def _broken(error: OSError) -> Error:
    if error.errno == errno.E2BIG:
        return ProtocolError("a message longer than a chunk")
    return SystemError("msgrcv", error.errno or 0, "queue")


class SysvQueue(SysvTransport):
    """`sysv-queue:///path`: a socket to meet at, and a pair of queues for each client, all 0600."""

    way = QueueStream
