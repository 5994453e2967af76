"""How peers meet that will move their bytes elsewhere: shared memory and System V objects.

A client knocks at a Unix socket and sends one record; only then does the server make what they will
share, and one record answers, with its names or its descriptors. Who says nothing costs a
descriptor, and that for 5 s: no memory, no queue, no thread.

The socket stays, as the life-line: it carries no data, and its end-of-file is the peer's end,
however that came (the kernel closes it). A process id would not do: it is reused, and means nothing
in another PID namespace.

A record is one packet of a SOCK_SEQPACKET socket, so it comes whole or not at all:

    0 "IPCM" | 4 u16 version | 6 u16 status | 8 scheme, 16 bytes, padded with zeros | 24 body

with up to FDS_MAX descriptors beside it (SCM_RIGHTS, unix(7)). A status that is not OK refuses, and
the body is its message.

Copy with it: errors, system, unix_address.
"""

import contextlib
import errno
import os
import select
import socket
import struct
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from ipc_bridge.errors import Error, Status, SystemError
from ipc_bridge.system import (
    EXHAUSTED,
    NEVER,
    RETRY_NS,
    Listener,
    Stream,
    Wakeup,
    check_peer,
    deadline_after,
    now_ns,
    persist,
    sleep_until_ready,
)
from ipc_bridge.transports.unix_address import LATER, UnixAddress, UnixDoor

HEADER = struct.Struct("<4sHH16s")
MAGIC = b"IPCM"
VERSION = 1
BODY_BYTES_MAX = 1024  # names and sizes; a refusal's message has as much (errors)
FDS_MAX = 4  # more in one packet are closed by the kernel, and the packet refused
STRANGERS_MAX = 256  # who have not sent their record; beyond, the oldest is dropped
STRANGER_S = 5.0  # who has sent none for so long is dropped


@dataclass
class Record:
    """What one peer tells the other. Its descriptors are the receiver's: take them out of `fds`
    (`take_fd`), or `close` closes them."""

    body: bytes = b""
    fds: list[int] = field(default_factory=list)

    def take_fd(self, where: str) -> int:
        """The next descriptor, yours now. Raises Error: INTERNAL if there is none."""
        if not self.fds:
            raise Error(Status.INTERNAL, "the peer has sent no descriptor", where)
        return self.fds.pop(0)

    def close(self) -> None:
        """Close the descriptors that nobody took. Idempotent."""
        while self.fds:
            os.close(self.fds.pop())


# Makes what a client shares with its server, from the client's record: the stream, which owns the
# life-line from then on, and the answer, whose descriptors are closed once they are sent. Raises
# Error to refuse the client, who is told so; the life-line is not taken then.
Welcome = Callable[[socket.socket, Record], tuple[Stream, Record]]


class Meeting:
    """The address at which the peers of one scheme meet: a socket at `path`, mode 0600, and
    `path.lock` while a server lives."""

    def __init__(self, scheme: str, path: str) -> None:
        """Raises Error: INVALID_ARGUMENT for a path that is empty or too long."""
        self.scheme = scheme
        self.url = f"{scheme}://{path}"
        self._address = UnixAddress(path, self.url, socket.SOCK_SEQPACKET)

    def connect(
        self, deadline_ns: int, hello: Record | None = None
    ) -> tuple[socket.socket, Record]:
        """Knock, and wait for the answer: the life-line, in non-blocking mode, and the answer.

        The descriptors of `hello` are sent and stay the caller's. Raises as Transport.connect, and
        what the server says if it refuses (RESOURCE_EXHAUSTED: it has no more to share).
        """

        def attempt() -> tuple[socket.socket, Record]:
            sock = self._address.attempt()
            with contextlib.ExitStack() as undo:
                undo.callback(sock.close)
                if send_record(sock, self.scheme, hello or Record()):
                    poll = select.poll()
                    poll.register(sock, select.POLLIN)
                    if not sleep_until_ready(poll, deadline_ns):
                        raise Error(Status.UNAVAILABLE, "no server", self.url)
                    answer = receive_record(sock, self.scheme, self.url)
                    if answer is not None:
                        undo.pop_all()
                        return sock, answer
            # The server went as we knocked: its successor may be on the way.
            raise ConnectionRefusedError(errno.ECONNREFUSED, "no answer")

        return persist(attempt, LATER, self.url, deadline_ns)

    def open(self) -> UnixDoor:
        """Become the server of this address. Raises as Transport.listen."""
        return self._address.listen()


