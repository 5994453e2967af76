"""`ipc-bridge sweep`: the search finds the edge, and the command runs."""

import json

import pytest

from harness_support import run
from ipc_bridge.harness import sweep
from ipc_bridge.harness.sweep import Probe


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


def test_the_command() -> None:
    words = ["--transport", "unix", "--p99", "1us", "--rounds", "1", "--duration", "0.05"]
    done = run("sweep", *words, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    (cell,) = json.loads(done.stdout)["cells"]
    assert cell["id"] == "unix cpp-cpp echo 64B block free"
    assert cell["rate_hz"] is None, "no call takes less than 1 us"
    assert len(cell["tried"]) >= 2
    assert all(one["p99_ns"] > 1000 for one in cell["tried"])
