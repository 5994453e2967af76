"""FRAME.md tells the truth: its tables, figures and dumps are those of the code."""

import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ipc_bridge import frame
from ipc_bridge.client import CLIENT_HELLO_TIMEOUT_S
from ipc_bridge.connection import BATCH_BYTES, SERVER_HELLO_TIMEOUT_S
from ipc_bridge.errors import MESSAGE_BYTES_MAX, CallError, Status
from ipc_bridge.frame import (
    HEADER,
    HEADER_BYTES,
    MAGIC,
    PAYLOAD_BYTES_MAX,
    STREAM_WANTED,
    VERSION,
    Kind,
)
from ipc_bridge.service import ECHO, STREAM
from ipc_bridge.session import (
    WINDOW_BYTES_DEFAULT,
    WINDOW_BYTES_LIMIT,
    ClientSession,
    ServerSession,
)
from session_support import PROTO, VECTORS, Either, fed, had_calls, pair, written
from test_session import VectorRun

FRAME_MD = PROTO / "FRAME.md"


def section(heading: str) -> str:
    """What stands below a heading of FRAME.md."""
    return FRAME_MD.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


def table_after(heading: str) -> list[list[str]]:
    """The rows of the first table below a heading of FRAME.md."""
    rows = []
    for line in section(heading).splitlines():
        if line.startswith("|"):
            rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
        elif rows:
            break
    return rows[2:]


def numbers(text: str) -> list[int]:
    """Those in a text, as it writes them: 5, 64 MiB, 2^30, 2^32-1."""
    found = []
    for base, power, less, unit in re.findall(r"(?<![-\w])(\d+)(?:\^(\d+))?(-1)?( [KM]iB)?", text):
        shift = {"": 0, " KiB": 10, " MiB": 20}[unit]
        found.append((int(base) ** int(power or 1) << shift) - bool(less))
    return found


# --- the frame ---


def test_frame_md_layout() -> None:
    """The picture of a header: where its fields are."""
    picture = section("The frame").split("```")[1].splitlines()
    assert numbers(picture[1]) == [
        struct.calcsize(HEADER.format[:n]) for n in range(1, len(HEADER.format) + 1)
    ]
    names = [name.strip() for name in picture[3].strip("|").split("|")]
    assert names == ["payload_size", "k", "f", "code", "call_id", "value", "payload ..."]


def test_frame_md_hello() -> None:
    hello = written(ClientSession(0x01020304, 0x05060708))
    says = {}
    for where, name, what in table_after("Hello"):
        first, last = map(int, where.split(".."))
        says[name] = (hello[first : last + 1], what)
    assert int.from_bytes(says["code"][0], "little") == numbers(says["code"][1])[0] == VERSION
    assert says["value"][0] == struct.pack("<I", 0x01020304)
    assert numbers(says["value"][1]) == [1, WINDOW_BYTES_LIMIT]
    assert says["magic"][0] == MAGIC
    assert says["magic"][1].endswith(MAGIC.hex(" "))
    assert says["max_payload"][0] == struct.pack("<I", 0x05060708)
    assert numbers(section("Hello").split("heard no HELLO")[1])[0] == SERVER_HELLO_TIMEOUT_S


def test_frame_md_statuses() -> None:
    text = section("What each kind may say").split("The statuses are gRPC's:")[1]
    assert {name: int(number) for number, name in re.findall(r"(\d+) ([A-Z_]+)", text)} == {
        status.name: status for status in Status
    }


def test_frame_md_methods() -> None:
    methods = {"Echo": ECHO, "Stream": STREAM}
    rows = table_after("Calls")
    assert {name: int(number) for number, name, *_ in rows} == methods
    assert [flag for _, _, flag, *_ in rows] == ["0", str(STREAM_WANTED)]


