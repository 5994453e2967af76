"""A server's end of gRPC: the port, the threads for its calls, and its end; the traps stand in
grpc_rpc."""

import select
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ipc_bridge.bridge_pb2 import DESCRIPTOR as BRIDGE
from ipc_bridge.bridge_pb2_grpc import add_BridgeServicer_to_server
from ipc_bridge.errors import Error, Status
from ipc_bridge.handlers import Service
from ipc_bridge.server import CUT_S
from ipc_bridge.session import WINDOW_BYTES_DEFAULT, ServerSession
from ipc_bridge.system import Wakeup
from ipc_bridge.transports.grpc_calls import SPARE_THREAD, RpcServicer
from ipc_bridge.transports.grpc_health import Health
from ipc_bridge.transports.grpc_options import KEEPALIVE_MS, message_bytes

REQUEST_WINDOW_BYTES = 65535  # HTTP/2's default; a Unix socket's buffer has three times as much
HANDSHAKE_TIMEOUT_MS = 5000  # a stranger that says no HTTP/2 for so long is none of ours
SIGNAL_LOOK_MS = 250  # a signal may come to a thread of gRPC's, which does not wake the main one
EXTRA_CALLS_MAX = 64  # hellos, health checks and reflection at once


class Threads(Executor):
    """A pool whose threads are daemons, as those of Server are: ThreadPoolExecutor's hold up the
    end of the program for as long as a handler goes on. (gRPC bounds what it submits.)

    A task for which there is no further thread goes to a spare one, where calls are refused: what
    `submit` raises ends the thread that serves all, for good."""

    def __init__(self) -> None:
        """Raises RuntimeError: there is no further thread."""
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._refused: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)  # threads that no task is meant for
        self._count = 0
        self._closed = False
        threading.Thread(target=self._refuse, name=SPARE_THREAD, daemon=True).start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run it in a thread that is idle, or in a new one. Raises RuntimeError after
        `shutdown`."""
        if self._closed:
            raise RuntimeError("the pool is shut down")
        future: Future[Any] = Future()

        def task() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        if not self._idle.acquire(blocking=False):
            try:
                threading.Thread(target=self._work, name="grpc", daemon=True).start()
            except RuntimeError:
                self._refused.put(task)
                return future
            self._count += 1
        self._tasks.put(task)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end, each with its task; wait for none."""
        self._closed = True
        self._refused.put(None)
        for _ in range(self._count):
            self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # it holds the call, and this may be the last one for long
            self._idle.release()

    def _refuse(self) -> None:
        while (task := self._refused.get()) is not None:
            task()
            del task


class RpcServer:
    """A server of gRPC with the face of Server; `run` it, in a `with`."""

    def __init__(
        self,
        address: str,
        credentials: grpc.ServerCredentials | None,
        url_of_port: Callable[[int], str],
        cleanup: Callable[[], None],
        service: Service,
        payload_bytes_max: int,
        clients_max: int,
        grace_s: float,
    ) -> None:
        """Listen at `address`, which is free; `cleanup` removes it. Raises Error: ALREADY_EXISTS
        if another program has just taken it; INVALID_ARGUMENT if the keys are of no use."""
        ServerSession(WINDOW_BYTES_DEFAULT, payload_bytes_max)  # a bad option is an error now
        self._grace_s = grace_s
        self._cleanup = cleanup
        self._lock = threading.RLock()  # a signal's handler may interrupt who holds it
        self._wakeup = Wakeup()
        self._running = False  # then `run` drains
        self._closed = False
        self._servicer = RpcServicer(service, payload_bytes_max, clients_max)
        # A thread for each call that may run: none ever waits in line behind a stream.
        threads_max = clients_max + EXTRA_CALLS_MAX
        try:
            self._threads = Threads()
        except RuntimeError:
            raise Error(Status.RESOURCE_EXHAUSTED, "no thread for calls", address) from None
        self._server = grpc.server(
            self._threads,  # type: ignore[arg-type]  # any Executor will do
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.enable_channelz", 0),
                ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
                # Clients may ask whether we live, also between calls, and several times at once:
                # one that is not waiting for anything writes and reads every 5 s only.
                ("grpc.keepalive_time_ms", KEEPALIVE_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.max_ping_strikes", 0),
                # gRPC does not give up a call while a part of it is stuck in a socket that nobody
                # reads; so a client may send no more than a socket's buffer takes.
                ("grpc.http2.lookahead_bytes", REQUEST_WINDOW_BYTES),
                ("grpc.http2.bdp_probe", 0),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", message_bytes(payload_bytes_max)),
            ],
            maximum_concurrent_rpcs=threads_max,
        )
        add_BridgeServicer_to_server(self._servicer, self._server)
        self._health = _tell_about(self._server)
        try:
            if credentials:
                port = self._server.add_secure_port(address, credentials)
            else:
                port = self._server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if not port and credentials:
            raise Error(Status.INVALID_ARGUMENT, "gRPC cannot listen with these keys", address)
        if not port:
            raise Error(Status.ALREADY_EXISTS, "gRPC cannot listen there", address)
        self._server.start()
        self.url = url_of_port(port)

    def run(self) -> None:
        """Serve until `stop`; then let running calls end within the grace, and cut what is left."""
        with self._lock:
            if self._closed:
                return
            self._running = True
        try:
            poll = select.poll()
            poll.register(self._wakeup, select.POLLIN)
            while not poll.poll(SIGNAL_LOOK_MS):
                pass
        finally:
            self._drain()

    def stop(self) -> None:
        """From any thread, or a signal handler: make `run` return."""
        with self._lock:  # else it might be closed meanwhile
            self._wakeup.set()

    def close(self) -> None:
        """Stop listening, and remove the address. From any thread: a `run` under way is told to
        `stop`, and does it. Idempotent."""
        with self._lock:
            if self._running:
                self._wakeup.set()
                return
        self._drain()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _drain(self) -> None:
        """gRPC refuses new calls from now on. A handler that goes on after the grace, although its
        call is cut, is left behind."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._health.leave()
        ended = self._server.stop(self._grace_s + CUT_S)
        if not ended.wait(self._grace_s):
            for call in list(self._servicer.running):
                call.cancel(Status.UNAVAILABLE)
            ended.wait(2 * CUT_S)
        self._threads.shutdown()
        self._cleanup()
        with self._lock:
            self._wakeup.close()


def _tell_about(server: grpc.Server) -> Health:
    """Health checking and reflection, as gRPC's own tools expect them."""
    name = BRIDGE.services_by_name["Bridge"].full_name
    servicer = Health("", name)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    names = (name, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return servicer
