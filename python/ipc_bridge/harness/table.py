"""The results on a terminal, and as Markdown: a table for each setting, transports by pairings."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ipc_bridge.harness import environment
from ipc_bridge.harness.matrix import Cell, setting_label
from ipc_bridge.harness.programs import LANGUAGES
from ipc_bridge.harness.results import Document, figure_of
from ipc_bridge.harness.statistics import ROUNDS_MIN, Figure, ranks, unknown

WIDTH_OFF_TERMINAL = 130
OVERHEADS = "each / C++ floor"  # the name of a column
Entry = dict[str, Any]


class Group:
    """The cells of one setting, to be compared with each other."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self.cell = cell_of(entries[0])
        self.name, self.best_is_low, self.unit = main_figure(self.cell)
        self.pairings = [*dict.fromkeys((one["client"], one["server"]) for one in entries)]
        self.transports = [*dict.fromkeys(one["transport"] for one in entries)]

    def title(self) -> str:
        """What all its cells share."""
        return setting_label(self.cell)

    def quantity(self) -> str:
        """What its main figure is a figure of, with the unit."""
        if self.unit != "us":
            return {"items/s": "items a second", "MB/s": "MB a second"}[self.unit]
        one_way = "" if self.cell.op == "echo" else "one-way "
        return f"median {one_way}latency in us"

    def find(self, transport: str, pairing: tuple[str, str]) -> Entry | None:
        """One cell."""
        for one in self.entries:
            if (one["transport"], one["client"], one["server"]) == (transport, *pairing):
                return one
        return None

    def figure(self, transport: str, pairing: tuple[str, str], name: str = "") -> Figure | None:
        """One figure of a cell, the main one unless told; None too if the cell has failed: it may
        have been quick and wrong in the rounds before."""
        entry = self.find(transport, pairing)
        return sound_figure(entry, name or self.name) if entry else None

    def figures(self, pairing: tuple[str, str]) -> dict[str, Figure]:
        """The main figure of each transport, for one pairing."""
        found = ((transport, self.figure(transport, pairing)) for transport in self.transports)
        return {transport: figure for transport, figure in found if figure}

    def places(
        self, pairing: tuple[str, str], among: Sequence[str] | None = None
    ) -> dict[str, tuple[int, int]]:
        """The place of each transport (among some), as a range where it is a tie: with all others,
        if the rounds are too few for an interval."""
        figures = self.figures(pairing)
        for name, found in figures.items():
            entry = self.find(name, pairing)
            if entry and len(entry["rounds"]) < ROUNDS_MIN:
                figures[name] = unknown(found.value)
        some = {name: figures[name] for name in among or () if name in figures}
        return ranks(figures if among is None else some, self.best_is_low)


def sound_figure(entry: Entry, name: str) -> Figure | None:
    """A figure of a cell; None too if the cell has failed."""
    return None if entry["failure"] else figure_of(entry, name)


def cell_of(entry: Entry) -> Cell:
    """The cell of an entry in a document."""
    return Cell(**{name: entry[name] for name in Cell._fields})


def main_figure(cell: Cell) -> tuple[str, bool, str]:
    """What cells like this are compared by: its name, whether less is better, its unit."""
    if cell.op == "echo" or cell.rate_hz:
        return "latency_p50_ns", True, "us"
    if cell.size_bytes < 4096:
        return "operations_per_second", False, "items/s"
    return "bytes_per_second", False, "MB/s"


def groups(document: Document) -> list[Group]:
    """All settings of a run."""
    found: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in document["cells"]:
        found.setdefault(cell_of(entry).setting(), []).append(entry)
    return [Group(entries) for entries in found.values()]


def pairing_label(pairing: tuple[str, str]) -> str:
    """C++ -> Python."""
    return " -> ".join(LANGUAGES.get(name, name) for name in pairing)


def scaled(value: float, unit: str) -> str:
    """A figure as it is shown: three digits that count."""
    value = value / {"us": 1e3, "MB/s": 1e6}.get(unit, 1)
    if value >= 100 or unit in ("items/s", "MB/s"):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def place(places: tuple[int, int]) -> str:
    """1, or 2-4 where it is a tie."""
    best, worst = places
    return str(best) if best == worst else f"{best}-{worst}"


def make_table(group: Group) -> Table:
    """One setting."""
    title = f"{group.title()}: {group.quantity()} (place; 2-4 is a tie)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    table.add_column("client -> server")  # where it is narrow, a figure's place is below it
    places = {}
    for pairing in group.pairings:
        places[pairing] = group.places(pairing)
        table.add_column(pairing_label(pairing), justify="right")
    table.add_column(OVERHEADS, justify="right")
    for transport in group.transports:
        row = [transport]
        for pairing in group.pairings:
            entry = group.find(transport, pairing)
            row.append(shown(entry, group, places[pairing].get(transport)))
        table.add_row(*row, over_floor(group, transport))
    return table


def shown(entry: Entry | None, group: Group, places: tuple[int, int] | None) -> str:
    """One figure, and its place."""
    if entry is None:
        return "-"
    if entry["failure"]:
        return "failed"
    value = figure_of(entry, group.name)
    if value is None or places is None:
        return "-"
    return f"{scaled(value.value, group.unit)} ({place(places)})"


def over_floor(group: Group, transport: str) -> str:
    """How many times the floor each pairing takes, in the order of the columns; "-": none has one.
    The floors are those of C++, whatever the pairing's languages: so much does Python add to the
    mechanism alone."""
    found = [group.figure(transport, pairing, "overhead") for pairing in group.pairings]
    return " ".join(scaled(one.value, "") if one else "-" for one in found) if any(found) else "-"


def doubts(document: Document) -> list[str]:
    """Why to trust the figures less: what the machine did, and where the peers ran."""
    placements = {entry["placement"] for entry in document["cells"] if entry["rounds"]}
    return [*document["warnings"], *environment.unpinned(placements)]


def print_results(console: Console, document: Document) -> None:
    """All tables, what failed, what was skipped, and the warnings."""
    is_shown = console.is_terminal or console.quiet
    wide = console if is_shown else Console(width=WIDTH_OFF_TERMINAL)
    for group in groups(document):
        wide.print(make_table(group))
    machine = [one for one in document["floors"] if one["kind"] != "bare"]
    for floor in machine:
        name, unit = ("p50_ns", "us") if floor["kind"] == "line" else ("bytes_per_second", "MB/s")
        value = figure_of(floor, name)
        if value:
            console.out(
                f"floor: {floor['id']}  {scaled(value.value, unit)} {unit}", highlight=False
            )
    reasons: dict[str, int] = {}
    for one in document["skipped"]:
        reasons[one["reason"]] = reasons.get(one["reason"], 0) + 1
    for reason, count in reasons.items():
        console.out(f"skipped: {count} cells: {reason}", highlight=False)
    for what, text in document["failures"].items():
        console.out(f"failed: {what}: {'; '.join(text.splitlines())}", style="red", highlight=False)
    for text in doubts(document):
        console.out(f"warning: {text}", style="yellow", highlight=False)
