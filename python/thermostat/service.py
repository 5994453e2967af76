"""The service: a thermostat, from both sides. This is the file to edit, and service.hpp with it.

A method is a number and what its bytes mean, the same in both languages:

    10 set_target  unary      f64 the target in degrees Celsius -> f64 the target before
    11 watch       streaming  u32 how many readings, f64 seconds between them -> Reading, ...

Server: `make_service` registers a handler for each method. Client: `Thermostat` gives each a face.
"""

import struct
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from ipc_bridge.client import Caller
from ipc_bridge.errors import Error, Status
from ipc_bridge.server import Call, Service

SET_TARGET = 10
WATCH = 11

CELSIUS = struct.Struct("<d")
WATCH_REQUEST = struct.Struct("<Id")  # "<": little-endian, and no gaps
READING = struct.Struct("<dd")

CELSIUS_MIN, CELSIUS_MAX = 5.0, 30.0


class Reading(NamedTuple):
    """An item of `watch`, in degrees Celsius."""

    room: float
    target: float


def unpack(shape: struct.Struct, payload: memoryview) -> tuple[Any, ...]:
    """Raises Error: INVALID_ARGUMENT for bytes of another size."""
    if len(payload) != shape.size:
        what = f"{shape.size} bytes are wanted, and {len(payload)} came"
        raise Error(Status.INVALID_ARGUMENT, what)
    return shape.unpack(payload)


# --- the server's side ---


class Room:
    """What the server knows. Every connection has a thread of its own: they share it by a lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = 18.0
        self._target = 20.0

    def set_target(self, call: Call, request: memoryview) -> bytes:
        """Unary: bytes in, bytes out."""
        (target,) = unpack(CELSIUS, request)
        if not CELSIUS_MIN <= target <= CELSIUS_MAX:
            what = f"the target is not within {CELSIUS_MIN:g} to {CELSIUS_MAX:g} degrees"
            raise Error(Status.INVALID_ARGUMENT, what)
        with self._lock:
            before, self._target = self._target, target
        return CELSIUS.pack(before)

    def watch(self, call: Call, request: memoryview) -> Iterator[bytes]:
        """Streaming: an iterator of items. It is closed if the client leaves early."""
        count, seconds = unpack(WATCH_REQUEST, request)
        for i in range(count):
            if i > 0:
                call.sleep(seconds)  # ends early if the client cancels
            with self._lock:
                self._now += (self._target - self._now) / 2
                reading = Reading(self._now, self._target)
            yield READING.pack(*reading)


def make_service() -> Service:
    """The methods, for a server."""
    room = Room()
    service = Service()
    service.unary(SET_TARGET, room.set_target)
    service.streaming(WATCH, room.watch)
    return service


# --- the client's side ---


class Thermostat:
    """The service as its client sees it. `timeout` in seconds; each raises as Client.call does."""

    def __init__(self, client: Caller) -> None:
        self._client = client

    def set_target(self, target: float, timeout: float | None = None) -> float:
        """The target before."""
        reply = self._client.call(SET_TARGET, CELSIUS.pack(target), timeout)
        (before,) = unpack(CELSIUS, reply)
        return float(before)

    def watch(self, count: int, seconds: float, timeout: float | None = None) -> Iterator[Reading]:
        """A reading every so many seconds; leaving the loop early cancels."""
        request = WATCH_REQUEST.pack(count, seconds)
        for item in self._client.call_stream(WATCH, request, timeout):
            yield Reading(*unpack(READING, item))
