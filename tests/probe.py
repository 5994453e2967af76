"""The conformance peer, server or client; its C++ twin is tests/cpp/probe.cpp.

    probe serve URL [--window N] [--max-payload N] [--clients-max N] [--claims-not-to-block]
    probe run URL [--window N] [--max-payload N]

`serve` offers echo, stream, and methods that misbehave or tell how the server is. `run` is a client
that takes a JSON command a line, and answers each by a line: {"ok": true, ...} or {"status": ...}.
A stream says {"at": n} besides, after n items, if it is asked for this "notice".
"""

import argparse
import contextlib
import ctypes
import json
import os
import random
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

from ipc_bridge import Bridge, Call, Error, Service, Status, connect, make_service, serve
from ipc_bridge.client import Items
from ipc_bridge.frame import PAYLOAD_BYTES_MAX, Buffer
from ipc_bridge.handlers import Item
from ipc_bridge.server import CLIENTS_MAX_DEFAULT, Callee
from ipc_bridge.service import Pattern
from ipc_bridge.session import WINDOW_BYTES_DEFAULT
from ipc_bridge.system import Signals, now_ns

SECONDS = struct.Struct("<d")
Json = dict[str, Any]


# --- the server ---


class Counts:
    """What the handlers did."""

    def __init__(self) -> None:
        self.live = 0  # handlers that have begun and are not freed yet
        self.ended = 0  # sleeps, however they ended
        self.made = 0  # items of method 16
        self.lock = threading.Lock()

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Around a handler, for as long as it lives."""
        with self.lock:
            self.live += 1
        try:
            yield
        finally:
            with self.lock:
                self.live -= 1


counts = Counts()


def fail(call: Call, request: memoryview) -> Buffer:
    raise RuntimeError("boom")


def sleep(call: Call, request: memoryview) -> Buffer:
    if len(request) != SECONDS.size:
        raise Error(Status.INVALID_ARGUMENT, "not a number of seconds")
    with counts.alive():
        call.sleep(SECONDS.unpack(request)[0])
        with counts.lock:
            counts.ended += 1
        return b"cancelled" if call.is_cancelled() else b"slept"


def chatter(call: Call, request: memoryview) -> Buffer:
    print("a print in a handler", flush=True)
    return request


def trickle(call: Call, request: memoryview) -> Iterator[Item]:
    with counts.alive():
        while True:
            call.sleep(0.001)
            yield bytes(64)


def abort(call: Call, request: memoryview) -> Iterator[Item]:
    with counts.alive():
        for _ in range(3):
            yield bytes(64)
        raise Error(Status.ABORTED, "enough")


def give_and_sleep(call: Call, request: memoryview) -> Iterator[Item]:
    with counts.alive():
        for _ in range(3):
            yield bytes(64)
        call.sleep(60.0)


def flood(call: Call, request: memoryview) -> Iterator[Item]:
    block = bytes(4096)
    with counts.alive():
        while True:
            counts.made += 1
            yield block


def probe_service() -> Service:
    """Echo and stream, and the methods of the tests."""
    service = make_service()
    service.unary(10, fail)
    service.unary(11, sleep)
    service.unary(12, chatter)
    service.streaming(13, trickle)
    service.unary(14, lambda call, request: str(counts.live).encode())
    service.streaming(15, abort)
    service.streaming(16, flood)
    service.unary(17, lambda call, request: str(counts.made).encode())
    service.unary(18, lambda call, request: str(counts.ended).encode())
    service.streaming(19, give_and_sleep)
    return service


def stop_at(signals: Signals, server: Callee) -> None:
    signals.wait()
    server.stop()


def run_server(arguments: argparse.Namespace) -> int:
    signals = Signals(signal.SIGTERM)
    service = probe_service()
    service.blocks = not arguments.claims_not_to_block
    with serve(
        arguments.url,
        service,
        window_bytes=arguments.window,
        payload_bytes_max=arguments.max_payload,
        clients_max=arguments.clients_max,
    ) as server:
        threading.Thread(target=stop_at, args=(signals, server), daemon=True).start()
        if not server.url.startswith("stdio:"):
            print(f"ready {server.url}", flush=True)
        server.run()
    return 0


# --- the client ---


def say(answer: Json) -> None:
    print(json.dumps(answer), flush=True)


def need(right: bool, what: str) -> None:
    if not right:
        raise Error(Status.DATA_LOSS, what)


def payload_of(command: Json) -> bytes:
    if "seconds" in command:
        return SECONDS.pack(command["seconds"])
    return str(command.get("text", "")).encode()


class Runner:
    """Does what the commands say."""

    def __init__(self, bridge: Bridge) -> None:
        self.bridge = bridge
        self.began_ns = 0  # when the first byte of the command's call could go out
        self.items = 0  # read so far

    def answer(self, command: Json) -> Json:
        self.items = 0
        self.began_ns = now_ns()
        answer: Json = {"ok": True}
        try:
            OPS[command["op"]](self, command, answer)
        except Error as error:
            answer = {"status": error.status.name, "what": error.what}
        return answer | {"items": self.items, "elapsed_s": (now_ns() - self.began_ns) / 1e9}

    def echo(self, command: Json, answer: Json) -> None:
        """`size` bytes of the pattern's item `seed`; or `all`, every value of a byte."""
        pattern, seed = Pattern(command.get("size", 0)), command.get("seed", 0)
        every = bytes(range(256)) if command.get("all") else b""
        self.began_ns = now_ns()
        reply = self.bridge.echo(every or pattern.item(seed), command.get("timeout"))
        need(reply == every if every else pattern.verifies(seed, reply), "another echo")

    def call(self, command: Json, answer: Json) -> None:
        reply = self.bridge.call(command["method"], payload_of(command), command.get("timeout"))
        answer["text"] = str(reply, "utf-8", "replace")

    def stream(self, command: Json, answer: Json) -> None:
        """Read to the end, or leave after `take` items."""
        count, size = command["count"], command["size"]
        verifies = Pattern(size).verifies
        self.began_ns = now_ns()
        rate_hz, timeout = command.get("rate") or 0.0, command.get("timeout")
        self._walk(self.bridge.stream(count, size, rate_hz, timeout=timeout), command, verifies)
        need(self.items == command.get("take") or self.items == count, "another count of items")

    def call_stream(self, command: Json, answer: Json) -> None:
        method, timeout = command["method"], command.get("timeout")
        items = self.bridge.call_stream(method, payload_of(command), timeout)
        self._walk(items, command, lambda index, item: True)

    def busy(self, command: Json, answer: Json) -> None:
        """An echo while a stream is open: its status; then the stream to its end."""
        count, size = 1000, 64
        items = self.bridge.stream(count, size)
        try:
            self.bridge.echo(b"too much")
        except Error as error:
            answer["status"] = error.status.name
        self._walk(items, {}, Pattern(size).verifies)
        need(self.items == count, "another count of items")

    def cancel_race(self, command: Json, answer: Json) -> None:
        """`count` streams of 3 items, left anywhere; after each at once an echo."""
        choice, pattern = random.Random(command.get("seed", 0)), Pattern(64)
        for turn in range(command["count"]):
            self.items = 0
            take = choice.randrange(5)  # 3: before its END, 4: after it
            self._walk(self.bridge.stream(3, 64), {"take": take}, pattern.verifies)
            need(self.items == min(take, 3), "another count of items")
            need(pattern.verifies(turn, self.bridge.echo(pattern.item(turn))), "another echo")

    def close(self, command: Json, answer: Json) -> None:
        self.bridge.close()

    def fork(self, command: Json, answer: Json) -> None:
        """In mid-stream: the status that the child meets, which reads on, calls, then closes."""
        items = cast(Items, self.bridge.stream(10_000, 1000))
        verifies = Pattern(1000).verifies
        need(verifies(0, next(items)), "another first item")
        child = os.fork()
        if child == 0:
            code = 99
            try:
                code = 0 if sum(1 for _ in items) else 1
            except Error as error:
                items.close()
                code = error.status if self._is_refused() else 98
                self.bridge.close()
            finally:
                os._exit(code)
        answer["child"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        self.items = 1
        self._walk(items, {}, verifies)
        need(self.items == 10_000, "another count of items")

    def _is_refused(self) -> bool:
        try:
            self.bridge.echo(b"child", timeout=2.0)
        except Error:
            return True
        return False

    def _walk(
        self, source: object, command: Json, verifies: Callable[[int, memoryview], bool]
    ) -> None:
        items = cast(Items, source)
        take, notice, pause_at = (command.get(name) for name in ("take", "notice", "pause_at"))
        try:
            while self.items != take:
                if self.items == notice:
                    say({"at": notice})
                if self.items == pause_at:
                    time.sleep(command["pause_s"])
                item = next(items, None)
                if item is None:
                    break
                need(verifies(self.items, item), f"another item {self.items}")
                self.items += 1
        finally:
            items.close()


OPS: dict[str, Callable[[Runner, Json, Json], None]] = {
    "echo": Runner.echo,
    "call": Runner.call,
    "stream": Runner.stream,
    "call_stream": Runner.call_stream,
    "busy": Runner.busy,
    "cancel_race": Runner.cancel_race,
    "close": Runner.close,
    "fork": Runner.fork,
}


def run_client(arguments: argparse.Namespace) -> int:
    try:
        bridge = connect(
            arguments.url, window_bytes=arguments.window, payload_bytes_max=arguments.max_payload
        )
    except Error as error:
        say({"status": error.status.name, "what": error.what})
        return 1
    with bridge:
        runner = Runner(bridge)
        for line in sys.stdin:
            say(runner.answer(json.loads(line)))
    return 0


# --- both ---


def pester() -> None:
    """SIGALRM for every thread, every millisecond. (A timer's signals all go to one thread.)"""
    signal.signal(signal.SIGALRM, lambda number, at: None)
    tgkill = ctypes.CDLL(None).tgkill

    def run() -> None:
        while True:
            for task in os.listdir("/proc/self/task"):
                tgkill(os.getpid(), int(task), signal.SIGALRM)
            time.sleep(0.001)

    threading.Thread(target=run, daemon=True).start()


def main() -> int:
    parser = argparse.ArgumentParser(prog="probe")
    parser.add_argument("command", choices=["serve", "run"])
    parser.add_argument("url")
    parser.add_argument("--window", type=int, default=WINDOW_BYTES_DEFAULT)
    parser.add_argument("--max-payload", type=int, default=PAYLOAD_BYTES_MAX)
    parser.add_argument("--clients-max", type=int, default=CLIENTS_MAX_DEFAULT)
    parser.add_argument("--claims-not-to-block", action="store_true")
    arguments = parser.parse_args()
    if os.environ.get("PROBE_ALARM"):
        pester()
    try:
        return run_server(arguments) if arguments.command == "serve" else run_client(arguments)
    finally:  # Python's own end restores the default: death, should one more arrive
        signal.signal(signal.SIGALRM, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
