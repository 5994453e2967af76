"""`ipc-bridge bench`: the right cells, honest figures, a document that says it all, no trace."""

import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from harness_support import (
    ROOT,
    TINY,
    bench,
    call,
    echo_round,
    run,
    run_on_terminal,
    start,
    temporary_directory,
)
from ipc_bridge import load
from ipc_bridge.endpoint import SCHEMES
from ipc_bridge.errors import Error
from ipc_bridge.harness import environment, overhead, programs, results, statistics
from ipc_bridge.harness.bench import choose, chosen_axes, measure, overloads
from ipc_bridge.harness.matrix import (
    PROFILES,
    Axes,
    Cell,
    Floor,
    cells_of,
    floor_of,
    floors_of,
    reason_to_skip,
    traits,
)
from ipc_bridge.harness.programs import PAIRINGS, Served
from ipc_bridge.harness.runner import Measured, Plan, Runner
from ipc_bridge.harness.statistics import Figure
from peer_support import served
from support import Exit

UNIX = Cell("unix", "cpp", "cpp", "echo", 64, "block", "same-core")
ZMQ_FLOOR = Floor("bare", "zeromq", 64, "block", "same-core")
OWN_SERVER = f"{shlex.quote(sys.executable)} {ROOT / 'tests' / 'own_server.py'}"


# --- the matrix ---


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_has_every_transport_in_every_pairing(profile: str) -> None:
    cells = [cell for cell in cells_of(PROFILES[profile], {}) if not reason_to_skip(cell, 2, {})]
    for op in ("echo", "stream"):
        found = {(cell.transport, cell.client, cell.server) for cell in cells if cell.op == op}
        assert found == {(scheme, *pairing) for scheme in SCHEMES for pairing in PAIRINGS}
    assert len(cells) == len(set(cells))
    assert len({cell.label() for cell in cells}) == len(cells)


def test_a_chosen_axis_replaces_that_of_the_profile() -> None:
    chosen: Axes = {
        "transport": ["unix"],
        "pairing": ["py-cpp"],
        "size_bytes": [1, 2],
        "op": ["echo"],
    }
    cells = cells_of(PROFILES["quick"], chosen)
    assert [(cell.client, cell.server, cell.size_bytes, cell.op) for cell in cells] == [
        ("py", "cpp", 1, "echo"),
        ("py", "cpp", 2, "echo"),
    ]


@pytest.mark.parametrize(
    ("changes", "cores", "reason"),
    [
        ({}, 2, ""),
        ({"placement": "cross-core"}, 1, "needs two cores, and one may be used"),
        ({"wait": "spin"}, 2, "two that spin on one core only wait for each other's time to end"),
        ({"wait": "spin", "placement": "free"}, 1, "two that spin on one core"),
        ({"wait": "spin", "placement": "cross-core"}, 2, ""),
        ({"transport": "zmq+tcp", "wait": "spin"}, 2, "zmq+tcp cannot spin"),
        ({"transport": "stdio", "clients": 2}, 2, "a server of stdio has 1 client"),
        ({"server": "mine"}, 2, "there is no server mine"),
        ({"op": "stream", "rate_hz": 5.0, "size_bytes": 7}, 2, "a paced item holds its time"),
    ],
)
def test_what_cannot_be_run_has_a_reason(changes: Any, cores: int, reason: str) -> None:
    found = reason_to_skip(UNIX._replace(**changes), cores, {})
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_a_floor_has_the_mechanism_wait_and_place_of_its_cell() -> None:
    assert floor_of(UNIX) == Floor("bare", "unix", 64, "block", "same-core")
    adaptive = UNIX._replace(wait="adaptive", placement="cross-core", server="py")
    assert floor_of(adaptive) == Floor("bare", "unix", 64, "spin", "cross-core")
    stream = UNIX._replace(op="stream", placement="free")
    assert floor_of(stream) == Floor("copy", "", 64, "", "cross-core")
    assert floor_of(stream._replace(rate_hz=9.0)) is None
    assert floor_of(UNIX._replace(size_bytes=0)) is None
    assert floor_of(UNIX._replace(transport="zmq+ipc")) == ZMQ_FLOOR
    over_tcp = floor_of(UNIX._replace(transport="zmq+tcp"))
    assert over_tcp == ZMQ_FLOOR._replace(address="tcp")
    assert over_tcp.label() == "bare zeromq tcp 64B block same-core"
    kinds = {floor.kind for floor in floors_of([UNIX, stream])}
    assert kinds == {"bare", "copy", "line", "memcpy"}


