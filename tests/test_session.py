"""session: who may say what, and when (proto/FRAME.md, proto/frame_vectors.json).

The vectors are shared with tests/cpp/test_session.cpp. The rest joins two sessions by channels
that lose nothing, and lets both applications do what they may in any order.
"""

import json
import random
import re
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ipc_bridge import frame
from ipc_bridge.errors import CallError, Error, ProtocolError, Status, UsageError
from ipc_bridge.frame import HEADER_BYTES, Kind
from ipc_bridge.session import (
    WINDOW_BYTES_MAX,
    ClientSession,
    ServerSession,
    State,
    next_id,
)
from test_frame import examples, small_limits

PROTO = Path(__file__).parent.parent / "proto"
Either = ClientSession | ServerSession


def fed(session: Either, data: bytes) -> int:
    """One read of the driver: the count of bytes that found room."""
    space = session.decoder.space()
    count = min(len(space), len(data))
    assert count > 0
    space[:count] = data[:count]
    if isinstance(session, ClientSession):
        session.filled(count)
    else:
        session.decoder.filled(count)
    return count


def deliver(session: Either, data: bytes) -> list[Kind]:
    """Read all of it; the events."""
    events = []
    while data:
        data = data[fed(session, data) :]
        while (event := session.next_event()) is not None:
            events.append(event)
    return events


def had_calls(session: Either, last_id: int) -> None:
    """As if calls up to that id had been made and answered."""
    session._call_id, session._next_id = last_id, next_id(last_id)
    if isinstance(session, ClientSession):
        session._answer_id = session._next_id


def written(session: Either, count: int = 1 << 40) -> bytes:
    """One write of the driver, of at most `count` bytes."""
    out = b"".join(bytes(part) for part in session.outbox.buffers())[:count]
    if out:
        session.outbox.sent(len(out))
    return out


# --- the vectors ---

VECTORS = json.loads((PROTO / "frame_vectors.json").read_text())
Step = dict[str, Any]


def from_hex(text: str | list[str]) -> bytes:
    out = []
    for token in (text if isinstance(text, str) else " ".join(text)).split():
        digits, _, times = token.partition("*")
        out.append(bytes.fromhex(digits) * int(times or 1))
    return b"".join(out)


def message_of(step: Step) -> str:
    return from_hex(step["message_hex"]).decode() if "message_hex" in step else step["message"]


