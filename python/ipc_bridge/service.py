"""The service: echo and stream, from both sides. This is the file to replace with one's own.

Server: `make_service()` registers a handler for each method. Client: `Bridge` gives each method a
typed face over `call` and `call_stream`. The contract is proto/bridge.proto.
"""

import math
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from ipc_bridge.bridge_pb2 import StreamRequest
from ipc_bridge.client import Caller, ItemStream
from ipc_bridge.errors import Error, Status, UsageError
from ipc_bridge.frame import Buffer
from ipc_bridge.handlers import Call, Item, Pause, Service
from ipc_bridge.system import now_ns

ECHO = 1
STREAM = 2

PATTERN_PERIOD = 65521  # a prime: no item size divides it, so a shifted item never verifies
ITEM_STRIDE = 257
STAMP = struct.Struct("<Q")  # monotonic ns
DUE_NS_MAX = 4e18  # a century after the first item: any rate above 0 is legal, however low

_PERIOD = bytes((k * k + (k >> 8)) % 251 for k in range(PATTERN_PERIOD))


class Pattern:
    """The bytes of every item of one size (bridge.proto)."""

    def __init__(self, size: int) -> None:
        self.size = size
        bytes_needed = PATTERN_PERIOD + size
        self._bytes = bytearray(_PERIOD * -(-bytes_needed // PATTERN_PERIOD))
        self._view = memoryview(self._bytes)

    def item(self, index: int) -> memoryview:
        """Item `index`, without a copy."""
        at = index * ITEM_STRIDE % PATTERN_PERIOD
        return self._view[at : at + self.size]

    def verifies(self, index: int, item: memoryview, skip: int = 0) -> bool:
        """Is this item `index`, apart from its first `skip` bytes?

        (`startswith` compares at once and in place; a slice would be a copy, and a view compares
        with a view byte by byte.)
        """
        at = index * ITEM_STRIDE % PATTERN_PERIOD
        if skip:
            item, at = item[skip:], at + skip
        return len(item) == self.size - skip and self._bytes.startswith(item, at)


def echo(call: Call, request: memoryview) -> Buffer:
    """The same bytes."""
    return request


def stream(call: Call, request: memoryview) -> Iterator[Item]:
    """`count` items of the pattern, paced if asked for. Raises Error: INVALID_ARGUMENT for a
    request that makes no sense, RESOURCE_EXHAUSTED for items that the client does not take."""
    asked = _parse(bytes(request))
    if asked.size > call.peer_payload_bytes_max:
        what = f"items of {asked.size} bytes, the client takes {call.peer_payload_bytes_max}"
        raise Error(Status.RESOURCE_EXHAUSTED, what)
    items = Pattern(asked.size)
    item = items.item
    if not asked.rate_hz and not asked.stamped:
        return map(item, range(asked.count))
    return _paced(items, asked)


def _paced(items: Pattern, asked: StreamRequest) -> Iterator[Item]:
    began_ns = now_ns()
    stamped = bytearray(items.size)
    for index in range(asked.count):
        if asked.rate_hz:
            due_ns = began_ns + int(min(index * 1e9 / asked.rate_hz, DUE_NS_MAX))
            if now_ns() < due_ns:
                yield Pause(due_ns)
        if asked.stamped:
            stamped[:] = items.item(index)
            STAMP.pack_into(stamped, 0, now_ns())
            yield stamped
        else:
            yield items.item(index)


def _parse(request: bytes) -> StreamRequest:
    asked = StreamRequest()
    try:
        asked.ParseFromString(request)
    except Exception:
        raise Error(Status.INVALID_ARGUMENT, "not a StreamRequest") from None
    if not math.isfinite(asked.rate_hz) or asked.rate_hz < 0:
        raise Error(Status.INVALID_ARGUMENT, f"rate_hz of {asked.rate_hz:g}")
    if asked.stamped and asked.size < STAMP.size:
        raise Error(Status.INVALID_ARGUMENT, f"a stamp takes {STAMP.size} bytes")
    return asked


def make_service() -> Service:
    """The two methods, for a server."""
    service = Service()
    service.unary(ECHO, echo, blocks=False)
    service.streaming(STREAM, stream, blocks=False)
    return service


class Bridge:
    """The service as its client sees it. Close it, or use it in a `with`."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.call = caller.call
        self.call_stream = caller.call_stream

    def echo(self, payload: Buffer, timeout: float | None = None) -> memoryview:
        """The same bytes, as a view that lives until the next call (`bytes(view)` keeps it).

        `timeout` in seconds. Raises as Client.call does.
        """
        return self.call(ECHO, payload, timeout)

    def stream(
        self,
        count: int,
        size: int,
        rate_hz: float = 0.0,
        stamped: bool = False,
        timeout: float | None = None,
    ) -> ItemStream:
        """`count` items of `size` bytes, each a view that lives until the next; see bridge.proto.

        Leaving the loop early cancels. Raises UsageError (INVALID_ARGUMENT) for a negative count or
        size, and as Client.call_stream does.
        """
        try:
            asked = StreamRequest(count=count, size=size, rate_hz=rate_hz, stamped=stamped)
        except ValueError:  # beyond its fields, u64 and u32. (C++ has types for that.)
            what = f"{count} items of {size} bytes"
            raise UsageError(Status.INVALID_ARGUMENT, what) from None
        return self.call_stream(STREAM, asked.SerializeToString(), timeout)

    def close(self) -> None:
        """Close the connection. Idempotent."""
        self.caller.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()
