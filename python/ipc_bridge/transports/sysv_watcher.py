"""The watch over life-lines: what ends a wait that the kernel would not end.

msgrcv(2) and semop(2) wait for their own objects and for nothing else: neither the peer's end nor
a deadline wakes them. (semtimedop(2) could do the latter; sysv_ipc's wheels leave it out.) One
thread a process waits for both instead. And it looks after objects that nobody waits on: the kernel
tells their removal, by ipcrm(1), to those who sleep on them and to nobody else.

Copy with it: errors, system, meeting, unix_address.
"""

import select
import socket
import threading
from abc import ABC, abstractmethod

from ipc_bridge.errors import Error, Status
from ipc_bridge.system import NEVER, Wakeup, now_ns, remaining_ms
from ipc_bridge.transports.meeting import is_over

# How often to look whether what is shared with a peer is still there: its removal is to be seen
# within a second, also on a busy machine.
LOOK_EVERY_NS = 250_000_000


class Watched(ABC):
    """What the watcher looks after: a life-line, a time to wake somebody, and a time to look."""

    wake_ns = NEVER
    look_ns = NEVER  # the watcher's, once it has this

    def __init__(self, life_line: socket.socket) -> None:
        self.life_line = life_line
        self.fd = life_line.fileno()

    @abstractmethod
    def on_gone(self) -> bool:
        """The peer has gone, or what is shared with it. True: forget this. May neither watch nor
        unwatch."""

    def on_time(self) -> None:  # noqa: B027  # most set no `wake_ns`
        """`wake_ns` has come. The same holds."""

    def is_broken(self) -> bool:
        """`look_ns` has come: is something gone of what is shared with the peer? The same holds."""
        return False


class Watcher:
    """One thread a process, while there is something to watch: asleep until a life-line ends or a
    time comes. msgrcv(2) can do neither: it waits for a message and nothing else.

    A time that is set while an earlier one is planned costs no system call: at that earlier one the
    thread looks again.
    """

    def __init__(self) -> None:
        self.all: dict[Watched, None] = {}
        self._by_fd: dict[int, Watched] = {}
        self._epoll = select.epoll()
        self._poke = Wakeup()
        self._epoll.register(self._poke, select.EPOLLIN | select.EPOLLET)
        self._planned_ns = NEVER
        self._thread = threading.Thread(target=self._run, daemon=True)

    def add(self, one: Watched) -> None:
        """Raises Error: RESOURCE_EXHAUSTED."""
        if not self._thread.is_alive():
            try:
                self._thread.start()
            except RuntimeError:
                what = "no further thread for the watcher"
                raise Error(Status.RESOURCE_EXHAUSTED, what) from None
        self._epoll.register(one.fd, select.EPOLLRDHUP | select.EPOLLONESHOT)
        self.all[one] = None
        self._by_fd[one.fd] = one
        self.plan(one.look_ns)

    def remove(self, one: Watched) -> None:
        self.all.pop(one, None)
        if self._by_fd.get(one.fd) is one:
            del self._by_fd[one.fd]
            self._epoll.unregister(one.fd)

    def plan(self, wake_ns: int) -> None:
        """Somebody has set its `wake_ns` to this."""
        if wake_ns < self._planned_ns:
            self._poke.set()

    def join(self) -> None:
        """Nothing is left to watch: end the thread."""
        self._poke.set()
        self._thread.join()
        self._close()

    def _run(self) -> None:
        while True:
            # Who sets a time and then sees an old plan is seen by the second look.
            self._planned_ns = self._first_ns()
            self._planned_ns = min(self._planned_ns, self._first_ns())
            timeout_ms = remaining_ms(self._planned_ns)
            ready = self._epoll.poll(timeout_ms / 1e3 if timeout_ms >= 0 else None)
            with _changes:
                for fd, _ in ready:
                    self._tell_gone(fd)
                now = now_ns()
                for one in [one for one in self.all if min(one.wake_ns, one.look_ns) <= now]:
                    if one.wake_ns <= now:
                        one.wake_ns = NEVER
                        one.on_time()
                    if one.look_ns <= now:
                        one.look_ns = now + LOOK_EVERY_NS
                        if one.is_broken():
                            self._tell(one)
                if not self.all:
                    global _watcher
                    if _watcher is self:  # nobody joins
                        _watcher = None
                        self._close()
                    return

    def _close(self) -> None:
        self._epoll.close()
        self._poke.close()

    def _first_ns(self) -> int:
        return min((min(one.wake_ns, one.look_ns) for one in list(self.all)), default=NEVER)

    def _tell_gone(self, fd: int) -> None:
        one = self._by_fd.get(fd)
        # The event may be of a descriptor that was closed since, whose number a new one has now.
        if one is not None and is_over(one.life_line):
            self._tell(one)

    def _tell(self, one: Watched) -> None:
        """That it is over, once."""
        del self._by_fd[one.fd]
        self._epoll.unregister(one.fd)
        one.look_ns = NEVER
        if one.on_gone():
            del self.all[one]


_changes = threading.Lock()  # of what is watched; held while somebody is told
_watcher: Watcher | None = None


def watch(one: Watched) -> Watcher:
    """Look after it, until `unwatch`; the watcher that does. Raises Error: RESOURCE_EXHAUSTED."""
    global _watcher
    with _changes:
        _watcher = _watcher or Watcher()
        _watcher.add(one)
        return _watcher


def unwatch(one: Watched) -> None:
    """Once this returns, it is told nothing any more. Not for who is just being told."""
    global _watcher
    with _changes:
        watcher = _watcher
        if watcher is None:
            return
        watcher.remove(one)
        if watcher.all:
            return
        _watcher = None
    watcher.join()
