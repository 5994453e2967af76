"""Where the peers and the bare programs are, how to start them, and how to be sure that they end.

Every program runs in a process group of its own: Ctrl-C reaches the harness alone, which then ends
what it started in order, each by its id. A server is ready when it prints its line, never later.
"""

import argparse
import contextlib
import io
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn
from urllib.parse import quote

from ipc_bridge.console import EXIT_INTERRUPTED, EXIT_STATUS, CommandLineError, report_error
from ipc_bridge.errors import Error, Status, SystemError

ROOT = Path(__file__).resolve().parents[3]
LANGUAGES = {"cpp": "C++", "py": "Python"}
# Of a transport with several schemes: the one that stands for it.
SHORT = {"zmq": "zmq+ipc", "grpc": "grpc+unix"}
PAIRINGS = tuple((client, server) for client in LANGUAGES for server in LANGUAGES)
READY_S = 10.0  # a Python server needs about 0.2 on an idle machine
RUN_S = 120.0  # longer than what it was asked for, and a program hangs
END_S = 5.0  # after SIGTERM; a server drains for one second at most


class ProgramError(Exception):
    """A program failed; the text is what it said, in full."""


# --- where they are ---


def build_dir() -> Path:
    """Where the C++ programs are: IPC_BRIDGE_BUILD_DIR, or build/ of this tree."""
    return ROOT / os.environ.get("IPC_BRIDGE_BUILD_DIR", "build")


def binary(name: str) -> str:
    """The path of a C++ program. Raises Error: NOT_FOUND."""
    path = build_dir() / name
    if not os.access(path, os.X_OK):
        raise Error(Status.NOT_FOUND, f"{name} is not built; run `make build`", str(path))
    return str(path)


def peer(language: str) -> list[str]:
    """The first words of a command to the peer. Raises Error: NOT_FOUND."""
    if language == "py":
        return [sys.executable, "-m", "ipc_bridge.peer"]
    return [binary("ipc-bridge-peer")]


def bare(mechanism: str, language: str) -> list[str]:
    """The first words of a command to a bare program. Raises Error: NOT_FOUND."""
    mechanism = mechanism.replace("-", "_")  # of a URL's scheme, the stem
    if language == "py":
        return [sys.executable, str(ROOT / "python" / "bare" / f"{mechanism}.py")]
    return [binary(f"bare/{mechanism}")]


# --- running them ---


@contextlib.contextmanager
def private_directory() -> Iterator[str]:
    """For sockets and pipes; gone, with all that is in it, when the `with` ends."""
    with tempfile.TemporaryDirectory(prefix="ipc-bridge-") as directory:
        yield directory


class Interrupts:
    """Ctrl-C and its like, as KeyboardInterrupt; held back while a process is being started, which
    would run on else, as nobody would know its id."""

    def __init__(self) -> None:
        self._held = self._came = False

    def catch(self, number: int, at: object) -> None:
        """The handler of a signal."""
        self._came = True
        if not self._held:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """What came in the meantime is raised at the end."""
        self._held, self._came = True, False
        try:
            yield
        finally:
            self._held = False
        if self._came:
            raise KeyboardInterrupt


INTERRUPTS = Interrupts()
STARTED: list[subprocess.Popen[str]] = []  # and not yet ended


def start(words: Sequence[str], core: int | None, stderr: IO[str] | int) -> subprocess.Popen[str]:
    """Start a program, on one core if asked to: it inherits that from us, who return at once.
    Raises ProgramError if there is none, or it may not be run."""
    cores = os.sched_getaffinity(0)
    with INTERRUPTS.hold():
        try:
            if core is not None:
                os.sched_setaffinity(0, {core})
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                errors="replace",
                process_group=0,
            )
            STARTED.append(process)
        except OSError as error:
            raise ProgramError(f"{shlex.join(words)} cannot be started: {error.strerror}") from None
        finally:
            os.sched_setaffinity(0, cores)
    return process


def end(process: subprocess.Popen[str]) -> int:
    """End a program and what it started: kindly, and after END_S, or when interrupted, at once."""
    try:
        if process.poll() is None:  # not waited for: its id, and so its group's, is still its own
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
    finally:
        process.kill()
        code = process.wait()
        if process.stdout:
            process.stdout.close()
        if process in STARTED:
            STARTED.remove(process)
    return code


def run(words: Sequence[str], core: int | None = None, asked_s: float = 0.0) -> str:
    """Run a program to its end; what it printed. `asked_s` is how long it was told to work. Raises
    ProgramError if it failed, or has not ended RUN_S after that."""
    process = start(words, core, subprocess.PIPE)
    try:
        out, said = process.communicate(timeout=RUN_S + asked_s)
    except subprocess.TimeoutExpired:
        what = f"{shlex.join(words)} has not ended after {RUN_S + asked_s:g} s"
        raise ProgramError(what) from None
    finally:
        end(process)
    if process.returncode:
        raise ProgramError(said.strip() or ended(words, process.returncode))
    return out


