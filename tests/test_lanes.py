"""The lanes of small calls: shortcuts that must do what the general path does, and nothing else.

Sans-IO twins: one session goes by `call_small`, `filled_by_reply`, `filled_by_call`, `end_small`,
the other by what these stand for. Then clients and servers over a channel that takes and gives any
part of what it is asked for. (Both mixed, in any order: `TwoSessions` of test_two_sessions.)
"""

import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc_bridge.client import Client
from ipc_bridge.connection import Connection
from ipc_bridge.errors import CallError, Error, ProtocolError, Status
from ipc_bridge.frame import BUFFER_BYTES, HEADER_BYTES, IDLE_REFILLS_MAX, Buffer, Kind
from ipc_bridge.handlers import Call, Service
from ipc_bridge.session import ClientSession, ServerSession, State
from ipc_bridge.system import END, NEVER, WOULD_BLOCK, Spinner, Stream, Wait
from session_support import Either, deliver, fed, had_calls, pair, written

MOST = 2000  # max_payload of both sides
IDS = st.sampled_from([0, 1, 0xFFFFFFFE, 0xFFFFFFFF])  # of the last call
SIZES = st.sampled_from([0, 1, 8, 100, 1024, 1025, MOST, MOST + 1])


def frame_of(
    size: int, kind: int, flags: int = 0, code: int = 0, call_id: int = 0, value: int = 0
) -> bytes:
    return struct.pack("<IBBHII", size, kind, flags, code, call_id, value) + bytes(min(size, 3000))


def any_frame(kind: Kind) -> st.SearchStrategy[tuple[int, int, int, int, int, int]]:
    """Mostly what a lane is for, with any field off; ids count from the call's own."""
    return st.tuples(
        SIZES,
        st.one_of(st.just(int(kind)), st.integers(0, 8)),
        st.sampled_from([0, 0, 0, 1, 2]),
        st.sampled_from([0, 0, 0, 1, 16, 17, 0xFFFF]),
        st.sampled_from([0, 0, 0, -1, 1]),
        st.sampled_from([0, 0, 0, 1, 0xFFFFFFFF]),
    )


def bytes_of(fields: tuple[int, int, int, int, int, int], call_id: int) -> bytes:
    size, kind, flags, code, shift, value = fields
    return frame_of(size, kind, flags, code, (call_id + shift) & 0xFFFFFFFF, value)


def fill(session: Either, data: bytes) -> int:
    """Read on the lane, without telling anybody."""
    assert session.quiet or session.find_lane()
    count = min(len(session.space), len(data))
    session.space[:count] = data[:count]
    return count


def state_of(session: Either) -> dict[str, Any]:
    """All that decides what the session does next; the payload by its bytes."""
    left_out = {"decoder", "outbox", "broken", "payload", "space", "status", "quiet"}
    if session.state not in (State.OPEN, State.RUNNING):
        left_out |= {"streaming", "_streaming", "credit", "_index"}  # of no call
    state = {name: value for name, value in vars(session).items() if name not in left_out}
    buffer = session.decoder
    state["broken"] = str(session.broken)
    state["undecoded"] = bytes(buffer._view[buffer._start : buffer._end])
    on_lane = session.quiet and session.state == State.RUNNING  # then it is held on leaving
    state["held"] = HEADER_BYTES + len(session.payload) if on_lane else buffer._floor
    state["outbox"] = b"".join(map(bytes, session.outbox.buffers()))
    return state


def events_of(session: Either, first: Sequence[object]) -> list[object]:
    """What there is to decode, and how it ends."""
    events = list(first)
    try:
        while (event := session.next_event()) is not None:
            events.append((event, bytes(session.payload), session.status, session.message))
            if session.state in (State.CLOSED, State.RUNNING):
                break
    except ProtocolError as error:
        events.append(str(error))
    return events


# --- the sessions ---


@settings(max_examples=500, deadline=None)
@given(IDS, SIZES, st.lists(any_frame(Kind.END), max_size=2), st.integers(0, 60), st.booleans())
def test_a_client_on_the_lane(
    last_id: int,
    size: int,
    answers: list[tuple[int, int, int, int, int, int]],
    cut: int,
    leaving: bool,
) -> None:
    lane, general = (pair(most=MOST)[0] for _ in range(2))
    for client in (lane, general):
        had_calls(client, last_id)
        if leaving:
            deliver(client, frame_of(0, Kind.GOODBYE, value=last_id))
    errors = []
    request = lane.call_small(7, bytes(size), 9)
    try:
        general.call(7, bytes(size), False, 9)
    except Error as error:
        errors.append(error)
    assert (request is None) == bool(errors)
    if request is None:
        assert state_of(lane) == state_of(general)
        return
    assert request == written(general)
    data = b"".join(bytes_of(answer, lane._call_id) for answer in answers)
    data = data[: max(1, len(data) - cut)] or b"\0"
    count = fill(lane, data)
    assert fed(general, data[:count]) == count
    reply = lane.filled_by_reply(count)
    first = [] if reply is None else [(Kind.END, bytes(reply), Status.OK, "")]
    assert events_of(lane, first) == events_of(general, [])
    assert state_of(lane) == state_of(general)


