"""The plots of a report, each by itself: as wide as a phone, and legible without colour (each line
has its own marker and dashes, each bar its own hatching, each field of the heat map its figure).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Canvas
from numpy.typing import NDArray

from ipc_bridge.harness.matrix import setting_label, size_text
from ipc_bridge.harness.results import Document, figure_of
from ipc_bridge.harness.statistics import QUANTILES
from ipc_bridge.harness.table import (
    Entry,
    Group,
    cell_of,
    groups,
    pairing_label,
    scaled,
    sound_figure,
)

WIDTH, HEIGHT = 4.6, 3.4  # inches
LINE_HEIGHT = 0.24  # of a row, in inches
STYLE: Any = {
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.markersize": 4,
    "lines.linewidth": 1.2,
    "svg.hashsalt": "ipc-bridge",
}
# Okabe and Ito's colours, which people with a colour deficiency tell apart as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*X<>h"
DASHES = ("-", "--", "-.", ":")
HATCHES = ("", "////")
PAIRINGS_EACH = 4  # of a heat map; more have no room for their figures, and make further maps
LEGEND_LETTERS = 56  # of a row of a legend


class Plot(NamedTuple):
    """One picture."""

    name: str  # of its files
    section: str
    title: str
    text: str  # what it shows, for those who cannot see it
    canvas: Canvas


def style_of(number: int) -> dict[str, Any]:
    """Of the n-th line."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number % len(DASHES)],
    }


def plots(document: Document) -> list[Plot]:
    """All that the figures of a run give."""
    with mpl.rc_context(STYLE):
        found: list[Plot] = []
        for group in groups(document):
            if any(group.figures(pairing) for pairing in group.pairings):
                found += [*heat_maps(group), intervals(group), cpu(group)]
                found += [*overheads(group), *percentiles(group)]
        for draw in SIZE_PLOTS:
            found += draw(document)
    return found


def make(width: float = WIDTH, height: float = HEIGHT) -> tuple[Canvas, Axes]:
    """An empty plot."""
    canvas = Canvas(figsize=(width, height), layout="constrained")
    return canvas, canvas.add_subplot()


def plain(axis: Axis) -> None:
    """Ticks of a logarithmic axis as numbers: 20, not 2 x 10^1; between powers of ten, as many as
    there is room for."""

    def between(value: float, _: object) -> str:
        low, high = sorted(axis.get_view_interval())
        powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.log10(high))
        multiples = np.outer(powers, range(2, 10))
        seen = (low <= multiples) & (multiples <= high)
        if seen.sum() <= 1:  # so few: the ticks are even steps
            return f"{value:,g}"
        decades = np.log10(high / low)
        few = decades >= 2 or high >= 10_000  # 20,000 would touch 30,000
        shown = range(2, 10) if decades < 0.6 else (2, 5) if few else (2, 3, 5)
        return f"{value:,g}" if round(value / 10 ** np.floor(np.log10(value))) in shown else ""

    axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_minor_formatter(between)


def file_name(*words: str) -> str:
    """Of letters that every system takes."""
    text = "-".join(words).lower().replace(" ", "-").replace("/s", "hz")
    return "".join(c for c in text if c.isalnum() or c in "-.")


