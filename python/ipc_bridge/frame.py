"""The frame: a 16-byte header, then the payload; its encoder and its decoder (proto/FRAME.md).

Sans-IO: bytes come in through `Decoder.space()` and `Decoder.filled()`, in any chunking, and
leave through an `Outbox`; nothing here knows a socket, a thread or a clock.

The decoder owns one buffer. Input is read straight into it and a payload is handed out as a view
of it, so that receiving copies nothing; the price is the rule that a view lives until the next
input is read. A header is checked before the room for its payload is made.
"""

import struct
from array import array
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from ipc_bridge.errors import MESSAGE_BYTES_MAX, ProtocolError, Status, UsageError

HEADER = struct.Struct("<IBBHII")  # payload_size, kind, flags, code, call_id, value
HEADER_BYTES = 16
HELLO = struct.Struct("<4sI")  # magic, max_payload
MAGIC = b"IPCB"
VERSION = 1
STREAM_WANTED = 1  # flag of CALL: the answer is a stream

METHOD_MAX = (1 << 16) - 1  # of CALL; and 1 is the least, as in bridge.proto
PAYLOAD_BYTES_MAX = 64 << 20  # default; what one frame may make a receiver hold
PAYLOAD_BYTES_LIMIT = 1 << 31  # so that what a reader owes (half a window, an item) fits in CREDIT
BUFFER_BYTES = 256 << 10  # a socket's buffer holds about as much, so one read empties it
JOIN_BYTES_MAX = 16 << 10  # below this, copying a payload is cheaper than a further iovec
IOVEC_MAX = 1024  # IOV_MAX, <limits.h>
IDLE_REFILLS_MAX = 256  # refills without need of a grown buffer before it is given back
WIDE = 'a payload is a view of elements wider than a byte; cast it: memoryview(it).cast("B")'

Buffer = bytes | bytearray | memoryview


class Kind(IntEnum):
    """What a frame says."""

    HELLO = 1
    CALL = 2
    ITEM = 3
    END = 4
    CREDIT = 5
    CANCEL = 6
    GOODBYE = 7


# The 16 bytes before each payload: payload_size, kind, flags, code, call_id, value.
Header = tuple[int, int, int, int, int, int]


class _Rule(NamedTuple):
    """The highest value of each field of one kind of frame; 0 means that it is unused."""

    payload_size: int
    flags: int
    code: int
    value: int
    call_id_min: int
    call_id_max: int


_U16 = (1 << 16) - 1
_U32 = (1 << 32) - 1
_RULES = {
    int(Kind.HELLO): _Rule(HELLO.size, 0, _U16, _U32, 0, 0),
    int(Kind.CALL): _Rule(_U32, STREAM_WANTED, _U16, _U32, 1, _U32),
    int(Kind.ITEM): _Rule(_U32, 0, 0, _U32, 1, _U32),
    int(Kind.END): _Rule(_U32, 0, max(Status), 0, 0, _U32),
    int(Kind.CREDIT): _Rule(0, 0, 0, _U32, 1, _U32),
    int(Kind.CANCEL): _Rule(0, 0, 0, 0, 1, _U32),
    int(Kind.GOODBYE): _Rule(0, 0, 0, _U32, 0, 0),
}


def check_method(method: int, where: str = "") -> None:
    """Raises UsageError: INVALID_ARGUMENT for what is no number of a method."""
    if not 1 <= method <= METHOD_MAX:
        what = f"method {method} is not within 1 to {METHOD_MAX}"
        raise UsageError(Status.INVALID_ARGUMENT, what, where)


def encode(
    kind: Kind,
    payload_size: int = 0,
    *,
    flags: int = 0,
    code: int = 0,
    call_id: int = 0,
    value: int = 0,
) -> bytes:
    """The 16 bytes of a header."""
    return HEADER.pack(payload_size, kind, flags, code, call_id, value)


