"""Stream sockets: `unix` (one machine) and `tcp` (also the next one).

Pick `unix` when in doubt: bidirectional, the kernel names the peer's user, and its end shows at
once. Pick `tcp` when the peers may part one day; it costs about half as much again on loopback.

Meeting: listen and accept. `unix` takes a lock beside its address first, so that a second server
is told so and the socket of a dead one is reclaimed; for `tcp` the kernel's own rule suffices.

The trap: a socket is a stream, so a read may end anywhere and a write may be partial. Others are
remedied where they bite below: Nagle's delay, SIGPIPE, connecting to oneself, full descriptors.

Copy with it: errors, system, unix_address (and frame, session, client, server for the calls).
Run: python -m ipc_bridge.peer serve unix:///tmp/demo.sock
"""

import contextlib
import errno
import ipaddress
import select
import socket
from collections.abc import Callable, Sequence

from ipc_bridge.errors import Error, Status, SystemError
from ipc_bridge.system import (
    END,
    EXHAUSTED,
    NEVER,
    POLL_MS_MAX,
    RETRY_NS,
    WOULD_BLOCK,
    Buffer,
    Listener,
    Spinner,
    Stream,
    Transport,
    Wait,
    Wakeup,
    check_peer,
    checked,
    now_ns,
    persist,
    sleep_until_ready,
)
from ipc_bridge.transports.unix_address import BACKLOG, UnixAddress

NOW = int(socket.MSG_DONTWAIT)  # plain numbers: to join two flags of an enum costs 700 ns
NOW_QUIETLY = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
# Of a Unix socket. Linux doubles it (socket(7)), so a frame of 1 MiB wakes its reader once; with
# the default, 208 KiB, five times. net.core.wmem_max bounds it. (TCP sizes its own: tcp(7).)
SEND_BUFFER_BYTES = 512 << 10
# ENOTCONN: the server went at once, which getpeername(2) tells.
LATER = (
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ENOTCONN,
    errno.EADDRNOTAVAIL,
    errno.EHOSTUNREACH,
)
PROBE_AFTER_S, PROBES = 5, 5  # silence, then a probe a second unanswered: the host is gone (tcp(7))


class SocketStream(Stream):
    """A connected socket, in blocking mode: MSG_DONTWAIT says where not to wait, so that a reader
    with nothing else to do sleeps and reads in one system call."""

    def __init__(self, sock: socket.socket, wait: Wait) -> None:
        sock.setblocking(True)
        self.spinner = Spinner(wait)
        self._sock = sock
        self._recv_into, self._send = sock.recv_into, sock.send
        self._poll = select.poll()
        self._poll.register(sock, 0)

    def try_read(self, buffer: memoryview) -> int:
        try:
            return self._recv_into(buffer, 0, NOW) or END
        except BlockingIOError:
            return WOULD_BLOCK
        except OSError as error:
            return _end_of(error)

    def try_write(self, buffers: Sequence[Buffer]) -> int:
        try:
            if len(buffers) == 1:
                return self._send(buffers[0], NOW_QUIETLY)
            return self._sock.sendmsg(buffers, (), NOW_QUIETLY)
        except BlockingIOError:
            return WOULD_BLOCK
        except OSError as error:
            return _end_of(error)

    def wait(self, readable: bool, writable: bool, deadline_ns: int) -> bool:
        events = (select.POLLIN if readable else 0) | (select.POLLOUT if writable else 0)
        self._poll.modify(self._sock, events)
        return sleep_until_ready(self._poll, deadline_ns)

    def _sleep_and_read(self, buffer: memoryview, deadline_ns: int) -> int:
        if deadline_ns != NEVER:
            return super()._sleep_and_read(buffer, deadline_ns)
        try:
            return self._recv_into(buffer) or END
        except OSError as error:
            return _end_of(error)

    def fileno(self) -> int:
        return self._sock.fileno()

    def interrupt(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)

    def close(self) -> None:
        self._sock.close()


def _end_of(error: OSError) -> int:
    """END for the errors that mean that the peer has gone; others are raised."""
    if error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ETIMEDOUT, errno.EHOSTUNREACH):
        return END
    raise SystemError("recv or send", error.errno or 0, "socket") from None


