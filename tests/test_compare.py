"""`ipc-bridge compare`: few false alarms, few misses, on runs that are made with the noise of real
ones: drift that hits a cell and its floor, rounds that are off, and a machine of another speed.
"""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness_support import MACHINE, echo_round, made, run, stream_round
from ipc_bridge.harness import results, statistics
from ipc_bridge.harness.compare import LIMITS, judge, verdict_of
from ipc_bridge.harness.matrix import Cell, floor_of
from ipc_bridge.harness.results import Document
from ipc_bridge.harness.statistics import Figure

PAIRS = 40
ROUNDS = 10
TRANSPORTS = ("pipe", "stdio", "unix", "tcp")
PAIRINGS = (("py", "py"),)
SLOWED = "tcp py-py echo 64B block same-core"


class Noise:
    """How rounds differ, as shares of a time."""

    def __init__(self, of_cell: float, off_rounds: float) -> None:
        self.of_cell = of_cell
        self.off_rounds = off_rounds  # as a share of all


STEADY = Noise(0.01, 0.0)
QUIET = Noise(0.03, 0.03)
LOADED = Noise(0.08, 0.25)  # another process on one of the two cores


def made_run(random: np.random.Generator, noise: Noise, slowdown: float = 0.0) -> Document:
    """A run whose machine is up to 20% slower or quicker, and drifts while it is on."""
    speed = random.uniform(0.8, 1.2)
    drift = speed * np.exp(random.normal(0, 0.05) * np.linspace(-1, 1, ROUNDS))

    def times(typical: float) -> Any:
        off = np.where(random.random(ROUNDS) < noise.off_rounds, random.uniform(1, 2, ROUNDS), 1)
        return typical * drift * off * np.exp(random.normal(0, noise.of_cell, ROUNDS))

    cells, floors = {}, {}
    for place, transport in enumerate(TRANSPORTS):
        for client, server in PAIRINGS:
            cell = Cell(transport, client, server, "echo", 64, "block", "same-core")
            typical = (8e3 + 3e3 * place) * (3 if client == "py" else 1)
            typical *= 1 + slowdown if cell.label() == SLOWED else 1
            cells[cell] = [echo_round(n + 1, one) for n, one in enumerate(times(typical))]
            stream = Cell(transport, client, server, "stream", 65536, "block", "cross-core")
            cells[stream] = [stream_round(n + 1, 1e14 / one) for n, one in enumerate(times(5e4))]
            for one in (cell, stream):
                floor = floor_of(one)
                assert floor
                name = "p50_ns" if floor.kind == "bare" else "bytes_per_second"
                floors[floor] = [
                    {"round": n + 1, name: 6e3 * t / 6e3 if name == "p50_ns" else 1e14 / t}
                    for n, t in enumerate(times(6e3))
                ]
    return made(cells, floors, validate=False)  # done once, by the tests of the command


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare looks at the rounds alone, and hundreds of runs are made."""
    monkeypatch.setattr(results, "figure", lambda rounds: Figure(0.0, 0.0, 0.0))


# --- calibration ---


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("noise", [QUIET, LOADED], ids=["quiet", "loaded"])
def test_runs_of_the_same_thing_raise_no_alarm(noise: Noise) -> None:
    random = np.random.default_rng(3)
    alarms = 0
    for _ in range(PAIRS):
        found = judge(made_run(random, noise), made_run(random, noise), LIMITS)
        alarms += verdict_of(found) in ("regressed", "failed")
    assert alarms <= 2


@pytest.mark.usefixtures("no_figures")
def test_a_cell_that_is_a_fifth_slower_is_found() -> None:
    random = np.random.default_rng(4)
    missed = alarms = 0
    for _ in range(PAIRS):
        found = judge(made_run(random, QUIET), made_run(random, QUIET, 0.2), LIMITS)
        (one,) = (one for one in found if one.cell == SLOWED)
        missed += one.verdict != "regressed"
        alarms += any(one.verdict == "regressed" for one in found if one.cell != SLOWED)
    assert (missed <= 1, alarms <= 2) == (True, True), (missed, alarms)


@pytest.mark.usefixtures("no_figures")
def test_it_is_not_passed_on_a_loaded_machine_either() -> None:
    random = np.random.default_rng(5)
    verdicts = []
    for _ in range(PAIRS):
        found = judge(made_run(random, LOADED), made_run(random, LOADED, 0.2), LIMITS)
        verdicts += [one.verdict for one in found if one.cell == SLOWED]
    assert verdicts.count("passed") + verdicts.count("improved") <= 1


@pytest.mark.usefixtures("no_figures")
def test_too_few_rounds_are_inconclusive() -> None:
    random = np.random.default_rng(6)
    old, new = made_run(random, STEADY), made_run(random, STEADY, 0.5)
    for document in (old, new):
        for cell in document["cells"]:
            del cell["rounds"][4:]
    found = judge(old, new, LIMITS)
    assert verdict_of(found) == "inconclusive"
    assert {one.reason for one in found} == {"4 rounds"}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_is_between_the_p_value_and_bonferroni(values: list[float]) -> None:
    found = statistics.holm(values)
    for p_value, corrected in zip(values, found, strict=True):
        assert p_value <= corrected <= min(1, p_value * len(values))
    assert min(found) == pytest.approx(min(1, min(values) * len(values)))


def test_holm_by_hand() -> None:
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_a_shift_is_found_with_its_interval() -> None:
    random = np.random.default_rng(7)
    old = random.normal(1, 0.02, 30)
    new = random.normal(1, 0.02, 30) + np.log(1.1)
    value, low, high = statistics.shift(old.tolist(), new.tolist())
    assert 0.08 < low < value < high < 0.12
    assert low < 0.1 < high


# --- the command ---


def saved(directory: Path, document: Document) -> Path:
    directory.mkdir()
    results.save(directory, document)
    return directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Results on disk, by what is the matter with them."""
    base, random = tmp_path_factory.mktemp("runs"), np.random.default_rng(8)
    documents = {
        "old": made_run(random, STEADY),
        "same": made_run(random, STEADY),
        "slower": made_run(random, STEADY, 0.3),
        "quicker": made_run(random, STEADY, -0.3),
        "noisy": made_run(random, Noise(0.5, 0.5)),
        "broken": made_run(random, STEADY),
        "elsewhere": made_run(random, STEADY) | {"machine": MACHINE | {"cpu": "Another CPU"}},
    }
    broken = documents["broken"]["cells"][0]
    broken["failure"], broken["rounds"] = "error: DATA_LOSS: 3 answers differ", []
    return {name: str(saved(base / name, one)) for name, one in documents.items()}


