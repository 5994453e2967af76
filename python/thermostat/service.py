"""The service: a thermostat. This is the file to edit, and service.hpp with it.

A method is a number and what its bytes mean, the same in both languages:

    10 set_target  unary      f64 the target in degrees Celsius -> f64 the target before
    11 watch       streaming  WatchRequest -> Reading, Reading, ...
"""

import threading
from collections.abc import Iterator

from ipc_bridge.errors import Error, Status
from ipc_bridge.handlers import Call, Service
from ipc_bridge.packed import Packed

SET_TARGET = 10
WATCH = 11

TARGET = Packed("d")
WATCH_REQUEST = Packed("Id")  # count, seconds between two readings
READING = Packed("dd")  # room and target, in degrees Celsius

# --- from here on: the server's side; delete it if the server is in C++ ---


class Handlers:
    """The handlers, and what they share: every connection has its own thread, hence the lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = 18.0
        self._target = 20.0

    def set_target(self, call: Call, request: memoryview) -> bytes:
        """Unary: bytes in, bytes out."""
        (target,) = TARGET.unpack(request)
        if not 5.0 <= target <= 30.0:
            raise Error(Status.INVALID_ARGUMENT, "the target is not within 5 to 30 degrees")
        with self._lock:
            before, self._target = self._target, target
        return TARGET.pack(before)

    def watch(self, call: Call, request: memoryview) -> Iterator[bytes]:
        """Streaming: an iterator of items. It is closed if the client leaves early."""
        count, seconds = WATCH_REQUEST.unpack(request)
        for i in range(count):
            if i > 0:
                call.sleep(seconds)  # ends early if the client cancels
            with self._lock:
                self._now += (self._target - self._now) / 2
                reading = READING.pack(self._now, self._target)
            yield reading


def make_service() -> Service:
    """The methods, for server.py."""
    handlers = Handlers()
    service = Service()
    service.unary(SET_TARGET, handlers.set_target)
    service.streaming(WATCH, handlers.watch)
    return service
