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
  so there is none, and the session's credit is the bound. POLLOUT of a ROUTER is always true.
- Whose connection has ended? The monitor names a descriptor, and so does a client's first message.
- ZMQ_FD says that something may have changed, once: whoever sleeps on it looks at EVENTS before,
  after his last call to the socket.
- A second bind takes an ipc path over without a word: hence the lock, and a socket bound by us.

Copy with it: errors, system, unix_address (and frame, session, client, server for the calls).
Run: python -m ipc_bridge.peer serve zmq+ipc:///tmp/demo.sock
"""

import errno
import ipaddress
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import zmq
import zmq.utils.z85
from zmq.utils.monitor import parse_monitor_message

from ipc_bridge.errors import Error, Status, SystemError, status_of_errno
from ipc_bridge.system import (
    CONNECT_RETRY_S,
    END,
    NEVER,
    WOULD_BLOCK,
    Buffer,
    Hub,
    Listener,
    Spinner,
    Stream,
    Transport,
    Wait,
    Wakeup,
    check_peer,
    checked,
    now_ns,
    sleep_until_ready,
)
from ipc_bridge.transports.unix_address import LATER, UnixAddress

RECONNECT_IVL_MS = (1 << 31) - 1  # 24 days: never; see above
HANDSHAKE_IVL_MS = 5_000  # who says no ZMTP greeting in this time is a stranger, and hung up on
LINGER_MS = 300  # of a server: for its last words to leave; a stopped client must not hold it up
PART_BYTES_MORE = 1 << 20  # of MAXMSGSIZE, above a payload: small frames that share a part
SOCKETS_MAX = 65_535  # of a context; a client takes three, and the default is 1023
LOOK_MESSAGES = 64  # after so many a busy server looks for who has gone

ZAP_ADDRESS = "inproc://zeromq.zap.01"  # where libzmq asks whether a key may come (RFC 27)
KEY_CHARACTERS = 40  # Z85 of 32 bytes (RFC 32)
KEYS_BYTES_MAX = 1 << 20  # of a file of keys: more clients than a server takes

REFUSALS = (zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
REFERENCE_BYTES_MIN = 64 << 10  # below, a copy is cheaper than to tell when it was sent
SEND, SEND_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)  # an enum's arithmetic is slow
POLLIN = int(zmq.POLLIN)
FIRST_BYTE_OF_AUTOMATIC_ID = 0  # zmq_setsockopt(3), ZMQ_ROUTING_ID


class CurveKeys:
    """A file of CURVE keys (RFC 26), as `ipc-bridge curve-keys DIR` makes them for either end.

    A line is a word and a key: `secret` and `public` are one's own; at a client `server` is the
    server's public key, at a server each `client` is the public key of one that may come.
    """

    def __init__(self, path: str) -> None:
        """Raises Error: NOT_FOUND, PERMISSION_DENIED unless it is ours alone, INVALID_ARGUMENT."""
        keys: dict[str, list[str]] = {"secret": [], "public": [], "server": [], "client": []}
        for line in self._read(path).splitlines():
            word, _, key = line.strip().partition(" ")
            if not word or word.startswith("#"):
                continue
            if word not in keys or len(key) != KEY_CHARACTERS:
                raise Error(Status.INVALID_ARGUMENT, "not a file of CURVE keys", path)
            keys[word].append(key)
        if len(keys["secret"]) != 1 or len(keys["public"]) != 1 or len(keys["server"]) > 1:
            raise Error(Status.INVALID_ARGUMENT, "not a file of CURVE keys", path)
        self.path = path
        self.secret, self.public = keys["secret"][0], keys["public"][0]
        self.server = "".join(keys["server"])
        self.clients = keys["client"]

    def prepare_dealer(self, dealer: zmq.Socket[bytes]) -> None:
        """Raises Error: INVALID_ARGUMENT if they are a server's."""
        if not self.server:
            raise Error(Status.INVALID_ARGUMENT, "a client's keys name its server", self.path)
        dealer.set(zmq.CURVE_SECRETKEY, self.secret.encode())
        dealer.set(zmq.CURVE_PUBLICKEY, self.public.encode())
        dealer.set(zmq.CURVE_SERVERKEY, self.server.encode())

    def prepare_router(self, router: zmq.Socket[bytes]) -> None:
        """Raises Error: INVALID_ARGUMENT if they are a client's."""
        if not self.clients:
            raise Error(Status.INVALID_ARGUMENT, "a server's keys name its clients", self.path)
        router.set(zmq.CURVE_SERVER, 1)
        router.set(zmq.CURVE_SECRETKEY, self.secret.encode())
        router.set(zmq.ZAP_DOMAIN, b"ipc-bridge")  # else nobody is asked

    @staticmethod
    def _read(path: str) -> str:
        with checked("open", path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            info = os.fstat(fd)
            if info.st_uid != os.geteuid() or info.st_mode & 0o077:
                what = "the file of keys is not ours alone (mode 0600)"
                raise Error(Status.PERMISSION_DENIED, what, path)
            with checked("read", path):
                return os.read(fd, KEYS_BYTES_MAX).decode("utf-8", "replace")
        finally:
            os.close(fd)


class KeyChecker:
    """Answers libzmq, which asks over ZAP (RFC 27) whether a client with some key may come."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: CurveKeys) -> None:
        self._keys = {zmq.utils.z85.decode(key) for key in keys.clients}
        self.socket = context.socket(zmq.REP)
        self.socket.bind(ZAP_ADDRESS)

    def answer(self) -> None:
        """All that is asked now."""
        while _is_readable(self.socket):
            asked = self.socket.recv_multipart(zmq.NOBLOCK)
            # version, request, domain, address, routing id, mechanism, credentials
            known = len(asked) == 7 and asked[5] == b"CURVE" and asked[6] in self._keys
            status = (b"200", b"OK") if known else (b"400", b"unknown key")
            request = asked[1] if len(asked) > 1 else b""
            self.socket.send_multipart((b"1.0", request, *status, b"", b""), zmq.NOBLOCK)


class _Clients:
    """The context that all clients of a process share: its threads live as long as one of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._users = 0
        self.forks = 0  # a socket does not survive them
        os.register_at_fork(after_in_child=self._after_fork)

    def open(self) -> zmq.Socket[bytes]:
        """A DEALER. `close` it here."""
        with self._lock:
            self._users += 1
            if self._context is None:
                self._context = zmq.Context()
                self._context.set(zmq.MAX_SOCKETS, SOCKETS_MAX)
            return self._context.socket(zmq.DEALER)

    def close(self, dealer: zmq.Socket[bytes]) -> None:
        """What it has not sent belongs to a call that nobody waits for."""
        dealer.close(0)
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._context is not None:
                self._context.term()
                self._context = None

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        self._context = None
        self._users = 0
        self.forks += 1


_CLIENTS = _Clients()


def _is_readable(sock: zmq.Socket[bytes]) -> bool:
    return bool(int(sock.get(zmq.EVENTS)) & POLLIN)


class DealerStream(Stream):
    """A client's end. Messages come whole, and are read bit by bit."""

    def __init__(self, dealer: zmq.Socket[bytes], monitor: zmq.Socket[bytes], url: str) -> None:
        self.spinner = Spinner(Wait.BLOCK)
        self._dealer = dealer
        self._monitor = monitor
        self._url = url
        self._rest: memoryview | None = None  # of the part that is being read
        self._more = False  # parts of its message
        self._woken = False  # something may have come since we looked
        self._gone = False  # the server: no more will come than what is here
        self._ended = False
        self._interrupted = False
        self._forks = _CLIENTS.forks
        self._poll = select.poll()
        self._poll.register(dealer.fileno(), select.POLLIN)
        self._poll.register(monitor.fileno(), select.POLLIN)
        self._epoll: select.epoll | None = None

    def try_read(self, buffer: memoryview) -> int:
        rest = self._rest
        if rest is None:
            count = self._receive()
            if count <= 0:
                return count
            rest = self._rest
            assert rest is not None
        size = min(len(buffer), len(rest))
        buffer[:size] = rest[:size]
        self._rest = rest[size:] if size < len(rest) else None
        return size

    def _receive(self) -> int:
        """Take the next part that is not empty into `_rest`: 1, WOULD_BLOCK or END."""
        self._check_fork()
        while not self._ended:
            woken, self._woken = self._woken, False
            if not woken and not _is_readable(self._dealer):
                return self._end_if_gone()
            try:
                part = self._dealer.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                continue
            starts, self._more = not self._more, part.more
            if len(part):
                self._rest = part.buffer
                return 1
            self._ended = starts and not self._more
        return END

    def _end_if_gone(self) -> int:
        if self._interrupted:
            return END
        if not self._gone and self._poll.poll(0):
            self._look_at_monitor()
            if self._gone:  # what came before that is here now
                self._woken = True
                return self._receive()
        self._ended = self._gone
        return END if self._gone else WOULD_BLOCK

    def try_write(self, buffers: Sequence[Buffer]) -> int:
        self._check_fork()
        if self._gone or self._ended:
            return END
        return _send(self._dealer, buffers)

    def wait(self, readable: bool, writable: bool, deadline_ns: int) -> bool:
        return writable or self.arm() or self._sleep(deadline_ns)

    def _sleep_and_read(self, buffer: memoryview, deadline_ns: int) -> int:
        while (count := self.try_read(buffer)) == WOULD_BLOCK:
            if not self._sleep(deadline_ns):
                return WOULD_BLOCK
        return count

    def _sleep(self, deadline_ns: int) -> bool:
        self._woken = sleep_until_ready(self._poll, deadline_ns)
        return self._woken

    def arm(self) -> bool:
        self._check_fork()
        idle = self._rest is None and not (self._gone or self._ended or self._interrupted)
        return not idle or _is_readable(self._dealer)

    def fileno(self) -> int:
        """That of an epoll(7) over the sockets' descriptors: there are two."""
        if self._epoll is None:
            self._epoll = select.epoll()
            self._epoll.register(self._dealer.fileno(), select.EPOLLIN)
            self._epoll.register(self._monitor.fileno(), select.EPOLLIN)
        return self._epoll.fileno()

    def interrupt(self) -> None:
        """Of a server's streams only; a client has nobody who would."""
        self._interrupted = True

    def close(self) -> None:
        if self._dealer.closed or self._forks != _CLIENTS.forks:
            return
        if self._epoll is not None:
            self._epoll.close()
        _close_monitor(self._dealer, self._monitor)
        _CLIENTS.close(self._dealer)

    def _look_at_monitor(self) -> None:
        """(Only this call touches the monitor's socket: its descriptor tells the truth.)"""
        for number, _ in _events(self._monitor):
            self._gone = self._gone or number == zmq.EVENT_DISCONNECTED

    def _check_fork(self) -> None:
        if self._forks != _CLIENTS.forks:
            what = "a ZeroMQ connection does not survive a fork; connect in the child"
            raise Error(Status.FAILED_PRECONDITION, what, self._url)


def _send(sock: zmq.Socket[bytes], buffers: Sequence[Buffer]) -> int:
    """Send one message, of which `buffers` are the parts, behind what was sent with SNDMORE.

    Large bytes go by reference, as nobody can change them; all else is copied into the message.
    """
    size = 0
    last = len(buffers) - 1
    for at, part in enumerate(buffers):
        flags = SEND_MORE if at < last else SEND
        count = len(part)
        sock.send(part, flags, count < REFERENCE_BYTES_MIN or type(part) is not bytes)
        size += count
    return size


def _events(monitor: zmq.Socket[bytes]) -> list[tuple[int, int]]:
    """What the monitor has to tell: events, each with its value."""
    found = []
    while _is_readable(monitor):
        event = parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))
        found.append((int(event["event"]), int(event["value"])))
    return found


