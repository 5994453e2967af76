"""The client over a stream that fails. Its C++ twin is tests/cpp/test_client.cpp."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from ipc_bridge import CallError, ProtocolError, Service, Status, UsageError
from ipc_bridge import connect as connect_bridge
from ipc_bridge.client import Client, connect
from ipc_bridge.errors import SystemError
from ipc_bridge.session import ServerSession
from ipc_bridge.system import WOULD_BLOCK, Buffer, Listener, Spinner, Stream, Transport, Wait
from peer_support import served

FAILURES = [
    ProtocolError("a record of an impossible size", "here"),
    SystemError("read", 5, "here"),
    KeyboardInterrupt(),
]


class Failing(Stream):
    """Takes what is written, and gives a server's hello; then what is next raises `failure`."""

    def __init__(self, failure: BaseException, at: str) -> None:
        self.spinner = Spinner(Wait.BLOCK)
        self.is_closed = False
        self._failure = failure
        self._at = at
        self._hello = b"".join(map(bytes, ServerSession().outbox.buffers()))

    def try_read(self, buffer: memoryview) -> int:
        hello, self._hello = self._hello, b""
        if not hello and self._at == "read":
            raise self._failure
        buffer[: len(hello)] = hello
        return len(hello)

    def try_write(self, buffers: Sequence[Buffer]) -> int:
        if not self._hello and self._at == "write":
            raise self._failure
        if not self._hello and self._at == "read-while-full":
            return WOULD_BLOCK
        return sum(len(buffer) for buffer in buffers)

    def wait(self, readable: bool, writable: bool, deadline_ns: int) -> bool:
        if not self._hello and self._at == "read-while-full":
            raise self._failure
        return True

    def fileno(self) -> int:
        return -1

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


class To(Transport):
    """Leads to one stream."""

    url = "here"

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def connect(self, deadline_ns: int) -> Stream:
        return self._stream

    def listen(self) -> Listener:
        raise NotImplementedError


def unary(client: Client) -> None:
    client.call(1, b"hello")


def large(client: Client) -> None:
    """(Not on the lane for small ones.)"""
    client.call(1, bytes(100_000))


def one_by_one(client: Client) -> None:
    list(client.call_stream(2))


def in_batches(client: Client) -> None:
    list(client.call_stream(2).batches())


@pytest.mark.parametrize("scheme", ["unix", "grpc+unix"])
def test_what_cannot_be_asked_for(scheme: str, tmp_path: Path) -> None:
    """Nothing is sent then, and the connection lives. (A lane has been found by an echo before.)"""
    with served(f"{scheme}://{tmp_path}/s", "cpp") as up, connect_bridge(up.url) as bridge:
        for _ in range(3):
            bridge.echo(b"warm")
        for method in (0, -1, 65536, 1 << 40):
            for call in (bridge.call, bridge.call_stream):
                with pytest.raises(UsageError, match=f"method {method} is not within") as caught:
                    call(method, b"x")
                assert caught.value.status == Status.INVALID_ARGUMENT
                assert caught.value.where == up.url
        for text in ("x", "x" * 100_000):
            with pytest.raises(TypeError):
                bridge.echo(text)  # type: ignore[arg-type]
        for count, size in ((-1, 1), (1, -1), (1 << 64, 1), (1, 1 << 32)):
            with pytest.raises(UsageError) as caught:
                bridge.stream(count, size)
            assert caught.value.status == Status.INVALID_ARGUMENT
        assert bytes(bridge.echo(b"lives", timeout=5.0)) == b"lives"


@pytest.mark.parametrize("method", [0, -1, 65536])
def test_what_cannot_be_registered(method: int) -> None:
    for register in (Service().unary, Service().streaming):
        with pytest.raises(UsageError, match="not within 1 to 65535") as caught:
            register(method, lambda call, request: pytest.fail("is called"))
        assert caught.value.status == Status.INVALID_ARGUMENT


@pytest.mark.parametrize("call", [unary, large, one_by_one, in_batches])
@pytest.mark.parametrize("at", ["read", "write", "read-while-full"])
@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_what_a_stream_raises_ends_the_connection(
    failure: BaseException, at: str, call: object
) -> None:
    """As its end-of-file does: the descriptor is given back, and the next call says so. (So does
    Ctrl-C, which may come between a read and its count: nobody knows how much was moved.)"""
    stream = Failing(failure, at)
    client = connect(To(stream))
    assert callable(call)
    with pytest.raises(type(failure)):
        call(client)
    assert stream.is_closed
    with pytest.raises(CallError, match="the connection is closed") as caught:
        client.call(1)
    assert caught.value.status == Status.UNAVAILABLE
    client.close()
