"""Runs the cells: rounds in a fresh order, each with fresh processes, and nothing else beside them.

Cells of one transport, pairing and wait share a server: it is moved to the core that the next cell
wants, and each cell has a client of its own. What a round measured is kept at once, so that an
interrupt loses the round under way and no more.
"""

import contextlib
import json
import os
import random
import re
import secrets
import shlex
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ipc_bridge.errors import Error
from ipc_bridge.harness.matrix import (
    Cell,
    Floor,
    core_pair,
    cores_allowed,
    floor_of,
    floors_of,
    traits,
)
from ipc_bridge.harness.programs import (
    LANGUAGES,
    ProgramError,
    Served,
    bare,
    binary,
    move,
    on_core,
    peer,
    private_directory,
    run,
    served,
    served_peer,
)
from ipc_bridge.harness.statistics import Samples, quantiles

FLOOR_S = 0.05  # of a floor's measurement
PINGS_FIRST = 1000  # of a bare program in its first round: how long one takes is not known yet
PINGS_MIN = 100
PINGS_MAX = 100_000
KEY_MARK, KEY_RANDOM_BITS = 0x1BC00000, 18  # as in doctor; bits above those that count
KEYS_EACH = 4  # at most, of a bare program of System V: the one that it is told, and the next

Round = dict[str, Any]  # the figures of one cell or floor in one round


class Launch(NamedTuple):
    """What shares one server."""

    transport: str
    client: str
    server: str
    wait: str


Step = Floor | tuple[Launch, list[Cell]]


@dataclass
class Plan:
    """What to run, and how long."""

    cells: Sequence[Cell]
    rounds: int
    duration_s: float
    warmup_s: float
    servers: Mapping[str, Sequence[str]] = field(default_factory=dict)  # of one's own: its command
    connect: str = ""  # the URL of a server that runs elsewhere; none is started then
    budget_s: float = float("inf")  # no further round is begun that would end after it
    seed: int = 0  # of the order
    with_floors: bool = True

    def floors(self) -> list[Floor]:
        """What the cells are compared with; nothing where the server is elsewhere."""
        return floors_of(self.cells) if self.with_floors and not self.connect else []

    def launches(self) -> dict[Launch, list[Cell]]:
        """The cells by what they share."""
        found = defaultdict(list)
        for cell in self.cells:
            found[Launch(cell.transport, cell.client, cell.server, cell.wait)].append(cell)
        return found

    def neighbours(self) -> list[list[Step]]:
        """The launches, each group with the floors that it alone is compared with: a machine
        drifts, and the ratio of neighbours drifts least."""
        groups: dict[Any, list[Step]] = defaultdict(list)
        users: dict[Floor | None, set[Any]] = defaultdict(set)
        for launch, cells in self.launches().items():
            group = launch.transport, launch.wait
            groups[group].append((launch, cells))
            for cell in cells:
                users[floor_of(cell)].add(group)
        for floor in self.floors():
            group, *others = users[floor] or {floor}
            groups[floor if others else group].append(floor)
        return [*groups.values()]


@dataclass
class Measured:
    """All rounds of all cells and floors, and what failed."""

    cells: dict[Cell, list[Round]] = field(default_factory=lambda: defaultdict(list))
    floors: dict[Floor, list[Round]] = field(default_factory=lambda: defaultdict(list))
    failures: dict[Cell | Floor, str] = field(default_factory=dict)
    rounds: int = 0  # complete ones


KeepSamples = Callable[[Cell, int, Samples], None]
Progress = Callable[[int, int, str], None]  # the steps done, those of a round, what comes now
RoundDone = Callable[[], None]


