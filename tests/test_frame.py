"""frame: the encoder, the rules of a header, the outbox and the decoder (proto/FRAME.md).

The decoder is compared with one that is too simple to be wrong (`Plain`), on small buffers, so
that a few bytes reach every corner: `small_limits` scales the constants of the module down.
"""

import random
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ipc_bridge import frame
from ipc_bridge.errors import MESSAGE_BYTES_MAX, ProtocolError
from ipc_bridge.frame import HEADER_BYTES, Buffer, Decoder, Header, Kind, Outbox

SMALL = {"BUFFER_BYTES": 128, "JOIN_BYTES_MAX": 24, "IOVEC_MAX": 4, "IDLE_REFILLS_MAX": 3}
PAYLOAD_BYTES_MAX = 400  # of the small decoders: some frames fit three times into the buffer
Frame = tuple[Header, bytes]


def examples(count: int, steps: int = 50) -> settings:
    """How much to try; without a clock, so that a busy machine fails nothing."""
    return settings(
        max_examples=count,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


@contextmanager
def small_limits() -> Iterator[None]:
    with patch.dict(vars(frame), SMALL):
        yield


def frame_bytes(of: Frame) -> bytes:
    (size, kind, flags, code, call_id, value), payload = of
    return struct.pack("<IBBHII", size, kind, flags, code, call_id, value) + payload


def item(call_id: int, index: int, payload: bytes) -> Frame:
    return (len(payload), Kind.ITEM, 0, 0, call_id, index), payload


def take_all(decoder: Decoder) -> list[Frame]:
    out = []
    while (header := decoder.next()) is not None:
        out.append((header, bytes(decoder.payload)))
    return out


def feed(decoder: Decoder, data: bytes, chunk: int = 1 << 30) -> list[Frame]:
    """Read `data` as a driver does, at most `chunk` bytes a read."""
    out = []
    at = 0
    while at < len(data):
        space = decoder.space()
        assert len(space) > 0
        count = min(len(space), chunk, len(data) - at)
        space[:count] = data[at : at + count]
        decoder.filled(count)
        at += count
        out += take_all(decoder)
    return out


def sizes(most: int) -> st.SearchStrategy[int]:
    """Mostly small, often at the edges of the (small) limits."""
    edges = [0, 1, 23, 24, 25, 47, 48, 49, 63, 64, 111, 112, 113, 127, 128, 129, 240, 255, 256, 400]
    return st.one_of(
        st.integers(0, min(40, most)),
        st.sampled_from([edge for edge in edges if edge <= most]),
        st.integers(0, most),
    )


@st.composite
def frames(draw: st.DrawFn, most: int = PAYLOAD_BYTES_MAX) -> Frame:
    """Any frame that a correct peer can send."""
    u16, u32 = st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF)
    ids = st.integers(1, 0xFFFFFFFF)
    kind = draw(st.sampled_from(Kind))
    flags = code = call_id = value = size = 0
    match kind:
        case Kind.HELLO:
            size, code, value = 8, draw(u16), draw(u32)
        case Kind.CALL:
            size, flags, code = draw(sizes(most)), draw(st.integers(0, 1)), draw(u16)
            call_id, value = draw(ids), draw(u32)
        case Kind.ITEM:
            size, call_id, value = draw(sizes(most)), draw(ids), draw(u32)
        case Kind.END:
            code = draw(st.integers(0, 16))
            call_id = draw(st.integers(min(1, 1 - min(code, 1)), 0xFFFFFFFF))
            size = draw(sizes(most if code == 0 else min(most, MESSAGE_BYTES_MAX)))
        case Kind.CREDIT:
            call_id, value = draw(ids), draw(u32)
        case Kind.CANCEL:
            call_id = draw(ids)
        case Kind.GOODBYE:
            value = draw(u32)
    payload = random.Random(draw(u32)).randbytes(size)
    return (size, int(kind), flags, code, call_id, value), payload


# --- the header ---


def test_encode_is_16_little_endian_bytes() -> None:
    header = frame.encode(Kind.CALL, 0x0A0B0C0D, flags=1, code=0x0203, call_id=4, value=0x05060708)
    assert header.hex(" ") == "0d 0c 0b 0a 02 01 03 02 04 00 00 00 08 07 06 05"


@examples(100)
@given(frames())
def test_check_takes_every_frame_of_a_correct_peer(of: Frame) -> None:
    frame.check(of[0], PAYLOAD_BYTES_MAX)


