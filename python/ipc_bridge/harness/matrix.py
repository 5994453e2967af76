"""What is measured: cells, the axes they come from, the profiles, and what cannot be run here.

A cell is one figure of the comparison: a transport, a pairing, an operation, and how it is run. Its
floor is what the mechanism alone takes, by the bare program in C++, or for a stream the speed at
which bytes can be copied into and out of shared memory.
"""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ipc_bridge.endpoint import SCHEMES
from ipc_bridge.harness.programs import LANGUAGES, PAIRINGS, build_dir

OPS = ("echo", "stream")
WAITS = ("block", "spin", "adaptive")
PLACEMENTS = ("same-core", "cross-core", "free")
CLIENTS_MAX = 1024  # those of the peers' bench
SIZE_BYTES_MAX = 64 << 20  # what a peer takes by default
STAMP_BYTES = 8  # of a paced item
SMALL, LARGE = 64, 64 << 10


class Traits(NamedTuple):
    """What the harness must know of a scheme."""

    bare: str  # the stem of the bare program that shows its mechanism; "": there is none
    waits: tuple[str, ...] = WAITS
    clients_max: int = CLIENTS_MAX
    across_hosts: bool = False
    needs_library: tuple[str, ...] = ()  # the languages whose own libraries do not do


BOTH = tuple(LANGUAGES)
TRAITS = {
    "stdio": Traits("stdio_pipe", clients_max=1),
    "tcp": Traits("tcp", across_hosts=True),
    "shm": Traits("shm_ring"),
    "sysv-queue": Traits("sysv_queue", needs_library=("py",)),  # sysv-ipc
    "sysv-shm": Traits("sysv_shm", needs_library=("py",)),
    "zmq+ipc": Traits("zeromq", waits=("block",), needs_library=BOTH),
    "zmq+tcp": Traits("zeromq", waits=("block",), needs_library=BOTH, across_hosts=True),
    "grpc+unix": Traits("grpc_rpc", waits=("block",), needs_library=BOTH),
    "grpc+tcp": Traits("grpc_rpc", waits=("block",), needs_library=BOTH, across_hosts=True),
}


def traits(scheme: str) -> Traits:
    """Of a scheme; the table above names what is special."""
    return TRAITS.get(scheme, Traits(scheme.replace("-", "_")))


class Cell(NamedTuple):
    """One figure of the comparison."""

    transport: str
    client: str  # a language
    server: str  # a language, or the name of a server of one's own
    op: str
    size_bytes: int
    wait: str
    placement: str
    clients: int = 1
    rate_hz: float = 0.0  # of all clients; 0: as fast as the answers come
    work_s: float = 0.0  # of a stream's consumer, asleep after each item

    def pairing(self) -> str:
        """As it is written on the command line."""
        return f"{self.client}-{self.server}"

    def setting(self) -> tuple[Any, ...]:
        """All but transport and pairing: what cells must share to be compared."""
        return self[3:]

    def label(self) -> str:
        """For people, and the name of a cell in the results."""
        return f"{self.transport} {self.pairing()} {setting_label(self)}"


def setting_label(cell: Cell) -> str:
    """All but transport and pairing, for people."""
    words = [cell.op, size_text(cell.size_bytes), cell.wait, cell.placement]
    words += [f"{cell.clients} clients"] if cell.clients > 1 else []
    words += [f"{cell.rate_hz:g}/s"] if cell.rate_hz else []
    words += [f"work {cell.work_s:g}s"] if cell.work_s else []
    return " ".join(words)


def size_text(size_bytes: int) -> str:
    """64B, 4KiB, 1MiB: the largest unit that leaves no rest."""
    for unit, name in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if size_bytes >= unit and size_bytes % unit == 0:
            return f"{size_bytes // unit}{name}"
    return f"{size_bytes}B"


# --- floors ---


class Floor(NamedTuple):
    """What no protocol can beat: a mechanism alone, or the machine's own memory."""

    kind: str  # "bare" round trip, cache "line" round trip, "memcpy" or "copy" through memory
    mechanism: str  # of a bare program, else ""
    size_bytes: int
    wait: str
    placement: str
    address: str = ""  # "tcp": at a port, of a mechanism that has other addresses too

    def label(self) -> str:
        """For people, and the name of a floor in the results."""
        size = size_text(self.size_bytes) if self.kind != "line" else ""
        words = (self.kind, self.mechanism, self.address, size, self.wait, self.placement)
        return " ".join(word for word in words if word)


def floor_of(cell: Cell) -> Floor | None:
    """What a cell is compared with; None: nothing."""
    if cell.op == "stream":
        if cell.rate_hz or cell.work_s or not cell.size_bytes:
            return None
        placement = cell.placement
        if placement == "free":  # on both cores, where it may be
            placement = "cross-core" if len(cores_allowed()) > 1 else "same-core"
        return Floor("copy", "", cell.size_bytes, "", placement)
    mechanism = traits(cell.transport).bare
    if not mechanism or not cell.size_bytes or not (build_dir() / "bare" / mechanism).exists():
        return None
    wait = cell.wait
    if wait == "adaptive":  # at best it is as quick as the one or the other
        is_alone = cell.placement == "same-core" or len(cores_allowed()) < 2
        wait = "block" if is_alone else "spin"
    address = "tcp" if cell.transport.endswith("+tcp") else ""
    return Floor("bare", mechanism, cell.size_bytes, wait, cell.placement, address)


