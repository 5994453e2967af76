"""gRPC: `grpc+unix` and `grpc+tcp`, the service of bridge.proto as any gRPC client sees it.

Pick it when others are to call the service too: other languages, grpcurl, proxies, and their tools.
It is the slowest of all by far: every call is a stream of HTTP/2, with its own headers, and every
payload goes through protobuf.

Meeting: gRPC's own. On a Unix socket a lock beside the path comes first, for gRPC's servers take
each other's paths; `grpc+tcp` serves other hosts only with keys (mutual TLS).

The trap: by default gRPC reads ahead up to megabytes, and more on a fast link, so that a slow
reader hardly slows its producer: here the window is fixed. A producer is at most that window, and
512 KiB or an item, ahead (measured with 4 KiB items: 0 to 256 KiB). Others are remedied where
they bite: servers that share a port, proxies, channels that share a connection, reconnecting at
leisure.

Keys: one's own CA signs a certificate for each side, with the server's host in subjectAltName.
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=ca
        -keyout ca.key -out ca.pem
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=server
        -addext subjectAltName=DNS:HOST -keyout server.key -out server.csr
    openssl x509 -req -copy_extensions copy -in server.csr -CA ca.pem -CAkey ca.key
        -out server.pem
and the last two again for the client; then ?ca=ca.pem&cert=server.pem&key=server.key.

gRPC is a session layer: this file gives the faces of Client and Server, not a Stream. Handlers run
in a pool of threads, one for each call: a stream that takes long holds up nobody.

Copy with it: bridge.proto, errors, frame, session, system, unix_address, client, server.
Run: python -m ipc_bridge.peer serve grpc+unix:///tmp/demo.sock
"""

import contextlib
import ipaddress
import logging
import os
import select
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self
from urllib.parse import quote

# gRPC writes what it meets to stderr; what matters here reaches the caller as an Error. Whoever
# wants its log sets GRPC_VERBOSITY. (It is read when the library is loaded.)
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ipc_bridge import frame
from ipc_bridge.bridge_pb2 import DESCRIPTOR as BRIDGE
from ipc_bridge.bridge_pb2 import (
    CallReply,
    CallRequest,
    EchoReply,
    EchoRequest,
    HelloReply,
    HelloRequest,
    StreamItem,
    StreamRequest,
)
from ipc_bridge.bridge_pb2_grpc import BridgeServicer, BridgeStub, add_BridgeServicer_to_server
from ipc_bridge.errors import MESSAGE_BYTES_MAX, CallError, Error, Status, UsageError
from ipc_bridge.frame import Batch, Buffer
from ipc_bridge.server import CUT_S, REASONS, Call, Pause, Service
from ipc_bridge.session import WINDOW_BYTES, ServerSession
from ipc_bridge.system import NEVER, TIMEOUT_S_MAX, Lock, Wakeup, checked, deadline_after, now_ns
from ipc_bridge.transports.unix_address import UnixAddress

ECHO = 1  # service's; the typed methods of bridge.proto
STREAM = 2

MAX_PAYLOAD_KEY = "ipc-bridge-max-payload"  # the metadata that tells a client's (bridge.proto)
MESSAGE_EXTRA_BYTES = 64  # tags and sizes around a payload: more than any message here has
CONNECT_RETRY_MS = (100, 500)  # between attempts to reach a server; gRPC allows no less than 100
KEEPALIVE_MS = 5000  # a host silent for twice as long has gone (a process's end shows at once)
REQUEST_WINDOW_BYTES = 65535  # HTTP/2's default; a Unix socket's buffer has three times as much
SIGNAL_LOOK_MS = 250  # a signal may come to a thread of gRPC's, which does not wake the main one
EXTRA_CALLS_MAX = 64  # hellos, health checks and reflection at once
HANDSHAKE_TIMEOUT_MS = 5000  # a stranger that says no HTTP/2 for so long is none of ours

log = logging.getLogger("ipc_bridge")

Arguments = list[tuple[str, int | str]]


def _message_bytes(payload_bytes: int) -> int:
    """The largest message for a payload; gRPC takes an int, and protobuf makes none larger."""
    return min(payload_bytes + MESSAGE_EXTRA_BYTES, 0x7FFFFFFF)


class Keys(NamedTuple):
    """Files in PEM form that let the peers of `grpc+tcp` know each other; "" for none."""

    ca: str = ""  # who signs the other side's certificate
    cert: str = ""  # one's own
    key: str = ""  # and its private key
    name: str = ""  # that a client wants in the server's certificate, instead of the host