def is_legal(header: Header, most: int) -> bool:
    """The table of FRAME.md once more, in other words."""
    size, kind, flags, code, call_id, value = header
    if size > most:
        return False
    match kind:
        case Kind.HELLO:
            return size == 8 and flags == 0 and call_id == 0
        case Kind.CALL:
            return flags in (0, 1) and call_id > 0
        case Kind.ITEM:
            return flags == 0 and code == 0 and call_id > 0
        case Kind.END:
            if flags or value or code > 16:
                return False
            return call_id > 0 if code == 0 else size <= 1024
        case Kind.CREDIT:
            return size == 0 and flags == 0 and code == 0 and call_id > 0
        case Kind.CANCEL:
            return size == 0 and flags == 0 and code == 0 and value == 0 and call_id > 0
        case Kind.GOODBYE:
            return size == 0 and flags == 0 and code == 0 and call_id == 0
    return False


EDGES = (0, 1, 2, 8, 16, 17, 255, 256, 1024, 1025, 0xFFFF, 0x10000, 1 << 20, (1 << 20) + 1)
edges32 = st.one_of(st.sampled_from(EDGES), st.sampled_from([0xFFFFFFFF, 1 << 31]))
edges16 = st.sampled_from([edge for edge in EDGES if edge <= 0xFFFF])
edges8 = st.sampled_from([0, 1, 2, 3, 128, 255])
mostly_0 = st.sampled_from([0, 0, 0, 1])


@examples(1000)
@given(
    st.tuples(
        st.one_of(mostly_0, edges32),
        st.one_of(st.integers(1, 7), edges8),
        st.one_of(mostly_0, edges8),
        st.one_of(mostly_0, edges16),
        st.one_of(mostly_0, edges32),
        st.one_of(mostly_0, edges32),
    )
)
def test_check_refuses_exactly_what_is_not_in_the_table(header: Header) -> None:
    if is_legal(header, 1 << 20):
        frame.check(header, 1 << 20)
    else:
        with pytest.raises(ProtocolError):
            frame.check(header, 1 << 20)


# --- the decoder ---


@examples(150)
@given(st.lists(frames(), max_size=12), st.lists(st.integers(1, 300), min_size=1, max_size=8))
def test_decoder_takes_any_chunking(sent: list[Frame], chunks: list[int]) -> None:
    data = b"".join(map(frame_bytes, sent))
    with small_limits():
        for chunk in (1, len(data) + 1):
            assert feed(Decoder(PAYLOAD_BYTES_MAX), data, chunk) == sent
        decoder = Decoder(PAYLOAD_BYTES_MAX)
        got, at = [], 0
        for n in range(len(data)):
            if at >= len(data):
                break
            part = data[at : at + chunks[n % len(chunks)]]
            got += feed(decoder, part)
            at += len(part)
        assert got == sent
        assert decoder.is_clean()


@examples(100)
@given(frames(), st.data())
def test_decoder_knows_an_input_that_ends_inside_a_frame(of: Frame, data: st.DataObject) -> None:
    whole = frame_bytes(of)
    cut = data.draw(st.integers(1, len(whole) - 1))
    decoder = Decoder(PAYLOAD_BYTES_MAX)
    assert feed(decoder, whole[:cut]) == []
    assert not decoder.is_clean()


@pytest.mark.parametrize(
    "size", [0, 1, (256 << 10) - 16, (256 << 10) - 15, 128 << 10, 256 << 10, 1 << 20, (1 << 20) + 1]
)
def test_decoder_at_its_real_sizes(size: int) -> None:
    sent = [item(1, i, random.Random(i).randbytes(size + i)) for i in range(3)]
    data = b"".join(map(frame_bytes, sent))
    for chunk in (1000, 65536, 1 << 30):
        assert feed(Decoder(), data, chunk) == sent


class Plain:
    """A decoder that keeps everything: the model."""

    def __init__(self) -> None:
        self.data = b""
        self.at = 0

    def next(self) -> Frame | None:
        if len(self.data) - self.at < HEADER_BYTES:
            return None
        header = struct.unpack_from("<IBBHII", self.data, self.at)
        stop = self.at + HEADER_BYTES + header[0]
        if stop > len(self.data):
            return None
        payload = self.data[self.at + HEADER_BYTES : stop]
        self.at = stop
        return header, payload


