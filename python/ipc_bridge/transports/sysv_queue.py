"""System V message queues: `sysv-queue`, the textbook's other IPC.

Pick it to learn it, or where it is there already: it keeps messages whole and wakes as cheaply as
a pipe. A Unix socket does more: it has a descriptor, an end-of-file and no limit of the machine's.

Meeting: `meeting`; the server makes a pair of queues for each client, and its answer names them.
The stream of bytes goes through them in chunks, so that any payload passes through any queue.

The trap: msgrcv(2) waits for a message and for nothing else: neither for a time nor for the peer's
end. So a watcher (sysv_objects) that knows both sends the sleeper a message of another type. And
msgsnd(2) would wait for room for ever, so it never waits here: who finds the queue full reads its
own meanwhile (else two writers would wait for each other), and tries again.

Copy with it: errors, system, meeting, unix_address, sysv_objects (and frame, session, client,
server for the calls). Python needs sysv_ipc.
Run: python -m ipc_bridge.peer serve sysv-queue:///tmp/demo.queue
"""

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Sequence

import sysv_ipc

from ipc_bridge.errors import Error, ProtocolError, Status, SystemError
from ipc_bridge.system import (
    END,
    WOULD_BLOCK,
    Buffer,
    Listener,
    Stream,
    Transport,
    Wait,
)
from ipc_bridge.transports.meeting import Meeting, MeetingListener, Record
from ipc_bridge.transports.sysv_objects import Journal, SysvStream, is_ours, limit, refusal

DATA, WAKE = 1, 2  # types of messages: a chunk of the stream; nothing, for whoever sleeps
CHUNK_BYTES_MAX = 64 << 10  # of a message, where the machine allows more: more gains nothing
CHUNKS_PER_WRITE = 16  # then the caller has a look at its input and its deadline
ANSWER = struct.Struct("<II")  # the key of the client's queue (the server's is the next), and chunk


class QueueStream(SysvStream):
    """A queue to read and a queue to write."""

    def __init__(
        self,
        life_line: socket.socket,
        queues: tuple[sysv_ipc.MessageQueue, sysv_ipc.MessageQueue],
        chunk_bytes: int,
        wait: Wait,
        key: int,
        journal: Journal | None,
    ) -> None:
        super().__init__(life_line, wait, key, journal)
        self._in, self._out = queues
        self._chunk_bytes = chunk_bytes
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
                except sysv_ipc.ExistentialError:  # removed under us
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
            except sysv_ipc.ExistentialError:
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
        with contextlib.suppress(sysv_ipc.Error, OSError):  # a full queue wakes, too
            self._in.send(b"", False, WAKE)

    def _take_rest(self) -> None:
        chunks = [bytes(self._left)]
        with contextlib.suppress(sysv_ipc.Error, OSError):
            while True:
                chunk, kind = self._in.receive(False)
                if kind == DATA:
                    chunks.append(chunk)
        self._left = memoryview(b"".join(chunks))

    def _remove_in(self) -> None:
        _remove(self._in)

    def _remove_out(self) -> None:
        _remove(self._out)


def _broken(error: OSError) -> Error:
    if error.errno == errno.E2BIG:
        return ProtocolError("a message longer than a chunk")
    return SystemError("msgrcv", error.errno or 0, "queue")


def _remove(queue: sysv_ipc.MessageQueue) -> None:
    with contextlib.suppress(sysv_ipc.Error, OSError):
        queue.remove()


class SysvQueue(Transport):
    """`sysv-queue:///path`: a socket to meet at, and a pair of queues for each client, all 0600."""

    def __init__(self, path: str, wait: Wait = Wait.ADAPTIVE) -> None:
        """Raises Error: INVALID_ARGUMENT for a path that is empty or too long."""
        self._meeting = Meeting("sysv-queue", path)
        self.url = self._meeting.url
        self._path = path
        self._wait = wait

    def connect(self, deadline_ns: int) -> Stream:
        life_line, answer = self._meeting.connect(deadline_ns)
        try:
            if len(answer.body) != ANSWER.size:
                raise ProtocolError("not an answer of sysv-queue")
            key, chunk_bytes = ANSWER.unpack(answer.body)
            if not is_ours(key) or not 0 < chunk_bytes <= CHUNK_BYTES_MAX:
                raise ProtocolError("not an answer of sysv-queue")
            queues = self._open(key + 1, chunk_bytes), self._open(key, chunk_bytes)
            return QueueStream(life_line, queues, chunk_bytes, self._wait, key, None)
        except BaseException:
            life_line.close()
            raise

    def listen(self) -> Listener:
        door = self._meeting.open()
        try:
            journal = Journal(self._path)
        except BaseException:
            door.sock.close()
            door.close()
            raise

        def welcome(life_line: socket.socket, hello: Record) -> tuple[Stream, Record]:
            chunk_bytes, key, queues = _make(journal)
            try:
                stream = QueueStream(life_line, queues, chunk_bytes, self._wait, key, journal)
            except BaseException:  # no descriptor for a watcher, perhaps
                _unmake(journal, key, queues)
                raise
            return stream, Record(ANSWER.pack(key, chunk_bytes))

        def cleanup() -> None:
            journal.close()
            door.close()

        return MeetingListener(self._meeting, door, welcome, cleanup)

    def _open(self, key: int, chunk_bytes: int) -> sysv_ipc.MessageQueue:
        """A queue that the server has made. Opened with its full size: a message that is too long
        for the reader would stay at the head for ever."""
        try:
            queue = sysv_ipc.MessageQueue(key, max_message_size=chunk_bytes)
        except sysv_ipc.ExistentialError:
            what = "the server's queue is not here: it has gone, or is in another IPC namespace"
            raise Error(Status.UNAVAILABLE, what, self.url) from None
        except (sysv_ipc.Error, OSError) as error:
            raise refusal("msgget", error) from None
        if queue.cuid not in (os.geteuid(), 0):
            what = f"the queue is of uid {queue.cuid}"
            raise Error(Status.PERMISSION_DENIED, what, self.url)
        return queue


def _make(
    journal: Journal,
) -> tuple[int, int, tuple[sysv_ipc.MessageQueue, sysv_ipc.MessageQueue]]:
    """A pair of new queues: their chunk, their key, and they. Raises Error: RESOURCE_EXHAUSTED."""
    while True:
        key = journal.reserve()
        made: list[sysv_ipc.MessageQueue] = []
        try:
            chunk_bytes = min(limit("msgmax"), limit("msgmnb") // 2, CHUNK_BYTES_MAX)
            for number in (key, key + 1):
                made.append(
                    sysv_ipc.MessageQueue(number, sysv_ipc.IPC_CREX, 0o600, max(1, chunk_bytes))
                )
            return max(1, chunk_bytes), key, (made[0], made[1])
        except sysv_ipc.ExistentialError:
            _unmake(journal, key, made)  # somebody has this key: take another
        except (sysv_ipc.Error, OSError, ValueError, MemoryError) as error:
            _unmake(journal, key, made)
            raise refusal("msgget", error) from None


def _unmake(journal: Journal, key: int, made: Sequence[sysv_ipc.MessageQueue]) -> None:
    for queue in made:
        _remove(queue)
    journal.release(key)
