"""Conformance: what a client sees, over every transport and in every pairing of languages.

The row is that of the table of cases. Each test starts peers of its own; the fixtures check that
nothing is left. On stdio a server has one client, so nothing there asks a second one.
"""

import contextlib
import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from hosts import SEEN_S
from ipc_bridge import Status, _native
from ipc_bridge.transports import sysv_queue, sysv_shm
from ipc_bridge.transports.sysv_objects import limit
from peer_support import GONE_S
from probe_support import Client, Peers, elapsed
from processes import cpu_s, is_gone, memory_peak_bytes, stopped
from support import ANSWER_S, FULL, PAIRINGS, SANITIZED, SLOW, TRANSPORTS, check_late, wait_until

MIB = 1 << 20
ITEM_BYTES = 4096 + 16  # of method 16, with its header
REPRESENTATIVE = ("unix", "shm")  # with Python, too, at a table's full numbers: bytes, and a ring
GRPC_AHEAD_BYTES = 8 * 65536  # beyond the window, as grpc_rpc says

only_shared = pytest.mark.parametrize(
    "transport", [name for name in TRANSPORTS if name != "stdio"], indirect=True
)
only_stdio = pytest.mark.parametrize("transport", ["stdio"], indirect=True)
# Who blocks must be woken by a byte, a signal or a nudge, for it never looks again by itself. How
# one end waits is not the other's affair, so each language is at each end once.
BLOCKING = [
    (name, "?wait=block", pairing)
    for name in ("pipe", "stdio", "unix")
    for pairing in PAIRINGS
    if pairing[0] != pairing[1]
]
also_blocking = pytest.mark.parametrize(
    ("transport", "query", "pairing"),
    [(name, "", pairing) for name in TRANSPORTS for pairing in PAIRINGS] + BLOCKING,
    ids=["-".join((*pairing, name)) for name in TRANSPORTS for pairing in PAIRINGS]
    + ["-".join((*pairing, name, "block")) for name, _, pairing in BLOCKING],
    indirect=True,
)
SPINNING = [name for name in TRANSPORTS if not name.startswith(("zmq", "grpc"))]  # they refuse to


def test_any_bytes_come_back(peers: Peers) -> None:
    """Row 1: 0 bytes, 1 byte, all 256 values."""
    client = peers.start()
    client.do(op="echo", size=0)
    client.do(op="echo", size=1, seed=7)
    client.do(op="echo", all=True)


def test_sizes_around_every_buffer(peers: Peers) -> None:
    """Row 2: at each limit, for a payload and for a whole frame; 10^5 is the window."""
    window = 100_000
    client = peers.start("--window", str(window))
    for edge in {4096, 8192, 16384, 65536, 262144, window, *own_edges(peers.transport)}:
        for size in (edge - 17, edge - 16, edge - 15, edge - 1, edge, edge + 1):
            client.do(op="echo", size=size, seed=size)
            assert client.do(op="stream", count=3, size=size)["items"] == 3


def own_edges(transport: str) -> tuple[int, ...]:
    """Of a transport's own: a chunk, and as much as lies there unread."""
    if transport == "shm":
        return (_native.CAPACITY_BYTES,)
    if transport == "sysv-shm":
        return (sysv_shm.CHUNK_BYTES, sysv_shm.SLOTS * sysv_shm.CHUNK_BYTES)
    if transport == "sysv-queue":  # as large as the machine allows
        return (*sysv_queue.QueueStream.offer(), limit("msgmnb"))
    return ()


def test_large_payloads(peers: Peers) -> None:
    """Row 4: 4 and 64 MiB; one byte more is refused, and the connection lives."""
    client = peers.start()
    client.do(op="echo", size=4 * MIB)
    client.do(op="echo", size=64 * MIB)
    assert client.ask(op="echo", size=64 * MIB + 1)["status"] == "RESOURCE_EXHAUSTED"
    client.do(op="echo", size=100)
    if not SANITIZED:  # one buffer for the payload; nothing grows beyond it
        copies = 6 if peers.is_grpc else 2  # there: as read, in one piece, parsed; and all back
        assert memory_peak_bytes(peers.server_pid(client)) < copies * 64 * MIB + 64 * MIB