def _close_monitor(sock: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
    sock.disable_monitor()
    monitor.close(0)


class RouterStream(Stream):
    """A server's end of one client: what the ROUTER brought for it waits in `inbox`.

    In a shared loop (Hub.next) the one thread does all; else the hub's thread fills the inbox, and
    takes what is written to the ROUTER.
    """

    def __init__(self, hub: "RouterHub", routing_id: bytes, fd: int) -> None:
        self.spinner = Spinner(Wait.BLOCK)
        self.routing_id = routing_id
        self.fd = fd  # of libzmq's socket
        self.inbox: deque[memoryview] = deque()
        self.is_queued = False  # among those with input
        self.gone = False
        self.closed = False
        self.changed = threading.Condition(hub.lock)
        self._hub = hub
        self._interrupted = False

    def try_read(self, buffer: memoryview) -> int:
        ended = self.gone or self._interrupted  # looked at first: what came before must be read
        if not self.inbox:
            return END if ended else WOULD_BLOCK
        part = self.inbox[0]
        size = min(len(buffer), len(part))
        buffer[:size] = part[:size]
        if size < len(part):
            self.inbox[0] = part[size:]
        else:
            self.inbox.popleft()
        return size

    def try_write(self, buffers: Sequence[Buffer]) -> int:
        if self.gone:
            return END
        return self._hub.send(self, buffers)

    def wait(self, readable: bool, writable: bool, deadline_ns: int) -> bool:
        return writable or self._hub.wait(self, deadline_ns)

    def is_ready(self) -> bool:
        """May be read, even if it is the end."""
        return bool(self.inbox or self.gone or self._interrupted)

    def fileno(self) -> int:
        return self._hub.fileno()

    def interrupt(self) -> None:
        with self._hub.lock:
            self._interrupted = True
            self.changed.notify()

    def close(self) -> None:
        self._hub.close_stream(self)


class RouterHub(Hub):
    """The ROUTER, under the lock of its address, and the streams of all its clients."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        router: zmq.Socket[bytes],
        monitor: zmq.Socket[bytes],
        url: str,
        checker: KeyChecker | None,
        is_local: bool,
        cleanup: Callable[[], None],
    ) -> None:
        self.url = url
        self.lock = threading.RLock()  # of inboxes and outbox, once there are threads
        self._context = context
        self._router = router
        self._monitor = monitor
        self._checker = checker
        self._is_local = is_local
        self._cleanup = cleanup
        self._wakeup = Wakeup()
        self._clients: dict[bytes, RouterStream] = {}  # by routing id, until they have gone
        self._by_fd: dict[int, RouterStream] = {}
        self._departed: list[int] = []  # fds that were closed, before we have read all they sent
        self._ready: deque[RouterStream] = deque()  # have input, in the loop
        self._new: deque[RouterStream] = deque()  # for `accept`
        self._open = 0  # streams that are not closed
        self._received = 0
        self._woken = False  # something may have come since we looked
        self._stopped = False
        self._closed = False
        self._left = False
        self._thread: threading.Thread | None = None
        self._outbox: deque[tuple[RouterStream, list[bytes]]] = deque()  # of threads
        self._arrived = threading.Condition(self.lock)
        self._poll = select.poll()
        for fd in (router.fileno(), monitor.fileno(), self._wakeup.fileno()):
            self._poll.register(fd, select.POLLIN)
        if checker is not None:
            self._poll.register(checker.socket.fileno(), select.POLLIN)
        self._look_around()

    # --- one thread for all ---

    def next(self, deadline_ns: int) -> Stream | None:
        while True:
            if self._ready:
                stream = self._ready.popleft()
                stream.is_queued = False
                return stream
            if self._left or (self._stopped and not self._closed):
                return None
            if not self._pump(deadline_ns):
                return None

    def wait(self, stream: RouterStream, deadline_ns: int) -> bool:
        """Until a stream may be read; False at the deadline. The loop serves nobody meanwhile: a
        handler that says that it does not block, and does, holds up all."""
        if self._thread is None:
            while not stream.is_ready():
                if not self._pump(deadline_ns):
                    return False
            return True
        with self.lock:
            while not stream.is_ready():
                left_ns = deadline_ns - now_ns()
                if left_ns <= 0:
                    return False
                stream.changed.wait(None if deadline_ns == NEVER else left_ns / 1e9)
        return True

    def send(self, stream: RouterStream, buffers: Sequence[Buffer]) -> int:
        """One message for one client: the count of bytes, or END if it has gone."""
        if self._thread is not None and threading.current_thread() is not self._thread:
            copies = [bytes(part) for part in buffers]
            with self.lock:
                self._outbox.append((stream, copies))
            self._wakeup.set()
            return sum(map(len, copies))
        if not self._address(stream.routing_id):
            stream.gone = True
            return END
        return _send(self._router, buffers)

    # --- a thread for each ---

    def accept(self) -> Stream | None:
        with self.lock:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()
            while not self._new and not self._stopped:
                self._arrived.wait()
            return None if self._stopped else self._new.popleft()

    # --- both ---

    def fileno(self) -> int:
        return int(self._router.fileno())

    def interrupt(self) -> None:
        self._stopped = True
        self._wakeup.set()

    def close(self) -> None:
        with self.lock:
            if self._closed:
                return
            self._closed = True
            self._cleanup()
            unseen, self._new = self._new, deque()
        for stream in unseen:
            stream.close()
        self._wakeup.clear()
        self._leave()

    def close_stream(self, stream: RouterStream) -> None:
        """It stays known, and closed, until its client has gone: what comes meanwhile is no new
        client's."""
        with self.lock:
            if stream.closed:
                return
            stream.closed = True
            stream.inbox.clear()
            if stream.is_queued:
                self._ready.remove(stream)
        if not stream.gone:
            self._say_end(stream)
        with self.lock:
            self._open -= 1
        self._leave()

    def _pump(self, deadline_ns: int) -> bool:
        """Receive a message, or sleep until there may be one; False at the deadline."""
        self._received += 1
        if self._received % LOOK_MESSAGES == 0:
            self._look_around()
        if self._take():
            return True
        if self._departed:
            self._bury()
            return True
        if not sleep_until_ready(self._poll, deadline_ns):
            return False
        self._woken = True
        if not self._take():
            self._look_around()
        return True

    def _take(self) -> bool:
        """Take one message to its stream; False if there is none."""
        router = self._router
        woken, self._woken = self._woken, False
        if not woken and not _is_readable(router):
            return False
        try:
            routing_id = router.recv(zmq.NOBLOCK)
        except zmq.Again:
            return False
        part = router.recv(zmq.NOBLOCK, copy=False)  # a message is here whole, or not at all
        stream = self._clients.get(routing_id) or self._meet(routing_id, part)
        while True:
            if len(part) and stream is not None and not stream.closed:
                stream.inbox.append(part.buffer)
                self._tell(stream)
            if not part.more:
                return True
            part = router.recv(zmq.NOBLOCK, copy=False)

    def _meet(self, routing_id: bytes, part: zmq.Frame) -> RouterStream | None:
        """The stream of a new client; None if it may not stay."""
        try:
            fd, address = int(part.get(zmq.SRCFD)), str(part.get("Peer-Address"))
        except zmq.ZMQError:  # it has gone already, so libzmq could not ask who it was
            return None
        self._look_around()  # whoever had this fd before has gone: it is here, behind that
        self._end(fd)
        stream = RouterStream(self, routing_id, fd)
        self._clients[routing_id] = stream
        self._by_fd[fd] = stream
        # Ids that a client gave itself may come again, on another connection.
        is_automatic = routing_id[0] == FIRST_BYTE_OF_AUTOMATIC_ID
        if not is_automatic or not self._may_stay(address) or self._closed:
            stream.closed = True
            self._say_end(stream)
            return stream
        self._open += 1
        if self._thread is not None:
            self._new.append(stream)
            self._arrived.notify()
        return stream

    def _may_stay(self, address: str) -> bool:
        """On ipc the address is HOST:UID:GID:PID, from SO_PEERCRED."""
        return not self._is_local or address.split(":")[-3] in (str(os.geteuid()), "0")

    def _tell(self, stream: RouterStream) -> None:
        """It has input, or has come to its end."""
        if self._thread is not None:
            stream.changed.notify()
        elif not stream.is_queued:
            stream.is_queued = True
            self._ready.append(stream)

    def _look_around(self) -> None:
        """Who has gone, and who asks to come?"""
        if self._checker is not None:
            self._checker.answer()
        for number, fd in _events(self._monitor):
            if number == zmq.EVENT_DISCONNECTED:
                self._departed.append(fd)
            elif number == zmq.EVENT_ACCEPTED and fd in self._departed:
                self._departed.remove(fd)
                self._end(fd)

    def _bury(self) -> None:
        """Nothing more comes of those whose connection has ended."""
        departed, self._departed = self._departed, []
        for fd in departed:
            self._end(fd)

    def _end(self, fd: int) -> None:
        """The client that had a descriptor has gone."""
        stream = self._by_fd.pop(fd, None)
        if stream is not None:
            del self._clients[stream.routing_id]
            stream.gone = True
            if not stream.closed:
                self._tell(stream)

    def _address(self, routing_id: bytes) -> bool:
        """Begin a message for a client; False if it has gone."""
        try:
            self._router.send(routing_id, SEND_MORE)
            return True
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise SystemError("zmq_send", error.errno or 0, self.url) from None
            return False

    def _say_end(self, stream: RouterStream) -> None:
        self.send(stream, (b"",))

    def _run(self) -> None:
        """The hub's thread: the only one that touches the ROUTER."""
        while True:
            with self.lock:
                self._send_outbox()
                if self._closed and self._open == 0:
                    return
                while self._take():
                    self._send_outbox()
                self._look_around()
                if self._departed:
                    self._bury()
                    continue
                if self._stopped:
                    self._arrived.notify_all()
            sleep_until_ready(self._poll, NEVER)
            self._woken = True

    def _send_outbox(self) -> None:
        self._wakeup.clear()
        while self._outbox:
            self.send(*self._outbox.popleft())

    def _leave(self) -> None:
        """Whoever is the last to go takes the socket with him, and waits for its last words to
        leave."""
        with self.lock:
            if not self._closed or self._open or self._left:
                return
            self._left = True
        if self._thread is not None:
            self._wakeup.set()
            self._thread.join()
        if self._checker is not None:
            self._checker.socket.close(0)
        _close_monitor(self._router, self._monitor)
        self._router.close(LINGER_MS)
        self._context.term()
        self._wakeup.close()


class Zmq(Transport):
    """What both schemes share: the sockets' options, and reaching a server."""

    def __init__(self, url: str, address: str, wait: Wait, curve: str) -> None:
        """`curve` is a file of keys, read when they are needed, or "". Raises Error:
        INVALID_ARGUMENT for a wait that cannot be."""
        if wait == Wait.SPIN:
            what = "ZeroMQ has no spin: its own threads would starve; wait is block"
            raise Error(Status.INVALID_ARGUMENT, what, url)
        self.url = url
        self._address = address
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
                raise Error(Status.UNAVAILABLE, "no server", self.url)
            time.sleep(min(pause_s, left_ns / 1e9))
            pause_s = min(2 * pause_s, longest_s)

    def _attempt(self, keys: CurveKeys | None, deadline_ns: int) -> Stream | None:
        """Connect once; None if no server answers (yet)."""
        dealer = _CLIENTS.open()
        try:
            self._prepare(dealer)
            dealer.set(zmq.RECONNECT_IVL, RECONNECT_IVL_MS)
            if keys is not None:
                keys.prepare_dealer(dealer)
            monitor = dealer.get_monitor_socket()
        except BaseException:
            _CLIENTS.close(dealer)
            raise
        try:
            dealer.connect(self._address)
            if self._shake_hands(monitor, deadline_ns):
                return DealerStream(dealer, monitor, self.url)
        except BaseException as error:
            _close_monitor(dealer, monitor)
            _CLIENTS.close(dealer)
            if isinstance(error, zmq.ZMQError):
                raise _error("connect", error, self.url) from None
            raise
        _close_monitor(dealer, monitor)
        _CLIENTS.close(dealer)
        return None

    def _shake_hands(self, monitor: zmq.Socket[bytes], deadline_ns: int) -> bool:
        poll = select.poll()
        poll.register(monitor.fileno(), select.POLLIN)
        while True:
            for number, value in _events(monitor):
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
            return RouterHub(context, router, monitor, url, checker, is_local, cleanup)
        except BaseException as error:
            if checker is not None:
                checker.socket.close(0)
            if monitor is not None:
                _close_monitor(router, monitor)
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

    def _resolve(self) -> str:
        try:
            found = socket.getaddrinfo(self.host, None, type=socket.SOCK_STREAM)
        except OSError:
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
