"""`ipc-bridge bench`: measure the transports on this machine.

Nothing is drawn while a cell is measured: the progress line changes between two of them.
"""

import datetime
import ipaddress
import os
import random
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ipc_bridge.console import EXIT_INTERRUPTED, CommandLineError, encode, write_out
from ipc_bridge.endpoint import SCHEMES
from ipc_bridge.errors import Error, Status
from ipc_bridge.harness import environment, table
from ipc_bridge.harness.matrix import (
    CLIENTS_MAX,
    OPS,
    PLACEMENTS,
    PROFILES,
    SIZE_BYTES_MAX,
    WAITS,
    Cell,
    cells_of,
    cores_allowed,
    reason_to_skip,
    traits,
)
from ipc_bridge.harness.options import ROUNDS, Each, Number, Seconds, Size, Words
from ipc_bridge.harness.programs import INTERRUPTS, LANGUAGES
from ipc_bridge.harness.results import RESULTS, SAMPLES, Document, SampleFile, document, save
from ipc_bridge.harness.runner import Measured, Plan, Runner
from ipc_bridge.system import checked

RESULTS_DIR = Path("results")
EXIT_FAILED = 1  # a cell failed
KEPT_UP = 0.98  # of what was due; with less, a paced cell was more than its server could do
SAVE_SHARE = 20  # saving takes no more than one part in so many of a run
ELSEWHERE = "elsewhere"  # the name of a server that runs already
RATE_MAX = 1e9
WORK_S_MAX = 10.0
AXES = {  # the name of an option: that of its axis
    "transport": "transport",
    "pairing": "pairing",
    "op": "op",
    "size": "size_bytes",
    "wait": "wait",
    "placement": "placement",
    "clients": "clients",
    "rate": "rate_hz",
    "work": "work_s",
}