def check(header: Header, payload_bytes_max: int) -> None:
    """Raise ProtocolError unless the header is one that a correct peer can send."""
    size, kind, flags, code, call_id, value = header
    rule = _RULES.get(kind)
    if rule is None:
        raise ProtocolError(f"unknown kind {kind}")
    size_max, flags_max, code_max, value_max, call_id_min, call_id_max = rule
    if size > size_max or size > payload_bytes_max:
        raise ProtocolError(f"{Kind(kind).name} of {size} bytes, above the limit")
    if flags > flags_max or code > code_max or value > value_max:
        raise ProtocolError(f"{Kind(kind).name} with an unused field set")
    if call_id < call_id_min or call_id > call_id_max:
        raise ProtocolError(f"{Kind(kind).name} with call id {call_id}")
    if kind == _END:
        if code == 0 and call_id == 0:
            raise ProtocolError("END of the session with status OK")
        if code != 0 and size > MESSAGE_BYTES_MAX:
            raise ProtocolError(f"status message of {size} bytes")
    elif kind == _HELLO and size != HELLO.size:
        raise ProtocolError(f"HELLO of {size} bytes")


# To look a name up in an enum costs 100 ns, so the ways of every frame use these.
_HELLO, _ITEM, _END = int(Kind.HELLO), int(Kind.ITEM), int(Kind.END)
_UNPACK = HEADER.unpack_from
_U32_BYTES = struct.Struct("=I")


class Outbox:
    """Frames on their way out: small ones joined, large payloads by reference.

    A payload above JOIN_BYTES_MAX is not copied: it must not change before it is sent.
    """

    def __init__(self) -> None:
        self.size = 0  # bytes not yet sent
        self._queue: list[Buffer] = []
        self._small = 0  # how many small frames stand at its end, not yet joined

    def put(self, header: bytes, payload: Buffer = b"") -> None:
        """Append one frame. Raises TypeError, and appends nothing, for a payload that is no bytes,
        or a view of wider elements: the header says how many bytes follow."""
        count = len(payload)
        if count <= JOIN_BYTES_MAX:
            joined = header + payload
            if len(joined) != HEADER_BYTES + count:
                raise TypeError(WIDE)
            self._small += 1
            self._queue.append(joined)
        else:
            if len(memoryview(payload).cast("B")) != count:
                raise TypeError(WIDE)
            self._small += 1
            self._queue.append(header)
            self._join()
            self._queue.append(payload)
        self.size += HEADER_BYTES + count

    def put_rest(self, frame: bytes, count: int) -> None:
        """Append one frame, whose first `count` bytes were written already."""
        self.size += len(frame) - count
        self._small += 1
        self._queue.append(frame[count:])

    def buffers(self) -> list[Buffer]:
        """What to write next, in order, for one vectored write."""
        if self._small > 1:
            self._join()
        return self._queue if len(self._queue) <= IOVEC_MAX else self._queue[:IOVEC_MAX]

    def sent(self, count: int) -> None:
        """The first `count` bytes of `buffers()` were written."""
        self.size -= count
        if self.size == 0:
            self._queue.clear()
            self._small = 0
            return
        done = 0
        while done < len(self._queue) and count >= len(self._queue[done]):
            count -= len(self._queue[done])
            done += 1
        del self._queue[:done]
        if count:
            self._queue[0] = memoryview(self._queue[0])[count:]

    def own(self) -> None:
        """Copy what is held by reference: its owner is about to go."""
        self._queue = [bytes(part) for part in self._queue]

    def clear(self) -> None:
        """Drop everything: there is nobody to send it to."""
        self.sent(self.size)

    def _join(self) -> None:
        self._queue[-self._small :] = [b"".join(self._queue[-self._small :])]
        self._small = 0