class MeetingListener(Listener):
    """Takes clients' records, however slowly they come, and answers them."""

    def __init__(
        self,
        meeting: Meeting,
        door: UnixDoor,
        welcome: Welcome,
        cleanup: Callable[[], None] | None = None,
    ) -> None:
        """`cleanup` closes the door, in the end, and whatever must be done under its lock."""
        self.url = meeting.url
        self._scheme = meeting.scheme
        self._welcome = welcome
        self._sock = door.sock
        self._sock.setblocking(False)
        self._cleanup = cleanup or door.close
        self._strangers: dict[int, tuple[socket.socket, int]] = {}  # and until when; oldest first
        self._wakeup = Wakeup()
        self._stopped = False
        self._poll = select.poll()
        self._poll.register(self._wakeup, select.POLLIN)
        self._poll.register(self._sock, select.POLLIN)

    def accept(self) -> Stream | None:
        while True:
            first_ns = next((until for _, until in self._strangers.values()), NEVER)
            sleep_until_ready(self._poll, first_ns)
            ready = [fd for fd, _ in self._poll.poll(0)]
            if self._stopped:
                return None
            for fd in [fd for fd in ready if fd in self._strangers]:
                stream = self._answer(self._part(fd))
                if stream is not None:
                    return stream
            if self._sock.fileno() in ready:
                self._admit()
            self._expire()

    def interrupt(self) -> None:
        self._stopped = True
        self._wakeup.set()

    def close(self) -> None:
        for fd in list(self._strangers):
            self._part(fd).close()
        self._sock.close()
        self._wakeup.close()
        cleanup, self._cleanup = self._cleanup, lambda: None
        cleanup()

    def _admit(self) -> None:
        """Let a client in, as a stranger."""
        try:
            sock, _ = self._sock.accept()
        except OSError as error:
            if error.errno in EXHAUSTED:  # still readable: without a pause this would spin
                self._pause()
            return  # anything else concerns a client that has left already: accept(2)
        sock.setblocking(False)
        try:
            check_peer(sock, self.url)
        except Error as error:
            self._refuse(sock, error)
            return
        if len(self._strangers) >= STRANGERS_MAX:
            self._part(next(iter(self._strangers))).close()
        self._strangers[sock.fileno()] = (sock, deadline_after(STRANGER_S))
        self._poll.register(sock, select.POLLIN)

    def _part(self, fd: int) -> socket.socket:
        """A stranger's socket, no longer a stranger's."""
        self._poll.unregister(fd)
        return self._strangers.pop(fd)[0]

    def _answer(self, sock: socket.socket) -> Stream | None:
        """Take a stranger's record, and make what it asks for; None if it has to go."""
        hello = answer = None
        try:
            hello = receive_record(sock, self._scheme, self.url)
            if hello is None:
                sock.close()
                return None
            stream, answer = self._welcome(sock, hello)
            if send_record(sock, self._scheme, answer):
                return stream
            stream.close()  # it left before the answer
        except Error as error:
            self._refuse(sock, error)
        except OSError as error:
            self._refuse(sock, SystemError("set-up", error.errno or 0, self.url))
        finally:
            for record in (hello, answer):
                if record is not None:
                    record.close()
        return None

    def _refuse(self, sock: socket.socket, error: Error) -> None:
        message = error.what.encode()[:BODY_BYTES_MAX]
        send_record(sock, self._scheme, Record(message), error.status)
        sock.close()

    def _expire(self) -> None:
        """Drop the strangers whose time is over."""
        now = now_ns()
        for fd, (_, until_ns) in list(self._strangers.items()):
            if until_ns > now:
                return
            self._part(fd).close()

    def _pause(self) -> None:
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        sleep_until_ready(poll, now_ns() + RETRY_NS)


def is_over(life_line: socket.socket) -> bool:
    """Has the peer gone? What it wrote before that, wherever it wrote, is there by now."""
    poll = select.poll()
    poll.register(life_line, select.POLLRDHUP)
    return bool(poll.poll(0))


def send_record(
    sock: socket.socket, scheme: str, record: Record, status: Status = Status.OK
) -> bool:
    """Send one, at once: the first packet on a socket always has room. False: the peer has gone."""
    packet = HEADER.pack(MAGIC, VERSION, status, scheme.encode()) + record.body
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", record.fds))] if record.fds else []
    try:
        return bool(sock.sendmsg([packet], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL))
    except OSError:
        return False


def receive_record(sock: socket.socket, scheme: str, where: str) -> Record | None:
    """Take the record that is there, at once; None if the peer has gone instead.

    Raises Error: what the record says if it refuses, INTERNAL for one that breaks the rules,
    INVALID_ARGUMENT for another scheme's, FAILED_PRECONDITION for another version's,
    RESOURCE_EXHAUSTED if there is no room here for its descriptors.
    """
    size_max = HEADER.size + BODY_BYTES_MAX
    try:
        # (socket.recv_fds drops its flags, so its descriptors would pass to every child.)
        asked = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        room = socket.CMSG_SPACE(FDS_MAX * array("i").itemsize)
        packet, rights, flags, _ = sock.recvmsg(size_max, room, asked)
    except OSError:  # ECONNRESET: it went without reading what we sent
        return None
    if not packet:
        return None
    fds = array("i")
    for level, kind, data in rights:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    record = Record(packet[HEADER.size :], list(fds))
    try:
        if flags & socket.MSG_CTRUNC:
            raise Error(Status.RESOURCE_EXHAUSTED, "no room for the peer's descriptors", where)
        if len(packet) < HEADER.size or flags & socket.MSG_TRUNC or packet[:4] != MAGIC:
            raise Error(Status.INTERNAL, "protocol error: not a meeting's record", where)
        _, version, status, name = HEADER.unpack_from(packet)
        if version != VERSION:
            what = f"the peer meets by version {version}, not {VERSION}"
            raise Error(Status.FAILED_PRECONDITION, what, where)
        if name.rstrip(b"\0") != scheme.encode():
            raise Error(Status.INVALID_ARGUMENT, "the peer uses another scheme here", where)
        if status != Status.OK:
            raise Error(_status_of(status), record.body.decode(errors="replace"), where)
    except BaseException:
        record.close()
        raise
    return record


def _status_of(code: int) -> Status:
    try:
        return Status(code)
    except ValueError:
        return Status.UNKNOWN
