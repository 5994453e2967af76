"""Peers that meet as they should and then break the mechanism's own rules, below any frame.

Row 24 of the conformance table for what meets at a `meeting`: the ring, and System V queues and
segments. Here the hostile side is made by hand. A client's side must end with a typed error, in one
line; a server must end that client alone, keep nothing of it, and go on; and nobody may die of it,
by SIGBUS or otherwise. (What a killed peer or ipcrm does: test_sysv.py. What single words in the
memory do, all of them: tests/cpp/test_ring.cpp. Records of the meeting itself: test_meeting.py.)
"""

import contextlib
import fcntl
import mmap
import os
import re
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sysv_ipc

from ipc_bridge import Error, ProtocolError, Status, _native, connect
from ipc_bridge.session import ClientSession
from ipc_bridge.system import END, Stream, Wait, deadline_after
from ipc_bridge.transports import shm_ring, sysv_shm
from ipc_bridge.transports.meeting import Meeting, MeetingListener, Record
from ipc_bridge.transports.stream_socket import SocketStream
from ipc_bridge.transports.sysv_objects import KEY_MARK
from peer_support import NOBODY, TIMEOUT_S, client, run_client, served
from processes import fds, sysv_objects
from raw import stream_call
from support import LANGUAGES, SLOW, Exit, listen_url, until

SEEN_S = 1.0 * SLOW
GIVE_UP_S = "5"  # of a client that waits in vain, which is a failure
CONTROL_BYTES = 64 << 10  # of ring.hpp, as what follows
CAPACITY_BYTES = 64 << 10
CHUNK_BYTES = 16 << 10
SIDE_BYTES = 128
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
KEY = KEY_MARK | 0xFACE0  # in the namespace of this test run
HELLO = b"".join(map(bytes, ClientSession().outbox.buffers()))

of_languages = pytest.mark.parametrize("language", LANGUAGES)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


# --- servers, against a client in each language ---


