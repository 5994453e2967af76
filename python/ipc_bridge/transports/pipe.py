"""Pipes: `pipe` (named FIFOs, strangers meet in a directory) and `stdio` (a parent and its child).

Pick `pipe` for the cheapest wake-up with nothing but the file system, `stdio` when one program
starts the other anyway: nothing to name, nothing to clean up, and the end of one ends the other.

Meeting: a client of `pipe` makes a FIFO for each direction and writes one line with their random
name into the server's FIFO `listen`; the server opens the pair, and its first byte tells the client
so. A line is found again after garbage, a record of fixed size never is.

The trap: a pipe's end-of-file means "no writer now", not "the writer has finished"; whoever opens
too early or too late reads a false one. See `Pipe._attempt` for the order that avoids it, and
`Stdio.listen` for the other trap: on `stdio`, a stray print would land amid the frames.

Copy with it: errors, system (and frame, session, client, server for the calls on top).
Run: python -m ipc_bridge.peer serve pipe:///tmp/demo.d
"""

import contextlib
import fcntl
import os
import re
import secrets
import select
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from io import FileIO

from ipc_bridge.errors import Error, Status
from ipc_bridge.system import (
    CONNECT_RETRY_S,
    END,
    NEVER,
    RETRY_NS,
    WOULD_BLOCK,
    Buffer,
    Listener,
    Lock,
    Spinner,
    Stream,
    Transport,
    Wait,
    Wakeup,
    check_private_directory,
    checked,
    make_private_directory,
    now_ns,
    sleep_until_ready,
)

PIPE_BYTES = 256 << 10  # of each pipe; with 100 clients still below pipe-user-pages-soft, pipe(7)
LINE_BYTES_MAX = 17  # 16 hex digits and a newline; below PIPE_BUF, so lines never mix
NAME = re.compile(r"[0-9a-f]{16}")
MADE = b"made"  # in the lock file: the directory, by a server
PAIR = re.compile(r"[0-9a-f]{16}\.(c2s|s2c)")
OPEN = os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
# For a child to leave by itself at its end-of-file, while whoever closes waits: most do.
CLOSE_WAITS_S = 0.05
CHILD_LEAVES_S = 0.1  # then, before it gets SIGTERM
CHILD_ENDS_S = 2.0  # then, for its calls to end, before it gets SIGKILL


