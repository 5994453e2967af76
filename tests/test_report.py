"""`ipc-bridge report` and `recommend`: a page that needs nothing else, and what follows from it."""

import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from harness_support import call, echo_round, made, stream_round
from ipc_bridge.errors import Error
from ipc_bridge.harness import results
from ipc_bridge.harness.matrix import Cell, floor_of
from ipc_bridge.harness.plots import (
    cpu,
    heat_maps,
    intervals,
    latency_against_size,
    overheads,
    plots,
)
from ipc_bridge.harness.recommend import Wanted, recommend_from, title_of
from ipc_bridge.harness.report import caveats, markdown_table, table_of, write
from ipc_bridge.harness.results import Document
from ipc_bridge.harness.table import groups, make_table, print_results

TRANSPORTS = {"unix": 10e3, "tcp": 15e3, "pipe": 8e3, "shm": 2e3}  # ns
SLOWER = {"sysv-queue": 20e3, "zmq+ipc": 40e3}  # by another's library, in some language
SECTIONS = (
    "Pairings",
    "Latency and throughput",
    "CPU time",
    "Overhead over the floor",
    "Latency by percentile",
    "Latency against size",
    "Throughput against size",
)


def small_run(
    sizes: tuple[int, ...] = (64, 4096), transports: Sequence[str] = (*TRANSPORTS,)
) -> Document:
    """Echoes and streams of some transports, in two pairings."""
    cells, floors = {}, {}
    for transport in transports:
        ns = (TRANSPORTS | SLOWER)[transport]
        for server, factor in (("cpp", 1), ("py", 3)):
            for size in sizes:
                rounds = range(1, 6)
                echo = Cell(transport, "cpp", server, "echo", size, "block", "same-core")
                stream = Cell(transport, "cpp", server, "stream", size, "block", "cross-core")
                cells[echo] = [echo_round(n, ns * factor * (1 + n / 100)) for n in rounds]
                cells[stream] = [stream_round(n, 1e13 / ns / factor + n * 1e6) for n in rounds]
                for cell in (echo, stream):
                    floor = floor_of(cell)
                    if floor:
                        name = "p50_ns" if floor.kind == "bare" else "bytes_per_second"
                        value = 1e3 if floor.kind == "bare" else 1e10
                        floors[floor] = [{"round": n, name: value} for n in rounds]
    return made(cells, floors, warnings=["a virtual machine: <b>slow</b>"])


