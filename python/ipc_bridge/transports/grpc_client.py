"""A client's end of gRPC: a channel of its own and the calls on it; the traps stand in grpc_rpc."""

import contextlib
import os
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any, ClassVar

import grpc

from ipc_bridge import frame
from ipc_bridge.bridge_pb2 import (
    CallReply,
    CallRequest,
    EchoReply,
    EchoRequest,
    HelloReply,
    HelloRequest,
    StreamRequest,
)
from ipc_bridge.bridge_pb2_grpc import BridgeStub
from ipc_bridge.errors import CallError, Error, Status, UsageError
from ipc_bridge.frame import Batch, Buffer
from ipc_bridge.session import ServerSession
from ipc_bridge.system import NEVER, TIMEOUT_S_MAX, now_ns
from ipc_bridge.transports.grpc_options import (
    ECHO,
    MAX_PAYLOAD_KEY,
    STREAM,
    Arguments,
    message_bytes,
    too_large,
)

CONNECT_RETRY_MS = (100, 500)  # between attempts to reach a server; gRPC allows no less than 100


class Forks:
    """How often this process is a fork of another. What the parent had, the child leaves alone, and
    keeps, for its end would reach for the parent's calls; it may connect anew. (See grpc_rpc.)"""

    count = 0
    clients: ClassVar["weakref.WeakSet[RpcClient]"] = weakref.WeakSet()
    kept: ClassVar["list[RpcClient]"] = []

    @classmethod
    def happened(cls) -> None:
        cls.count += 1
        cls.kept += cls.clients


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
            ("grpc.max_receive_message_length", message_bytes(payload_bytes_max)),
            # The window of a stream: fixed, else it grows with the link's speed. (In C++ it may,
            # with the default: gRPC 1.51 is slow otherwise.)
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
            # (Not SingleThreadedUnaryStream: it is quicker, and never gives back a stream that is
            # left early, for who has cancelled cannot take its last events any more.)
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
        self.forks = Forks.count  # when it was made
        Forks.clients.add(self)

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
        timeout = self._prepare(method, len(request), timeout)
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
        timeout = self._prepare(method, len(request), timeout)
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
        if not self.is_forked:
            self._channel.close()

    @property
    def is_forked(self) -> bool:
        return self.forks != Forks.count

    def check_fork(self) -> None:
        if self.is_forked:
            what = "the connection is the parent's, from before the fork: connect anew"
            raise UsageError(Status.FAILED_PRECONDITION, what, self.url)

    def _prepare(self, method: int, size: int, timeout: float | None) -> float | None:
        """What is checked before any call; the timeout for gRPC. Raises as Client.call."""
        if timeout is not None:
            if timeout <= 0:
                raise CallError(Status.DEADLINE_EXCEEDED, "the deadline has passed", self.url)
            if timeout > TIMEOUT_S_MAX:
                timeout = None
        self.check_fork()
        if self._items is not None and self._items.is_open:
            what = "a call is under way on this connection"
            raise UsageError(Status.FAILED_PRECONDITION, what, self.url)
        if self._closed:
            raise CallError(Status.UNAVAILABLE, "the connection is closed", self.url)
        frame.check_method(method, self.url)
        if size > self._peer_payload_bytes_max:
            what = too_large(size, "server", self._peer_payload_bytes_max)
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
        self._caller.check_fork()
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
        if self.is_open and not self._caller.is_forked:
            self._responses.cancel()
        self.is_open = False

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    def _cancelling(self) -> Generator[memoryview, None, None]:
        """As `__next__` until the end, but with less for each item."""
        caller = self._caller
        forks, count = Forks, caller.forks
        try:
            caller.check_fork()
            for response in self._responses if self.is_open else ():
                yield memoryview(response.payload)
                if forks.count != count:
                    caller.check_fork()
            self.is_open = False
        except grpc.RpcError as error:
            if self.is_open:  # else it was closed meanwhile
                self.is_open = False
                raise self._caller.error_of(error) from None
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