def axis_options(command: Any) -> Any:
    """The options that choose cells; those of `bench` and `sweep`."""
    options = [
        click.option("--transport", type=Words([*SCHEMES]), metavar="T,T", help="or all"),
        click.option(
            "--pairing", metavar="P,P", help="client-server: cpp-cpp, cpp-py, py-cpp, py-py"
        ),
        click.option("--op", type=Words(OPS), metavar="OP,OP", help="echo, stream"),
        click.option(
            "--size", type=Each(Size(0, SIZE_BYTES_MAX)), metavar="S,S", help="64,64KiB,1MiB"
        ),
        click.option("--wait", type=Words(WAITS), metavar="W,W", help=", ".join(WAITS)),
        click.option(
            "--placement", type=Words(PLACEMENTS), metavar="P,P", help=", ".join(PLACEMENTS)
        ),
        click.option(
            "--clients",
            type=Each(Number(1, CLIENTS_MAX, whole=True)),
            metavar="N,N",
            help="connections at once, from one process",
        ),
        click.option(
            "--rate",
            type=Each(Number(0, RATE_MAX)),
            metavar="HZ,HZ",
            help="calls or items due a second, of all clients (default: no pause)",
        ),
        click.option(
            "--work",
            type=Each(Seconds(0, WORK_S_MAX)),
            metavar="T,T",
            help="a stream's consumer sleeps so long after each item",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.option(
    "--profile", type=click.Choice([*PROFILES]), default="quick", help="which cells (quick)"
)
@axis_options
@click.option(
    "--server",
    "servers",
    multiple=True,
    metavar="NAME=COMMAND",
    help="a server of one's own: `COMMAND URL` prints `ready URL`; pairing cpp-NAME, py-NAME",
)
@click.option("--connect", metavar="URL", default="", help="measure a server that runs already")
@click.option("--rounds", type=ROUNDS, help="with fresh processes; 10 or more to compare runs")
@click.option("--duration", type=Seconds(0.01, 3600), help="of one measurement")
@click.option("--warmup", type=Seconds(0, 3600), help="not counted, before each")
@click.option(
    "--budget", type=Seconds(1, 1e6), help="begin no further round that would end after it"
)
@click.option("--seed", type=Number(0, 1e9, whole=True), help="of the order of cells")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="directory for the results, which holds none yet",
)
@click.option("--list", "only_list", is_flag=True, help="show the cells, and measure nothing")
def bench(
    profile: str,
    servers: Sequence[str],
    connect: str,
    rounds: float | None,
    duration: float | None,
    warmup: float | None,
    budget: float | None,
    seed: float | None,
    out: Path | None,
    only_list: bool,
    **axes: Any,
) -> int:
    """Measure the transports on this machine: latency, throughput, CPU, memory.

    Cells are visited in a fresh order each round, with fresh processes, and every answer is
    verified. Writes results.json and the raw samples; `ipc-bridge report` makes pictures of them.
    """
    own = own_servers(servers) | ({ELSEWHERE: [connect]} if connect else {})
    chosen = chosen_axes(axes, own, connect)
    asked = PROFILES[profile]
    cells, skipped = choose(cells_of(asked, chosen), own, connect)
    if not cells:
        reason = next(iter(skipped.values()), "the profile has none like this")
        raise CommandLineError(f"no cell to measure: {reason}")
    plan = Plan(
        cells,
        rounds=int(rounds or asked.rounds),
        duration_s=duration or asked.duration_s,
        warmup_s=asked.warmup_s if warmup is None else warmup,
        servers=own,
        connect=connect,
        budget_s=budget or float("inf"),
        seed=int(seed) if seed is not None else random.SystemRandom().randrange(1_000_000_000),
    )
    if only_list:
        lines = [cell.label() for cell in cells]
        lines += [f"skipped: {cell.label()}: {reason}" for cell, reason in skipped.items()]
        write_out(encode("\n".join([*lines, ""])))
        return 0
    return measure(plan, skipped, out or RESULTS_DIR / f"{now():%Y%m%d-%H%M%S}", profile, Console())


def now() -> datetime.datetime:
    """In this machine's time zone."""
    return datetime.datetime.now().astimezone()


# --- what to measure ---


def own_servers(texts: Sequence[str]) -> dict[str, list[str]]:
    """--server: the words of each command."""
    found = {}
    for text in texts:
        name, equals, command = text.partition("=")
        if not equals or not name.isidentifier() or name in LANGUAGES or not command:
            raise CommandLineError(f"'{text}' is not NAME=COMMAND", "--server")
        try:
            found[name] = shlex.split(command)
        except ValueError as error:
            raise CommandLineError(str(error), "--server") from None
    return found


def chosen_axes(
    options: Mapping[str, Any], own: Mapping[str, Sequence[str]], connect: str
) -> dict[str, Any]:
    """The axes that the command line names. A server that runs already has chosen some of them."""
    for name in ("transport", "wait", "placement"):
        if connect and options.get(name) is not None:
            raise CommandLineError("this option goes without --connect", f"--{name}")
    if connect and len(own) > 1:
        raise CommandLineError("this option goes without --connect", "--server")
    found = {AXES[name]: value for name, value in options.items() if value is not None}
    if "clients" in found:
        found["clients"] = [int(clients) for clients in found["clients"]]
    servers = [*own] if connect else [*LANGUAGES, *own]
    known = [f"{client}-{server}" for client in LANGUAGES for server in servers]
    if text := found.pop("pairing", None):
        found["pairing"] = Words(known).convert(text, None, None)
    elif own:
        found["pairing"] = [*known]
    if connect:
        scheme, _, rest = connect.partition(":")
        if scheme not in SCHEMES:
            raise CommandLineError(f"unknown scheme; known are {', '.join(SCHEMES)}", "--connect")
        wait = wait_of(scheme, rest)
        if wait not in WAITS:
            raise CommandLineError("wait is block, spin or adaptive", "--connect")
        found |= {"transport": [scheme], "placement": ["free"], "wait": [wait]}
    return found


def wait_of(scheme: str, rest: str) -> str:
    """As a URL says; else what a peer does unless told otherwise."""
    query = rest.partition("?")[2]
    if scheme == "stdio":  # before the command, whose words may hold any character
        query = rest.partition(" ")[0][1:] if rest.startswith("?") else ""
    waits = [word.removeprefix("wait=") for word in query.split("&") if word.startswith("wait=")]
    return waits[-1] if waits else traits(scheme).waits[-1]


def choose(
    cells: Sequence[Cell], own: Mapping[str, Sequence[str]], connect: str = ""
) -> tuple[list[Cell], dict[Cell, str]]:
    """Those that can be run here, and why the others cannot."""
    cores = len(cores_allowed())
    reasons = {cell: reason_to_skip(cell, cores, own) for cell in cells}
    if connect and is_another_host(connect):
        for cell in cells:
            if cell.op == "stream" and cell.rate_hz:
                reasons[cell] = "a paced item holds its time, and another host has another clock"
    run = [cell for cell, reason in reasons.items() if not reason]
    return run, {cell: reason for cell, reason in reasons.items() if reason}


def is_another_host(url: str) -> bool:
    """As far as the URL says: its host is not this one's loopback, or its command is ssh's."""
    scheme, _, rest = url.partition(":")
    if scheme == "stdio":
        words = [word for word in rest.split() if not word.startswith("?")]
        return os.path.basename(words[0] if words else "") == "ssh"
    host = urlsplit(url).hostname
    if not traits(scheme).across_hosts or host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return True


# --- measuring ---


def measure(
    plan: Plan, skipped: Mapping[Cell, str], out: Path, profile: str, console: Console
) -> int:
    """Run the plan, write what it found, and show it; the exit code. What there is after a round is
    written, and so survives whatever ends the run. Raises Error: ALREADY_EXISTS if the directory
    holds a run, or that of what keeps it from being made."""
    with checked("mkdir", str(out)):
        out.mkdir(parents=True, exist_ok=True)
    if (out / RESULTS).exists():
        raise Error(Status.ALREADY_EXISTS, "there are results of another run", str(out / RESULTS))
    began, before = now(), environment.Clock.now()
    about = environment.describe()
    interrupted = False
    saved_s, save_took_s = 0.0, 0.0

    def write(is_whole: bool) -> tuple[Document, Path]:
        noise = environment.noise(before, environment.Clock.now())
        found = document(
            plan,
            runner.measured,
            skipped,
            about
            | {
                "created": began.isoformat(timespec="seconds"),
                "profile": profile,
                "command": ["ipc-bridge", *sys.argv[1:]],
                "interrupted": not is_whole,
                "noise": noise,
                "warnings": overloads(plan, runner.measured)
                + environment.warnings(
                    about["machine"],
                    noise,
                    spread(runner.measured),
                    server_is_ours=not plan.connect,
                ),
            },
        )
        return found, save(out, found)

    def round_done() -> None:
        nonlocal saved_s, save_took_s
        at_s = time.monotonic()
        if at_s - saved_s >= SAVE_SHARE * save_took_s:
            write(is_whole=False)
            saved_s = time.monotonic()
            save_took_s = saved_s - at_s

    with SampleFile(out / SAMPLES) as samples, progress_line() as line:
        task = line.add_task("", total=None, what="")

        def show(done: int, total: int, text: str) -> None:
            rounds_done = runner.measured.rounds
            line.update(
                task, completed=rounds_done * total + done, total=runner.rounds * total, what=text
            )
            line.refresh()

        runner = Runner(plan, samples.keep, show, round_done)
        try:
            runner.run()
        except KeyboardInterrupt:
            interrupted = True
    with INTERRUPTS.hold():  # a second Ctrl-C, out of impatience, loses nothing
        found, path = write(is_whole=not interrupted)
    finish(console, found, path)
    if interrupted:
        return EXIT_INTERRUPTED
    return EXIT_FAILED if runner.measured.failures else 0


def progress_line() -> Progress:
    """Redrawn when told to, and off a terminal never."""
    return Progress(
        TextColumn("{task.percentage:>3.0f}%"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def spread(measured: Measured) -> float | None:
    """How far the rounds of a middling cell lie from their median; None: too few rounds."""
    found = []
    for cell, rounds in measured.cells.items():
        name = table.main_figure(cell)[0]
        is_latency = name == "latency_p50_ns"
        values = np.array(
            [one["latency_ns"]["p50"] if is_latency else one[name] for one in rounds], dtype=float
        )
        if len(values) >= 3:
            middle = np.median(values)
            found.append(float(np.median(np.abs(values - middle)) / middle))
    return float(np.median(found)) if found else None


def overloads(plan: Plan, measured: Measured) -> list[str]:
    """One sentence, if calls or items were due and never came: no percentile knows of them."""
    shares = {}
    for cell, rounds in measured.cells.items():
        if cell.rate_hz and rounds:
            due = cell.rate_hz * plan.duration_s
            done = float(np.median([one["operations"] for one in rounds]))
            if due - done > max((1 - KEPT_UP) * due, 2 * cell.clients):  # its ends cut a few off
                shares[cell] = done / due
    if not shares:
        return []
    worst = min(shares, key=shares.__getitem__)
    return [
        f"{len(shares)} paced cells fell behind, {worst.label()} to {shares[worst]:.0%} of its "
        "rate: what was due and not done is in no percentile"
    ]


def finish(console: Console, found: Document, path: Path) -> None:
    """The tables, and what to do next."""
    table.print_results(console, found)
    if found["rounds"] < 5:
        text = f"warning: {found['rounds']} complete rounds: intervals need 5, comparisons 10"
        console.out(text, style="yellow", highlight=False)
    if found["interrupted"]:
        console.out("interrupted: what was measured until then is kept", highlight=False)
    console.out(f"results: {path}", highlight=False)
    console.out(f"pictures: ipc-bridge report {path.parent}", highlight=False)