class PipeStream(Stream):
    """A pipe to read and a pipe to write, both in non-blocking mode.

    An endpoint that always blocks reads in blocking mode instead: then it sleeps and reads in one
    system call. No descriptor ends that sleep, so `interrupt` writes a byte into the pipe itself.
    """

    def __init__(
        self, read_fd: int, write_fd: int, wait: Wait, on_close: Callable[[], None], server: bool
    ) -> None:
        self.spinner = Spinner(wait)
        self._read_fd = read_fd
        self._write_fd = write_fd
        # (A FileIO says "not now" by None, which costs less than the exception of os.read.)
        self._read = FileIO(read_fd, "r", closefd=False).readinto
        self._write = FileIO(write_fd, "w", closefd=False).write
        self._on_close = on_close
        self._blocking = wait == Wait.BLOCK and (not server or self._nudge(b""))
        os.set_blocking(read_fd, self._blocking)
        os.set_blocking(write_fd, False)
        self._readable = select.poll()
        self._readable.register(read_fd, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(write_fd, select.POLLOUT)
        self._any = select.poll()
        self._any.register(read_fd, select.POLLIN)
        self._any.register(write_fd, select.POLLOUT)
        self._wakeup = Wakeup() if server else None
        self._interrupted = False
        if self._wakeup:
            for poll in (self._readable, self._writable, self._any):
                poll.register(self._wakeup, select.POLLIN)
        for fd in (read_fd, write_fd):
            with contextlib.suppress(OSError):  # beyond the user's share: smaller pipes work too
                if fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) < PIPE_BYTES:
                    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def try_read(self, buffer: memoryview) -> int:
        if self._blocking:
            is_ready = self._interrupted or self._readable.poll(0)
            return self.read(buffer, NEVER) if is_ready else WOULD_BLOCK
        count = self._read(buffer)
        if count:
            return count
        return END if count == 0 or self._interrupted else WOULD_BLOCK

    def read(self, buffer: memoryview, deadline_ns: int) -> int:
        if not self._blocking or deadline_ns != NEVER:
            return super().read(buffer, deadline_ns)
        # (C++ has this a level below, in sleep_and_read: a call costs nothing there.)
        count = END if self._interrupted else self._read(buffer) or END
        return END if self._interrupted else count

    def try_write(self, buffers: Sequence[Buffer]) -> int:
        try:
            if len(buffers) == 1:
                return self._write(buffers[0]) or WOULD_BLOCK
            return os.writev(self._write_fd, buffers)
        except BlockingIOError:
            return WOULD_BLOCK
        except BrokenPipeError:  # Python ignores SIGPIPE
            return END

    def wait(self, readable: bool, writable: bool, deadline_ns: int) -> bool:
        if not writable:
            return self._interrupted or sleep_until_ready(self._readable, deadline_ns)
        # Unless it is wanted, its end-of-file, which no mask hides, would keep poll(2) busy.
        poll = self._any if readable else self._writable
        return self._interrupted or sleep_until_ready(poll, deadline_ns)

    def fileno(self) -> int:
        return self._read_fd

    def interrupt(self) -> None:
        if self._wakeup:
            self._interrupted = True
            if self._blocking:
                self._nudge(b"\0")
            self._wakeup.set()

    def close(self) -> None:
        if self._read_fd < 0:
            return
        os.close(self._read_fd)
        os.close(self._write_fd)
        self._read_fd = self._write_fd = -1
        if self._wakeup:
            self._wakeup.close()
        self._on_close()

    def _nudge(self, data: bytes) -> bool:
        """Write into the pipe that is read, through an end of our own; False if there is no such
        end (proc(5) is not mounted). It is not kept: with it, the peer's end would not show."""
        try:
            fd = os.open(f"/proc/self/fd/{self._read_fd}", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return False
        with contextlib.suppress(BlockingIOError):  # full: nobody sleeps
            os.write(fd, data)
        os.close(fd)
        return True


class PipeListener(Listener):
    """The FIFO `listen`, under the lock."""

    def __init__(self, path: str, url: str, wait: Wait, lock: Lock, made: bool) -> None:
        self.url = url
        self._path = path
        self._wait = wait
        self._lock = lock
        self._made = made
        self._names: list[str] = []
        self._line = b""  # the start of a line
        self._stopped = False
        listen = f"{path}/listen"
        with contextlib.ExitStack() as undo:
            with checked("mkfifo", listen):
                os.mkfifo(listen, 0o600)
            undo.callback(_unlink, listen)
            self._fd = _open_fifo(listen, os.O_RDONLY)
            undo.callback(os.close, self._fd)
            # A writer of our own: without one, the end-of-file between two clients keeps poll(2)
            # busy.
            self._writer_fd = _open_fifo(listen, os.O_WRONLY)
            undo.callback(os.close, self._writer_fd)
            self._wakeup = Wakeup()
            undo.pop_all()

    def accept(self) -> Stream | None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._wakeup, select.POLLIN)
        while True:
            while self._names and not self._stopped:
                stream = self._open_pair(self._names.pop(0))
                if stream is not None:
                    return stream
            poll.poll()
            if self._stopped:
                return None
            self._read_names()

    def interrupt(self) -> None:
        self._stopped = True
        self._wakeup.set()

    def close(self) -> None:
        if self._fd < 0:
            return
        _unlink(f"{self._path}/listen")
        os.close(self._fd)
        os.close(self._writer_fd)
        self._fd = -1
        self._wakeup.close()
        self._lock.close()
        if self._made:
            with contextlib.suppress(OSError):  # a client's pair may be in it
                os.rmdir(self._path)

    def _read_names(self) -> None:
        with contextlib.suppress(BlockingIOError):
            *lines, rest = (self._line + os.read(self._fd, 4096)).split(b"\n")
            self._line = rest[:LINE_BYTES_MAX]  # longer is garbage, and stays so when cut
            names = (line.decode("latin-1") for line in lines)
            self._names += [name for name in names if NAME.fullmatch(name)]

    def _open_pair(self, name: str) -> Stream | None:
        """Open a client's pair and take it off the disk; None if the client has gone."""
        c2s, s2c = f"{self._path}/{name}.c2s", f"{self._path}/{name}.s2c"
        with contextlib.ExitStack() as undo:
            try:
                read_fd = _open_fifo(c2s, os.O_RDONLY)
                undo.callback(os.close, read_fd)
                write_fd = _open_fifo(s2c, os.O_WRONLY)
                undo.callback(os.close, write_fd)
                stream = PipeStream(read_fd, write_fd, self._wait, lambda: None, server=True)
            except Error as error:
                if error.status == Status.RESOURCE_EXHAUSTED:  # the client waits; do not spin
                    self._names.insert(0, name)
                    self._pause()
                elif error.status == Status.UNAVAILABLE:  # ENXIO: nobody reads
                    _unlink(c2s)
                    _unlink(s2c)
                return None
            undo.pop_all()
        _unlink(c2s)
        _unlink(s2c)
        return stream

    def _pause(self) -> None:
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        sleep_until_ready(poll, now_ns() + RETRY_NS)


