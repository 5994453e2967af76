"""What a pair costs over the bare program: same mechanism, language, message, wait and cores.

    python -m ipc_bridge.harness.overhead --transport unix --language cpp

Both run in every round, with fresh processes, one right after the other and in an order that
alternates: a machine drifts, and the ratio of neighbours drifts least. So the ratios are the
result; the times belong to the machine as it was.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from ipc_bridge.arguments import SIZE, UNITS
from ipc_bridge.harness.matrix import core_pair
from ipc_bridge.harness.programs import (
    LANGUAGES,
    Parser,
    ProgramError,
    bare,
    binary,
    main,
    peer,
    private_directory,
    run,
    served,
    served_peer,
)
from ipc_bridge.harness.runner import address_of

MECHANISMS = (
    *("unix", "tcp", "pipe"),
    *("shm", "shm-line"),
    *("sysv-queue", "sysv-shm"),
    *("zmq", "zmq-req", "zmq+tcp", "grpc+unix", "grpc+tcp"),
)
# Where the bare program has another name.
BARE = {
    "shm": "shm_ring",
    "zmq": "zeromq",
    "zmq-req": "zeromq_req",
    "zmq+tcp": "zeromq",
    "grpc+unix": "grpc_rpc",
    "grpc+tcp": "grpc_rpc",
}
# And the pair: it is compared with two.
SCHEME = {"zmq": "zmq+ipc", "zmq-req": "zmq+ipc", "shm-line": "shm"}
LINE = "shm-line"  # over no message at all: a cache line to another core and back, in C++
NO_SPIN = (
    "zmq",
    "zmq-req",
    "zmq+tcp",
    "grpc+unix",
    "grpc+tcp",
)  # their libraries' threads would starve
SETUPS = (("spin", "cross-core"), ("block", "same-core"), ("block", "cross-core"))
STREAM_PAIRINGS = (("cpp", "cpp"), ("py", "cpp"), ("py", "py"))  # client, server
BARE_STREAMS = ("grpc+unix", "grpc+tcp")  # the mechanism has streams of its own, in both languages
PING_STREAMS = ("shm",)  # the copying is the work: what its ping-pong moves is a floor for streams
DURATION_S = 0.4
WARMUP_S = 0.1
LINE_S = 0.05  # 100,000 rounds and more
PINGS = {"cpp": 40_000, "py": 15_000}  # of a small message: near DURATION_S where they block
PINGS_MIN = 200
ITEMS = {"cpp": 100_000, "py": 10_000}  # likewise, by the slower of both languages
ITEMS_MIN = 1000
PING_BYTES = 1 << 29  # and of a large one: so many bytes in all
SIZE_BYTES_MAX = 64 << 20  # what a peer takes by default
ROUNDS_MAX = 1000


class Cell(NamedTuple):
    """One row of the result. `bare` is of the languages of both peers; few streams have one."""

    transport: str
    client: str
    server: str
    wait: str  # "": that of the peers' own choice
    placement: str

    def label(self) -> str:
        """For a line of progress."""
        return " ".join(word for word in self if word)


class Measured(NamedTuple):
    """The figures of one cell, a value for each round: p50 ns, or items per second."""

    cell: Cell
    bare: list[float]
    pair: list[float]
    failure: str = ""

    def ratios(self) -> list[float]:
        """Of each round."""
        return [pair / bare for pair, bare in zip(self.pair, self.bare, strict=True)]


# --- one launch ---


def cores(cell: Cell) -> tuple[int, int]:
    """Of client and server: those of bench."""
    client_core, server_core = core_pair()
    if cell.placement == "same-core":
        return client_core, client_core
    if client_core == server_core:
        raise ProgramError("this machine allows one core only: cross-core is not possible")
    return client_core, server_core


def bare_p50_ns(cell: Cell, size_bytes: int) -> float:
    """Round trips of the bare program. Raises ProgramError."""
    if cell.transport == LINE:
        words = ["line", *map(str, cores(cell)), str(LINE_S)]
        return figure("p50_ns", run([binary("ipc-bridge-floors"), *words]))
    pings = max(PINGS_MIN, min(PINGS[cell.client], PING_BYTES // max(1, size_bytes)))
    return figure("p50_ns", bare_client(cell, "ping", size_bytes, pings))


def bare_items_per_second(cell: Cell, size_bytes: int) -> float:
    """A stream of the bare program, or the two messages of each of its round trips. Raises
    ProgramError."""
    if cell.transport in PING_STREAMS:
        return 2e9 / bare_p50_ns(cell._replace(wait="spin"), size_bytes)
    items = min(ITEMS[cell.client], ITEMS[cell.server])
    items = max(ITEMS_MIN, min(items, PING_BYTES // size_bytes))
    return figure("items_per_second", bare_client(cell, "stream", size_bytes, items))


def bare_client(cell: Cell, verb: str, size_bytes: int, count: int) -> str:
    """What the bare client prints. Raises ProgramError."""
    client_core, server_core = cores(cell)
    mechanism = BARE.get(cell.transport, cell.transport.replace("-", "_"))
    message = [str(size_bytes), cell.wait]
    kind = cell.transport.partition("+")[2]
    with private_directory() as directory, address_of(mechanism, directory, kind) as address:
        serve = [*bare(mechanism, cell.server), "serve", address, *message]
        with served(serve, server_core) as server:
            words = [*bare(mechanism, cell.client), verb, server.address, *message, str(count)]
            return run(words, client_core)


def figure(name: str, out: str) -> float:
    """One that a bare program prints. Raises ProgramError."""
    match = re.search(rf"{name}=(\d+)", out)
    if not match:
        raise ProgramError(f"no {name} in: {out.strip()}")
    return float(match[1])


def bench(cell: Cell, op: str, size_bytes: int) -> dict[str, Any]:
    """The pair. Raises ProgramError."""
    client_core, server_core = cores(cell)
    words = ["--op", op, "--size", str(size_bytes), "--duration", str(DURATION_S)]
    words += ["--warmup", str(WARMUP_S), "--json"]
    with private_directory() as directory:
        path = os.path.join(directory, "pair")
        scheme = SCHEME.get(cell.transport, cell.transport)
        serve = [*peer(cell.server), "serve"]
        with served_peer(scheme, serve, path, cell.wait, server_core) as (url, _):
            out = run([*peer(cell.client), "bench", url, *words], client_core)
    figures: dict[str, Any] = json.loads(out)
    if not figures["operations"]:
        raise ProgramError(f"no {op} within {DURATION_S} s")
    return figures


# --- all of them ---


def echo_round(measured: Measured, number: int, size_bytes: int) -> None:
    """The bare program and the pair, in an order that alternates."""

    def run_bare() -> None:
        measured.bare.append(bare_p50_ns(measured.cell, size_bytes))

    def run_pair() -> None:
        measured.pair.append(bench(measured.cell, "echo", size_bytes)["latency_ns"]["p50"])

    for step in (run_bare, run_pair) if number % 2 else (run_pair, run_bare):
        step()


def stream_round(measured: Measured, number: int, size_bytes: int) -> None:
    """Likewise, where there is a bare stream; every byte is verified within the time."""

    def run_bare() -> None:
        if measured.cell.transport in (*BARE_STREAMS, *PING_STREAMS):
            measured.bare.append(bare_items_per_second(measured.cell, size_bytes))

    def run_pair() -> None:
        figures = bench(measured.cell, "stream", size_bytes)
        measured.pair.append(figures["operations_per_second"])

    for step in (run_bare, run_pair) if number % 2 else (run_pair, run_bare):
        step()


def measure(
    cells: Sequence[Cell],
    rounds: int,
    size_bytes: int,
    step: Callable[[Measured, int, int], None],
) -> list[Measured]:
    """Visit every cell in every round; one that fails is not visited again."""
    found = [Measured(cell, [], []) for cell in cells]
    for number in range(1, rounds + 1):
        began = time.monotonic()
        for at, measured in enumerate(found):
            if measured.failure:
                continue
            try:
                step(measured, number, size_bytes)
            except ProgramError as error:
                print(f"{measured.cell.label()} failed:\n{error}", file=sys.stderr, flush=True)
                found[at] = measured._replace(failure=str(error))
        took = time.monotonic() - began
        print(f"round {number} of {rounds}: {took:.1f} s", file=sys.stderr, flush=True)
    return found


# --- what it says ---


def report(measured: Measured, is_stream: bool) -> dict[str, Any]:
    """One cell of the JSON."""
    figures: dict[str, Any] = measured.cell._asdict()
    if measured.failure:
        return figures | {"error": measured.failure}
    bare_name, pair_name = ("bare_p50_ns", "pair_p50_ns")
    if is_stream:
        bare_name, pair_name = ("bare_items_per_second", "items_per_second")
    figures[pair_name] = statistics.median(measured.pair)
    figures[f"{pair_name}_rounds"] = measured.pair
    if measured.bare:
        ratios = measured.ratios()
        figures[bare_name] = statistics.median(measured.bare)
        figures[f"{bare_name}_rounds"] = measured.bare
        figures["ratio"] = statistics.median(ratios)
        figures |= {"ratio_min": min(ratios), "ratio_max": max(ratios)}
    return figures


def make_table(found: Sequence[Measured], title: str, is_stream: bool) -> Table:
    """All cells; the ratio is the median of the rounds' ratios, with the least and the largest."""
    kind, unit = ("items/s", "") if is_stream else ("p50", " ns")
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=0)
    for name in ("transport", "client", "server", "wait", "cores"):
        table.add_column(name, no_wrap=True)
    for name in (f"bare {kind}", f"pair {kind}", "ratio", "range"):
        table.add_column(name, justify="right", no_wrap=True)
    for measured in found:
        cell = measured.cell
        words = [cell.transport, LANGUAGES[cell.client], LANGUAGES[cell.server]]
        words += [cell.wait or "adaptive", cell.placement.removesuffix("-core")]
        if measured.failure:
            words.append("failed")
        elif measured.bare:
            ratios = measured.ratios()
            both = (measured.bare, measured.pair)
            words += [f"{statistics.median(values):,.0f}{unit}" for values in both]
            words.append(f"{statistics.median(ratios):.2f}")
            words.append(f"{min(ratios):.2f}..{max(ratios):.2f}")
        else:
            rates = measured.pair
            words += ["", f"{statistics.median(rates):,.0f}", ""]
            words.append(f"{min(rates):,.0f}..{max(rates):,.0f}")
        table.add_row(*words)
    return table


