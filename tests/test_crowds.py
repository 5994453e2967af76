"""Too many of them, or for too long: rows 25, 27 and 30 of the conformance table, and what it costs
to idle or to read no further (rows 4 and 10)."""

import os
import resource
import socket
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import pytest

from hosts import SEEN_S, Host, of_servers, over_transports
from ipc_bridge import Error, Status, connect
from ipc_bridge.transports.meeting import is_over
from ipc_bridge.transports.pipe import PipeStream
from peer_support import (
    served,
)
from probe_support import Client, Server
from processes import (
    cpu_s,
    fds,
    rss_bytes,
    sysv_objects,
    threads,
)
from raw import (
    CALL_KIND,
    END_KIND,
    WINDOW_BYTES,
    Raw,
    call,
    header,
    hello,
    stream_call,
)
from support import FRAMED, FULL, LANGUAGES, MIB, SANITIZED, listen_url, until

pytestmark = pytest.mark.usefixtures("nothing_left")

MEETING = ["shm", "sysv-queue", "sysv-shm"]  # where no more than a socket is there at first

# --- rows 25 and 30: too many ---


def limit_fds(pid: int, spare: int) -> tuple[int, int]:
    """Leave a process so many descriptors to open; the limit that it had."""
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    free = [number for number in range(len(used) + spare + 1) if number not in used]
    while len(free) <= spare:
        free.append(max(*free, *used) + 1)
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (free[spare], before[1]))
    return before


@pytest.mark.parametrize("spare", [1, 2, 3, 5])
@of_servers
@pytest.mark.parametrize("scheme", [name for name in FRAMED if not name.startswith("zmq")])
def test_a_server_out_of_descriptors(scheme: str, server: str, spare: int, runtime: Path) -> None:
    """Whoever comes then waits; the server sleeps, and takes clients again once it can."""
    if spare not in {"pipe": (1, 2, 3, 5), "sysv-queue": (1, 2, 3), "sysv-shm": (1, 2, 3)}.get(
        scheme, (1, 3)
    ):
        pytest.skip("no client of this costs so many")
    if SANITIZED and server == "cpp":
        pytest.skip("UBSan looks at memory through a pipe(2) of its own, and errs without one")
    with served(listen_url(scheme, runtime), server) as up:
        quiet = threads(up.pid)
        with connect(up.url) as warm:
            warm.echo(b"warm")
        assert until(lambda: threads(up.pid) == quiet)
        before = limit_fds(up.pid, spare)
        with ExitStack() as open_still:
            refused = set()
            for _ in range(spare + 3):
                try:
                    open_still.enter_context(Raw.connect(up.url, 0.1))
                except Error as error:
                    refused.add(error.status)
            if scheme.startswith("sysv") and spare < 3:  # it can still accept, and say why not
                assert refused == {Status.RESOURCE_EXHAUSTED}
            used = cpu_s(up.pid)
            time.sleep(0.5)  # the time in which it must not spin
            assert up.process.poll() is None, "the server has died"
            assert cpu_s(up.pid) - used < 0.1
        # Not enough for even one client of pipe; and System V's first needs a watcher's, too.
        if spare < 3 or scheme.startswith("sysv"):
            resource.prlimit(up.pid, resource.RLIMIT_NOFILE, before)

        def answers() -> bool:
            """(While those who have gone still hold theirs, one more may be refused.)"""
            with suppress(Error), connect(up.url, timeout=2.0) as bridge:
                return bytes(bridge.echo(b"again", timeout=5.0)) == b"again"
            return False

        assert until(answers)


@of_servers
def test_a_server_out_of_memory_turns_one_client_away(server: str, runtime: Path) -> None:
    """Who asks for more than there is goes, and nobody else does."""
    if SANITIZED and server == "cpp":
        pytest.skip("a sanitizer reserves more than any limit")
    url = listen_url("unix", runtime)
    with served(url, server, "--max-payload", "2GiB") as up, connect(up.url) as control:
        control.echo(b"warm")
        resource.prlimit(up.pid, resource.RLIMIT_AS, (1200 * MIB, resource.RLIM_INFINITY))
        with Raw.connect(up.url) as raw:
            raw.send(hello() + header(CALL_KIND, 1500 * MIB, code=1, call_id=1))
            _, answer = raw.frames()
            assert (answer.kind, answer.call_id) == (END_KIND, 0)
            assert answer.code == Status.RESOURCE_EXHAUSTED
            assert answer.payload == b"the server is out of memory"
        assert bytes(control.echo(b"still here", timeout=2.0)) == b"still here"


