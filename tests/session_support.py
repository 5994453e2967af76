"""What the tests of the session share: one read and one write of a driver, two sessions that have
met, and the vectors of proto/frame_vectors.json."""

import json
from pathlib import Path
from typing import Any

from ipc_bridge.frame import Kind
from ipc_bridge.session import (
    ClientSession,
    ServerSession,
    next_id,
)

PROTO = Path(__file__).parent.parent / "proto"
Either = ClientSession | ServerSession


def fed(session: Either, data: bytes) -> int:
    """One read of the driver: the count of bytes that found room."""
    space = session.decoder.space()
    count = min(len(space), len(data))
    assert count > 0
    space[:count] = data[:count]
    session.filled(count)
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


def pair(window: int = 4 << 20, most: int = 64 << 20) -> tuple[ClientSession, ServerSession]:
    """Two sessions that have met."""
    client, server = ClientSession(window, most), ServerSession(4 << 20, most)
    fed(server, written(client))
    fed(client, written(server))
    assert client.next_event() is None
    assert server.next_event() is None
    return client, server


def items_of(client: ClientSession, by_items: bool) -> list[bytes]:
    """The items that stand ready, in one pass."""
    if by_items:
        return [bytes(view) for view in client.items()]
    out = []
    while client.next_event() == Kind.ITEM:
        out.append(bytes(client.payload))
    return out
