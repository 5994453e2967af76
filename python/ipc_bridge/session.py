"""The session: who may say what, and when (the state table of proto/FRAME.md).

Sans-IO, as `frame`: the driver (client or server) reads into `decoder.space()`, takes events from
`next_event()` until it says None, and writes what stands in `outbox`. None is "not yet"; a
ProtocolError means that the peer broke the contract and is final for this session. There is no
clock here: deadlines are the driver's, and reach the session as a cancel or an end.

An event is a Kind; what it carries stands in the attributes below it until the next one.

The lane: the general path of a small unary call takes some 60 Python calls, several microseconds.
So a small one that comes alone may go by `call_small` and `filled_by_reply`, or `filled_by_call`
and `end_small`. Each does just what the general methods in its docstring would do, or nothing; so
one can always leave the lane, and never needs it. What must hold for it is found by `find_lane`,
once; `quiet` tells that it still does. (C++ has none: there it would gain nothing.)
"""

import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Any, ClassVar

from ipc_bridge import frame
from ipc_bridge.errors import MESSAGE_BYTES_MAX, CallError, ProtocolError, Status, UsageError
from ipc_bridge.frame import (
    HEADER,
    HEADER_BYTES,
    JOIN_BYTES_MAX,
    Batch,
    Buffer,
    Decoder,
    Header,
    Kind,
    Outbox,
)

SMALL_BYTES_MAX = JOIN_BYTES_MAX  # of a payload on a lane: it is joined with its header
WINDOW_BYTES_DEFAULT = 4 << 20  # a few of the largest items that people stream, for full speed
WINDOW_BYTES_LIMIT = 1 << 30
_U32 = (1 << 32) - 1


class State(IntEnum):
    """Where a session stands; the client's OPEN is the server's RUNNING."""

    HELLO = 0
    IDLE = 1
    OPEN = 2
    RUNNING = 3
    DRAINING = 4
    CLOSED = 5


# What the way of every small call looks at, by names of its own: State.X costs 100 ns.
IDLE, OPEN, RUNNING = State.IDLE, State.OPEN, State.RUNNING
_CALL, _ITEM, _END = int(Kind.CALL), int(Kind.ITEM), int(Kind.END)
_PACK, _UNPACK = HEADER.pack, HEADER.unpack_from


def next_id(call_id: int) -> int:
    """Ids rise by 1 from 1; 0 is skipped on wrap."""
    return call_id + 1 if call_id < _U32 else 1