class Batch:
    """Items as they lie in the receiver's buffer, one after the other, a header before each.

    Made for numpy: all of them are one view, and where each payload is stands in `offsets` and
    `sizes`. As an item, it lives until the next one is asked for.
    """

    __slots__ = ("_offsets", "_sizes", "is_uniform", "view")

    def __init__(self, view: memoryview, offsets: bytes, sizes: bytes, is_uniform: bool) -> None:
        self.view = view
        self.is_uniform = is_uniform  # all payloads have the same size
        self._offsets = offsets
        self._sizes = sizes

    @classmethod
    def of_one(cls, item: Buffer) -> "Batch":
        """A copy of one item, which came without a header: there are zeros instead."""
        view = memoryview(b"".join((bytes(HEADER_BYTES), item)))
        return cls(view, _U32_BYTES.pack(HEADER_BYTES), _U32_BYTES.pack(len(item)), True)

    def __len__(self) -> int:
        return len(self._sizes) // 4

    def __iter__(self) -> Iterator[memoryview]:
        for offset, size in zip(self.offsets, self.sizes, strict=True):
            yield self.view[offset : offset + size]

    @property
    def offsets(self) -> memoryview:
        """Of each payload in `view`: unsigned, 32 bits."""
        return memoryview(self._offsets).cast("I")

    @property
    def sizes(self) -> memoryview:
        """Of each payload, in bytes: unsigned, 32 bits."""
        return memoryview(self._sizes).cast("I")

    @property
    def rows(self) -> memoryview:
        """A row of bytes for each item, if `is_uniform`: its payload is [HEADER_BYTES:] of it.

        `numpy.asarray(batch.rows)[:, HEADER_BYTES:]` is an array of them all, without a copy.
        """
        count = len(self)
        return self.view.cast("B", (count, len(self.view) // count))


def _walk(
    view: memoryview,
    start: int,
    end: int,
    call_id: int,
    index: int,
    bytes_max: int,
    size_max: int,
) -> tuple[int, bytes, bytes, bool]:
    """Where the ITEMs of `call_id` that stand ready from `start` on end, numbered from `index` on
    and costing at most `bytes_max`; the offsets of their payloads from `start`, and their sizes."""
    offsets, sizes = array("I"), array("I")
    at, limit = start, start + bytes_max
    while at + HEADER_BYTES <= end and at < limit:
        fields = _UNPACK(view, at)
        size = fields[0]
        stop = at + HEADER_BYTES + size
        if stop > end or size > size_max or fields[1:] != (_ITEM, 0, 0, call_id, index):
            break
        offsets.append(at + HEADER_BYTES - start)
        sizes.append(size)
        at = stop
        index = (index + 1) & _U32
    return at, offsets.tobytes(), sizes.tobytes(), len(set(sizes)) <= 1


try:  # the same, a hundred times as fast
    from ipc_bridge._native import walk
except ImportError:
    walk = _walk


class Decoder:
    """Bytes in, frames out.

    Read into `space()`, say `filled(n)`, then take frames by `next()` until it says None. After
    any ProtocolError the decoder is of no further use.
    """

    def __init__(self, payload_bytes_max: int = PAYLOAD_BYTES_MAX) -> None:
        self.payload_bytes_max = payload_bytes_max
        self.payload: memoryview = memoryview(b"")  # of the frame that `next` returned last
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = 0  # of what is not decoded yet
        self._end = 0  # of what has been read
        self._held = bytearray()  # the other buffer: held, or spare
        self._need = 0  # bytes of the frame at `_start`; 0: not known yet
        self._floor = 0  # below it the buffer is held
        self._grown = False  # the buffer is above BUFFER_BYTES
        self._refills = 0  # since that was last needed

    def space(self) -> memoryview:
        """Where to read the next input. Earlier payload views are void after it.

        Never empty, provided that `next` has said None since the last `filled`.
        """
        if self._start == self._end:
            self._start = self._end = self._floor
            if self._grown:
                self._shrink()
            elif self._end == 0:
                return self._view
        need = self._need or HEADER_BYTES
        if self._start + need > len(self._buffer):
            self._move(need)
        # Of a large payload ask just for the rest: what follows then starts at the front again.
        if need > BUFFER_BYTES // 2:
            return self._view[self._end : self._start + need]
        return self._view[self._end :] if self._end else self._view

    def filled(self, count: int) -> None:
        """`count` bytes were read into the front of `space()`."""
        self._end += count

    def next(self) -> Header | None:
        """The next whole frame, its payload in `self.payload`; None: read more.

        Raises ProtocolError for a header that no correct peer sends, before its payload is here.
        """
        start = self._start
        have = self._end - start
        if have < HEADER_BYTES:
            return None
        header = _UNPACK(self._buffer, start)
        need = self._need
        if need == 0:
            check(header, self.payload_bytes_max)
            need = self._need = HEADER_BYTES + header[0]
        if have < need:
            return None
        stop = start + need
        self.payload = self._view[start + HEADER_BYTES : stop]
        self._start = stop
        self._need = 0
        return header

    def fresh_space(self) -> memoryview | None:
        """`release`, then `space`, provided that nothing is left to decode; else None. No longer
        than a frame may be.

        The lane reads there, and takes the frame apart by itself; `filled` hands over what it does
        not know, and `skip` what it has used. (Not a buffer that has grown: `space` gives it back
        after a while.)
        """
        if self._start != self._end or self._grown:
            return None
        self._start = self._end = self._floor = 0
        return self._view[: HEADER_BYTES + self.payload_bytes_max]

    def skip(self, count: int) -> None:
        """Leave `count` bytes at the front of `fresh_space` as they are."""
        self._start = self._end = count

    def batch(self, call_id: int, index: int, bytes_max: int) -> Batch | None:
        """The ITEMs of `call_id` that stand ready, numbered from `index` on; None if none does.

        What a stream of small items spends its time in, so `walk` takes the frames apart by itself;
        at any frame that is not plainly the next item it stops, and `next` judges it. It also stops
        once the items cost `bytes_max`.
        """
        start = self._start
        stop, offsets, sizes, uniform = walk(
            self._view, start, self._end, call_id, index, bytes_max, self.payload_bytes_max
        )
        if stop == start:
            return None
        self._start = stop
        self._need = 0
        return Batch(self._view[start:stop], offsets, sizes, uniform)

    def batch_of_one(self) -> Batch:
        """The frame that `next` returned last."""
        size = len(self.payload)
        view = self._view[self._start - HEADER_BYTES - size : self._start]
        return Batch(view, _U32_BYTES.pack(HEADER_BYTES), _U32_BYTES.pack(size), True)

    def hold(self) -> None:
        """Keep the payload that `next` returned last valid while more input is read."""
        self._floor = self._start

    def release(self) -> None:
        """End `hold`. Of the held buffer and the one that took its place the larger goes on, if
        nothing stands in that: what a large payload has made grow is there for the next one."""
        self._floor = 0
        if self._start == self._end and len(self._held) > len(self._buffer):
            self._held, self._buffer = self._buffer, self._held
            self._view = memoryview(self._buffer)
            self._grown = len(self._buffer) > BUFFER_BYTES
            self._start = self._end = 0

    def is_clean(self) -> bool:
        """Nothing of an unfinished frame is here: a good place for the input to end."""
        return self._start == self._end

    def _move(self, need: int) -> None:
        """Make room for `need` bytes from `_start` on: at the front, or in a fresh buffer."""
        part = self._view[self._start : self._end]
        if self._floor == 0 and need <= len(self._buffer):
            self._view[: len(part)] = part
        else:
            size = max(need, BUFFER_BYTES)
            if self._floor:
                self._held, self._buffer = self._buffer, self._held
            if not self._floor or len(self._buffer) < size:
                self._buffer = bytearray(size)  # whoever has a view of the old one keeps it alive
            self._view = memoryview(self._buffer)
            self._view[: len(part)] = part
            self._grown = len(self._buffer) > BUFFER_BYTES
            self._floor = self._refills = 0
        self._start, self._end = 0, len(part)

    def _shrink(self) -> None:
        """Give a grown buffer back once it has not been needed for a while."""
        if self._floor or HEADER_BYTES + len(self.payload) > BUFFER_BYTES:
            self._refills = 0
            return
        self._refills += 1
        if self._refills > IDLE_REFILLS_MAX:
            self._buffer = bytearray(BUFFER_BYTES)
            self._view = memoryview(self._buffer)
            self._grown = False
            self._refills = 0
