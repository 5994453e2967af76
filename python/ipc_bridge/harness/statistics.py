"""From samples to figures: exact percentiles, medians over rounds with an interval, ties.

A round's figure comes from its exact samples. A cell's figure is the median over its rounds, with a
95% bootstrap interval over rounds: calls of one round share its luck (where the peers' memory lies,
what else the machine did), so that they are no independent draws, and rounds are.
"""

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
RESAMPLES = 2000
CONFIDENCE = 0.95


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