class Session:
    """What both sides share: the hello, the farewell, and the walk through the table."""

    table: ClassVar[dict[State, dict[int, Callable[[Any, Header], Kind | None]]]]

    def __init__(self, window_bytes: int, payload_bytes_max: int) -> None:
        if not 1 <= window_bytes <= WINDOW_BYTES_LIMIT:
            raise UsageError(Status.INVALID_ARGUMENT, f"window of {window_bytes} bytes")
        if not 0 <= payload_bytes_max <= frame.PAYLOAD_BYTES_LIMIT:
            raise UsageError(Status.INVALID_ARGUMENT, f"max_payload of {payload_bytes_max} bytes")
        self.state = State.HELLO
        self.outbox = Outbox()
        self.broken: ProtocolError | None = None  # what the peer did, once it broke the rules
        self.cancelled = False  # a server's: `end` the call, nothing is decoded before
        self.decoder = Decoder(MESSAGE_BYTES_MAX)  # for strangers; see _meet
        self.window_bytes = window_bytes
        self.peer_window_bytes = 0
        self.peer_payload_bytes_max = 0
        self.quiet = False  # the lane was found free, and nothing has happened beside it since
        self.space = memoryview(b"")  # where to read, on the lane
        self._small_bytes_max = 0  # of a payload on a lane
        # Of the latest event:
        self.payload: memoryview = memoryview(b"")  # CALL, ITEM, END with OK
        self.status = Status.OK  # END
        self.message = ""  # END with another status
        self.method = 0  # CALL
        self.streaming = False  # CALL: the answer is a stream
        self.remaining_ms = 0  # CALL: to the deadline; 0: none
        self._payload_bytes_max = max(payload_bytes_max, MESSAGE_BYTES_MAX)
        hello = frame.HELLO.pack(frame.MAGIC, payload_bytes_max)
        header = frame.encode(Kind.HELLO, len(hello), code=frame.VERSION, value=window_bytes)
        self.outbox.put(header, hello)

    def next_event(self) -> Kind | None:
        """The next event; None: read more. Raises ProtocolError, and again whenever it is asked."""
        self._leave_lane()
        if self.broken is not None:
            raise self.broken
        if self.cancelled:
            return None
        try:
            while (header := self.decoder.next()) is not None:
                action = self.table[self.state].get(header[1])
                if action is None:
                    name = Kind(header[1]).name
                    raise ProtocolError(f"{name} while {self.state.name}")
                event = action(self, header)
                if event is not None:
                    return event
            return None
        except ProtocolError as error:
            self.broken = error
            raise

    def hold(self) -> None:
        """Keep the payload of the latest event while more input is read; see Decoder.release."""
        self._leave_lane()
        self.decoder.hold()

    def filled(self, count: int) -> None:
        """`count` bytes were read into `decoder.space()`, or into `space` on the lane."""
        self.quiet = False
        self.decoder.filled(count)

    def find_lane(self) -> bool:
        """Is the lane free: is no call in the air, and nothing left to write or to decode?"""
        self.quiet = False
        if self.state is IDLE and not self.outbox.size and self.broken is None:
            space = self.decoder.fresh_space()
            if space is not None:
                self.space, self.payload = space, space[:0]
                self.quiet = True
        return self.quiet

    def _leave_lane(self) -> None:
        """Something else is to be done; the latest payload stays where it is."""
        if self.quiet:
            self.quiet = False
            self.decoder.skip(HEADER_BYTES + len(self.payload))

    def farewell(self, status: Status, message: str) -> None:
        """End the session, and tell the peer why (END of call 0)."""
        if self.state != State.CLOSED:
            self._put_end(0, status, message)
            self.state = State.CLOSED

    def _put_end(self, call_id: int, status: Status, message: str) -> None:
        if status == Status.OK:
            status = Status.INTERNAL  # a failure that calls itself OK would be another frame
        text = message.encode("utf-8", "replace")[:MESSAGE_BYTES_MAX]
        text = text.decode("utf-8", "ignore").encode()  # never cut inside a character
        header = frame.encode(Kind.END, len(text), code=status, call_id=call_id)
        self.outbox.put(header, text)

    def _meet(self, header: Header) -> None:
        magic, payload_bytes_max = frame.HELLO.unpack(self.decoder.payload)
        if magic != frame.MAGIC:
            raise ProtocolError("HELLO without the magic IPCB")
        if header[3] != frame.VERSION:
            raise ProtocolError(f"version {header[3]}, this side speaks {frame.VERSION}")
        if not 1 <= header[5] <= WINDOW_BYTES_LIMIT:
            raise ProtocolError(f"window of {header[5]} bytes")
        self.peer_window_bytes = header[5]
        self.peer_payload_bytes_max = payload_bytes_max
        self._small_bytes_max = min(payload_bytes_max, SMALL_BYTES_MAX)
        self.decoder.payload_bytes_max = self._payload_bytes_max
        self.state = State.IDLE

    def _set_message(self) -> None:
        try:
            self.message = str(self.decoder.payload, "utf-8")
        except UnicodeDecodeError:
            raise ProtocolError("a status message that is not UTF-8") from None


