"""The Stream contract that every byte transport keeps, and the system calls under it.

A transport makes Streams: `connect` on the client's side, a Listener's `accept` on the server's.
All times are nanoseconds of the monotonic clock (clock_gettime(2), CLOCK_MONOTONIC): a deadline is
such a time, NEVER is none.
"""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import stat
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from typing import Protocol, TypeVar

from ipc_bridge.errors import Error, Status, SystemError, UsageError

Buffer = bytes | bytearray | memoryview

NEVER = (1 << 63) - 1
TIMEOUT_S_MAX = 1e9  # 31 years; longer is for ever
WOULD_BLOCK = 0  # of try_read and try_write: nothing now
END = -1  # of try_read and try_write: the peer has gone

ADAPTIVE_SPIN_NS = 50_000  # about what a wake-up across cores costs, so a spin at most doubles it
SPINS_FRUITLESS_MAX = 8  # then the peer is slow, and spinning only heats
SPIN_RETRY_WAITS = 64  # how often a peer gets a chance to be quick again
POLL_MS_MAX = (1 << 31) - 1  # poll(2) takes an int: 24 days; whoever sleeps longer looks again
SPIN_CLOCK_READS = 16  # reads of the wire for each read of the clock

CONNECT_RETRY_S = (0.001, 0.05)  # first and longest pause between attempts to reach a server

Made = TypeVar("Made")

now_ns = time.monotonic_ns


def deadline_after(timeout_s: float | None) -> int:
    """The deadline `timeout_s` seconds from now, which may be below 0; None: NEVER.

    Raises UsageError: INVALID_ARGUMENT for what is not a number.
    """
    if timeout_s is None or timeout_s > TIMEOUT_S_MAX:
        return NEVER
    if timeout_s != timeout_s:
        raise UsageError(Status.INVALID_ARGUMENT, "a timeout that is not a number")
    return now_ns() + int(max(0.0, timeout_s) * 1e9)


