"""From samples to figures: exact percentiles, medians over rounds with an interval, ties.

A round's figure comes from its exact samples. A cell's figure is the median over its rounds, with a
95% bootstrap interval over rounds: calls of one round share its luck (where the peers' memory lies,
what else the machine did), so that they are no independent draws, and rounds are.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.uint64]

# A quantile: how many samples it takes to be more than the maximum under another name.
QUANTILES = {
    "min": (0.0, 1),
    "p10": (0.1, 1),
    "p25": (0.25, 1),
    "p50": (0.5, 1),
    "p75": (0.75, 1),
    "p90": (0.9, 10),
    "p95": (0.95, 20),
    "p99": (0.99, 100),
    "p99_9": (0.999, 1000),
    "p99_99": (0.9999, 10_000),
    "max": (1.0, 1),
}
ROUNDS_MIN = 5  # of fewer, neither an interval nor a test says anything
RESAMPLES = 2000
CONFIDENCE = 0.95
TRIM = 0.2


class Figure(NamedTuple):
    """A median over rounds, and where it would lie in most repetitions of the run."""

    value: float
    low: float
    high: float


def quantiles(samples: Samples) -> dict[str, int | None]:
    """Nearest rank: each is a sample that occurred. None where there are too few."""
    ordered, count = np.sort(samples), len(samples)

    def at(share: float, count_min: int) -> int | None:
        if count < count_min:
            return None
        rank = max(1, -(-count * round(share * 10_000) // 10_000))
        return int(ordered[rank - 1])

    return {name: at(*rule) for name, rule in QUANTILES.items()}


def figure(rounds: Sequence[float]) -> Figure:
    """The median of the rounds. With five rounds the interval is about their range."""
    values = np.asarray(rounds, dtype=float)
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    medians = np.median(values[drawn], axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians, [tail, 1 - tail], method="inverted_cdf")
    return Figure(float(np.median(values)), float(low), float(high))


def differ(one: Figure, other: Figure) -> bool:
    """Do the intervals leave a gap? Else the two are a tie."""
    return one.high < other.low or other.high < one.low


def ranks(figures: Mapping[str, Figure], best_is_low: bool = True) -> dict[str, tuple[int, int]]:
    """The best and the worst place that each may have: 2 to 4 is a tie of three."""
    places = {}
    for name, mine in figures.items():
        below = sum(other.high < mine.low for other in figures.values())
        above = sum(mine.high < other.low for other in figures.values())
        if not best_is_low:
            below, above = above, below
        places[name] = (1 + below, len(figures) - above)
    return places


def unknown(value: float) -> Figure:
    """A figure of too few rounds for an interval: a tie with all."""
    return Figure(value, -math.inf, math.inf)


# --- comparing two runs ---


class Shift(NamedTuple):
    """By what share the second is above the first, and its interval."""

    value: float
    low: float
    high: float


def above_test(more: NDArray[np.float64], less: NDArray[np.float64]) -> float:
    """How likely such means are, or clearer ones, if `more` is not above `less` (one-sided). The
    fifth at either end is trimmed off (K. Yuen, 1974): a round or two may be far off."""
    from scipy import stats  # here, as its start is slow and a run does not need it

    found = stats.ttest_ind(more, less, equal_var=False, trim=TRIM, alternative="greater")
    return 1.0 if math.isnan(found.pvalue) else float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrected for their number: that one of them is below a bound by chance is as unlikely as
    for a single one (S. Holm, 1979)."""
    order = np.argsort(p_values)
    corrected = np.empty(len(p_values))
    highest = 0.0
    for place, at in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[at]))
        corrected[at] = highest
    return corrected.tolist()


def shift(old: Sequence[float], new: Sequence[float]) -> Shift:
    """Of logarithms: the median of all differences (Hodges and Lehmann), as a share. The interval
    holds the shifts that a rank test would not reject, by its normal approximation."""
    differences = np.sort(np.subtract.outer(np.asarray(new), np.asarray(old)).ravel())
    count = len(differences)
    deviation = math.sqrt(count * (len(old) + len(new) + 1) / 12)
    outside = max(0, math.floor(count / 2 - 1.96 * deviation))
    found = np.median(differences), differences[outside], differences[count - 1 - outside]
    return Shift(*(float(np.expm1(one)) for one in found))
