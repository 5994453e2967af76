"""What a service is made of: its handlers, and what they know and give.

A handler is called with its Call and the request, a view that lives until the handler is done:

    def unary(call, request) -> reply
    def streaming(call, request) -> iterator of items (bytes), or of Pause to be paced

and may block. Raise Error to end the call with a status; anything else ends it with INTERNAL.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import NamedTuple

from ipc_bridge.errors import Error, Status
from ipc_bridge.frame import Buffer, check_method

REASONS = {
    Status.CANCELLED: "cancelled by the client",
    Status.DEADLINE_EXCEEDED: "the deadline has passed",
    Status.UNAVAILABLE: "the server is shutting down",
}


class Pause(NamedTuple):
    """In place of an item: nothing before `until_ns` (monotonic). The connection goes on reading
    meanwhile, so a cancel ends it; unlike Call.sleep it occupies no thread of a shared loop."""

    until_ns: int


Item = Buffer | Pause
UnaryHandler = Callable[["Call", memoryview], Buffer]
StreamHandler = Callable[["Call", memoryview], Iterable[Item]]


class Service:
    """Methods by number, each with its handler.

    A handler that neither waits nor computes for long may say that it does not block; if none of
    a service does, some transports serve all clients in one thread, which is faster.
    """

    def __init__(self) -> None:
        self.blocks = False  # does any of the handlers?
        self._unary: dict[int, UnaryHandler] = {}
        self._streaming: dict[int, StreamHandler] = {}

    def unary(self, method: int, handler: UnaryHandler, blocks: bool = True) -> None:
        """Register a method that answers once. Raises UsageError: INVALID_ARGUMENT for a number
        that is not within 1 to 65535."""
        check_method(method)
        self.blocks = self.blocks or blocks
        self._unary[method] = handler

    def streaming(self, method: int, handler: StreamHandler, blocks: bool = True) -> None:
        """Register a method that answers with a stream of items. Raises as `unary`."""
        check_method(method)
        self.blocks = self.blocks or blocks
        self._streaming[method] = handler

    def find_unary(self, method: int) -> UnaryHandler:
        """Raises Error: UNIMPLEMENTED."""
        handler = self._unary.get(method)
        if handler is None:
            raise Error(Status.UNIMPLEMENTED, f"no unary method {method}")
        return handler

    def find_streaming(self, method: int) -> StreamHandler:
        """Raises Error: UNIMPLEMENTED."""
        handler = self._streaming.get(method)
        if handler is None:
            raise Error(Status.UNIMPLEMENTED, f"no streaming method {method}")
        return handler


class Call(ABC):
    """What a handler knows of the call it answers."""

    deadline_ns: int
    """On the monotonic clock, CLOCK_MONOTONIC, in ns; system.NEVER if the client set none."""

    @abstractmethod
    def is_cancelled(self) -> bool:
        """Look at the input: has the client cancelled or gone, or is the deadline past?"""

    @abstractmethod
    def sleep(self, seconds: float) -> None:
        """Sleep; ends early when `is_cancelled`. Items made so far are sent first."""

    @property
    @abstractmethod
    def peer_payload_bytes_max(self) -> int:
        """The largest payload that the client takes."""