@settings(max_examples=500, deadline=None)
@given(IDS, st.lists(any_frame(Kind.CALL), max_size=2), st.integers(0, 60), SIZES, st.booleans())
def test_a_server_on_the_lane(
    last_id: int,
    calls: list[tuple[int, int, int, int, int, int]],
    cut: int,
    size: int,
    draining: bool,
) -> None:
    lane, general = (pair(most=MOST)[1] for _ in range(2))
    for server in (lane, general):
        had_calls(server, last_id)
    data = b"".join(bytes_of(call, lane._next_id) for call in calls)
    data = data[: max(1, len(data) - cut)] or b"\0"
    count = fill(lane, data)
    assert fed(general, data[:count]) == count
    first = []
    if lane.filled_by_call(count):
        first.append((Kind.CALL, bytes(lane.payload), lane.status, lane.message))
        assert general.next_event() == Kind.CALL
        assert state_of(lane) == state_of(general)
        if draining:
            lane.drain()
            general.drain()
        reply = lane.end_small(bytes(size))
        if draining or size > MOST:
            assert reply is None
            return
        general.end(bytes(size))
        assert reply == written(general)
        general.decoder.release()  # as the driver does then
    else:
        assert events_of(lane, []) == events_of(general, [])
    assert state_of(lane) == state_of(general)


def test_the_lane_is_for_a_client_with_nothing_else_to_do() -> None:
    client, _ = pair()
    assert client.call_small(1, b"", 0) is not None
    assert client.call_small(1, b"", 0) is None  # a call is open
    client.cancel()
    assert client.call_small(1, b"", 0) is None  # CANCEL is to be written
    written(client)
    assert client.call_small(1, b"", 0) is None  # its END is to come
    deliver(client, frame_of(0, Kind.END, call_id=1))
    fed(client, frame_of(0, Kind.GOODBYE, value=1))
    assert client.call_small(1, b"", 0) is None  # there is something to decode
    assert client.next_event() is None
    assert client.call_small(1, b"", 0) is None  # the server is leaving


def test_the_lane_is_for_bytes() -> None:
    client, server = pair()
    wide = memoryview(bytes(16)).cast("Q")
    assert client.call_small(1, wide, 0) is None
    request = client.call_small(1, memoryview(b"12"), 0)
    assert request is not None
    assert server.filled_by_call(fill(server, request))
    assert server.end_small(wide) is None
    assert server.end_small(b"34") == frame_of(2, Kind.END, call_id=1)[:HEADER_BYTES] + b"34"


def test_nothing_overtakes_the_outbox() -> None:
    client, server = ClientSession(), ServerSession()  # what they say first is not written yet
    deliver(client, written(ServerSession()))
    assert client.call_small(1, b"", 0) is None
    assert deliver(server, written(ClientSession()) + frame_of(0, Kind.CALL, 0, 1, 1)) == [
        Kind.CALL
    ]
    assert server.end_small(b"") is None


def test_a_large_payload_takes_the_general_path() -> None:
    client, server = pair()
    large = bytes(16385)
    assert client.call_small(1, large, 0) is None
    client.call(1, large, False, 0)
    deliver(server, written(client))
    assert server.end_small(large) is None


def test_a_grown_buffer_is_not_for_the_lane_until_it_is_given_back() -> None:
    client, server = pair()

    def exchange(payload: bytes) -> bool:
        """Does the client go by the lane?"""
        request = client.call_small(1, payload, 0)
        if request is None:
            client.call(1, payload, False, 0)
        assert deliver(server, request or written(client)) == [Kind.CALL]
        server.end(server.payload)
        reply = written(server)
        server.decoder.release()
        assert deliver(client, reply) == [Kind.END]
        assert client.payload == payload
        return request is not None

    assert exchange(b"small")
    assert not exchange(bytes(BUFFER_BYTES))
    for _ in range(IDLE_REFILLS_MAX):
        assert not server.find_lane()
        assert not exchange(b"small")
    for _ in range(2):  # the first refill after the large one does not count, nor does the last
        exchange(b"small")
    assert server.find_lane()
    assert exchange(b"small")


