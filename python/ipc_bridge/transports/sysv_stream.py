"""What the transports over System V objects share: how their connections begin, and how they end.

In life, objects go as soon as nobody can need them. Who closes first removes what it reads from;
its peer, told by the life-line's end, takes what is left unread and removes everything. If somebody
else removes one (ipcrm), the client sees it within a quarter of a second, whatever either peer
does, and goes; so a server with idle clients sleeps on.

Copy with it: errors, system, meeting, unix_address, sysv_objects, sysv_watcher.
"""

import atexit
import contextlib
import errno
import os
import socket
import struct
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import sysv_ipc

from ipc_bridge.errors import Error, ProtocolError, Status
from ipc_bridge.system import END, NEVER, Listener, Spinner, Stream, Transport, Wait, now_ns
from ipc_bridge.transports.meeting import Meeting, MeetingListener, Record, is_over
from ipc_bridge.transports.sysv_objects import (
    REMOVED,
    SLOT,
    Journal,
    Object,
    is_gone,
    is_ours,
    refusal,
    remove,
)
from ipc_bridge.transports.sysv_watcher import LOOK_EVERY_NS, Watched, unwatch, watch

PARTED_MAX = 256  # clients that have not left a closed connection; beyond, the oldest loses it
YIELDS_MAX = 64  # to a peer that is about to read; then there is no room for longer
PAUSE_NS = (20_000, 1_000_000)  # first and longest pause then
LINGER_NS = 500_000_000  # for clients to take what is unread before this process leaves


class Parted(Watched):
    """A connection that this side has closed, until its peer goes."""

    def __init__(
        self, life_line: socket.socket, key: int, journal: Journal, finish: Callable[[], None]
    ) -> None:
        super().__init__(life_line)
        self.key = key
        self._journal = journal
        self._finish = finish
        self._ended = False

    def on_gone(self) -> bool:
        self.end()
        return True

    def end(self) -> None:
        """Idempotent."""
        with _parting:
            if self._ended:
                return
            self._ended = True
        self.life_line.close()
        self._finish()
        self._journal.release(self.key)
        with _parting:  # not before: this process may leave once none is parted
            del _parted[self.key]


_parting = threading.Lock()
_parted: dict[int, Parted] = {}  # by key, the oldest first


def part(life_line: socket.socket, key: int, journal: Journal, finish: Callable[[], None]) -> None:
    """This side has closed, and the peer may still read: `finish` once it has gone."""
    with contextlib.suppress(OSError):
        life_line.shutdown(socket.SHUT_WR)  # the peer's end-of-file
    parted, oldest = Parted(life_line, key, journal, finish), None
    with _parting:
        if len(_parted) >= PARTED_MAX:
            oldest = next(iter(_parted.values()))
        _parted[key] = parted
    try:
        watch(parted)
    except (Error, OSError):  # no descriptor for a watcher: what the peer has not read is lost
        parted.end()
    if oldest is not None:
        unwatch(oldest)
        oldest.end()


@atexit.register
def _linger() -> None:
    """The journals of those that do not go in time stay, for the next server."""
    deadline_ns = now_ns() + LINGER_NS
    while _parted and now_ns() < deadline_ns:
        time.sleep(0.001)


