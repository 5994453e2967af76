"""The four pairings over one transport: a text echoed, a stream verified, a few figures.

    python -m ipc_bridge.harness.demo unix

Nothing is drawn while something is measured: a spinner would take its core from a peer.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from ipc_bridge.arguments import url_form
from ipc_bridge.console import CommandLineError
from ipc_bridge.endpoint import SCHEMES
from ipc_bridge.harness.programs import (
    LANGUAGES,
    PAIRINGS,
    SHORT,
    Parser,
    ProgramError,
    main,
    peer,
    private_directory,
    run,
    served_peer,
)

DURATION_S = 0.4  # of a measurement: enough for two digits, and twelve of them in a demo
DURATION_S_MIN = 0.001
DURATION_S_MAX = 60.0
WARMUP_PART = 4  # of the duration: connections, caches, clock frequencies
STREAM_COUNT = 10_000
STREAM_SIZE = "1KiB"


class Figures(NamedTuple):
    """What one pairing measured."""

    p50_ns: float
    p99_ns: float
    items_per_second: float  # of 64 B
    bytes_per_second: float  # in items of 64 KiB


def demonstrate(console: Console, scheme: str, duration_s: float) -> bool:
    """All pairings over one transport, and their table; False if one failed."""
    console.out(f"{scheme}: client -> server", style="bold", highlight=False)
    rows = []
    for client, server in PAIRINGS:
        rows.append((client, server, show_pairing(console, scheme, client, server, duration_s)))
    console.print(make_table(rows))
    return all(figures for _, _, figures in rows)


def show_pairing(
    console: Console, scheme: str, client: str, server: str, duration_s: float
) -> Figures | None:
    """One line, a piece at a time, so that it shows what is going on; None if it failed."""

    def say(text: str, end: str = "", style: str | None = None) -> None:
        console.out(text, end=end, style=style, highlight=False)

    pairing = f"{LANGUAGES[client]} -> {LANGUAGES[server]}"
    say(f"  {pairing:<17}")
    try:
        with (
            private_directory() as directory,
            served_peer(scheme, [*peer(server), "serve"], os.path.join(directory, "demo")) as (
                url,
                _,
            ),
        ):
            echo = run([*peer(client), "echo", url, "--payload", greeting(client)])
            say(f' echo "{echo.rstrip()}",')
            words = ["--count", str(STREAM_COUNT), "--size", STREAM_SIZE]
            run([*peer(client), "stream", url, *words])
            say(f" {STREAM_COUNT} x {STREAM_SIZE} verified, measuring ...")
            figures = measure(client, url, duration_s)
    except ProgramError as error:
        say(" failed", end="\n", style="red")
        for line in str(error).splitlines():
            say(f"    {line}", end="\n")
        return None
    except BaseException:
        say("", end="\n")
        raise
    say(" done", end="\n")
    return figures


def greeting(client: str) -> str:
    """What is echoed."""
    return f"hello from {LANGUAGES[client]}"


def measure(client: str, url: str, duration_s: float) -> Figures:
    """The figures of one pairing. Raises ProgramError."""

    def bench(op: str, size: str) -> dict[str, Any]:
        times = [f"{seconds:.3f}" for seconds in (duration_s, duration_s / WARMUP_PART)]
        words = ["--size", size, "--duration", times[0], "--warmup", times[1], "--json"]
        figures: dict[str, Any] = json.loads(
            run([*peer(client), "bench", url, "--op", op, *words]),
        )
        if not figures["operations"]:
            raise ProgramError(f"no {op} of {size} within {times[0]} s")
        return figures

    latency_ns = bench("echo", "64")["latency_ns"]
    small, large = bench("stream", "64"), bench("stream", "64KiB")
    return Figures(
        latency_ns["p50"],
        latency_ns["p99"],
        small["operations_per_second"],
        large["bytes_per_second"],
    )


def make_table(rows: Sequence[tuple[str, str, Figures | None]]) -> Table:
    """The figures of all pairings."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("client")
    table.add_column("server")
    for name in ("echo 64 B\np50", "\np99", "stream 64 B\nitems/s", "stream 64 KiB\nMB/s"):
        table.add_column(name, justify="right")
    for client, server, figures in rows:
        cells = ["failed", "-", "-", "-"]
        if figures:
            cells = [f"{ns / 1e3:,.1f} us" for ns in (figures.p50_ns, figures.p99_ns)]
            cells.append(f"{figures.items_per_second:,.0f}")
            cells.append(f"{figures.bytes_per_second / 1e6:,.0f}")
        table.add_row(LANGUAGES[client], LANGUAGES[server], *cells)
    return table


def next_steps(scheme: str) -> tuple[str, str]:
    """Two lines: what was run here, for a reader who wants to run it by hand."""
    client, server = "py", "cpp"
    url = url_form(scheme)
    serve = shorten([*peer(server), "serve", url])
    if scheme == "stdio":
        url = f"stdio:{shlex.join([*shorten(peer(server)), 'serve', 'stdio:'])}"
    echo = shlex.join([*shorten(peer(client)), "echo", url, "--payload", greeting(client)])
    if scheme == "stdio":
        more = shlex.join([*shorten(peer(server)), "--help"])
        return f"by hand (the client starts the server):  {echo}", f"what else there is:  {more}"
    return f"by hand, in one terminal:  {shlex.join(serve)}", f"in another:  {echo}"


def shorten(words: Sequence[str]) -> list[str]:
    """The words, with a program below this directory named as one would type it."""
    program, here = Path(words[0]), Path.cwd()
    return [str(program.relative_to(here) if program.is_relative_to(here) else program), *words[1:]]


def parse(words: Sequence[str]) -> tuple[list[str], float]:
    """The transports to show, and how long to measure. Raises CommandLineError."""
    known = {scheme: scheme for scheme in SCHEMES} | SHORT
    names = ", ".join([*known, "all"])
    parser = Parser(
        prog="python -m ipc_bridge.harness.demo",
        description="Show the four pairings of C++ and Python talk over a transport.",
        allow_abbrev=False,
    )
    parser.add_argument("TRANSPORT", nargs="?", default="", help=names)
    parser.add_argument(
        "--duration",
        metavar="SECONDS",
        type=duration,
        default=DURATION_S,
        help=f"of each measurement (default {DURATION_S})",
    )
    found = parser.parse_args(words)
    if not found.TRANSPORT:
        raise CommandLineError(f"a transport is missing; known are {names}")
    if found.TRANSPORT == "all":  # each transport once
        longer = {scheme for scheme in SCHEMES if scheme.partition("+")[0] in SHORT}
        return [name for name in SCHEMES if name not in longer - {*SHORT.values()}], found.duration
    if found.TRANSPORT not in known:
        raise CommandLineError(f"unknown transport; known are {names}", found.TRANSPORT)
    return [known[found.TRANSPORT]], found.duration


def duration(text: str) -> float:
    """Seconds."""
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a decimal number") from None
    if not DURATION_S_MIN <= seconds <= DURATION_S_MAX:
        what = f"'{text}' is not within {DURATION_S_MIN:g} to {DURATION_S_MAX:g}"
        raise argparse.ArgumentTypeError(what)
    return seconds


def demo(words: Sequence[str]) -> int:
    """The program; 1 if a pairing failed."""
    schemes, duration_s = parse(words)
    peer("cpp")  # not built: said once, and not by every pairing
    console = Console()
    results = [demonstrate(console, scheme, duration_s) for scheme in schemes]
    for line in next_steps("unix" if len(schemes) > 1 else schemes[0]):
        console.out(line, highlight=False)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(demo))
