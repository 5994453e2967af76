"""A client's end of ZeroMQ: a DEALER and its monitor; the traps stand in zeromq."""

import os
import select
import threading
from collections.abc import Sequence

import zmq

from ipc_bridge.system import (
    END,
    WOULD_BLOCK,
    Buffer,
    Spinner,
    Stream,
    Wait,
    now_ns,
    sleep_until_ready,
)
from ipc_bridge.transports.zeromq_socket import (
    NOBLOCK,
    SOCKETS_MAX,
    UNSENT_LOOK_NS,
    WAIT,
    Poller,
    Unsent,
    close_monitor,
    events_of,
    is_far,
    is_readable,
)


class Clients:
    """The context that all clients of a process share: its threads live as long as one of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._users = 0
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
        """What it had is the parent's, and its threads are not here; see client.Orphan."""
        self._lock = threading.Lock()
        self._context = None
        self._users = 0


CLIENTS = Clients()


class DealerStream(Stream):
    """A client's end. Messages come whole, and are read bit by bit."""

    def __init__(self, dealer: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
        self.spinner = Spinner(Wait.BLOCK)
        self._dealer = dealer
        self._monitor = monitor
        self._unsent = Unsent()
        self._rest: memoryview | None = None  # of the part that is being read
        self._more = False  # parts of its message
        self._woken = False  # something may have come since we looked
        self._gone = False  # the server: no more will come than what is here
        self._ended = False
        self._interrupted = False
        self._poll = Poller()  # (C++ sleeps in ppoll(2), which counts in nanoseconds)
        self._poll.register(dealer, zmq.POLLIN)
        self._poll.register(monitor, zmq.POLLIN)
        self._epoll: select.epoll | None = None

    def try_read(self, buffer: memoryview) -> int:
        rest = self._rest
        if rest is None:
            return self._receive(buffer, NOBLOCK)
        size = min(len(buffer), len(rest))
        buffer[:size] = rest[:size]
        self._rest = rest[size:] if size < len(rest) else None
        return size

    def read(self, buffer: memoryview, deadline_ns: int) -> int:
        """Wait in zmq_recv(3), which is quickest, then in zmq_poll(3): it also sees the monitor."""
        if self._rest is None and is_far(deadline_ns):
            count = self._receive(buffer, WAIT)
            if count != WOULD_BLOCK:
                return count
        return self._sleep_and_read(buffer, deadline_ns)

    def _receive(self, buffer: memoryview, flags: int) -> int:
        """Read from the next part that is not empty."""
        while not self._ended:
            woken, self._woken = self._woken, False
            if flags != WAIT and not woken and not is_readable(self._dealer):
                return self._end_if_gone(buffer)
            try:
                part = self._dealer.recv(flags, copy=False)
            except zmq.Again:
                flags = NOBLOCK
                continue
            starts, self._more = not self._more, part.more
            size = len(part)
            if 0 < size <= len(buffer):
                buffer[:size] = part.buffer
                return size
            if size:
                self._rest = part.buffer
                return self.try_read(buffer)
            self._ended = starts and not self._more
        return END

    def _end_if_gone(self, buffer: memoryview) -> int:
        if self._interrupted:
            return END
        if not self._gone:
            self._look_at_monitor()
            if self._gone:  # what came before that is here now
                self._woken = True
                return self._receive(buffer, NOBLOCK)
        self._ended = self._gone
        return END if self._gone else WOULD_BLOCK

    def try_write(self, buffers: Sequence[Buffer]) -> int:
        if self._gone or self._ended:
            return END
        if not self._unsent.has_room():
            return WOULD_BLOCK
        count = self._unsent.send(self._dealer, buffers)
        self._unsent.taken += count
        return count

    def wait(self, readable: bool, writable: bool, deadline_ns: int) -> bool:
        while not (writable and self._unsent.has_room()) and not (readable and self.arm()):
            until_ns = min(deadline_ns, now_ns() + UNSENT_LOOK_NS) if writable else deadline_ns
            if self._sleep(until_ns):
                return True
            if until_ns == deadline_ns:
                return False
        return True

    def _sleep_and_read(self, buffer: memoryview, deadline_ns: int) -> int:
        while (count := self.try_read(buffer)) == WOULD_BLOCK:
            if not self._sleep(deadline_ns):
                return WOULD_BLOCK
        return count

    def _sleep(self, deadline_ns: int) -> bool:
        self._woken = sleep_until_ready(self._poll, deadline_ns)
        return self._woken

    def arm(self) -> bool:
        idle = self._rest is None and not (self._gone or self._ended or self._interrupted)
        return not idle or is_readable(self._dealer)

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
        if self._dealer.closed:
            return
        if self._epoll is not None:
            self._epoll.close()
        close_monitor(self._dealer, self._monitor)
        CLIENTS.close(self._dealer)

    def _look_at_monitor(self) -> None:
        for number, _ in events_of(self._monitor):
            self._gone = self._gone or number == zmq.EVENT_DISCONNECTED
