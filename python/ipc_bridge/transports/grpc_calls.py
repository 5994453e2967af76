"""The calls that a server of gRPC runs: a handler, and what its client is told of it."""

import logging
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import grpc

from ipc_bridge import frame
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
from ipc_bridge.bridge_pb2_grpc import BridgeServicer
from ipc_bridge.errors import MESSAGE_BYTES_MAX, Error, Status
from ipc_bridge.frame import Buffer
from ipc_bridge.handlers import REASONS, Call, Pause, Service
from ipc_bridge.system import NEVER, deadline_after, now_ns
from ipc_bridge.transports.grpc_options import ECHO, MAX_PAYLOAD_KEY, STREAM, too_large

SPARE_THREAD = "grpc-spare"  # the name of that for calls which have none of their own

log = logging.getLogger("ipc_bridge")


class RpcCall(Call):
    """A call that runs; ended early from any thread by `cancel`."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        left_s = context.time_remaining()
        self.deadline_ns = deadline_after(left_s)
        self._context = context
        self._why = Status.OK
        self._over: threading.Event | None = None  # made by whoever sleeps
        self._peer_payload_bytes_max = frame.PAYLOAD_BYTES_MAX
        for key, value in context.invocation_metadata():
            if key == MAX_PAYLOAD_KEY:
                self._peer_payload_bytes_max = int(value) if str(value).isdecimal() else 0

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
        return self._peer_payload_bytes_max

    @property
    def is_cut(self) -> bool:
        """Has somebody here ended it? (Else gRPC knows.)"""
        return self._why != Status.OK

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
        size, size_max = len(payload), self._peer_payload_bytes_max
        if size > size_max:
            raise Error(Status.RESOURCE_EXHAUSTED, too_large(size, "client", size_max))
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
        """A streaming call: gRPC asks for an item once the one before is on its way, and for none
        once the call has ended."""
        call = self._enter(context, request)
        items: Any = None
        try:
            items = iter(self._service.find_streaming(method)(call, memoryview(request)))
            for item in items:
                if item is None or call.is_cut:
                    break
                if isinstance(item, Pause):
                    call.sleep_until(item.until_ns)
                    if call.is_cancelled():  # gRPC stops us only at an item
                        break
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
        if threading.current_thread().name == SPARE_THREAD:
            call.end(Status.RESOURCE_EXHAUSTED, "the server has no further thread")
        if len(self.running) >= self._clients_max:
            what = f"the server has {self._clients_max} calls under way and takes no more"
            call.end(Status.RESOURCE_EXHAUSTED, what)
        if size > self._payload_bytes_max:
            what = too_large(size, "server", self._payload_bytes_max)
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


def _close(items: Any) -> None:
    close = getattr(items, "close", None)
    if close is not None:
        try:
            close()
        except Exception as error:
            log.error("a handler failed to close", exc_info=error)
