"""ZeroMQ: `zmq+ipc` (one machine) and `zmq+tcp` (other hosts too), DEALER to ROUTER.

Pick it when ZeroMQ is what your programs speak already, or for its encryption (CURVE). It costs two
more thread switches each way than a plain socket, as a thread of libzmq's own moves the bytes.

Meeting: a ROUTER binds, a DEALER connects. After the routing id, the parts of a message, joined,
are whole frames; small ones share a part, a large payload is one. An empty message is the end of
the server's output: a ROUTER cannot hang up on one client.

The traps, all of one kind: ZeroMQ hides what happens to a connection.
- A DEALER connects again by itself, and hands an old call to a new server. RECONNECT_IVL=-1 or
  IMMEDIATE=1 prevent that, but drop what has come and is not read yet when the connection ends: so
  the interval is 24 days here, and the socket's monitor tells of the end.
- A ROUTER drops what it cannot deliver, unless ROUTER_MANDATORY is set, or above a high-water mark:
  so there is none. The session's credit bounds what is sent ahead; for who sends calls and reads
  no answers a ROUTER cannot tell what waits, or stop reading him: so now and then a message is sent
  that says when it has left (a MessageTracker), and his input is limited. POLLOUT of a ROUTER is
  always true. (A DEALER is bounded likewise: requests whose deadlines pass would heap up before a
  server that stands still.)
- Whose connection has ended? The monitor names a descriptor, and so does a client's first message.
- ZMQ_FD says that something may have changed, once: whoever sleeps on it looks at EVENTS before,
  after his last call to the socket. A zmq_recv(3) that waits does all that in one call, but sees
  no monitor, and pyzmq repeats it after a signal, with its whole timeout: so it is short, and not
  done before a deadline while a timer of setitimer(2) runs; other signals that come every few
  milliseconds put off deadlines, and the news of a peer's death. (C++ comes back from each.)
- A second bind takes an ipc path over without a word: hence the lock, and a socket bound by us.

Copy with it: zeromq_socket, zeromq_curve, zeromq_client, zeromq_server, errors, system,
unix_address (and frame, session, client, server for the calls).
Run: python -m ipc_bridge.peer serve zmq+ipc:///tmp/demo.sock
"""

import errno
import ipaddress
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import zmq

from ipc_bridge.errors import Error, Status, SystemError, status_of_errno
from ipc_bridge.system import (
    CONNECT_RETRY_S,
    Listener,
    Stream,
    Transport,
    Wait,
    check_peer,
    now_ns,
    sleep_until_ready,
)
from ipc_bridge.transports.unix_address import LATER, UnixAddress
from ipc_bridge.transports.zeromq_client import CLIENTS, DealerStream
from ipc_bridge.transports.zeromq_curve import CurveKeys, KeyChecker
from ipc_bridge.transports.zeromq_server import RouterHub
from ipc_bridge.transports.zeromq_socket import (
    RECEIVE_MS,
    SOCKETS_MAX,
    Poller,
    close_monitor,
    events_of,
)

RECONNECT_IVL_MS = (1 << 31) - 1  # 24 days: never; see above
HANDSHAKE_IVL_MS = 5_000  # who says no ZMTP greeting in this time is a stranger, and hung up on
PART_BYTES_MORE = 1 << 20  # of MAXMSGSIZE, above a payload: small frames that share a part
PROBE_AFTER_S, PROBES = 5, 5  # silence, then a probe a second unanswered: the host is gone (tcp(7))
INBOX_BYTES_MORE = 2 << 20  # above two payloads: who is not read and sends more is hung up on


REFUSALS = (zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)


