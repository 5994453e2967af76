"""What the tests of the peer programs need: run one, serve with one, serve with a service of one's
own inside the test."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ipc_bridge
from support import ANSWER_S, BUILD, EXIT_S, READY_S, SLOW, read_line

Environment = Mapping[str, str]
GONE_S = 2.0 * SLOW  # within which an interrupted program must have left


def peer(language: str) -> list[str]:
    """The words that start a peer program."""
    if language == "py":
        return [sys.executable, "-m", "ipc_bridge.peer"]
    return [str(BUILD / "ipc-bridge-peer")]


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


@contextlib.contextmanager
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


class Serving(NamedTuple):
    """A peer that serves."""

    process: subprocess.Popen[bytes]
    url: str

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Tell it to stop; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(EXIT_S)


@contextlib.contextmanager
def serving(language: str, url: str, *options: str) -> Iterator[Serving]:
    """A peer that serves, from its ready line on. The test stops it, or it is stopped."""
    with started(language, "serve", url, *options) as process:
        line = read_line(process, READY_S)
        assert line.startswith("ready "), line
        server = Serving(process, line.removeprefix("ready ").rstrip("\n"))
        yield server
        if process.poll() is None:
            assert server.stop() == 0


@contextlib.contextmanager
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