class VectorRun:
    """Runs the steps of a vector on a session; `read_bytes` at a time arrive."""

    def __init__(self, vector: Step, read_bytes: int, by_items: bool) -> None:
        make = ClientSession if vector["side"] == "client" else ServerSession
        self.session: Any = make(vector.get("window", 4 << 20), vector.get("max_payload", 64 << 20))
        self.read_bytes = read_bytes
        self.by_items = by_items
        opening = VECTORS["openings"][vector["after"]] if "after" in vector else []
        for step in opening + vector["steps"]:
            self.run(step)

    def run(self, step: Step) -> None:
        session = self.session
        self.events: list[Step] = []
        error = ""
        try:
            if "receive" in step:
                self.receive(from_hex(step["receive"]))
            elif "local" in step:
                self.act(step)
            self.take_events()
        except Error as raised:
            error = str(raised)
        assert error == step.get("error", "")
        assert self.events == [self.plain(event) for event in step.get("events", [])]
        if "sends" in step:
            assert written(session).hex() == from_hex(step["sends"]).hex()
        if "state" in step:
            assert session.state.name == step["state"]
        if "credit" in step:
            assert session.credit == step["credit"]

    def receive(self, data: bytes) -> None:
        while data:
            data = data[fed(self.session, data[: self.read_bytes]) :]
            self.take_events()

    def take_events(self) -> None:
        while True:
            if self.by_items:
                views = self.session.items()
                self.events += [{"event": "ITEM", "payload": view.hex()} for view in views]
            kind = self.session.next_event()
            if kind is None:
                return
            self.add_event(kind)

    def add_event(self, kind: Kind) -> None:
        session = self.session
        event: Step = {"event": kind.name}
        if kind == Kind.CALL:
            event |= {"method": session.method, "streaming": session.streaming}
            event |= {"remaining_ms": session.remaining_ms}
        if kind == Kind.END:
            event["status"] = int(session.status)
            if session.status != Status.OK:
                event["message"] = session.message
        if kind != Kind.CANCEL and "message" not in event:
            event["payload"] = session.payload.hex()
        self.events.append(event)

    @staticmethod
    def plain(event: Step) -> Step:
        event = dict(event)
        if "payload" in event:
            event["payload"] = from_hex(event["payload"]).hex()
        if "message_hex" in event:
            event["message"] = message_of(event)
            del event["message_hex"]
        return event

    def act(self, step: Step) -> None:
        session = self.session
        payload = from_hex(step.get("payload", ""))
        match step["local"]:
            case "call":
                session.call(step["method"], payload, step["streaming"], step["remaining_ms"])
            case "item":
                session.item(payload)
            case "end":
                session.end(payload)
            case "fail":
                session.fail(Status(step["status"]), message_of(step))
            case "farewell":
                session.farewell(Status(step["status"]), message_of(step))
            case "end_of_input":
                kind = session.end_of_input()
                if kind is not None:
                    self.add_event(kind)
            case "last_call_id":
                had_calls(session, step["value"])
            case "next_item":
                session._index = step["value"]
            case "cancel" | "consumed" | "drain" as name:
                getattr(session, name)()
            case name:
                raise AssertionError(f"unknown step {name}")


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda vector: vector["name"])
def test_vector(vector: Step) -> None:
    for read_bytes in (1 << 30, 1, 7):
        VectorRun(vector, read_bytes, False)
        if vector["side"] == "client":
            VectorRun(vector, read_bytes, True)


def test_vectors_cover_the_whole_table() -> None:
    """Each state has been met by each kind of frame, the legal and the illegal ones."""
    met = set()

    class Watched(VectorRun):
        def run(self, step: Step) -> None:
            data, session = from_hex(step.get("receive", "")), self.session
            if len(data) >= HEADER_BYTES and 1 <= data[4] <= len(Kind):
                met.add((type(session), session.state, data[4]))
            super().run(step)

    for vector in VECTORS["vectors"]:
        Watched(vector, 1 << 30, False)
    for side in (ClientSession, ServerSession):
        for state in side.table:
            assert {(side, state, int(kind)) for kind in Kind} <= met


# --- FRAME.md tells the truth ---

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


# --- one thing at a time ---


def pair(window: int = 4 << 20, most: int = 64 << 20) -> tuple[ClientSession, ServerSession]:
    """Two sessions that have met."""
    client, server = ClientSession(window, most), ServerSession(4 << 20, most)
    fed(server, written(client))
    fed(client, written(server))
    assert client.next_event() is None
    assert server.next_event() is None
    return client, server


@pytest.mark.parametrize("make", [ClientSession, ServerSession])
@pytest.mark.parametrize(
    ("window", "most"),
    [(0, 1), (-1, 1), (WINDOW_BYTES_MAX + 1, 1), (1, -1), (1, frame.PAYLOAD_BYTES_LIMIT + 1)],
)
def test_options_out_of_range(make: Callable[[int, int], Either], window: int, most: int) -> None:
    with pytest.raises(UsageError, match="INVALID_ARGUMENT"):
        make(window, most)


@pytest.mark.parametrize("make", [ClientSession, ServerSession])
def test_options_at_the_edge_of_the_range(make: Callable[[int, int], Either]) -> None:
    make(1, 0)
    make(WINDOW_BYTES_MAX, frame.PAYLOAD_BYTES_LIMIT)


