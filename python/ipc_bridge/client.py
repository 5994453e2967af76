"""The client: joins a session to a stream, one call at a time.

A client is used by one thread at a time. More calls at once means more connections, as in HTTP/1.1.
After a fork(2) it is the parent's; in the child its calls fail, and harm nobody.
"""

import contextlib
import os
import weakref
from collections.abc import Generator, Iterator, Sequence
from types import TracebackType
from typing import NoReturn, Protocol, Self

from ipc_bridge import frame
from ipc_bridge.errors import CallError, Error, ProtocolError, Status, UsageError
from ipc_bridge.frame import Batch, Buffer, Kind
from ipc_bridge.session import WINDOW_BYTES_DEFAULT, ClientSession, State
from ipc_bridge.system import (
    END,
    NEVER,
    WOULD_BLOCK,
    Spinner,
    Stream,
    Transport,
    Wait,
    deadline_after,
    now_ns,
    remaining_ms,
)

CLIENT_HELLO_TIMEOUT_S = 5.0  # a server that says nothing for so long is none of ours
CONNECT_TIMEOUT_S = 5.0  # default; a server that starts together with its client is up by then


def connect(
    transport: Transport,
    *,
    window_bytes: int = WINDOW_BYTES_DEFAULT,
    payload_bytes_max: int = frame.PAYLOAD_BYTES_MAX,
    timeout: float | None = CONNECT_TIMEOUT_S,
) -> "Client":
    """Reach a server, waiting up to `timeout` seconds for it to start, and exchange hellos.

    `window_bytes` is what a stream's server may send ahead of this reader; `payload_bytes_max` is
    the largest reply or item that this client takes.
    Raises Error: UNAVAILABLE at the timeout, INVALID_ARGUMENT, PERMISSION_DENIED,
    RESOURCE_EXHAUSTED if the server is full; nothing stays open then.
    """
    session = ClientSession(window_bytes, payload_bytes_max)
    transport.payload_bytes_max = payload_bytes_max
    deadline_ns = deadline_after(timeout)
    client = Client(transport.connect(deadline_ns), session, transport.url)
    try:
        client._meet(min(deadline_ns, deadline_after(CLIENT_HELLO_TIMEOUT_S)))
    except BaseException:
        client.close()
        raise
    return client


class ItemStream(Protocol):
    """The items of a stream: `Items`, or others with the same face."""

    def __iter__(self) -> Iterator[memoryview]:
        """One by one."""
        ...

    def batches(self) -> Iterator[Batch]:
        """All that are here at once."""
        ...

    def close(self) -> None:
        """Cancel, unless it has ended."""
        ...