class Zmq(Transport):
    """What both schemes share: the sockets' options, and reaching a server."""

    def __init__(self, url: str, address: str, wait: Wait, curve: str) -> None:
        """`curve` is a file of keys, read when they are needed, or "". Raises Error:
        INVALID_ARGUMENT for a wait that cannot be."""
        if wait == Wait.SPIN:
            what = "ZeroMQ has no spin: its own threads would starve; wait is block"
            raise Error(Status.INVALID_ARGUMENT, what, url)
        self.url = url
        # As bytes, which need not be UTF-8.
        self._address: Any = os.fsencode(address)
        self._curve = curve

    def connect(self, deadline_ns: int) -> Stream:
        keys = CurveKeys(self._curve) if self._curve else None
        pause_s, longest_s = CONNECT_RETRY_S
        while True:
            stream = self._attempt(keys, deadline_ns)
            if stream is not None:
                return stream
            self._check_refusal()
            left_ns = deadline_ns - now_ns()
            if left_ns <= 0:
                missing = "no server, or none that shares our keys" if keys else "no server"
                raise Error(Status.UNAVAILABLE, missing, self.url)
            time.sleep(min(pause_s, left_ns / 1e9))
            pause_s = min(2 * pause_s, longest_s)

    def _attempt(self, keys: CurveKeys | None, deadline_ns: int) -> Stream | None:
        """Connect once; None if no server answers (yet)."""
        dealer = CLIENTS.open()
        try:
            self._prepare(dealer)
            dealer.set(zmq.RECONNECT_IVL, RECONNECT_IVL_MS)
            if keys is not None:
                keys.prepare_dealer(dealer)
            monitor = dealer.get_monitor_socket()
        except BaseException:
            CLIENTS.close(dealer)
            raise
        try:
            dealer.connect(self._address)
            if self._shake_hands(monitor, deadline_ns):
                return DealerStream(dealer, monitor)
        except BaseException as error:
            close_monitor(dealer, monitor)
            CLIENTS.close(dealer)
            if isinstance(error, zmq.ZMQError):
                raise _error("connect", error, self.url) from None
            raise
        close_monitor(dealer, monitor)
        CLIENTS.close(dealer)
        return None

    def _shake_hands(self, monitor: zmq.Socket[bytes], deadline_ns: int) -> bool:
        poll = Poller()
        poll.register(monitor, zmq.POLLIN)
        while True:
            for number, value in events_of(monitor):
                if number == zmq.EVENT_CONNECTED:
                    try:
                        self._check_server(value)
                    except OSError:  # it has gone already
                        return False
                elif number == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    return True
                elif number in REFUSALS:
                    what = (
                        "no handshake: another protocol, or CURVE keys that one end does not know"
                    )
                    raise Error(Status.UNAUTHENTICATED, what, self.url)
                elif number in (zmq.EVENT_CLOSED, zmq.EVENT_DISCONNECTED):
                    return False
            if not sleep_until_ready(poll, deadline_ns):
                return False

    def _check_server(self, fd: int) -> None:
        """May we talk to whom we have reached?"""

    def _check_refusal(self) -> None:
        """Raise an Error if another attempt is in vain."""

    def _prepare(self, sock: zmq.Socket[bytes]) -> None:
        """Set what both ends need (zmq_setsockopt(3))."""
        sock.set(zmq.SNDHWM, 0)  # a ROUTER would drop, a DEALER block; credit is the bound
        sock.set(zmq.RCVHWM, 0)
        sock.set(zmq.RCVTIMEO, RECEIVE_MS)
        sock.set(zmq.HANDSHAKE_IVL, HANDSHAKE_IVL_MS)
        # What a peer may make libzmq hold before a frame's size is looked at.
        sock.set(zmq.MAXMSGSIZE, self.payload_bytes_max + PART_BYTES_MORE)
        sock.set(zmq.IPV6, 1)

    def _listen(self, fd: int, is_local: bool, cleanup: Callable[[], None]) -> Listener:
        """Give a listening socket to a ROUTER."""
        context: zmq.Context[Any] = zmq.Context()
        context.set(zmq.MAX_SOCKETS, SOCKETS_MAX)
        router = context.socket(zmq.ROUTER)
        monitor = checker = None
        try:
            self._prepare(router)
            if self._curve:
                keys = CurveKeys(self._curve)
                keys.prepare_router(router)
                checker = KeyChecker(context, keys)
            router.set(zmq.ROUTER_MANDATORY, 1)  # else it drops what it cannot deliver
            if fd >= 0:
                router.set(zmq.USE_FD, fd)
            monitor = router.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
            router.bind(self._address)
            url = self._url_of(router)
            inbox_bytes_max = 2 * self.payload_bytes_max + INBOX_BYTES_MORE
            return RouterHub(
                context, router, monitor, url, checker, is_local, cleanup, inbox_bytes_max
            )
        except BaseException as error:
            if checker is not None:
                checker.socket.close(0)
            if monitor is not None:
                close_monitor(router, monitor)
            router.close(0)
            context.term()
            if isinstance(error, zmq.ZMQError):
                raise _error("bind", error, self.url) from None
            raise

    def _url_of(self, router: zmq.Socket[bytes]) -> str:
        """With the port filled in."""
        return self.url


