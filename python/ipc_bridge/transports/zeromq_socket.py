"""What ZeroMQ's sockets need at both ends: to receive, to send, and to be told of events."""

import select
import signal
from collections import deque
from collections.abc import Sequence
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from ipc_bridge.system import NEVER, Buffer, now_ns

SOCKETS_MAX = 65_535  # of a context; a client takes three, and the default is 1023
RECEIVE_MS = 5  # in zmq_recv(3) before zmq_poll(3): most messages come by then, and it is one call
REFERENCE_BYTES_MIN = 64 << 10  # below, a copy is cheaper than to tell when it was sent
UNSENT_BYTES_MAX = 4 << 20  # that libzmq holds for a peer; beyond, nothing is taken for it
MARK_BYTES = 256 << 10  # so often it is asked to tell when it has sent what it holds
UNSENT_LOOK_NS = 5_000_000  # and looked for that, while a peer does not read: nothing wakes us
NOBLOCK, MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)  # an enum's arithmetic is slow
WAIT = 0  # of a receive: for RECEIVE_MS
POLLIN = int(zmq.POLLIN)


class Poller(zmq.Poller):
    """zmq.Poller, but in time: pyzmq repeats what a signal interrupts by a clock of whole seconds,
    and may be one late. So whoever has a deadline sleeps in poll(2), on the sockets' descriptors.
    """

    def __init__(self) -> None:
        super().__init__()
        self._fds = select.poll()

    def register(self, socket: Any, flags: int = POLLIN) -> None:
        """For input only: a descriptor tells nothing else."""
        super().register(socket, flags)
        self._fds.register(socket, select.POLLIN)

    def poll(self, timeout: int | None = None) -> list[tuple[Any, int]]:
        """As zmq.Poller; [] may come early. (That looks at EVENTS, before and after.)"""
        if timeout is None:
            return super().poll()
        found = super().poll(0)
        if found or timeout == 0 or not self._fds.poll(timeout):
            return found
        return super().poll(0)


def is_far(deadline_ns: int) -> bool:
    """Is there time to wait in zmq_recv(3)? Not before a deadline while a timer (setitimer(2))
    runs: its signals might prolong that for ever."""
    if deadline_ns == NEVER:
        return True
    ticks = signal.getitimer(signal.ITIMER_REAL)[1]
    return not ticks and deadline_ns - now_ns() > RECEIVE_MS * 1_000_000


def is_readable(sock: zmq.Socket[bytes]) -> bool:
    return bool(int(sock.get(zmq.EVENTS)) & POLLIN)


def send(sock: zmq.Socket[bytes], buffers: Sequence[Buffer]) -> int:
    """Send one message, of which `buffers` are the parts, behind what was sent with SNDMORE.

    Large bytes go by reference, as nobody can change them, and they live as long as libzmq wants
    them; all else is copied into the message, and in C++ everything.
    """
    size, left = 0, len(buffers)
    for part in buffers:
        left -= 1
        count = len(part)
        copied = count < REFERENCE_BYTES_MIN or type(part) is not bytes
        sock.send(part, MORE if left else NOBLOCK, copied)
        size += count
    return size


class Unsent:
    """What was written to one peer, and is not sent yet: libzmq takes all, also for a peer that
    reads nothing. This is the bound, as a socket's buffer is elsewhere."""

    def __init__(self) -> None:
        self.taken = 0  # bytes written
        self._handed = 0  # of them, to libzmq
        self._sent = 0  # of them, by libzmq, at least
        self._marks: deque[tuple[int, zmq.MessageTracker]] = deque()  # tell when so many were
        self._marked = 0  # the last of them

    def has_room(self) -> bool:
        if self.taken - self._sent <= UNSENT_BYTES_MAX:
            return True
        while self._marks and self._marks[0][1].done:
            self._sent, _ = self._marks.popleft()
        return self.taken - self._sent <= UNSENT_BYTES_MAX

    def send(self, sock: zmq.Socket[bytes], buffers: Sequence[Buffer]) -> int:
        """As `send`."""
        size = sum(map(len, buffers))
        self._handed += size
        if self._handed - self._marked < MARK_BYTES:
            return send(sock, buffers)
        self._marked = self._handed
        *front, last = buffers
        for part in front:
            sock.send(part, MORE)
        tracker = sock.send(bytes(last), NOBLOCK, copy=False, track=True)
        self._marks.append((self._handed, tracker))
        return size


def events_of(monitor: zmq.Socket[bytes]) -> list[tuple[int, int]]:
    """What the monitor has to tell: events, each with its value."""
    found = []
    while is_readable(monitor):
        event = parse_monitor_message(monitor.recv_multipart(NOBLOCK))
        found.append((int(event["event"]), int(event["value"])))
    return found


def close_monitor(sock: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
    sock.disable_monitor()
    monitor.close(0)