class Caller(Protocol):
    """What makes calls: `Client`, or another with the same face."""

    def call(self, method: int, payload: Buffer = ..., timeout: float | None = ...) -> memoryview:
        """A unary call."""
        ...

    def call_stream(
        self, method: int, payload: Buffer = ..., timeout: float | None = ...
    ) -> ItemStream:
        """A streaming call."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


class Items:
    """The items of an open stream, in order; each is a view that lives until the next.

    Leaving the loop early, `close`, or dropping it cancels the call. Iteration raises CallError
    for an end that is not OK.
    """

    def __init__(self, client: "Client") -> None:
        self._client = client
        self._walk = self._generate()
        self._open = True

    def __iter__(self) -> Iterator[memoryview]:
        return self._cancelling()

    def __next__(self) -> memoryview:
        return next(self._walk)

    def batches(self) -> Generator[Batch, None, None]:
        """The items, but all that are here at once: for many small ones, and for numpy.

        A batch has at least one item and lives until the next; it ends and raises as iteration by
        items does, and the two may not be mixed.
        """
        client = self._client
        session = client._session
        try:
            while True:
                client._check_stream()
                batch = session.batch()
                if batch is not None:
                    yield batch
                elif client._event() == Kind.ITEM:
                    yield session.decoder.batch_of_one()
                else:
                    return
                client._consumed()
        finally:
            self._open = self._open and session.state == State.OPEN
            self.close()

    def close(self) -> None:
        """Cancel the call unless it has ended. Idempotent."""
        if self._open:
            self._open = False
            self._client._cancel()
            self._walk.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def _cancelling(self) -> Generator[memoryview, None, None]:
        try:
            yield from self._walk
        finally:
            self.close()

    def _generate(self) -> Generator[memoryview, None, None]:
        client = self._client
        session = client._session
        try:
            while True:
                client._check_stream()
                views = session.items()
                if views:
                    yield from views
                elif client._event() == Kind.ITEM:
                    yield session.payload
                else:
                    return
                client._consumed()
        finally:
            self._open = self._open and session.state == State.OPEN


class Client:
    """A connection to a server; `connect` makes it. Close it, or use it in a `with`."""

    def __init__(self, stream: Stream, session: ClientSession, url: str) -> None:
        self.url = url
        self._stream = stream
        self._session = session
        self._deadline_ns = NEVER  # of the open call
        _clients.add(self)

    def call(self, method: int, payload: Buffer = b"", timeout: float | None = None) -> memoryview:
        """Call a unary method and return its reply, a view that lives until the next call.

        `method` is 1 to 65535, `payload` bytes or a view of them (TypeError for a str), `timeout`
        in seconds; None: wait as long as it takes. Raises UsageError if nothing was sent
        (FAILED_PRECONDITION: a stream is open; INVALID_ARGUMENT: no number of a method;
        RESOURCE_EXHAUSTED: too large), CallError with the server's status, DEADLINE_EXCEEDED, or
        UNAVAILABLE if the server has gone, ProtocolError if it breaks the rules, SystemError, and
        Error (FAILED_PRECONDITION) in the child of a fork.

        The connection lives after UsageError, TypeError, any status that a handler gave (its own
        UNAVAILABLE, too), and a deadline. What ends it: the server's end or farewell, whose status
        may be another than UNAVAILABLE (RESOURCE_EXHAUSTED: it is full, or hangs up on who reads no
        answers); ProtocolError, SystemError and a fork; a deadline met while the request was still
        being sent; and what a signal's handler raises meanwhile, as Ctrl-C does. Each further call
        raises CallError, UNAVAILABLE, then: connect anew. (gRPC does that by itself: there the
        connection lives after all but a fork.)
        """
        session = self._session
        deadline_ns, left_ms = NEVER, 0
        if timeout is not None:
            deadline_ns, left_ms = self._limits(timeout)
        # The lane first (see session): a small request that leaves in one write, and its answer.
        request = session.call_small(method, payload, left_ms)
        if request is None:
            self._start(method, payload, False, deadline_ns, left_ms)
        else:
            stream = self._stream
            self._deadline_ns = deadline_ns
            try:
                sent = stream.try_write((request,))
                if sent == len(request):
                    count = stream.read(session.space, deadline_ns)
            except Error as error:
                self._lose(error)
            except BaseException:  # half of a request, perhaps: nobody can complete it
                self.close()
                raise
            if sent != len(request):
                self._send_rest(request, sent)
            elif count > 0:
                reply = session.filled_by_reply(count)
                if deadline_ns != NEVER and self._is_late():
                    self._expire()
                if reply is not None:
                    return reply
            else:
                self._took(count)
        self._event()  # END: an ITEM here breaks the rules
        return session.payload

    def call_stream(
        self, method: int, payload: Buffer = b"", timeout: float | None = None
    ) -> "Items":
        """Call a streaming method; the items come as they are iterated. Raises as `call`."""
        deadline_ns, left_ms = (NEVER, 0) if timeout is None else self._limits(timeout)
        self._start(method, payload, True, deadline_ns, left_ms)
        return Items(self)

    def fileno(self) -> int:
        """The stream's descriptor (see Stream.fileno)."""
        return self._stream.fileno()

    def close(self) -> None:
        """Close the connection; an open call is cancelled by that. Idempotent."""
        self._session.state = State.CLOSED
        self._session.outbox.clear()
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _limits(self, timeout: float) -> tuple[int, int]:
        """The deadline that `timeout` means, and what CALL says of it."""
        deadline_ns = deadline_after(timeout)
        if deadline_ns == NEVER:
            return NEVER, 0
        left_ms = min(remaining_ms(deadline_ns), 0xFFFFFFFF)
        if left_ms == 0:
            raise CallError(Status.DEADLINE_EXCEEDED, "the deadline has passed", self.url)
        return deadline_ns, left_ms

    def _start(
        self, method: int, payload: Buffer, streaming: bool, deadline_ns: int, left_ms: int
    ) -> None:
        """Send a CALL, whole: its payload is the caller's, who may change it afterwards."""
        session = self._session
        if type(payload) is not bytes:
            payload = memoryview(payload).cast("B")
            session.hold()  # it may be a view of the last reply
        try:
            if session.outbox.size and session.state == State.IDLE:  # the CANCEL of the last call
                self._deadline_ns = deadline_ns
                self._send()
            session.call(method, payload, streaming, left_ms)
        except Error as error:
            error.where = error.where or self.url
            raise
        self._deadline_ns = deadline_ns
        self._send_call()
        session.decoder.release()

    def _send_rest(self, request: bytes, count: int) -> None:
        """Send what the lane has left of a CALL, whose first `count` bytes were written; END: the
        server has gone, and why may still stand in what it sent before."""
        if count != END:
            self._session.outbox.put_rest(request, count)
            self._send_call()

    def _send_call(self) -> None:
        try:
            self._send()
        except BaseException:  # half of a request: nobody can complete it
            self.close()
            raise

    def _send(self) -> None:
        """Write all that is due."""
        session = self._session
        self._write()
        while session.outbox.size:
            if self._decode() is not None:
                raise ProtocolError("an answer to a call that is still on its way")
            self._read_while_full()
            self._write()

    def _event(self) -> Kind:
        """The next event of the open call; what is due is written first. Raises CallError for an
        END that is not OK, and at the deadline."""
        session = self._session
        try:
            while True:
                if not session.decoder.is_clean():
                    event = self._decode()
                    if event is not None:
                        return event
                if session.outbox.size:
                    self._write()
                    if session.outbox.size:
                        self._read_while_full()
                        continue
                try:
                    count = self._stream.read(session.decoder.space(), self._deadline_ns)
                except Error as error:
                    self._lose(error)
                self._took(count)
        except Error:
            raise
        except BaseException:  # of a signal's handler, which may come between a read and its count
            self.close()
            raise

    def _check_stream(self) -> None:
        """May more of its items be taken?"""
        if self._session.state == State.CLOSED:  # by its owner, in mid-stream
            raise CallError(Status.UNAVAILABLE, "the connection is closed", self.url)
        if self._is_late():
            self._expire()

    def _consumed(self) -> None:
        """All items handed out were used."""
        self._session.consumed()
        if self._session.outbox.size:
            self._write()

    def _took(self, count: int) -> None:
        """Take in what was read; at the deadline give the call up."""
        self._take(count)  # what came at the deadline is not lost: the next call needs it
        if count == WOULD_BLOCK or (self._deadline_ns != NEVER and self._is_late()):
            self._expire()

    def _read_while_full(self) -> None:
        """Whoever cannot write reads meanwhile: never wait for writable alone (FRAME.md)."""
        try:
            self._stream.wait(True, True, self._deadline_ns)
            count = self._stream.try_read(self._session.decoder.space())
        except Error as error:
            self._lose(error)
        self._take(count)
        if self._is_late():
            self._expire()

    def _is_late(self) -> bool:
        return now_ns() >= self._deadline_ns

    def _decode(self) -> Kind | None:
        """The next event that is here already. Raises as `_event`, and ProtocolError."""
        session = self._session
        try:
            event = session.next_event()
        except ProtocolError as error:
            error.where = self.url
            self.close()
            raise
        if event == Kind.END and session.status != Status.OK:
            if session.state == State.CLOSED:
                self.close()
            raise CallError(session.status, session.message, self.url)
        return event

    def _take(self, count: int) -> None:
        session = self._session
        if count > 0:
            session.filled(count)
        elif count == END:
            session.end_of_input()
            self.close()
            raise CallError(Status.UNAVAILABLE, session.message, self.url)

    def _lose(self, error: Error) -> NoReturn:
        """Pass on what a stream raises. It is final: the peer broke the mechanism's rules, or a
        system call failed, and nobody knows how much was moved."""
        self.close()
        error.where = error.where or self.url
        raise error

    def _write(self) -> None:
        """Write what can be written at once."""
        outbox = self._session.outbox
        try:
            while outbox.size:
                count = self._stream.try_write(outbox.buffers())
                if count > 0:
                    outbox.sent(count)
                else:
                    if count == END:
                        outbox.clear()  # why the server went may still stand in what it sent before
                    return
        except Error as error:
            self._lose(error)
        except BaseException:  # as in `_event`
            self.close()
            raise

    def _expire(self) -> NoReturn:
        """The deadline has come: give the call up."""
        self._cancel()
        raise CallError(Status.DEADLINE_EXCEEDED, "no answer before the deadline", self.url)

    def _cancel(self) -> None:
        if self._session.state == State.OPEN:
            self._session.cancel()
            self._write()

    def _meet(self, deadline_ns: int) -> None:
        self._deadline_ns = deadline_ns
        try:
            self._send()
            session, stream = self._session, self._stream
            while self._decode() is None and session.state == State.HELLO:
                try:
                    count = stream.read(session.decoder.space(), deadline_ns)
                except Error as error:
                    self._lose(error)
                if count == WOULD_BLOCK:
                    what = "the server said no hello in time"
                    raise Error(Status.UNAVAILABLE, what, self.url)
                self._take(count)
        except CallError as error:
            if error.status == Status.DEADLINE_EXCEEDED:
                what = "the server said no hello in time"
                raise Error(Status.UNAVAILABLE, what, self.url) from None
            raise


class Orphan(Stream):
    """The stream of a client in the child of a fork: the parent's, so nothing touches it here. It
    is kept, for its end would close or remove what the parent uses."""

    def __init__(self, parents: Stream) -> None:
        self.spinner = Spinner(Wait.BLOCK)
        self._parents = parents

    def try_read(self, buffer: memoryview) -> int:
        raise self._refusal()

    def try_write(self, buffers: Sequence[Buffer]) -> int:
        raise self._refusal()

    def wait(self, readable: bool, writable: bool, deadline_ns: int) -> bool:
        raise self._refusal()

    def fileno(self) -> int:
        raise self._refusal()

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _refusal(self) -> Error:
        what = "the connection is the parent's, from before the fork: connect anew"
        return Error(Status.FAILED_PRECONDITION, what)


_clients: "weakref.WeakSet[Client]" = weakref.WeakSet()  # of this process


def _orphan_all() -> None:
    for client in _clients:
        client._stream = Orphan(client._stream)


os.register_at_fork(after_in_child=_orphan_all)


__all__ = ["Caller", "Client", "ItemStream", "Items", "UsageError", "connect"]
