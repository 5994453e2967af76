"""`ipc-bridge recommend`: the transports that fit, ranked by the figures of a run."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich import box
from rich.console import Console
from rich.table import Table

from ipc_bridge.errors import Error, Status
from ipc_bridge.harness.bench import RESULTS_DIR
from ipc_bridge.harness.matrix import (
    CLIENTS_MAX,
    OPS,
    PLACEMENTS,
    SIZE_BYTES_MAX,
    WAITS,
    size_text,
    traits,
)
from ipc_bridge.harness.options import RESULTS, Number, Size
from ipc_bridge.harness.programs import PAIRINGS
from ipc_bridge.harness.results import Document, figure_of, load, newest
from ipc_bridge.harness.table import Group, groups, pairing_label, place, scaled

# What speaks for a transport beside its speed, and what catches those who pick it.
NOTES = {
    "pipe": (
        "cheap wake-ups, nothing but the file system",
        "two FIFOs and a meeting for each client; 64 KiB in the kernel unless enlarged",
    ),
    "stdio": (
        "one program starts the other: no name, nothing to clean up",
        "a stray print corrupts the wire; one client",
    ),
    "unix": (
        "many clients; the kernel names the peer's user",
        "the path outlives a server that was killed, and has at most 107 bytes",
    ),
    "tcp": (
        "the same code when the peers part one day",
        "not encrypted; Nagle's delay unless switched off; any local user may connect",
    ),
    "sysv-queue": (
        "messages keep their bounds; on every Unix",
        "16 KiB in a queue by default; a receive knows no deadline; queues outlive their programs",
    ),
    "sysv-shm": (
        "large payloads with textbook means, on every Unix",
        "segments and semaphores outlive their programs; no descriptor to poll",
    ),
    "shm": (
        "the quickest where both spin, and for large payloads",
        "lock-free code to get right; memory that the peer can write to",
    ),
    "zmq+ipc": (
        "forty languages speak it; CURVE encrypts, and says who may come",
        "a ROUTER drops silently unless told not to; its own threads cost a wake-up each way",
    ),
    "grpc+unix": (
        "a schema, deadlines and cancel by a standard that others speak",
        "an order of magnitude dearer for small calls; 4 MiB a message unless raised",
    ),
}
NOTES["zmq+tcp"] = NOTES["zmq+ipc"]
NOTES["grpc+tcp"] = NOTES["grpc+unix"]


class Choice(NamedTuple):
    """A transport that fits."""

    place: str  # 1, or 2-4: a tie
    transport: str
    figure: str
    reason: str
    trap: str


class Wanted(NamedTuple):
    """What somebody needs."""

    op: str
    size_bytes: int
    pairing: tuple[str, str]
    wait: str = ""  # "": any, so the run's first
    placement: str = ""
    across_hosts: bool = False
    no_dependency: bool = False
    clients: int = 1


def fits(scheme: str, wanted: Wanted) -> bool:
    """Can it do what is wanted at all?"""
    known = traits(scheme)
    return (
        (known.across_hosts or not wanted.across_hosts)
        and not (wanted.no_dependency and set(known.needs_library) & set(wanted.pairing))
        and known.clients_max >= wanted.clients
    )


def fitting_in(group: Group, wanted: Wanted) -> list[str]:
    """What fits, of those that a setting has figures of."""
    return [name for name in group.figures(wanted.pairing) if fits(name, wanted)]


def nearest(document: Document, wanted: Wanted) -> Group:
    """The setting of the run that is most like what is wanted, of those where something fits, if
    there are. Raises Error: NOT_FOUND."""
    found = [
        group
        for group in groups(document)
        if group.cell.op == wanted.op
        and group.figures(wanted.pairing)
        and wanted.wait in ("", group.cell.wait)
        and wanted.placement in ("", group.cell.placement)
        and not group.cell.rate_hz
        and not group.cell.work_s
    ]
    found = [group for group in found if fitting_in(group, wanted)] or found
    if not found:
        words = [wanted.op, pairing_label(wanted.pairing), wanted.wait, wanted.placement]
        what = f"the run has no cell like this: {' '.join(word for word in words if word)}"
        raise Error(Status.NOT_FOUND, what)

    def distance(group: Group) -> float:
        """In doublings, of the size or of the clients."""
        size = abs(math.log2((1 + group.cell.size_bytes) / (1 + wanted.size_bytes)))
        return size + abs(math.log2(group.cell.clients / wanted.clients))

    return min(found, key=distance)


def recommend_from(document: Document, wanted: Wanted) -> tuple[Group, list[Choice]]:
    """The setting that was looked at, and what fits, best first. Raises Error: NOT_FOUND."""
    group = nearest(document, wanted)
    figures = group.figures(wanted.pairing)
    fitting = fitting_in(group, wanted)
    places = group.places(wanted.pairing, fitting)
    sign = 1 if group.best_is_low else -1
    choices = []
    for name in sorted(fitting, key=lambda name: sign * figures[name].value):
        reason, trap = NOTES.get(name, ("", ""))
        entry = group.find(name, wanted.pairing) or {"figures": {}}
        costs = [figure_of(entry, f"{side}_cpu_us_per_call") for side in ("client", "server")]
        used = sum(one.value for one in costs if one)
        if used:
            reason = f"{reason}; {used:.3g} us of CPU for {unit_of_work(wanted)}"
        figure = f"{scaled(figures[name].value, group.unit)} {group.unit}"
        choices.append(Choice(place(places[name]), name, figure, reason.lstrip("; "), trap))
    return group, choices


def failed_ones(group: Group, wanted: Wanted) -> list[str]:
    """What would fit, and has failed in that run."""
    entries = ((name, group.find(name, wanted.pairing)) for name in group.transports)
    return [name for name, one in entries if one and one["failure"] and fits(name, wanted)]


def unit_of_work(wanted: Wanted) -> str:
    """What costs are told for."""
    return "a call" if wanted.op == "echo" else "an item"


def title_of(wanted: Wanted, group: Group) -> str:
    """What was asked, and what answers it."""
    asked = f"{wanted.op} of {size_text(wanted.size_bytes)}"
    measured = group.title()
    if wanted.clients > 1:
        asked += f" for {wanted.clients} clients"
        measured += " of one client" if group.cell.clients == 1 else ""
    return f"{asked}, {pairing_label(wanted.pairing)} (measured: {measured})"


@click.command()
@click.argument("results", type=RESULTS, default=RESULTS_DIR)
@click.option("--size", type=Size(0, SIZE_BYTES_MAX), default=64, help="of a payload or item (64)")
@click.option("--pattern", "op", type=click.Choice(OPS), default="echo", help="calls, or a stream")
@click.option(
    "--pairing",
    type=click.Choice([f"{client}-{server}" for client, server in PAIRINGS]),
    default="cpp-cpp",
    help="client-server",
)
@click.option("--wait", type=click.Choice(WAITS), help="only figures of peers that wait like this")
@click.option("--placement", type=click.Choice(PLACEMENTS), help="only figures of peers placed so")
@click.option(
    "--clients", type=Number(1, CLIENTS_MAX, whole=True), default=1, help="so many of one server"
)
@click.option("--across-hosts", is_flag=True, help="the peers may part one day")
@click.option("--no-dependency", is_flag=True, help="nothing beyond the languages' own libraries")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object, on one line")
def recommend(
    results: Path, size: int, op: str, pairing: str, as_json: bool, **options: Any
) -> int:
    """Rank the transports that fit, by the figures of a run: RESULTS, or the newest below it."""
    client, _, server = pairing.partition("-")
    options["wait"], options["placement"] = options["wait"] or "", options["placement"] or ""
    options["clients"] = int(options["clients"])
    wanted = Wanted(op, size, (client, server), **options)
    document = load(newest(results))
    group, choices = recommend_from(document, wanted)
    failed = failed_ones(group, wanted)
    if as_json:
        ranked = [choice._asdict() for choice in choices]
        found = {"asked": wanted._asdict(), "measured": group.title(), "choices": ranked}
        found["failed"] = failed
        click.echo(json.dumps(found, separators=(",", ":")))
    else:
        show(Console(), title_of(wanted, group), choices)
        if failed:
            click.echo(f"not ranked, as they failed in that run: {', '.join(failed)}")
    if not choices:
        raise Error(Status.NOT_FOUND, "no transport of that run fits")
    return 0


def show(console: Console, title: str, choices: Sequence[Choice]) -> None:
    """As a table."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for name in ("place", "transport", "figure"):
        table.add_column(name, no_wrap=True, justify="right" if name == "figure" else "left")
    table.add_column("why")
    table.add_column("its trap")
    for choice in choices:
        table.add_row(*choice)
    console.print(table)
