"""The ring in a loop of one's own: `arm`, then select, epoll or asyncio on `fileno`, on both sides;
and the other stream whose descriptor needs that, ZeroMQ's.

Rings need no system call, so their descriptor says nothing by itself: a bell rings only for who has
said that it is about to sleep. Each loop here sleeps on the descriptor and on nothing else, so that
a bell that is missing hangs it. The C++ twin is tests/cpp/test_waiting.cpp.
"""

import asyncio
import contextlib
import select
import selectors
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ipc_bridge import _native
from ipc_bridge.system import END, NEVER, WOULD_BLOCK, Listener, Stream, Wait, deadline_after
from ipc_bridge.transports.shm_ring import Shm
from ipc_bridge.transports.zeromq import ZmqTcp

ROUNDS = 300  # of echo, each asleep at either end
LARGE_BYTES = 4 * _native.CAPACITY_BYTES  # of a ring: its writer waits for room
SLEEP_S = 20.0  # a bell that is missing costs so much, and fails
TURNS_MAX = 100  # of a loop that wakes for nothing

Sleep = Callable[[int], bool]  # on a descriptor, until it is readable; False: never came


def by_select(fd: int) -> bool:
    return bool(select.select([fd], [], [], SLEEP_S)[0])


def by_poll(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(SLEEP_S * 1000))


def by_epoll(fd: int) -> bool:
    with select.epoll() as epoll:
        epoll.register(fd, select.EPOLLIN)
        return bool(epoll.poll(SLEEP_S))


def by_selectors(fd: int) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        return bool(selector.select(SLEEP_S))


SLEEPS = [by_select, by_poll, by_epoll, by_selectors]


@contextlib.contextmanager
def connected(path: Path) -> Iterator[tuple[Stream, Stream]]:
    """A client's and a server's stream, joined by a ring."""
    transport = Shm(str(path), Wait.BLOCK)
    listener: Listener = transport.listen()
    accepted: list[Stream | None] = []
    server = threading.Thread(target=lambda: accepted.append(listener.accept()))
    server.start()
    with contextlib.ExitStack() as stack:
        stack.callback(listener.close)
        client = transport.connect(deadline_after(5.0))
        stack.callback(client.close)
        server.join()
        assert accepted[0] is not None
        stack.callback(accepted[0].close)
        yield client, accepted[0]


def read(stream: Stream, buffer: memoryview, sleep: Sleep) -> int:
    """What comes next, asleep on the descriptor until then."""
    while (count := stream.try_read(buffer)) == WOULD_BLOCK:
        if not stream.arm():
            assert sleep(stream.fileno()), "no bell rang"
    return count


def write_all(stream: Stream, data: bytes, sleep: Sleep) -> None:
    """Write it, asleep while there is no room: armed, and then looked at once more."""
    rest, is_armed = memoryview(data), False
    while rest:
        count = stream.try_write([rest])
        assert count != END
        rest = rest[count:]
        if count == WOULD_BLOCK and is_armed:
            assert sleep(stream.fileno()), "no bell rang for room"
        is_armed = count == WOULD_BLOCK and not is_armed
        if is_armed:
            assert not stream.arm(), "there is something to read"