def test_the_server_takes_no_more_than_its_max_payload(peers: Peers) -> None:
    """Row 4, by an option of the server."""
    peers.serve("--max-payload", str(MIB))
    client = peers.connect()
    client.do(op="echo", size=MIB)
    assert client.ask(op="echo", size=MIB + 1)["status"] == "RESOURCE_EXHAUSTED"
    client.do(op="echo", size=MIB)


def test_the_client_takes_no_more_than_its_max_payload(peers: Peers) -> None:
    """Row 4, by an option of the client."""
    client = peers.start("--max-payload", "65536")
    client.do(op="echo", size=65536)
    client.do(op="stream", count=3, size=65536)
    assert client.ask(op="echo", size=65537)["status"] == "RESOURCE_EXHAUSTED"
    client.do(op="echo", size=65536)
    answer = client.ask(op="stream", count=3, size=65537)
    assert (answer["status"], answer["items"]) == ("RESOURCE_EXHAUSTED", 0)
    client.do(op="echo", size=65536)


def test_streams_of_any_length(peers: Peers) -> None:
    """Row 8: the exact count, in order, verified to the last byte."""
    client = peers.start()
    is_cpp = {peers.client_language, peers.server_language} == {"cpp"}
    if FULL:
        many = 1_000_000
    elif peers.is_grpc:
        many = 200_000 if is_cpp else 20_000
    elif (is_cpp or peers.transport in REPRESENTATIVE) and not SANITIZED:
        many = 1_000_000
    else:  # a second more for each of many; it is beyond what 16 bits count
        many = 100_000
    for count in (0, 1, many):
        client.send(op="stream", count=count, size=64)
        answer = client.receive(5 * ANSWER_S if FULL else ANSWER_S)
        assert (answer.get("ok"), answer["items"]) == (True, count), answer
    client.do(op="echo", size=100)


def test_a_window_of_one_byte(peers: Peers) -> None:
    """Row 9: each item waits for the credit of the one before."""
    client = peers.start("--window", "1")
    assert client.do(op="stream", count=200, size=64)["items"] == 200
    assert client.do(op="stream", count=3, size=MIB)["items"] == 3


def test_a_reader_that_stops_stops_the_producer(peers: Peers) -> None:
    """Row 10. Credit is counted from the producer to the reader's hands, so that what the kernel's
    buffers hold is part of the window, not on top of it; and as the reader stops at the first
    item, it gives none back. The window is smaller than those buffers, which would stop it too; but
    a System V queue is smaller still. A second shows this; the row's ten are the next test's."""
    window = 65536
    least = 16384 if peers.transport == "sysv-queue" else window
    client = peers.start("--window", str(window))
    client.do(op="echo", size=1)
    peers.check_others()
    client.send(op="call_stream", method=16, take=2, notice=1, pause_at=1, pause_s=1.0)
    assert client.receive() == {"at": 1}
    time.sleep(0.5)  # no readiness: the producer has this time to overrun, if it can
    ahead_max = window + (GRPC_AHEAD_BYTES if peers.is_grpc else ITEM_BYTES)
    if peers.shares_server:
        assert least <= peers.second(client).number(17) * ITEM_BYTES <= ahead_max
        peers.check_others()
    answer = client.receive()
    assert (answer.get("ok"), answer["items"]) == (True, 2)
    assert least <= client.number(17) * ITEM_BYTES <= ahead_max
    peers.check_freed(client)