def remaining_ms(deadline_ns: int) -> int:
    """Milliseconds to a deadline, rounded up, at least 0; for poll(2) -1 stands for NEVER."""
    if deadline_ns == NEVER:
        return -1
    return max(0, -((now_ns() - deadline_ns) // 1_000_000))


class Wait(StrEnum):
    """How a reader waits."""

    BLOCK = "block"  # sleep in the kernel at once
    SPIN = "spin"  # poll until there is something: the fastest, for a core of its own
    ADAPTIVE = "adaptive"  # spin for ADAPTIVE_SPIN_NS, then block


class Spinner:
    """Decides how long a stream's next read may spin."""

    def __init__(self, wait: Wait) -> None:
        self.wait = wait
        self.blocks = wait == Wait.BLOCK
        self._spins = wait == Wait.SPIN
        self.crowded = False  # other spinners share the GIL: then none spins
        self.fruitless = 0  # spins in a row that found nothing
        self._waits = 0

    def budget_ns(self) -> int:
        """For how long to spin before blocking: 0, a while, or NEVER (do not block)."""
        if self.blocks or self.crowded:
            return 0
        if self._spins:
            return NEVER
        if self.fruitless < SPINS_FRUITLESS_MAX:
            return ADAPTIVE_SPIN_NS
        self._waits += 1
        return ADAPTIVE_SPIN_NS if self._waits % SPIN_RETRY_WAITS == 0 else 0


class Stream(ABC):
    """One connection: a full-duplex stream of bytes to one peer.

    One thread uses it at a time; only `interrupt` may be called from another. After `close`
    nothing but `close` may be called.
    """

    spinner: Spinner

    @abstractmethod
    def try_read(self, buffer: memoryview) -> int:
        """Read what is there into `buffer`, without waiting: the count of bytes, WOULD_BLOCK, or
        END once everything the peer sent has been read and it has closed or died."""

    @abstractmethod
    def try_write(self, buffers: Sequence[Buffer]) -> int:
        """Write the front of `buffers`, in order, as one piece where the mechanism allows, without
        waiting: the count of bytes taken (which need not end at a buffer's end), WOULD_BLOCK, or
        END if the peer has gone (what it sent before may still be read)."""

    @abstractmethod
    def wait(self, readable: bool, writable: bool, deadline_ns: int) -> bool:
        """Sleep until one of the wanted can be done, the peer goes or `interrupt` is called: True;
        or False at the deadline. A True may be spurious."""

    def read(self, buffer: memoryview, deadline_ns: int) -> int:
        """Wait by the stream's wait strategy until something can be read, and read it.

        The usual path of whoever has nothing to write. WOULD_BLOCK is the deadline.
        """
        if self.spinner.blocks:
            return self._sleep_and_read(buffer, deadline_ns)
        budget_ns = self.spinner.budget_ns()
        if budget_ns:
            count = self._spin(buffer, budget_ns, deadline_ns)
            if count != WOULD_BLOCK or budget_ns == NEVER:
                return count
        return self._sleep_and_read(buffer, deadline_ns)

    def _sleep_and_read(self, buffer: memoryview, deadline_ns: int) -> int:
        """Two system calls; a mechanism that can do it in one overrides this."""
        while self.wait(True, False, deadline_ns):
            count = self.try_read(buffer)
            if count != WOULD_BLOCK:
                return count
        return WOULD_BLOCK

    def _spin(self, buffer: memoryview, budget_ns: int, deadline_ns: int) -> int:
        try_read = self.try_read
        until_ns = 0  # the clock is not read before it is needed
        while True:
            for _ in range(SPIN_CLOCK_READS):
                count = try_read(buffer)
                if count != WOULD_BLOCK:
                    self.spinner.fruitless = 0
                    return count
            at_ns = now_ns()
            until_ns = until_ns or min(deadline_ns, at_ns + budget_ns)
            if at_ns >= until_ns:
                self.spinner.fruitless += 1
                return WOULD_BLOCK

    def read_alone(self, buffer: memoryview, deadline_ns: int) -> int:
        """`read` for a loop that serves many streams (see Hub.next): WOULD_BLOCK also says that
        the loop has something else to do. (C++ has none, as its server has no lane for small
        calls: to queue a message and fetch it is 7% of the CPU time of Python's.)"""
        return self.try_read(buffer)

    def arm(self) -> bool:
        """Prepare to sleep on `fileno` in a loop of one's own: True says "ready now, do not sleep".

        Mechanisms whose descriptor is always up to date have nothing to prepare.
        """
        return False

    @abstractmethod
    def fileno(self) -> int:
        """A descriptor that is readable when `try_read` has something (after `arm`), for select,
        epoll and asyncio."""

    @abstractmethod
    def interrupt(self) -> None:
        """From any thread: the wait or read under way, and any later one, ends as if the peer had
        closed."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back; idempotent."""


class Listener(ABC):
    """A server's end of a transport: where clients arrive."""

    url: str  # what a client connects to, the port filled in

    @abstractmethod
    def accept(self) -> Stream | None:
        """Wait for the next client; None once `interrupt` was called or no client can come.

        Never raises for what one client did.
        """

    @abstractmethod
    def interrupt(self) -> None:
        """From any thread, also from a signal handler: `accept` returns None, now and later."""

    @abstractmethod
    def close(self) -> None:
        """Stop listening and remove what the listener made; idempotent."""


class Hub(Listener):
    """A listener whose streams all come through one socket, as a ROUTER's of ZeroMQ do.

    `accept` is for a thread for each stream. A server whose handlers do not block calls `next`
    instead, and one thread serves all streams. They take whatever is written, at once: bounds are
    for whoever writes.
    """

    @abstractmethod
    def next(self, deadline_ns: int) -> Stream | None:
        """Wait for input: the stream, maybe a new one, that has some or has come to its end.

        None at the deadline, or once `interrupt` was called; after `close`, only at the deadline:
        nobody new comes, and the streams that are left live on.
        """


class Transport(ABC):
    """A way to move bytes between two processes, at one address."""

    url: str
    payload_bytes_max: int = 1 << 31  # a hint: what the users of its streams take in one piece

    @abstractmethod
    def connect(self, deadline_ns: int) -> Stream:
        """Reach the server, waiting for it to start if need be.

        Raises Error: UNAVAILABLE at the deadline, PERMISSION_DENIED if what is there is not ours.
        """

    @abstractmethod
    def listen(self) -> Listener:
        """Become the server of this address.

        Raises Error: ALREADY_EXISTS if a live server has it, NOT_FOUND if its directory is
        missing, PERMISSION_DENIED if something that is not ours is in the way.
        """


@contextlib.contextmanager
def checked(call: str, where: object) -> Iterator[None]:
    """Turn an OSError of one system call into an Error that names the call and its object.

    (Python itself repeats a call that a signal interrupted: PEP 475.)
    """
    try:
        yield
    except OSError as error:
        raise SystemError(call, error.errno or 0, str(where)) from None


class Wakeup:
    """An eventfd(2) that stays readable once `set`: ends every sleep that polls it."""

    def __init__(self) -> None:
        with checked("eventfd", "wake-up"):
            self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def set(self) -> None:
        """From any thread or signal handler."""
        if self._fd >= 0:
            os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Take back what was `set`."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._fd)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Signals:
    """Signals that a thread waits for, in place of a handler.

    A handler in Python runs only once the main thread is back from the kernel: if the signal came
    just before it went there to sleep, that may be never. The descriptor of signal.set_wakeup_fd is
    written at once, from whichever thread the signal has hit.
    """

    def __init__(self, *numbers: int) -> None:
        """From the main thread, for the rest of the process's life: there can be but one."""
        self._numbers = numbers
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno())
        for number in numbers:
            signal.signal(number, lambda number, at: None)

    def wait(self) -> int:
        """Sleep until one of them comes, or has come since the last time: its number."""
        while (number := self._reader.recv(1)[0]) not in self._numbers:
            pass  # that of another handler
        return number


class Poller(Protocol):
    """What `sleep_until_ready` sleeps in: a select.poll, or zmq.Poller."""

    def poll(self, timeout: int | None = None, /) -> Sequence[object]: ...


def sleep_until_ready(poll: Poller, deadline_ns: int) -> bool:
    """poll(2) to a deadline: False at the deadline.

    It counts in milliseconds; the last one is slept by the clock, so that pacing is exact.
    """
    if deadline_ns == NEVER:
        return bool(poll.poll())
    while (left_ns := deadline_ns - now_ns()) >= 1_000_000:
        if poll.poll(min(left_ns // 1_000_000, POLL_MS_MAX)):
            return True
    if left_ns > 0:
        time.sleep(left_ns / 1e9)
    return bool(poll.poll(0))


def persist(
    attempt: Callable[[], Made], later: tuple[int, ...], url: str, deadline_ns: int
) -> Made:
    """Attempt to reach a server until it works, or the deadline; `later` are the errors that its
    start may mend. (connect(2) has nothing to wait on for a server that is not there yet.)"""
    pause_s, longest_s = CONNECT_RETRY_S
    while True:
        try:
            return attempt()
        except OSError as error:
            if error.errno not in later:
                raise SystemError("connect", error.errno or 0, url) from None
        left_ns = deadline_ns - now_ns()
        if left_ns <= 0:
            raise Error(Status.UNAVAILABLE, "no server", url)
        time.sleep(min(pause_s, left_ns / 1e9))
        pause_s = min(2 * pause_s, longest_s)


class Lock:
    """flock(2) on `path`, held for a server's life: one server an address, stale things reclaimed.

    The kernel drops the lock with the process, however it ends. The file is removed on `close`,
    under the lock; so whoever locks a file makes sure that it is still the one at the path.
    """

    def __init__(self, path: str) -> None:
        """Raises Error: ALREADY_EXISTS if it is held, PERMISSION_DENIED if it is not ours."""
        self.path = path
        self._fd = -1
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        while self._fd < 0:
            with checked("open", path):
                fd = os.open(path, flags, 0o600)
            try:
                self._take(fd)
            except BaseException:
                os.close(fd)
                raise

    def _take(self, fd: int) -> None:
        mine = os.fstat(fd)
        if not stat.S_ISREG(mine.st_mode) or mine.st_uid != os.geteuid():
            raise Error(Status.PERMISSION_DENIED, "the lock file is not ours", self.path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = "another server has this address"
            raise Error(Status.ALREADY_EXISTS, what, self.path) from None
        except OSError as error:  # of a file system without locks
            raise SystemError("flock", error.errno or 0, self.path) from None
        with contextlib.suppress(FileNotFoundError):
            there = os.stat(self.path, follow_symlinks=False)
            if (there.st_ino, there.st_dev) == (mine.st_ino, mine.st_dev):
                self._fd = fd
                return
        os.close(fd)  # removed between our open and our lock: try again

    def fileno(self) -> int:
        """The file, for who has something to note in it that must outlive a crash."""
        return self._fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
            os.close(fd)


def check_private_directory(path: str) -> None:
    """Raises Error: NOT_FOUND; PERMISSION_DENIED unless it is ours alone."""
    with checked("stat", path):
        info = os.stat(path, follow_symlinks=False)
    if not stat.S_ISDIR(info.st_mode):
        raise Error(Status.PERMISSION_DENIED, "not a directory", path)
    if info.st_uid != os.geteuid() or info.st_mode & 0o077:
        raise Error(Status.PERMISSION_DENIED, "the directory is not ours alone (mode 0700)", path)


def make_private_directory(path: str) -> bool:
    """Make `path` with mode 0700 unless it is there; True if it was made.

    Raises Error: PERMISSION_DENIED if what is there is not a directory that only we can use.
    """
    try:
        os.mkdir(path, 0o700)
        return True
    except FileExistsError:
        pass
    except OSError as error:
        raise SystemError("mkdir", error.errno or 0, path) from None
    check_private_directory(path)
    return False


def check_peer(sock: socket.socket, where: str) -> None:
    """Raises Error: PERMISSION_DENIED unless the peer of a Unix socket runs as us (or is root)."""
    with checked("getsockopt SO_PEERCRED", where):
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    _, uid, _ = struct.unpack("iII", raw)
    if uid not in (os.geteuid(), 0):
        raise Error(Status.PERMISSION_DENIED, f"the peer runs as uid {uid}", where)


EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # accept(2): wait, try again
RETRY_NS = 50_000_000  # how long to wait then: no spinning, yet quick to recover
