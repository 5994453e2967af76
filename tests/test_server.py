"""The server and the client as objects: who closes what and when, handlers that give back the wrong
thing, times at the edges, descriptors that run out. Its C++ twin is tests/cpp/test_server.cpp."""

import array
import contextlib
import errno
import logging
import math
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ipc_bridge
from ipc_bridge import CallError, Error, Service, Status, UsageError, endpoint
from ipc_bridge.server import Callee
from ipc_bridge.system import END, NEVER, Stream, Wait, deadline_after, now_ns
from ipc_bridge.transports.pipe import StdioListener
from processes import children, state
from support import SLOW, listen_url, wait_until

ANSWER_S = 5.0 * SLOW
TRANSPORTS = ["pipe", "unix", "tcp"]
over_transports = pytest.mark.parametrize("transport", TRANSPORTS)
over_servers = pytest.mark.parametrize("transport", [*TRANSPORTS, "grpc+unix"])


@contextlib.contextmanager
def running(url: str, service: Service | None = None) -> Iterator[Callee]:
    """A server that runs in a thread, which must end."""
    with ipc_bridge.serve(url, service) as server:
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join(ANSWER_S)
            assert not thread.is_alive()


def test_a_tcp_server_that_goes_at_once_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may go before the client has asked who it is: that is no fault of the client's."""
    ask = socket.socket.getpeername
    went: list[socket.socket] = []

    def gone(sock: socket.socket) -> Any:
        if not went:
            went.append(sock)
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return ask(sock)

    with running("tcp://127.0.0.1:0") as server:
        monkeypatch.setattr(socket.socket, "getpeername", gone)
        with ipc_bridge.connect(server.url) as bridge:
            assert went
            assert bytes(bridge.echo(b"here", ANSWER_S)) == b"here"


# --- who closes what ---


@over_servers
def test_close_ends_a_run_in_another_thread(transport: str, runtime: Path) -> None:
    server = ipc_bridge.serve(listen_url(transport, runtime))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    with ipc_bridge.connect(server.url) as bridge:
        bridge.echo(b"it runs", ANSWER_S)
        server.close()
        thread.join(ANSWER_S)
        assert not thread.is_alive()
    server.close()
    server.stop()
    server.run()  # at once


@over_servers
def test_a_closed_server_does_not_run(transport: str, runtime: Path) -> None:
    server = ipc_bridge.serve(listen_url(transport, runtime))
    server.close()
    server.run()


@over_transports
@pytest.mark.parametrize("ways", ["items", "batches"])
def test_a_connection_closed_in_mid_stream_says_so(
    ways: str, transport: str, runtime: Path
) -> None:
    with running(listen_url(transport, runtime)) as server:
        for wait in Wait:
            with ipc_bridge.connect(f"{server.url}?wait={wait}", window_bytes=1) as bridge:
                stream = bridge.stream(count=5, size=100_000, timeout=ANSWER_S)
                items: Iterator[Any] = iter(stream) if ways == "items" else stream.batches()
                next(items)
                bridge.close()
                with pytest.raises(CallError, match="UNAVAILABLE: the connection is closed"):
                    next(items)


def test_a_stdio_server_that_never_ran_leaves_nothing(nothing_left: None) -> None:
    (read_fd, to_us), (from_us, write_fd) = os.pipe(), os.pipe()
    listener = StdioListener("stdio:", read_fd, write_fd, Wait.BLOCK)
    listener.close()
    listener.close()
    os.close(to_us)
    os.close(from_us)


