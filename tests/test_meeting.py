"""How peers meet: records, descriptors, strangers. Its C++ twin is tests/cpp/test_meeting.cpp.

What needs whole peers (death, limits, other users) is tested over the transports that meet so.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from ipc_bridge import Error, Status
from ipc_bridge.system import NEVER, Stream, Wait, deadline_after, now_ns
from ipc_bridge.transports import meeting
from ipc_bridge.transports.meeting import (
    HEADER,
    STRANGER_S,
    STRANGERS_MAX,
    Meeting,
    MeetingListener,
    Record,
    is_over,
    receive_record,
    send_record,
)
from ipc_bridge.transports.stream_socket import SocketStream
from ipc_bridge.transports.unix_address import UnixAddress


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _nothing_is_left(runtime: Path) -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


@pytest.fixture
def here(runtime: Path) -> Meeting:
    return Meeting("test", f"{runtime}/m")


def memory_with(text: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, text)
    return fd


def take_text(record: Record) -> bytes:
    fd = record.take_fd("here")
    try:
        return os.pread(fd, 64, 0)
    finally:
        os.close(fd)


def plain(life_line: socket.socket, hello: Record) -> tuple[Stream, Record]:
    """No more than the life-line."""
    return SocketStream(life_line, Wait.BLOCK), Record(b"welcome")


@contextmanager
def serving(here: Meeting, welcome: meeting.Welcome) -> Iterator[list[Stream]]:
    """A server that answers every client as `welcome` does; the streams that it made."""
    listener = MeetingListener(here, here.open(), welcome)
    streams: list[Stream] = []

    def serve() -> None:
        while (stream := listener.accept()) is not None:
            streams.append(stream)

    server = threading.Thread(target=serve)
    server.start()
    try:
        yield streams
    finally:
        listener.interrupt()
        server.join()
        listener.close()
        for stream in streams:
            stream.close()


def test_bodies_and_descriptors_go_both_ways(here: Meeting) -> None:
    def welcome(life_line: socket.socket, hello: Record) -> tuple[Stream, Record]:
        body = hello.body + b"+" + take_text(hello)
        fds = [memory_with(b"from the server"), memory_with(b"and another")]
        return SocketStream(life_line, Wait.BLOCK), Record(body, fds)

    with serving(here, welcome):
        hello = Record(b"body", [memory_with(b"from the client")])
        life_line, answer = here.connect(deadline_after(2.0), hello)
        hello.close()
        with life_line:
            assert answer.body == b"body+from the client"
            assert take_text(answer) == b"from the server"
            assert not os.get_inheritable(answer.fds[0])
            assert take_text(answer) == b"and another"
            assert not is_over(life_line)
            with pytest.raises(Error):
                answer.take_fd("here")


def test_a_refusal_says_why(here: Meeting) -> None:
    def refuse(life_line: socket.socket, hello: Record) -> tuple[Stream, Record]:
        raise Error(Status.RESOURCE_EXHAUSTED, "no more to share")

    with serving(here, refuse):
        with pytest.raises(Error, match="no more to share") as caught:
            here.connect(deadline_after(2.0))
        assert caught.value.status == Status.RESOURCE_EXHAUSTED


def test_a_system_call_that_fails_refuses(here: Meeting) -> None:
    def fail(life_line: socket.socket, hello: Record) -> tuple[Stream, Record]:
        os.open("/nonexistent", os.O_RDONLY)
        raise AssertionError

    with serving(here, fail):
        with pytest.raises(Error) as caught:
            here.connect(deadline_after(2.0))
        assert caught.value.status == Status.NOT_FOUND


def test_another_scheme_and_a_second_server_are_told_so(here: Meeting, runtime: Path) -> None:
    with serving(here, plain):
        with pytest.raises(Error) as caught:
            Meeting("other", f"{runtime}/m").connect(deadline_after(2.0))
        assert caught.value.status == Status.INVALID_ARGUMENT
        for listen in (here.open, UnixAddress(f"{runtime}/m", "", socket.SOCK_STREAM).listen):
            with pytest.raises(Error) as caught:
                listen()
            assert caught.value.status == Status.ALREADY_EXISTS


RIGHT = HEADER.pack(b"IPCM", 1, 0, b"test")
WRONG = {
    "short": (b"x", Status.INTERNAL),
    "magic": (HEADER.pack(b"IPCX", 1, 0, b"test"), Status.INTERNAL),
    "version": (HEADER.pack(b"IPCM", 2, 0, b"test"), Status.FAILED_PRECONDITION),
    "scheme": (HEADER.pack(b"IPCM", 1, 0, b"tests"), Status.INVALID_ARGUMENT),
    "status": (HEADER.pack(b"IPCM", 1, 8, b"test"), Status.RESOURCE_EXHAUSTED),
    "unknown-status": (HEADER.pack(b"IPCM", 1, 99, b"test"), Status.UNKNOWN),
    "long": (RIGHT + bytes(1025), Status.INTERNAL),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_record_that_breaks_the_rules(name: str) -> None:
    packet, status = WRONG[name]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.send(RIGHT + bytes(1024))
        record = receive_record(ours, "test", "here")
        assert record is not None
        assert record.body == bytes(1024)
        fd = memory_with(b"x")
        socket.send_fds(theirs, [packet], [fd])
        os.close(fd)
        with pytest.raises(Error) as caught:
            receive_record(ours, "test", "here")
        assert caught.value.status == status


def test_more_descriptors_than_allowed_are_refused() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        fd = memory_with(b"x")
        assert send_record(theirs, "test", Record(b"", [fd] * 5))
        os.close(fd)
        with pytest.raises(Error) as caught:
            receive_record(ours, "test", "here")
        assert caught.value.status == Status.RESOURCE_EXHAUSTED


def test_strangers_cost_a_descriptor_and_hold_up_nobody(here: Meeting) -> None:
    """Row 30: a thousand who say nothing. The oldest make room; who speaks is answered."""
    with serving(here, plain) as streams:
        address = UnixAddress(here.url.partition("://")[2], here.url, socket.SOCK_SEQPACKET)
        threads, fds = threading.active_count(), open_fds()
        silent: list[socket.socket] = []
        try:
            for _ in range(1000):
                # 256 are kept on both sides: the limit on descriptors need not be high.
                silent.append(address.connect(deadline_after(5.0)))
                if len(silent) > STRANGERS_MAX:
                    gone = silent.pop(0)
                    _until(partial(is_over, gone), 5.0)
                    gone.close()
            life_line, _ = here.connect(deadline_after(1.0))
            life_line.close()
            assert threading.active_count() == threads
            assert open_fds() <= fds + 2 * STRANGERS_MAX + 8
            _until(lambda: len(streams) == 1, 1.0)
        finally:
            for sock in silent:
                sock.close()


def test_a_stranger_expires(here: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    assert STRANGER_S == 5.0
    monkeypatch.setattr(meeting, "STRANGER_S", 0.1)
    with serving(here, plain) as streams:
        address = UnixAddress(here.url.partition("://")[2], here.url, socket.SOCK_SEQPACKET)
        with address.connect(deadline_after(1.0)) as silent:
            began = time.monotonic()
            _until(lambda: is_over(silent), 2.0)
            assert time.monotonic() - began > 0.05
        assert streams == []


def test_without_a_server_a_client_gives_up_at_its_deadline(here: Meeting) -> None:
    by_ns = deadline_after(0.1)
    with pytest.raises(Error) as caught:
        here.connect(by_ns)
    assert caught.value.status == Status.UNAVAILABLE
    assert now_ns() >= by_ns
    door = here.open()  # and with one that says nothing
    by_ns = deadline_after(0.1)
    with pytest.raises(Error) as caught:
        here.connect(by_ns)
    assert caught.value.status == Status.UNAVAILABLE
    assert now_ns() >= by_ns
    door.sock.close()
    door.close()


def test_a_client_outlasts_a_server_that_goes_as_it_knocks(here: Meeting) -> None:
    first = here.open()
    answers: list[bytes] = []

    def knock() -> None:
        life_line, answer = here.connect(NEVER)
        answers.append(answer.body)
        life_line.close()

    client = threading.Thread(target=knock)
    client.start()
    first.sock.setblocking(True)
    sock, _ = first.sock.accept()
    sock.close()  # as a kill does
    first.sock.close()
    first.close()
    with serving(here, plain):
        client.join(5.0)
    assert answers == [b"welcome"]


def _until(holds: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)
