"""`ipc-bridge report`: pictures and a page of a run.

The page is one file that loads nothing: its plots are in it, the same as beside it.
"""

import base64
import io
import re
import shlex
from pathlib import Path
from typing import Any

import click
from jinja2 import Environment, PackageLoader, StrictUndefined

from ipc_bridge.errors import Error, SystemError
from ipc_bridge.harness.bench import RESULTS_DIR
from ipc_bridge.harness.matrix import LARGE, SMALL
from ipc_bridge.harness.options import RESULTS
from ipc_bridge.harness.plots import Plot, plots
from ipc_bridge.harness.programs import PAIRINGS
from ipc_bridge.harness.recommend import Wanted, recommend_from, title_of
from ipc_bridge.harness.results import Document, figure_of, load, newest
from ipc_bridge.harness.statistics import ROUNDS_MIN
from ipc_bridge.harness.table import (
    OVERHEADS,
    Entry,
    Group,
    doubts,
    groups,
    over_floor,
    pairing_label,
    place,
    scaled,
    shown,
    sound_figure,
)

PAGE = "report.html"
MARKDOWN = "report.md"
DPI = 200  # of the PNGs
INCH = 96  # of a page, in pixels
COLUMNS = {  # of the tables: the name of a figure, and its unit
    "p50 us": ("latency_p50_ns", "us"),
    "p90 us": ("latency_p90_ns", "us"),
    "p99 us": ("latency_p99_ns", "us"),
    "p99.9 us": ("latency_p99_9_ns", "us"),
    "max us": ("latency_max_ns", "us"),
    "age p50 us": ("age_p50_ns", "us"),
    "age p99 us": ("age_p99_ns", "us"),
    "a second": ("operations_per_second", "items/s"),
    "MB/s": ("bytes_per_second", "MB/s"),
    "/ floor": ("overhead", ""),
    "client CPU us": ("client_cpu_us_per_call", ""),
    "server CPU us": ("server_cpu_us_per_call", ""),
    "client switches": ("client_switches_per_call", ""),
    "server switches": ("server_switches_per_call", ""),
    "client MB": ("client_memory_peak_bytes", "MB/s"),
    "server MB": ("server_memory_peak_bytes", "MB/s"),
}


@click.command()
@click.argument("results", type=RESULTS, default=RESULTS_DIR)
@click.option("-o", "--out", type=RESULTS, help="directory (default: report/ beside the results)")
def report(results: Path, out: Path | None) -> int:
    """Make report.html, report.md and the plots of RESULTS, or of the newest run below it."""
    where = newest(results)
    document = load(where)
    directory = out or (where if where.is_dir() else where.parent) / "report"
    try:
        write(document, directory)
    except OSError as error:
        at = str(error.filename or directory)
        raise SystemError("write", error.errno or 0, at) from None
    click.echo(f"page: {directory / PAGE}")
    click.echo(f"table: {directory / MARKDOWN}")
    return 0


