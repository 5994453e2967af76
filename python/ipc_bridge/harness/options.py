"""The kinds of values that the command line takes: lists with commas, sizes, seconds."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ipc_bridge.arguments import SIZE, UNITS


class Words(click.ParamType[Any]):
    """A list with commas, of known words; `all` is all of them."""

    name = "words"

    def __init__(self, known: Sequence[str]) -> None:
        self.known = known

    def convert(self, value: Any, param: Any, ctx: Any) -> list[str]:
        if not isinstance(value, str):
            return list(value)
        words = [*self.known] if value == "all" else value.split(",")
        for word in words:
            if word not in self.known:
                self.fail(f"'{word}' is unknown; known are {', '.join(self.known)}", param, ctx)
        return [*dict.fromkeys(words)]


class Size(click.ParamType[Any]):
    """Bytes, as 64, 4KiB or 1MiB."""

    name = "size"

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        match = SIZE.fullmatch(value)
        if not match:
            self.fail(f"'{value}' is not a size", param, ctx)
        size_bytes = int(match[1]) * UNITS[match[2]]
        if not self.low <= size_bytes <= self.high:
            self.fail(f"'{value}' is not within {self.low} to {self.high}", param, ctx)
        return size_bytes


class Number(click.ParamType[Any]):
    """A number, whole or decimal, that may end in a unit."""

    name = "number"

    def __init__(self, low: float, high: float, whole: bool = False, unit: str = "") -> None:
        self.low, self.high, self.whole, self.unit = low, high, whole, unit

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        if not isinstance(value, str):
            return float(value)
        text = value.removesuffix(self.unit)
        if not re.fullmatch(r"[0-9]{1,9}" if self.whole else r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
            kind = "a whole number" if self.whole else "a decimal number"
            self.fail(f"'{value}' is not {kind}", param, ctx)
        if not self.low <= float(text) <= self.high:
            self.fail(f"'{value}' is not within {self.low:g} to {self.high:g}", param, ctx)
        return float(text)


class Seconds(click.ParamType[Any]):
    """A time, as 0.5, 90s or 5m."""

    name = "seconds"

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        if not isinstance(value, str):
            return float(value)
        match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(us|ms|s|m|h|)", value)
        if not match:
            self.fail(f"'{value}' is not a time, as 0.5, 90s or 5m", param, ctx)
        seconds = (
            float(match[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1, "": 1, "m": 60, "h": 3600}[match[2]]
        )
        if not self.low <= seconds <= self.high:
            self.fail(f"'{value}' is not within {self.low:g}s to {self.high:g}s", param, ctx)
        return seconds


class Each(click.ParamType[Any]):
    """A list with commas, of one kind."""

    def __init__(self, kind: click.ParamType[Any]) -> None:
        self.kind, self.name = kind, kind.name

    def convert(self, value: Any, param: Any, ctx: Any) -> list[Any]:
        if not isinstance(value, str):
            return list(value)
        found = [self.kind.convert(word, param, ctx) for word in value.split(",")]
        return [*dict.fromkeys(found)]


ROUNDS = Number(1, 1000, whole=True)
RESULTS = click.Path(path_type=Path)