# --- the client ---


class Forks:
    """How often this process is a fork of another. The threads of gRPC stay behind in a fork."""

    count = 0

    @classmethod
    def happened(cls) -> None:
        cls.count += 1


os.register_at_fork(after_in_child=Forks.happened)


class RpcClient:
    """A connection to a server; `GrpcUnix.connect` and `GrpcTcp.connect` make it."""

    def __init__(
        self,
        target: str,
        credentials: grpc.ChannelCredentials | None,
        arguments: Arguments,
        url: str,
        window_bytes: int,
        payload_bytes_max: int,
    ) -> None:
        ServerSession(window_bytes, payload_bytes_max)  # a bad option is an error now
        self.url = url
        arguments = [
            *arguments,
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", _message_bytes(payload_bytes_max)),
            # The window of a stream: fixed, else it grows with the link's speed.
            ("grpc.http2.lookahead_bytes", window_bytes),
            ("grpc.http2.bdp_probe", 0),
            # A connection of its own: gRPC's channels to one address share theirs otherwise.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_http_proxy", 0),
            # A call is made once or not at all; and both cost time on every call.
            ("grpc.enable_retries", 0),
            ("grpc.enable_channelz", 0),
            ("grpc.initial_reconnect_backoff_ms", CONNECT_RETRY_MS[0]),
            ("grpc.max_reconnect_backoff_ms", CONNECT_RETRY_MS[1]),
            # (Not SingleThreadedUnaryStream, which never gives back a stream that is left early.)
        ]
        self._channel = (
            grpc.secure_channel(target, credentials, arguments)
            if credentials
            else grpc.insecure_channel(target, arguments)
        )
        stub = BridgeStub(self._channel)
        self._hello: Callable[..., HelloReply] = stub.Hello
        self._echo: Callable[..., EchoReply] = stub.Echo
        self._call: Callable[..., CallReply] = stub.Call
        self._stream: Callable[..., Any] = stub.Stream
        self._call_stream: Callable[..., Any] = stub.CallStream
        self._metadata: tuple[tuple[str, str], ...] | None = None
        if payload_bytes_max != frame.PAYLOAD_BYTES_MAX:
            self._metadata = ((MAX_PAYLOAD_KEY, str(payload_bytes_max)),)
        self._peer_payload_bytes_max = frame.PAYLOAD_BYTES_MAX
        self._items: RpcItems | None = None  # of the open stream
        self._closed = False
        self._forks = Forks.count  # when it was made

    def meet(self, deadline_ns: int, missing: str) -> None:
        """Learn what the server takes, waiting for it to start. Raises Error: UNAVAILABLE."""
        timeout = None if deadline_ns == NEVER else max(0.0, (deadline_ns - now_ns()) / 1e9)
        try:
            reply = self._hello(HelloRequest(), timeout, wait_for_ready=True)
            self._peer_payload_bytes_max = reply.max_payload
        except grpc.RpcError as error:
            code = error.code()
            if code == grpc.StatusCode.DEADLINE_EXCEEDED:
                raise Error(Status.UNAVAILABLE, missing, self.url) from None
            if code != grpc.StatusCode.UNIMPLEMENTED:  # of a server from an older bridge.proto
                raise self.error_of(error) from None

    def call(self, method: int, payload: Buffer = b"", timeout: float | None = None) -> memoryview:
        """As Client.call; but the connection lives also after UNAVAILABLE, as gRPC connects again,
        and after a deadline met while the request was still being sent."""
        request = _bytes_of(payload)
        timeout = self._prepare(len(request), timeout)
        try:
            if method == ECHO:
                echo = EchoRequest(payload=request)
                return memoryview(self._echo(echo, timeout, self._metadata).payload)
            asked = CallRequest(method=method, payload=request)
            return memoryview(self._call(asked, timeout, self._metadata).payload)
        except grpc.RpcError as error:
            raise self.error_of(error) from None

    def call_stream(
        self, method: int, payload: Buffer = b"", timeout: float | None = None
    ) -> "RpcItems":
        """As Client.call_stream."""
        request = _bytes_of(payload)
        timeout = self._prepare(len(request), timeout)
        asked = _stream_request(request) if method == STREAM else None
        if asked is not None:
            responses = self._stream(asked, timeout, self._metadata)
        else:
            by_number = CallRequest(method=method, payload=request)
            responses = self._call_stream(by_number, timeout, self._metadata)
        self._items = RpcItems(self, responses)
        return self._items

    def close(self) -> None:
        """Close the connection; an open call is cancelled by that. Idempotent."""
        self._closed = True
        if self._forks == Forks.count:
            self._channel.close()

    def _prepare(self, size: int, timeout: float | None) -> float | None:
        """What is checked before any call; the timeout for gRPC. Raises as Client.call."""
        if timeout is not None:
            if timeout <= 0:
                raise CallError(Status.DEADLINE_EXCEEDED, "the deadline has passed", self.url)
            if timeout > TIMEOUT_S_MAX:
                timeout = None
        if self._items is not None and self._items.is_open:
            what = "a call is under way on this connection"
            raise UsageError(Status.FAILED_PRECONDITION, what, self.url)
        if self._forks != Forks.count:
            what = "a connection does not survive a fork"
            raise UsageError(Status.FAILED_PRECONDITION, what, self.url)
        if self._closed:
            raise CallError(Status.UNAVAILABLE, "the connection is closed", self.url)
        if size > self._peer_payload_bytes_max:
            what = f"payload of {size} bytes, the server takes {self._peer_payload_bytes_max}"
            raise UsageError(Status.RESOURCE_EXHAUSTED, what, self.url)
        return timeout

    def error_of(self, error: grpc.RpcError) -> CallError:
        """What gRPC itself found out is said in our words; what the server said, in its own."""
        status = Status(error.code().value[0])
        if status == Status.DEADLINE_EXCEEDED:
            return CallError(status, "no answer before the deadline", self.url)
        return CallError(status, error.details() or "", self.url)