class Page(HTMLParser):
    """What a page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.images += [found] if tag == "img" else []
        self.links += [found["href"] or ""] if "href" in found else []
        self.ids += [found["id"] or ""] if "id" in found else []
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    write(small_run(), directory)
    return directory


def test_the_page_loads_nothing_and_is_whole(report: Path) -> None:
    text = (report / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.images) == len(list(report.glob("*.svg"))) == len(list(report.glob("*.png")))
    for image in page.images:
        assert (image["src"] or "").startswith("data:image/svg+xml;base64,")
        assert image["alt"]
    for link in page.links:
        assert (link.startswith("#") and link[1:] in page.ids) or link == "data:,"
    assert not re.search(r"(src|href)=.?https?:|@import|url\(|<script", text)
    assert "&lt;b&gt;slow&lt;/b&gt;" in text, "what a machine says is no markup"


def test_the_page_shows_all_that_it_must(report: Path) -> None:
    page = Page((report / "report.html").read_text())
    for section in (*SECTIONS, "How to read it", "Recommendation", "The machine, and the run"):
        assert section in page.text
    for text in ("A virtual machine: <b>slow</b>.", "Mitigation", "steal share", "performance"):
        assert text in page.text
    for transport in TRANSPORTS:
        assert transport in page.text


def test_each_kind_of_plot_is_drawn() -> None:
    found = plots(small_run())
    assert {plot.section for plot in found} == set(SECTIONS)
    names = [plot.name for plot in found]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z0-9.-]+", name) for name in names)
    for plot in found:
        for axes in plot.canvas.axes:
            assert axes.get_title()
            if plot.section != "Pairings":
                assert axes.get_xlabel()


def test_servers_of_ones_own_have_room() -> None:
    """Of ten pairings each point lies in the row of its transport, and a heat map has four."""
    cells, floors = {}, {}
    for transport in ("unix", "tcp", "pipe"):
        for client in ("cpp", "py"):
            for server in ("cpp", "py", "one", "two", "three"):
                cell = Cell(transport, client, server, "echo", 64, "block", "same-core")
                cells[cell] = [echo_round(n, 1e4) for n in range(1, 6)]
                floor = floor_of(cell)
                assert floor
                floors[floor] = [{"round": n, "p50_ns": 9e3} for n in range(1, 6)]
    (group,) = groups(made(cells, floors))
    for plot in (intervals(group), *overheads(group)):
        (axes,) = plot.canvas.axes
        places = [y for bar in axes.containers for y in bar[0].get_ydata()]
        assert len(places) == 30
        assert len({round(y, 6) for y in places}) == 30
        assert [round(y) for y in sorted(places)] == [0] * 10 + [1] * 10 + [2] * 10
    maps = heat_maps(group)
    assert len({plot.name for plot in maps}) == 3
    assert [len(plot.canvas.axes[0].texts) for plot in maps] == [12, 12, 6]


def test_one_size_makes_no_plot_against_size() -> None:
    assert not any("against size" in plot.section for plot in plots(small_run((64,))))


def test_the_markdown_has_the_figures(report: Path) -> None:
    text = (report / "report.md").read_text()
    assert "**echo 64B block same-core**, median latency in us" in text
    row = re.search(r"^\| `pipe` \| ([\d.]+) \((\S+)\) \|", text, re.MULTILINE)
    assert row
    assert (float(row[1]), row[2]) == (8.24, "2")
    assert "| each / C++ floor |" in text
    over = re.search(r"^\| `pipe` \|.*\| (\S+) (\S+) \|$", text, re.MULTILINE)
    assert over
    assert [*map(float, over.groups())] == [8.24, 24.7], "of each pairing, over the same floor"
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| `")}
    assert widths == {5}
    assert "- A virtual machine" in text


def test_a_cell_that_failed_has_no_place(tmp_path: Path) -> None:
    """It was the quickest in the rounds before."""
    document = small_run()
    for cell in document["cells"]:
        if (cell["transport"], cell["server"]) == ("shm", "cpp"):
            cell["failure"] = "error: DATA_LOSS: 3 answers differ"
    group = next(group for group in groups(document) if group.title().startswith("echo 64B"))
    rows = {(row["transport"], row["pairing"]): row for row in table_of(group)["rows"]}
    failed, best = rows["shm", "C++ -> C++"], rows["pipe", "C++ -> C++"]
    assert (set(failed["cells"]), failed["best"]) == ({"failed", "-"}, False)
    assert (best["cells"][0], best["best"]) == ("1", True)
    assert rows["shm", "C++ -> Python"]["best"], "another cell"

    shown = markdown_table(group)[-1].split("|")
    assert (shown[1].strip(), shown[2].strip()) == ("`shm`", "failed")
    _, choices = recommend_from(document, Wanted("echo", 64, ("cpp", "cpp")))
    assert [one.transport for one in choices] == ["pipe", "unix", "tcp"]
    results.save(tmp_path, document)
    done = call("recommend", str(tmp_path))
    assert done.stdout.splitlines()[-1] == "not ranked, as they failed in that run: shm"
    done = call("recommend", str(tmp_path), "--json")
    assert json.loads(done.stdout)["failed"] == ["shm"]
    for draw in (cpu(group), latency_against_size(document)[0]):
        axes = draw.canvas.axes[0]
        names = [text.get_text() for text in axes.get_yticklabels()]
        names += [str(line.get_label()) for line in axes.get_lines()]
        assert not any(name in ("shm", "shm cpp-cpp") for name in names)


@pytest.mark.parametrize(("rounds", "place"), [(1, "1-2"), (4, "1-2"), (5, "1")])
def test_too_few_rounds_are_a_tie(rounds: int, place: str) -> None:
    """10.00 and 10.01 us of one round each have no interval, so that none overlap."""
    cells = {
        Cell(transport, "cpp", "cpp", "echo", 64, "block", "free"): [
            echo_round(n, ns) for n in range(1, rounds + 1)
        ]
        for transport, ns in (("unix", 10_000), ("tcp", 10_010))
    }
    _, choices = recommend_from(made(cells, {}), Wanted("echo", 64, ("cpp", "cpp")))
    assert (choices[0].transport, choices[0].place) == ("unix", place)


def test_nothing_is_drawn_of_a_setting_whose_cells_failed() -> None:
    document = small_run((64,))
    for cell in document["cells"]:
        cell["failure"] = "error: DATA_LOSS" if cell["op"] == "echo" else None
    found = plots(document)
    assert found
    assert all(plot.title.startswith("stream") for plot in found)
    with pytest.raises(Error, match="no cell like this"):
        recommend_from(document, Wanted("echo", 64, ("cpp", "cpp")))


def test_a_pairing_without_cpp_has_its_overheads_too() -> None:
    document = small_run((64,))
    document["cells"] = [cell for cell in document["cells"] if cell["server"] == "py"]
    group = groups(document)[0]
    assert markdown_table(group)[2].endswith(" | 30.9 |")
    out = io.StringIO()
    Console(width=200, file=out).print(make_table(group))
    (unix,) = (line for line in out.getvalue().splitlines() if "unix" in line)
    assert unix.split()[-1] == "30.9"


def test_a_latency_says_what_it_is_a_latency_of(tmp_path: Path) -> None:
    """That of an item of a paced stream is one way; and an age begins elsewhere."""
    paced = Cell("unix", "cpp", "cpp", "stream", 64, "block", "free", rate_hz=100.0)
    ages = {"p50": 9000, "p99": None}
    document = made({paced: [echo_round(n, 1e4) | {"age_ns": ages} for n in range(1, 6)]}, {})
    (group,) = groups(document)
    assert str(make_table(group).title).startswith(
        "stream 64B block free 100/s: median one-way latency in us"
    )
    write(document, tmp_path)
    assert "**, median one-way latency in us" in (tmp_path / "report.md").read_text()
    page = " ".join(Page((tmp_path / "report.html").read_text()).text.split())
    for text in ("it is one way", "An item's age runs from when it was due", "polls the rest"):
        assert text in page
    axes = intervals(group).canvas.axes[0]
    assert axes.get_xlabel().startswith("median one-way latency in us")


@pytest.mark.parametrize(
    ("placements", "begin"),
    [
        (("same-core", "cross-core"), None),
        (("same-core", "free"), "cells placed `free`: no pinning"),
        (("free",), "no pinning: the system may move the peers"),
    ],
)
def test_peers_that_are_not_pinned_are_a_caveat(
    placements: tuple[str, ...], begin: str | None
) -> None:
    cells = {
        Cell("unix", "cpp", "cpp", "echo", 64, "block", placement): [
            echo_round(n, 1e4) for n in range(1, 6)
        ]
        for placement in placements
    }
    document = made(cells, {})
    out = io.StringIO()
    print_results(Console(width=200, file=out), document)
    assert ("no pinning" in out.getvalue()) == bool(begin)
    if begin:
        assert f"warning: {begin}" in out.getvalue()
        assert caveats(document)[0].startswith(begin[0].upper() + begin[1:])
    else:
        assert caveats(document) == []


def test_caveats_of_an_unfinished_run() -> None:
    document = small_run() | {"interrupted": True, "rounds": 2, "failures": {"x": "y"}}
    assert len(caveats(document)) == 4


def saved(tmp_path: Path) -> str:
    results.save(tmp_path, small_run((64,)))
    return str(tmp_path)


def test_report_takes_the_newest_run(tmp_path: Path) -> None:
    results.save(tmp_path, small_run((64,), ("unix",)))
    done = call("report", str(tmp_path), "-o", str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"page: {tmp_path}/out/report.html" in done.stdout
    (tmp_path / "run").mkdir()
    done = call("report", str(tmp_path / "run"))
    assert done.returncode == 15
    assert done.stderr.startswith("error: NOT_FOUND: no results; `ipc-bridge bench` makes them, ")


def test_a_directory_that_cannot_be_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    done = call("report", saved(tmp_path), "-o", str(file))
    assert (done.returncode, done.stdout) == (16, "")
    assert done.stderr == f"error: ALREADY_EXISTS: write: File exists, {file}\n"


def recommended(tmp_path: Path, *words: str) -> list[dict[str, str]]:
    done = call("recommend", saved(tmp_path), *words, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found: list[dict[str, str]] = json.loads(done.stdout)["choices"]
    return found


def test_recommend_ranks_what_fits(tmp_path: Path) -> None:
    found = recommended(tmp_path, "--size", "100", "--pairing", "cpp-py")
    assert [one["transport"] for one in found] == ["shm", "pipe", "unix", "tcp"]
    assert [one["place"] for one in found] == ["1", "2", "3", "4"]
    assert all(one["reason"] and one["trap"] for one in found)
    assert "us of CPU for a call" in found[0]["reason"]
    across = recommended(tmp_path, "--across-hosts", "--pattern", "stream")
    assert [(one["transport"], one["place"]) for one in across] == [("tcp", "1")]


def test_recommend_looks_where_something_fits() -> None:
    """ZeroMQ does not spin, and the setting that was measured first has none that fits."""
    cells = {
        Cell(transport, "cpp", "cpp", "echo", 64, wait, "cross-core"): [
            echo_round(number, 2e4) for number in range(1, 6)
        ]
        for transport, wait in (("unix", "spin"), ("unix", "block"), ("zmq+tcp", "block"))
    }
    wanted = Wanted("echo", 64, ("cpp", "cpp"), across_hosts=True)
    group, choices = recommend_from(made(cells, {}), wanted)
    assert group.cell.wait == "block"
    assert [one.transport for one in choices] == ["zmq+tcp"]


def test_recommend_says_what_the_run_lacks(tmp_path: Path) -> None:
    done = call("recommend", saved(tmp_path), "--pairing", "py-py")
    assert (done.returncode, done.stdout) == (15, "")
    assert "the run has no cell like this: echo Python -> Python" in done.stderr


@pytest.mark.parametrize(
    ("pairing", "fits"),
    [(("cpp", "cpp"), ["unix", "sysv-queue"]), (("cpp", "py"), ["unix"])],
)
def test_a_dependency_is_one_of_a_language(pairing: tuple[str, str], fits: list[str]) -> None:
    """sysv-ipc comes from PyPI; C++ has the calls."""
    document = small_run((64,), ("unix", *SLOWER))
    wanted = Wanted("echo", 64, pairing, no_dependency=True)
    assert [one.transport for one in recommend_from(document, wanted)[1]] == fits


def crowd_run() -> Document:
    """With a crowd the order is another."""
    cells = {
        Cell(transport, "cpp", "cpp", "echo", size, "block", "free", clients): [
            echo_round(n, ns) for n in range(1, 6)
        ]
        for size in (64, 128)
        for clients, times in ((1, (1e4, 2e4)), (8, (9e4, 5e4)))
        for transport, ns in zip(("unix", "tcp"), times, strict=True)
    }
    return made(cells, {})


@pytest.mark.parametrize(
    ("clients", "measured", "first"), [(1, 1, "unix"), (6, 8, "tcp"), (100, 8, "tcp")]
)
def test_a_crowd_is_told_what_a_crowd_measured(clients: int, measured: int, first: str) -> None:
    wanted = Wanted("echo", 64, ("cpp", "cpp"), clients=clients)
    group, choices = recommend_from(crowd_run(), wanted)
    assert (group.cell.clients, group.cell.size_bytes) == (measured, 64)
    assert choices[0].transport == first
    assert ("8 clients" in title_of(wanted, group)) == (measured == 8)


def test_figures_of_one_client_say_so(tmp_path: Path) -> None:
    done = call("recommend", saved(tmp_path), "--clients", "8")
    assert done.stdout.startswith("echo of 64B for 8 clients, C++ -> C++ (measured: echo 64B")
    assert "of one client)" in done.stdout
    for wrong in ("-5", "0", "2000"):
        done = call("recommend", str(tmp_path), f"--clients={wrong}")
        assert (done.returncode, done.stdout) == (2, "")