@pytest.mark.parametrize("when", ["before the next call", "with its reply", "in two parts"])
def test_a_late_reply(when: str) -> None:
    """It crosses the CANCEL of its call, and is dropped; then the lane is free again."""
    client, server = pair()
    request = client.call_small(1, b"late", 9)
    assert deliver(server, request or b"") == [Kind.CALL]
    client.cancel()
    server.end(server.payload)
    reply = written(server)
    server.decoder.release()
    if when == "before the next call":
        deliver(client, reply)
        written(client)
    elif when == "in two parts":
        reply = reply[fed(client, reply[:18]) :]
        assert client.next_event() is None
    small = client.call_small(1, b"next", 9)
    assert (small is not None) == (when == "before the next call")
    if small is None:
        client.call(1, b"next", False, 9)
    assert deliver(server, small or written(client)) == [Kind.CALL]
    server.end(server.payload)
    if small is None:
        assert deliver(client, reply + written(server)) == [Kind.END]
    else:
        assert client.filled_by_reply(fill(client, written(server))) is not None
    assert bytes(client.payload) == b"next"
    assert client.call_small(1, b"last", 0)


def test_garbage_before_and_nothing_after() -> None:
    client, _ = pair()
    with pytest.raises(ProtocolError):
        deliver(client, frame_of(0, Kind.END, call_id=5))
    assert client.call_small(1, b"", 0) is None


@pytest.mark.parametrize(
    "leave",
    [
        lambda client: client.cancel(),
        lambda client: client.next_event(),
        lambda client: client.hold(),
        lambda client: client.filled(0),
        lambda client: (
            client.filled_by_reply(fill(client, frame_of(0, Kind.END, call_id=1))),
            client.call(1, b"", False, 0),
        ),
    ],
)
def test_a_client_leaves_the_lane(leave: Callable[[ClientSession], object]) -> None:
    client, _ = pair()
    assert client.call_small(1, b"", 0)
    assert client.quiet
    leave(client)
    assert not client.quiet


@pytest.mark.parametrize(
    "leave",
    [
        lambda server: server.end(b""),
        lambda server: server.fail(Status.ABORTED, "no"),
        lambda server: server.drain(),
        lambda server: server.next_event(),
        lambda server: server.filled(0),
    ],
)
def test_a_server_leaves_the_lane(leave: Callable[[ServerSession], object]) -> None:
    _, server = pair()
    assert server.filled_by_call(fill(server, frame_of(0, Kind.CALL, 0, 1, 1)))
    assert server.quiet
    leave(server)
    assert not server.quiet
    assert server.end_small(b"") is None


def test_a_request_is_held_when_its_handler_looks() -> None:
    _, server = pair()
    request = frame_of(8, Kind.CALL, 0, 1, 1)[:16] + b"a request"[:8]
    assert server.filled_by_call(fill(server, request))
    server.next_event()
    fed(server, frame_of(100, Kind.CALL, 0, 1, 2))
    assert bytes(server.payload) == b"a request"[:8]


def test_a_reply_is_held_while_it_is_a_request() -> None:
    """A large one is sent from where it lies, and what comes meanwhile is read."""
    client, _ = pair()
    large = bytes(range(250)) * 80
    assert client.call_small(1, b"", 0)
    reply = client.filled_by_reply(
        fill(client, struct.pack("<IBBHII", len(large), 4, 0, 0, 1, 0) + large)
    )
    assert reply is not None
    assert bytes(reply) == large
    client.hold()
    client.call(1, reply, False, 0)
    fed(client, frame_of(0, Kind.GOODBYE, value=2))
    assert written(client)[HEADER_BYTES:] == large


def test_an_item_in_answer_to_a_small_call() -> None:
    client, _ = pair()
    client.call(1, b"", True, 0)
    written(client)
    assert deliver(client, frame_of(0, Kind.END, call_id=1)) == [Kind.END]
    assert client.call_small(1, b"", 0)
    assert client.filled_by_reply(fill(client, frame_of(8, Kind.ITEM, call_id=2)[:24])) is None
    with pytest.raises(ProtocolError, match="ITEM in answer to a unary call"):
        client.next_event()


# --- the drivers ---

ECHO, FAIL, LEAVE = 1, 2, 3  # methods; after LEAVE the server says GOODBYE


