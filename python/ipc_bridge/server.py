"""The server: one thread a connection, each the same loop. (Where one socket brings all clients,
and no handler blocks, one thread for all: see `_serve_all`.)

The GIL: connections are threads, so a handler that computes without releasing it takes up to 5 ms
(sys.getswitchinterval) from every other call; one that waits or copies does not.

Copy with it: errors, frame, session, system, handlers, connection.
"""

import threading
from types import TracebackType
from typing import Protocol, Self

from ipc_bridge import frame
from ipc_bridge.connection import Connection, log
from ipc_bridge.errors import Error, Status
from ipc_bridge.handlers import Service
from ipc_bridge.session import WINDOW_BYTES_DEFAULT, ServerSession
from ipc_bridge.system import NEVER, Hub, Stream, Transport, deadline_after, now_ns

TURNS_MAX = 16  # of clients with input, in a shared loop, before those whose time has come
CLIENTS_MAX_DEFAULT = 256  # default; each costs a thread and 256 KiB of buffer
STRANGERS_MAX = 256  # connections that have not said HELLO; beyond, the oldest is dropped
GRACE_S_DEFAULT = 1.0  # default; for running calls when the server is told to stop
CUT_S = 0.5  # then, for handlers to notice that they are cut


class Callee(Protocol):
    """What answers calls: `Server`, or another with the same face; `run` it, in a `with`."""

    url: str  # what a client connects to, the port filled in

    def run(self) -> None:
        """Serve until `stop`, or until no further client can come; then let running calls end
        within the grace, and cut what is left."""

    def stop(self) -> None:
        """From any thread, or a signal handler (which Python may run late: see system.Signals):
        make `run` return."""

    def close(self) -> None:
        """Stop listening, and remove the address. From any thread: a `run` under way is told to
        `stop`, and does it. Idempotent."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None: ...


class Server:
    """Listens on a transport and serves a service; a Callee."""

    def __init__(
        self,
        transport: Transport,
        service: Service,
        *,
        window_bytes: int = WINDOW_BYTES_DEFAULT,
        payload_bytes_max: int = frame.PAYLOAD_BYTES_MAX,
        clients_max: int = CLIENTS_MAX_DEFAULT,
        grace_s: float = GRACE_S_DEFAULT,
    ) -> None:
        """Listen; clients may come from now on.

        `payload_bytes_max` is the largest request taken, `window_bytes` what is stated for streams
        towards this side (there are none yet). Raises Error as Transport.listen does.
        """
        ServerSession(window_bytes, payload_bytes_max)  # a bad option is an error now
        self._service = service
        self._options = (window_bytes, payload_bytes_max)
        self._clients_max = clients_max
        self._grace_s = grace_s
        self._changed = threading.Condition()
        self._strangers: dict[Connection, None] = {}  # have not said hello; the oldest first
        self._clients: dict[Connection, None] = {}
        self._running = False  # then the listener is `run`'s to close
        self._closed = False
        self._stopping = False  # for a shared loop, which streams may keep busy
        self._by_stream: dict[Stream, Connection] = {}  # in a shared loop
        self._due: dict[Connection, int] = {}  # there, who has a time; see Connection.due_ns
        transport.payload_bytes_max = payload_bytes_max
        self._listener = transport.listen()
        self._hub = self._listener if isinstance(self._listener, Hub) else None
        if service.blocks:
            self._hub = None  # a thread for each client all the same
        self.url = self._listener.url

    def run(self) -> None:
        """Serve until `stop`, or until the transport can bring no further client; then let
        running calls end within the grace, and cut what is left."""
        with self._changed:
            if self._closed:
                return
            self._running = True
        try:
            if self._hub:
                while not self._stopping and self._serve_all(self._hub, NEVER):
                    pass
            else:
                while (stream := self._listener.accept()) is not None:
                    self._welcome(stream)
        finally:
            self._drain()

    def stop(self) -> None:
        """From any thread, or a signal handler: make `run` return."""
        self._stopping = True
        with self._changed:  # else it might be closed meanwhile. A handler may: it is reentrant
            self._listener.interrupt()

    def close(self) -> None:
        """Stop listening, and remove the address. From any thread: a `run` under way is told to
        `stop`, and does it. Idempotent."""
        with self._changed:
            self._closed = True
            if self._running:
                self.stop()
            else:
                self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _serve_all(self, hub: Hub, deadline_ns: int) -> bool:
        """A round of the loop in which one thread serves all: give a turn to those with input, and
        to those whose time has come. False at the deadline, or once the hub is interrupted."""
        soonest_ns = min(self._due.values()) if self._due else NEVER
        stream = hub.next(min(soonest_ns, deadline_ns))
        served = 0
        while stream is not None:
            self._turn(self._by_stream.get(stream) or self._admit(stream), soonest_ns)
            served += 1
            if soonest_ns or served == TURNS_MAX:
                break
            stream = hub.next(0)
        if soonest_ns == NEVER:
            return bool(served)
        now = now_ns()
        due = [connection for connection, due_ns in self._due.items() if due_ns <= now]
        for connection in due:
            self._turn(connection, 0)
        return bool(served or due)

    def _turn(self, connection: Connection, until_ns: int) -> None:
        try:
            lives = connection.turn(until_ns)
        except Exception as error:
            log.error("a connection failed", exc_info=error)
            lives = False
        due_ns = connection.due_ns() if lives else NEVER
        if due_ns != NEVER:
            self._due[connection] = due_ns
        else:
            self._due.pop(connection, None)
        if not lives:
            self._by_stream.pop(connection.stream, None)
            self._forget(connection)

    def _admit(self, stream: Stream) -> Connection:
        session = ServerSession(*self._options)
        connection = Connection(stream, self._service, session, self._on_hello)
        with self._changed:
            if len(self._strangers) >= STRANGERS_MAX:
                oldest = next(iter(self._strangers))
                self._cut(oldest)
                # They come faster than threads end; without this wait there is no bound. (In a
                # shared loop it goes in the next round, and nobody else would end it.)
                if not self._hub:
                    self._changed.wait_for(lambda: oldest not in self._strangers, CUT_S)
            self._strangers[connection] = None
            self._tell_crowd()
        if self._hub:
            self._by_stream[stream] = connection
        return connection

    def _cut(self, connection: Connection) -> None:
        connection.cut = True
        connection.stream.interrupt()
        if self._hub:
            self._due[connection] = 0

    def _welcome(self, stream: Stream) -> None:
        connection = self._admit(stream)
        thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no further thread
            log.warning("a client was turned away: %s", error)
            self._forget(connection)

    def _serve(self, connection: Connection) -> None:
        try:
            connection.run()
        except Exception as error:
            log.error("a connection failed", exc_info=error)
        finally:
            self._forget(connection)

    def _on_hello(self, connection: Connection) -> None:
        with self._changed:
            if len(self._clients) >= self._clients_max:
                what = f"the server has {self._clients_max} clients and takes no more"
                raise Error(Status.RESOURCE_EXHAUSTED, what)
            self._strangers.pop(connection, None)
            self._clients[connection] = None
            self._changed.notify_all()

    def _forget(self, connection: Connection) -> None:
        with self._changed:
            try:
                connection.stream.close()  # under the lock: nobody interrupts it after that
            finally:  # else the server would wait for it for ever
                self._strangers.pop(connection, None)
                self._clients.pop(connection, None)
                self._tell_crowd()
                self._changed.notify_all()

    def _tell_crowd(self) -> None:
        """Python's threads share the GIL: one connection may spin, several would fight."""
        everybody = [*self._strangers, *self._clients]
        for connection in everybody:
            connection.stream.spinner.crowded = len(everybody) > 1

    def _drain(self) -> None:
        with self._changed:
            self._listener.close()
            for connection in [*self._strangers, *self._clients]:
                connection.draining = True
                if connection.is_idle:
                    connection.stream.interrupt()
                if self._hub:
                    self._due[connection] = 0
        if self._wait_until_empty(self._grace_s):
            return
        with self._changed:
            for connection in [*self._strangers, *self._clients]:
                self._cut(connection)
        self._wait_until_empty(CUT_S)

    def _wait_until_empty(self, timeout_s: float) -> bool:
        if self._hub is None:
            with self._changed:
                return self._changed.wait_for(self._is_empty, timeout_s)
        deadline_ns = deadline_after(timeout_s)
        while not self._is_empty() and now_ns() < deadline_ns:
            self._serve_all(self._hub, deadline_ns)
        return self._is_empty()

    def _is_empty(self) -> bool:
        return not self._strangers and not self._clients
