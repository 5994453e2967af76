"""The peer programs as instruments: wrong answers are found, and `bench` measures what it says.

A test runs for each language, and its expectation is the same for both.
"""

import array
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ipc_bridge
from ipc_bridge.service import ECHO, STREAM, Pattern
from peer_support import (
    OWN_STREAM,
    OWN_UNARY,
    REQUIRED,
    each_language,
    each_server,
    failed,
    peer,
    run,
    served,
    serving_own,
    started,
)
from support import (
    EXIT_S,
    READY_S,
    SLOW,
)

# --- wrong answers ---


def flipping_service() -> ipc_bridge.Service:
    """An echo that flips a bit, and a stream whose item 3 is that of another index."""

    def echo(call: ipc_bridge.Call, request: memoryview) -> bytes:
        reply = bytearray(request)
        reply[-1] ^= 1
        return bytes(reply)

    def stream(call: ipc_bridge.Call, request: memoryview) -> Iterator[memoryview]:
        pattern = Pattern(100)
        for index in range(10):
            yield pattern.item(index if index != 3 else 4)

    service = ipc_bridge.Service()
    service.unary(ECHO, echo)
    service.streaming(STREAM, stream)
    return service


@each_language
def test_wrong_answers_are_found(language: str, url: str) -> None:
    with serving_own(url, flipping_service()):
        line = f"error: DATA_LOSS: the answer differs from the payload, {url}\n"
        assert failed(run(language, "echo", url, "--payload", "hello")) == (25, line)
        line = f"error: DATA_LOSS: item 3 differs from the pattern, {url}\n"
        assert failed(run(language, "stream", url, "--count", "10", "--size", "100")) == (25, line)


@each_language
@pytest.mark.parametrize("count", [9, 11])
def test_a_wrong_count_of_items_is_found(language: str, count: int, url: str) -> None:
    service = ipc_bridge.Service()
    service.streaming(STREAM, lambda call, request: [b""] * count)
    line = f"error: DATA_LOSS: {count} items instead of 10, {url}\n"
    with serving_own(url, service):
        assert failed(run(language, "stream", url, "--count", "10", "--size", "0")) == (25, line)


@each_language
@pytest.mark.parametrize("rate", [[], ["--rate", "100"]], ids=["closed", "open"])
def test_bench_counts_wrong_answers(language: str, rate: list[str], url: str) -> None:
    with serving_own(url, flipping_service()):
        words = ["--op", "echo", "--size", "100", "--duration", "0.1", "--json", *rate]
        outcome = run(language, "bench", url, *words)
    result = json.loads(outcome.out)
    failures = result["verification_failures"]
    assert failures == result["operations"] > 0
    assert (result["errors"], result["error"]) == (0, None)
    line = f"error: DATA_LOSS: {failures} answers differ from the pattern, {url}\n"
    assert (outcome.code, outcome.err) == (25, line)


@each_language
def test_bench_finds_a_wrong_item(language: str, url: str) -> None:
    def stream(call: ipc_bridge.Call, request: memoryview) -> Iterator[memoryview]:
        pattern, index = Pattern(100), 0
        while True:
            yield pattern.item(index if index != 3 else 4)
            index += 1

    service = ipc_bridge.Service()
    service.streaming(STREAM, stream)
    with serving_own(url, service):
        words = ["--op", "stream", "--size", "100", "--duration", "0.1", "--json"]
        outcome = run(language, "bench", url, *words)
    assert json.loads(outcome.out)["verification_failures"] == 1
    assert outcome.code == 25


# --- bench ---