class RpcItems:
    """The items of an open stream; as Items."""

    def __init__(self, caller: RpcClient, responses: Any) -> None:
        self.is_open = True
        self._caller = caller
        self._responses = responses

    def __iter__(self) -> Iterator[memoryview]:
        return self._cancelling()

    def __next__(self) -> memoryview:
        if not self.is_open:
            raise StopIteration
        try:
            return memoryview(next(self._responses).payload)
        except StopIteration:
            self.is_open = False
            raise
        except grpc.RpcError as error:
            self.is_open = False
            raise self._caller.error_of(error) from None

    def batches(self) -> Iterator[Batch]:
        """As Items.batches; an item each, for gRPC does not tell how many are here."""
        return map(Batch.of_one, self._cancelling())

    def close(self) -> None:
        """Cancel the call unless it has ended. Idempotent."""
        if self.is_open:
            self.is_open = False
            self._responses.cancel()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def _cancelling(self) -> Generator[memoryview, None, None]:
        try:
            while True:
                try:
                    item = next(self)
                except StopIteration:
                    return
                yield item
        finally:
            self.close()


def _bytes_of(payload: Buffer) -> bytes:
    """A payload for protobuf. Raises TypeError for what is no bytes."""
    return payload if type(payload) is bytes else bytes(memoryview(payload))


def _stream_request(payload: bytes) -> StreamRequest | None:
    """None: it is none, and the server will say so."""
    asked = StreamRequest()
    try:
        asked.ParseFromString(payload)
    except Exception:
        return None
    return asked


# --- the server ---