def test_next_id() -> None:
    assert [next_id(n) for n in (0, 1, 0xFFFFFFFE, 0xFFFFFFFF)] == [1, 2, 0xFFFFFFFF, 1]


def items_of(client: ClientSession, by_items: bool) -> list[bytes]:
    """The items that stand ready, in one pass."""
    if by_items:
        return [bytes(view) for view in client.items()]
    out = []
    while client.next_event() == Kind.ITEM:
        out.append(bytes(client.payload))
    return out


@pytest.mark.parametrize("by_items", [False, True])
def test_credit_counts_only_for_what_is_read_after_it(by_items: bool) -> None:
    """A CREDIT that is sent now cannot have allowed an item that is here already."""
    client, server = pair(window=32)
    client.call(2, b"", True, 0)
    fed(server, written(client))
    assert server.next_event() == Kind.CALL
    server.item(b"")
    server.item(b"")
    assert server.credit == 0
    server.item(b"x")  # a server that overruns its credit
    fed(client, written(server))
    assert client.items() == [b"", b""]
    client.consumed()
    assert client.outbox.size == HEADER_BYTES
    if by_items:
        assert client.items() == []
    with pytest.raises(ProtocolError, match="ITEM without credit"):
        client.next_event()


@pytest.mark.parametrize("by_items", [False, True])
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 1000])
@pytest.mark.parametrize("window", [1, 16, 17, 31, 32, 33, 500, 4096])
def test_overrun_is_noticed_at_the_first_item(window: int, size: int, by_items: bool) -> None:
    client, server = pair(window)
    client.call(2, b"", True, 0)
    fed(server, written(client))
    assert server.next_event() == Kind.CALL
    got = 0
    for _ in range(5):  # with the credit that comes back
        sent = 0
        while server.credit > 0:
            server.item(bytes(size))
            sent += 1
        assert feed_session(client, written(server), by_items) == sent
        client.consumed()
        got += sent
        fed(server, written(client))
        assert server.next_event() is None
        assert server.credit > 0, "the client has used everything: it must give credit back"
    while server.credit > 0:
        server.item(bytes(size))
    server.item(b"")
    with pytest.raises(ProtocolError, match="ITEM without credit"):
        feed_session(client, written(server), by_items)


def test_a_pass_of_items_ends_when_credit_is_due() -> None:
    """Else a server that has no credit left would wait for the whole pass to be used."""
    client, server = pair(window=1000)
    client.call(2, b"", True, 0)
    assert deliver(server, written(client)) == [Kind.CALL]
    for _ in range(10):
        server.item(bytes(84))  # costs 100
    fed(client, written(server))
    assert len(client.items()) == 6
    client.consumed()
    assert client.outbox.size == HEADER_BYTES
    assert len(client.items()) == 4


def feed_session(client: ClientSession, data: bytes, by_items: bool) -> int:
    """Read all of it; the count of items."""
    count = 0
    while data:
        data = data[fed(client, data) :]
        while True:
            items = items_of(client, by_items)
            if not items and client.next_event() is None:
                break
            count += len(items) or 1
    return count


def test_request_lives_until_its_call_has_ended() -> None:
    with small_limits():
        client, server = pair(window=64, most=2000)
        request = random.Random(1).randbytes(300)
        client.call(2, request, True, 0)
        assert deliver(server, written(client)) == [Kind.CALL]
        view = server.payload
        for _ in range(200):
            server.item(b"x" * 40)
            fed(client, written(server))
            assert client.next_event() == Kind.ITEM
            client.consumed()
            if client.outbox.size:
                fed(server, written(client))
            assert server.next_event() is None
            assert view == request
        server.end()