class SysvStream(Stream, Watched):
    """What the streams over System V objects share: how they end.

    `_lock` guards what is read, for once the peer has gone the watcher takes in what is unread,
    unless the reader is asleep, who is woken to do it. So the objects go at once, also when nobody
    reads for an hour.
    """

    def __init__(
        self,
        life_line: socket.socket,
        objects: Sequence[Object],
        wait: Wait,
        key: int,
        journal: Journal | None,
    ) -> None:
        """`journal` is the server's, which has reserved `key`; a client has none."""
        Watched.__init__(self, life_line)
        self.spinner = Spinner(wait)
        self._key = key
        self._objects = objects
        self._journal = journal
        self._lock = threading.Lock()
        self._over = False  # the peer has gone
        self._interrupted = False
        self._sleeping = False  # the reader is, or is about to be
        self._settled = False  # the objects are gone, and the life-line is at its end
        self._closed = False
        self._fulls = 0  # how often in a row there was no room to write

    def _begin(self) -> None:
        """Once all is there for the watcher: the last of what a constructor does."""
        self.look_ns = NEVER if self._journal is not None else now_ns() + LOOK_EVERY_NS
        self._watcher = watch(self)

    @abstractmethod
    def _has_some(self) -> bool:
        """Is something taken out of the object, and not given yet?"""

    @abstractmethod
    def _take_one(self) -> None:
        """Wait in the kernel for the next of what the peer sends, or for `_wake`."""

    @abstractmethod
    def _wake(self) -> None:
        """Make the sleeping reader look again. From any thread."""

    @abstractmethod
    def _take_rest(self) -> None:
        """Take in what is unread: the objects go now."""

    @abstractmethod
    def _remove_in(self) -> None:
        """Remove what this side reads from. Idempotent, whoever was first."""

    @abstractmethod
    def _remove_out(self) -> None:
        """Remove what this side writes to. Idempotent, whoever was first."""

    def on_gone(self) -> bool:
        with self._lock:
            self._over = True
            if self._sleeping:
                self._wake()
            else:
                self._settle()
        return False

    def on_time(self) -> None:
        if self._sleeping:
            self._wake()

    def is_broken(self) -> bool:
        return any(is_gone(one) for one in self._objects)

    def fileno(self) -> int:
        """Raises Error: UNIMPLEMENTED. The kernel has no descriptor for a System V object, so none
        can be given to select, epoll or asyncio: wait in a thread, or take another transport."""
        what = "System V objects have no descriptor to wait on"
        raise Error(Status.UNIMPLEMENTED, what, f"key {self._key:#x}")

    def wait(self, readable: bool, writable: bool, deadline_ns: int) -> bool:
        if not writable:
            return self._sleep(deadline_ns)
        # Nothing tells that there is room: pause, and let the caller look.
        if self._fulls <= YIELDS_MAX:
            os.sched_yield()
        else:
            first_ns, longest_ns = PAUSE_NS
            pause_ns = min(first_ns << min(self._fulls - YIELDS_MAX, 10), longest_ns)
            time.sleep(max(0, min(pause_ns, deadline_ns - now_ns())) / 1e9)
        return now_ns() < deadline_ns

    def _sleep(self, deadline_ns: int) -> bool:
        """Sleep until there is something to read, or nothing more will come: True."""
        while self._may_sleep():
            try:
                if deadline_ns != NEVER:
                    self.wake_ns = deadline_ns
                    self._watcher.plan(deadline_ns)
                    if now_ns() >= deadline_ns:
                        return False
                self._take_one()
            except REMOVED:
                return True
            except sysv_ipc.Error:  # EINTR, which sysv_ipc does not restart
                continue
            finally:
                self._woken()
        return True

    def interrupt(self) -> None:
        self._interrupted = True
        self._wake()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        unwatch(self)  # from here on this thread is alone
        if not self._settled and (self._over or is_over(self.life_line)):
            self._settle()
        if (
            not self._settled
        ):  # of a client's, the server takes what is unread, and removes the rest
            self._remove_in()
            if self._journal is not None:
                part(self.life_line, self._key, self._journal, self._remove_out)
                return
        self.life_line.close()

    def _removed(self) -> int:
        """Somebody else has removed an object of ours, so no more will come: END, also for what is
        read from now on, once what is there is read."""
        self._interrupted = True
        return END

    def _may_sleep(self) -> bool:
        """Before the reader sleeps: may it? Then `_woken` must follow. (What it has, the watcher
        may just add to.)"""
        with self._lock:
            self._sleeping = not (self._has_some() or self._over or self._interrupted)
            return self._sleeping

    def _woken(self) -> None:
        self.wake_ns = NEVER
        with self._lock:
            self._sleeping = False
            if self._over:
                self._settle()

    def _settle(self) -> None:
        """The peer has gone: take what is unread, and remove everything."""
        if not self._settled:
            self._settled = True
            if not self._closed:
                self._take_rest()
            self._remove_in()
            self._remove_out()
            # For the peer. To close it is this side's, who may be sending the answer through it.
            with contextlib.suppress(OSError):
                self.life_line.shutdown(socket.SHUT_RDWR)
            if self._journal is not None:
                self._journal.release(self._key)


class Part(NamedTuple):
    """One of a connection's objects: its key is the connection's and `number`; `size` the bytes of
    a segment, the first value of a semaphore, the longest message of a queue."""

    kind: Callable[..., Object]
    number: int
    size: int