class RpcCall(Call):
    """A call that runs; ended early from any thread by `cancel`."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        left_s = context.time_remaining()
        self.deadline_ns = deadline_after(left_s)
        self._context = context
        self._why = Status.OK
        self._over: threading.Event | None = None  # made by whoever sleeps

    def is_cancelled(self) -> bool:
        return self.reason() != Status.OK

    def sleep(self, seconds: float) -> None:
        self.sleep_until(deadline_after(seconds))

    def sleep_until(self, until_ns: int) -> None:
        """Sleep until a time, or until the call is over."""
        if self._over is None:
            self._over = threading.Event()
            if not self._context.add_callback(self._over.set):
                self._over.set()
        until_ns = min(until_ns, self.deadline_ns)
        if self._why == Status.OK:
            left_ns = until_ns - now_ns()
            self._over.wait(None if until_ns == NEVER else max(0, left_ns) / 1e9)

    @property
    def peer_payload_bytes_max(self) -> int:
        for key, value in self._context.invocation_metadata():
            if key == MAX_PAYLOAD_KEY:
                return int(value)
        return frame.PAYLOAD_BYTES_MAX

    def reason(self) -> Status:
        """Why the call must end before its handler is done; OK: it need not."""
        if self._why != Status.OK:
            return self._why
        if self.deadline_ns != NEVER and now_ns() >= self.deadline_ns:
            return Status.DEADLINE_EXCEEDED
        return Status.OK if self._context.is_active() else Status.CANCELLED

    def cancel(self, why: Status) -> None:
        """End it, for a reason; the first one counts."""
        if self._why == Status.OK:
            self._why = why
        if self._over is not None:
            self._over.set()

    def checked(self, payload: Buffer) -> bytes:
        """What a handler gave, for protobuf. Raises Error: RESOURCE_EXHAUSTED if the client takes
        no payload of that size; TypeError for what is no bytes, or a view of wider elements."""
        size, size_max = len(payload), self.peer_payload_bytes_max
        if size > size_max:
            what = f"payload of {size} bytes, the client takes {size_max}"
            raise Error(Status.RESOURCE_EXHAUSTED, what)
        out = b"" + payload  # no copy of bytes
        if len(out) != size:
            raise TypeError(frame.WIDE)
        return out

    def end(self, status: Status, message: str) -> NoReturn:
        """End the call with another status than OK."""
        if status == Status.OK:
            status = Status.INTERNAL  # a failure that calls itself OK
        text = message.encode("utf-8", "replace")[:MESSAGE_BYTES_MAX].decode("utf-8", "ignore")
        self._context.abort(CODES[status], text)


CODES = {code.value[0]: code for code in grpc.StatusCode}


class RpcServicer(BridgeServicer):
    """The methods of bridge.proto, each in a thread of gRPC's pool."""

    def __init__(self, service: Service, payload_bytes_max: int, clients_max: int) -> None:
        self.running: dict[RpcCall, None] = {}
        self._service = service
        self._payload_bytes_max = payload_bytes_max
        self._clients_max = clients_max

    def Echo(self, request: EchoRequest, context: grpc.ServicerContext) -> EchoReply:  # noqa: N802
        return EchoReply(payload=self._answer(context, ECHO, request.payload))

    def Call(self, request: CallRequest, context: grpc.ServicerContext) -> CallReply:  # noqa: N802
        return CallReply(payload=self._answer(context, request.method, request.payload))

    def Stream(  # noqa: N802
        self, request: StreamRequest, context: grpc.ServicerContext
    ) -> Iterator[StreamItem]:
        return self._produce(context, STREAM, request.SerializeToString())

    def CallStream(  # noqa: N802
        self, request: CallRequest, context: grpc.ServicerContext
    ) -> Iterator[StreamItem]:
        return self._produce(context, request.method, request.payload)

    def Hello(  # noqa: N802
        self, request: HelloRequest, context: grpc.ServicerContext
    ) -> HelloReply:
        return HelloReply(max_payload=self._payload_bytes_max)

    def _answer(self, context: grpc.ServicerContext, method: int, request: bytes) -> bytes:
        """A unary call."""
        call = self._enter(context, request)
        try:
            reply = call.checked(self._service.find_unary(method)(call, memoryview(request)))
        except Exception as error:
            self._fail(call, error)
        finally:
            del self.running[call]
        self._check_reason(call)
        return reply

    def _produce(
        self, context: grpc.ServicerContext, method: int, request: bytes
    ) -> Iterator[StreamItem]:
        """A streaming call: gRPC asks for an item once the one before is on its way."""
        call = self._enter(context, request)
        items: Any = None
        try:
            items = iter(self._service.find_streaming(method)(call, memoryview(request)))
            for item in items:
                if item is None or call.reason() != Status.OK:
                    break
                if isinstance(item, Pause):
                    call.sleep_until(item.until_ns)
                    continue
                yield StreamItem(payload=call.checked(item))
        except Exception as error:
            self._fail(call, error)
        finally:
            _close(items)
            del self.running[call]
        self._check_reason(call)

    def _enter(self, context: grpc.ServicerContext, request: bytes) -> RpcCall:
        """A call begins, unless there are too many, or it is too large. (gRPC's own limits are a
        little above.)"""
        call, size = RpcCall(context), len(request)
        if len(self.running) >= self._clients_max:
            what = f"the server has {self._clients_max} calls under way and takes no more"
            call.end(Status.RESOURCE_EXHAUSTED, what)
        if size > self._payload_bytes_max:
            what = f"payload of {size} bytes, the server takes {self._payload_bytes_max}"
            call.end(Status.RESOURCE_EXHAUSTED, what)
        self.running[call] = None
        return call

    def _check_reason(self, call: RpcCall) -> None:
        reason = call.reason()
        if reason != Status.OK:
            call.end(reason, REASONS[reason])

    def _fail(self, call: RpcCall, error: Exception) -> NoReturn:
        if isinstance(error, Error):
            call.end(error.status, error.what)
        log.error("a handler failed", exc_info=error)
        call.end(Status.INTERNAL, str(error) or type(error).__name__)


