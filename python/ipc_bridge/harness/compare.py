"""`ipc-bridge compare`: what changed between two runs beyond noise.

Times belong to a machine and its hour: a wake-up across cores drifts by a fifth within one. So what
is compared is the ratio of a cell to its floor, round by round of the same run, and drift that hits
both falls out. (A cell without a floor is compared as it is.)

A metric of a cell has regressed if it is worse beyond noise, and by more than the limit. Noise is
judged by Welch's test of trimmed means (Yuen: a round or two may be far off), with Holm's
correction over all that is judged: of a hundred cells, five would be an alarm else. It has passed
if a change as large as the limit can be ruled out. What is neither is inconclusive: more rounds
would tell. So is what cannot be told at all: a percentile that had too few calls in one of the
rounds, or a cell whose floor is another than it was.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import click
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ipc_bridge.console import EXIT_INTERRUPTED, CommandLineError
from ipc_bridge.errors import Error, Status
from ipc_bridge.harness import environment
from ipc_bridge.harness.bench import RESULTS_DIR, measure, now
from ipc_bridge.harness.options import RESULTS, Seconds
from ipc_bridge.harness.results import Document, load, newest
from ipc_bridge.harness.runner import Plan
from ipc_bridge.harness.statistics import ROUNDS_MIN, Shift, above_test, holm, shift
from ipc_bridge.harness.table import Entry, cell_of, main_figure
from ipc_bridge.system import checked

EXIT_REGRESSED = 1
EXIT_INCONCLUSIVE = 3
EXIT_CELL_FAILED = 4
ALPHA = 0.05  # of a false alarm, over all that is judged; of passing what is worse, for each
ROUNDS_TO_GATE = 10  # with fewer, small changes stay inconclusive
LIMITS = {"p50": 0.05, "throughput": 0.05}  # the metrics that are judged: what they may lose
METRICS = ("p50", "p90", "p99", "p99_9", "max", "throughput", "cpu")
VERDICTS = ("regressed", "failed", "inconclusive", "passed", "improved")
ALIKE = (
    *("cpu", "architecture", "cores_allowed", "virtual", "governor", "quota_cores"),
    "priority",
)


class Judged(NamedTuple):
    """One metric of one cell."""

    cell: str
    metric: str
    verdict: str
    change: Shift | None  # 0.05: slower, or less, by 5%
    p_value: float | None  # corrected, of being no worse
    limit: float
    reason: str = ""


class Series(NamedTuple):
    """A metric of a cell, in logarithms of what a round measured; more is worse."""

    old: list[float]
    new: list[float]


# --- from documents to series ---


def costs(document: Document, entry: Entry, metric: str) -> list[float]:
    """What a metric cost in each round, in logarithms, over what the floor cost in the same round:
    so the noise of the floor is part of that of the ratio, and of the verdict. (CPU time has no
    floor.)"""
    floor = next((one for one in document["floors"] if one["id"] == entry["floor"]), None)
    bases = levels(floor) if floor and metric != "cpu" else None
    found = []
    for one in entry["rounds"]:
        cost = cost_of(one, metric)
        if cost and (bases is None or one["round"] in bases):
            found.append(math.log(cost) - (bases[one["round"]] if bases else 0.0))
    return found


def levels(floor: Entry) -> dict[int, float]:
    """What a floor cost in each round, in logarithms."""
    return {
        one["round"]: math.log(one["p50_ns"] if "p50_ns" in one else 1 / one["bytes_per_second"])
        for one in floor["rounds"]
    }


def cost_of(one: Mapping[str, Any], metric: str) -> float | None:
    """Of a round; less is better. None: it has no such metric, or too few calls for it."""
    if metric == "throughput":
        return 1 / float(one["bytes_per_second"] or one["operations_per_second"])
    if metric == "cpu":
        sides = [one[side] for side in ("client", "server") if one[side]]
        return sum(float(side["cpu_us_per_call"]) for side in sides) or None
    latency: float | None = one["latency_ns"] and one["latency_ns"][metric]
    return latency


def has(entry: Entry, metric: str) -> bool:
    """Is the metric one of such cells? A stream has no latency, unless it is paced; what the
    throughput of calls says, their latency does too."""
    if metric == "cpu":
        return True
    is_latency = main_figure(cell_of(entry))[0] == "latency_p50_ns"
    return is_latency == (metric != "throughput")


def lack(which: str, entry: Entry, metric: str) -> str:
    """Why a metric is not to be judged: the rounds that lack it may be the slow ones, of too few
    calls for a percentile, and those that are left would make the cell look quick. "": none does.
    """
    rounds = entry["rounds"]
    without = sum(cost_of(one, metric) is None for one in rounds)
    return f"the {which} run has no {metric} in {without} of {len(rounds)} rounds" * bool(without)


# --- judging ---


def judge(old: Document, new: Document, limits: Mapping[str, float]) -> list[Judged]:
    """All metrics of all cells of the old run. Raises Error: NOT_FOUND: it has none."""
    entries = {entry["id"]: entry for entry in new["cells"]}
    series: dict[tuple[str, str], Series] = {}
    found: list[Judged] = []
    for before in old["cells"]:
        if not before["rounds"]:
            continue  # it failed then: nothing to compare with
        cell = before["id"]
        after = entries.get(cell)
        if after is None or after["failure"] or not after["rounds"]:
            reason = (after and after["failure"]) or "not in the new run"
            found.append(Judged(cell, "", "failed", None, None, 0.0, reason))
            continue
        for metric in (one for one in limits if has(before, one)):
            lacks = [lack("old", before, metric), lack("new", after, metric)]
            if before["floor"] != after["floor"] and metric != "cpu":
                floors = [one["floor"] or "none" for one in (before, after)]
                lacks.append(f"unlike floors: {' and '.join(floors)}")
            if any(lacks):
                reason, limit = "; ".join(filter(None, lacks)), limits[metric]
                found.append(Judged(cell, metric, "inconclusive", None, None, limit, reason))
            else:
                one = Series(costs(old, before, metric), costs(new, after, metric))
                series[cell, metric] = one
    if not series and not found:
        what = f"the old run has no cell to judge by {', '.join(limits)}"
        raise Error(Status.NOT_FOUND, what)
    return found + judge_series(series, limits)


def judge_series(
    series: Mapping[tuple[str, str], Series], limits: Mapping[str, float]
) -> list[Judged]:
    """The verdicts, with the correction over all."""
    few = [key for key, one in series.items() if min(map(len, one)) < ROUNDS_MIN]
    tested = [key for key in series if key not in few]
    worse, better = {}, {}
    for key in tested:
        old, new = np.array(series[key].old), np.array(series[key].new)
        worse[key] = above_test(new, old)
        better[key] = above_test(old, new)
    worse_corrected = dict(zip(worse, holm([*worse.values()]), strict=True))
    better_corrected = dict(zip(better, holm([*better.values()]), strict=True))
    found = []
    for key, one in series.items():
        cell, metric = key
        limit = limits[metric]
        if key in few:
            reason = f"{min(map(len, one))} rounds"
            found.append(Judged(cell, metric, "inconclusive", None, None, limit, reason))
            continue
        verdict, change = "inconclusive", shift(one.old, one.new)
        if worse_corrected[key] < ALPHA and change.value > limit:
            verdict = "regressed"
        elif better_corrected[key] < ALPHA:
            verdict = "improved"
        elif above_test(np.array(one.old) + math.log1p(limit), np.array(one.new)) < ALPHA:
            verdict = "passed"
        found.append(Judged(cell, metric, verdict, change, worse_corrected[key], limit))
    return found


def verdict_of(found: Sequence[Judged]) -> str:
    """The worst: a regression is one, whatever else is not known."""
    for verdict in VERDICTS[:3]:
        if any(one.verdict == verdict for one in found):
            return verdict
    return "passed"


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """In what two machines are unlike."""
    pairs = [(name, old.get(name), new.get(name)) for name in ALIKE]
    return [f"{name} {was} and {now}" for name, was, now in pairs if was != now]


# --- the command ---


class Limits(click.ParamType[Any]):
    """METRIC=5%."""

    name = "limit"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, float]:
        if not isinstance(value, str):
            return tuple(value)
        metric, equals, text = value.partition("=")
        metric = metric.replace(".", "_")
        if metric not in METRICS or not equals:
            self.fail(f"'{value}' is not METRIC=5%; known are {', '.join(METRICS)}", param, ctx)
        try:
            limit = float(text.removesuffix("%")) / 100
        except ValueError:
            limit = -1.0
        if not text.endswith("%") or not 0 <= limit <= 10:
            self.fail(f"'{value}' has no percentage within 0% to 1000%", param, ctx)
        return metric, limit


@click.command()
@click.argument("old", type=RESULTS)
@click.argument("new", type=RESULTS, required=False)
@click.option(
    "--max-regression",
    "limits",
    type=Limits(),
    multiple=True,
    metavar="METRIC=5%",
    help=f"judge this metric, with this limit: {', '.join(METRICS)} (p50=5% and throughput=5%)",
)
@click.option("--budget", type=Seconds(1, 1e6), help="without NEW: measure it now, for so long")
@click.option("--unlike-machines", is_flag=True, help="compare runs of different machines as well")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object, on one line")
@click.option("--junit", type=RESULTS, metavar="FILE", help="write the verdicts as JUnit XML")
def compare(
    old: Path,
    new: Path | None,
    limits: Sequence[tuple[str, float]],
    budget: float | None,
    unlike_machines: bool,
    as_json: bool,
    junit: Path | None,
) -> int:
    """Judge the run NEW against the run OLD: regressed, inconclusive or passed.

    Without NEW, the cells of OLD are measured now. Leaves 0 if all passed or improved, 1 if a cell
    regressed, 4 if one failed or is missing, 3 if one is inconclusive.
    """
    if budget and new:
        raise CommandLineError("this option goes without NEW", "--budget")
    before = load(newest(old))
    after = load(newest(new)) if new else None
    unlike = differences(before["machine"], after["machine"] if after else environment.machine())
    if unlike and not unlike_machines:  # it is known before anything is measured
        what = f"unlike machines (--unlike-machines compares them): {', '.join(unlike)}"
        raise Error(Status.FAILED_PRECONDITION, what)
    after = after or measure_again(before, budget, quiet=as_json)
    allowed = dict(limits) or LIMITS
    found = judge(before, after, allowed)
    if junit:
        write_junit(junit, found)
    if as_json:
        click.echo(json.dumps(report_of(found, before, after), separators=(",", ":")))
    else:
        show(Console(), found, before, after)
    exits = {"regressed": EXIT_REGRESSED, "failed": EXIT_CELL_FAILED}
    exits["inconclusive"] = EXIT_INCONCLUSIVE
    return exits.get(verdict_of(found), 0)


def measure_again(old: Document, budget_s: float | None, quiet: bool) -> Document:
    """The cells of a run, measured now."""
    cells = [cell_of(entry) for entry in old["cells"] if entry["rounds"]]
    plan = old["plan"]
    if plan["connect"] or any(cell.server not in ("cpp", "py") for cell in cells):
        what = "the old run had a server of its own: measure the new one with bench"
        raise Error(Status.FAILED_PRECONDITION, what)
    again = Plan(
        cells,
        rounds=1000 if budget_s else max(ROUNDS_TO_GATE, plan["rounds"]),
        duration_s=plan["duration_s"],
        warmup_s=plan["warmup_s"],
        budget_s=budget_s or float("inf"),
        seed=plan["seed"] + 1,
    )
    out = RESULTS_DIR / f"{now():%Y%m%d-%H%M%S}"
    code = measure(again, {}, out, old["profile"], Console(quiet=quiet))
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    return load(out)


# --- what it says ---


def report_of(found: Sequence[Judged], old: Document, new: Document) -> dict[str, Any]:
    """As JSON."""
    return {
        "verdict": verdict_of(found),
        "old": {"created": old["created"], "rounds": old["rounds"]},
        "new": {"created": new["created"], "rounds": new["rounds"]},
        "cells": [one._asdict() | {"change": one.change and one.change._asdict()} for one in found],
    }


def percent(share: float) -> str:
    """With its sign."""
    return f"{100 * share:+.1f}%"


def show(console: Console, found: Sequence[Judged], old: Document, new: Document) -> None:
    """What did not pass, the largest changes of the rest, what has no change and why, and the
    verdict."""
    order = {verdict: place for place, verdict in enumerate(VERDICTS)}
    bad = sorted(found, key=lambda one: (order[one.verdict], -(one.change or (0,))[0]))
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in ("verdict", "cell", "metric", "change", "interval", "limit"):
        is_text = name in ("verdict", "cell")  # where it is narrow, the cell's name has more lines
        table.add_column(name, no_wrap=name != "cell", justify="left" if is_text else "right")
    for one in bad:
        if one.change:
            change, low, high = map(percent, one.change)
            table.add_row(
                one.verdict, one.cell, one.metric, change, f"{low} to {high}", percent(one.limit)
            )
    wide = console if console.is_terminal else Console(width=120)
    if table.rows:
        wide.print(table)
    for one in bad:
        if not one.change:
            what = f"{one.cell} {one.metric}".rstrip()
            console.out(f"{one.verdict}: {what}: {one.reason.splitlines()[0]}", highlight=False)
    counts = ", ".join(
        f"{sum(one.verdict == verdict for one in found)} {verdict}"
        for verdict in VERDICTS
        if any(one.verdict == verdict for one in found)
    )
    console.out(f"{counts} (changes are in the ratio to the floor; + is worse)", highlight=False)
    rounds = min(old["rounds"], new["rounds"])
    if rounds < ROUNDS_TO_GATE:
        text = f"warning: {rounds} rounds; with {ROUNDS_TO_GATE} or more a verdict is likely"
        console.out(text, highlight=False)
    if old["software"]["kernel"] != new["software"]["kernel"]:
        console.out("warning: the kernels differ", highlight=False)
    console.out(f"verdict: {verdict_of(found)}", highlight=False)


def write_junit(path: Path, found: Sequence[Judged]) -> None:
    """A test case for each verdict, for those who show test results. Raises Error."""
    suite = ElementTree.Element(
        "testsuite",
        name="ipc-bridge compare",
        tests=str(len(found)),
        failures=str(sum(one.verdict == "regressed" for one in found)),
        errors=str(sum(one.verdict == "failed" for one in found)),
        skipped=str(sum(one.verdict == "inconclusive" for one in found)),
    )
    kinds = {"regressed": "failure", "failed": "error", "inconclusive": "skipped"}
    for one in found:
        case = ElementTree.SubElement(
            suite, "testcase", classname=one.cell, name=one.metric or "measured"
        )
        if one.verdict in kinds:
            text = one.reason
            if one.change:
                change, low, high = map(percent, one.change)
                text = f"{change} ({low} to {high}), limit {percent(one.limit)}"
            text = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
            ElementTree.SubElement(case, kinds[one.verdict], message=text)  # XML has no controls
    with checked("write", path):
        ElementTree.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