def exchange(stream: Stream, sleep: Sleep, *, first: bool) -> bytes:
    """So many rounds, then a large message one way, an answer, and the end; what came at last."""
    buffer = memoryview(bytearray(LARGE_BYTES))
    for number in range(ROUNDS):
        if first:
            write_all(stream, b"ball %d" % number, sleep)
        count = read(stream, buffer, sleep)
        assert buffer[:count] == b"ball %d" % number
        if not first:
            write_all(stream, bytes(buffer[:count]), sleep)
    if first:
        write_all(stream, bytes(range(256)) * (LARGE_BYTES // 256), sleep)
    else:
        got = b""
        while len(got) < LARGE_BYTES:
            got += buffer[: read(stream, buffer, sleep)]
        assert got == bytes(range(256)) * (LARGE_BYTES // 256)
        write_all(stream, b"all of it", sleep)
        stream.close()
        return b""
    count = read(stream, buffer, sleep)
    assert read(stream, buffer[count:], sleep) == END
    return bytes(buffer[:count])


@pytest.mark.parametrize("sleep", SLEEPS)
@pytest.mark.parametrize("first", ["client", "server"])
def test_a_loop_that_sleeps_on_the_descriptor(sleep: Sleep, first: str, runtime: Path) -> None:
    with connected(runtime / "s") as (client, server):
        one, other = (client, server) if first == "client" else (server, client)
        failed: list[BaseException] = []

        def answer() -> None:
            try:
                exchange(other, sleep, first=False)
            except BaseException as error:
                failed.append(error)
                other.close()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            assert exchange(one, sleep, first=True) == b"all of it"
        finally:
            thread.join(2 * SLEEP_S)
        assert not failed


async def read_soon(stream: Stream, buffer: memoryview) -> int:
    """As `read`, in an event loop."""
    loop, count = asyncio.get_running_loop(), stream.try_read(buffer)
    while count == WOULD_BLOCK:
        if not stream.arm():
            ready = asyncio.Event()
            loop.add_reader(stream.fileno(), ready.set)
            try:
                await asyncio.wait_for(ready.wait(), SLEEP_S)
            finally:
                loop.remove_reader(stream.fileno())
        count = stream.try_read(buffer)
    return count


def test_both_ends_in_one_event_loop(runtime: Path) -> None:
    async def echo(stream: Stream) -> None:
        buffer = memoryview(bytearray(4096))
        while (count := await read_soon(stream, buffer)) != END:
            assert stream.try_write([buffer[:count]]) == count

    async def play(client: Stream, server: Stream) -> None:
        answering = asyncio.create_task(echo(server))
        buffer = memoryview(bytearray(4096))
        for number in range(ROUNDS):
            assert client.try_write([b"ball %d" % number])
            count = await read_soon(client, buffer)
            assert buffer[:count] == b"ball %d" % number
        client.close()
        await asyncio.wait_for(answering, SLEEP_S)

    with connected(runtime / "s") as (client, server):
        asyncio.run(play(client, server))


@pytest.mark.parametrize("sleep", SLEEPS)
def test_what_was_written_before_the_end_is_read_before_it(sleep: Sleep, runtime: Path) -> None:
    with connected(runtime / "s") as (client, server):
        assert server.try_write([b"last words"])
        server.close()
        buffer = memoryview(bytearray(64))
        count = read(client, buffer, sleep)
        assert bytes(buffer[:count]) == b"last words"
        assert read(client, buffer, sleep) == END
        assert client.arm(), "there is nothing to sleep for"
        assert client.try_write([b"x"]) == END


@pytest.mark.parametrize("sleep", SLEEPS)
def test_the_end_of_a_zeromq_server_is_seen(sleep: Sleep) -> None:
    listener = ZmqTcp("127.0.0.1", 0).listen()
    with contextlib.closing(listener):
        port = int(listener.url.rpartition(":")[2])
        client = ZmqTcp("127.0.0.1", port).connect(deadline_after(5.0))
    with contextlib.closing(client):  # whose server has left
        buffer = memoryview(bytearray(64))
        for _ in range(TURNS_MAX):
            count = client.try_read(buffer)
            if count != WOULD_BLOCK:
                break
            assert client.arm() or sleep(client.fileno())
        assert count == END


def test_a_descriptor_is_quiet_unless_it_was_armed(runtime: Path) -> None:
    """The ring costs no system call while nobody sleeps: so `arm` is needed."""
    with connected(runtime / "s") as (client, server):
        assert client.try_write([b"unheard"]) == 7
        assert not select.select([server.fileno()], [], [], 0)[0]
        assert server.arm(), "it is here already: do not sleep"
        buffer = memoryview(bytearray(64))
        assert server.try_read(buffer) == 7
        assert not server.arm()
        assert client.try_write([b"heard"]) == 5
        assert select.select([server.fileno()], [], [], SLEEP_S)[0]
        assert server.wait(True, False, NEVER)
