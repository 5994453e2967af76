"""endpoint: what a URL leads to (proto/url_vectors.json). Its C++ twin is
tests/cpp/test_endpoint.cpp."""

import json
from typing import Any

import pytest

from ipc_bridge import endpoint
from ipc_bridge.errors import Error, Status
from ipc_bridge.transports.pipe import Stdio
from session_support import PROTO

Vector = dict[str, Any]
VECTORS: list[Vector] = json.loads((PROTO / "url_vectors.json").read_text())["vectors"]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: repr(vector["url"]))
def test_the_vectors(vector: Vector) -> None:
    url = vector["url"]
    if "error" in vector:
        with pytest.raises(Error) as caught:
            endpoint.way_of(url)
        assert caught.value.status == Status.INVALID_ARGUMENT
        assert caught.value.what.startswith(vector["error"])
        assert caught.value.where == url
        return
    way = endpoint.way_of(url)
    if "words" in vector:
        assert isinstance(way, Stdio)
        assert way.words == vector["words"]
    elif "path" in vector:
        assert endpoint._path(url, {"wait"}) == (vector["path"], vector["options"])
    else:
        found = endpoint._host(url, {"wait", "allow_remote"})
        assert found == (vector["host"], vector["port"], vector["options"])