def test_a_reader_that_stops_for_long(runtime: Path) -> None:
    """Row 10: for longer than what takes a silent host for gone (10 s), while more is under way
    than the kernel's buffers hold. All at once, for it takes that long; each language at each end;
    only where there are such clocks."""
    with contextlib.ExitStack() as running:
        clients = []
        for transport in ("tcp", "zmq+tcp", "grpc+tcp"):
            for pairing in (("cpp", "py"), ("py", "cpp")):
                peers = Peers(transport, pairing, runtime)
                running.callback(peers.close)
                clients.append((transport, pairing, peers.start()))
        for *_, client in clients:
            client.send(op="stream", count=20_000, size=1000, pause_at=1, pause_s=12.0)
        answers = [(*which, client.receive().get("status")) for *which, client in clients]
        assert [answer for answer in answers if answer[-1]] == []


def test_a_slow_reader_gets_every_item(peers: Peers) -> None:
    """Row 10: nothing is lost or doubled over a pause."""
    client = peers.start("--window", "65536")
    command = {"op": "stream", "count": 2000, "size": 1000}
    assert client.do(**command, pause_at=700, pause_s=0.3)["items"] == 2000


@also_blocking
def test_a_stream_left_early_makes_way_for_a_large_call(peers: Peers) -> None:
    """Row 10: 8 MiB against a producer that is still writing. Nobody waits for the other."""
    client = peers.start()
    for _ in range(3):
        client.send(op="call_stream", method=16, take=1)
        client.send(op="echo", size=8 * MIB)
        assert client.receive()["items"] == 1
        answer = client.receive()
        assert answer.get("ok"), answer
        peers.check_others()
    peers.check_freed(client)


@also_blocking
@pytest.mark.parametrize("method", [13, 16], ids=["slow", "fast"])
def test_cancel_stops_the_producer(peers: Peers, method: int) -> None:
    """Row 11: before the first item, and midway."""
    client = peers.start()
    for take in (0, 1, 20):
        assert client.do(op="call_stream", method=method, take=take)["items"] == take
        client.do(op="echo", size=100, timeout=5.0 * SLOW)
        peers.check_freed(client)


def test_cancel_races_the_end(peers: Peers) -> None:
    """Row 11: streams left at any moment, some as they end; each time the next echo is right."""
    client = peers.start()
    seed = random.randrange(1 << 31)
    is_cpp = {peers.client_language, peers.server_language} == {"cpp"}
    # Elsewhere the same sessions race, each language's with each, for some seconds less.
    full = is_cpp or peers.transport in REPRESENTATIVE
    if peers.is_grpc:  # its own end of a call, not ours; and at 0.4 ms a call, once will do
        full = is_cpp and peers.transport == "grpc+unix" and not SANITIZED
    count = 10_000 if full or FULL else 1500
    answer = client.ask(op="cancel_race", count=count, seed=seed)
    assert answer.get("ok"), f"seed {seed}: {answer}"
    peers.check_others()
    peers.check_freed(client)


@also_blocking
def test_a_deadline_frees_a_sleeping_handler(peers: Peers) -> None:
    """Row 12: a deadline of 0 and of 1 ms; the connection lives, and the handler ends early."""
    client = peers.start()
    assert client.ask(op="echo", size=10, timeout=0)["status"] == "DEADLINE_EXCEEDED"
    client.do(op="echo", size=10)
    calls = 0

    def call() -> float:
        nonlocal calls
        calls += 1
        return elapsed(client, op="call", method=11, seconds=30.0, timeout=0.001)

    check_late(0.001, call)
    peers.check_others()
    client.do(op="echo", size=10, timeout=5.0 * SLOW)
    assert client.number(14) == 0
    ended = client.number(18)
    assert ended <= calls if peers.is_grpc else ended == calls  # (it sends none that is late)