def test_with_one_core_the_floor_of_adaptive_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare program that spins there waits for the other's time to end."""
    adaptive = UNIX._replace(wait="adaptive", placement="free")
    for cores, wait in ((0, 1), "spin"), ((3,), "block"):
        monkeypatch.setattr("ipc_bridge.harness.matrix.cores_allowed", lambda cores=cores: [*cores])
        assert floor_of(adaptive) == Floor("bare", "unix", 64, wait, "free")


def test_with_one_core_no_floor_needs_two(monkeypatch: pytest.MonkeyPatch) -> None:
    free = UNIX._replace(placement="free")
    cells = [free, free._replace(op="stream")]
    monkeypatch.setattr("ipc_bridge.harness.matrix.cores_allowed", lambda: [3])
    assert [floor.label() for floor in floors_of(cells)] == [
        "bare unix 64B block free",
        "copy 64B same-core",
        "memcpy 64B same-core",
    ]


def test_overhead_runs_on_the_cores_of_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two physical cores, where the second that is allowed is the first's other thread."""
    monkeypatch.setattr("ipc_bridge.harness.overhead.core_pair", lambda: (0, 2))
    cell = overhead.Cell("unix", "cpp", "cpp", "block", "cross-core")
    assert overhead.cores(cell) == (0, 2)
    assert overhead.cores(cell._replace(placement="same-core")) == (0, 0)


