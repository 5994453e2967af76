"""The peer programs and signals: what they leave, how soon they go, and by which code.

A test runs for each language, and its expectation is the same for both.
"""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

import ipc_bridge
from ipc_bridge.endpoint import SCHEMES
from ipc_bridge.service import ECHO, STREAM
from peer_support import (
    GONE_S,
    each_language,
    each_server,
    files,
    served,
    serving_own,
    started,
    stdio_url,
)
from processes import is_gone, only_child, sleeps
from support import (
    EXIT_S,
    READY_S,
    TRANSPORTS,
    Exit,
    listen_url,
    until,
    wait_until,
)


@each_language
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "stdio"])
def test_a_signal_drains_and_leaves_nothing(
    language: str, number: signal.Signals, scheme: str, runtime: Path
) -> None:
    where = "127.0.0.1:0" if scheme.endswith("tcp") else f"{runtime}/s"
    address = f"{scheme}://{where}"
    ready = runtime / "ready"
    with served(address, language, "--ready-file", str(ready), "--grace", "30") as server:
        assert ready.read_text() == f"{server.url}\n"
        assert not server.url.endswith(":0")
        with ipc_bridge.connect(server.url) as bridge:
            items = iter(bridge.stream(count=50, size=9, rate_hz=100))
            next(items)
            server.process.send_signal(number)
            assert len(list(items)) == 49
        assert server.process.wait(EXIT_S) == 0
    assert files(runtime) == []


@each_language
def test_the_grace_has_an_end(language: str, url: str) -> None:
    with served(url, language, "--grace", "0.1") as server, ipc_bridge.connect(url) as bridge:
        items = iter(bridge.stream(count=1000, size=9, rate_hz=100))
        next(items)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(ipc_bridge.CallError, match="UNAVAILABLE"):
            list(items)
        assert server.process.wait(EXIT_S) == 0


@each_language
def test_a_second_signal_leaves_at_once(language: str, url: str, runtime: Path) -> None:
    with served(url, language, "--grace", "600") as server, ipc_bridge.connect(url) as bridge:
        items = iter(bridge.stream(count=1 << 60, size=9, rate_hz=10))
        next(items)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: files(runtime) == [], EXIT_S, "the first signal stops the listening")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(GONE_S) == Exit.INTERRUPTED


BLOCKED = {
    "echo": "echo {url} --payload x",
    "stream": "stream {url} --count 1 --size 1",
    "bench-echo": "bench {url} --op echo --size 1 --duration 60",
    "bench-stream": "bench {url} --op stream --size 1 --duration 60 --clients 2",
}
INTERRUPTED = (Exit.INTERRUPTED, b"", b"error: CANCELLED: interrupted\n")


@each_language
@pytest.mark.parametrize(
    ("scheme", "name"),
    [("unix", name) for name in BLOCKED]
    + [
        (scheme, name)
        for scheme in TRANSPORTS
        for name in ("echo", "stream")
        if scheme not in ("unix", "stdio")
    ],
)
def test_ctrl_c_ends_a_blocked_client(language: str, scheme: str, name: str, runtime: Path) -> None:
    entered, release = threading.Semaphore(0), threading.Event()

    def wait(call: ipc_bridge.Call, request: memoryview) -> list[bytes]:
        entered.release()
        release.wait(READY_S)
        return []

    service = ipc_bridge.Service()
    service.unary(ECHO, lambda call, request: b"".join(wait(call, request)))
    service.streaming(STREAM, wait)
    with serving_own(listen_url(scheme, runtime), service) as url:
        with started(language, *BLOCKED[name].replace("{url}", url).split()) as process:
            assert entered.acquire(timeout=READY_S)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=GONE_S)
        release.set()
    assert (process.returncode, out, err) == INTERRUPTED


@each_language
@each_server
@pytest.mark.parametrize("scheme", ["stdio"])
def test_ctrl_c_ends_a_client_and_its_child(language: str, server: str, scheme: str) -> None:
    """A terminal signals both."""
    words = ("--count", "2", "--size", "1", "--rate", "0.01")
    with started(language, "stream", stdio_url(server), *words) as process:
        child = only_child(process.pid)
        assert until(lambda: sleeps(process.pid))
        end_s = time.monotonic() + GONE_S
        for pid in (process.pid, child):
            os.kill(pid, signal.SIGINT)
        out, err = process.communicate(timeout=GONE_S)
        assert until(lambda: is_gone(child), end_s - time.monotonic())
    assert (process.returncode, out, err) == INTERRUPTED
