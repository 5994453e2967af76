"""How often `ipc-bridge compare` is wrong: false alarms and misses over many pairs of made runs.

    make calibrate

Not among the tests that run each time: hundreds of runs are made, and only a change of the
statistics can change the outcome (the noise is made too, from a fixed seed).
"""

import numpy as np
import pytest

from compare_support import LOADED, QUIET, SLOWED, Noise, made_run
from ipc_bridge.harness import results
from ipc_bridge.harness.compare import LIMITS, judge, verdict_of
from ipc_bridge.harness.statistics import Figure

PAIRS = 40


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare looks at the rounds alone, and hundreds of runs are made."""
    monkeypatch.setattr(results, "figure", lambda rounds: Figure(0.0, 0.0, 0.0))


@pytest.mark.parametrize("noise", [QUIET, LOADED], ids=["quiet", "loaded"])
def test_runs_of_the_same_thing_raise_no_alarm(noise: Noise) -> None:
    random = np.random.default_rng(3)
    alarms = 0
    for _ in range(PAIRS):
        found = judge(made_run(random, noise), made_run(random, noise), LIMITS)
        alarms += verdict_of(found) in ("regressed", "failed")
    assert alarms <= 2


def test_a_cell_that_is_a_fifth_slower_is_found() -> None:
    random = np.random.default_rng(4)
    missed = alarms = 0
    for _ in range(PAIRS):
        found = judge(made_run(random, QUIET), made_run(random, QUIET, 0.2), LIMITS)
        (one,) = (one for one in found if one.cell == SLOWED)
        missed += one.verdict != "regressed"
        alarms += any(one.verdict == "regressed" for one in found if one.cell != SLOWED)
    assert (missed <= 1, alarms <= 2) == (True, True), (missed, alarms)


def test_it_is_not_passed_on_a_loaded_machine_either() -> None:
    random = np.random.default_rng(5)
    verdicts = []
    for _ in range(PAIRS):
        found = judge(made_run(random, LOADED), made_run(random, LOADED, 0.2), LIMITS)
        verdicts += [one.verdict for one in found if one.cell == SLOWED]
    assert verdicts.count("passed") + verdicts.count("improved") <= 1