def test_reply_may_be_the_request_itself() -> None:
    """An echo sends a view of the decoder's buffer: nothing is read over it before it is out."""
    with small_limits():
        client, server = pair(most=2000)
        for n in range(50):
            request = random.Random(n).randbytes(30 * n % 700)
            client.call(1, request, False, 0)
            client.cancel()
            client.call(1, b"next", False, 0)
            client.cancel()
            data = written(client)
            events = []
            while data:
                data = data[fed(server, data) :]
                event = server.next_event()
                if event is not None:
                    events.append(event)
                    break
            assert events == [Kind.CALL]
            server.end(server.payload)
            first = written(server, 20)
            assert server.state == State.IDLE
            rest = written(server)  # nothing is read before it is out
            answer = first + rest
            assert answer[HEADER_BYTES:] == request
            while True:
                event = server.next_event()
                if event == Kind.CALL:
                    server.fail(Status.CANCELLED, "")
                    answer += written(server)
                    if not data:
                        break
                elif event is None:
                    if not data:
                        break
                    data = data[fed(server, data) :]
            while answer:
                answer = answer[fed(client, answer) :]
                assert client.next_event() is None


# --- cancel races END ---


@pytest.mark.parametrize("streaming", [False, True])
def test_cancel_racing_the_end(streaming: bool) -> None:
    """The client leaves after each byte of the answer; the next call is answered all the same."""
    races = 0
    client, server = pair()
    size = 0
    while races < 10_000:
        size += 1
        cut, whole = 0, 1
        while cut < whole:
            client.call(1, b"first", streaming, 0)
            assert deliver(server, written(client)) == [Kind.CALL]
            if streaming:
                server.item(bytes(size))
                server.item(bytes(size // 2))
            server.end(b"" if streaming else bytes(size))
            answer = written(server)
            whole = len(answer) + 1
            ended = Kind.END in deliver(client, answer[:cut])
            assert ended == (cut == len(answer))
            client.cancel()
            assert (client.outbox.size == 0) == ended
            client.call(1, b"second", False, 0)
            assert deliver(server, written(client)) == [Kind.CALL]
            server.end(server.payload)
            assert deliver(client, answer[cut:] + written(server)) == [Kind.END]
            assert bytes(client.payload) == b"second"
            cut += 1
            races += 1


# --- two sessions, any order ---


@dataclass
class Made:
    """What is known of one call."""

    streaming: bool
    request: bytes
    sent: list[bytes] = field(default_factory=list)  # items of the server
    got: list[bytes] = field(default_factory=list)  # items at the client
    answer: tuple[Status, bytes] | None = None  # how the server ended it
    results: list[tuple[Status, bytes] | str] = field(default_factory=list)  # at the client


def cost(items: list[bytes]) -> int:
    return sum(HEADER_BYTES + len(payload) for payload in items)


class TwoSessions(RuleBasedStateMachine):
    """Both applications do what they may; each driver reads and writes by the rules of FRAME.md."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = small_limits()
        self.limits.__enter__()

    def teardown(self) -> None:
        try:
            if hasattr(self, "client"):
                self.finish()
        finally:
            self.limits.__exit__(None, None, None)

    @initialize(
        window=st.sampled_from([1, 16, 50, 300, 5000]),
        last_id=st.sampled_from([0, 0xFFFFFFFD, 0xFFFFFFFE, 0xFFFFFFFF]),
        index=st.sampled_from([0, 0xFFFFFFFE]),
    )
    def meet(self, window: int, last_id: int, index: int) -> None:
        self.client, self.server = ClientSession(window, 2000), ServerSession(1, 2000)
        had_calls(self.client, last_id)
        had_calls(self.server, last_id)
        self.first_index = index
        self.to_server, self.to_client = b"", b""
        self.server_closed = self.client_closed = False
        self.calls: list[Made] = []
        self.accepted = 0  # calls that the server has seen
        self.request: memoryview | None = None
        self.on_lane = False  # the client's next input may be the reply of a small call

    def last(self) -> Made:
        return self.calls[-1]

    def running(self) -> Made:
        return self.calls[self.accepted - 1]

    # The client's application.

    @precondition(lambda self: self.client.state == State.IDLE)
    @rule(
        streaming=st.booleans(),
        size=st.sampled_from([0, 1, 24, 25, 100, 130, 700]),
        most=st.sampled_from([0, 1, 20, 1 << 20]),
    )
    def call(self, streaming: bool, size: int, most: int) -> None:
        request = random.Random(len(self.calls)).randbytes(size)
        small = None if streaming or most == 0 else self.client.call_small(7, request, 0)
        if small is not None:
            self.on_lane = most >= len(small)
            self.to_server += small[:most]
            if not self.on_lane:
                self.client.outbox.put_rest(small, most)
            self.calls.append(Made(False, request))
            return
        try:
            self.client.call(7, request, streaming, 0)
        except CallError:
            assert self.client._leaving
            return
        self.client._index = self.first_index if streaming else 0
        self.calls.append(Made(streaming, request))

    @precondition(lambda self: self.client.state == State.OPEN)
    @rule()
    def cancel(self) -> None:
        self.on_lane = False
        self.client.cancel()
        self.last().results.append("cancelled")

    @rule()
    def consume(self) -> None:
        self.client.consumed()

    # The client's driver.

    @precondition(lambda self: self.client.outbox.size and not self.client_closed)
    @rule(most=st.sampled_from([1, 5, 16, 40, 1 << 20]))
    def client_writes(self, most: int) -> None:
        self.to_server += written(self.client, most)

    @precondition(lambda self: self.to_client and self.client.state != State.CLOSED)
    @rule(most=st.sampled_from([1, 5, 16, 40, 1 << 20]), by_items=st.booleans())
    def client_reads(self, most: int, by_items: bool) -> None:
        on_lane, self.on_lane = self.on_lane, False
        if on_lane:
            space = self.client.space
            count = min(len(space), len(self.to_client), most)
            space[:count] = self.to_client[:count]
            self.to_client = self.to_client[count:]
            if self.client.filled_by_reply(count) is not None:
                self.on_end()
                return
        else:
            count = fed(self.client, self.to_client[:most])
            self.to_client = self.to_client[count:]
        while True:
            if by_items:
                self.last_got(items_of(self.client, True))
            event = self.client.next_event()
            if event is None:
                return
            if event == Kind.ITEM:
                self.last_got([bytes(self.client.payload)])
            else:
                self.on_end()
                if self.client.state == State.CLOSED:
                    return

    def last_got(self, items: list[bytes]) -> None:
        if items:
            self.last().got += items

    def on_end(self) -> None:
        ok = self.client.status == Status.OK
        detail = bytes(self.client.payload) if ok else self.client.message.encode()
        self.last().results.append((self.client.status, detail))

    @precondition(lambda self: self.server_closed and not self.to_client)
    @rule()
    def client_sees_the_end(self) -> None:
        if self.client.state != State.CLOSED and self.client.end_of_input() == Kind.END:
            self.on_end()

    @precondition(lambda self: len(self.calls) > 3)
    @rule(dice=st.integers(0, 20))
    def client_closes(self, dice: int) -> None:
        if dice == 0:
            self.client_closed = True
            if self.client.state == State.OPEN:
                self.last().results.append("closed")
            self.client.state = State.CLOSED

    # The server's driver.

    def server_may_read(self) -> bool:
        session = self.server
        if self.server_closed or session.cancelled or session.state == State.CLOSED:
            return False
        if session.state == State.RUNNING:
            return True
        return session.state in (State.HELLO, State.IDLE) and session.outbox.size == 0

    @precondition(lambda self: self.to_server and self.server_may_read())
    @rule(most=st.sampled_from([1, 5, 16, 40, 1 << 20]), lane=st.booleans())
    def server_reads(self, most: int, lane: bool) -> None:
        on_lane = lane and self.server.state == State.IDLE  # else it would free a held request
        space = self.server.decoder.fresh_space() if on_lane else None
        if space is not None:
            count = min(len(space), len(self.to_server), most)
            space[:count] = self.to_server[:count]
            self.to_server = self.to_server[count:]
            if self.server.filled_by_call(count):
                self.on_call()
        else:
            count = fed(self.server, self.to_server[:most])
            self.to_server = self.to_server[count:]
        self.server_steps()

    @precondition(lambda self: self.client_closed and not self.to_server)
    @rule()
    def server_sees_the_end(self) -> None:
        if self.server_may_read():
            self.server.end_of_input()
            self.request = None

    @precondition(lambda self: self.server.outbox.size and not self.server_closed)
    @rule(most=st.sampled_from([1, 5, 16, 40, 1 << 20]))
    def server_writes(self, most: int) -> None:
        self.to_client += written(self.server, most)
        self.server_steps()

    def server_steps(self) -> None:
        session = self.server
        if session.state == State.DRAINING and session.outbox.size == 0:
            self.server_closed = True
        while self.server_may_read():
            if session.state == State.IDLE:
                session.decoder.release()
            event = session.next_event()
            if event is None:
                return
            if event == Kind.CALL:
                self.on_call()

    def on_call(self) -> None:
        session = self.server
        made = self.calls[self.accepted]
        self.accepted += 1
        assert session.payload == made.request
        assert (session.streaming, session.method) == (made.streaming, 7)
        session._index = self.first_index if made.streaming else 0
        self.request = session.payload

    # The server's application.

    def is_running(self) -> bool:
        return hasattr(self, "server") and self.server.state == State.RUNNING

    @precondition(lambda self: self.is_running())
    @rule(lengths=st.lists(st.sampled_from([0, 1, 8, 24, 25, 110, 600]), max_size=5))
    def items(self, lengths: list[int]) -> None:
        made = self.running()
        for length in lengths:
            if not made.streaming or self.server.credit <= 0:
                return
            payload = random.Random(length + len(made.sent)).randbytes(length)
            self.server.item(payload)
            made.sent.append(payload)
            ahead = cost(made.sent) - cost(made.got)
            assert ahead < self.client.window_bytes + cost([payload])

    @precondition(lambda self: self.is_running())
    @rule(echo=st.booleans(), most=st.sampled_from([0, 1, 20, 1 << 20]))
    def end(self, echo: bool, most: int = 0) -> None:
        made = self.running()
        reply = self.server.payload if echo and not made.streaming else b""
        made.answer = Status.OK, bytes(reply)
        small = self.server.end_small(reply) if most and not made.streaming else None
        if small is None:
            self.server.end(reply)
        else:
            self.to_client += small[:most]
            if most < len(small):
                self.server.outbox.put_rest(small, most)
        self.after_end()

    @precondition(lambda self: self.is_running())
    @rule(message=st.sampled_from(["", "no", "x" * 1024]))
    def fail(self, message: str) -> None:
        self.running().answer = Status.ABORTED, message.encode()
        self.server.fail(Status.ABORTED, message)
        self.after_end()

    def after_end(self) -> None:
        self.request = None
        self.server_steps()

    @precondition(lambda self: len(self.calls) > 2)
    @rule(dice=st.integers(0, 10))
    def drain(self, dice: int) -> None:
        if dice == 0 and not self.server_closed:
            self.server.drain()
            self.server_steps()

    # What always holds.

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "client"):
            return
        if self.request is not None:
            assert self.request == self.running().request, "the request changed under its handler"
        for made in self.calls:
            assert len(made.results) <= 1
            assert made.got == made.sent[: len(made.got)]
        if self.calls:
            assert bool(self.last().results) == (self.client.state != State.OPEN)

    def finish(self) -> None:
        """Let everything that is under way come to its end."""
        while not (self.server_closed or self.client_closed):
            waiting = [self.client.outbox.size, self.server.outbox.size]
            if not any((*waiting, self.to_server, self.to_client, self.is_running())):
                break
            if self.client.outbox.size and not self.client_closed:
                self.client_writes(1 << 20)
            if self.to_server and self.server_may_read():
                self.server_reads(1 << 20, False)
            if self.is_running():
                self.end(True)
            if self.server.outbox.size and not self.server_closed:
                self.server_writes(1 << 20)
            if self.to_client and self.client.state != State.CLOSED:
                self.client_reads(1 << 20, False)
        if self.server_closed:
            while self.to_client and self.client.state != State.CLOSED:
                self.client_reads(1 << 20, False)
            self.client_sees_the_end()
        assert self.client.state != State.OPEN
        for made in self.calls:
            (result,) = made.results
            if isinstance(result, str) or result[0] == Status.UNAVAILABLE:
                continue  # given up, or the server was closed or draining
            assert result == made.answer
            if result[0] == Status.OK:
                assert made.got == made.sent
                assert result[1] == (b"" if made.streaming else made.answer[1])


def test_two_sessions_in_any_order() -> None:
    run_state_machine_as_test(TwoSessions, settings=examples(300, 60))


# --- garbage ---

TALK = [
    (vector["side"], b"".join(from_hex(step.get("receive", "")) for step in steps))
    for vector in VECTORS["vectors"]
    for steps in [VECTORS["openings"].get(vector.get("after"), []) + vector["steps"]]
    if any("receive" in step for step in steps)
]


@examples(400)
@given(
    st.sampled_from(TALK),
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4),
    st.binary(max_size=40),
    st.booleans(),
)
def test_garbage_is_a_protocol_error_and_final(
    talk: tuple[str, bytes], flips: list[tuple[int, int]], tail: bytes, open_a_call: bool
) -> None:
    data = bytearray(talk[1] + tail)
    for at, value in flips:
        data[at % len(data)] ^= value
    session: Either = ClientSession() if talk[0] == "client" else ServerSession()
    rest = bytes(data)
    try:
        while rest:
            rest = rest[fed(session, rest[:50]) :]
            while (event := session.next_event()) is not None:
                if isinstance(session, ServerSession) and event == Kind.CANCEL:
                    session.fail(Status.CANCELLED, "")
                if session.state == State.CLOSED:
                    return
            if isinstance(session, ClientSession):
                session.items()
                session.consumed()
                if session.state == State.IDLE and open_a_call and not session._leaving:
                    session.call(1, b"", True, 0)
    except ProtocolError as error:
        text = re.escape(str(error))
        for _ in range(2):
            with pytest.raises(ProtocolError, match=f"^{text}$"):
                session.next_event()


# --- nobody waits for ever (the proof of FRAME.md, played) ---


class Channel:
    """Bytes one way, at most `capacity` of them; `atomic`: as pipe(7), a small write goes whole or
    not at all."""

    def __init__(self, capacity: int, atomic: bool) -> None:
        self.capacity = capacity
        self.atomic = atomic
        self.data = bytearray()

    def write(self, session: Either) -> None:
        room = self.capacity - len(self.data)
        if self.atomic and 0 < room < min(session.outbox.size, self.capacity):
            room = 0
        if room:
            self.data += written(session, room)

    def read(self, session: Either, most: int) -> None:
        count = fed(session, bytes(self.data[:most]))
        del self.data[:count]


# A peer is a generator that yields what it waits for: (readable, writable).
Wants = Generator[tuple[bool, bool], None, None]


class Play:
    """The two drivers by their rules in FRAME.md, on small channels, in any order of steps."""

    def __init__(self, seed: int, capacity: int, atomic: bool, client_reads: bool = True) -> None:
        self.dice = random.Random(seed)
        self.client_reads = client_reads  # False: the mistake that the rule exists for
        self.client, self.server = ClientSession(self.dice.choice([1, 100, 3000])), ServerSession()
        self.up, self.down = Channel(capacity, atomic), Channel(capacity, atomic)
        self.answered = 0

    def run(self) -> bool:
        """False: both sleep, and nothing will wake them."""
        peers = {
            "client": (self.client_peer(), self.down, self.up),
            "server": (self.server_peer(), self.up, self.down),
        }
        wants = {name: next(peer[0]) for name, peer in peers.items()}
        while True:
            ready = [
                name
                for name, (readable, writable) in wants.items()
                if (readable and peers[name][1].data)
                or (writable and len(peers[name][2].data) < peers[name][2].capacity)
                or not (readable or writable)
            ]
            if not ready:
                return False
            name = self.dice.choice(ready)
            try:
                wants[name] = next(peers[name][0])
            except StopIteration:
                return True  # the client has done all it wanted

    def chunk(self) -> int:
        return self.dice.choice([1, 7, 1 << 20])

    def client_peer(self) -> Wants:
        """Calls of all kinds; each CALL leaves whole before anything else is done."""
        session = self.client
        while session.state == State.HELLO:
            yield from self.client_exchange()
            session.next_event()
        for n in range(8):
            request = bytes(self.dice.choice([0, 10, 5 * self.up.capacity]))
            streaming = self.dice.random() < 0.6
            yield from self.client_send()
            session.call(2 if streaming else 1, request, streaming, 0)
            yield from self.client_send()
            leave_after = self.dice.choice([0, 1, 5, 1 << 20])
            while session.state == State.OPEN:
                event = session.next_event()
                if event == Kind.END:
                    self.answered += 1
                elif event == Kind.ITEM:
                    session.consumed()
                    leave_after -= 1
                else:
                    yield from self.client_exchange()
                if leave_after <= 0 and streaming:
                    session.cancel()
            if n % 2:
                yield False, False  # the application does something else

    def client_send(self) -> Wants:
        while self.client.outbox.size:
            self.up.write(self.client)
            if self.client.outbox.size:
                yield self.client_reads, True
                if self.client_reads and self.down.data:
                    self.down.read(self.client, self.chunk())
                    while self.client.next_event() is not None:
                        raise AssertionError("an answer before the call")

    def client_exchange(self) -> Wants:
        self.up.write(self.client)
        yield True, bool(self.client.outbox.size)
        if self.down.data:
            self.down.read(self.client, self.chunk())

    def server_peer(self) -> Wants:
        session = self.server
        left = 0
        while True:
            self.down.write(session)
            if session.state == State.RUNNING:
                session.next_event()
                if session.cancelled:
                    session.fail(Status.CANCELLED, "cancelled by the client")
                elif not session.outbox.size and left and session.credit > 0:
                    session.item(bytes(self.dice.choice([0, 30, 2 * self.down.capacity])))
                    left -= 1
                elif not session.outbox.size and not left:
                    session.end(b"" if session.streaming else session.payload)
                else:  # no credit, or no room
                    yield True, bool(session.outbox.size)
                    if self.up.data:
                        self.up.read(session, self.chunk())
            elif session.outbox.size:
                yield False, True  # END is queued: nothing is read before it is out
            elif session.next_event() == Kind.CALL:
                left = self.dice.choice([0, 3, 40]) if session.streaming else 0
            else:
                yield True, False
                self.up.read(session, self.chunk())


@pytest.mark.parametrize("atomic", [False, True])
@pytest.mark.parametrize("capacity", [1, 16, 61, 4096])
def test_no_deadlock_on_small_channels(capacity: int, atomic: bool) -> None:
    for seed in range(100):
        play = Play(seed, capacity, atomic)
        assert play.run(), f"seed {seed}: both sleep"


def test_the_rule_is_needed() -> None:
    """A client that only writes while it cannot write: the play finds the deadlock."""
    assert not all(Play(seed, 61, False, client_reads=False).run() for seed in range(40))
