"""The results of a run: one JSON document, with a schema beside this file, and the raw samples.

A document explains itself: units stand in its names, each figure is a median over rounds with the
bounds of its interval, and the rounds themselves are there too. `samples.npz` holds the latencies
of each cell and round in nanoseconds; `numpy.load` reads it.
"""

import contextlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ipc_bridge.errors import Error, Status
from ipc_bridge.harness.matrix import Cell, Floor, floor_of
from ipc_bridge.harness.runner import Measured, Plan, Round, overheads
from ipc_bridge.harness.statistics import Figure, Samples, figure
from ipc_bridge.system import checked

FORMAT = 1
RESULTS = "results.json"
SAMPLES = "samples.npz"
NO_RESULTS = "no results; `ipc-bridge bench` makes them"
SCHEMA = Path(__file__).with_name("results.schema.json")

Document = dict[str, Any]


class SampleFile:
    """The .npz of a run, written round by round: what is in it stays readable when the run ends
    early, and memory holds one round of one cell at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with checked("open", path):
            self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1)

    def keep(self, cell: Cell, number: int, samples: Samples) -> None:
        """The samples of a cell in a round; none are no entry. Raises Error, as closing does, if
        they cannot be written."""
        if len(samples):
            small = samples.max() < 1 << 32
            name = f"{cell.label()}/{number}.npy"
            with checked("write", self._path), self._zip.open(name, "w") as file:
                np.lib.format.write_array(file, samples.astype("<u4" if small else "<u8"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        with checked("write", self._path):
            self._zip.close()


# --- making a document ---


def document(
    plan: Plan,
    measured: Measured,
    skipped: Mapping[Cell, str],
    about: Mapping[str, Any],
) -> Document:
    """All of a run. `about` says when and how it was made."""
    floors = [floor for floor in plan.floors() if measured.floors.get(floor)]
    return {
        "format": FORMAT,
        **about,
        "plan": {
            "rounds": plan.rounds,
            "duration_s": plan.duration_s,
            "warmup_s": plan.warmup_s,
            "seed": plan.seed,
            "connect": plan.connect,
        },
        "rounds": measured.rounds,
        "floors": [floor_entry(floor, measured.floors[floor]) for floor in floors],
        "cells": [cell_entry(cell, measured) for cell in plan.cells],
        "skipped": [{**describe(cell), "reason": reason} for cell, reason in skipped.items()],
        "failures": {what.label(): text for what, text in measured.failures.items()},
    }


def describe(cell: Cell) -> dict[str, Any]:
    """A cell by its fields."""
    return {"id": cell.label(), **cell._asdict()}


def floor_entry(floor: Floor, rounds: Sequence[Round]) -> dict[str, Any]:
    """A floor and its figures."""
    name = "bytes_per_second" if floor.kind in ("memcpy", "copy") else "p50_ns"
    figures = {name: figure([one[name] for one in rounds])._asdict()}
    return {"id": floor.label(), **floor._asdict(), "figures": figures, "rounds": list(rounds)}


def cell_entry(cell: Cell, measured: Measured) -> dict[str, Any]:
    """A cell and its figures; none where it failed before its first round was over."""
    rounds, floor = measured.cells.get(cell, []), floor_of(cell)
    has_floor = floor is not None and bool(measured.floors.get(floor))
    figures = {name: figure(values)._asdict() for name, values in columns(rounds).items() if values}
    if over := overheads(measured, cell):
        figures["overhead"] = figure(over)._asdict()
    return {
        **describe(cell),
        "floor": floor.label() if floor and has_floor else None,
        "failure": measured.failures.get(cell),
        "figures": figures,
        "rounds": rounds,
    }


def columns(rounds: Sequence[Round]) -> dict[str, list[float]]:
    """Each figure by name, over rounds; empty where a round lacks it."""
    found: dict[str, list[float]] = {}
    for kind in ("latency", "age"):
        names = rounds[0][f"{kind}_ns"] if rounds and rounds[0][f"{kind}_ns"] else {}
        for name in names:
            values = [one[f"{kind}_ns"][name] for one in rounds]
            found[f"{kind}_{name}_ns"] = [] if None in values else values
    for name in ("operations_per_second", "bytes_per_second"):
        found[name] = [one[name] for one in rounds]
    for side in ("client", "server"):
        for name in ("cpu_us_per_call", "switches_per_call", "memory_peak_bytes"):
            values = [one[side] and one[side][name] for one in rounds]
            found[f"{side}_{name}"] = [] if None in values else values
    return found


def figure_of(entry: Mapping[str, Any], name: str) -> Figure | None:
    """A figure of a cell or floor in a document."""
    found = entry["figures"].get(name)
    return Figure(**found) if found else None


# --- files ---


def save(directory: Path, document: Document) -> Path:
    """Write the document; a reader never sees half of it. Raises Error if it cannot."""
    path, temporary = directory / RESULTS, directory / f"{RESULTS}.new"
    with checked("write", path):
        temporary.write_text(json.dumps(document, indent=1) + "\n")
        temporary.replace(path)
    return path


def load(where: Path) -> Document:
    """A document, by its file or directory. Raises Error: NOT_FOUND, INVALID_ARGUMENT."""
    path = where / RESULTS if where.is_dir() else where
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise Error(Status.NOT_FOUND, NO_RESULTS, str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise Error(Status.INVALID_ARGUMENT, f"not readable: {error}", str(path)) from None
    try:
        found: Document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Error(Status.INVALID_ARGUMENT, f"no JSON: {error}", str(path)) from None
    validate(found, str(path))
    return found


def newest(directory: Path) -> Path:
    """The latest run below a directory, or that directory's own. Raises Error: NOT_FOUND."""
    if (directory / RESULTS).exists() or directory.is_file():
        return directory
    found = sorted(directory.glob(f"*/{RESULTS}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise Error(Status.NOT_FOUND, NO_RESULTS, str(directory))
    return found[-1].parent


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of a document."""
    found: dict[str, Any] = json.loads(SCHEMA.read_text())
    return found


def validate(document: Document, where: str) -> None:
    """Raises Error: INVALID_ARGUMENT, which names the first fault."""
    import jsonschema  # here, as its start is slow and a run does not need it

    found = document.get("format", FORMAT) if isinstance(document, dict) else FORMAT
    if found != FORMAT:
        what = f"results of another version: format {found!s:.20}, and this one reads {FORMAT}"
        raise Error(Status.INVALID_ARGUMENT, what, where)
    fault = jsonschema.exceptions.best_match(
        jsonschema.Draft202012Validator(schema()).iter_errors(document)
    )
    if fault:
        what = f"not the results of a run: {fault.message[:200]} at {fault.json_path}"
        raise Error(Status.INVALID_ARGUMENT, what, where)


def samples_of(directory: Path, entry: Mapping[str, Any]) -> list[Samples]:
    """The raw samples of a cell, a round each; none where the file is not there, or not whole."""
    found: list[Samples] = []
    unread = (OSError, KeyError, zipfile.BadZipFile)  # the last: of a run that was ended by force
    with contextlib.suppress(*unread), np.load(directory / SAMPLES) as file:
        for one in entry["rounds"]:
            found.append(file[f"{entry['id']}/{one['round']}"])
    return found