def write(document: Document, directory: Path) -> None:
    """All files of a report."""
    directory.mkdir(parents=True, exist_ok=True)
    sections: dict[str, list[dict[str, Any]]] = {}
    for plot in plots(document):
        sections.setdefault(plot.section, []).append(save(plot, directory))
    template = Environment(
        loader=PackageLoader("ipc_bridge.harness", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    ).get_template(f"{PAGE}.j2")
    page = template.render(
        document=document,
        caveats=caveats(document),
        choices=choices(document),
        tables=[table_of(group) for group in groups(document)],
        sections=[
            {"name": name, "id": re.sub("[^a-z]+", "-", name.lower()), "plots": found}
            for name, found in sections.items()
        ],
        facts=facts(document),
        floors=[floor_row(floor) for floor in document["floors"]],
        skipped=skipped(document),
        command=shlex.join(document["command"]),
    )
    (directory / PAGE).write_text(page)
    (directory / MARKDOWN).write_text(markdown(document))


def save(plot: Plot, directory: Path) -> dict[str, Any]:
    """As SVG and PNG; what the page needs of it."""
    for ending in ("svg", "png"):
        metadata = {"Date": None} if ending == "svg" else None
        path = directory / f"{plot.name}.{ending}"
        plot.canvas.savefig(path, dpi=DPI, metadata=metadata)
    drawn = io.BytesIO((directory / f"{plot.name}.svg").read_bytes()).read()
    width, height = plot.canvas.get_size_inches() * INCH
    return {
        "uri": f"data:image/svg+xml;base64,{base64.b64encode(drawn).decode()}",
        "title": plot.title,
        "text": plot.text,
        "width": round(width),
        "height": round(height),
    }


# --- what the page says ---


def caveats(document: Document) -> list[str]:
    """Why to trust the figures less."""
    found = [text[0].upper() + text[1:] + "." for text in doubts(document)]
    if document["rounds"] < ROUNDS_MIN:
        found.append("Fewer than five complete rounds: the intervals say little, and all is a tie.")
    if document["interrupted"]:
        found.append("The run was interrupted: later rounds are missing.")
    if document["failures"]:
        found.append(f"{len(document['failures'])} cells or floors failed: see the end.")
    return found


def choices(document: Document) -> list[dict[str, Any]]:
    """The recommendation for the two common needs, in each pairing that was measured."""
    found = []
    for op, size_bytes in (("echo", SMALL), ("stream", LARGE)):
        for pairing in PAIRINGS:
            wanted = Wanted(op, size_bytes, pairing)
            try:
                group, ranked = recommend_from(document, wanted)
            except Error:  # not measured
                continue
            found.append({"title": title_of(wanted, group), "found": ranked[:3]})
    return found


def table_of(group: Group) -> dict[str, Any]:
    """All figures of one setting, with the intervals of the main one."""
    names = [
        name
        for name, (figure, _) in COLUMNS.items()
        if any(figure in entry["figures"] for entry in group.entries)
    ]
    places = {pairing: group.places(pairing) for pairing in group.pairings}
    rows = []
    for entry in group.entries:
        pairing = (entry["client"], entry["server"])
        mine = places[pairing].get(entry["transport"])
        rows.append(
            {
                "transport": entry["transport"],
                "pairing": pairing_label(pairing),
                "best": mine is not None and mine[0] == 1,
                "cells": [
                    "failed" if entry["failure"] else place(mine) if mine else "-",
                    *(value(entry, name, group) for name in names),
                ],
            }
        )
    return {"title": group.title(), "names": ["place", *names], "rows": rows}


def value(entry: Entry, column: str, group: Group) -> str:
    """A figure, with its interval if cells are compared by it."""
    name, unit = COLUMNS[column]
    found = sound_figure(entry, name)
    if found is None:
        return "-"
    text = scaled(found.value, unit)
    if name == group.name:
        text += f" [{scaled(found.low, unit)}, {scaled(found.high, unit)}]"
    return text


def facts(document: Document) -> list[tuple[str, str]]:
    """The machine, the software, and what happened meanwhile."""
    found: list[tuple[str, str]] = []
    for kind in ("machine", "software", "noise", "plan"):
        for name, fact in document[kind].items():
            if isinstance(fact, dict):
                fact = "; ".join(f"{key}: {one}" for key, one in fact.items())
            elif isinstance(fact, float):
                fact = f"{fact:.4g}"
            found.append((name.replace("_", " "), str(fact) if fact not in ("", None) else "-"))
    return found


def floor_row(floor: Entry) -> dict[str, str]:
    """A floor, and its interval."""
    name = "p50_ns" if "p50_ns" in floor["figures"] else "bytes_per_second"
    unit = "us" if name == "p50_ns" else "MB/s"
    found = figure_of(floor, name)
    assert found is not None
    low, high = scaled(found.low, unit), scaled(found.high, unit)
    return {
        "id": floor["id"],
        "value": f"{scaled(found.value, unit)} {unit}",
        "interval": f"{low} to {high}",
    }


def skipped(document: Document) -> dict[str, list[str]]:
    """By reason."""
    found: dict[str, list[str]] = {}
    for one in document["skipped"]:
        found.setdefault(one["reason"], []).append(one["id"])
    return found


# --- Markdown ---


def markdown(document: Document) -> str:
    """The main figures, a table a setting."""
    machine, software = document["machine"], document["software"]
    lines = [
        f"{machine['cpu']}, {machine['cores_allowed']} cores"
        f"{', virtual' if machine['virtual'] else ''}; {software['system']}, {software['kernel']}; "
        f"{software['python']}; {software['compiler']}; {document['created'][:10]}, "
        f"{document['rounds']} rounds. In brackets: the place; 2-4 is a tie. "
        "Last column: how many times the floor, in C++, each pairing takes, in their order.",
        "",
    ]
    for group in groups(document):
        lines += [f"**{group.title()}**, {group.quantity()}", "", *markdown_table(group), ""]
    lines += [f"- {text}" for text in caveats(document)]
    return "\n".join(lines) + "\n"


def markdown_table(group: Group) -> list[str]:
    """The main figures of one setting: transports by pairings."""
    heads = ["transport", *map(pairing_label, group.pairings), OVERHEADS]
    lines = [row_of(heads), row_of(["---", *["---:"] * (len(heads) - 1)])]
    places = {pairing: group.places(pairing) for pairing in group.pairings}
    for transport in group.transports:
        cells = [
            shown(group.find(transport, pairing), group, places[pairing].get(transport))
            for pairing in group.pairings
        ]
        lines.append(row_of([f"`{transport}`", *cells, over_floor(group, transport)]))
    return lines


def row_of(cells: list[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"