class Pipe(Transport):
    """`pipe:///dir`: a directory of the server's own, mode 0700; in it `lock`, `listen`, and for a
    moment the pair of a client that is arriving."""

    def __init__(self, path: str, wait: Wait = Wait.ADAPTIVE) -> None:
        self.path = path
        self.url = f"pipe://{path}"
        self._wait = wait

    def connect(self, deadline_ns: int) -> Stream:
        pause_s, longest_s = CONNECT_RETRY_S
        while True:
            stream = self._attempt(deadline_ns)
            if stream is not None:
                return stream
            left_ns = deadline_ns - now_ns()
            if left_ns <= 0:
                raise Error(Status.UNAVAILABLE, "no server", self.url)
            time.sleep(min(pause_s, left_ns / 1e9))
            pause_s = min(2 * pause_s, longest_s)

    def listen(self) -> Listener:
        made = make_private_directory(self.path)
        try:
            lock = Lock(f"{self.path}/lock")
        except BaseException:
            if made:
                os.rmdir(self.path)
            raise
        try:
            made = _note_made(lock, made)
            _sweep(self.path)
            return PipeListener(self.path, self.url, self._wait, lock, made)
        except BaseException:
            lock.close()
            if made:
                os.rmdir(self.path)
            raise

    def _attempt(self, deadline_ns: int) -> Stream | None:
        """Knock once; None if no server answers (yet)."""
        with contextlib.ExitStack() as undo:
            try:
                check_private_directory(self.path)
                listen_fd = _open_fifo(f"{self.path}/listen", os.O_WRONLY)
            except Error as error:
                if error.status in (Status.NOT_FOUND, Status.UNAVAILABLE):
                    return None
                raise
            undo.callback(os.close, listen_fd)
            name = secrets.token_hex(8)
            paths = [f"{self.path}/{name}.{end}" for end in ("s2c", "c2s")]
            for path in paths:
                with checked("mkfifo", path):
                    os.mkfifo(path, 0o600)
                undo.callback(_unlink, path)
            # Our end for reading first, so that the server can open its own for writing. Then a
            # reader that stands in for the server, without which ours for writing would not open;
            # it leaves when the server has come, else the server would read a false end-of-file.
            read_fd = _open_fifo(paths[0], os.O_RDONLY)
            kept = undo.enter_context(contextlib.ExitStack())
            kept.callback(os.close, read_fd)
            stand_in_fd = _open_fifo(paths[1], os.O_RDONLY)
            undo.callback(os.close, stand_in_fd)
            write_fd = _open_fifo(paths[1], os.O_WRONLY)
            kept.callback(os.close, write_fd)
            if _knock(listen_fd, name) and _await_answer(read_fd, listen_fd, deadline_ns):
                kept.pop_all()
                return PipeStream(read_fd, write_fd, self._wait, lambda: None, server=False)
        return None


def _knock(listen_fd: int, name: str) -> bool:
    try:
        os.write(listen_fd, f"{name}\n".encode())
        return True
    except (BlockingIOError, BrokenPipeError):  # full of others, or the server has just gone
        return False


def _await_answer(read_fd: int, listen_fd: int, deadline_ns: int) -> bool:
    """Wait for the server's first byte; its listening end tells if it goes instead (POLLERR)."""
    poll = select.poll()
    poll.register(read_fd, select.POLLIN)
    poll.register(listen_fd, 0)
    if not sleep_until_ready(poll, deadline_ns):
        return False
    return any(fd == read_fd and events & select.POLLIN for fd, events in poll.poll(0))


def _open_fifo(path: str, flags: int) -> int:
    """Open a FIFO of ours. Raises Error: NOT_FOUND, UNAVAILABLE (no reader), PERMISSION_DENIED."""
    with checked("open", path):
        fd = os.open(path, flags | OPEN)
    info = os.fstat(fd)
    if not stat.S_ISFIFO(info.st_mode) or info.st_uid != os.geteuid():
        os.close(fd)
        raise Error(Status.PERMISSION_DENIED, "not a FIFO of ours", path)
    return fd


def _note_made(lock: Lock, made: bool) -> bool:
    """Has this server made the directory, or one that died in it? The lock file tells who comes
    after a crash, and removes it."""
    if made:
        with contextlib.suppress(OSError):
            os.pwrite(lock.fileno(), MADE, 0)
    return made or os.pread(lock.fileno(), len(MADE), 0) == MADE