@pytest.mark.parametrize("transport", ["zmq+tcp", "grpc+tcp"])
def test_a_cell_over_tcp_is_set_against_its_mechanism_over_tcp(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def watched(words: list[str], core: int | None = None) -> str:
        seen.append(words)
        return programs.run(words, core)

    monkeypatch.setattr("ipc_bridge.harness.runner.run", watched)
    plan = Plan([], rounds=1, duration_s=1, warmup_s=0)
    floor = floor_of(UNIX._replace(transport=transport))
    assert floor
    runner = Runner(plan, lambda *_: None, lambda *_: None)
    runner._floor(floor, 1)
    assert runner.measured.failures == {}
    assert runner.measured.floors[floor][0]["p50_ns"] > 0
    assert "127.0.0.1:" in seen[0][2]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_transport_knows_its_bare_program(scheme: str) -> None:
    stem = traits(scheme).bare
    for source in (f"cpp/bare/{stem}.cpp", f"python/bare/{stem}.py"):
        assert (ROOT / source).exists(), source


def test_each_round_has_its_own_order_and_processes() -> None:
    pairings = [("py", "py"), ("cpp", "py")]
    cells = [
        UNIX._replace(transport=transport, client=client, server=server, size_bytes=size)
        for transport in ("unix", "pipe")
        for client, server in pairings
        for size in range(4)
    ]
    seen: list[list[tuple[Cell, int]]] = []

    class Watched(Runner):
        def _round(self, number: int) -> None:
            seen.append([])
            super()._round(number)

        def _cell(self, cell: Cell, number: int, server: Served, samples_path: str) -> None:
            seen[-1].append((cell, server.pid))

        def _floor(self, floor: Floor, number: int) -> None:
            pass

    plan = Plan(cells, rounds=3, duration_s=1, warmup_s=0)
    Watched(plan, lambda *_: None, lambda *_: None).run()
    orders = [[cell for cell, _ in found] for found in seen]
    assert [sorted(order) for order in orders] == [sorted(cells)] * 3
    assert orders[0] != orders[1] != orders[2] != orders[0]
    pids = [{pid for _, pid in found} for found in seen]
    assert [len(found) for found in pids] == [4, 4, 4], "one server for a transport and pairing"
    assert len(set.union(*pids)) == 12


def test_a_program_has_the_time_that_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it takes beside, which is 120 s, and here so long that the first would not do."""
    monkeypatch.setattr("ipc_bridge.harness.programs.RUN_S", 1.0)
    plan = Plan([UNIX], rounds=1, duration_s=0.7, warmup_s=0.4, with_floors=False)
    runner = Runner(plan, lambda *_: None, lambda *_: None)
    runner.run()
    assert runner.measured.failures == {}


# --- statistics ---


@given(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=300))
def test_quantiles_are_nearest_rank(values: list[int]) -> None:
    found = statistics.quantiles(np.array(values, dtype="<u8"))
    ordered = sorted(values)
    assert found["min"] == ordered[0]
    assert found["max"] == ordered[-1]
    for name, share in (("p50", 50), ("p90", 90), ("p99", 99)):
        enough = len(values) >= statistics.QUANTILES[name][1]
        rank = -(-len(values) * share // 100)
        assert found[name] == (ordered[rank - 1] if enough else None)
    assert found["p99_9"] is None


def test_a_quantile_needs_enough_samples() -> None:
    found = statistics.quantiles(np.arange(1, 1001, dtype="<u8"))
    assert (found["p99_9"], found["p99_99"]) == (999, None)
    assert statistics.quantiles(np.arange(999, dtype="<u8"))["p99_9"] is None


def test_a_figure_is_the_median_over_rounds_with_its_interval() -> None:
    assert statistics.figure([7.0]) == (7, 7, 7)
    value, low, high = statistics.figure([10, 11, 12, 13, 90])
    assert (value, low) == (12, 10)
    assert high == 90, "five rounds leave the outlier possible"
    value, low, high = statistics.figure([*range(100, 121), 900])
    assert value == pytest.approx(110.5)
    assert 100 < low < value < high < 120


def test_the_interval_holds_the_true_median_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        _, low, high = statistics.figure(random.lognormal(0, 0.2, 10).tolist())
        held += low <= 1.0 <= high
    assert held >= 180  # of 200; 95% would be 190


def test_ties_share_places() -> None:
    figures = {
        "a": Figure(1, 0.9, 1.1),
        "b": Figure(2, 1.9, 2.6),
        "c": Figure(2.5, 2.4, 2.6),
        "d": Figure(9, 8, 10),
    }
    assert statistics.ranks(figures) == {"a": (1, 1), "b": (2, 3), "c": (2, 3), "d": (4, 4)}
    assert statistics.ranks(figures, best_is_low=False)["d"] == (1, 1)
    assert statistics.differ(figures["a"], figures["b"])
    assert not statistics.differ(figures["b"], figures["c"])


# --- a run ---


def test_a_run_of_a_small_matrix(tmp_path: Path) -> None:
    """Two transports, one of which starts its server itself, mixed pairings, both operations."""
    words = ["--transport", "unix,stdio", "--pairing", "cpp-py,py-cpp", "--seed", "7"]
    found = bench(tmp_path, *words)

    assert len(found["cells"]) == 2 * 2 * 2
    assert (found["rounds"], found["failures"], found["skipped"]) == (2, {}, [])
    assert found["plan"]["seed"] == 7
    floors = {floor["id"]: floor for floor in found["floors"]}
    for cell in found["cells"]:
        assert [one["round"] for one in cell["rounds"]] == [1, 2]
        assert cell["floor"] in floors
        figures = cell["figures"]
        assert figures["overhead"]["value"] > 0
        for name in ("client_cpu_us_per_call", "server_cpu_us_per_call"):
            assert figures[name]["value"] > 0
        assert figures["server_memory_peak_bytes"]["value"] > 1 << 20
        for samples, one in zip(
            results.samples_of(tmp_path / "out", cell), cell["rounds"], strict=cell["op"] == "echo"
        ):
            assert len(samples) == one["operations"]
            assert statistics.quantiles(samples) == one["latency_ns"]
        for one in cell["rounds"]:
            expected = one["operations"] * cell["size_bytes"] / one["seconds"]
            assert one["bytes_per_second"] == pytest.approx(expected)


def test_the_table_and_what_to_do_next(tmp_path: Path) -> None:
    words = ["--transport", "unix,pipe", "--pairing", "cpp-cpp", "--op", "echo"]
    out = tmp_path / "out"
    done = run("bench", *TINY, *words, "-o", str(out))
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("unix", "pipe"):
        assert re.search(rf"^ *{name} +[\d.]+ \([12](-2)?\) +[\d.]+ *$", done.stdout, re.M)
    assert f"results: {out}/results.json\n" in done.stdout
    assert f"ipc-bridge report {out}\n" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_terminal_sees_progress_and_the_whole_table(tmp_path: Path) -> None:
    """Of the usual 80 columns."""
    words = ["--transport", "unix", "--op", "echo", *TINY, "--out", str(tmp_path / "out")]
    code, shown = run_on_terminal("bench", *words, columns=80)
    assert code == 0, shown
    assert re.search(r"% .*left +[-0-9:]+ round 1: ", shown), shown
    _, title, table = shown.partition("echo 64B block same-core: median latency in us")
    assert title
    assert len(re.findall(r"\d \(1\)", table)) == 4, table
    assert "\N{HORIZONTAL ELLIPSIS}" not in table


def test_paced_calls_and_items_and_several_clients(tmp_path: Path) -> None:
    words = ["--transport", "unix", "--pairing", "cpp-cpp", "--rate", "400", "--clients", "2"]
    words += ["--duration", "0.1", "--wait", "adaptive", "--placement", "free"]
    echo, stream = bench(tmp_path, *words)["cells"]
    for cell in (echo, stream):
        assert cell["figures"]["operations_per_second"]["value"] == pytest.approx(400, rel=0.2)
        assert cell["figures"]["latency_p50_ns"]["value"] > 0
    assert "age_p50_ns" in stream["figures"]
    assert "age_p50_ns" not in echo["figures"]
    assert "2 clients 400/s" in echo["id"]


def test_a_consumer_that_sleeps_shows_in_the_age_of_items(tmp_path: Path) -> None:
    words = ["--transport", "unix", "--pairing", "py-cpp", "--op", "stream", "--rate", "40"]
    words += ["--work", "0s,10ms", "--duration", "0.4", "--rounds", "1"]
    idle, busy = bench(tmp_path, *words)["cells"]
    added = busy["figures"]["age_p50_ns"]["value"] - busy["figures"]["latency_p50_ns"]["value"]
    assert 9.5e6 < added < 25e6
    assert idle["figures"]["age_p50_ns"]["value"] < 9.5e6


def test_a_server_that_stalls_shows_in_the_open_loop(tmp_path: Path) -> None:
    words = ["--transport", "unix", "--op", "echo", "--rate", "1000", "--pairing", "cpp-stalling"]
    words += ["--server", f"stalling={OWN_SERVER} --stall 0.05 --every 0.2"]
    words += ["--duration", "2.4", "--rounds", "1", "--placement", "free"]
    (cell,) = bench(tmp_path, *words)["cells"]
    assert cell["figures"]["latency_p99_9_ns"]["value"] >= 47e6
    (samples,) = results.samples_of(tmp_path / "out", cell)
    is_late = samples > 25e6
    assert np.count_nonzero(is_late[1:] & ~is_late[:-1]) >= 10, "fewer stalls than were asked for"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two that spin need a core each")
def test_a_server_that_takes_5_us_longer_is_reported_slower_by_5_us() -> None:
    """Both in one run, in turns: the difference of the medians of the quietest round of each, as
    others that use the machine make some rounds slower, and none quicker. (The loop itself takes
    0.2 us longer than it should.) Where two that spin never have a core each, there is nothing to
    judge: then a call takes seconds, or they are ended."""
    plain, busy = (
        Cell("shm", "cpp", server, "echo", 64, "spin", "cross-core") for server in ("plain", "busy")
    )
    command = shlex.split(OWN_SERVER)
    servers = {"plain": command, "busy": [*command, "--busy", "0.000005"]}
    medians = {plain: math.inf, busy: math.inf}
    give_up_s = time.monotonic() + 40
    for attempt in range(16):
        plan = Plan([plain, busy], 3, 0.1, 0.03, servers, seed=attempt, with_floors=False)
        runner = Runner(plan, lambda *_: None, lambda *_: None)
        runner.run()
        for cell, rounds in runner.measured.cells.items():
            enough = [one["latency_ns"]["p50"] for one in rounds if one["operations"] >= 1000]
            medians[cell] = min([medians[cell], *enough])
        is_right = 4e3 <= medians[busy] - medians[plain] <= 6e3
        if is_right or time.monotonic() > give_up_s:
            break
    if math.inf in medians.values():
        failures = runner.measured.failures
        assert all("has not ended" in why for why in failures.values()), failures
        pytest.skip(f"no two cores were free: {failures}")
    assert medians[busy] - medians[plain] == pytest.approx(5e3, abs=1e3), medians


def test_a_rate_that_is_not_kept_is_told() -> None:
    """Calls more than a second late are given up, and the percentiles know of the others alone."""
    plan = Plan([UNIX], rounds=1, duration_s=0.5, warmup_s=0)
    measured = Measured()
    for rate_hz, operations in ((1e4, 4950), (100.0, 48), (2e4, 9000), (1e6, 5000)):
        cell = UNIX._replace(rate_hz=rate_hz)
        measured.cells[cell] = [echo_round(1, 5e3) | {"operations": operations}]
    (found,) = overloads(plan, measured)
    assert found.startswith(
        "2 paced cells fell behind, unix cpp-cpp echo 64B block same-core 1e+06"
    )
    assert "1% of its rate" in found


def test_a_server_that_corrupts_answers_fails_the_run(tmp_path: Path) -> None:
    words = ["--transport", "unix", "--op", "echo", "--pairing", "cpp-bad,cpp-cpp"]
    words += ["--server", f"bad={OWN_SERVER} --corrupt 1000", "--duration", "0.5"]
    found = bench(tmp_path, *words, code=1)
    bad, good = sorted(found["cells"], key=lambda cell: str(cell["server"]))
    assert re.match(r"error: DATA_LOSS: \d+ answers differ from the pattern", bad["failure"])
    assert bad["rounds"] == []
    assert good["failure"] is None
    assert len(good["rounds"]) == 2
    assert list(found["failures"]) == [bad["id"]]


@pytest.mark.parametrize("command", ["false", "/no/such", str(ROOT)])
def test_a_server_that_does_not_start_fails_its_cells_alone(command: str, tmp_path: Path) -> None:
    words = ["--transport", "unix", "--op", "echo", "--pairing", "cpp-gone,cpp-cpp"]
    found = bench(tmp_path, *words, "--server", f"gone={command}", code=1)
    assert [bool(cell["failure"]) for cell in found["cells"]] == [True, False]
    assert command in found["cells"][0]["failure"]


@pytest.mark.parametrize(("scheme", "wait"), [("unix", "adaptive"), ("zmq+tcp", "block")])
def test_a_server_that_runs_already(scheme: str, wait: str, tmp_path: Path) -> None:
    with temporary_directory() as temporary:
        where = "127.0.0.1:0" if scheme == "zmq+tcp" else f"{temporary}/s"
        with served(f"{scheme}://{where}", "cpp") as running:
            found = bench(tmp_path, "--connect", running.url, "--op", "echo")
    assert [cell["id"] for cell in found["cells"]] == [
        f"{scheme} {client}-elsewhere echo 64B {wait} free" for client in ("cpp", "py")
    ]
    assert all(len(cell["rounds"]) == 2 for cell in found["cells"])
    assert all(cell["rounds"][0]["server"] is None for cell in found["cells"])
    assert not [text for text in found["warnings"] if text.startswith("other programs")]


@pytest.mark.parametrize(
    ("url", "is_skipped"),
    [
        ("tcp://192.0.2.1:5000", True),
        ("zmq+tcp://other.example:5000", True),
        ("grpc+tcp://[2001:db8::1]:5000", True),
        ("stdio:?wait=block /usr/bin/ssh other serve", True),
        ("tcp://127.0.0.9:5000", False),
        ("tcp://[::1]:5000", False),
        ("tcp://localhost:5000", False),
        ("unix:///tmp/s", False),
        ("stdio:serve", False),
    ],
)
def test_clocks_of_two_hosts_are_not_subtracted(url: str, is_skipped: bool) -> None:
    """Of a paced item one reads the other's; of a call both times are the client's own."""
    stream = UNIX._replace(
        transport=url.partition(":")[0], server="elsewhere", op="stream", rate_hz=9
    )
    for cell in (stream, stream._replace(op="echo"), stream._replace(rate_hz=0)):
        _, skipped = choose([cell], {"elsewhere": [url]}, url)
        assert [*skipped] == ([cell] if is_skipped and cell == stream else [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupt_keeps_what_was_measured(number: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--transport", "unix,stdio", "--pairing", "py-py", "--op", "echo", "--rounds", "1000"]
    with (
        temporary_directory() as temporary,
        start("bench", *words, "-o", str(out), temporary=temporary) as process,
    ):
        try:
            deadline = time.monotonic() + 60
            while not (out / "samples.npz").exists() or (out / "samples.npz").stat().st_size < 1:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            time.sleep(0.5)  # anywhere in a round
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, errors) == (Exit.INTERRUPTED, "")
    found = results.load(out)
    assert found["interrupted"]
    assert found["rounds"] < 1000
    measured = [cell for cell in found["cells"] if cell["rounds"]]
    assert measured
    for cell in measured:
        assert len(results.samples_of(out, cell)) == len(cell["rounds"])


def test_a_round_is_written_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so outlives whatever ends the run, by force too."""

    class OneRound(Runner):
        def run(self) -> None:
            self.measured.cells[UNIX].append(echo_round(1, 5e3))
            self.measured.rounds = 1
            self._round_done()
            raise SystemExit

    monkeypatch.setattr("ipc_bridge.harness.bench.Runner", OneRound)
    plan = Plan([UNIX], rounds=9, duration_s=1, warmup_s=0)
    with pytest.raises(SystemExit):
        measure(plan, {}, tmp_path, "quick", Console())
    found = results.load(tmp_path)
    assert (found["rounds"], found["interrupted"]) == (1, True)
    (tmp_path / "samples.npz").write_bytes(b"PK\3\4, of which the end was not written")
    assert results.samples_of(tmp_path, found["cells"][0]) == []


def test_the_results_of_another_run_stay(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("precious")
    done = call("bench", "--transport", "unix", "--pairing", "py-py", "-o", str(tmp_path))
    assert done.returncode == Exit.ALREADY_EXISTS
    assert done.stderr.startswith("error: ALREADY_EXISTS: there are results of another run, ")
    assert os.listdir(tmp_path) == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "precious"


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = call("bench", "--transport", "unix", "--pairing", "py-py", "-o", f"{tmp_path}/file")
    assert re.fullmatch(rf"error: [A-Z_]+: mkdir[^\n]*, {tmp_path}/file\n", done.stderr)


@pytest.mark.parametrize(
    ("url", "wait"),
    [
        ("unix:///s?wait=spin", "spin"),
        ("unix:///s", "adaptive"),
        ("zmq+ipc:///s", "block"),
        ("stdio:?wait=spin peer serve stdio:?wait=block", "spin"),
        ("stdio:peer serve stdio:?wait=block", "adaptive"),
    ],
)
def test_a_url_says_how_its_cells_wait(url: str, wait: str) -> None:
    """The query of stdio stands before the command, whose words are not its own."""
    assert chosen_axes({}, {"elsewhere": [url]}, url)["wait"] == [wait]


def test_samples_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    """Without a traceback, whose exit code would say that a cell has failed."""
    (tmp_path / "samples.npz").symlink_to("/dev/full")
    words = ["--transport", "unix", "--pairing", "cpp-cpp", "--op", "echo", *TINY]
    done = run("bench", *words, "--out", str(tmp_path))
    assert done.returncode == Exit.RESOURCE_EXHAUSTED
    what = "error: RESOURCE_EXHAUSTED: write: No space left on device"
    assert done.stderr == f"{what}, {tmp_path}/samples.npz\n"


def test_a_reader_may_leave_early() -> None:
    """As `| head -1` does."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "ipc_bridge.harness.cli", "bench", "--profile", "full", "--list"]
    with os.fdopen(writer) as out:
        done = subprocess.run(words, stdout=out, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_budget_ends_the_run_between_rounds(tmp_path: Path) -> None:
    words = ["--transport", "unix", "--pairing", "cpp-cpp", "--op", "echo", "--rounds", "1000"]
    found = bench(tmp_path, *words, "--budget", "2s")
    assert 1 <= found["rounds"] < 1000
    assert not found["interrupted"]
    assert {len(cell["rounds"]) for cell in found["cells"]} == {found["rounds"]}


def test_the_rounds_that_a_budget_allows_are_known_after_the_first() -> None:
    class Slow(Runner):
        def _round(self, number: int) -> None:
            time.sleep(0.05)

    expected: list[int] = []
    plan = Plan([UNIX], rounds=1000, duration_s=1, warmup_s=0, budget_s=0.4)
    runner = Slow(plan, lambda *_: None, lambda *_: None, lambda: expected.append(runner.rounds))
    runner.run()
    assert expected[0] == 1000
    assert all(rounds <= 8 for rounds in expected[1:])
    assert runner.rounds == runner.measured.rounds == len(expected)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--transport udp", f"'udp' is unknown; known are {', '.join(SCHEMES)}"),
        ("--pairing cpp-rust", "'cpp-rust' is unknown; known are cpp-cpp, cpp-py, py-cpp, py-py"),
        ("--size 64,9k", "'9k' is not a size"),
        ("--rounds 0", "'0' is not within 1 to 1000"),
        ("--rounds many", "'many' is not a whole number"),
        ("--budget soon", "'soon' is not a time, as 0.5, 90s or 5m"),
        ("--server mine", "'mine' is not NAME=COMMAND"),
        ("--connect nowhere", f"unknown scheme; known are {', '.join(SCHEMES)}"),
        (
            "--connect unix:///s --pairing cpp-cpp",
            "'cpp-cpp' is unknown; known are cpp-elsewhere, py-elsewhere",
        ),
        ("--connect unix:///s?wait=long", "wait is block, spin or adaptive, --connect"),
        ("--connect unix:///s --wait spin", "this option goes without --connect, --wait"),
        ("--connect unix:///s --placement free", "goes without --connect, --placement"),
        ("--connect unix:///s --transport tcp", "goes without --connect, --transport"),
        ("--connect unix:///s --server a=b", "this option goes without --connect, --server"),
        ("--wait spin --placement same-core", "no cell to measure: two that spin"),
        ("--profile best", "'best' is not one of"),
        ("--loud", "No such option"),
    ],
)
def test_a_wrong_word_is_named(words: str, error: str) -> None:
    done = call("bench", *words.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: INVALID_ARGUMENT: [^\n]*\n", done.stderr)
    assert error in done.stderr


# --- the document, and the environment ---


def test_a_document_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(Error, match="NOT_FOUND: no results"):
        results.load(tmp_path)
    path.write_text("{")
    with pytest.raises(Error, match="INVALID_ARGUMENT: no JSON"):
        results.load(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(Error, match="INVALID_ARGUMENT: no JSON"):
        results.load(tmp_path)
    path.write_text('{"format": 1}')
    with pytest.raises(Error, match="INVALID_ARGUMENT: not the results of a run"):
        results.load(tmp_path)
    path.write_text('{"format": 2}')
    what = "INVALID_ARGUMENT: results of another version: format 2, and this one reads 1"
    with pytest.raises(Error, match=what):
        results.load(tmp_path)


def test_the_environment_names_what_makes_figures_doubtful() -> None:
    machine = environment.machine()
    quiet = {"virtual": False, "governor": "performance", "quota_cores": None, "cores": 2}
    machine |= quiet | {"cores_allowed": 2}
    noise = {
        "throttled_s": 0.0,
        "steal_share": 0.0,
        "others_share": 0.0,
        "load_before": 0.0,
    }
    assert environment.warnings(machine, noise, 0.02) == []
    doubts = [
        (machine | {"virtual": True}, noise, 0.0, "virtual machine"),
        (machine | {"cores_allowed": 1}, noise, 0.0, "one core only"),
        (machine | {"governor": "powersave"}, noise, 0.0, "powersave"),
        (machine | {"quota_cores": 1.5}, noise, 0.0, "1.5 cores"),
        (machine, noise | {"throttled_s": 0.5}, 0.0, "0.50 s"),
        (machine, noise | {"steal_share": 0.02}, 0.0, "2.0% of the time (steal)"),
        (machine, noise | {"others_share": 0.3}, 0.0, "30% of the machine"),
        (machine, noise | {"load_before": 3.0}, 0.0, "load average was 3.0"),
        (machine, noise, 0.3, "30% from their median"),
    ]
    for of_machine, of_noise, spread, text in doubts:
        (found,) = environment.warnings(of_machine, of_noise, spread)
        assert text in found
    busy = noise | {"others_share": 0.3}
    assert environment.warnings(machine, busy, 0.0, server_is_ours=False) == []


def test_a_thread_that_has_ended_takes_nothing_away() -> None:
    """What it did is lost to proc(5), and is not subtracted from what the others did."""
    before = load.ServerUsage(1.0, {"1": load.Switches(5, 1), "2": load.Switches(900, 30)}, 1 << 20)
    after = load.ServerUsage(3.0, {"1": load.Switches(7, 1), "3": load.Switches(4, 2)}, 2 << 20)
    used = after.since(before)
    assert (used.cpu_s, used.all(), used.memory_peak_bytes) == (2.0, (6, 2), 2 << 20)


@pytest.mark.parametrize(
    ("words", "told"),
    [((), "nice 0"), (("nice", "-n", "3"), "nice 3"), (("chrt", "-f", "1"), "fifo 1")],
)
def test_the_priority_of_a_run_is_told(words: tuple[str, ...], told: str) -> None:
    """A run at another priority than the last is no run of the same machine."""
    if "chrt" in words and os.geteuid() != 0:
        pytest.skip("a real-time priority is root's to give")
    code = "from ipc_bridge.harness.environment import priority; print(priority())"
    was = os.getpriority(os.PRIO_PROCESS, 0)
    done = subprocess.run(
        [*words, sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    kind, number = told.split()
    assert done.stdout.strip() == (f"nice {int(number) + was}" if kind == "nice" else told)


def test_the_use_of_the_machine_is_told_apart() -> None:
    before = environment.Clock.now()
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    after = environment.Clock.now()
    assert after.own_s - before.own_s >= 0.19
    found = environment.noise(before, after)
    assert found["seconds"] >= 0.19
    assert 0 <= found["others_share"] <= 1
