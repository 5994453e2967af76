"""A server's end of ZeroMQ: a ROUTER, and a stream for each client; the traps stand in zeromq."""

import contextlib
import errno
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence

import zmq

from ipc_bridge.errors import Error, Status, SystemError
from ipc_bridge.system import (
    END,
    NEVER,
    WOULD_BLOCK,
    Buffer,
    Hub,
    Spinner,
    Stream,
    Wait,
    Wakeup,
    now_ns,
    sleep_until_ready,
)
from ipc_bridge.transports.zeromq_curve import KeyChecker
from ipc_bridge.transports.zeromq_socket import (
    MORE,
    NOBLOCK,
    UNSENT_LOOK_NS,
    WAIT,
    Poller,
    Unsent,
    close_monitor,
    events_of,
    is_far,
    is_readable,
)

LINGER_MS = 300  # of a server: for its last words to leave; a stopped client must not hold it up
SILENT_NS = 5_000_000_000  # a connection that has said nothing for so long is hung up on
LOOK_MESSAGES = 64  # after so many a busy server looks for who has gone
FIRST_BYTE_OF_AUTOMATIC_ID = 0  # zmq_setsockopt(3), ZMQ_ROUTING_ID
AUTOMATIC_ID_BYTES = 5  # then a count, big-endian


def is_automatic(routing_id: bytes) -> bool:
    return len(routing_id) == AUTOMATIC_ID_BYTES and routing_id[0] == FIRST_BYTE_OF_AUTOMATIC_ID