@over_transports
@pytest.mark.parametrize("wait", Wait)
@pytest.mark.parametrize("timeout", [None, 4 * ANSWER_S])
def test_an_interrupt_ends_a_read(
    transport: str, wait: Wait, timeout: float | None, runtime: Path
) -> None:
    """Asleep or not, with a deadline or without; and whatever is read later."""
    made = endpoint.transport(f"{listen_url(transport, runtime)}?wait={wait}")
    buffer = memoryview(bytearray(8))
    streams: list[Stream] = []
    counts: list[int] = []
    with contextlib.closing(made.listen()) as listener:

        def serve() -> None:
            stream = listener.accept()
            assert stream is not None
            assert stream.try_write([b"come in"])
            streams.append(stream)
            counts.append(stream.read(buffer, deadline_after(timeout)))

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        there = endpoint.transport(listener.url)
        with contextlib.closing(there.connect(deadline_after(ANSWER_S))) as client:
            wait_until(lambda: bool(streams), ANSWER_S, "the server's stream")
            if wait != Wait.SPIN:
                wait_until(lambda: state(thread.native_id or 0) == "S", ANSWER_S, "it sleeps")
            with contextlib.closing(streams[0]) as server:
                server.interrupt()
                thread.join(ANSWER_S)
                assert counts == [END]
                assert server.try_read(buffer) == END
                assert server.read(buffer, NEVER) == END
            assert client.read(buffer, NEVER) == len(b"come in")


# --- handlers ---

WORDS = memoryview(array.array("I", range(10)))
MANY_WORDS = memoryview(array.array("I", range(100_000)))


