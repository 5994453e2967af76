"""Runs that are made with the noise of real ones, for the tests of `ipc-bridge compare`: drift that
hits a cell and its floor, rounds that are off, and a machine of another speed.
"""

from typing import Any

import numpy as np

from harness_support import echo_round, made, stream_round
from ipc_bridge.harness.matrix import Cell, floor_of
from ipc_bridge.harness.results import Document

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