class ClientSession(Session):
    """The caller's side: `call`, then ITEM and END events of that call, or `cancel`."""

    def __init__(
        self,
        window_bytes: int = WINDOW_BYTES_DEFAULT,
        payload_bytes_max: int = frame.PAYLOAD_BYTES_MAX,
    ) -> None:
        super().__init__(window_bytes, payload_bytes_max)
        self._call_id = 0  # of the latest call
        self._next_id = 1  # of the next call
        self._answer_id = 1  # of the oldest call whose END has not come: the only one answered
        self._streaming = False
        self._index = 0  # of the next item
        self._allowed = 0  # credit as the server has it: above 0 it may send
        self._granted = 0  # credit sent since the last read: no item read by then rests on it
        self._owed = 0  # cost of items taken and not yet given back
        self._leaving = False  # the server said GOODBYE

    def call(self, method: int, payload: Buffer, streaming: bool, remaining_ms: int) -> None:
        """Start a call; `remaining_ms` to its deadline, 0 for none.

        Raises UsageError (FAILED_PRECONDITION: another call is open; INVALID_ARGUMENT: no number of
        a method; RESOURCE_EXHAUSTED: more than the server takes) or CallError (UNAVAILABLE);
        nothing is sent then.
        """
        self._leave_lane()
        if self.state != State.IDLE:
            if self.state == State.OPEN:
                what = "a call is under way on this connection"
                raise UsageError(Status.FAILED_PRECONDITION, what)
            raise CallError(Status.UNAVAILABLE, "the connection is closed")
        if self._leaving:
            raise CallError(Status.UNAVAILABLE, "the server is shutting down")
        frame.check_method(method)
        size = len(payload)
        if size > self.peer_payload_bytes_max:
            what = f"payload of {size} bytes, the server takes {self.peer_payload_bytes_max}"
            raise UsageError(Status.RESOURCE_EXHAUSTED, what)
        call_id = self._next_id
        self.outbox.put(_PACK(size, _CALL, streaming, method, call_id, remaining_ms), payload)
        self._call_id = call_id
        self._next_id = next_id(call_id)
        self._streaming = streaming
        if streaming:
            self._index = self._owed = self._granted = 0
            self._allowed = self.window_bytes
        self.state = OPEN

    def call_small(self, method: int, payload: Buffer, remaining_ms: int) -> bytes | None:
        """`call` on the lane: a small unary one, with no other in the air and nothing else to write
        or to decode. What to write in place of the outbox, then to read into `space`; None: nothing
        was done, use `call`."""
        size = len(payload)
        if (
            self.state is not IDLE
            or size > self._small_bytes_max
            or not (self.quiet or self.find_lane())
            or not method
        ):
            return None
        call_id = self._next_id
        try:
            request = _PACK(size, _CALL, 0, method, call_id, remaining_ms) + payload
        except struct.error:  # no number of a method, as `call` will say
            return None
        if len(request) != HEADER_BYTES + size:
            return None  # a view of elements wider than a byte
        self._call_id = call_id
        self._next_id = call_id + 1 if call_id < _U32 else 1
        self.state = OPEN
        return request

    def find_lane(self) -> bool:
        self._streaming = False
        return self._answer_id == self._next_id and not self._leaving and super().find_lane()

    def filled_by_reply(self, count: int) -> memoryview | None:
        """`filled` and `next_event` on the lane, for the first input after `call_small`, read into
        `space`: the reply, if END with OK is all that was read; None: nothing was decoded, use
        `next_event`."""
        space = self.space
        if _UNPACK(space) != (count - HEADER_BYTES, _END, 0, 0, self._call_id, 0):
            self.filled(count)
            return None
        self._answer_id = self._next_id
        self.state = IDLE
        payload = self.payload = space[HEADER_BYTES:count]
        return payload

    def cancel(self) -> None:
        """Give the open call up; whatever comes of it later is dropped. Without one: nothing."""
        if self.state == State.OPEN:
            self._leave_lane()
            self.outbox.put(frame.encode(Kind.CANCEL, call_id=self._call_id))
            self.state = State.IDLE

    def items(self) -> list[memoryview]:
        """The payloads of the items that stand ready, for one pass; `consumed` when done."""
        batch = self.batch()
        return [] if batch is None else list(batch)

    def batch(self) -> Batch | None:
        """`items` as one piece; None if none stands ready."""
        if self.state != State.OPEN or self._answer_id != self._call_id or not self._streaming:
            return None
        bytes_max = min(self._allowed, self.window_bytes // 2 + 1)
        batch = self.decoder.batch(self._call_id, self._index, bytes_max)
        if batch is not None:
            self._allowed -= len(batch.view)
            self._owed += len(batch.view)
            self._index = (self._index + len(batch)) & _U32
        return batch

    def consumed(self) -> None:
        """All items handed out were used; gives their credit back once half the window is due."""
        if 2 * self._owed >= self.window_bytes and self.state == State.OPEN:
            owed = self._owed
            self.outbox.put(frame.encode(Kind.CREDIT, call_id=self._call_id, value=owed))
            self._granted += owed
            self._owed = 0

    def filled(self, count: int) -> None:
        super().filled(count)
        if self._granted:
            self._allowed += self._granted
            self._granted = 0

    def end_of_input(self) -> Kind | None:
        """The server's bytes have ended: an END with UNAVAILABLE if a call was open."""
        was_open = self.state == State.OPEN
        if self.state != State.CLOSED:
            self.status = Status.UNAVAILABLE
            self.message = (
                "the server has shut down" if self._leaving else "the server closed the connection"
            )
        self.state = State.CLOSED
        return Kind.END if was_open else None

    def _item(self, header: Header) -> Kind | None:
        if header[4] != self._answer_id or not self._is_awaited():
            raise ProtocolError(f"ITEM of call {header[4]}")
        if not self._is_live():
            return None
        if not self._streaming:
            raise ProtocolError("ITEM in answer to a unary call")
        if header[5] != self._index:
            raise ProtocolError(f"ITEM {header[5]} where {self._index} was due")
        if self._allowed <= 0:
            raise ProtocolError("ITEM without credit")
        self._allowed -= HEADER_BYTES + header[0]
        self._owed += HEADER_BYTES + header[0]
        self._index = (self._index + 1) & _U32
        self.payload = self.decoder.payload
        return Kind.ITEM

    def _end(self, header: Header) -> Kind | None:
        if header[4] == 0:
            return self._refused(header)
        live = self.state == State.OPEN and self._answer_id == self._call_id
        if header[4] != self._answer_id or not (live or self._is_awaited()):
            raise ProtocolError(f"END of call {header[4]}")
        self._answer_id = next_id(self._answer_id)
        if not live:
            return None
        if header[3] == 0:
            if self._streaming and header[0]:
                raise ProtocolError("END of a stream with a payload")
            self.status, self.payload = Status.OK, self.decoder.payload
        else:
            self.status = Status(header[3])
            self._set_message()
        self.state = State.IDLE
        return Kind.END

    def _refused(self, header: Header) -> Kind:
        if header[4] != 0:
            raise ProtocolError(f"END of call {header[4]} before HELLO")
        self.status = Status(header[3])
        self._set_message()
        self.state = State.CLOSED
        return Kind.END

    def _goodbye(self, header: Header) -> Kind | None:
        self._leaving = True
        if self.state == State.OPEN and header[5] != self._call_id:  # it crossed our call
            self.status, self.message = Status.UNAVAILABLE, "the server is shutting down"
            self.state = State.CLOSED
            return Kind.END
        return None

    def _is_awaited(self) -> bool:
        return self._answer_id != self._next_id

    def _is_live(self) -> bool:
        return self.state == State.OPEN and self._answer_id == self._call_id

    table: ClassVar = {
        State.HELLO: {Kind.HELLO: Session._meet, Kind.END: _refused},
        State.IDLE: {Kind.ITEM: _item, Kind.END: _end, Kind.GOODBYE: _goodbye},
        State.OPEN: {Kind.ITEM: _item, Kind.END: _end, Kind.GOODBYE: _goodbye},
        State.CLOSED: {},
    }


class ServerSession(Session):
    """The callee's side: a CALL event, then `item` while there is `credit`, and one `end`."""

    def __init__(
        self,
        window_bytes: int = WINDOW_BYTES_DEFAULT,
        payload_bytes_max: int = frame.PAYLOAD_BYTES_MAX,
    ) -> None:
        super().__init__(window_bytes, payload_bytes_max)
        self.credit = 0  # bytes; an item may be sent while it is above 0
        self._call_id = 0  # of the latest call
        self._next_id = 1  # of the next call
        self._index = 0  # of the next item
        self._leaving = False  # GOODBYE after the running call

    def item(self, payload: Buffer) -> None:
        """Send the next item of the running stream; only while `credit` is above 0.

        Raises UsageError (RESOURCE_EXHAUSTED) if the client takes no payload of that size.
        """
        size = len(payload)
        if size > self.peer_payload_bytes_max:
            raise self._too_large(size)
        self.credit -= HEADER_BYTES + size
        self.outbox.put(_PACK(size, _ITEM, 0, 0, self._call_id, self._index), payload)
        self._index = (self._index + 1) & _U32

    def end(self, payload: Buffer = b"") -> None:
        """End the running call with OK; `payload` is the reply of a unary one.

        Raises UsageError (RESOURCE_EXHAUSTED) if the client takes no payload of that size.
        """
        size = len(payload)
        if size > self.peer_payload_bytes_max:
            raise self._too_large(size)
        self.outbox.put(_PACK(size, _END, 0, 0, self._call_id, 0), payload)
        self._ended()

    def end_small(self, payload: Buffer) -> bytes | None:
        """`end` on the lane: a small reply to a call that came by it. What to write in place of
        the outbox; None: nothing was done, use `end`."""
        size = len(payload)
        if not self.quiet or size > self._small_bytes_max:
            return None
        reply = _PACK(size, _END, 0, 0, self._call_id, 0) + payload
        if len(reply) != HEADER_BYTES + size:
            return None  # a view of elements wider than a byte
        self.state = IDLE
        return reply

    def fail(self, status: Status, message: str) -> None:
        """End the running call with another status than OK."""
        self._put_end(self._call_id, status, message)
        self._ended()

    def drain(self) -> None:
        """Take no further call: GOODBYE at once, or after the running one."""
        if self._leaving:
            return
        self._leaving = True
        self._leave_lane()
        if self.state in (State.HELLO, State.IDLE):
            self._ended()

    def end_of_input(self) -> Kind | None:
        """The client's bytes have ended: a CANCEL if a call was running."""
        was_running = self.state == State.RUNNING
        self.cancelled = was_running
        self.state = State.CLOSED
        return Kind.CANCEL if was_running else None

    def _ended(self) -> None:
        self._leave_lane()
        self.cancelled = False
        self.state = State.IDLE
        if self._leaving:
            self.outbox.put(frame.encode(Kind.GOODBYE, value=self._call_id))
            self.state = State.DRAINING

    def _too_large(self, size: int) -> UsageError:
        what = f"payload of {size} bytes, the client takes {self.peer_payload_bytes_max}"
        return UsageError(Status.RESOURCE_EXHAUSTED, what)

    def _call(self, header: Header) -> Kind | None:
        if header[4] != self._next_id:
            raise ProtocolError(f"CALL {header[4]} after {self._call_id}")
        self._call_id = header[4]
        self._next_id = next_id(self._call_id)
        if self.state == State.DRAINING:
            self._put_end(self._call_id, Status.UNAVAILABLE, "the server is shutting down")
            return None
        self.method = header[3]
        self.streaming = bool(header[2] & frame.STREAM_WANTED)
        self.remaining_ms = header[5]
        self.payload = self.decoder.payload
        self.decoder.hold()  # the driver releases it when END is out
        self.credit = self.peer_window_bytes
        self._index = 0
        self.state = State.RUNNING
        return Kind.CALL

    def filled_by_call(self, count: int) -> bool:
        """`filled` and `next_event` on the lane, while `quiet`, of what was read into `space`: True
        for a CALL event, if a unary one is all that was read; False: nothing was decoded, use
        `next_event`."""
        space = self.space
        size, kind, flags, method, call_id, remaining_ms = _UNPACK(space)
        if size != count - HEADER_BYTES or kind != _CALL or flags or call_id != self._next_id:
            self.filled(count)
            return False
        self._call_id = call_id
        self._next_id = call_id + 1 if call_id < _U32 else 1
        self.method = method
        self.remaining_ms = remaining_ms
        self.payload = space[HEADER_BYTES:count]
        self.state = RUNNING
        return True

    def find_lane(self) -> bool:
        if not super().find_lane():
            return False
        self.streaming = False
        self.credit = self.peer_window_bytes
        self._index = 0
        return True

    def _leave_lane(self) -> None:
        if self.quiet:
            super()._leave_lane()
            if self.state is RUNNING:
                self.decoder.hold()  # as `_call` does

    def _credit(self, header: Header) -> None:
        if not self._concerns_running(header):
            return
        self.credit += header[5]
        if self.credit > self.peer_window_bytes:
            raise ProtocolError("CREDIT above the window")

    def _cancel(self, header: Header) -> Kind | None:
        if not self._concerns_running(header):
            return None
        self.cancelled = True
        return Kind.CANCEL

    def _concerns_running(self, header: Header) -> bool:
        """True for the running call, False for an earlier one; a later one breaks the rules."""
        if (self._call_id - header[4]) & _U32 >= 1 << 31:
            raise ProtocolError(f"{Kind(header[1]).name} of call {header[4]}, not yet made")
        return self.state == State.RUNNING and header[4] == self._call_id

    table: ClassVar = {
        State.HELLO: {Kind.HELLO: Session._meet},
        State.IDLE: {Kind.CALL: _call, Kind.CREDIT: _credit, Kind.CANCEL: _cancel},
        State.RUNNING: {Kind.CREDIT: _credit, Kind.CANCEL: _cancel},
        State.DRAINING: {Kind.CALL: _call, Kind.CREDIT: _credit, Kind.CANCEL: _cancel},
        State.CLOSED: {},
    }
