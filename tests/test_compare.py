"""`ipc-bridge compare`: verdicts, exit codes, what it refuses."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compare_support import QUIET, SLOWED, STEADY, Noise, made_run
from harness_support import MACHINE, call, run
from ipc_bridge.errors import Error
from ipc_bridge.harness import compare, environment, results, statistics
from ipc_bridge.harness.compare import LIMITS, judge, verdict_of
from ipc_bridge.harness.results import Document
from ipc_bridge.harness.statistics import Figure


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare looks at the rounds alone, and hundreds of runs are made."""
    monkeypatch.setattr(results, "figure", lambda rounds: Figure(0.0, 0.0, 0.0))


# --- judging ---


@pytest.mark.usefixtures("no_figures")
def test_a_cell_that_is_a_fifth_slower_is_found_and_no_other() -> None:
    """One pair of each; `make calibrate` counts alarms and misses over many."""
    random = np.random.default_rng(3)
    old = made_run(random, QUIET)
    assert verdict_of(judge(old, made_run(random, QUIET), LIMITS)) in ("passed", "inconclusive")
    found = judge(old, made_run(random, QUIET, 0.2), LIMITS)
    assert [one.cell for one in found if one.verdict == "regressed"] == [SLOWED]


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


def without(document: Document, metric: str, rounds: int) -> Document:
    """As if SLOWED had too few calls for a percentile in its last rounds."""
    found = copy.deepcopy(document)
    (cell,) = (cell for cell in found["cells"] if cell["id"] == SLOWED)
    for one in cell["rounds"][-rounds:]:
        one["latency_ns"][metric] = None
    return found


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("rounds", [1, 10])
def test_a_cell_too_slow_for_its_percentile_does_not_pass(rounds: int) -> None:
    """A hundred calls make a p99; one that is a hundred times slower has none."""
    random = np.random.default_rng(9)
    old, new = made_run(random, STEADY), made_run(random, STEADY)
    lacking = without(new, "p99", rounds)
    for before, after, reason in (
        (old, lacking, f"the new run has no p99 in {rounds} of 10 rounds"),
        (lacking, new, f"the old run has no p99 in {rounds} of 10 rounds"),
    ):
        found = judge(before, after, {"p99": 0.05})
        assert verdict_of(found) == "inconclusive"
        (one,) = (one for one in found if one.verdict == "inconclusive")
        assert (one.cell, one.metric, one.reason) == (SLOWED, "p99", reason)
    (one,) = (one for one in judge(lacking, lacking, {"p99": 0.05}) if one.cell == SLOWED)
    assert one.reason.count(" run has no p99") == 2


@pytest.mark.usefixtures("no_figures")
def test_a_run_that_lacks_a_percentile_throughout_has_its_cells_still() -> None:
    old = made_run(np.random.default_rng(10), STEADY)
    new = copy.deepcopy(old)
    for cell in new["cells"]:
        for one in cell["rounds"]:
            one["latency_ns"] = one["latency_ns"] and one["latency_ns"] | {"p99": None}
    found = judge(old, new, {"p99": 0.05})
    assert {one.verdict for one in found} == {"inconclusive"}
    assert {one.cell.split()[2] for one in found} == {"echo"}, "a stream has no latency"
    new["cells"] = old["cells"] = [cell for cell in old["cells"] if cell["op"] == "stream"]
    with pytest.raises(Error, match="no cell to judge by p99"):
        judge(old, new, {"p99": 0.05})


@pytest.mark.usefixtures("no_figures")
def test_a_floor_that_only_one_run_has_is_no_base() -> None:
    """Else a ratio is compared with nanoseconds: -99.98%, improved."""
    random = np.random.default_rng(11)
    old, new = made_run(random, STEADY), made_run(random, STEADY)
    for one in (old, new):
        one["cells"] = [cell for cell in one["cells"] if cell["id"] == SLOWED]
    new["cells"][0]["floor"] = None
    for before, after in ((old, new), (new, old)):
        found = {one.metric: one for one in judge(before, after, {"p50": 0.05, "cpu": 5.0})}
        assert found["p50"].verdict == "inconclusive"
        assert "bare tcp 64B block same-core" in found["p50"].reason
        assert "none" in found["p50"].reason
        assert found["cpu"].change, "it is compared as it is"


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
    command = run if new == "slower" else call  # once as a program, whose exit code it is
    done = command("compare", runs["old"], runs[new], "--json", "--junit", str(junit))
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