@of_servers
def test_who_only_stops_sending_keeps_no_thread_busy(server: str, runtime: Path) -> None:
    """Its end-of-file shows while the server waits to write an answer that is not read."""
    with served(listen_url("pipe", runtime), server) as up, Raw.connect(up.url) as raw:
        raw.send(hello() + call(1, bytes(MIB)))
        tasks = Path(f"/proc/{up.pid}/task")

        def all_sleep() -> bool:
            states = [(one / "stat").read_text().rpartition(")")[2][1] for one in tasks.iterdir()]
            return set(states) == {"S"}

        assert isinstance(raw.stream, PipeStream)
        assert until(all_sleep)
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), raw.stream._write_fd, inheritable=False)
        for _ in range(20):
            time.sleep(0.01)
            assert all_sleep()
        _, answer = raw.frames(2)
        assert (answer.kind, len(answer.payload)) == (END_KIND, MIB)


CROWD_S = 5.0 if SANITIZED else 3.0  # below the time in which the silent are sent away
STRANGERS_MAX = 256


@of_servers
@pytest.mark.parametrize("scheme", ["unix", "tcp"])
def test_a_crowd_has_a_bound(scheme: str, server: str, runtime: Path) -> None:
    """However quickly they come: the oldest makes room before the next is let in."""
    with served(listen_url(scheme, runtime), server) as up, ExitStack() as crowd:
        most = 0
        for number in range(800):
            crowd.enter_context(Raw.connect(up.url))
            if number % 10 == 0:
                most = max(most, threads(up.pid))
        assert max(most, threads(up.pid)) <= STRANGERS_MAX + 8  # of its own, or about to end


def stranger(url: str) -> socket.socket:
    """One who knocks where peers meet, and says nothing."""
    knocking = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    knocking.connect(url.partition("://")[2])
    return knocking


@of_servers
@pytest.mark.parametrize("scheme", MEETING)
def test_a_thousand_who_never_finish_the_meeting(scheme: str, server: str, runtime: Path) -> None:
    """Row 30: nothing but a descriptor is made for each, of the newest, and who comes then is
    served at once."""
    others = sysv_objects()
    with served(listen_url(scheme, runtime), server) as up, ExitStack() as crowd:

        def shared() -> int:
            """How many rings, queues and semaphores there are for its clients."""
            rings = Path(f"/proc/{up.pid}/maps").read_text().count("/memfd:")
            return rings + len(sysv_objects() - others)

        with connect(up.url) as control:
            control.echo(b"warm")
            assert shared() > 0
        assert until(lambda: shared() == 0)
        at_first = fds(up.pid), threads(up.pid), rss_bytes(up.pid)
        silent: list[socket.socket] = []
        for _ in range(4):  # so that no more descriptors are open here than anybody may have
            silent += [crowd.enter_context(stranger(up.url)) for _ in range(250)]
            while len(silent) > STRANGERS_MAX:  # the newest are in by now, and the oldest are not
                oldest = silent.pop(0)
                assert until(partial(is_over, oldest))
                oldest.close()
        began = time.monotonic()
        with connect(up.url, timeout=SEEN_S) as bridge:
            assert bytes(bridge.echo(b"hello", timeout=SEEN_S)) == b"hello"
        assert time.monotonic() - began < SEEN_S
        assert until(lambda: shared() == 0)
        assert until(lambda: fds(up.pid) - at_first[0] <= STRANGERS_MAX + 1)
        assert until(lambda: threads(up.pid) <= at_first[1])
        if not SANITIZED:
            assert rss_bytes(up.pid) - at_first[2] < MIB