class Served(NamedTuple):
    """A running server."""

    address: str  # for its clients: what followed `ready`, or a URL
    pid: int  # 0: each client starts one


@contextlib.contextmanager
def served(words: Sequence[str], core: int | None = None) -> Iterator[Served]:
    """A running server. Raises ProgramError if it, or its client, failed."""
    failure = ""
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = start(words, core, log)
        try:
            yield Served(ready(process, words), process.pid)
        except ProgramError as error:
            failure = str(error)
        finally:
            code = end(process)
        log.seek(0)
        said = log.read().strip()
        if code not in (0, -signal.SIGTERM):  # bare programs do not catch it
            said = "\n".join([said, ended(words, code)]).strip()
        elif not failure:
            return
        raise ProgramError("\n".join(text for text in (failure, said) if text))


def ready(process: subprocess.Popen[str], words: Sequence[str]) -> str:
    """Wait for the ready line of a server."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], READY_S)[0]:
        raise ProgramError(f"{shlex.join(words)} is not ready after {READY_S:g} s")
    word, _, address = process.stdout.readline().rstrip("\n").partition(" ")
    if word != "ready":
        raise ProgramError(f"{shlex.join(words)} has not become ready")
    return address


def ended(words: Sequence[str], code: int) -> str:
    """How a program ended."""
    return f"{shlex.join(words)} ended with {f'signal {-code}' if code < 0 else f'code {code}'}"


@contextlib.contextmanager
def served_peer(
    scheme: str,
    words: Sequence[str],
    path: str,
    wait: str = "",
    core: int | None = None,
) -> Iterator[Served]:
    """A server, started by `words` and its URL; `path` is for what it needs on disk. With stdio,
    each client starts its own."""
    query = f"?wait={wait}" if wait else ""
    if scheme == "stdio":
        command = shlex.join([*on_core(core), *words, f"stdio:{query}"])
        yield Served(f"stdio:{query} {command}" if query else f"stdio:{command}", 0)
        return
    where = "127.0.0.1:0" if scheme.endswith("tcp") else quote(path)
    with served([*words, f"{scheme}://{where}{query}"], core) as server:
        yield server._replace(address=server.address.partition("?")[0] + query)


def on_core(core: int | None) -> list[str]:
    """The words before a command that another program starts, and would start on its own core."""
    return [] if core is None else ["taskset", "-c", str(core)]


def move(pid: int, cores: Iterable[int]) -> None:
    """Let a program go on elsewhere: all its threads, and what they start. Raises ProgramError if
    it is not ours to move."""
    cores = set(cores)
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.sched_setaffinity(int(thread), cores)
    except OSError as error:
        raise ProgramError(f"process {pid} cannot be moved: {error.strerror}") from None


# --- being a program ---


class Parser(argparse.ArgumentParser):
    """argparse, with the form that all errors of this project have."""

    def error(self, message: str) -> NoReturn:
        where, colon, what = message.removeprefix("argument ").partition(": ")
        raise CommandLineError(what, where) if colon else CommandLineError(message)


class Output(io.FileIO):
    """Standard output. A reader who has left (| head) has what he wanted: that is no error, and the
    exit code stays what the program has found."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return memoryview(data).nbytes


def main(program: Callable[[Sequence[str]], int]) -> int:
    """Run a program of the harness; whatever stops it, what it started ends as well. A fault of its
    own leaves no code that would be an answer: 1 says that a cell has failed, or regressed."""
    if sys.stdout:
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(Output(1, "w", closefd=False)),
            encoding=sys.stdout.encoding,
            errors=sys.stdout.errors,
            line_buffering=sys.stdout.isatty(),
        )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # else nohup, or a shell's &, has a wish
            signal.signal(number, INTERRUPTS.catch)
    try:
        return program(sys.argv[1:])
    except KeyboardInterrupt:
        report_error(Error(Status.CANCELLED, "interrupted"))
        return EXIT_INTERRUPTED
    except Error as error:
        return report_error(error)
    except OSError as error:
        with open(os.devnull, "w") as nowhere:  # for what standard output may not have taken
            os.dup2(nowhere.fileno(), 1)
        where = str(error.filename or "stdout")
        return report_error(SystemError("write", error.errno or 0, where))
    except Exception:
        traceback.print_exc()
        return EXIT_STATUS + Status.INTERNAL
    finally:
        for process in STARTED[:]:  # those whose `with` had not begun when the interrupt came
            end(process)
