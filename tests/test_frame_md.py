"""FRAME.md tells the truth: its tables of values and of states are those of the code."""

import re
from collections.abc import Iterator

import pytest

from ipc_bridge import frame
from ipc_bridge.errors import CallError, Status
from ipc_bridge.frame import Kind
from ipc_bridge.session import (
    ClientSession,
    ServerSession,
)
from session_support import PROTO, Either, fed, written

FRAME_MD = PROTO / "FRAME.md"


def table_after(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading of FRAME.md."""
    text = FRAME_MD.read_text().split(f"\n{heading}\n")[1]
    rows = []
    for line in text.splitlines():
        if line.startswith("|"):
            rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
        elif rows:
            break
    return rows[2:]


def test_frame_md_legal_values() -> None:
    limits = {"size": 0xFFFFFFFF, "flags": 0xFF, "code": 0xFFFF, "id": 0xFFFFFFFF}

    def highest(cell: str, field_name: str) -> int:
        if cell == "any":
            return limits[field_name]
        return int(cell.split("..")[-1].split()[0])

    seen = set()
    for row in table_after("## What each kind may say"):
        kind, name, size, flags, code, call_id, value = row[:7]
        rules = frame._RULES[int(kind)]
        assert Kind(int(kind)).name == name
        assert rules.payload_size == highest(size, "size")
        assert rules.flags == highest(flags, "flags")
        assert rules.code == highest(code, "code")
        assert rules.value == highest(value, "size")
        id_min, id_max = {"0": (0, 0), "not 0": (1, 0xFFFFFFFF), "any": (0, 0xFFFFFFFF)}[call_id]
        assert (rules.call_id_min, rules.call_id_max) == (id_min, id_max)
        seen.add(int(kind))
    assert seen == set(Kind)


def test_frame_md_states() -> None:
    documented = set()
    for side, state, event, *_ in table_after("## Who may say what, and when"):
        if event in Kind.__members__:
            documented.add((side, state, event))
    actual = {
        (name, state.name, Kind(kind).name)
        for name, side in (("client", ClientSession), ("server", ServerSession))
        for state, row in side.table.items()
        for kind in row
    }
    assert documented == actual


def dump_lines() -> Iterator[tuple[str, bytes]]:
    text = FRAME_MD.read_text().split("\n## A session, byte by byte\n")[1].split("\n## ")[0]
    for line in text.splitlines():
        found = re.match(r"([CS]) +((?:[0-9a-f]{2,8} )+) ", line + "  ")
        if found:
            yield found[1], bytes.fromhex(found[2])


def test_frame_md_session() -> None:
    """The dump is what two sessions really say to each other."""
    lines = iter(dump_lines())
    client, server = ClientSession(64, 4096), ServerSession(4 << 20, 64 << 20)
    ahead: list[tuple[str, bytes]] = []

    def goes(who: str, frames: int) -> None:
        """The next lines are what `who` has to say; the other side reads it."""
        session: Either = client if who == "C" else server
        said = written(session)
        for _ in range(frames):
            speaker, data = ahead.pop(0) if ahead else next(lines)
            assert (speaker, data.hex()) == (who, said[: len(data)].hex())
            said = said[len(data) :]
            other: Either = server if who == "C" else client
            fed(other, data)
        assert said == b""

    def events(session: Either, count: int) -> list[Kind]:
        """Events of the next frames; None stands for "no event"."""
        out = []
        while (kind := session.next_event()) is not None:
            out.append(kind)
        assert len(out) == count
        return out

    goes("C", 1)
    goes("S", 1)
    assert events(client, 0) == events(server, 0) == []

    client.call(1, b"hi", False, 1500)
    goes("C", 1)
    assert events(server, 1) == [Kind.CALL]
    server.end(server.payload)
    goes("S", 1)
    assert events(client, 1) == [Kind.END]
    assert bytes(client.payload) == b"hi"

    client.call(2, bytes.fromhex("08021014"), True, 0)
    goes("C", 1)
    assert events(server, 1) == [Kind.CALL]
    pattern = bytes((k * k + (k >> 8)) % 251 for k in range(600))
    server.item(pattern[:20])
    goes("S", 1)
    assert events(client, 1) == [Kind.ITEM]
    client.consumed()
    goes("C", 1)
    assert events(server, 0) == []
    server.item(pattern[257:277])
    server.end()
    goes("S", 2)
    assert events(client, 2) == [Kind.ITEM, Kind.END]
    client.consumed()
    assert client.outbox.size == 0

    client.call(2, bytes.fromhex("08e8071001"), True, 0)
    goes("C", 1)
    assert events(server, 1) == [Kind.CALL]
    server.item(pattern[:1])
    goes("S", 1)
    assert events(client, 1) == [Kind.ITEM]
    client.cancel()
    client.call(1, b"", False, 0)
    server.item(pattern[257:258])
    goes("C", 2)
    assert events(server, 1) == [Kind.CANCEL]
    server.fail(Status.CANCELLED, "cancelled by the client")
    goes("S", 2)
    assert events(server, 1) == [Kind.CALL]
    server.end()
    goes("S", 1)
    assert events(client, 1) == [Kind.END]
    assert client.status == Status.OK

    server.drain()
    goes("S", 1)
    assert events(client, 0) == []
    with pytest.raises(CallError, match="shutting down"):
        client.call(1, b"", False, 0)
    assert next(lines, None) is None
