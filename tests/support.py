"""What all tests share: where things are, at which address, and how long to wait."""

import os
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / os.environ.get("IPC_BRIDGE_BUILD_DIR", "build")
SANITIZED = "sanitize" in str(BUILD)
FULL = False  # by pytest --full: no count is cut down for the sake of time
SLOW = 5.0 if SANITIZED else 1.0  # factor for every limit on time

FRAMED = ["pipe", "unix", "tcp", "shm", "sysv-queue", "sysv-shm", "zmq+ipc", "zmq+tcp"]
TRANSPORTS = [*FRAMED, "stdio", "grpc+unix", "grpc+tcp"]  # FRAMED: any client, and any bytes
LANGUAGES = ["cpp", "py"]
PAIRINGS = [(client, server) for client in LANGUAGES for server in LANGUAGES]
# For builds whose speed is all the same: not optimised, and by pip a library's sources in one go.
QUICK = {"CMAKE_BUILD_TYPE": "None", "CMAKE_ARGS": "-DCMAKE_UNITY_BUILD=ON"}

READY_S = 10.0 * SLOW
ANSWER_S = 60.0 * SLOW  # far above what any command takes
EXIT_S = 3.0 * SLOW  # the grace, and then some
LATE_S = 0.1 * SLOW  # what an answer may come late (CONFORMANCE)
LOOK_S = 0.005  # between two looks at a condition
MIB = 1 << 20


class Exit(IntEnum):
    """What a peer, or a tool of the harness, leaves with: 10 + the status, apart from three."""

    OK = 0
    USAGE = 2
    INVALID_ARGUMENT = 13
    DEADLINE_EXCEEDED = 14
    NOT_FOUND = 15
    ALREADY_EXISTS = 16
    PERMISSION_DENIED = 17
    RESOURCE_EXHAUSTED = 18
    FAILED_PRECONDITION = 19
    INTERNAL = 23
    UNAVAILABLE = 24
    DATA_LOSS = 25
    UNAUTHENTICATED = 26
    INTERRUPTED = 130


def listen_url(transport: str, directory: Path) -> str:
    """Where a server listens: in `directory`, by a name short enough for a socket's path."""
    if transport.endswith("tcp"):
        return f"{transport}://127.0.0.1:0"
    return f"{transport}://{directory}/{transport}"


@contextmanager
def own_port() -> Iterator[int]:
    """A port where nobody listens, and that the kernel gives to nobody else meanwhile, for it stays
    bound. (That keeps no server from it that sets SO_REUSEADDR, as ours do: socket(7).)"""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@contextmanager
def fixed_url(transport: str, directory: Path) -> Iterator[str]:
    """Where a server will listen, known before it does; and its successor, too."""
    if not transport.endswith("tcp"):
        yield listen_url(transport, directory)
    else:
        with own_port() as port:
            yield f"{transport}://127.0.0.1:{port}"


def until(holds: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Look until it holds: does it in time?"""
    end_s = time.monotonic() + seconds
    while not holds():
        if time.monotonic() >= end_s:
            return False
        time.sleep(LOOK_S)
    return True


def check_late(due_s: float, attempt: Callable[[], float]) -> None:
    """`attempt` takes `due_s`, and in the best of three tries at most LATE_S more: what else this
    machine does delays one of them, a defect delays all."""
    took_s = [attempt()]
    while took_s[-1] >= due_s + LATE_S and len(took_s) < 3:
        took_s.append(attempt())
    assert min(took_s) >= due_s, "too early"
    assert min(took_s) < due_s + LATE_S, f"too late: {took_s}"


def wait_until(holds: Callable[[], bool], seconds: float, what: str) -> None:
    """Look until it holds; fail if it never does."""
    assert until(holds, seconds), f"not within {seconds:g} s: {what}"


def read_line(process: subprocess.Popen[bytes], timeout_s: float) -> str:
    """The next line that it prints. (It is unbuffered here, so select sees what is left.)"""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], timeout_s)
    assert ready, f"{process.args!r} says nothing for {timeout_s:g} s"
    return process.stdout.readline().decode()