def _error(call: str, error: zmq.ZMQError, url: str) -> Error:
    number = error.errno or 0
    return Error(status_of_errno(number), f"{call}: {zmq.strerror(number)}", url)


class ZmqIpc(Zmq):
    """`zmq+ipc:///path`: a socket file, mode 0600, and `path.lock` while a server lives."""

    def __init__(self, path: str, wait: Wait = Wait.BLOCK, curve: str = "") -> None:
        """Raises Error: INVALID_ARGUMENT for a path that is empty or too long; as Zmq."""
        super().__init__(f"zmq+ipc://{path}", f"ipc://{path}", wait, curve)
        self._unix = UnixAddress(path, self.url, socket.SOCK_STREAM)

    def listen(self) -> Listener:
        door = self._unix.listen()
        try:
            door.sock.setblocking(False)
            return self._listen(door.sock.detach(), True, door.close)
        except BaseException:
            door.close()
            raise

    def _check_refusal(self) -> None:
        """libzmq keeps the errno of connect(2) to itself."""
        try:
            self._unix.attempt().close()
        except OSError as error:
            if error.errno not in LATER:
                raise SystemError("connect", error.errno or 0, self.url) from None

    def _check_server(self, fd: int) -> None:
        with _duplicate(fd) as sock:
            check_peer(sock, self.url)


class ZmqTcp(Zmq):
    """`zmq+tcp://host:port`; port 0 lets the kernel choose. A server binds loopback unless it has
    keys, or `allow_remote` is set: there is neither encryption nor a password then."""

    def __init__(
        self,
        host: str,
        port: int,
        wait: Wait = Wait.BLOCK,
        curve: str = "",
        allow_remote: bool = False,
    ) -> None:
        where = _join(host, port)
        super().__init__(f"zmq+tcp://{where}", f"tcp://{where}", wait, curve)
        self.host = host
        self._allow_remote = allow_remote

    def listen(self) -> Listener:
        may_leave = self._curve or self._allow_remote
        if not may_leave and not ipaddress.ip_address(self._resolve()).is_loopback:
            what = "not a loopback address: it takes keys, ?curve=FILE (or ?allow_remote=1)"
            raise Error(Status.PERMISSION_DENIED, what, self.url)
        return self._listen(-1, False, lambda: None)

    def _prepare(self, sock: zmq.Socket[bytes]) -> None:
        super()._prepare(sock)
        sock.set(zmq.TCP_KEEPALIVE, 1)  # a host that fell silent
        sock.set(zmq.TCP_KEEPALIVE_IDLE, PROBE_AFTER_S)
        sock.set(zmq.TCP_KEEPALIVE_INTVL, 1)
        sock.set(zmq.TCP_KEEPALIVE_CNT, PROBES)

    def _resolve(self) -> str:
        try:
            found = socket.getaddrinfo(self.host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):  # the latter for what no name of a host can be
            raise Error(Status.NOT_FOUND, "unknown host", self.url) from None
        return str(found[0][4][0])

    def _url_of(self, router: zmq.Socket[bytes]) -> str:
        endpoint = router.getsockopt_string(zmq.LAST_ENDPOINT)
        return f"zmq+tcp://{_join(self.host, int(endpoint.rpartition(':')[2]))}"

    def _check_server(self, fd: int) -> None:
        """A port of the ephemeral range with no server: TCP may meet itself there."""
        with _duplicate(fd) as sock:
            if sock.getsockname() == sock.getpeername():
                raise ConnectionRefusedError(errno.ECONNREFUSED, "connected to oneself")


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _duplicate(fd: int) -> socket.socket:
    """A socket of libzmq's, to ask the kernel about."""
    return socket.socket(fileno=os.dup(fd))


__all__ = ["ZmqIpc", "ZmqTcp"]