# --- the command line ---


def chosen(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A list with commas, of known words."""

    def convert(text: str) -> list[str]:
        words = text.split(",")
        for word in words:
            if word not in known:
                what = f"'{word}' is unknown; known are {', '.join(known)}"
                raise argparse.ArgumentTypeError(what)
        return words

    return convert


def size(text: str) -> int:
    """Bytes: 64, 4KiB, 1MiB."""
    match = SIZE.fullmatch(text)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size")
    size_bytes = int(match[1]) * UNITS[match[2]]
    if not 1 <= size_bytes <= SIZE_BYTES_MAX:
        raise argparse.ArgumentTypeError(f"'{text}' is not within 1 to {SIZE_BYTES_MAX}")
    return size_bytes


def round_count(text: str) -> int:
    """At least one."""
    if not re.fullmatch("[0-9]{1,4}", text) or not 1 <= int(text) <= ROUNDS_MAX:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number within 1 to {ROUNDS_MAX}")
    return int(text)


def make_parser() -> Parser:
    """What can be said."""
    parser = Parser(
        prog="python -m ipc_bridge.harness.overhead",
        description="Measure the round trip of a pair against that of the bare program.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--transport",
        type=chosen(MECHANISMS),
        metavar="T,T",
        help=f"of {', '.join(MECHANISMS)} (default: all; with --stream unix)",
    )
    parser.add_argument(
        "--language",
        type=chosen(tuple(LANGUAGES)),
        default=list(LANGUAGES),
        metavar="L,L",
        help="of both peers, or with --stream of the client: cpp, py (default: both)",
    )
    parser.add_argument(
        "--size", type=size, default=64, metavar="BYTES", help="as 64, 4KiB, 1MiB (default 64)"
    )
    parser.add_argument(
        "--rounds", type=round_count, default=5, metavar="N", help="default 5; 10 to be sure"
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="items/s instead; over bare streams, if there are (shm: over the bare ping-pong)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, on one line")
    return parser


def overhead(words: Sequence[str]) -> int:
    """The program; 1 if a cell failed."""
    asked = make_parser().parse_args(words)
    if asked.stream:
        cells = [
            Cell(transport, client, server, "block" * (transport in NO_SPIN), "cross-core")
            for transport in asked.transport or ["unix"]
            for client, server in STREAM_PAIRINGS
            if client in asked.language
            if server == "cpp" or transport in BARE_STREAMS
        ]
    else:
        cells = [
            Cell(transport, language, language, wait, placement)
            for transport, language, (wait, placement) in itertools.product(
                asked.transport or MECHANISMS, asked.language, SETUPS
            )
            if wait != "spin" or transport not in NO_SPIN
            if wait == "spin" or transport != LINE
        ]
    step = stream_round if asked.stream else echo_round
    load = os.getloadavg()[0]
    found = measure(cells, asked.rounds, asked.size, step)
    op = "stream" if asked.stream else "echo"
    if asked.json:
        figures = {"op": op, "size_bytes": asked.size, "rounds": asked.rounds}
        machine = {"cores": os.cpu_count(), "load_average": [load, os.getloadavg()[0]]}
        document = (
            figures | machine | {"cells": [report(measured, asked.stream) for measured in found]}
        )
        print(json.dumps(document, separators=(",", ":")))
    else:
        title = (
            f"{op} of {asked.size} bytes, {asked.rounds} rounds, {os.cpu_count()} cores, "
            f"load average {load:.1f} before and {os.getloadavg()[0]:.1f} after"
        )
        console = Console()
        wide = console if console.is_terminal else Console(width=110)
        wide.print(make_table(found, title, asked.stream))
    return 1 if any(measured.failure for measured in found) else 0


if __name__ == "__main__":
    sys.exit(main(overhead))