@of_servers
@over_transports
def test_ten_thousand_come_and_go(scheme: str, server: str, runtime: Path) -> None:
    """Row 27: fds, threads and memory stay what they were."""
    many = 10_000 if scheme == "unix" or FULL else 3000
    if SANITIZED and not FULL:
        many = 1000
    with served(listen_url(scheme, runtime), server) as up:
        at_first = fds(up.pid), threads(up.pid)  # the server's own

        def is_as_at_first() -> bool:
            return fds(up.pid) <= at_first[0] and threads(up.pid) <= at_first[1]

        def come_and_go(count: int) -> int:
            for number in range(count):
                with Raw.connect(up.url) as raw:
                    raw.send(hello() + call(1, b"x" * (number % 100)))
                    if number % 10 == 0:  # the others leave without a word
                        assert len(raw.frames(2)) == 2
            assert until(is_as_at_first), (at_first, fds(up.pid), threads(up.pid))
            return rss_bytes(up.pid)

        with connect(up.url) as control:
            control.echo(b"warm")
        before = come_and_go(many // 10)
        after = come_and_go(many - many // 10)
        if not SANITIZED:
            assert after - before < 8 * MIB


@of_servers
@over_transports
def test_a_hundred_clients_share_fairly(scheme: str, server: str, runtime: Path) -> None:
    """Row 27: each has its turn, max/min < 10. One loop asks all of them, so that it is the server
    that shares, and not the clients' scheduler."""
    with served(listen_url(scheme, runtime), server) as up, ExitStack() as crowd:
        raws = [crowd.enter_context(Raw.connect(up.url)) for _ in range(100)]
        for raw in raws:
            raw.send(hello())
            assert len(raw.frames(1)) == 1
            raw.send(call(1, b"x"))
        answers = [0] * len(raws)
        buffer = memoryview(bytearray(MIB))
        end_s = time.monotonic() + 2.0
        while time.monotonic() < end_s:
            for at, raw in enumerate(raws):
                if raw.stream.try_read(buffer) > 0:  # one short answer, whole
                    answers[at] += 1
                    raw.send(call(answers[at] + 1, b"x"))
            time.sleep(0.0005)  # the servers have the cores too
        assert min(answers) * 10 > max(answers)


@of_servers
@over_transports
def test_a_crowd_that_never_says_hello(scheme: str, server: str, runtime: Path) -> None:
    with served(listen_url(scheme, runtime), server) as up, ExitStack() as crowd:
        for _ in range(1000 if FULL else 300):
            crowd.enter_context(Raw.connect(up.url))
        began = time.monotonic()
        with connect(up.url, timeout=CROWD_S) as bridge:
            assert bytes(bridge.echo(b"hello", timeout=CROWD_S)) == b"hello"
        assert time.monotonic() - began < CROWD_S


def test_who_never_says_hello_is_dropped(tmp_path: Path) -> None:
    """After 5 s, be it before or after the meeting; all servers wait at the same time."""
    with ExitStack() as running:
        silent: list[Raw] = []
        strangers: list[socket.socket] = []
        for language in LANGUAGES:
            for scheme in FRAMED:
                directory = tmp_path / language
                directory.mkdir(exist_ok=True)
                up = running.enter_context(served(listen_url(scheme, directory), language))
                silent.append(running.enter_context(Raw.connect(up.url)))
                silent[-1].send(hello()[:10])  # a part of one is none
                if scheme in MEETING:
                    strangers += [running.enter_context(stranger(up.url)) for _ in range(10)]
        began = time.monotonic()
        for raw in silent:
            left = 5 + SEEN_S - (time.monotonic() - began)
            raw.frames(seconds=max(0.0, left))
            assert raw.ended
        for one in strangers:
            one.settimeout(max(0.1, 5 + SEEN_S - (time.monotonic() - began)))
            assert one.recv(1) == b""
        assert time.monotonic() - began > 3.0


# --- what it costs ---


@pytest.mark.parametrize("wait", ["block", "adaptive"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_who_idles_costs_nothing(language: str, wait: str, tmp_path: Path) -> None:
    """Neither a server nor a client, between two calls or in one that waits."""
    query = f"?wait={wait}"
    with ExitStack() as running:
        clients: dict[str, Client] = {}
        pids: dict[str, int] = {}
        for scheme in FRAMED:
            up = running.enter_context(Server(language, listen_url(scheme, tmp_path) + query))
            client = clients[scheme] = running.enter_context(Client(language, up.url + query))
            client.do(op="echo", size=4)
            pids |= {f"server of {scheme}": up.pid, f"client of {scheme}": client.pid}

        def in_calls() -> dict[str, float]:
            for client in clients.values():
                client.send(op="call", method=11, seconds=60.0, timeout=2.0)
            found = busy(pids)
            for client in clients.values():
                assert client.receive()["status"] == "DEADLINE_EXCEEDED"
            return found

        for look in (partial(busy, pids), in_calls):
            # A busy machine delays what led there until it seems to come from idling.
            assert {} in (look() for _ in range(3)), look()


def busy(pids: dict[str, int]) -> dict[str, float]:
    """Who of them uses CPU to speak of, and how much."""
    time.sleep(0.1)
    before = {name: cpu_s(pid) for name, pid in pids.items()}
    time.sleep(1.0)
    used = {name: cpu_s(pids[name]) - old for name, old in before.items()}
    return {name: used_s for name, used_s in used.items() if used_s > 0.02}


@pytest.mark.parametrize("window", [1, WINDOW_BYTES, 64 * MIB], ids=["1B", "4MiB", "64MiB"])
def test_a_reader_that_stops_costs_its_window_at_most(host: Host, window: int) -> None:
    with connect(host.url) as bridge:  # so that what is kept for good is there already
        for _ in bridge.stream(500, 64 << 10):
            pass
    before = rss_bytes(host.pid)
    with Raw.connect(host.url) as raw:
        raw.send(hello(window=window) + stream_call(1, 10**9, 64 << 10))
        peak = 0
        for _ in range(20):
            time.sleep(0.02)
            peak = max(peak, rss_bytes(host.pid))
        host.check("during")
    if not SANITIZED:  # which keeps what was freed
        assert peak - before < window + 8 * MIB