def memory(size: int, seals: int = SEALS, words: dict[int, bytes] | None = None) -> int:
    """A descriptor of memory of a size, with some words in it, and sealed."""
    fd = os.memfd_create("hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    for at, word in (words or {}).items():
        os.pwrite(fd, word, at)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def ring(layout: int = 1, capacity: int = CAPACITY_BYTES, **words: Any) -> Callable[[], Record]:
    """Answers with memory that is right, but for what is said."""
    size = CONTROL_BYTES + 2 * CAPACITY_BYTES

    def answer() -> Record:
        fd = memory(words.get("size", size), words.get("seals", SEALS), words.get("words"))
        return Record(struct.pack("<II", layout, capacity), [fd])

    return answer


def opened(path: str) -> Callable[[], Record]:
    """Answers with a descriptor of something else."""
    return lambda: Record(
        struct.pack("<II", 1, CAPACITY_BYTES), [os.open(path, os.O_RDWR | os.O_CLOEXEC)]
    )


def text(body: bytes) -> Callable[[], Record]:
    """Answers with this, and no descriptor."""
    return lambda: Record(body)


FIRST_RECORD = CONTROL_BYTES  # of what a server writes
SHM: dict[str, Callable[[], Record]] = {
    "no-answer": text(b""),
    "a-short-answer": text(b"\1\0\0\0"),
    "a-long-answer": text(bytes(9)),
    "no-descriptor": text(struct.pack("<II", 1, CAPACITY_BYTES)),
    "another-layout": ring(layout=2),
    "not-sealed": ring(seals=0),
    "sealed-against-growth-alone": ring(seals=fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL),
    "too-small": ring(size=CONTROL_BYTES + CAPACITY_BYTES),
    "empty": ring(size=0),
    "no-capacity": ring(capacity=0),
    "a-huge-capacity": ring(capacity=1 << 31),
    "a-capacity-of-no-power": ring(capacity=CAPACITY_BYTES + 64),
    "a-device": opened("/dev/zero"),
    "an-index-of-no-record": ring(words={0: u64(8)}),
    "a-record-too-long": ring(words={FIRST_RECORD: u32(CHUNK_BYTES + 1)}),
    "a-record-of-4-GiB": ring(words={FIRST_RECORD: u32(0xFFFFFFFF)}),
}


def queues(chunk_bytes: int, *messages: tuple[bytes, int], key: int = KEY) -> Callable[[], Record]:
    """Answers with a pair of queues; these messages are in the client's."""

    def answer() -> Record:
        for number in (0, 1):
            queue = sysv_ipc.MessageQueue(KEY + number, sysv_ipc.IPC_CREX, 0o600, 8192)
            for message, kind in messages if number else ():
                queue.send(message, type=kind)
        return Record(struct.pack("<II", key, chunk_bytes))

    return answer


QUEUE: dict[str, Callable[[], Record]] = {
    "no-answer": text(b""),
    "a-short-answer": text(u32(KEY)),
    "another-key": queues(4096, key=0x1234),
    "no-chunk": queues(0),
    "a-huge-chunk": queues(1 << 20),
    "a-message-too-long": queues(64, (bytes(65), 1)),
    "a-message-of-another-type": queues(64, (b"x", 7)),
    "an-empty-message": queues(64, (b"", 1)),
}


def buffers(
    slots: int = sysv_shm.SLOTS,
    slot_bytes: int = sysv_shm.SLOT_BYTES,
    size: int = 2 * sysv_shm.BUFFER_BYTES,
    values: tuple[int, ...] = (0, sysv_shm.SLOTS, 0, sysv_shm.SLOTS),
    slot: bytes = b"",
) -> Callable[[], Record]:
    """Answers with a segment and semaphores of these values; `slot` is the client's first."""

    def answer() -> Record:
        new = sysv_ipc.IPC_CREX
        for number, value in enumerate(values):
            sysv_ipc.Semaphore(KEY + number, new, 0o600, value)
        segment = sysv_ipc.SharedMemory(KEY, new, 0o600, size, b"\0")
        segment.write(slot, size // 2)
        segment.detach()
        return Record(struct.pack("<III", KEY, slots, slot_bytes))

    return answer


ONE_FULL = (0, sysv_shm.SLOTS, 1, sysv_shm.SLOTS - 1)
SEGMENT: dict[str, Callable[[], Record]] = {
    "no-answer": text(b""),
    "a-short-answer": text(u32(KEY) + u32(sysv_shm.SLOTS)),
    "other-slots": buffers(slots=1 << 30),
    "no-slots": buffers(slots=0),
    "slots-of-another-size": buffers(slot_bytes=1),
    "a-small-segment": buffers(size=4096),
    "an-empty-slot": buffers(values=ONE_FULL, slot=u32(0)),
    "a-slot-too-long": buffers(values=ONE_FULL, slot=u32(sysv_shm.CHUNK_BYTES + 1)),
    "a-slot-of-4-GiB": buffers(values=ONE_FULL, slot=u32(0xFFFFFFFF)),
    "more-full-than-there-are": buffers(values=(0, 16, 32767, 0)),
    "more-free-than-there-are": buffers(values=(0, 16, 1, 32767), slot=u32(len(HELLO)) + u32(0)),
}


class Case(NamedTuple):
    """A server's answer, below the frames."""

    scheme: str
    name: str
    answer: Callable[[], Record]


SERVERS = [
    Case(scheme, name, answer)
    for scheme, answers in (("shm", SHM), ("sysv-queue", QUEUE), ("sysv-shm", SEGMENT))
    for name, answer in answers.items()
]


@contextlib.contextmanager
def serving(scheme: str, directory: Path, answer: Callable[[], Record]) -> Iterator[str]:
    """A server that answers every client so; its URL."""
    url = listen_url(scheme, directory)
    here = Meeting(scheme, url.partition("://")[2])
    streams: list[Stream] = []

    def welcome(life_line: socket.socket, hello: Record) -> tuple[Stream, Record]:
        return SocketStream(life_line, Wait.BLOCK), answer()

    def serve() -> None:
        while (stream := listener.accept()) is not None:
            streams.append(stream)

    listener = MeetingListener(here, here.open(), welcome)
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield url
    finally:
        listener.interrupt()
        thread.join()
        listener.close()
        for stream in streams:
            stream.close()
        remove_all()


def remove_all() -> None:
    """What the hostile side has made: no life-line's end removes that."""
    for kind in (sysv_ipc.MessageQueue, sysv_ipc.Semaphore, sysv_ipc.SharedMemory):
        for number in range(4):
            with contextlib.suppress(sysv_ipc.Error):
                kind(KEY + number).remove()


@of_languages
@pytest.mark.parametrize("case", SERVERS, ids=lambda case: f"{case.scheme}-{case.name}")
def test_a_server_that_breaks_the_mechanism(case: Case, language: str, runtime: Path) -> None:
    words = ("--payload", "hello", "--timeout", GIVE_UP_S)
    with (
        serving(case.scheme, runtime, case.answer) as url,
        client(language, "echo", url, *words) as it,
    ):
        out, errors = it.communicate(timeout=TIMEOUT_S)
    assert (it.returncode, out) == (Exit.INTERNAL, "")
    assert re.fullmatch(rf"error: INTERNAL: protocol error: [^\n]+, {url}\n", errors), errors


@of_languages
@pytest.mark.parametrize("head", [32, CAPACITY_BYTES + 64, 1 << 32, 1 << 63, (1 << 64) - 64])
def test_a_server_that_has_consumed_what_was_never_written(
    head: int, language: str, runtime: Path
) -> None:
    """It says hello, and then so while the client waits for room to write a large request."""
    made: list[int] = []
    hello = u32(len(HELLO)) + bytes(4) + HELLO

    def answer() -> Record:
        record = ring(words={FIRST_RECORD: hello})()
        made.append(os.dup(record.fds[0]))
        return record

    big = runtime / "big"
    big.write_bytes(bytes(4 * CAPACITY_BYTES))
    words = ("--payload", f"@{big}", "--timeout", GIVE_UP_S)
    with (
        serving("shm", runtime, answer) as url,
        client(language, "echo", url, *words) as it,
    ):
        assert until(lambda: bool(made), TIMEOUT_S)
        with mmap.mmap(made[0], 0) as shared:
            # The client's hello takes a line; then its request begins, a chunk at first.
            second = CONTROL_BYTES + CAPACITY_BYTES + 64
            assert until(lambda: shared[second : second + 4] != bytes(4), TIMEOUT_S)
            shared[0:8] = u64(head)
        out, errors = it.communicate(timeout=TIMEOUT_S)
        os.close(made[0])
    assert (it.returncode, out) == (Exit.INTERNAL, "")
    assert "the peer has consumed what was never written" in errors
    big.unlink()


@of_languages
@pytest.mark.parametrize("scheme", ["sysv-queue", "sysv-shm"])
def test_a_server_whose_objects_are_not_here(scheme: str, language: str, runtime: Path) -> None:
    shape = {"sysv-queue": (4096,), "sysv-shm": (sysv_shm.SLOTS, sysv_shm.SLOT_BYTES)}[scheme]
    body = struct.pack(f"<{1 + len(shape)}I", KEY, *shape)
    with serving(scheme, runtime, text(body)) as url:
        code = run_client(language, "echo", url, "--payload", "hello", "--timeout", GIVE_UP_S)
    assert code == Exit.UNAVAILABLE


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@of_languages
@pytest.mark.parametrize("number", range(4))
def test_a_semaphore_of_somebody_else(number: int, language: str, runtime: Path) -> None:
    """Who knows the key may have been there first, with an object that anybody may open."""

    def answer() -> Record:
        record = buffers()()
        sysv_ipc.Semaphore(KEY + number).remove()
        os.seteuid(NOBODY)
        try:
            sysv_ipc.Semaphore(KEY + number, sysv_ipc.IPC_CREX, 0o666, 0)
        finally:
            os.seteuid(0)
        return record

    with serving("sysv-shm", runtime, answer) as url:
        code = run_client(language, "echo", url, "--payload", "hello", "--timeout", GIVE_UP_S)
    assert code == Exit.PERMISSION_DENIED


# --- clients, against a server in each language ---


class Met(NamedTuple):
    """What a client has in its hands once it has met a server."""

    life_line: socket.socket
    answer: Record

    def key(self) -> int:
        """Of System V objects."""
        return int.from_bytes(self.answer.body[:4], "little")

    def ring_bell(self) -> None:
        """Of a ring: whoever sleeps looks."""
        self.life_line.send(b"\1")

    def write(self, at: int, word: bytes) -> None:
        """Into a ring's memory."""
        with mmap.mmap(self.answer.fds[0], 0) as shared:
            shared[at : at + len(word)] = word

    def capacity(self) -> int:
        """Of a ring."""
        return int.from_bytes(self.answer.body[4:8], "little")


def record_of(size: int) -> Callable[[Met], None]:
    """The client's first record says that it is so long."""

    def act(met: Met) -> None:
        met.write(CONTROL_BYTES + met.capacity(), u32(size))
        met.ring_bell()

    return act


def consumed(head: int) -> Callable[[Met], None]:
    """While a stream comes, the client says that it has consumed so much."""

    def act(met: Met) -> None:
        stream = _native.attach(
            met.life_line, met.answer.fds[0], met.capacity(), "block", "hostile"
        )
        # (The stream owns the descriptor from here on, and is closed with it.)
        stream.try_write([HELLO + stream_call(1, 1000, 60_000)])
        met.write(SIDE_BYTES, u64(head))
        ends = deadline_after(SEEN_S)
        buffer = memoryview(bytearray(1 << 20))
        while stream.read(buffer, ends) > 0:
            met.write(SIDE_BYTES, u64(head))
        stream.close()

    return act


def message(data: bytes, kind: int) -> Callable[[Met], None]:
    """The client's first message."""

    def act(met: Met) -> None:
        sysv_ipc.MessageQueue(met.key(), max_message_size=8192).send(data, type=kind)

    return act


def slot_of(size: int) -> Callable[[Met], None]:
    """The client's first slot says that it is so long."""

    def act(met: Met) -> None:
        segment = sysv_ipc.SharedMemory(met.key())
        segment.write(u32(size))
        segment.detach()
        sysv_ipc.Semaphore(met.key()).release()

    return act


def semaphore(number: int, value: int, slot: bytes = b"") -> Callable[[Met], None]:
    """The client sets one, with this in its first slot."""

    def act(met: Met) -> None:
        segment = sysv_ipc.SharedMemory(met.key())
        segment.write(slot)
        segment.detach()
        sysv_ipc.Semaphore(met.key() + number).value = value
        if number:
            sysv_ipc.Semaphore(met.key()).release()

    return act


CLIENTS: dict[str, dict[str, Callable[[Met], None]]] = {
    "shm": {
        "a-record-too-long": record_of(CHUNK_BYTES + 1),
        "a-record-of-4-GiB": record_of(0xFFFFFFFF),
        "consumed-2^63": consumed(1 << 63),
        "consumed-of-no-record": consumed(32),
        "consumed-what-comes": consumed(1 << 30),
    },
    "sysv-queue": {
        "a-message-of-another-type": message(b"x", 7),
        "an-empty-message": message(b"", 1),
    },
    "sysv-shm": {
        "an-empty-slot": slot_of(0),
        "a-slot-too-long": slot_of(sysv_shm.CHUNK_BYTES + 1),
        "a-slot-of-4-GiB": slot_of(0xFFFFFFFF),
        "more-full-than-there-are": semaphore(0, 32767),
        "more-free-than-there-are": semaphore(1, 32767, u32(len(HELLO)) + u32(0) + HELLO),
    },
}


def is_over(life_line: socket.socket) -> bool:
    """Has the server let go of it?"""
    if life_line.fileno() < 0:  # by the stream that has read its end
        return True
    poll = select.poll()
    poll.register(life_line, select.POLLRDHUP)
    return bool(poll.poll(0))


@of_languages
@pytest.mark.parametrize("scheme", CLIENTS)
def test_clients_that_break_the_mechanism(scheme: str, language: str, runtime: Path) -> None:
    """One server for all of them, and a client that is served throughout."""
    before = sysv_objects()
    with served(listen_url(scheme, runtime), language) as up, connect(up.url) as control:
        path = up.url.partition("://")[2]
        assert bytes(control.echo(b"before", timeout=5.0)) == b"before"
        had_fds, objects = fds(up.pid), sysv_objects()
        for name, act in CLIENTS[scheme].items():
            with contextlib.closing(Closing()) as hands:
                life_line, answer = Meeting(scheme, path).connect(deadline_after(2.0))
                hands.keep(life_line, answer)
                act(Met(life_line, answer))
                assert until(partial(is_over, life_line), SEEN_S), name
            assert bytes(control.echo(name.encode(), timeout=SEEN_S)) == name.encode()
        assert until(lambda: fds(up.pid) == had_fds, SEEN_S), "a descriptor is left"
        assert until(lambda: sysv_objects() == objects, SEEN_S), "an object is left"
    assert until(lambda: sysv_objects() == before, SEEN_S)


class Closing:
    """What a hostile client held, closed at its end."""

    def __init__(self) -> None:
        self._held: list[Any] = []

    def keep(self, *held: Any) -> None:
        """Close them, too."""
        self._held += held

    def close(self) -> None:
        """Idempotent."""
        while self._held:
            self._held.pop().close()


@of_languages
def test_descriptors_that_nobody_asked_for_are_closed(language: str, runtime: Path) -> None:
    with served(listen_url("shm", runtime), language) as up:
        had_fds = fds(up.pid)
        mine = [os.open("/dev/null", os.O_RDONLY) for _ in range(4)]
        life_line, answer = Meeting("shm", up.url.partition("://")[2]).connect(
            deadline_after(2.0), Record(b"a body that nobody reads", mine)
        )
        for fd in mine:
            os.close(fd)
        answer.close()
        life_line.close()
        assert until(lambda: fds(up.pid) == had_fds, SEEN_S)


@of_languages
def test_a_client_can_neither_shrink_the_memory_nor_unseal_it(language: str, runtime: Path) -> None:
    with served(listen_url("shm", runtime), language) as up:
        life_line, answer = Meeting("shm", up.url.partition("://")[2]).connect(deadline_after(2.0))
        with life_line, contextlib.closing(answer):
            size = os.fstat(answer.fds[0]).st_size
            for other in (0, size - 1, size + 1):
                with pytest.raises(PermissionError):
                    os.ftruncate(answer.fds[0], other)
            with pytest.raises(PermissionError):
                fcntl.fcntl(answer.fds[0], fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


# --- the client as an object: what its next call says ---


def test_a_ring_broken_in_mid_connection_ends_it(runtime: Path) -> None:
    """The error once, and then UNAVAILABLE, as on any transport."""
    made: list[tuple[Any, int]] = []

    def welcome(life_line: socket.socket, hello: Record) -> tuple[Stream, Record]:
        stream, fd = _native.make(life_line, CAPACITY_BYTES, "block", "here")
        made.append((stream, os.dup(fd)))
        assert stream.try_write([HELLO]) == len(HELLO)
        return stream, Record(shm_ring.WELCOME.pack(shm_ring.LAYOUT, CAPACITY_BYTES), [fd])

    here = Meeting("shm", str(runtime / "s"))
    listener = MeetingListener(here, here.open(), welcome)
    thread = threading.Thread(target=listener.accept)
    thread.start()
    bridge = connect(here.url)
    thread.join()
    ((stream, fd),) = made
    with mmap.mmap(fd, 0) as shared:
        # After the hello's record, which takes one line.
        shared[FIRST_RECORD + 64 : FIRST_RECORD + 68] = u32(0xFFFFFFFF)
    with pytest.raises(ProtocolError, match="a record of an impossible size"):
        bridge.echo(b"hello", timeout=2.0)
    with pytest.raises(Error, match="the connection is closed") as caught:
        bridge.echo(b"hello", timeout=2.0)
    assert caught.value.status == Status.UNAVAILABLE
    buffer = memoryview(bytearray(1 << 16))
    while (count := stream.read(buffer, deadline_after(SEEN_S))) > 0:  # its hello and its call
        pass
    assert count == END, "the life-line is still there"
    bridge.close()
    stream.close()
    listener.close()
    os.close(fd)