class DecoderMachine(RuleBasedStateMachine):
    """Reads of any size, `next`, `items`, `hold` and `release` in any order a driver may use."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = small_limits()
        self.limits.__enter__()
        self.decoder = Decoder(PAYLOAD_BYTES_MAX)
        self.plain = Plain()
        self.wire = b""  # sent and not yet read
        self.index = 0  # of the next item of call 7
        self.drained = True  # `next` has said None since the last read
        self.fresh: list[tuple[memoryview, bytes]] = []  # valid until the next read
        self.held: list[tuple[memoryview, bytes]] = []  # valid until `release`

    def teardown(self) -> None:
        self.limits.__exit__(None, None, None)

    @initialize(index=st.sampled_from([0, 0xFFFFFFFE]))
    def begin(self, index: int) -> None:
        self.index = index

    @rule(of=frames())
    def send(self, of: Frame) -> None:
        self.wire += frame_bytes(of)

    @rule(lengths=st.lists(sizes(PAYLOAD_BYTES_MAX), min_size=1, max_size=6), seed=st.integers())
    def send_items(self, lengths: list[int], seed: int) -> None:
        source = random.Random(seed)
        for length in lengths:
            self.wire += frame_bytes(item(7, self.index, source.randbytes(length)))
            self.index = (self.index + 1) & 0xFFFFFFFF

    @precondition(lambda self: self.wire and self.drained)
    @rule(most=st.one_of(st.integers(1, 40), st.just(1 << 20)))
    def read(self, most: int) -> None:
        self.fresh.clear()
        space = self.decoder.space()
        assert len(space) > 0
        count = min(len(space), most, len(self.wire))
        space[:count] = self.wire[:count]
        self.decoder.filled(count)
        self.plain.data += self.wire[:count]
        self.wire = self.wire[count:]
        self.drained = False

    @rule()
    def take(self) -> None:
        expected = self.plain.next()
        header = self.decoder.next()
        if expected is None:
            assert header is None
            self.drained = True
        else:
            assert header == expected[0]
            self.fresh.append((self.decoder.payload, expected[1]))

    @rule()
    def take_the_rest(self) -> None:
        while not self.drained:
            self.take()

    @rule(bytes_max=st.integers(-5, 600))
    def take_items(self, bytes_max: int) -> None:
        at = self.plain.at
        expected = self.plain.next()
        self.plain.at = at
        first = expected[0][5] if expected else 0
        cost = 0
        for view in self.decoder.batch(7, first, bytes_max) or ():
            assert cost < bytes_max, "an item without credit"
            expected = self.plain.next()
            assert expected is not None
            assert expected[0] == (len(view), Kind.ITEM, 0, 0, 7, first)
            self.fresh.append((view, expected[1]))
            cost += HEADER_BYTES + len(view)
            first = (first + 1) & 0xFFFFFFFF

    @precondition(lambda self: self.fresh and not self.held)
    @rule()
    def hold(self) -> None:
        self.decoder.hold()
        self.held = self.fresh[:]

    @rule()
    def release(self) -> None:
        self.decoder.release()
        self.held.clear()

    @invariant()
    def views_are_right(self) -> None:
        for view, expected in (*self.fresh, *self.held):
            assert view == expected

    @invariant()
    def memory_is_bounded(self) -> None:
        most = max(frame.BUFFER_BYTES, HEADER_BYTES + PAYLOAD_BYTES_MAX)
        assert len(self.decoder._buffer) <= most


def test_decoder_agrees_with_a_plain_one() -> None:
    run_state_machine_as_test(DecoderMachine, settings=examples(250, 40))


def test_decoder_grows_and_shrinks_back() -> None:
    decoder = Decoder()
    large = frame_bytes(item(1, 0, bytes(1 << 20)))
    small = frame_bytes(item(1, 0, b"x"))
    assert len(feed(decoder, large)) == 1
    assert len(decoder._buffer) == HEADER_BYTES + (1 << 20)
    for _ in range(frame.IDLE_REFILLS_MAX):
        assert len(feed(decoder, small)) == 1
    assert len(decoder._buffer) > frame.BUFFER_BYTES, "given back too early: the next one grows it"
    for _ in range(3):
        assert len(feed(decoder, small)) == 1
    assert len(decoder._buffer) == frame.BUFFER_BYTES


def test_decoder_keeps_a_grown_buffer_that_is_used() -> None:
    decoder = Decoder()
    small, large = frame_bytes(item(1, 0, b"x")), frame_bytes(item(1, 0, bytes(1 << 20)))
    feed(decoder, large)
    buffer = decoder._buffer
    for _ in range(6):
        for _ in range(frame.IDLE_REFILLS_MAX // 2):
            feed(decoder, small)
        feed(decoder, large)
    assert decoder._buffer is buffer


def test_decoder_reads_a_large_payload_into_its_place() -> None:
    """Once the size is known, a read ends where the payload ends."""
    decoder = Decoder()
    data = frame_bytes(item(1, 0, bytes(1 << 20)))
    feed(decoder, data[:HEADER_BYTES])
    assert len(decoder.space()) == 1 << 20
    feed(decoder, data[HEADER_BYTES:1000])
    assert len(decoder.space()) == len(data) - 1000
    assert len(feed(decoder, data[1000:])) == 1
    # Also in a buffer that has grown for a larger one.
    smaller = frame_bytes(item(1, 0, bytes(1 << 19)))
    feed(decoder, smaller[:1000])
    assert len(decoder.space()) == len(smaller) - 1000


def test_decoder_holds_a_request_while_others_come() -> None:
    for size in (0, 1, 100, (256 << 10) - 17, (256 << 10) - 16, 256 << 10, 1 << 20):
        decoder = Decoder()
        request = random.Random(size).randbytes(size)
        feed(decoder, frame_bytes(item(1, 0, request)))
        view = decoder.payload
        decoder.hold()
        for n in range(300):
            feed(decoder, frame_bytes(item(1, n, bytes([n & 255]) * 5000)))
        assert view == request
        decoder.release()
        assert len(decoder.space()) >= HEADER_BYTES + size  # what has grown is there again


def test_decoder_memory_is_bounded() -> None:
    """Many large frames cost the buffer of one, and a held one the buffer of two."""
    data = frame_bytes(item(1, 0, bytes(1 << 20)))
    tracemalloc.start()
    try:
        decoder = Decoder()
        for n in range(20):
            for at in range(0, len(data), 50_000):
                part = data[at : at + 50_000]
                space = decoder.space()
                space[: len(part)] = part
                decoder.filled(len(part))
                if decoder.next() is not None and n == 10:
                    decoder.hold()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * len(data) + frame.BUFFER_BYTES + 200_000


def test_decoder_items_count_beyond_the_wrap() -> None:
    decoder = Decoder()
    data = b"".join(frame_bytes(item(1, n & 0xFFFFFFFF, b"")) for n in range(-3, 3))
    space = decoder.space()
    space[: len(data)] = data
    decoder.filled(len(data))
    assert len(decoder.batch(1, 0xFFFFFFFD, 1000) or ()) == 6


def test_decoder_items_leave_one_above_the_limit_to_next() -> None:
    decoder = Decoder(10)
    data = frame_bytes(item(1, 0, bytes(10))) + frame_bytes(item(1, 1, bytes(11)))
    space = decoder.space()
    space[: len(data)] = data
    decoder.filled(len(data))
    assert [len(view) for view in decoder.batch(1, 0, 1000) or ()] == [10]
    assert decoder.batch(1, 1, 1000) is None
    with pytest.raises(ProtocolError, match="ITEM of 11 bytes"):
        decoder.next()


@pytest.mark.parametrize("kind", [Kind.CALL, Kind.ITEM, Kind.END])
@pytest.mark.parametrize("size", [frame.PAYLOAD_BYTES_MAX + 1, 0xFFFFFFFF])
def test_decoder_allocates_nothing_for_a_refused_size(kind: Kind, size: int) -> None:
    decoder = Decoder()
    space = decoder.space()
    space[:HEADER_BYTES] = frame.encode(kind, size, call_id=1)
    decoder.filled(HEADER_BYTES)
    tracemalloc.start()
    try:
        for _ in range(3):
            with pytest.raises(ProtocolError, match="above the limit"):
                decoder.next()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000


@examples(100)
@given(st.binary(max_size=200))
def test_decoder_answers_garbage_with_protocol_errors_only(data: bytes) -> None:
    with small_limits():
        decoder = Decoder(PAYLOAD_BYTES_MAX)
        try:
            feed(decoder, data, 7)
        except ProtocolError as error:
            with pytest.raises(ProtocolError, match=str(error.what)):
                decoder.next()


# --- the outbox ---


def gather(outbox: Outbox, count: int) -> bytes:
    """Write at most `count` bytes, as one vectored write would."""
    buffers = outbox.buffers()
    assert len(buffers) <= frame.IOVEC_MAX
    assert all(len(part) > 0 for part in buffers)
    out = b"".join(bytes(part) for part in buffers)[:count]
    outbox.sent(len(out))
    return out


class OutboxMachine(RuleBasedStateMachine):
    """`put`, partial writes that end anywhere, `own` and `clear` in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = small_limits()
        self.limits.__enter__()
        self.outbox = Outbox()
        self.waiting = b""
        self.lent: list[bytearray] = []  # payloads that may be held by reference

    def teardown(self) -> None:
        self.limits.__exit__(None, None, None)

    @rule(of=frames(most=100), view=st.sampled_from([bytes, bytearray, memoryview]))
    def put(self, of: Frame, view: type[bytes] | type[bytearray] | type[memoryview]) -> None:
        header = frame_bytes(of)[:HEADER_BYTES]
        payload = bytearray(of[1])
        given_away: Buffer = payload if view is bytearray else view(payload)
        self.outbox.put(header, given_away)
        self.waiting += header + of[1]
        self.lent.append(payload)

    @rule(count=st.one_of(st.integers(1, 60), st.just(1 << 20)))
    def write(self, count: int) -> None:
        if self.waiting:
            out = gather(self.outbox, count)
            assert out
            assert self.waiting.startswith(out)
            self.waiting = self.waiting[len(out) :]

    @rule()
    def put_between_buffers_and_sent(self) -> None:
        """An asynchronous driver may add frames while a write is under way."""
        part = b"".join(bytes(part) for part in self.outbox.buffers())
        header = frame.encode(Kind.CREDIT, call_id=1, value=len(part))
        self.outbox.put(header)
        self.waiting += header
        self.outbox.sent(len(part))
        assert self.waiting.startswith(part)
        self.waiting = self.waiting[len(part) :]

    @rule()
    def own(self) -> None:
        self.outbox.own()
        for payload in self.lent:
            payload[:] = b"?" * len(payload)  # what was lent is used for something else
        self.lent.clear()

    @rule()
    def clear(self) -> None:
        self.outbox.clear()
        self.waiting = b""

    @invariant()
    def size_is_what_waits(self) -> None:
        assert self.outbox.size == len(self.waiting)
        parts = b"".join(bytes(part) for part in self.outbox.buffers())
        assert self.waiting.startswith(parts)
        assert bool(parts) == bool(self.waiting)


