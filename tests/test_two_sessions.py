"""Two sessions, joined by channels that lose nothing: both applications do what they may, in any
order."""

import random
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ipc_bridge.errors import CallError, Status
from ipc_bridge.frame import HEADER_BYTES, Kind
from ipc_bridge.session import (
    ClientSession,
    ServerSession,
    State,
)
from session_support import fed, had_calls, items_of, written
from test_frame import examples, small_limits


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
            reply = self.client.filled_by_reply(count)
            if reply is not None:
                self.last().results.append((Status.OK, bytes(reply)))
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
        if on_lane and self.server.find_lane():
            space = self.server.space
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
