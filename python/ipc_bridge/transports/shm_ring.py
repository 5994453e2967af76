"""Shared memory: `shm`, two lock-free rings between a client and its server. The fastest way.

Pick it when a call costs more than it does: a round trip is two cache lines each way while both
spin, and large payloads move at the speed of two copies. Spinning is what makes it fast: a reader
that sleeps is woken through a socket, at a socket's price.

Meeting: as `meeting`. The server makes the memory once a client has said who it is, and passes its
descriptor; no name leads to it, so nothing is left of it, whoever dies.

The trap: the other process writes into our memory. The ring trusts nothing that it reads there
(ring.hpp), and refuses memory that could shrink under it. And pure Python cannot do it: it has no
atomics, and what it writes into shared memory may tear. So the stream is C++ (`_native`).

Copy with it: errors, system, unix_address, meeting, native.cpp and its headers (and frame, session,
client, server for the calls).
Run: python -m ipc_bridge.peer serve shm:///tmp/demo.sock?wait=spin
"""

import contextlib
import socket
import struct

from ipc_bridge.errors import Error, ProtocolError, Status
from ipc_bridge.system import Listener, Stream, Transport, Wait
from ipc_bridge.transports.meeting import Meeting, MeetingListener, Record

try:
    from ipc_bridge import _native
except ImportError as error:
    _missing = str(error)
else:
    _missing = ""
    Stream.register(_native.RingStream)

WELCOME = struct.Struct("<II")  # layout of the memory (see ring.hpp), capacity_bytes
LAYOUT = 1


class Shm(Transport):
    """`shm:///path`: a socket file, mode 0600, and `path.lock` while a server lives."""

    def __init__(
        self, path: str, wait: Wait = Wait.ADAPTIVE, capacity_bytes: int | None = None
    ) -> None:
        """`capacity_bytes` of each ring is the server's to say. Raises Error: INVALID_ARGUMENT for
        a path that is empty or too long, and unless it is a power of two from 64 KiB to 1 GiB;
        FAILED_PRECONDITION if the native module is not there."""
        self._meeting = Meeting("shm", path)
        self.url = self._meeting.url
        self._wait = wait
        if _missing:
            what = f"shm needs ipc_bridge._native ({_missing}): run `make build`, or pip install ."
            raise Error(Status.FAILED_PRECONDITION, what, self.url)
        self._capacity_bytes = capacity_bytes or _native.CAPACITY_BYTES
        if not _native.is_capacity(self._capacity_bytes):
            what = f"a ring of {self._capacity_bytes} bytes"
            raise Error(Status.INVALID_ARGUMENT, what, self.url)

    def connect(self, deadline_ns: int) -> Stream:
        life_line, answer = self._meeting.connect(deadline_ns)
        try:
            with contextlib.closing(answer):
                return self._attach(life_line, answer)
        except BaseException:
            life_line.close()
            raise

    def _attach(self, life_line: socket.socket, answer: Record) -> Stream:
        if len(answer.body) != WELCOME.size:
            raise ProtocolError("not the answer of a shm server", self.url)
        layout, capacity_bytes = WELCOME.unpack(answer.body)
        if layout != LAYOUT:
            raise ProtocolError("another layout of the shared memory", self.url)
        if not answer.fds:
            raise ProtocolError("an answer without the shared memory", self.url)
        return _native.attach(life_line, answer.fds[0], capacity_bytes, self._wait, self.url)

    def listen(self) -> Listener:
        def welcome(life_line: socket.socket, hello: Record) -> tuple[Stream, Record]:
            stream, fd = _native.make(life_line, self._capacity_bytes, self._wait, self.url)
            return stream, Record(WELCOME.pack(LAYOUT, self._capacity_bytes), [fd])

        return MeetingListener(self._meeting, self._meeting.open(), welcome)