def legend(axes: Axes) -> None:
    """Below the plot, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    columns = max(1, LEGEND_LETTERS // (max(map(len, labels)) + 7))  # 7: a marker, and a gap
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def row_height(rows: float) -> float:
    """Of a plot with so many rows."""
    return 1.1 + LINE_HEIGHT * rows


def points_height(transports: Sequence[str], group: Group) -> float:
    """Of a plot with a row a transport, and in it a point a pairing."""
    return row_height(len(transports) * max(1.0, len(group.pairings) / PAIRINGS_EACH)) + 0.7


def beside(number: int, group: Group) -> float:
    """Of the n-th pairing's points: so far from the middle of their row, and never in another's."""
    count = len(group.pairings)
    return (number - (count - 1) / 2) * min(0.15, 0.8 / count)


# --- one setting ---


def heat_maps(group: Group) -> list[Plot]:
    """Transports by pairings, all with the same shades; the figure stands in each field."""
    values = np.full((len(group.transports), len(group.pairings)), np.nan)
    for row, transport in enumerate(group.transports):
        for column, pairing in enumerate(group.pairings):
            if found := group.figure(transport, pairing):
                values[row, column] = found.value
    shades = np.log10(values)
    low, high = float(np.nanmin(shades)), float(np.nanmax(shades))
    return [
        heat_map(group, values[:, at : at + PAIRINGS_EACH], at, low, high)
        for at in range(0, len(group.pairings), PAIRINGS_EACH)
    ]


def heat_map(group: Group, values: NDArray[np.float64], at: int, low: float, high: float) -> Plot:
    """That of the pairings from the one at `at`; `low` and `high` are what has the last shades."""
    canvas, axes = make(height=row_height(len(group.transports) + 1))
    pairings = group.pairings[at : at + PAIRINGS_EACH]
    colours = "Greys" if group.best_is_low else "Greys_r"
    shades = np.log10(values)
    axes.imshow(shades, cmap=colours, aspect="auto", alpha=0.75, vmin=low, vmax=high)
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            text, dark = "-", False
        else:
            share = (float(shades[row, column]) - low) / (high - low or 1)
            text, dark = (
                scaled(value, group.unit),
                (share if group.best_is_low else 1 - share) > 0.6,
            )
        axes.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
    names = [pairing_label(pairing).replace(" -> ", "\n-> ") for pairing in pairings]
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(group.transports)), group.transports)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    title = f"{group.title()}: {group.unit}"
    axes.set_title(title)
    best = "less" if group.best_is_low else "more"
    text = f"{group.unit} of each transport in each pairing, client -> server; {best} is better"
    name = file_name("pairings", group.title(), *([str(1 + at // PAIRINGS_EACH)] if at else []))
    return Plot(name, "Pairings", title, text, canvas)


def intervals(group: Group) -> Plot:
    """A dot and its interval for each transport, a marker a pairing."""
    canvas, axes = make(height=points_height(group.transports, group))
    factor = {"us": 1e3, "MB/s": 1e6}.get(group.unit, 1)
    for number, pairing in enumerate(group.pairings):
        points = [
            (row + beside(number, group), *found)
            for row, transport in enumerate(group.transports)
            if (found := group.figure(transport, pairing))
        ]
        if points:
            y, value, low, high = np.array(points).T
            look = style_of(number) | {"linestyle": "none", "label": pairing_label(pairing)}
            errors = np.array([value - low, high - value]) / factor
            axes.errorbar(value / factor, y, xerr=errors, elinewidth=1, **look)
    axes.set_xscale("log")
    plain(axes.xaxis)
    axes.set_yticks(range(len(group.transports)), group.transports)
    axes.invert_yaxis()
    what = group.quantity()
    axes.set_xlabel(f"{what}, log scale, 95% interval over rounds")
    axes.set_title(group.title())
    legend(axes)
    text = f"{what} of each transport and pairing, with its interval; what overlaps is a tie"
    return Plot(
        file_name("intervals", group.title()), "Latency and throughput", group.title(), text, canvas
    )


def overheads(group: Group) -> list[Plot]:
    """How many times its floor each takes."""
    have = {one["transport"] for one in group.entries if sound_figure(one, "overhead")}
    transports = [one for one in group.transports if one in have]
    if not transports:
        return []
    canvas, axes = make(height=points_height(transports, group))
    for number, pairing in enumerate(group.pairings):
        points = [
            (row + beside(number, group), *found)
            for row, transport in enumerate(transports)
            if (found := group.figure(transport, pairing, "overhead"))
        ]
        if points:
            y, value, low, high = np.array(points).T
            look = style_of(number) | {"linestyle": "none", "label": pairing_label(pairing)}
            axes.errorbar(value, y, xerr=[value - low, high - value], **look)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    plain(axes.xaxis)
    axes.set_yticks(range(len(transports)), transports)
    axes.invert_yaxis()
    floor = "bare C++ program" if group.cell.op == "echo" else "copy through shared memory"
    axes.set_xlabel(f"times the {floor}, log scale")
    axes.set_title(group.title())
    legend(axes)
    text = f"how many times as long as the {floor} each takes; 1 is the floor itself"
    name = file_name("overhead", group.title())
    return [Plot(name, "Overhead over the floor", group.title(), text, canvas)]


def cpu(group: Group) -> Plot:
    """CPU time of both peers for a call or an item, one bar a cell."""
    entries = [one for one in group.entries if sound_figure(one, "client_cpu_us_per_call")]
    entries.sort(key=lambda one: group.transports.index(one["transport"]))
    canvas, axes = make(height=row_height(len(entries)) * 0.8 + 0.6)
    left = np.zeros(len(entries))
    for number, side in enumerate(("client", "server")):
        found = [figure_of(one, f"{side}_cpu_us_per_call") for one in entries]
        widths = np.array([one.value if one else 0.0 for one in found])
        axes.barh(
            range(len(entries)),
            widths,
            left=left,
            label=side,
            color=("#555555", "#DDDDDD")[number],
            edgecolor="black",
            linewidth=0.5,
            hatch=HATCHES[number],
        )
        left += widths
    names = [f"{one['transport']} {one['client']}-{one['server']}" for one in entries]
    axes.set_yticks(range(len(entries)), names)
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"CPU time (us) for {'a call' if group.cell.op == 'echo' else 'an item'}")
    axes.set_title(group.title())
    legend(axes)
    text = "CPU time of client and server, user and system; a spinning peer uses its whole core"
    return Plot(file_name("cpu", group.title()), "CPU time", group.title(), text, canvas)


def percentiles(group: Group) -> list[Plot]:
    """Latency by percentile, one plot a pairing."""
    found = []
    for pairing in group.pairings:
        canvas, axes = make()
        drawn = False
        for number, transport in enumerate(group.transports):
            entry = group.find(transport, pairing)
            points = curve(entry) if entry else []
            if points:
                drawn = True
                shares, values = zip(*points, strict=True)
                axes.plot(shares, values, label=transport, **style_of(number))
        if not drawn:
            continue
        ticks = {0.5: "50", 0.9: "90", 0.99: "99", 0.999: "99.9", 0.9999: "99.99"}
        axes.set_yscale("log")
        plain(axes.yaxis)
        last = axes.dataLim.x1 + 0.1
        shown = {nines(share): text for share, text in ticks.items() if nines(share) < last}
        axes.set_xticks([*shown], [*shown.values()])
        axes.set_xlabel("percentile (each step a tenth of the rest)")
        one_way = "one-way " * (group.cell.op == "stream")
        axes.set_ylabel(f"{one_way}latency (us), log scale")
        title = f"{group.title()}, {pairing_label(pairing)}"
        axes.set_title(title)
        legend(axes)
        text = (
            "latency by percentile, median over rounds: how far the slow calls are from the usual"
        )
        name = file_name("percentiles", group.title(), *pairing)
        found.append(Plot(name, "Latency by percentile", title, text, canvas))
    return found


def nines(share: float) -> float:
    """So that 90, 99 and 99.9 are equally far apart."""
    return float(-np.log10(1 - share))


def curve(entry: Entry) -> list[tuple[float, float]]:
    """Of one cell: place on the axis and us."""
    points = []
    for name, (share, _) in QUANTILES.items():
        found = sound_figure(entry, f"latency_{name}_ns")
        if found and share < 1:
            points.append((nines(share), found.value / 1e3))
    return points


# --- across sizes ---


def against_size(
    document: Document, op: str, name: str, scale: float, label: str, title: str
) -> list[Plot]:
    """A figure against the payload's size; one plot for each pairing and setting but the size."""
    families: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in document["cells"]:
        if entry["op"] == op and sound_figure(entry, name):
            cell = cell_of(entry)
            key = (cell.client, cell.server, *cell._replace(size_bytes=0).setting())
            families.setdefault(key, []).append(entry)
    found = []
    for (client, server, *_), entries in families.items():
        sizes = sorted({one["size_bytes"] for one in entries})
        if len(sizes) < 2:
            continue
        canvas, axes = make()
        transports = dict.fromkeys(one["transport"] for one in entries)
        for number, transport in enumerate(transports):
            points = sorted(
                (one["size_bytes"], *(value / scale for value in figure))
                for one in entries
                if one["transport"] == transport and (figure := figure_of(one, name))
            )
            x, value, low, high = np.array(points).T
            axes.plot(x, value, label=transport, **style_of(number))
            axes.fill_between(x, low, high, color=style_of(number)["color"], alpha=0.15)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        plain(axes.yaxis)
        axes.set_xticks(sizes, [size_text(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("size of the payload, log scale")
        axes.set_ylabel(f"{label}, log scale")
        setting = setting_label(cell_of(entries[0])._replace(size_bytes=0)).replace(" 0B", "")
        heading = f"{setting}, {pairing_label((client, server))}"
        axes.set_title(heading)
        legend(axes)
        text = f"{label} against the size of the payload, with its interval"
        file = file_name(title.replace(" ", "-"), setting, client, server)
        found.append(Plot(file, title, heading, text, canvas))
    return found


def latency_against_size(document: Document) -> list[Plot]:
    """Of echoes."""
    title = "Latency against size"
    return against_size(document, "echo", "latency_p50_ns", 1e3, "median latency (us)", title)


def throughput_against_size(document: Document) -> list[Plot]:
    """Of streams."""
    title = "Throughput against size"
    return against_size(document, "stream", "bytes_per_second", 1e6, "MB/s", title)


SIZE_PLOTS: Sequence[Callable[[Document], list[Plot]]] = (
    latency_against_size,
    throughput_against_size,
)