def _sweep(path: str) -> None:
    """Remove what a dead server and its clients left; only under the lock, and only ours."""
    with checked("opendir", path):
        entries = list(os.scandir(path))
    for entry in entries:
        if entry.name != "listen" and not PAIR.fullmatch(entry.name):
            continue
        info = entry.stat(follow_symlinks=False)
        if stat.S_ISFIFO(info.st_mode) and info.st_uid == os.geteuid():
            _unlink(entry.path)
        elif entry.name == "listen":
            what = "something that is not our FIFO is in the way"
            raise Error(Status.ALREADY_EXISTS, what, entry.path)


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


class StdioListener(Listener):
    """The parent is the only client; when it has gone, no other can come."""

    def __init__(self, url: str, read_fd: int, write_fd: int, wait: Wait) -> None:
        self.url = url
        self._gone = Wakeup()
        self._wakeup = Wakeup()
        self._stopped = False
        self._stream: PipeStream | None = PipeStream(
            read_fd, write_fd, wait, self._gone.set, server=True
        )

    def accept(self) -> Stream | None:
        stream, self._stream = self._stream, None
        if stream is None and not self._stopped:
            poll = select.poll()
            poll.register(self._gone, select.POLLIN)
            poll.register(self._wakeup, select.POLLIN)
            poll.poll()
        return stream

    def interrupt(self) -> None:
        self._stopped = True
        self._wakeup.set()

    def close(self) -> None:
        self._stopped = True
        stream, self._stream = self._stream, None
        if stream is not None:  # nobody accepted it
            stream.close()
        self._gone.close()
        self._wakeup.close()


class Stdio(Transport):
    """`stdio:COMMAND WORDS`: the client starts the server as its child; the child serves `stdio:`.

    There is one client, and it is there from the start; the child's HELLO says that it is ready.
    """

    def __init__(self, words: Sequence[str], wait: Wait = Wait.ADAPTIVE) -> None:
        self.words = list(words)
        self.url = "stdio:" + " ".join(self.words)
        self._wait = wait

    def connect(self, deadline_ns: int) -> Stream:
        if not self.words:
            raise Error(Status.INVALID_ARGUMENT, "stdio takes a command to start", self.url)
        pipe = subprocess.PIPE
        with checked("spawn", self.words[0]):
            child = subprocess.Popen(self.words, bufsize=0, stdin=pipe, stdout=pipe)
        assert child.stdin is not None
        assert child.stdout is not None
        with contextlib.ExitStack() as undo:
            undo.callback(_reap, child)
            with child.stdin, child.stdout, checked("dup", self.url):
                read_fd = os.dup(child.stdout.fileno())
                undo.callback(os.close, read_fd)
                write_fd = os.dup(child.stdin.fileno())
            undo.pop_all()
        return PipeStream(read_fd, write_fd, self._wait, lambda: _reap(child), server=False)

    def listen(self) -> Listener:
        """Take fds 0 and 1 for the wire, and put /dev/null and stderr in their places: whatever
        prints from now on prints there."""
        for fd in (0, 1):
            with checked("fstat", self.url):
                mode = os.fstat(fd).st_mode
            if not stat.S_ISFIFO(mode):
                what = f"fd {fd} is not a pipe; a client starts this program: stdio:COMMAND"
                raise Error(Status.FAILED_PRECONDITION, what, self.url)
        with contextlib.ExitStack() as undo:
            with checked("fcntl", self.url):
                read_fd = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, 3)
                undo.callback(os.close, read_fd)
                write_fd = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3)
                undo.callback(os.close, write_fd)
            with checked("open", os.devnull):
                null_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            os.dup2(null_fd, 0)
            os.close(null_fd)
            os.dup2(2, 1)
            listener = StdioListener(self.url, read_fd, write_fd, self._wait)
            undo.pop_all()
            return listener


def _reap(child: subprocess.Popen[bytes]) -> None:
    """Let the child leave at its end-of-file; else see to its end from a thread, which this process
    waits for when it leaves: whoever closes has a deadline, and the child may be stopped."""
    try:
        child.wait(CLOSE_WAITS_S)
    except subprocess.TimeoutExpired:
        threading.Thread(target=_end, args=(child,)).start()


def _end(child: subprocess.Popen[bytes]) -> None:
    for patience_s, ask in ((CHILD_LEAVES_S, child.terminate), (CHILD_ENDS_S, child.kill)):
        try:
            child.wait(patience_s)
            return
        except subprocess.TimeoutExpired:
            ask()
    child.wait()


__all__ = ["Pipe", "PipeListener", "PipeStream", "Stdio", "StdioListener"]
