"""The peer programs: run one, serve with one, as oneself or as nobody; or serve with a service of
the test's own, inside the test."""

import os
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import ipc_bridge
from support import ANSWER_S, BUILD, EXIT_S, LANGUAGES, READY_S, SLOW

Environment = Mapping[str, str]
GONE_S = 2.0 * SLOW  # within which an interrupted program must have left
TIMEOUT_S = 20.0 * SLOW  # for a program that should have ended long ago
NOBODY = 65534
OWN_UNARY, OWN_STREAM = 7, 8  # methods of the service of `served_url`, beside echo and stream

REQUIRED = {  # the least that a command needs
    "serve": [],
    "echo": ["--payload", "x"],
    "stream": ["--count", "1", "--size", "1"],
    "bench": ["--op", "echo", "--size", "1", "--duration", "1"],
}

each_language = pytest.mark.parametrize("language", LANGUAGES)
each_server = pytest.mark.parametrize("server", LANGUAGES)

PEER = BUILD / "ipc-bridge-peer"
AS_NOBODY = f"""
import os, sys
from ipc_bridge import peer
from ipc_bridge.transports import grpc_rpc, sysv_queue, sysv_shm, zeromq
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
sys.exit(peer.main())
"""  # Python itself may stand where nobody else can read it, so it is loaded before


def peer(language: str, nobody: bool = False) -> list[str]:
    """The words that start a peer; as another user, if root asks for that."""
    if language == "py":
        return [sys.executable, *(["-c", AS_NOBODY] if nobody else ["-m", "ipc_bridge.peer"])]
    if not PEER.exists():
        pytest.fail(f"{PEER} is not built: run make build")
    if not nobody:
        return [str(PEER)]
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", str(PEER)]


def stdio_url(language: str) -> str:
    """The URL of a server that its client starts."""
    return f"stdio:{shlex.join([*peer(language), 'serve', 'stdio:'])}"


# --- run one to its end ---


class Outcome(NamedTuple):
    """What a peer printed, and how it left."""

    code: int
    out: bytes
    err: str


def run(
    language: str,
    *words: str,
    stdin: bytes | int = b"",
    stdout: int = subprocess.PIPE,
    env: Environment | None = None,
) -> Outcome:
    """Run a peer to its end."""
    given: dict[str, Any] = {"stdin" if isinstance(stdin, int) else "input": stdin}
    done = subprocess.run(
        [*peer(language), *words],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, **(env or {})},
        timeout=ANSWER_S,
        **given,
    )
    return Outcome(done.returncode, done.stdout or b"", done.stderr.decode())


@contextmanager
def client(language: str, *words: str, nobody: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A client under way."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [*peer(language, nobody), *words], stdout=pipe, stderr=pipe, text=True
    )
    try:
        yield process
    finally:
        kill(process)


def ended(process: subprocess.Popen[str], seconds: float = TIMEOUT_S) -> int:
    """The exit code of a client. If it is an error, one line of stderr says so, and no more."""
    out, errors = process.communicate(timeout=seconds)
    code = process.returncode
    if code == 0:
        assert errors == ""
    else:
        assert re.fullmatch(r"error: [^\n]+\n", errors), f"exit code {code}, stderr {errors!r}"
        assert out == ""
    return code


def run_client(language: str, *words: str, nobody: bool = False) -> int:
    """Run a client to its end: the exit code (see `ended`)."""
    with client(language, *words, nobody=nobody) as process:
        return ended(process)


# --- serve ---


@contextmanager
def started(language: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A peer that is running, with pipes to all its ends; killed if it has not left by itself."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [*peer(language), *words], bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe
    ) as process:
        try:
            yield process
        finally:
            process.kill()


class Served(NamedTuple):
    """A server that has said that it is ready."""

    process: subprocess.Popen[str]
    url: str

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Tell it to stop; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT_S)


def start_server(url: str, language: str, *words: str, nobody: bool = False) -> Served:
    """Start a server, and wait for its ready line."""
    process = subprocess.Popen(
        [*peer(language, nobody), "serve", url, *words], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        ready, _, _ = select.select([process.stdout], [], [], READY_S)
        assert ready, "the server prints no ready line"
        line = process.stdout.readline()
        match = re.fullmatch(r"ready (\S+)\n", line)
        assert match, f"no ready line: {line!r}"
    except BaseException:
        kill(process)
        raise
    return Served(process, match[1])


@contextmanager
def served(url: str, language: str, *words: str, nobody: bool = False) -> Iterator[Served]:
    """A server; unless it has been killed, it must leave cleanly at SIGTERM."""
    server = start_server(url, language, *words, nobody=nobody)
    try:
        yield server
        if server.process.poll() is None:
            # A kill just before may not have shown in poll() yet.
            assert server.stop() in (0, -signal.SIGKILL)
    finally:
        kill(server.process)


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9, and take leave of it."""
    process.kill()
    process.wait(TIMEOUT_S)
    for stream in (process.stdout, process.stderr, process.stdin):
        if stream:
            stream.close()


@contextmanager
def serving_own(url: str, service: ipc_bridge.Service) -> Iterator[str]:
    """A service of the test's own, in a thread of the test; gives its URL."""
    with ipc_bridge.serve(url, service, grace_s=0.1) as server:
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield server.url
        finally:
            server.stop()
            thread.join(EXIT_S)
    assert not thread.is_alive()


def files(directory: Path) -> list[str]:
    """What is in a directory."""
    return sorted(os.listdir(directory))


def failed(outcome: Outcome) -> tuple[int, str]:
    """Code and text of a peer that failed, and printed nothing else."""
    assert outcome.out == b""
    return outcome.code, outcome.err