class Threads(Executor):
    """A pool whose threads are daemons, as those of Server are: ThreadPoolExecutor's hold up the
    end of the program for as long as a handler goes on. (gRPC bounds what it submits.)"""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)  # threads that no task is meant for
        self._count = 0
        self._closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run it in a thread that is idle, or in a new one. Raises RuntimeError after `shutdown`,
        or if there is no further thread."""
        if self._closed:
            raise RuntimeError("the pool is shut down")
        future: Future[Any] = Future()

        def task() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        if not self._idle.acquire(blocking=False):
            threading.Thread(target=self._work, name="grpc", daemon=True).start()
            self._count += 1
        self._tasks.put(task)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the threads end, each with its task; wait for none."""
        self._closed = True
        for _ in range(self._count):
            self._tasks.put(None)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            del task  # it holds the call, and this may be the last one for long
            self._idle.release()


def _close(items: Any) -> None:
    close = getattr(items, "close", None)
    if close is not None:
        try:
            close()
        except Exception as error:
            log.error("a handler failed to close", exc_info=error)


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
        ServerSession(WINDOW_BYTES, payload_bytes_max)  # a bad option is an error now
        self._grace_s = grace_s
        self._cleanup = cleanup
        self._lock = threading.RLock()  # a signal's handler may interrupt who holds it
        self._wakeup = Wakeup()
        self._running = False  # then `run` drains
        self._closed = False
        self._servicer = RpcServicer(service, payload_bytes_max, clients_max)
        # A thread for each call that may run: none ever waits in line behind a stream.
        threads_max = clients_max + EXTRA_CALLS_MAX
        self._threads = Threads()
        self._server = grpc.server(
            self._threads,  # type: ignore[arg-type]  # any Executor will do
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.enable_channelz", 0),
                ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
                # Clients may ask whether we live as often as we do them, also between calls.
                ("grpc.keepalive_time_ms", KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
                # gRPC does not give up a call while a part of it is stuck in a socket that nobody
                # reads; so a client may send no more than a socket's buffer takes.
                ("grpc.http2.lookahead_bytes", REQUEST_WINDOW_BYTES),
                ("grpc.http2.bdp_probe", 0),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", _message_bytes(payload_bytes_max)),
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
        self._health.enter_graceful_shutdown()
        ended = self._server.stop(self._grace_s + CUT_S)
        if not ended.wait(self._grace_s):
            for call in list(self._servicer.running):
                call.cancel(Status.UNAVAILABLE)
            ended.wait(2 * CUT_S)
        self._threads.shutdown()
        self._cleanup()
        with self._lock:
            self._wakeup.close()


def _tell_about(server: grpc.Server) -> health.HealthServicer:
    """Health checking and reflection, as gRPC's own tools expect them."""
    servicer = health.HealthServicer(
        experimental_non_blocking=True, experimental_thread_pool=ThreadPoolExecutor(1, "health")
    )
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    name = BRIDGE.services_by_name["Bridge"].full_name
    for service in ("", name):
        servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    names = (name, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return servicer


# --- addresses ---


class Grpc(ABC):
    """An address that gRPC serves."""

    url: str

    @abstractmethod
    def connect(
        self, window_bytes: int, payload_bytes_max: int, timeout: float | None
    ) -> RpcClient:
        """Reach the server. The options and errors are those of `client.connect`."""

    @abstractmethod
    def serve(
        self, service: Service, payload_bytes_max: int, clients_max: int, grace_s: float
    ) -> RpcServer:
        """Become the server. The options and errors are those of `server.Server`, but `clients_max`
        bounds the calls that run at once."""


class GrpcUnix(Grpc):
    """`grpc+unix:///path`: a socket file, mode 0600, and `path.lock` while a server lives."""

    def __init__(self, path: str) -> None:
        """Raises Error: INVALID_ARGUMENT for a path that is empty or too long."""
        self.url = f"grpc+unix://{path}"
        self._address = UnixAddress(path, self.url, socket.SOCK_STREAM)

    def connect(
        self, window_bytes: int, payload_bytes_max: int, timeout: float | None
    ) -> RpcClient:
        deadline_ns = deadline_after(timeout)
        # Once by ourselves: gRPC asks nobody whose socket it is, and is slow to try again.
        self._address.connect(deadline_ns).close()
        target = f"unix:{quote(self._address.path)}"
        caller = RpcClient(target, None, [], self.url, window_bytes, payload_bytes_max)
        try:
            caller.meet(deadline_ns, "no server")
        except BaseException:
            caller.close()
            raise
        return caller

    def serve(
        self, service: Service, payload_bytes_max: int, clients_max: int, grace_s: float
    ) -> RpcServer:
        lock = Lock(self._address.path + ".lock")

        def cleanup() -> None:
            with contextlib.suppress(OSError):
                os.unlink(self._address.path)
            lock.close()

        # The file is born with its mode. (umask(2) is the process's: others that make files now
        # get narrower ones.)
        before = os.umask(0o177)
        try:
            self._address.reclaim()
            return RpcServer(
                f"unix:{quote(self._address.path)}",
                None,
                lambda port: self.url,
                cleanup,
                service,
                payload_bytes_max,
                clients_max,
                grace_s,
            )
        except BaseException:
            lock.close()
            raise
        finally:
            os.umask(before)


class GrpcTcp(Grpc):
    """`grpc+tcp://host:port`; port 0 lets the kernel choose. A server binds loopback unless it has
    keys by which it knows its clients, or `allow_remote` is set."""

    def __init__(
        self, host: str, port: int, keys: Keys | None = None, allow_remote: bool = False
    ) -> None:
        """Raises Error: INVALID_ARGUMENT for a certificate without its key."""
        self.host = host
        self.port = port
        self.url = f"grpc+tcp://{_authority(host, port)}"
        self._keys = keys or Keys()
        self._allow_remote = allow_remote
        if bool(self._keys.cert) != bool(self._keys.key):
            raise Error(Status.INVALID_ARGUMENT, "cert and key go together", self.url)

    def connect(
        self, window_bytes: int, payload_bytes_max: int, timeout: float | None
    ) -> RpcClient:
        deadline_ns = deadline_after(timeout)
        _, address = self._resolve()
        arguments: Arguments = [
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
        ]
        credentials, missing, keys = None, "no server", self._keys
        if keys.ca or keys.cert:
            missing = "no server, or none that shares our keys"
            arguments.append(("grpc.ssl_target_name_override", keys.name or self.host))
            credentials = grpc.ssl_channel_credentials(
                _read_if(keys.ca), _read_if(keys.key), _read_if(keys.cert)
            )
        target = _authority(address, self.port)
        caller = RpcClient(
            target, credentials, arguments, self.url, window_bytes, payload_bytes_max
        )
        try:
            caller.meet(deadline_ns, missing)
        except BaseException:
            caller.close()
            raise
        return caller

    def serve(
        self, service: Service, payload_bytes_max: int, clients_max: int, grace_s: float
    ) -> RpcServer:
        family, address = self._resolve()
        keys = self._keys
        is_loopback = ipaddress.ip_address(address).is_loopback
        if not is_loopback and not (keys.ca and keys.cert) and not self._allow_remote:
            what = (
                "not a loopback address: ?ca=F&cert=F&key=F serves hosts with keys, "
                "?allow_remote=1 any"
            )
            raise Error(Status.PERMISSION_DENIED, what, self.url)
        if keys.ca and not keys.cert:
            what = "a server with ca needs cert and key"
            raise Error(Status.INVALID_ARGUMENT, what, self.url)
        credentials = None
        if keys.cert:
            pair = (_read(keys.key), _read(keys.cert))
            credentials = grpc.ssl_server_credentials([pair], _read_if(keys.ca), bool(keys.ca))
        self._check_free(family, address)
        return RpcServer(
            _authority(address, self.port),
            credentials,
            lambda port: f"grpc+tcp://{_authority(self.host, port)}",
            lambda: None,
            service,
            payload_bytes_max,
            clients_max,
            grace_s,
        )

    def _resolve(self) -> tuple[socket.AddressFamily, str]:
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except OSError:
            raise Error(Status.NOT_FOUND, "unknown host", self.url) from None
        return found[0][0], str(found[0][4][0])

    def _check_free(self, family: socket.AddressFamily, address: str) -> None:
        """gRPC does not say why it cannot listen: bind the address once before it does."""
        with socket.socket(family, socket.SOCK_STREAM) as sock, checked("bind", self.url):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, self.port))
            sock.listen(1)


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _read(path: str) -> bytes:
    """A file of keys, whole. Raises Error."""
    with checked("open", path), open(path, "rb") as file:
        return file.read()


def _read_if(path: str) -> bytes | None:
    return _read(path) if path else None
