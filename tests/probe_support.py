"""The probe, a program that exists for the tests: a server with odd methods, and a client that is
told what to do line by line (probe.py, probe.cpp)."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from processes import children, is_gone
from support import (
    ANSWER_S,
    BUILD,
    EXIT_S,
    LANGUAGES,
    READY_S,
    ROOT,
    SLOW,
    listen_url,
    read_line,
    wait_until,
)

Answer = dict[str, Any]
Environment = dict[str, str]
SMALL = 100  # bytes of an echo. Those of another `seed` are others: one call's, and no other's


def program(language: str) -> list[str]:
    """The words that start the probe."""
    if language == "py":
        return [sys.executable, str(ROOT / "tests" / "probe.py")]
    return [str(BUILD / "probe")]


class Process:
    """A probe. Left by `close`, which fails unless it ends well, or by `kill`."""

    def __init__(self, words: list[str], environment: Environment | None = None) -> None:
        self.popen = subprocess.Popen(
            words,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | (environment or {}),
        )
        self.pid = self.popen.pid

    def signal(self, number: signal.Signals) -> None:
        """Send it one."""
        self.popen.send_signal(number)

    def exit_code(self, timeout_s: float = EXIT_S) -> int:
        """Wait for its end."""
        return self.popen.wait(timeout_s)

    def kill(self) -> None:
        """End it, whatever it does, and reap it. Idempotent."""
        self.popen.kill()
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            assert pipe is not None
            pipe.close()

    def close(self) -> None:
        """Let it end. Idempotent."""
        try:
            self._leave()
            assert self.exit_code() == 0, f"{self.popen.args!r} failed"
        finally:
            self.kill()

    def _leave(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()


class Server(Process):
    """`probe serve`, ready."""

    def __init__(
        self, language: str, url: str, *options: str, environment: Environment | None = None
    ) -> None:
        super().__init__([*program(language), "serve", url, *options], environment)
        try:
            word, _, self.url = read_line(self.popen, READY_S).strip().partition(" ")
            assert word == "ready"
        except BaseException:
            self.kill()
            raise

    def _leave(self) -> None:
        self.popen.terminate()


class Client(Process):
    """`probe run`: commands go by keyword, `ask(op="echo", size=4096)`."""

    def __init__(
        self, language: str, url: str, *options: str, environment: Environment | None = None
    ) -> None:
        super().__init__([*program(language), "run", url, *options], environment)

    def send(self, **command: object) -> None:
        """Give a command, without waiting for the answer."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps(command).encode() + b"\n")

    def receive(self, timeout_s: float = ANSWER_S) -> Answer:
        """The next answer."""
        line = read_line(self.popen, timeout_s)
        assert line, "the client has gone"
        answer: Answer = json.loads(line)
        return answer

    def ask(self, **command: object) -> Answer:
        """Give a command; its answer."""
        self.send(**command)
        return self.receive()

    def do(self, **command: object) -> Answer:
        """Give a command that must succeed."""
        answer = self.ask(**command)
        assert answer.get("ok"), (command, answer)
        return answer

    def number(self, method: int) -> int:
        """What a method that counts says."""
        return int(self.do(op="call", method=method)["text"])

    def _leave(self) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.close()


@contextlib.contextmanager
def of_each_language(url: str) -> Iterator[list[Client]]:
    """A client of each language at one server, which both have called."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(language, url)) for language in LANGUAGES]
        for client in clients:
            client.send(op="echo", size=SMALL)
        for client in clients:
            assert client.receive().get("ok"), client.popen.args
        yield clients


def elapsed(client: Client, items: bool = False, **command: object) -> float:
    """Of a call that must end by its deadline, some after items."""
    answer = client.ask(**command)
    assert answer["status"] == "DEADLINE_EXCEEDED"
    assert not items or answer["items"] > 0
    return float(answer["elapsed_s"])


class Peers:
    """The peers of one test: one transport, one pairing, a directory of their own."""

    def __init__(
        self, transport: str, pairing: tuple[str, str], directory: Path, query: str = ""
    ) -> None:
        self.transport = transport
        self.query = query  # of both ends' addresses, with its ?
        self.client_language, self.server_language = pairing
        self.directory = directory
        self.shares_server = transport != "stdio"  # may a second client reach the same server?
        self.is_grpc = transport.startswith("grpc+")  # no frames of ours, no bytes' transport
        self.url = ""
        self.server: Server | None = None  # on stdio, each client has one of its own
        self._all: list[Process] = []
        self._control: Client | None = None

    def serve(self, *options: str, environment: Environment | None = None) -> None:
        """Start the server; on stdio, say how a client does it."""
        if not self.shares_server:
            words = [*program(self.server_language), "serve", f"stdio:{self.query}", *options]
            self.url = "stdio:" + " ".join(filter(None, (self.query, shlex.join(words))))
            return
        url = listen_url(self.transport, self.directory) + self.query
        self.server = Server(self.server_language, url, *options, environment=environment)
        self._all.append(self.server)
        self.url = self.server.url + self.query  # how a server waits is nobody else's affair

    def connect(self, *options: str, environment: Environment | None = None) -> Client:
        """A further client."""
        client = Client(self.client_language, self.url, *options, environment=environment)
        self._all.append(client)
        return client

    def start(self, *options: str) -> Client:
        """Both; the options are the client's."""
        self.serve()
        return self.connect(*options)

    def server_pid(self, client: Client) -> int:
        """The server that a client talks to (which it has done, or there is none yet)."""
        if self.server is not None:
            return self.server.pid
        (pid,) = children(client.pid)
        return pid

    def kill_server(self, client: Client) -> None:
        """kill -9 for the server that a client talks to, which need not end well any more."""
        if self.server is None:
            os.kill(self.server_pid(client), signal.SIGKILL)
        else:
            self._all.remove(self.server)
            self.server.kill()

    def second(self, client: Client) -> Client:
        """A second client of the same server; on stdio there is but the first."""
        return self.connect() if self.shares_server else client

    def check_others(self) -> None:
        """The control client gets the right answer, and is not held up, whatever else goes on."""
        if self.shares_server:
            self._control = self._control or self.connect()
            self._control.do(op="echo", size=1000, timeout=5.0 * SLOW)

    def check_freed(self, client: Client) -> None:
        """No handler lives any more, as seen by a client."""
        wait_until(lambda: client.number(14) == 0, 5.0 * SLOW, "all handlers freed")

    def close(self) -> None:
        """End all, clients first; fails unless all end well, and those that they started."""
        pids = set().union(*(children(process.pid) for process in self._all))
        with contextlib.ExitStack() as stack:
            for process in self._all:
                stack.callback(process.close)
        wait_until(lambda: all(map(is_gone, pids)), EXIT_S, "the stdio servers end")