def bench(language: str, url: str, samples: Path, words: str) -> dict[str, Any]:
    """Run a benchmark that must succeed; checks what holds for all."""
    outcome = run(language, "bench", url, *words.split(), "--json", "--samples", str(samples))
    assert (outcome.code, outcome.err) == (0, "")
    result: dict[str, Any] = json.loads(outcome.out)
    latencies = array.array("Q", samples.read_bytes())
    ordered = sorted(latencies)
    assert result["samples"] == len(latencies)
    assert (result["errors"], result["error"], result["verification_failures"]) == (0, None, 0)
    assert result["operations"] > 0
    per_second = result["operations"] / result["seconds"]
    assert result["operations_per_second"] == pytest.approx(per_second)
    assert result["bytes_per_second"] == pytest.approx(result["bytes"] / result["seconds"])
    for name, share in (("p50", 50), ("p90", 90), ("p99", 99), ("max", 100)):
        rank = -(-len(ordered) * share // 100)
        assert result["latency_ns"][name] == (ordered[rank - 1] if ordered else None)
    assert (result["latency_ns"]["p99_9"] is None) == (len(ordered) < 1000)
    if result["age_ns"]["p50"] is not None:  # one of each item that has a latency
        assert (result["age_ns"]["p99"] is None) == (len(ordered) < 100)
    assert result["memory_peak_bytes"] > 1 << 20
    assert result["cpu_s"]["user"] + result["cpu_s"]["system"] > 0
    return result


@each_language
@each_server
def test_bench_echo(language: str, server: str, url: str, tmp_path: Path) -> None:
    words = "--op echo --size 1KiB --duration 0.2 --warmup 0.1 --clients 2"
    with served(url, server):
        result = bench(language, url, tmp_path / "samples", words)
    assert result["samples"] == result["operations"]
    assert result["bytes"] == 1024 * result["operations"]
    assert 0.2 <= result["seconds"] < 0.2 + SLOW
    assert (result["clients"], result["warmup_s"], result["rate_hz"]) == (2, 0.1, 0.0)


@each_language
@each_server
def test_bench_stream(language: str, server: str, url: str, tmp_path: Path) -> None:
    words = "--op stream --size 64 --duration 0.2 --warmup 0.1 --clients 2"
    with served(url, server):
        result = bench(language, url, tmp_path / "samples", words)
    assert result["samples"] == 0
    assert result["bytes"] == 64 * result["operations"]
    assert 0.2 <= result["seconds"] < 0.2 + SLOW


@each_language
def test_bench_echo_at_a_rate(language: str, served_url: str, tmp_path: Path) -> None:
    words = "--op echo --size 0 --duration 0.2 --warmup 0.1 --rate 500 --clients 3"
    result = bench(language, served_url, tmp_path / "samples", words)
    assert result["samples"] == result["operations"]
    assert result["operations"] == pytest.approx(100, abs=3)  # a client's share is a whole number
    assert result["rate_hz"] == 500


@each_language
@each_server
def test_bench_stream_at_a_rate(language: str, server: str, url: str, tmp_path: Path) -> None:
    words = "--op stream --size 8 --duration 0.5 --rate 200 --clients 2"
    with served(url, server):
        result = bench(language, url, tmp_path / "samples", words)
    assert result["samples"] == result["operations"] < 1000  # 100, and what was late at the start
    assert result["latency_ns"]["p50"] < 1e9  # one clock for both


@each_language
@each_server
def test_bench_shows_a_consumer_that_is_too_slow(
    language: str, server: str, url: str, tmp_path: Path
) -> None:
    """Items come every 5 ms, and each takes 10: the last is late by half the time. The producer
    runs ahead by the window, so that the latency shows it as well; with a window of one item, the
    producer waits, and the age alone shows it."""
    words = "--op stream --size 1KiB --duration 0.6 --rate 200 --work 0.01"
    with served(url, server):
        ahead = bench(language, url, tmp_path / "samples", words)
        waiting = bench(language, url, tmp_path / "samples", f"{words} --window 1")
    for result in (ahead, waiting):
        assert result["operations"] <= 60
        assert result["age_ns"]["p99"] is None, "of so few it would be the maximum"
        assert result["age_ns"]["max"] >= 250e6
    assert ahead["latency_ns"]["max"] >= 240e6
    assert waiting["latency_ns"]["p50"] < 0.5 * waiting["age_ns"]["p50"]


@each_language
@each_server
def test_bench_shows_the_work_on_an_item(
    language: str, server: str, url: str, tmp_path: Path
) -> None:
    words = "--op stream --size 8 --duration 0.4 --rate 25 --work 0.01"
    with served(url, server):
        result = bench(language, url, tmp_path / "samples", words)
    assert result["age_ns"]["p50"] - result["latency_ns"]["p50"] >= 9e6
    words = words.replace(" --rate 25", "")
    with served(url, server):
        result = bench(language, url, tmp_path / "samples", words)
    assert 1 <= result["operations"] <= 41


@each_language
@each_server
def test_bench_reports_what_the_server_uses(
    language: str, server: str, url: str, tmp_path: Path
) -> None:
    words = "--op echo --size 64 --duration 0.2 --warmup 0.1"
    samples = tmp_path / "samples"
    with served(f"{url}?wait=block", server) as running:
        pid = running.process.pid
        used = bench(language, f"{url}?wait=block", samples, f"{words} --server-pid {pid}")
        assert bench(language, url, samples, words)["server"] is None
    calls = used["operations"] + used["operations_warmup"]
    assert used["operations_warmup"] > 0
    assert 0 < used["server"]["cpu_s"] < 1
    # A call wakes the server once, unless it has not slept since the one before, and on a Unix
    # socket perhaps once more, when the client has read the answer and there is room again.
    assert 0 < used["server"]["context_switches"]["voluntary"] < 2.1 * calls + 10
    assert used["server"]["memory_peak_bytes"] > 1 << 20
    command = " ".join([*map(str, peer(server)), "serve", "stdio:"])
    used = bench(language, f"stdio:{command}", samples, f"{words} --server-pid child")
    assert used["server"]["cpu_s"] > 0


@each_language
def test_bench_reports_the_servers_memory_of_its_own_time(
    language: str, served_url: str, tmp_path: Path
) -> None:
    """A harness lets a server do large work, and then small: the peak is not that of the large."""
    code = "large = b'x' * (96 << 20); del large; print(flush=True); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            words = f"--op echo --size 64 --duration 0.05 --server-pid {process.pid}"
            used = bench(language, served_url, tmp_path / "samples", words)
        finally:
            process.kill()
    assert 1 << 20 < used["server"]["memory_peak_bytes"] < 80 << 20


@each_language
def test_bench_needs_the_server_that_it_shall_watch(language: str, served_url: str) -> None:
    with started("py", "--version") as process:
        pid = process.pid
    words = ["bench", served_url, *REQUIRED["bench"], "--server-pid"]
    line = f"error: NOT_FOUND: open: No such file or directory, /proc/{pid}\n"
    assert failed(run(language, *words, str(pid))) == (15, line)
    code, line = failed(run(language, *words, "child"))
    assert code == 15
    assert line.startswith("error: NOT_FOUND: no server was started by this client, /proc/self/")


@each_language
@pytest.mark.parametrize("op", ["echo", "stream"])
def test_bench_a_method_of_ones_own(
    language: str, op: str, served_url: str, tmp_path: Path
) -> None:
    (tmp_path / "payload").write_bytes(b"12345")
    method = {"echo": OWN_UNARY, "stream": OWN_STREAM}[op]
    words = f"--op {op} --method {method} --payload @{tmp_path}/payload --size 99 --duration 0.1"
    result = bench(language, served_url, tmp_path / "samples", words)
    assert result["size_bytes"] == 5
    if op == "echo":
        assert result["bytes"] == 6 * result["operations"]
    else:
        assert result["bytes"] == pytest.approx(1.5 * result["operations"], abs=1)


@each_language
def test_a_stall_is_charged_to_all_calls_that_it_delays(
    language: str, url: str, tmp_path: Path
) -> None:
    stall = threading.Event()

    def echo(call: ipc_bridge.Call, request: memoryview) -> memoryview:
        if not stall.is_set():
            stall.set()
            time.sleep(0.3)
        return request

    service = ipc_bridge.Service()
    service.unary(ECHO, echo)
    words = "--op echo --size 9 --duration 0.5 --rate 100 --json --samples"
    with serving_own(url, service):
        outcome = run(language, "bench", url, *words.split(), str(tmp_path / "samples"))
    assert outcome.code == 0
    samples = array.array("Q", (tmp_path / "samples").read_bytes())
    assert len(samples) == 50
    assert len([ns for ns in samples if ns > 100e6]) >= 18  # due in the first 200 of the 300 ms


@each_language
def test_bench_reports_a_server_that_goes(language: str, url: str) -> None:
    calls = threading.Semaphore(0)

    def echo(call: ipc_bridge.Call, request: memoryview) -> memoryview:
        calls.release()
        return request

    service = ipc_bridge.Service()
    service.unary(ECHO, echo)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(contextlib.ExitStack())
        server.enter_context(serving_own(url, service))
        words = ["bench", url, "--op", "echo", "--size", "1", "--duration", "60", "--json"]
        process = stack.enter_context(started(language, *words))
        assert calls.acquire(timeout=READY_S)
        server.close()
        out, err = process.communicate(timeout=EXIT_S)
    result = json.loads(out)
    assert result["errors"] == 1
    assert f"error: {result['error']}\n" == err.decode()
    assert process.returncode == 24
    assert result["operations"] > 0
    assert result["seconds"] < 60


@each_language
@each_server
def test_stdio_from_client_to_child(language: str, server: str, tmp_path: Path) -> None:
    command = " ".join([*map(str, peer(server)), "serve", "stdio:"])
    assert run(language, "echo", f"stdio:{command}", "--payload", "hi") == (0, b"hi\n", "")
    words = "--op stream --size 1KiB --duration 0.1 --clients 2"
    bench(language, f"stdio:?wait=spin {command}", tmp_path / "samples", words)
