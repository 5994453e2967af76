"""A client's connection at the server: read, step the session, flush.

Copy with it: errors, frame, session, system, handlers.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator

from ipc_bridge.errors import OK, Error, Status
from ipc_bridge.frame import JOIN_BYTES_MAX, Buffer
from ipc_bridge.handlers import REASONS, Call, Item, Pause, Service
from ipc_bridge.session import RUNNING, ServerSession, State
from ipc_bridge.system import END, NEVER, WOULD_BLOCK, Stream, deadline_after, now_ns

SERVER_HELLO_TIMEOUT_S = 5.0  # a client that says nothing for so long is gone
BATCH_BYTES = 64 << 10  # of small items for one write; more gains nothing
STRIDE_ITEMS_MAX = 16  # items made between two looks at the clock: at most these wait for a batch
STRIDE_NS = 20_000  # a stride that takes longer is sent at once

OUT_OF_MEMORY = Error(Status.RESOURCE_EXHAUSTED, "the server is out of memory")

log = logging.getLogger("ipc_bridge")


class ConnectionCall(Call):
    """The call that runs on a connection."""

    def __init__(self, connection: "Connection", deadline_ns: int) -> None:
        self.deadline_ns = deadline_ns
        self._connection = connection

    def is_cancelled(self) -> bool:
        self._connection.pump(0)
        return self._connection.reason() is not OK

    def sleep(self, seconds: float) -> None:
        self._connection.pump(deadline_after(seconds))

    @property
    def peer_payload_bytes_max(self) -> int:
        return self._connection.session.peer_payload_bytes_max


class Connection:
    """One client: its session, its stream, and the call that runs.

    `run` is the loop of a connection's thread: `step` does all that can be done without input,
    `_exchange` waits for what the session needs next and reads it; `_serve_small` is both at once
    for small unary calls. `turn` is for a loop that serves many: it waits for nothing, and `due_ns`
    says when to come back.
    """

    def __init__(
        self,
        stream: Stream,
        service: Service,
        session: ServerSession,
        on_hello: Callable[["Connection"], None],
    ) -> None:
        self.stream = stream
        self.session = session
        self.is_idle = False  # no call is running: may be interrupted to drain
        self.draining = False  # set from another thread: take no further call
        self.cut = False  # set from another thread: the grace is over
        self._service = service
        self._on_hello = on_hello  # once the client has said hello; raises Error to refuse it
        self._hello_deadline_ns = deadline_after(SERVER_HELLO_TIMEOUT_S)
        self._met = False
        self._call: ConnectionCall | None = None
        self._undated = ConnectionCall(self, NEVER)  # for all small calls without a deadline
        self._items: Iterator[Item] | None = None
        self._due_ns = 0  # no item before it
        self._looked_ns = 0  # at the clock, before this stride
        self._stride = 1  # items until the next look

    def run(self) -> None:
        """Serve the client until it goes, breaks the rules, or the server stops."""
        try:
            while self.step():
                if self.session.find_lane():
                    self._serve_small(self.stream.read, NEVER)
                else:
                    self._exchange()
        except Error as error:  # a ProtocolError, a refusal, a system call that failed
            self._refuse(error)
        except MemoryError:  # no room for a payload: its client goes, nobody else
            self._refuse(OUT_OF_MEMORY)
        finally:
            self._leave()

    def turn(self, until_ns: int) -> bool:
        """Take the input that is here, and step; stay with this client until some time, if its
        calls are small and nobody else has input. False once the connection is over."""
        try:
            if self._turn(until_ns):
                return True
        except Error as error:
            self._refuse(error)
        except MemoryError:
            self._refuse(OUT_OF_MEMORY)
        self._leave()
        return False

    def _turn(self, until_ns: int) -> bool:
        session, count = self.session, 1
        if session.find_lane() and self._serve_small(self.stream.read_alone, until_ns):
            return True
        while count > 0:
            if session.state is not RUNNING:
                if session.outbox.size and not self.step():
                    return False
                if session.outbox.size:
                    return True  # nothing more is read before END is out; see `_exchange`
                session.decoder.release()
            count = self.stream.try_read(session.decoder.space())
            self._take(count)
            if not self.step():
                return False
        return True

    def due_ns(self) -> int:
        """When `turn` has something to do, also without input."""
        session = self.session
        if session.state is not RUNNING:
            return NEVER if self._met else self._hello_deadline_ns
        if session.credit > 0 and self._due_ns == 0 and not session.outbox.size:
            return 0
        return min(self._due_ns or NEVER, self._call.deadline_ns if self._call else NEVER)

    def step(self) -> bool:
        """Do all that can be done without input; False once the connection is over."""
        session = self.session
        if self.draining:
            session.drain()
        while True:
            if session.outbox.size:
                self._flush()
            if session.state is RUNNING:
                session.next_event()  # takes in CREDIT, notes CANCEL
                self._advance()
                if session.state is RUNNING:
                    return True
                continue
            if session.state == State.CLOSED:
                return False
            if session.outbox.size:
                return not self.cut  # nothing more is decoded before END is out (FRAME.md)
            if session.state == State.DRAINING or self.cut:
                return False
            event = None if session.decoder.is_clean() else session.next_event()
            if not self._met and session.state != State.HELLO:
                self._met = True
                self._on_hello(self)
            if event is None:
                return self._met or now_ns() < self._hello_deadline_ns
            self._start()

    def pump(self, until_ns: int) -> None:
        """For a handler: exchange bytes with the client until a time (0: once, without waiting)
        or until the call is over."""
        session = self.session
        session.next_event()
        while self.reason() is OK:
            self._flush()
            if until_ns == 0 and not session.outbox.size:
                self._take(self.stream.try_read(session.decoder.space()))
            else:
                self._read(until_ns)
            session.next_event()
            if now_ns() >= until_ns:
                return

    def reason(self) -> Status:
        """Why the running call must end before its handler is done; OK: it need not."""
        if self.session.cancelled:
            return Status.CANCELLED
        if self.cut:
            return Status.UNAVAILABLE
        call = self._call
        if call is not None and call.deadline_ns != NEVER and now_ns() >= call.deadline_ns:
            return Status.DEADLINE_EXCEEDED
        return OK

    def _exchange(self) -> None:
        session = self.session
        if session.state is RUNNING:
            if session.outbox.size == 0 and session.credit > 0 and self._due_ns == 0:
                self._take(self.stream.try_read(session.decoder.space()))
            else:
                self._read(self._due_ns or NEVER)
        elif session.outbox.size:
            self.stream.wait(False, True, NEVER)
        else:
            session.decoder.release()
            deadline_ns = NEVER if self._met else self._hello_deadline_ns
            self.is_idle = True
            if not self.draining:  # else whoever set it may have seen us busy and not woken us
                self._take(self.stream.read(session.decoder.space(), deadline_ns))
            self.is_idle = False

    def _read(self, until_ns: int) -> None:
        """Wait, while a call runs, for input (or room, if there is output), and read."""
        session, stream = self.session, self.stream
        deadline_ns = min(until_ns, self._call.deadline_ns if self._call else NEVER)
        if session.outbox.size:
            stream.wait(True, True, deadline_ns)
            self._take(stream.try_read(session.decoder.space()))
        else:
            self._take(stream.read(session.decoder.space(), deadline_ns))

    def _take(self, count: int) -> None:
        session = self.session
        if count > 0:
            session.filled(count)
        elif count == END:
            if self.cut or (self.draining and session.state is not RUNNING):
                session.drain()  # interrupted by us, not by the client
            else:
                session.end_of_input()

    def _flush(self) -> None:
        """Write what can be written at once."""
        outbox = self.session.outbox
        while outbox.size:
            count = self.stream.try_write(outbox.buffers())
            if count > 0:
                outbox.sent(count)
            else:
                if count == END:
                    outbox.clear()  # the input will end too, once it is read to its end
                return

    def _start(self) -> None:
        """Run the handler of a CALL; a unary one to its end."""
        session = self.session
        left_ms = session.remaining_ms
        deadline_ns = now_ns() + left_ms * 1_000_000 if left_ms else NEVER
        call = self._call = ConnectionCall(self, deadline_ns)
        try:
            if session.streaming:
                handler = self._service.find_streaming(session.method)
                self._items = iter(handler(call, session.payload))
                self._due_ns, self._stride = 0, 1
            else:
                reply = self._service.find_unary(session.method)(call, session.payload)
                self._end(reply)
        except Exception as error:
            self._fail_by(error)

    def _serve_small(self, read: Callable[[memoryview, int], int], until_ns: int) -> bool:
        """The lane: `_exchange` and `step` in one, over and over, while the client's calls are
        small unary ones, one by one, and each reply leaves in one write. True: there was no input
        by `until_ns`, or a shared loop has something else to do."""
        session, stream, call = self.session, self.stream, self._undated
        find_unary, space = self._service.find_unary, session.space
        while True:
            self.is_idle = True
            count = WOULD_BLOCK if self.draining else read(space, until_ns)
            self.is_idle = False
            if count <= 0 or self.draining:
                self._take(count)
                return count == WOULD_BLOCK and not self.draining
            if not session.filled_by_call(count):
                return False
            left_ms = session.remaining_ms
            if left_ms:
                call = self._call = ConnectionCall(self, now_ns() + left_ms * 1_000_000)
            try:
                answer = find_unary(session.method)(call, session.payload)
                stopped = self.cut or (left_ms and self.reason() is not OK)
                reply = None if stopped else session.end_small(answer)
                if reply is None:
                    self._end(answer)
                    return False
            except Exception as error:
                self._fail_by(error)
                return False
            if left_ms:
                call, self._call = self._undated, None
            count = stream.try_write((reply,))
            if count != len(reply) and count != END:
                session.outbox.put_rest(reply, count)
                return False

    def _refuse(self, error: Error) -> None:
        """Tell the client why its connection ends."""
        log.info("connection ended: %s", error)
        self.session.farewell(error.status, error.what)

    def _leave(self) -> None:
        self.session.outbox.own()  # what is not sent yet may be the handler's, which goes now
        self._close_handler()
        with contextlib.suppress(Error):
            self._flush()

    def _advance(self) -> None:
        """Make the next batch of items and write it, or end the stream."""
        reason = self.reason()
        if reason is not OK:
            self._fail(reason, REASONS[reason])
            return
        if self.session.outbox.size:
            return  # an item in it may still be its handler's
        if self._due_ns and now_ns() >= self._due_ns:
            self._due_ns = 0
        self._looked_ns = now_ns()
        try:
            while self._due_ns == 0 and self._make_stride():
                pass
        except Exception as error:
            self._fail_by(error)
        self._flush()

    def _make_stride(self) -> bool:
        """Make a few items; False once it is time to send what is made."""
        session, items = self.session, self._items
        assert items is not None
        for _ in range(self._stride):
            if session.credit <= 0:
                return False
            item = next(items, None)
            if session.state is not RUNNING or session.cancelled:
                return False  # the handler looked, and the client has left
            if item is None:
                self._end(b"")
                return False
            if isinstance(item, Pause):
                self._due_ns = item.until_ns
                return False
            session.item(item)
            if len(item) > JOIN_BYTES_MAX:
                return False  # it is not copied: out with it before the handler goes on
        began_ns, self._looked_ns = self._looked_ns, now_ns()
        if self._looked_ns - began_ns > STRIDE_NS:
            self._stride = 1
            return False
        self._stride = min(2 * self._stride, STRIDE_ITEMS_MAX)
        return session.outbox.size < BATCH_BYTES

    def _end(self, reply: Buffer) -> None:
        """The handler is done."""
        reason = self.reason()
        if self.session.state is not RUNNING:
            self._close_handler()
        elif reason is not OK:
            self._fail(reason, REASONS[reason])
        else:
            self.session.end(reply)
            self._close_handler()

    def _fail_by(self, error: Exception) -> None:
        if self.session.broken is not None:
            raise self.session.broken  # found while the handler looked at its input
        if isinstance(error, Error):
            self._fail(error.status, error.what)
        else:
            log.error("a handler failed", exc_info=error)
            self._fail(Status.INTERNAL, str(error) or type(error).__name__)

    def _fail(self, status: Status, message: str) -> None:
        """End the call with another status than OK."""
        self.session.outbox.own()  # what is not sent yet may be the handler's, which goes now
        self._close_handler()
        if self.session.state is RUNNING:
            self.session.fail(status, message)

    def _close_handler(self) -> None:
        items, self._items, self._call = self._items, None, None
        if items is None:
            return
        close = getattr(items, "close", None)
        if close is not None:
            try:
                close()
            except Exception as error:
                log.error("a handler failed to close", exc_info=error)