def is_later(routing_id: bytes, other: bytes) -> bool:
    """Was a client's id made after another's? libzmq counts them (and may pass 2^32)."""
    if not is_automatic(routing_id) or not is_automatic(other):
        return False
    ahead = int.from_bytes(routing_id[1:]) - int.from_bytes(other[1:])
    return 0 < ahead & 0xFFFFFFFF < 1 << 31


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
        self.overrun = False  # it has sent more than is kept for it
        self.unsent = Unsent()
        self._inbox_bytes = 0
        self._hub = hub
        self._interrupted = False

    def try_read(self, buffer: memoryview) -> int:
        with self._hub.lock:
            if self.overrun:
                raise self._overran()
            if not self.inbox:
                return END if self.gone or self._interrupted else WOULD_BLOCK
            part = self.inbox.popleft()
            size = len(part)
            if size > len(buffer):
                size = len(buffer)
                self.inbox.appendleft(part[size:])
                part = part[:size]
            self._inbox_bytes -= size
        buffer[:size] = part
        return size

    def read_alone(self, buffer: memoryview, deadline_ns: int) -> int:
        if self.inbox or self.gone or self._interrupted:
            return self.try_read(buffer)
        return self._hub.read_alone(self, buffer, deadline_ns)

    def try_write(self, buffers: Sequence[Buffer]) -> int:
        if self.gone:
            return END
        if self.overrun:
            raise self._overran()
        if not self.has_room():
            self._hub.wait_for_room(self)
            return WOULD_BLOCK
        count = self._hub.send(self, buffers)
        if count > 0:
            self.unsent.taken += count
        return count

    def wait(self, readable: bool, writable: bool, deadline_ns: int) -> bool:
        if writable and self.has_room():
            return True
        return self._hub.wait(self, readable, writable, deadline_ns)

    def is_ready(self, readable: bool, writable: bool) -> bool:
        """Can one of the wanted be done, or has it come to its end?"""
        ended = self.gone or self._interrupted or self.overrun
        return ended or (readable and bool(self.inbox)) or (writable and self.has_room())

    def has_room(self) -> bool:
        return self.unsent.has_room()

    def put(self, part: memoryview, bytes_max: int) -> None:
        """What has come; unless it is too much."""
        self.inbox.append(part)
        self._inbox_bytes += len(part)
        if self._inbox_bytes > bytes_max:
            self.overrun = True
            self.inbox.clear()
            self._inbox_bytes = 0

    def _overran(self) -> Error:
        """Once: what is written then tells the client why."""
        self.overrun = False
        self.unsent.taken -= 1 << 62
        what = "the client sends more and more, and does not wait for answers"
        return Error(Status.RESOURCE_EXHAUSTED, what)

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
        inbox_bytes_max: int,
    ) -> None:
        self.url = url
        self.lock = threading.RLock()  # of inboxes and outbox, once there are threads
        self._context = context
        self._router = router
        self._monitor = monitor
        self._checker = checker
        self._is_local = is_local
        self._cleanup = cleanup
        self._inbox_bytes_max = inbox_bytes_max
        self._wakeup = Wakeup()
        self._clients: dict[bytes, RouterStream] = {}  # by routing id, until they have gone
        self._by_fd: dict[int, RouterStream] = {}
        self._silent: dict[int, int] = {}  # fds of who has said nothing, and until when he may
        self._departed: list[int] = []  # fds that were closed, before we have read all they sent
        self._ready: deque[RouterStream] = deque()  # have input, in the loop
        self._full: set[RouterStream] = set()  # have output, and wait for room, in the loop
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
        self._poll = Poller()
        for one in (router, monitor, self._wakeup.fileno()):
            self._poll.register(one, zmq.POLLIN)
        if checker is not None:
            self._poll.register(checker.socket, zmq.POLLIN)
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

    def read_alone(self, stream: RouterStream, buffer: memoryview, deadline_ns: int) -> int:
        """Wait a little for the next message; if it is of this stream, it needs no inbox."""
        busy = self._ready or self._full or self._departed or self._stopped
        if busy or (self._received + 1) % LOOK_MESSAGES == 0 or not is_far(deadline_ns):
            return WOULD_BLOCK  # the loop comes to _pump, which looks around
        self._received += 1
        try:
            routing_id = self._router.recv(WAIT)
        except zmq.Again:
            return WOULD_BLOCK
        part = self._router.recv(NOBLOCK, copy=False)
        size = len(part)
        if routing_id != stream.routing_id or part.more or not 0 < size <= len(buffer):
            self._deliver(routing_id, part)
            return WOULD_BLOCK
        buffer[:size] = part.buffer
        return size

    def wait(self, stream: RouterStream, readable: bool, writable: bool, deadline_ns: int) -> bool:
        """Until one of the wanted can be done; False at the deadline. The loop serves nobody
        meanwhile: a handler that says that it does not block, and does, holds up all."""
        while not stream.is_ready(readable, writable):
            if self._thread is None:
                if not self._pump(deadline_ns):
                    return False
                continue
            with self.lock:
                if stream.is_ready(readable, writable):
                    return True
                now = now_ns()
                if now >= deadline_ns:
                    return False
                until_ns = min(deadline_ns, now + UNSENT_LOOK_NS) if writable else deadline_ns
                stream.changed.wait(None if until_ns == NEVER else (until_ns - now) / 1e9)
        return True

    def wait_for_room(self, stream: RouterStream) -> None:
        """In the loop: it gets another turn once there is some."""
        if self._thread is None:
            self._full.add(stream)

    def _look_for_room(self) -> bool:
        found = [stream for stream in self._full if stream.gone or stream.has_room()]
        for stream in found:
            self._full.discard(stream)
            self._tell(stream)
        return bool(found)

    def send(self, stream: RouterStream, buffers: Sequence[Buffer]) -> int:
        """One message for one client: the count of bytes, or END if it has gone."""
        if self._thread is not None and threading.current_thread() is not self._thread:
            copies = [bytes(part) for part in buffers]
            with self.lock:
                self._outbox.append((stream, copies))
            self._wakeup.set()
            return sum(map(len, copies))
        try:
            self._router.send(stream.routing_id, MORE)
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise SystemError("zmq_send", error.errno or 0, self.url) from None
            stream.gone = True
            return END
        return stream.unsent.send(self._router, buffers)

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
            if self._thread is None:  # which clears it itself: a set that we took would be lost
                self._wakeup.clear()
        for stream in unseen:
            stream.close()
        self._leave()

    def close_stream(self, stream: RouterStream) -> None:
        """It stays known, and closed, until its client has gone: what comes meanwhile is no new
        client's."""
        with self.lock:
            if stream.closed:
                return
            stream.closed = True
            stream.inbox.clear()
            self._full.discard(stream)
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
            self._look_for_room()
            return True  # a stream may be ready now: do not sleep
        quiet = not (self._departed or self._full)
        if self._take(WAIT if quiet and is_far(deadline_ns) else NOBLOCK):
            return True
        if self._departed:
            self._bury()
            return True
        if self._look_for_room():
            return True
        if not self._sleep(deadline_ns):
            return False
        if not self._take(NOBLOCK):
            self._look_around()
        return True

    def _sleep(self, deadline_ns: int) -> bool:
        """Until there is something to do; False at the deadline."""
        look_ns = now_ns() + UNSENT_LOOK_NS if self._full else self._silent_until_ns()
        if not sleep_until_ready(self._poll, min(deadline_ns, look_ns)) and deadline_ns <= look_ns:
            return False
        self._woken = True
        return True

    def _take(self, flags: int) -> bool:
        """Take one message to its stream; False if there is none."""
        router = self._router
        woken, self._woken = self._woken, False
        if flags != WAIT and not woken and not is_readable(router):
            return False
        try:
            routing_id = router.recv(flags)
        except zmq.Again:
            return False
        self._deliver(routing_id, router.recv(NOBLOCK, copy=False))  # it is here whole
        return True

    def _deliver(self, routing_id: bytes, part: zmq.Frame) -> None:
        """Put a message, which begins with `part`, into its stream's inbox."""
        stream = self._clients.get(routing_id) or self._meet(routing_id, part)
        while True:
            if len(part) and stream is not None and not stream.closed:
                stream.put(part.buffer, self._inbox_bytes_max)
                self._tell(stream)
            if not part.more:
                return
            part = self._router.recv(NOBLOCK, copy=False)

    def _meet(self, routing_id: bytes, part: zmq.Frame) -> RouterStream | None:
        """The stream of a new client; None if it may not stay."""
        try:
            fd, address = int(part.get(zmq.SRCFD)), str(part.get("Peer-Address"))
        except zmq.ZMQError:  # it has gone already, so libzmq could not ask who it was
            return None
        self._look_around()  # whoever had this fd before has gone: it is here, behind that
        holder = self._by_fd.get(fd)
        if holder is not None and is_later(holder.routing_id, routing_id):
            return None  # left over from one who had this fd before
        self._end(fd)
        self._silent.pop(fd, None)
        stream = RouterStream(self, routing_id, fd)
        self._clients[routing_id] = stream
        self._by_fd[fd] = stream
        # Ids that a client gave itself may come again, on another connection.
        if not is_automatic(routing_id) or not self._may_stay(address) or self._closed:
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
        for number, fd in events_of(self._monitor):
            if number == zmq.EVENT_DISCONNECTED:
                self._departed.append(fd)
                self._silent.pop(fd, None)
            elif number == zmq.EVENT_ACCEPTED:
                if fd in self._departed:
                    self._departed.remove(fd)
                    self._end(fd)
                self._silent[fd] = now_ns() + SILENT_NS
        while self._silent and self._silent_until_ns() <= now_ns():
            self._hang_up(next(iter(self._silent)))

    def _silent_until_ns(self) -> int:
        return next(iter(self._silent.values()), NEVER)

    def _hang_up(self, fd: int) -> None:
        """On a connection that libzmq keeps for ever: a ROUTER hears of it by its first message."""
        del self._silent[fd]
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
            sock.shutdown(socket.SHUT_RDWR)

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

    def _say_end(self, stream: RouterStream) -> None:
        self.send(stream, (b"",))

    def _run(self) -> None:
        """The hub's thread: the only one that touches the ROUTER."""
        while True:
            more = self._exchange()
            with self.lock:
                if self._closed and self._open == 0:
                    self._send_outbox()
                    return
                if not more:
                    self._bury()  # whom we knew of before we had read all
                self._look_around()
                if self._stopped:
                    self._arrived.notify_all()
                if more or self._departed:
                    continue
            self._sleep(NEVER)

    def _exchange(self) -> bool:
        """Send and receive for a while; False: there is no more to receive. The lock is given away
        at each message: else a client that sends and sends would keep all others from it."""
        for _ in range(LOOK_MESSAGES):
            with self.lock:
                self._send_outbox()
                if not self._take(NOBLOCK):
                    return False
        return True

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
        close_monitor(self._router, self._monitor)
        self._router.close(LINGER_MS)
        self._context.term()
        self._wakeup.close()