@pytest.mark.parametrize("transport", ["unix", "grpc+unix"])
@pytest.mark.parametrize(
    "answer", ["text", "text" * 10_000, [1], None, 7, WORDS, MANY_WORDS, MANY_WORDS.cast("B")[::2]]
)
def test_a_handler_that_gives_no_bytes(
    answer: Any, transport: str, runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends its call with INTERNAL; the next one is answered."""
    caplog.set_level(logging.CRITICAL, "ipc_bridge")  # a traceback that is kept keeps gRPC's server
    service = ipc_bridge.make_service()
    service.unary(10, lambda call, request: answer)
    service.streaming(11, lambda call, request: [b"a", answer, b"b"])
    with (
        running(listen_url(transport, runtime), service) as server,
        ipc_bridge.connect(server.url) as bridge,
    ):
        with pytest.raises(CallError, match="INTERNAL"):
            bridge.call(10, b"", ANSWER_S)
        assert bytes(bridge.echo(b"next", ANSWER_S)) == b"next"
        items = iter(bridge.call_stream(11, b"", ANSWER_S))
        assert bytes(next(items)) == b"a"
        if answer is None:  # an iterator may give None: its end, as in C++
            assert list(items) == []
        else:
            with pytest.raises(CallError, match="INTERNAL"):
                next(items)
        assert bytes(bridge.echo(b"last", ANSWER_S)) == b"last"


@pytest.mark.parametrize("transport", ["unix", "grpc+unix"])
def test_a_failure_that_is_no_error_is_told(
    transport: str, runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """To this side as well, where somebody listens."""

    def fail(call: Any, request: memoryview) -> bytes:
        raise (ValueError("a defect") if bytes(request) == b"10" else Error(Status.ABORTED, "no"))

    service = ipc_bridge.Service()
    service.unary(10, fail)
    with (
        running(listen_url(transport, runtime), service) as server,
        ipc_bridge.connect(server.url) as bridge,
    ):
        with pytest.raises(CallError, match="ABORTED: no"):
            bridge.call(10, b"11", ANSWER_S)
        with pytest.raises(CallError, match="INTERNAL: a defect"):
            bridge.call(10, b"10", ANSWER_S)
    (told,) = caplog.records
    assert told.exc_info is not None
    assert (told.getMessage(), str(told.exc_info[1])) == ("a handler failed", "a defect")
    caplog.clear()  # a traceback that is kept keeps gRPC's server


def test_a_handlers_failure_is_printed_unless_logging_is_set_up(runtime: Path) -> None:
    program = f"""if True:
        import threading, ipc_bridge
        service = ipc_bridge.Service()
        service.unary(10, lambda call, request: 1 / 0)
        with ipc_bridge.listen("unix://{runtime}/u", service) as server:
            threading.Thread(target=server.run).start()
            with ipc_bridge.dial(server.url) as client:
                try: client.call(10)
                except ipc_bridge.CallError as error: print(error.status.name)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "INTERNAL\n"
    assert done.stderr.startswith("a handler failed\nTraceback ")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


# --- times ---

MONTH_S = 40 * 24 * 3600.0  # more milliseconds than an int has


@pytest.mark.parametrize("wait", Wait)
@over_transports
def test_a_deadline_in_a_month(transport: str, wait: Wait, runtime: Path) -> None:
    """poll(2) takes milliseconds in an int: both sides sleep in several parts."""
    service = ipc_bridge.make_service()
    service.unary(10, lambda call, request: call.sleep(0.2) or b"slept")
    with (
        running(f"{listen_url(transport, runtime)}?wait={wait}", service) as server,
        ipc_bridge.connect(f"{server.url}?wait={wait}", timeout=MONTH_S) as bridge,
    ):
        assert bytes(bridge.call(10, b"", MONTH_S)) == b"slept"
        items = bridge.stream(count=3, size=10, rate_hz=10, timeout=MONTH_S)
        assert len(list(items)) == 3


def test_a_rate_of_almost_nothing(runtime: Path) -> None:
    """The second item is due in so long that no clock can say it: the deadline comes first."""
    with (
        running(f"unix://{runtime}/s") as server,
        ipc_bridge.connect(server.url) as bridge,
    ):
        for rate_hz in (1e-9, 1e-100, 5e-324):
            items = iter(bridge.stream(count=2, size=1, rate_hz=rate_hz, timeout=0.2))
            next(items)
            with pytest.raises(CallError, match="DEADLINE_EXCEEDED"):
                next(items)


def test_what_a_timeout_may_be(runtime: Path) -> None:
    before = now_ns()
    assert before <= deadline_after(-1.0) <= now_ns()
    assert before <= deadline_after(-math.inf) <= now_ns()
    assert deadline_after(math.inf) == deadline_after(1e300) == NEVER
    with running(f"unix://{runtime}/s") as server, ipc_bridge.connect(server.url) as bridge:
        with pytest.raises(UsageError, match="INVALID_ARGUMENT: a timeout that is not a number"):
            bridge.echo(b"x", math.nan)
        with pytest.raises(UsageError, match="INVALID_ARGUMENT"):
            ipc_bridge.connect(server.url, timeout=math.nan)
        assert bytes(bridge.echo(b"next", ANSWER_S)) == b"next"


# --- descriptors ---


@contextlib.contextmanager
def spare_fds(count: int) -> Iterator[None]:
    """No more than so many can be opened."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    free = [fd for fd in range(max(used) + count + 2) if fd not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[count], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@over_transports
def test_a_start_without_descriptors_leaves_nothing(transport: str, runtime: Path) -> None:
    """Whatever it is that cannot be opened; and the next start works."""
    url = listen_url(transport, runtime)
    failures = []
    for spare in range(8):
        with contextlib.suppress(Error), spare_fds(spare):
            try:
                ipc_bridge.serve(url).close()
            except Error as error:
                failures.append(error.status)
                raise
        assert os.listdir(runtime) == []
    assert set(failures) == {Status.RESOURCE_EXHAUSTED}
    assert len(failures) < 8


@pytest.mark.parametrize("transport", [*TRANSPORTS, "stdio"])
def test_a_connect_without_descriptors_leaves_nothing(transport: str, runtime: Path) -> None:
    words = f"{sys.executable} -m ipc_bridge.peer serve stdio:"
    with contextlib.ExitStack() as stack:
        if transport == "stdio":
            url = f"stdio:{words}"
        else:
            url = stack.enter_context(running(listen_url(transport, runtime))).url
        before = len(os.listdir("/proc/self/fd"))
        for spare in range(12):
            with contextlib.suppress(Error), spare_fds(spare):
                ipc_bridge.connect(url, timeout=0.05).close()
        wait_until(lambda: not children(), ANSWER_S, "the stdio servers end")
    assert len(os.listdir("/proc/self/fd")) <= before
