"""Nobody waits for ever: the proof of FRAME.md, played on small channels."""

import random
from collections.abc import Generator

import pytest

from ipc_bridge.errors import Status
from ipc_bridge.frame import Kind
from ipc_bridge.session import (
    ClientSession,
    ServerSession,
    State,
)
from session_support import Either, fed, written


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
