"""A peer without a session: any frames, right or wrong, written and read by hand (FRAME.md)."""

import struct
from typing import NamedTuple, Self

import ipc_bridge
from ipc_bridge.bridge_pb2 import StreamRequest
from ipc_bridge.system import END, Stream, deadline_after
from support import MIB

WINDOW_BYTES = 4 * MIB
HELLO_KIND, CALL_KIND, ITEM_KIND, END_KIND, CREDIT_KIND, CANCEL_KIND, GOODBYE_KIND = range(1, 8)
INTERNAL = 13


def header(
    kind: int, size: int = 0, flags: int = 0, code: int = 0, call_id: int = 0, value: int = 0
) -> bytes:
    """Any header, also a wrong one."""
    return struct.pack("<IBBHII", size, kind, flags, code, call_id, value)


def hello(magic: bytes = b"IPCB", version: int = 1, window: int = WINDOW_BYTES) -> bytes:
    return header(HELLO_KIND, 8, code=version, value=window) + struct.pack("<4sI", magic, 64 * MIB)


def call(call_id: int, payload: bytes = b"", method: int = 1, streaming: bool = False) -> bytes:
    return header(CALL_KIND, len(payload), int(streaming), method, call_id) + payload


def stream_call(call_id: int, count: int, size: int, rate_hz: float = 0.0) -> bytes:
    asked = StreamRequest(count=count, size=size, rate_hz=rate_hz).SerializeToString()
    return call(call_id, asked, method=2, streaming=True)


def item(call_id: int, index: int, payload: bytes) -> bytes:
    return header(ITEM_KIND, len(payload), call_id=call_id, value=index) + payload


def end(call_id: int, status: int = 0, payload: bytes = b"") -> bytes:
    return header(END_KIND, len(payload), code=status, call_id=call_id) + payload


class Frame(NamedTuple):
    """What came."""

    kind: int
    flags: int
    code: int
    call_id: int
    value: int
    payload: bytes


def take(data: bytearray) -> Frame | None:
    """The first frame, out of the bytes; None if it is not whole."""
    if len(data) < 16:
        return None
    size, kind, flags, code, call_id, value = struct.unpack_from("<IBBHII", data)
    if len(data) < 16 + size:
        return None
    payload = bytes(data[16 : 16 + size])
    del data[: 16 + size]
    return Frame(kind, flags, code, call_id, value, payload)


def split(data: bytes) -> list[Frame]:
    """The frames that the bytes are."""
    rest = bytearray(data)
    found = []
    while frame := take(rest):
        found.append(frame)
    assert not rest, "half a frame"
    return found


class Raw:
    """A connection without a session: any bytes go out, frames come in."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.ended = False  # the peer has gone
        self._bytes = bytearray()

    @classmethod
    def connect(cls, url: str, seconds: float = 5.0) -> Self:
        return cls(ipc_bridge.transport(url).connect(deadline_after(seconds)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *about: object) -> None:
        self.stream.close()

    def send(self, data: bytes, seconds: float = 5.0) -> None:
        """Write it all, and read while there is no room; a peer that has gone shows at reading."""
        rest, end_ns = memoryview(data), deadline_after(seconds)
        buffer = memoryview(bytearray(MIB))
        while rest:
            count = self.stream.try_write([rest])
            if count == END:
                return
            rest = rest[count:]
            if not count:
                assert self.stream.wait(True, True, end_ns), "the peer does not read"
                self._take_in(buffer, self.stream.try_read(buffer))

    def frames(self, count: int | None = None, seconds: float = 2.0) -> list[Frame]:
        """So many frames; None: all, until the peer closes. Fewer if it closes, or is silent."""
        found: list[Frame] = []
        buffer, end_ns = memoryview(bytearray(MIB)), deadline_after(seconds)
        while True:
            while (count is None or len(found) < count) and (frame := take(self._bytes)):
                found.append(frame)
            if len(found) == count or self.ended:
                return found
            got = self.stream.read(buffer, end_ns)
            if got == 0:
                return found
            self._take_in(buffer, got)

    def _take_in(self, buffer: memoryview, got: int) -> None:
        self.ended = self.ended or got == END
        self._bytes += buffer[: max(got, 0)]


def is_refusal(raw: Raw) -> bool:
    """Does the peer end the session: by END of call 0 that says why, or by closing?

    (TCP may lose the END, as the peer closes with input still unread.)
    """
    frames = raw.frames()
    last = next((one for one in frames if (one.kind, one.call_id) == (END_KIND, 0)), None)
    if last is None:
        return raw.ended
    return raw.ended and last == frames[-1] and last.code == INTERNAL and bool(last.payload)