class SocketListener(Listener):
    """A listening socket; `admit` says whether a client may stay, by raising Error."""

    def __init__(
        self,
        sock: socket.socket,
        url: str,
        wait: Wait,
        admit: Callable[[socket.socket], None],
        cleanup: Callable[[], None],
    ) -> None:
        self.url = url
        self._sock = sock
        self._wait = wait
        self._admit = admit
        self._cleanup = cleanup
        self._wakeup = Wakeup()
        self._stopped = False
        sock.setblocking(False)

    def accept(self) -> Stream | None:
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        poll.register(self._sock, select.POLLIN)
        while True:
            poll.poll()
            if self._stopped:
                return None
            try:
                sock, _ = self._sock.accept()
            except OSError as error:
                if error.errno in EXHAUSTED:  # still readable: without a pause this would spin
                    self._pause()
                continue  # anything else concerns a client that has left already: accept(2)
            try:
                self._admit(sock)
                return SocketStream(sock, self._wait)
            except (Error, OSError):
                sock.close()

    def interrupt(self) -> None:
        self._stopped = True
        self._wakeup.set()

    def close(self) -> None:
        self._sock.close()
        self._wakeup.close()
        cleanup, self._cleanup = self._cleanup, lambda: None
        cleanup()

    def _pause(self) -> None:
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        sleep_until_ready(poll, now_ns() + RETRY_NS)


class Unix(Transport):
    """`unix:///path`: a socket file, mode 0600, and `path.lock` while a server lives."""

    def __init__(self, path: str, wait: Wait = Wait.ADAPTIVE) -> None:
        """Raises Error: INVALID_ARGUMENT for a path that is empty or too long."""
        self.url = f"unix://{path}"
        self._address = UnixAddress(path, self.url, socket.SOCK_STREAM)
        self._wait = wait

    def connect(self, deadline_ns: int) -> Stream:
        sock = self._address.connect(deadline_ns)
        _widen(sock)
        return SocketStream(sock, self._wait)

    def listen(self) -> Listener:
        def admit(sock: socket.socket) -> None:
            check_peer(sock, self.url)
            _widen(sock)

        door = self._address.listen()
        try:
            return SocketListener(door.sock, self.url, self._wait, admit, door.close)
        except BaseException:
            door.sock.close()
            door.close()
            raise


class Tcp(Transport):
    """`tcp://host:port`; port 0 lets the kernel choose. A server binds loopback unless
    `allow_remote` is set: there is neither encryption nor a password on this wire."""

    def __init__(
        self, host: str, port: int, wait: Wait = Wait.ADAPTIVE, allow_remote: bool = False
    ) -> None:
        self.host = host
        self.port = port
        self.url = _tcp_url(host, port)
        self._wait = wait
        self._allow_remote = allow_remote

    def connect(self, deadline_ns: int) -> Stream:
        def attempt() -> socket.socket:
            family, address = self._resolve()
            sock = _make_socket(family)
            try:
                if deadline_ns != NEVER:
                    left_s = max(0.001, (deadline_ns - now_ns()) / 1e9)
                    sock.settimeout(min(left_s, POLL_MS_MAX / 1000))
                sock.connect(address)
                if sock.getsockname() == sock.getpeername():
                    # A port of the ephemeral range with no server: TCP may meet itself there.
                    raise ConnectionRefusedError(errno.ECONNREFUSED, "connected to oneself")
                _prepare(sock)
            except TimeoutError:
                sock.close()
                raise ConnectionRefusedError(errno.ECONNREFUSED, "timed out") from None
            except BaseException:
                sock.close()
                raise
            return sock

        return SocketStream(persist(attempt, LATER, self.url, deadline_ns), self._wait)

    def listen(self) -> Listener:
        family, address = self._resolve()
        if not self._allow_remote and not ipaddress.ip_address(address[0]).is_loopback:
            what = "not a loopback address; ?allow_remote=1 serves other hosts, unencrypted"
            raise Error(Status.PERMISSION_DENIED, what, self.url)
        sock = _make_socket(family)
        try:
            # Else the connections of an earlier server block its port for a minute: socket(7).
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with checked("bind", self.url):
                sock.bind(address)
                sock.listen(BACKLOG)
            url = _tcp_url(self.host, sock.getsockname()[1])
            return SocketListener(sock, url, self._wait, _prepare, lambda: None)
        except BaseException:
            sock.close()
            raise

    def _resolve(self) -> tuple[socket.AddressFamily, tuple[str, int]]:
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):  # the latter for what no name of a host can be
            raise Error(Status.NOT_FOUND, "unknown host", self.url) from None
        return found[0][0], (str(found[0][4][0]), self.port)


def _widen(sock: socket.socket) -> None:
    """Set what every Unix connection of ours needs."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)


def _tcp_url(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _make_socket(family: socket.AddressFamily) -> socket.socket:
    with checked("socket", "tcp"):
        return socket.socket(family, socket.SOCK_STREAM)


def _prepare(sock: socket.socket) -> None:
    """Set what every TCP connection of ours needs (tcp(7)).

    TCP_USER_TIMEOUT is not of that kind: it also ends a connection whose reader stops for that
    long, though its host answers all the time.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a reply must not wait for an ACK
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that fell silent
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_AFTER_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
