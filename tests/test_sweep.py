"""`ipc-bridge sweep`: the search finds the edge, and the command runs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from harness_support import call, run, run_on_terminal
from ipc_bridge.errors import Error, Status
from ipc_bridge.harness import sweep
from ipc_bridge.harness.matrix import Cell
from ipc_bridge.harness.runner import Runner
from ipc_bridge.harness.sweep import Probe
from support import Exit

UNIX = Cell("unix", "cpp", "cpp", "echo", 64, "block", "free")


@pytest.mark.parametrize("edge_hz", [100.0, 399.0, 401.0, 7777.0, 1e5])
def test_the_edge_is_found(edge_hz: float) -> None:
    def measure(rate_hz: float) -> Probe:
        return Probe(rate_hz, 1e6 if rate_hz <= edge_hz else 1e9, True)

    best, tried = sweep.highest(2e6, measure)
    assert best
    assert edge_hz * (1 - 2 * sweep.PRECISION) <= best.rate_hz <= edge_hz
    assert len(tried) < 30


def test_a_server_that_does_not_keep_up_does_not_hold() -> None:
    best, tried = sweep.highest(1e9, lambda rate_hz: Probe(rate_hz, 1.0, rate_hz < 1000))
    assert best
    assert 800 < best.rate_hz < 1000
    assert all(one.rate_hz < 2001 for one in tried)


def test_a_bound_that_no_rate_keeps_ends_soon() -> None:
    best, tried = sweep.highest(1.0, lambda rate_hz: Probe(rate_hz, 2.0, True))
    assert best is None
    assert [one.rate_hz for one in tried] == [400, 200, 100]


def test_no_edge_ends_too() -> None:
    best, tried = sweep.highest(1e9, lambda rate_hz: Probe(rate_hz, 1.0, True))
    assert best == tried[-1]
    assert best.rate_hz <= sweep.RATE_MAX_HZ


def test_calls_that_never_ended_are_the_latest() -> None:
    samples = np.arange(1, 109, dtype="<u8")
    assert sweep.p99_of(samples, 108) == 107
    assert sweep.p99_of(samples, 109) == 108
    assert sweep.p99_of(samples, 110) == float("inf")
    assert not Probe(1.0, None, True).holds(1e18)


def test_each_round_has_calls_enough_for_a_p99(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched(Runner):
        def run(self) -> None:
            due = int(self._plan.duration_s * self._plan.cells[0].rate_hz)
            assert due >= 109
            self._keep(self._plan.cells[0], 1, np.full(due, 5, dtype="<u8"))

    monkeypatch.setattr(sweep, "Runner", Watched)
    for rate_hz in (100.0, 162.5, 175.0, 400.0):
        assert sweep.probe(UNIX, 1, 0.05, rate_hz) == Probe(rate_hz, 5, True)


@pytest.mark.parametrize("ends", ["failed", "interrupted"])
def test_what_was_found_is_kept(ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is printed is JSON, also where a rate has no p99."""

    def probe(cell: Cell, rounds: int, duration_s: float, rate_hz: float) -> Probe:
        if cell.transport == "tcp":
            raise Error(Status.ABORTED, "it died") if ends == "failed" else KeyboardInterrupt
        return Probe(rate_hz, 1e6, True) if rate_hz < 500 else Probe(rate_hz, None, False)

    monkeypatch.setattr(sweep, "probe", probe)
    out = tmp_path / "found.json"
    done = call("sweep", "--transport", "unix,tcp,shm", "--p99", "2ms", "--json", "-o", str(out))
    assert done.returncode == (1 if ends == "failed" else Exit.INTERRUPTED)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    cells = json.loads(done.stdout, parse_constant=refuse)["cells"]
    found = {cell["id"].split()[0]: (bool(cell["rate_hz"]), cell["failure"]) for cell in cells}
    whole = {"unix": (True, None), "tcp": (False, "it died"), "shm": (True, None)}
    assert found == (whole if ends == "failed" else {"unix": (True, None)})
    assert json.loads(out.read_text())["cells"] == cells


def test_a_file_that_cannot_be_written_is_told_at_once() -> None:
    done = call("sweep", "--transport", "unix", "--duration", "3600", "-o", "/no/dir/x")
    assert (done.returncode, done.stdout) == (Exit.NOT_FOUND, "")
    assert re.fullmatch(r"error: NOT_FOUND: open[^\n]*, /no/dir/x\n", done.stderr)


def test_the_command() -> None:
    words = ["--transport", "unix", "--p99", "1us", "--rounds", "1", "--duration", "0.05"]
    done = run("sweep", *words, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (cell,) = json.loads(done.stdout)["cells"]
    assert cell["id"] == "unix cpp-cpp echo 64B block free"
    assert cell["rate_hz"] is None, "no call takes less than 1 us"
    assert len(cell["tried"]) >= 2
    assert all(one["p99_ns"] > 1000 for one in cell["tried"])


def test_a_terminal_sees_progress_and_the_table() -> None:
    words = ["--transport", "unix", "--p99", "1us", "--rounds", "1", "--duration", "0.05"]
    code, shown = run_on_terminal("sweep", *words, columns=80)
    assert code == 0, shown
    assert "unix cpp-cpp echo 64B block free: 400/s" in shown
    assert re.search(r"unix +cpp-cpp +1 +under 100 ", shown)