@also_blocking
def test_a_deadline_midway_in_a_stream(peers: Peers) -> None:
    """Row 12: after some items, whether the producer is slow or fast."""
    client = peers.start()
    for method in (13, 16):
        call = partial(elapsed, client, items=True, op="call_stream", method=method)
        check_late(0.1 * SLOW, partial(call, timeout=0.1 * SLOW))
        client.do(op="echo", size=10, timeout=5.0 * SLOW)
        peers.check_freed(client)
    peers.check_others()


@also_blocking
def test_a_deadline_while_sending(peers: Peers) -> None:
    """Row 12: a server that does not read. Half a request is out, so that connection is over; the
    next one finds nothing of it. (ZeroMQ takes a request whole, so there a CANCEL follows it.)"""
    peers.serve()
    clients: list[Client] = []

    def send() -> float:
        client = peers.connect()
        clients.append(client)
        client.do(op="echo", size=10)
        took_s = 0.0
        with contextlib.suppress(ProcessLookupError), stopped(peers.server_pid(client)):
            # (gRPC copies it first, and only then looks at the clock; its window for requests is
            # less than 1 MiB.)
            size = (1 if peers.is_grpc else 64) * MIB
            took_s = elapsed(client, op="echo", size=size, timeout=0.5)
        return took_s

    check_late(0.5, send)
    client = clients[-1]
    if peers.is_grpc:  # which resets that call's stream alone
        client.do(op="echo", size=10, timeout=5.0 * SLOW)
    else:
        status = client.ask(op="echo", size=10).get("status")
        assert status == (None if peers.transport.startswith("zmq") else "UNAVAILABLE")
    another = peers.connect()
    another.do(op="echo", size=10, timeout=5.0 * SLOW)
    peers.check_freed(another)


def test_a_failed_call_leaves_the_connection(peers: Peers) -> None:
    """Row 13: an unknown method, and handlers that throw."""
    client = peers.start()
    assert client.ask(op="call", method=99)["status"] == "UNIMPLEMENTED"
    client.do(op="echo", size=10)
    assert client.ask(op="call_stream", method=99)["status"] == "UNIMPLEMENTED"
    client.do(op="echo", size=10)
    answer = client.ask(op="call", method=10)
    assert (answer["status"], answer["what"]) == ("INTERNAL", "boom")
    client.do(op="echo", size=10)
    answer = client.ask(op="call_stream", method=15)
    assert (answer["status"], answer["what"], answer["items"]) == ("ABORTED", "enough", 3)
    client.do(op="echo", size=10)
    peers.check_others()
    peers.check_freed(client)


def test_a_second_call_on_a_busy_connection(peers: Peers) -> None:
    """Row 13: refused; the first one goes on to its end."""
    client = peers.start()
    answer = client.do(op="busy")
    assert (answer["status"], answer["items"]) == ("FAILED_PRECONDITION", 1000)
    client.do(op="echo", size=10)


@only_shared
def test_many_clients_at_once(peers: Peers) -> None:
    """Row 27, in small: each gets its own answers."""
    peers.serve()
    count = 6 if peers.client_language == "py" else 20  # to start takes Python longer than the rest
    clients = [peers.connect() for _ in range(count)]
    commands: list[dict[str, object]] = [
        {"op": "echo", "size": 100_000},
        {"op": "stream", "count": 500, "size": 1000},
        {"op": "echo", "size": 10},
    ]
    for command in commands:
        for seed, client in enumerate(clients):
            client.send(**command, seed=seed)
    for client in clients:
        for command in commands:
            answer = client.receive()
            assert answer.get("ok"), (command, answer)


@also_blocking
def test_signals_all_the_time(peers: Peers) -> None:
    """Row 28: SIGALRM for every thread of both peers, a thousand times a second."""
    alarm = {"PROBE_ALARM": "1"}
    peers.serve(environment=alarm)
    client = peers.connect(environment=alarm)
    client.do(op="echo", size=10)
    client.do(op="echo", size=16 * MIB)
    client.do(op="stream", count=2000 if peers.is_grpc else 20_000, size=1000)
    client.do(op="stream", count=50, size=100, rate=200.0)
    assert client.do(op="call", method=11, seconds=0.2)["text"] == "slept"
    check_late(0.1, lambda: elapsed(client, op="call", method=11, seconds=30.0, timeout=0.1))
    client.do(op="echo", size=10)