class Choppy(Stream):
    """A stream of one thread: writes and reads take any part, and nothing is waited for in vain."""

    spinner = Spinner(Wait.BLOCK)

    def __init__(self, seed: int, received: bytes = b"") -> None:
        self.received = received  # and not yet read
        self.sent = b""
        self._dice = random.Random(seed)

    def some(self, data: bytes) -> int:
        """Of it: mostly all, or just the first frame."""
        most = len(data)
        frame = HEADER_BYTES + int.from_bytes(data[:4], "little")
        return min(most, self._dice.choice((most, most, frame, frame, 1, 20, most // 2)))

    def on_write(self, data: bytes) -> None:
        """The peer's side."""

    def try_write(self, buffers: Sequence[Buffer]) -> int:
        data = b"".join(buffers)
        count = self.some(data) if self._dice.random() < 0.8 else WOULD_BLOCK
        self.sent += data[:count]
        self.on_write(data[:count])
        return count

    def try_read(self, buffer: memoryview) -> int:
        count = min(len(buffer), self.some(self.received) or 1, len(self.received))
        buffer[:count] = self.received[:count]
        self.received = self.received[count:]
        return count

    def read(self, buffer: memoryview, deadline_ns: int) -> int:
        return self.try_read(buffer) if self.received else END

    def wait(self, readable: bool, writable: bool, deadline_ns: int) -> bool:
        return True

    def fileno(self) -> int:
        return -1

    def interrupt(self) -> None: ...

    def close(self) -> None: ...


class Served(Choppy):
    """Its peer answers at once."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._server = ServerSession()
        self.on_write(b"")

    def on_write(self, data: bytes) -> None:
        server = self._server
        for event in deliver(server, data):
            assert event == Kind.CALL
            if server.method == FAIL:
                server.fail(Status.ABORTED, "no")
            else:
                server.end(bytes(server.payload))
            if server.method == LEAVE:
                server.drain()
            server.decoder.release()
        self.received += written(server)


@pytest.mark.parametrize("seed", range(60))
def test_a_client_by_the_lane_or_not(seed: int) -> None:
    def talk(by_lane: bool) -> tuple[list[str], bytes]:
        dice = random.Random(seed)
        stream = Served(seed)
        client = Client(stream, ClientSession(), "here")
        client._meet(NEVER)
        if not by_lane:
            client._session._small_bytes_max = -1
        results = []
        for method in [*dice.choices((ECHO, FAIL), (20, 4), k=30), LEAVE, ECHO]:
            payload = dice.randbytes(dice.choice((0, 1, 64, 5000, 16384, 16385)))
            try:
                reply = client.call(method, payload, dice.choice((None, 100)))
                assert reply == payload
                results.append("OK")
            except Error as error:
                results.append(str(error))
        return results, stream.sent

    (results, sent), (general_results, general_sent) = talk(True), talk(False)
    assert results == general_results
    # HELLO and 31 calls. Whether GOODBYE is seen before the last is a matter of the reads' sizes.
    assert frames_of(sent)[:32] == frames_of(general_sent)[:32]


def test_a_reply_that_comes_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is too late for its call, and does not disturb the next one."""

    class Slow(Served):
        def read(self, buffer: memoryview, deadline_ns: int) -> int:
            if deadline_ns != NEVER:
                monkeypatch.setattr("ipc_bridge.client.now_ns", lambda: deadline_ns)
            return super().read(buffer, deadline_ns)

    for seed in range(20):
        client = Client(Slow(seed), ClientSession(), "here")
        client._meet(NEVER)
        for number in range(5):
            with pytest.raises(CallError, match="DEADLINE_EXCEEDED"):
                client.call(ECHO, b"late", 100)
            assert client.call(ECHO, b"%d" % number) == b"%d" % number


def frames_of(data: bytes) -> list[tuple[tuple[int, ...], bytes]]:
    """The frames; the time that a CALL has left is the clock's affair."""
    out = []
    while len(data) >= HEADER_BYTES:
        header = struct.unpack_from("<IBBHII", data)
        stop = HEADER_BYTES + header[0]
        out.append((header[:5] if header[1] == Kind.CALL else header, data[HEADER_BYTES:stop]))
        data = data[stop:]
    return out


def fails(call: Call, request: memoryview) -> Buffer:
    raise Error(Status.ABORTED, "no")


def looks(call: Call, request: memoryview) -> Buffer:
    """Takes in what came meanwhile, and answers with the request all the same."""
    call.is_cancelled()
    return request


@pytest.mark.parametrize("seed", range(60))
def test_a_server_by_the_lane_or_not(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()
    for method, handler in ((1, lambda call, request: request), (2, fails), (3, looks)):
        service.unary(method, handler)
    service.streaming(1, lambda call, request: [b"an item"])
    dice = random.Random(seed)
    client = ClientSession()
    asked = written(client)
    deliver(client, written(ServerSession()))
    for number in range(1, 31):
        method = dice.choices((1, 2, 3, 4), (20, 4, 4, 1))[0]
        payload = dice.randbytes(dice.choice((0, 1, 64, 5000, 16384, 16385)))
        client.call(method, payload, method == 1 and dice.random() < 0.1, dice.choice((0, 10**6)))
        asked += written(client)
        deliver(client, frame_of(0, Kind.END, call_id=number))
    if dice.random() < 0.3:
        asked += frame_of(0, Kind.HELLO)

    def serve() -> bytes:
        stream = Choppy(seed, asked)
        Connection(stream, service, ServerSession(), lambda connection: None).run()
        return stream.sent

    sent = serve()
    monkeypatch.setattr(ServerSession, "find_lane", lambda self: False)
    assert sent == serve()
