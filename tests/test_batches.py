"""Many items as one piece: the same as one by one, in pure Python, natively, on every transport."""

import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import ipc_bridge
from ipc_bridge import frame
from ipc_bridge.frame import HEADER_BYTES, Decoder, Kind, encode
from ipc_bridge.service import ITEM_STRIDE, PATTERN_PERIOD, Pattern
from peer_support import peer, served, serving_own
from processes import children
from support import EXIT_S, ROOT, TRANSPORTS, wait_until

native = pytest.importorskip("ipc_bridge._native", reason="the native module is not built")
WALKS = {"python": frame._walk, "native": native.walk}


def item(call_id: int, index: int, payload: bytes) -> bytes:
    return encode(Kind.ITEM, len(payload), call_id=call_id, value=index) + payload


@pytest.mark.parametrize("seed", range(200))
def test_both_walks_are_the_same_on_any_bytes(seed: int) -> None:
    choice = random.Random(seed)
    index = choice.choice([0, 5, 0xFFFFFFFE])
    sizes = [choice.choice([0, 1, 8, 8, choice.randrange(300)]) for _ in range(choice.randrange(9))]
    frames = [item(1, index + at & 0xFFFFFFFF, bytes(size)) for at, size in enumerate(sizes)]
    data = bytearray(choice.randbytes(choice.randrange(9)) + b"".join(frames))
    start = len(data) - sum(map(len, frames))
    data += choice.choice([b"", encode(Kind.END, call_id=1), bytes(7)])
    if choice.random() < 0.5 and data:
        data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
    end = choice.randint(start, len(data))
    words = (start, end, 1, index, choice.choice([0, 1, 100, 1 << 20]), choice.choice([5, 1 << 20]))
    found = [walk(memoryview(data), *words) for walk in WALKS.values()]
    assert found[0] == found[1]


@pytest.mark.parametrize("walk", WALKS)
def test_a_batch_is_its_items(walk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "walk", WALKS[walk])
    payloads = [b"", b"a", b"bc" * 500, b"d"]
    data = b"".join(item(1, index, payload) for index, payload in enumerate(payloads))
    decoder = Decoder()
    decoder.space()[: len(data)] = data
    decoder.filled(len(data))
    batch = decoder.batch(1, 0, 1 << 20)
    assert batch is not None
    assert (len(batch), batch.is_uniform, list(map(bytes, batch))) == (4, False, payloads)
    assert list(batch.sizes) == [0, 1, 1000, 1]
    assert decoder.batch(1, 4, 1 << 20) is None
    assert decoder.is_clean()


@contextmanager
def serving_at(transport: str, language: str, runtime: Path) -> Iterator[str]:
    if transport == "stdio":
        yield "stdio:" + " ".join([*peer(language), "serve", "stdio:"])
        wait_until(lambda: not children(), EXIT_S, "the server ends")
        return
    where = "127.0.0.1:0" if transport.endswith("tcp") else f"{runtime}/b"
    url = f"{transport}://{where}"
    with served(url, language) as server:
        yield server.url


# gRPC has no frames to walk.
CASES = [(name, walk) for name in TRANSPORTS for walk in WALKS]
CASES = [case for case in CASES if not case[0].startswith("grpc") or case[1] == "native"]


@pytest.mark.parametrize("language", ["cpp", "py"])
@pytest.mark.parametrize(("transport", "walk"), CASES)
def test_every_byte_of_every_item(
    transport: str, walk: str, language: str, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame, "walk", WALKS[walk])
    count = 3000 if transport.startswith("grpc") else 30_000
    pattern = np.frombuffer(bytes(Pattern(64 + PATTERN_PERIOD).item(0)), np.uint8)
    expected = np.lib.stride_tricks.sliding_window_view(pattern, 64)
    with serving_at(transport, language, runtime) as url, ipc_bridge.connect(url) as bridge:
        seen = 0
        items = bridge.stream(count, 64)
        for batch in items.batches():
            rows = np.asarray(batch.rows)[:, HEADER_BYTES:]
            at = (seen + np.arange(len(batch))) * ITEM_STRIDE % PATTERN_PERIOD
            assert np.array_equal(rows, expected[at])
            seen += len(batch)
        assert seen == count
        big = [len(one) for batch in bridge.stream(3, 1 << 20).batches() for one in batch]
        assert big == [1 << 20] * 3
        for _ in bridge.stream(1 << 40, 64).batches():
            break  # leaving early cancels
        assert bytes(bridge.echo(b"next")) == b"next"


def test_items_of_many_sizes(runtime: Path) -> None:
    payloads = [struct.pack("<I", number) * (number % 50) for number in range(3000)]
    service = ipc_bridge.Service()
    service.streaming(7, lambda call, request: iter(payloads))
    with serving_own(f"unix://{runtime}/u", service) as url, ipc_bridge.connect(url) as bridge:
        got = [bytes(one) for batch in bridge.call_stream(7).batches() for one in batch]
    assert got == payloads


def test_the_example_of_an_image(nothing_left: None) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "examples" / "image.py")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "(1080, 1920, 3) uint8: inverted, 6220800 bytes each way\n"