class Runner:
    """One run of a plan."""

    def __init__(
        self,
        plan: Plan,
        keep: KeepSamples,
        progress: Progress,
        round_done: RoundDone = lambda: None,
    ) -> None:
        self.measured = Measured()
        self._plan = plan
        self._keep = keep
        self._progress = progress
        self._round_done = round_done
        self._client_core, self._server_core = core_pair()
        self._random = random.Random(plan.seed)
        self._began_s = time.monotonic()
        self.rounds = plan.rounds  # that the budget allows, by what those before have taken
        self._steps = self._steps_of_round = 0

    def run(self) -> None:
        """All rounds; a KeyboardInterrupt leaves `measured` as it is then."""
        while self.measured.rounds < self.rounds:
            number = self.measured.rounds + 1
            self._round(number)
            self.measured.rounds = number
            self._round_done()
            affordable = self._plan.budget_s * number / (time.monotonic() - self._began_s)
            self.rounds = max(number, int(min(self._plan.rounds, affordable)))

    def _round(self, number: int) -> None:
        self._steps, self._steps_of_round = 0, len(self._plan.cells) + len(self._plan.floors())
        neighbours = self._plan.neighbours()
        self._random.shuffle(neighbours)
        for steps in neighbours:
            self._random.shuffle(steps)
            for step in steps:
                if isinstance(step, Floor):
                    self._step(step, number)
                    self._floor(step, number)
                else:
                    launch, cells = step
                    self._random.shuffle(cells)
                    self._launch(launch, cells, number)
        self._progress(self._steps_of_round, self._steps_of_round, f"round {number}")

    def _step(self, what: Cell | Floor, number: int) -> None:
        self._progress(self._steps, self._steps_of_round, f"round {number}: {what.label()}")
        self._steps += 1

    # --- one launch ---

    def _launch(self, launch: Launch, cells: Sequence[Cell], number: int) -> None:
        """Measure its cells. One that fails is not repeated; the others get a new server."""
        left = [cell for cell in cells if cell not in self.measured.failures]
        while left:
            try:
                with private_directory() as directory, self._server(launch, directory) as server:
                    while left:
                        self._step(left[0], number)
                        self._cell(left[0], number, server, os.path.join(directory, "samples"))
                        del left[0]
            except (ProgramError, Error) as error:
                failed = left.pop(0) if left else cells[-1]  # after the last: as the server ended
                self.measured.failures[failed] = str(error)

    def _server(self, launch: Launch, directory: str) -> contextlib.AbstractContextManager[Served]:
        if self._plan.connect:  # it is there already, and not ours to end
            return contextlib.nullcontext(Served(self._plan.connect, 0))
        if launch.server in LANGUAGES:
            words = [*peer(launch.server), "serve"]
        else:
            words = [*self._plan.servers[launch.server]]
        path = os.path.join(directory, "server")
        # A library that has but one way to wait is not asked for it.
        wait = launch.wait if len(traits(launch.transport).waits) > 1 else ""
        return served_peer(launch.transport, words, path, wait)

    def _cell(self, cell: Cell, number: int, server: Served, samples_path: str) -> None:
        client_core, server_core = self._cores(cell.placement)
        url = server.address
        if server.pid:
            move(server.pid, cores_allowed() if server_core is None else [server_core])
        elif cell.transport == "stdio" and not self._plan.connect:
            head, blank, command = url.partition(" ")
            url = f"{head}{blank}{shlex.join(on_core(server_core))} {command}"
        words = [*peer(cell.client), "bench", url, "--op", cell.op, "--json"]
        words += ["--size", str(cell.size_bytes), "--samples", samples_path]
        words += ["--duration", decimal(self._plan.duration_s)]
        words += ["--warmup", decimal(self._plan.warmup_s), "--clients", str(cell.clients)]
        words += ["--rate", decimal(cell.rate_hz)] if cell.rate_hz else []
        words += ["--work", decimal(cell.work_s)] if cell.work_s else []
        if not self._plan.connect:
            words += ["--server-pid", str(server.pid or "child")]
        asked_s = self._plan.duration_s + self._plan.warmup_s
        answer = json.loads(run(words, client_core, asked_s))
        if not answer["operations"]:
            raise ProgramError(f"no {cell.op} was complete within {self._plan.duration_s:g} s")
        samples = np.fromfile(samples_path, dtype="<u8")
        self._keep(cell, number, samples)
        self.measured.cells[cell].append(round_of(answer, samples, number))

    def _cores(self, placement: str) -> tuple[int | None, int | None]:
        """Of client and server; None: where the system puts them."""
        if placement == "free":
            return None, None
        if placement == "same-core":
            return self._client_core, self._client_core
        return self._client_core, self._server_core

    # --- one floor ---

    def _floor(self, floor: Floor, number: int) -> None:
        if floor in self.measured.failures:
            return
        try:
            figures = self._bare(floor) if floor.kind == "bare" else self._machine(floor)
            self.measured.floors[floor].append({"round": number, **figures})
        except (ProgramError, Error) as error:
            self.measured.failures[floor] = str(error)

    def _bare(self, floor: Floor) -> Round:
        """The bare program, against itself, in C++."""
        client_core, server_core = self._cores(floor.placement)
        program = bare(floor.mechanism, "cpp")
        message = [str(floor.size_bytes), floor.wait]
        pings = str(self._pings(floor))
        with private_directory() as directory:
            if floor.mechanism == "stdio_pipe":
                command = ["--", *on_core(server_core), *program, "serve", *message]
                out = run([*program, "ping", *message, pings, *command], client_core)
            else:
                with address_of(floor.mechanism, directory, floor.address) as address:
                    serve = [*program, "serve", address, *message]
                    with served(serve, server_core) as server:
                        ping = [*program, "ping", server.address, *message, pings]
                        out = run(ping, client_core)
        return {"p50_ns": printed(out, "p50_ns")}

    def _pings(self, floor: Floor) -> int:
        rounds = self.measured.floors[floor]
        if not rounds:
            return max(PINGS_MIN, PINGS_FIRST >> (floor.size_bytes >> 16).bit_length())
        return max(PINGS_MIN, min(PINGS_MAX, int(FLOOR_S * 1e9 / rounds[-1]["p50_ns"])))

    def _machine(self, floor: Floor) -> Round:
        """A line, or bytes, through memory."""
        client_core, server_core = map(str, self._cores(floor.placement))
        words = [binary("ipc-bridge-floors"), floor.kind, client_core]
        words += [server_core] if floor.kind != "memcpy" else []
        words += [str(floor.size_bytes)] if floor.kind != "line" else []
        name = "p50_ns" if floor.kind == "line" else "bytes_per_second"
        return {name: printed(run([*words, decimal(FLOOR_S)]), name)}