def test_outbox_keeps_order_through_partial_writes() -> None:
    run_state_machine_as_test(OutboxMachine, settings=examples(200, 30))


def test_outbox_joins_small_frames() -> None:
    outbox = Outbox()
    for n in range(5000):
        outbox.put(frame.encode(Kind.ITEM, 3, call_id=1, value=n), b"abc")
    assert len(outbox.buffers()) == 1
    assert len(outbox.buffers()[0]) == outbox.size == 5000 * 19


def test_outbox_copies_no_large_payload() -> None:
    outbox = Outbox()
    payload = bytearray(frame.JOIN_BYTES_MAX + 1)
    outbox.put(b"h" * HEADER_BYTES, payload)
    outbox.put(b"i" * HEADER_BYTES)
    assert [len(part) for part in outbox.buffers()] == [HEADER_BYTES, len(payload), HEADER_BYTES]
    assert outbox.buffers()[1] is payload
    outbox.sent(HEADER_BYTES + 5)
    rest = outbox.buffers()[0]
    assert isinstance(rest, memoryview)
    assert rest.obj is payload, "a partial write must not copy the rest"
    assert len(rest) == len(payload) - 5


def test_outbox_copies_a_small_payload() -> None:
    outbox = Outbox()
    payload = bytearray(b"a" * frame.JOIN_BYTES_MAX)
    outbox.put(b"h" * HEADER_BYTES, payload)
    payload[:] = b"b" * len(payload)
    assert bytes(outbox.buffers()[0]) == b"h" * HEADER_BYTES + b"a" * frame.JOIN_BYTES_MAX


def test_outbox_owns_more_buffers_than_one_write_takes() -> None:
    outbox = Outbox()
    parts: list[bytes] = []
    lent = []
    for n in range(frame.IOVEC_MAX + 10):
        header = frame.encode(Kind.ITEM, frame.JOIN_BYTES_MAX + 1, call_id=1, value=n)
        payload = bytearray([n & 255]) * (frame.JOIN_BYTES_MAX + 1)
        outbox.put(header, payload)
        lent.append(payload)
        parts += [header, bytes(payload)]
    expected = b"".join(parts)
    assert len(outbox.buffers()) == frame.IOVEC_MAX
    outbox.sent(100)
    outbox.own()
    for payload in lent:
        payload.clear()
    got = [expected[:100]]
    while outbox.size:
        got.append(gather(outbox, 5_000_000))
    assert b"".join(got) == expected