@pytest.mark.parametrize("pairing", [("cpp", "cpp"), ("py", "py")], ids="-".join)
@pytest.mark.parametrize("transport", SPINNING)
def test_peers_that_spin(
    transport: str, pairing: tuple[str, str], nothing_left: None, tmp_path: Path
) -> None:
    """Rows 1, 8, 11, 12 and 14 in small, where neither end ever sleeps in the kernel for the other:
    what it has to look at besides, it must look at while it polls."""
    with contextlib.closing(Peers(transport, pairing, tmp_path, "?wait=spin")) as peers:
        client = peers.start()
        client.do(op="echo", size=100_000)
        assert client.do(op="stream", count=5000, size=1000)["items"] == 5000
        client.do(op="stream", count=5, size=100, rate=100.0)
        assert client.do(op="call_stream", method=16, take=20)["items"] == 20
        check_late(0.1, lambda: elapsed(client, op="call", method=11, seconds=30.0, timeout=0.1))
        peers.check_freed(client)
        used = cpu_s(client.pid)
        client.send(op="call", method=11, seconds=60.0)
        wait_until(lambda: cpu_s(client.pid) > used + 0.05, ANSWER_S, "the client polls")
        peers.kill_server(client)
        assert client.receive(SEEN_S)["status"] == "UNAVAILABLE"


@only_stdio
def test_a_print_in_a_stdio_handler(peers: Peers) -> None:
    """Row 31: it goes to stderr, and the frames stay whole."""
    client = peers.start()
    for _ in range(3):
        assert client.do(op="call", method=12, text="hello")["text"] == "hello"
        client.do(op="echo", size=100_000)
    client.do(op="stream", count=100, size=1000)


@also_blocking
def test_sigterm_cuts_an_endless_stream(peers: Peers) -> None:
    """Row 32: UNAVAILABLE after the grace, and the server leaves."""
    client = peers.start()
    client.send(op="call_stream", method=13, notice=1)
    assert client.receive() == {"at": 1}
    pid = peers.server_pid(client)
    end_s = time.monotonic() + GONE_S
    os.kill(pid, signal.SIGTERM)
    assert client.receive(GONE_S)["status"] == "UNAVAILABLE"
    _check_left(peers, pid, end_s)


@also_blocking
def test_sigterm_lets_a_short_stream_end(peers: Peers) -> None:
    """Row 32: whole, within the grace; what comes later is refused."""
    client = peers.start()
    client.send(op="stream", count=25, size=100, rate=50.0, notice=1)
    assert client.receive() == {"at": 1}
    pid = peers.server_pid(client)
    end_s = time.monotonic() + GONE_S
    os.kill(pid, signal.SIGTERM)
    answer = client.receive(GONE_S)
    assert (answer.get("ok"), answer["items"]) == (True, 25)
    assert client.ask(op="echo", size=10)["status"] == "UNAVAILABLE"
    _check_left(peers, pid, end_s)


def _check_left(peers: Peers, pid: int, end_s: float) -> None:
    """The server has left by then, and well. (On stdio, its parent has its exit code.)"""
    left_s = end_s - time.monotonic()
    if peers.server is not None:
        assert peers.server.exit_code(left_s) == 0
    else:
        wait_until(lambda: is_gone(pid), left_s, "the server ends")


def test_a_fork_of_a_connected_client(peers: Peers) -> None:
    """Row 33, in mid-stream: the child gets an error, and the parent every item."""
    client = peers.start()
    assert client.do(op="fork")["child"] == Status.FAILED_PRECONDITION
    client.do(op="echo", size=100_000)
    peers.check_freed(peers.second(client))
