"""session: who may say what, and when (proto/FRAME.md, proto/frame_vectors.json).

The vectors are shared with tests/cpp/test_session.cpp.
"""

import random
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipc_bridge import frame
from ipc_bridge.errors import Error, ProtocolError, Status, UsageError
from ipc_bridge.frame import HEADER_BYTES, Kind
from ipc_bridge.session import (
    WINDOW_BYTES_LIMIT,
    ClientSession,
    ServerSession,
    State,
    next_id,
)
from session_support import (
    VECTORS,
    Either,
    Step,
    deliver,
    fed,
    from_hex,
    had_calls,
    items_of,
    message_of,
    pair,
    written,
)
from test_frame import examples, small_limits

# --- the vectors ---


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


# --- one thing at a time ---


@pytest.mark.parametrize("make", [ClientSession, ServerSession])
@pytest.mark.parametrize(
    ("window", "most"),
    [(0, 1), (-1, 1), (WINDOW_BYTES_LIMIT + 1, 1), (1, -1), (1, frame.PAYLOAD_BYTES_LIMIT + 1)],
)
def test_options_out_of_range(make: Callable[[int, int], Either], window: int, most: int) -> None:
    with pytest.raises(UsageError, match="INVALID_ARGUMENT"):
        make(window, most)


@pytest.mark.parametrize("make", [ClientSession, ServerSession])
def test_options_at_the_edge_of_the_range(make: Callable[[int, int], Either]) -> None:
    make(1, 0)
    make(WINDOW_BYTES_LIMIT, frame.PAYLOAD_BYTES_LIMIT)


def test_next_id() -> None:
    assert [next_id(n) for n in (0, 1, 0xFFFFFFFE, 0xFFFFFFFF)] == [1, 2, 0xFFFFFFFF, 1]


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