class Way(SysvStream):
    """What a stream says of what it takes, for SysvTransport."""

    scheme: ClassVar[str]
    shape: ClassVar[struct.Struct]  # what an answer says beside the key

    @staticmethod
    @abstractmethod
    def offer() -> tuple[int, ...]:
        """A server's shape."""

    @staticmethod
    @abstractmethod
    def parts(shape: tuple[int, ...]) -> list[Part]:
        """What is made and found, in this order; none: no shape of ours."""

    @abstractmethod
    def __init__(
        self,
        life_line: socket.socket,
        objects: Sequence[Object],
        shape: tuple[int, ...],
        wait: Wait,
        key: int,
        journal: Journal | None,
    ) -> None: ...


class SysvTransport(Transport):
    """What the transports over System V objects share: how two peers come to have the same ones.

    The server makes them for each client, and its answer is their first key and their shape.
    """

    way: ClassVar[type[Way]]

    def __init__(self, path: str, wait: Wait = Wait.ADAPTIVE) -> None:
        """Raises Error: INVALID_ARGUMENT for a path that is empty or too long."""
        self._meeting = Meeting(self.way.scheme, path)
        self.url = self._meeting.url
        self._path = path
        self._wait = wait

    def connect(self, deadline_ns: int) -> Stream:
        way = self.way
        life_line, record = self._meeting.connect(deadline_ns)
        try:
            key = 0
            shape: tuple[int, ...] = ()
            if len(record.body) == SLOT.size + way.shape.size:
                (key,) = SLOT.unpack_from(record.body)
                shape = way.shape.unpack_from(record.body, SLOT.size)
            parts: list[Part] = way.parts(shape) if shape else []
            if not is_ours(key) or not parts:
                raise ProtocolError(f"not an answer of {way.scheme}", self.url)
            with _seeking(self.url):
                objects = [self._find(part, key) for part in parts]
                return way(life_line, objects, shape, self._wait, key, None)
        except BaseException as error:
            life_line.close()
            if isinstance(error, ProtocolError):
                error.where = self.url
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
            key, shape, objects = self._make(journal)
            try:
                with _seeking(self.url):
                    stream = self.way(life_line, objects, shape, self._wait, key, journal)
            except BaseException:  # no descriptor for a watcher, perhaps
                _unmake(journal, key, objects)
                raise
            return stream, Record(SLOT.pack(key) + self.way.shape.pack(*shape))

        def cleanup() -> None:
            journal.close()
            door.close()

        return MeetingListener(self._meeting, door, welcome, cleanup)

    def _find(self, part: Part, key: int) -> Object:
        """What the server has made. A queue is opened with its full size: a message that is too
        long for the reader would stay at the head for ever."""
        size = part.size if part.kind is sysv_ipc.MessageQueue else 0
        found = part.kind(key + part.number, 0, 0o600, size)
        if found.cuid not in (os.geteuid(), 0):
            what = f"the server's objects are of uid {found.cuid}"
            raise Error(Status.PERMISSION_DENIED, what, self.url)
        return found

    def _make(self, journal: Journal) -> tuple[int, tuple[int, ...], list[Object]]:
        """New ones, with their first key and their shape. Raises Error: RESOURCE_EXHAUSTED."""
        shape = self.way.offer()
        while True:
            key = journal.reserve()
            made: list[Object] = []
            try:
                for part in self.way.parts(shape):
                    number, new = key + part.number, sysv_ipc.IPC_CREX
                    made.append(part.kind(number, new, 0o600, part.size))
                return key, shape, made
            except sysv_ipc.ExistentialError:
                _unmake(journal, key, made)  # somebody has one of these keys: take others
            except (sysv_ipc.Error, OSError, ValueError, MemoryError) as error:
                _unmake(journal, key, made)
                raise refusal("make", error) from None


@contextlib.contextmanager
def _seeking(url: str) -> Iterator[None]:
    """What it means that an object cannot be opened. Somebody may remove it at any moment."""
    try:
        yield
    except (sysv_ipc.Error, OSError, ValueError) as error:
        gone = isinstance(error, (sysv_ipc.ExistentialError, ValueError))  # shmat(2): EINVAL
        if gone or getattr(error, "errno", 0) == errno.EIDRM:
            what = "the server's objects are not here: they have gone, or are in another"
            raise Error(Status.UNAVAILABLE, f"{what} IPC namespace", url) from None
        raise refusal("open", error) from None


def _unmake(journal: Journal, key: int, made: Sequence[Object]) -> None:
    for one in made:
        remove(one)
    journal.release(key)