def test_frame_md_limits() -> None:
    actual = {
        "header": [HEADER_BYTES],
        "payload": [(1 << 32) - 1, PAYLOAD_BYTES_MAX],
        "payload before HELLO": [ClientSession().decoder.payload_bytes_max],
        "status message": [MESSAGE_BYTES_MAX],
        "window": [1, WINDOW_BYTES_LIMIT, WINDOW_BYTES_DEFAULT],
        "producer ahead of its reader": [],  # counted, test_session.py
        "calls": [(1 << 32) - 1],
        "items of a stream": [],
        "deadline": [(1 << 32) - 1, ((1 << 32) - 1) // (24 * 3600 * 1000)],
        "HELLO": [CLIENT_HELLO_TIMEOUT_S],
    }
    assert {what: numbers(limit) for what, limit, *_ in table_after("Limits")} == actual
    assert numbers(section("Limits").split("at most")[1]) == [frame.PAYLOAD_BYTES_LIMIT]
    assert f"one batch ({BATCH_BYTES >> 10} KiB" in section("Why memory stays bounded")
    assert len(VECTORS["vectors"]) > 250


def test_frame_md_legal_values() -> None:
    limits = {"size": 0xFFFFFFFF, "flags": 0xFF, "code": 0xFFFF, "id": 0xFFFFFFFF}

    def highest(cell: str, field_name: str) -> int:
        if cell == "any":
            return limits[field_name]
        return int(cell.split("..")[-1].split()[0])

    seen = set()
    for row in table_after("What each kind may say"):
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


# --- the state table ---

INPUT_ENDS = "the input ends"  # in any state
CALLS = {  # what a driver or an application does, by the table's names
    "call": "call",
    "cancel": "cancel, deadline",
    "drain": "drain",
    "item": "item",
    "end": "done, failed, deadline",
    "fail": "done, failed, deadline",
    "end_of_input": INPUT_ENDS,
}
Step = tuple[str, str, str, str]  # side, state, event, next state


def test_frame_md_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the vectors make happen is what the table says, row by row, and all of it happens."""
    documented: set[Step] = {
        (side, state, event, after)
        for side, state, event, _, then in table_after("Who may say what, and when")
        for after in then.split("; ")
    }
    seen: set[Step] = set()

    def watched(side: str, event: str, act: Callable[..., Any]) -> Callable[..., Any]:
        def acts(session: Either, *words: Any) -> Any:
            before = session.state.name, session.outbox.size
            result = act(session, *words)
            after = session.state.name, session.outbox.size
            if event in Kind.__members__ or after != before:  # drain twice is nothing
                seen.add((side, "any" if event == INPUT_ENDS else before[0], event, after[0]))
            return result

        return acts

    for name, side in (("client", ClientSession), ("server", ServerSession)):
        table = {
            state: {kind: watched(name, Kind(kind).name, act) for kind, act in row.items()}
            for state, row in side.table.items()
        }
        monkeypatch.setattr(side, "table", table)
        for call, event in CALLS.items():
            if hasattr(side, call):
                monkeypatch.setattr(side, call, watched(name, event, getattr(side, call)))
    for vector in VECTORS["vectors"]:
        VectorRun(vector, 1 << 30, False)
    # A server is IDLE after a CANCEL once its END is made, which is an event of its own here.
    assert documented - seen == {("server", "RUNNING", "CANCEL", "IDLE")}
    assert seen - documented == set()


# --- its dumps ---


def test_frame_md_farewell() -> None:
    session = ServerSession()
    written(session)
    session.farewell(Status.RESOURCE_EXHAUSTED, "full")
    dump = section("How a session ends").split("```")[1].split("  ")[0]
    assert bytes.fromhex(dump).hex() == written(session).hex()


def test_frame_md_credit() -> None:
    """The example of credit: the frames, and the server's count after each."""
    text = section("Credit").split("\nWindow ")[1]
    window, size, cost = numbers(text)[:3]
    lines = text.split("```")[1].splitlines()[1:]
    column = lines[0].index("count at the server")
    client, server = pair(window)
    had_calls(client, 1)
    had_calls(server, 1)
    client.call(2, b"", True, 0)
    fed(server, written(client))
    assert server.next_event() == Kind.CALL
    assert (server.credit, cost) == (numbers(lines[1][column:])[0], HEADER_BYTES + size)

    for line in lines[2:]:
        if "waits" in line:
            assert server.credit <= 0
            continue
        before, _, _, _, after = line[column:].split("    ")[0].split()  # 64 - 36 = 28
        assert server.credit == int(before)
        header = bytes.fromhex(line[8:column].partition("...")[0])
        if line.startswith("ITEM"):
            server.item(bytes(size))
            said = written(server)
            fed(client, said)  # but its application has not asked for it yet
        else:
            given_back = int.from_bytes(header[-4:], "little")
            for _ in range(given_back // cost):
                assert client.next_event() == Kind.ITEM
            client.consumed()
            said = written(client)
            fed(server, said)
            assert server.next_event() is None
        assert said[:HEADER_BYTES].hex() == header.hex()
        assert server.credit == int(after)


def dump_lines() -> Iterator[tuple[str, bytes]]:
    for line in section("A session, byte by byte").splitlines():
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