@contextlib.contextmanager
def address_of(mechanism: str, directory: str, kind: str = "") -> Iterator[str]:
    """For a bare server: a port of its choice, keys of objects, a target of gRPC, or a path. `kind`
    is that of a floor's address."""
    if not mechanism.startswith("sysv_"):
        path = os.path.join(directory, "bare")
        paths = {"tcp": "0", "grpc_rpc": f"unix:{path}"}
        ports = {"zeromq": "tcp://127.0.0.1:*", "grpc_rpc": "127.0.0.1:0"}
        yield (ports if kind == "tcp" else paths).get(mechanism, path)
        return
    # With the mark of this project, so that doctor finds what an end by force leaves.
    key = KEY_MARK | secrets.randbits(KEY_RANDOM_BITS) * KEYS_EACH
    try:
        yield str(key)
    finally:  # a bare server that was ended has removed nothing
        keys = map(str, range(key, key + KEYS_EACH))
        words = [word for one in keys for word in ("-Q", one, "-M", one, "-S", one)]
        subprocess.run(["ipcrm", *words], capture_output=True, check=False)


def decimal(value: float) -> str:
    """As the peers read numbers: without an exponent."""
    return f"{value:.9f}".rstrip("0").rstrip(".")


def printed(text: str, name: str) -> float:
    """A figure of a bare program."""
    match = re.search(rf"{name}=(\d+)", text)
    if not match:
        raise ProgramError(f"no {name} in: {text.strip()}")
    return float(match[1])


def round_of(answer: Mapping[str, Any], samples: Samples, number: int) -> Round:
    """The figures of one cell in one round, from what the client says and its samples."""
    calls = answer["operations"] + answer["operations_warmup"]
    used = answer["cpu_s"]

    def cost(usage: Mapping[str, Any], cpu_s: float) -> dict[str, float]:
        return {
            "cpu_us_per_call": cpu_s * 1e6 / calls,
            "switches_per_call": sum(usage["context_switches"].values()) / calls,
            "memory_peak_bytes": usage["memory_peak_bytes"],
        }

    server = answer["server"]
    return {
        "round": number,
        "operations": answer["operations"],
        "seconds": answer["seconds"],
        "operations_per_second": answer["operations_per_second"],
        "bytes_per_second": answer["bytes_per_second"],
        "errors": answer["errors"],
        "verification_failures": answer["verification_failures"],
        "latency_ns": quantiles(samples) if len(samples) else None,
        "age_ns": answer["age_ns"] if answer["age_ns"]["p50"] is not None else None,
        "client": cost(answer, used["user"] + used["system"]),
        "server": cost(server, server["cpu_s"]) if server else None,
    }


def overheads(measured: Measured, cell: Cell) -> list[float]:
    """How many times its floor a cell takes, in each round that has both."""
    floor = floor_of(cell)
    if floor is None:
        return []
    return ratios(measured.cells[cell], measured.floors.get(floor, []), cell.op)


def ratios(rounds: Sequence[Round], floors: Sequence[Round], op: str) -> list[float]:
    """Of a cell to its floor; above 1 it is slower."""
    by_number = {floor["round"]: floor for floor in floors}
    found = []
    for figures in rounds:
        floor = by_number.get(figures["round"])
        if floor is None:
            continue
        if op == "echo":
            found.append(figures["latency_ns"]["p50"] / floor["p50_ns"])
        else:
            found.append(floor["bytes_per_second"] / figures["bytes_per_second"])
    return found