@pytest.mark.parametrize("words", [[], ["--json"]], ids=["table", "json"])
@pytest.mark.parametrize(("new", "code"), [("same", 0), ("noisy", 3)])
def test_the_verdict_stays_when_its_reader_leaves(
    new: str, code: int, words: list[str], runs: dict[str, str]
) -> None:
    """1 would be an alarm."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ipc_bridge.harness.cli", "compare", runs["old"], runs[new]]
    with os.fdopen(writer) as out:
        done = subprocess.run([*command, *words], stdout=out, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (code, b"")


def test_a_fault_of_its_own_is_no_verdict(runs: dict[str, str]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "ipc_bridge.harness.cli", "compare"]
        words = [runs["old"], runs["same"]]
        done = subprocess.run([*command, *words], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 18
    assert done.stderr == b"error: RESOURCE_EXHAUSTED: write: No space left on device, stdout\n"
    fault = "from ipc_bridge.harness import programs; exit(programs.main(lambda _: {}['none']))"
    done = subprocess.run([sys.executable, "-c", fault], stderr=subprocess.PIPE, check=False)
    assert done.returncode == 23
    assert done.stderr.endswith(b"KeyError: 'none'\n")


def test_junit_of_whatever_a_program_said_is_xml(runs: dict[str, str], tmp_path: Path) -> None:
    document = results.load(Path(runs["broken"]))
    document["cells"][0]["failure"] = "\x1b[31merror\x1b[0m: \x00\ufffe\nmore"
    junit = tmp_path / "junit.xml"
    new = str(saved(tmp_path / "coloured", document))
    assert call("compare", runs["old"], new, "--junit", str(junit)).returncode == 4
    errors = ElementTree.parse(junit).getroot().iter("error")
    assert [one.attrib["message"] for one in errors] == ["?[31merror?[0m: ??\nmore"]


def test_the_table_names_the_worst_first(runs: dict[str, str]) -> None:
    done = call("compare", runs["old"], runs["slower"], "--max-regression", "p50=10%")
    lines = [line.split() for line in done.stdout.splitlines() if line.strip()]
    assert lines[2][:3] == ["regressed", "tcp", "py-py"]
    assert lines[-1] == ["verdict:", "regressed"]
    assert done.returncode == 1
    done = call("compare", runs["old"], runs["slower"], "--max-regression", "p50=60%")
    assert done.returncode == 0


def test_what_has_no_change_says_why(runs: dict[str, str]) -> None:
    """As long as it is, and the table keeps its width."""
    done = call("compare", runs["old"], runs["broken"], "--max-regression", "p99.9=5%")
    *_, counts, verdict = done.stdout.splitlines()
    assert "failed: pipe py-py echo 64B block same-core: error: DATA_LOSS: 3 answers" in done.stdout
    assert (counts.startswith("1 failed, "), verdict) == (True, "verdict: failed")
    lacking = Path(runs["old"]).with_name("lacking")
    document = without(results.load(Path(runs["old"])), "p99_9", 3)
    done = call(
        "compare", str(saved(lacking, document)), runs["old"], "--max-regression", "p99.9=9%"
    )
    line = f"inconclusive: {SLOWED} p99_9: the old run has no p99_9 in 3 of 10 rounds\n"
    assert line in done.stdout


def test_unlike_machines_are_refused_unless_asked(runs: dict[str, str]) -> None:
    done = call("compare", runs["old"], runs["elsewhere"])
    assert (done.returncode, done.stdout) == (19, "")
    assert "unlike machines" in done.stderr
    assert "cpu A CPU and Another CPU" in done.stderr
    assert call("compare", runs["old"], runs["elsewhere"], "--unlike-machines").returncode == 0


def test_an_unlike_machine_is_refused_before_it_is_measured(
    runs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "machine", lambda: MACHINE | {"cpu": "Another CPU"})
    monkeypatch.setattr(compare, "measure_again", lambda *_, **__: pytest.fail("it is measured"))
    done = call("compare", runs["old"])
    assert (done.returncode, done.stdout) == (19, "")
    assert "cpu A CPU and Another CPU" in done.stderr


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
    done = call("compare", *words.format(**runs).split())
    assert (done.returncode, done.stdout) == (code, "")
    assert error in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