@pytest.mark.parametrize(
    ("new", "code", "verdict"),
    [
        ("same", 0, "passed"),
        ("quicker", 0, "passed"),
        ("slower", 1, "regressed"),
        ("noisy", 3, "inconclusive"),
        ("broken", 4, "failed"),
    ],
)
def test_each_verdict_has_its_exit_code(
    new: str, code: int, verdict: str, runs: dict[str, str], tmp_path: Path
) -> None:
    junit = tmp_path / "junit.xml"
    done = run("compare", runs["old"], runs[new], "--json", "--junit", str(junit))
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    assert found["verdict"] == verdict
    suite = ElementTree.parse(junit).getroot()
    assert int(suite.attrib["tests"]) == len(found["cells"]) == len(suite)
    counts = {"regressed": "failures", "failed": "errors", "inconclusive": "skipped"}
    for name, attribute in counts.items():
        expected = sum(cell["verdict"] == name for cell in found["cells"])
        assert int(suite.attrib[attribute]) == expected
    if new == "slower":
        (cell,) = (cell for cell in found["cells"] if cell["verdict"] == "regressed")
        assert cell["cell"] == SLOWED
        assert 0.25 < cell["change"]["low"] < cell["change"]["high"] < 0.35


def test_the_table_names_the_worst_first(runs: dict[str, str]) -> None:
    done = run("compare", runs["old"], runs["slower"], "--max-regression", "p50=10%")
    lines = [line.split() for line in done.stdout.splitlines() if line.strip()]
    assert lines[2][:3] == ["regressed", "tcp", "py-py"]
    assert lines[-1] == ["verdict:", "regressed"]
    assert done.returncode == 1
    done = run("compare", runs["old"], runs["slower"], "--max-regression", "p50=60%")
    assert done.returncode == 0


def test_unlike_machines_are_refused_unless_asked(runs: dict[str, str]) -> None:
    done = run("compare", runs["old"], runs["elsewhere"])
    assert (done.returncode, done.stdout) == (19, "")
    assert "unlike machines" in done.stderr
    assert "cpu A CPU and Another CPU" in done.stderr
    assert run("compare", runs["old"], runs["elsewhere"], "--unlike-machines").returncode == 0


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        ("{old} nowhere", 15, "NOT_FOUND: no results"),
        ("{old} {same} --max-regression p50", 2, "'p50' is not METRIC=5%"),
        ("{old} {same} --max-regression p50=5", 2, "has no percentage"),
        ("{old} {same} --budget 5m", 2, "this option goes without NEW, --budget"),
        ("", 2, "Missing argument 'OLD'"),
    ],
)
def test_what_cannot_be_compared(words: str, code: int, error: str, runs: dict[str, str]) -> None:
    done = run("compare", *words.format(**runs).split())
    assert (done.returncode, done.stdout) == (code, "")
    assert error in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
