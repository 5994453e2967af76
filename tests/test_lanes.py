"""The lanes of small calls: shortcuts that must do what the general path does, and nothing else.

Sans-IO twins: one session goes by `call_small`, `filled_by_reply`, `filled_by_call`, `end_small`,
the other by what these stand for. Then clients and servers over a channel that takes and gives any
part of what it is asked for. (Both mixed, in any order: `TwoSessions` of test_session.)
"""

import struct
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc_bridge.errors import Error, ProtocolError, Status
from ipc_bridge.frame import HEADER_BYTES, Kind
from ipc_bridge.session import State
from test_session import Either, deliver, fed, had_calls, pair, written

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
    """Put a read's bytes there, without telling anybody."""
    space = session.decoder.space()
    count = min(len(space), len(data))
    space[:count] = data[:count]
    return count


def state_of(session: Either) -> dict[str, Any]:
    """All that decides what the session does next; the payload by its bytes."""
    left_out = ("decoder", "outbox", "broken", "payload")
    state = {name: value for name, value in vars(session).items() if name not in left_out}
    buffer = session.decoder
    state["payload"] = bytes(session.payload)
    state["broken"] = str(session.broken)
    state["undecoded"] = bytes(buffer._view[buffer._start : buffer._end])
    state["held"] = buffer._floor
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
    assert fed(general, data) == count
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
    assert fed(general, data) == count
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


def test_a_large_payload_takes_the_general_path() -> None:
    client, server = pair()
    large = bytes(16385)
    assert client.call_small(1, large, 0) is None
    client.call(1, large, False, 0)
    deliver(server, written(client))
    assert server.end_small(large) is None


def test_garbage_before_and_nothing_after() -> None:
    client, _ = pair()
    with pytest.raises(ProtocolError):
        deliver(client, frame_of(0, Kind.END, call_id=5))
    assert client.call_small(1, b"", 0) is None
