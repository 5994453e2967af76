"""Packed messages: the bytes, and what is refused. (tests/cpp/test_packed.cpp has the same.)"""

import re

import pytest

from ipc_bridge.errors import Error, Status
from ipc_bridge.packed import Packed


def test_little_endian_without_gaps() -> None:
    shape = Packed("BI")
    data = shape.pack(7, 1)

    assert data == bytes([7, 1, 0, 0, 0])
    assert shape.unpack(memoryview(data)) == (7, 1)


@pytest.mark.parametrize("size", [0, 4, 6])
def test_another_size_is_refused(size: int) -> None:
    what = re.escape(f"5 bytes are wanted, and {size} came")
    with pytest.raises(Error, match=what) as caught:
        Packed("BI").unpack(bytes(size))
    assert caught.value.status == Status.INVALID_ARGUMENT