def floors_of(cells: Iterable[Cell]) -> list[Floor]:
    """Each once, and what the machine can do at all, beside them."""
    cells = list(cells)
    found = dict.fromkeys(floor for floor in map(floor_of, cells) if floor)
    if any(cell.placement != "same-core" for cell in cells) and len(cores_allowed()) > 1:
        found[Floor("line", "", 0, "spin", "cross-core")] = None
    for cell in cells:
        if cell.op == "stream" and cell.size_bytes:
            found[Floor("memcpy", "", cell.size_bytes, "", "same-core")] = None
    return [*found]


# --- profiles and their axes ---

Axes = dict[str, list[Any]]  # the name of a field of Cell, or "pairing": its values

ALL: Axes = {
    "transport": [*SCHEMES],
    "pairing": [f"{client}-{server}" for client, server in PAIRINGS],
}


class Profile(NamedTuple):
    """A matrix, as a union of products, and the time it takes."""

    blocks: tuple[Axes, ...]
    rounds: int
    duration_s: float  # of one measurement
    warmup_s: float


PROFILES = {
    "quick": Profile(
        (
            ALL | {"op": ["echo"], "size_bytes": [SMALL], "placement": ["same-core"]},
            ALL | {"op": ["stream"], "size_bytes": [LARGE], "placement": ["cross-core"]},
        ),
        rounds=5,
        duration_s=0.08,
        warmup_s=0.03,
    ),
    "full": Profile(
        (
            ALL
            | {
                "op": ["echo"],
                "size_bytes": [SMALL, 4 << 10, LARGE, 1 << 20],
                "wait": ["block", "spin", "adaptive"],
                "placement": ["same-core", "cross-core"],
            },
            ALL
            | {
                "op": ["stream"],
                "size_bytes": [SMALL, 4 << 10, LARGE, 1 << 20],
                "wait": ["block", "spin", "adaptive"],
                "placement": ["cross-core"],
            },
        ),
        rounds=10,
        duration_s=0.3,
        warmup_s=0.1,
    ),
}
DEFAULTS: Axes = {"wait": ["block"], "clients": [1], "rate_hz": [0.0], "work_s": [0.0]}


def cells_of(profile: Profile, chosen: Axes) -> list[Cell]:
    """All cells of a profile, with the axes that were chosen instead of its own."""
    found: dict[Cell, None] = {}
    for block in profile.blocks:
        axes = {**DEFAULTS, **block, **chosen}
        if not set(block["op"]) & set(axes["op"]):
            continue
        if "op" in chosen:  # a block's sizes and placements are meant for its own op
            axes["op"] = [op for op in block["op"] if op in chosen["op"]]
        for values in itertools.product(*axes.values()):
            found[make_cell(dict(zip(axes, values, strict=True)))] = None
    return [*found]


def make_cell(values: Mapping[str, Any]) -> Cell:
    """From the values of all axes."""
    fields = dict(values)
    client, _, server = fields.pop("pairing").partition("-")
    if fields["op"] == "echo":
        fields["work_s"] = 0.0
    return Cell(client=client, server=server, **fields)


# --- what cannot be run ---


def reason_to_skip(cell: Cell, cores: int, servers: Mapping[str, Sequence[str]]) -> str:
    """Why this cell is none here; "": it is one. `cores` may be used; `servers` are one's own."""
    known = traits(cell.transport)
    if cell.placement == "cross-core" and cores < 2:
        return "needs two cores, and one may be used"
    if cell.wait not in known.waits:
        return f"{cell.transport} cannot {cell.wait}: its library's own threads wait"
    if cell.wait == "spin" and (cell.placement == "same-core" or cores < 2):
        return "two that spin on one core only wait for each other's time to end"
    if cell.clients > known.clients_max:
        return f"a server of {cell.transport} has {known.clients_max} client"
    if cell.server not in LANGUAGES and cell.server not in servers:
        return f"there is no server {cell.server}"
    if "cpp" in (cell.client, cell.server) and not Path(build_dir(), "ipc-bridge-peer").exists():
        return "the C++ peer is not built; run `make build`"
    if cell.rate_hz and cell.op == "stream" and cell.size_bytes < STAMP_BYTES:
        return f"a paced item holds its time: {STAMP_BYTES} bytes at least"
    return ""


def cores_allowed() -> list[int]:
    """Those that this process may use."""
    return sorted(os.sched_getaffinity(0))


def core_pair() -> tuple[int, int]:
    """For the two peers: of two physical cores if there are two, not two threads of one."""
    allowed = cores_allowed()
    first, siblings = allowed[0], set()
    path = Path(f"/sys/devices/system/cpu/cpu{first}/topology/thread_siblings_list")
    try:
        for part in path.read_text().strip().split(","):
            low, _, high = part.partition("-")
            siblings |= set(range(int(low), int(high or low) + 1))
    except (OSError, ValueError):
        siblings = {first}
    others = [core for core in allowed if core not in siblings] or allowed[1:] or [first]
    return first, others[0]
