"""`ipc-bridge sweep`: the highest rate at which p99 stays under a bound.

Calls are due at a fixed rate and timed from then on (open loop), so that a server that falls behind
shows at once; a call that was due and never ended counts as the latest of all. The rate is doubled
until the bound breaks, and what lies between is halved. Each rate is measured in several rounds
with fresh processes; their median decides. (Sweeps over clients and sizes are runs of bench:
--clients 1,2,4,8 or --size 64,4KiB,1MiB.)
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ipc_bridge.console import EXIT_INTERRUPTED, CommandLineError
from ipc_bridge.endpoint import SCHEMES
from ipc_bridge.errors import Error, Status
from ipc_bridge.harness.bench import EXIT_FAILED, choose, progress_line
from ipc_bridge.harness.matrix import (
    CLIENTS_MAX,
    PLACEMENTS,
    SIZE_BYTES_MAX,
    WAITS,
    Cell,
)
from ipc_bridge.harness.options import ROUNDS, Each, Number, Seconds, Size, Words
from ipc_bridge.harness.programs import PAIRINGS
from ipc_bridge.harness.runner import Plan, Runner
from ipc_bridge.harness.statistics import Samples
from ipc_bridge.system import checked

RATE_FIRST_HZ = 400.0
RATE_MIN_HZ = 100.0  # below it, enough calls for a p99 would take seconds each time
RATE_MAX_HZ = 2e6  # above what any loop of calls here can keep up with
PRECISION = 0.1  # between a rate that holds and one that does not
KEPT_UP = 0.99  # of the calls that were due; with fewer, p99 is a call that never ended
CALLS_MIN = 110  # of a round: a p99 is worth its name, also where a window cuts a few off


class Probe(NamedTuple):
    """What one rate gave."""

    rate_hz: float
    p99_ns: float | None  # of the calls that were due; None: it has not ended
    kept_up: bool

    def holds(self, bound_ns: float) -> bool:
        """Was it borne?"""
        return self.kept_up and self.p99_ns is not None and self.p99_ns <= bound_ns


def probe(cell: Cell, rounds: int, duration_s: float, rate_hz: float) -> Probe:
    """Measure a rate, without floors. Raises Error if a call fails."""
    duration_s = max(duration_s, CALLS_MIN / rate_hz)
    due = round(rate_hz * duration_s)
    found: list[Samples] = []
    asked = cell._replace(rate_hz=rate_hz)
    plan = Plan([asked], rounds, duration_s, warmup_s=duration_s / 4, with_floors=False)
    runner = Runner(plan, lambda _, __, samples: found.append(samples), lambda *_: None)
    runner.run()
    if asked in runner.measured.failures:
        raise Error(Status.ABORTED, runner.measured.failures[asked].replace("\n", "; "))
    p99_ns = statistics.median(p99_of(samples, due) for samples in found)
    kept = statistics.median(len(samples) / due for samples in found)
    return Probe(rate_hz, None if p99_ns == float("inf") else p99_ns, kept >= KEPT_UP)


def p99_of(samples: Samples, due: int) -> float:
    """Of all calls that were due, also those that never ended, which are the latest."""
    rank = -(-99 * due // 100)
    return float(np.sort(samples)[rank - 1]) if rank <= len(samples) else float("inf")


def highest(bound_ns: float, measure: Callable[[float], Probe]) -> tuple[Probe | None, list[Probe]]:
    """The highest rate that holds (None: not even RATE_MIN_HZ), and all that was tried."""
    tried = [measure(RATE_FIRST_HZ)]
    best = tried[0] if tried[0].holds(bound_ns) else None
    low, high = (RATE_FIRST_HZ, float("inf")) if best else (0.0, RATE_FIRST_HZ)
    while high - low > PRECISION * high or high == float("inf"):
        rate_hz = 2 * low if high == float("inf") else (low + high) / 2
        if not RATE_MIN_HZ <= rate_hz <= RATE_MAX_HZ:
            break
        tried.append(measure(rate_hz))
        if tried[-1].holds(bound_ns):
            low, best = rate_hz, tried[-1]
        else:
            high = rate_hz
    return best, tried


@click.command()
@click.option("--p99", "bound", type=Seconds(1e-6, 60), default=1e-3, help="the bound (1ms)")
@click.option("--transport", type=Words([*SCHEMES]), default="all", metavar="T,T", help="or all")
@click.option(
    "--pairing",
    type=Words([f"{client}-{server}" for client, server in PAIRINGS]),
    default="cpp-cpp",
    metavar="P,P",
    help="client-server (cpp-cpp)",
)
@click.option("--size", type=Size(0, SIZE_BYTES_MAX), default=64, help="of a payload (64)")
@click.option("--wait", type=click.Choice(WAITS), default="block", help="(block)")
@click.option(
    "--placement", type=click.Choice(PLACEMENTS), default="free", help="of the peers (free)"
)
@click.option(
    "--clients",
    type=Each(Number(1, CLIENTS_MAX, whole=True)),
    default="1",
    metavar="N,N",
    help="that share the rate (1)",
)
@click.option("--rounds", type=ROUNDS, default=3, help="of each rate (3)")
@click.option("--duration", type=Seconds(0.05, 3600), default=0.3, help="of each round (0.3)")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object, on one line")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="write the JSON into a file")
def sweep(
    bound: float,
    transport: list[str],
    pairing: list[str],
    size: int,
    wait: str,
    placement: str,
    clients: list[float],
    rounds: float,
    duration: float,
    as_json: bool,
    out: Path | None,
) -> int:
    """Find the highest rate of echoes at which p99 stays under a bound."""
    asked = [
        Cell(scheme, client, server, "echo", size, wait, placement, int(count))
        for scheme in transport
        for client, server in PAIRINGS
        if f"{client}-{server}" in pairing
        for count in clients
    ]
    cells, skipped = choose(asked, {})
    if not cells:
        raise CommandLineError(f"no cell to measure: {next(iter(skipped.values()))}")
    table = Table(
        title=f"highest rate with p99 under {bound * 1e3:g} ms, {size} bytes, {wait}, {placement}",
        title_justify="left",
        box=box.SIMPLE,
        pad_edge=False,
    )
    for name in ("transport", "pairing", "clients", "calls/s", "p99 there"):
        table.add_column(name, justify="left" if name in "transport pairing" else "right")
    found: list[dict[str, Any]] = []
    if out:
        with checked("open", out):  # before all the work; an older result stays until there is one
            out.open("a").close()

    def text() -> str:
        return json.dumps({"bound_s": bound, "cells": found}, separators=(",", ":"))

    interrupted = False
    try:
        with progress_line() as line:
            task = line.add_task("", total=len(cells), what="")
            for cell in cells:

                def measure(rate_hz: float, cell: Cell = cell) -> Probe:
                    what = f"{cell.label()}: {rate_hz:,.0f}/s"
                    line.update(task, completed=len(found), what=what)
                    line.refresh()
                    return probe(cell, int(rounds), duration, rate_hz)

                entry, shown = swept(cell, bound * 1e9, measure)
                found.append(entry)
                table.add_row(cell.transport, cell.pairing(), str(cell.clients), *shown)
                if out:
                    with checked("write", out):
                        out.write_text(text() + "\n")
    except KeyboardInterrupt:  # what is complete is shown, and written already
        interrupted = True
    if as_json:
        click.echo(text())
    else:
        console = Console()
        console.print(table)
        for skip, reason in skipped.items():
            console.out(f"skipped: {skip.label()}: {reason}", highlight=False)
        for entry in found:
            if entry["failure"]:
                console.out(f"failed: {entry['id']}: {entry['failure']}", highlight=False)
    if interrupted:
        return EXIT_INTERRUPTED
    return EXIT_FAILED if any(entry["failure"] for entry in found) else 0


def swept(
    cell: Cell, bound_ns: float, measure: Callable[[float], Probe]
) -> tuple[dict[str, Any], tuple[str, str]]:
    """One cell of the JSON, and what the table says of it. A failure is its own, not the run's."""
    best: Probe | None = None
    tried: list[Probe] = []
    failure = None
    try:
        best, tried = highest(bound_ns, measure)
    except Error as error:
        failure = error.what
    entry = {
        "id": cell.label(),
        "rate_hz": best and best.rate_hz,
        "p99_ns": best and best.p99_ns,
        "tried": [one._asdict() for one in tried],
        "failure": failure,
    }
    if failure:
        return entry, ("failed", "-")
    if best is None or best.p99_ns is None:
        return entry, (f"under {RATE_MIN_HZ:g}", "-")
    return entry, (f"{best.rate_hz:,.0f}", f"{best.p99_ns / 1e3:,.1f} us")
