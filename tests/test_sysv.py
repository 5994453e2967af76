"""What only System V transports can suffer: ipcrm, limits of the machine, and objects of the dead.

Rows 16, 19, 25 and 26 of the conformance table. The namespace of this run is private where root is
at hand (conftest), so that limits can be set; elsewhere those tests are skipped.
"""

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import sysv_ipc

from hosts import needs_root, of_clients
from ipc_bridge import CallError, Error, Status, connect
from ipc_bridge.transports import sysv_watcher
from peer_support import client, kill, peer, run_client, served
from probe_support import Client, Peers, Server
from processes import (
    children,
    cpu_s,
    enter_private_ipc,
    sleeps,
    state,
    stopped,
    sysv_objects,
    threads,
)
from support import LANGUAGES, PAIRINGS, SANITIZED, SLOW, Exit, listen_url, until

SCHEMES = ("sysv-queue", "sysv-shm")
SEEN_S = 1.0 * SLOW
SHM_DEST = 0o1000  # of a segment's mode: it goes with its last user, shmctl(2)

over_schemes = pytest.mark.parametrize("scheme", SCHEMES)
of_servers = pytest.mark.parametrize("server", LANGUAGES)


def find(entry: str) -> Any:
    """One of `sysv_objects`, by its key."""
    kind, key, _ = entry.split()
    made = {"msg": sysv_ipc.MessageQueue, "sem": sysv_ipc.Semaphore}[kind]
    return made(int(key, 0))


def remove(entry: str) -> None:
    """As ipcrm(1) does, which takes long to start on a busy machine."""
    find(entry).remove()


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = sysv_objects()
    yield
    assert until(lambda: sysv_objects() <= before, SEEN_S), sysv_objects() - before


class Witness(sysv_watcher.Watched):
    """Is watched, and notes when it is told that its peer has gone."""

    told = False

    def on_gone(self) -> bool:
        self.told = True
        return True


def test_an_event_of_a_closed_descriptor_ends_nobody_else() -> None:
    """It may reach the watcher when its number is that of another life-line already."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        witness = Witness(ours)
        watcher = sysv_watcher.watch(witness)
        with sysv_watcher._changes:
            watcher._tell_gone(ours.fileno())
        assert not witness.told
        theirs.close()
        assert until(lambda: witness.told, SEEN_S)
        sysv_watcher.unwatch(witness)


def test_without_a_thread_for_the_watcher_a_client_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Row 25: a typed error, which the server tells its client; and it goes on."""

    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    ours, theirs = socket.socketpair()
    with ours, theirs:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", none)
            with pytest.raises(Error, match="RESOURCE_EXHAUSTED: no further thread"):
                sysv_watcher.watch(Witness(ours))
        witness = Witness(ours)
        sysv_watcher.watch(witness)
        sysv_watcher.unwatch(witness)


@needs_root
@over_schemes
@of_servers
def test_objects_that_are_closed_to_their_owner(scheme: str, server: str, tmp_path: Path) -> None:
    """Row 24: a peer of the same user takes all rights from them. The server neither spins nor
    sleeps for ever, and nothing stays once that client has gone."""
    place = Path("/tmp") / f"ipc-bridge-{scheme}-{os.getpid()}"
    place.mkdir()
    os.chmod(place, 0o777)
    try:
        url = f"{scheme}://{place}/s"
        words = ("stream", url, "--count", "1000", "--size", "10", "--rate", "2")
        with served(url, server, nobody=True) as up:
            quiet, before = threads(up.pid), sysv_objects()
            with client("cpp", *words, nobody=True) as process:
                assert until(lambda: len(sysv_objects() - before) >= 2)
                assert until(lambda: sleeps(process.pid))
                os.kill(process.pid, signal.SIGSTOP)  # else it would see to it, and leave
                assert until(lambda: state(process.pid) == "T")
                for one in sysv_objects() - before:
                    if not one.startswith("shm"):  # marked for removal, it has no key any more
                        find(one).mode = 0
                used = cpu_s(up.pid)
                kill(process)
                assert until(lambda: sysv_objects() <= before, 2 * SEEN_S), "objects stay"
                assert until(lambda: threads(up.pid) <= quiet, SEEN_S), "the thread stays"
                assert cpu_s(up.pid) - used < 0.3 * SLOW
            assert run_client("cpp", "echo", url, "--payload", "x", nobody=True) == 0
    finally:
        shutil.rmtree(place)


@over_schemes
@of_servers
@pytest.mark.parametrize("caller", LANGUAGES)
def test_ipcrm_of_live_objects(scheme: str, server: str, caller: str, tmp_path: Path) -> None:
    """Row 26: whichever is removed under calls, UNAVAILABLE within 1 s; and the next
    client is served."""
    before = sysv_objects()
    with served(listen_url(scheme, tmp_path), server) as up:
        count = 2 if scheme == "sysv-queue" else 4
        for index in range(count):
            words = ("echo", up.url, "--payload", "hello", "--count", "1000000000")
            process = subprocess.Popen(
                [*peer(caller), *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            assert until(lambda: len(sysv_objects() - before) >= count, 10.0)
            time.sleep(0.1)  # the case itself: calls are on their way
            mine = sorted(one for one in sysv_objects() - before if not one.startswith("shm"))
            began = time.monotonic()
            remove(mine[index])
            _, errors = process.communicate(timeout=10)
            assert time.monotonic() - began < SEEN_S
            assert process.returncode == Exit.UNAVAILABLE, errors
        with connect(up.url) as bridge:
            assert bytes(bridge.echo(b"next", timeout=5.0)) == b"next"


@over_schemes
@pytest.mark.parametrize("moment", ["idle", "reading", "writing", "unread"])
@of_clients
def test_ipcrm_at_any_moment(scheme: str, moment: str, caller: str, runtime: Path) -> None:
    """Row 26: whichever is removed, also while neither peer can notice by itself: the server stands
    still, or has to wait for a client that does not read. (The server's language makes no
    difference here; the segment has no name left that ipcrm could remove.)"""
    (server,) = set(LANGUAGES) - {caller}
    quiet = sysv_objects()
    with closing(Peers(scheme, (caller, server), runtime)) as peers:
        peers.serve()
        clients, targets = [], []
        for index in range(2 if scheme == "sysv-queue" else 4):
            before = sysv_objects()
            clients.append(peers.connect())
            clients[-1].do(op="echo", size=1)
            targets.append(sorted(sysv_objects() - before)[index])  # a further one of each
        assert peers.server is not None
        with stopped(peers.server.pid) if moment in ("reading", "writing") else nullcontext():
            for client in clients:
                if moment == "unread":
                    pause = {"pause_at": 1, "pause_s": 2 * SEEN_S}
                    client.send(op="stream", count=10**6, size=4096, **pause)
                elif moment != "idle":
                    client.send(op="echo", size=1 if moment == "reading" else 1 << 20)
            time.sleep(0.1)  # the case itself: the calls are on their way, and get no further
            for target in targets:
                remove(target)
            if moment in ("reading", "writing"):
                began = time.monotonic()
                assert {one.receive(SEEN_S)["status"] for one in clients} == {"UNAVAILABLE"}
                assert time.monotonic() - began < SEEN_S
        assert until(lambda: sysv_objects() <= quiet, SEEN_S)
        if moment == "idle":
            for client in clients:
                client.send(op="echo", size=1)
        if moment in ("idle", "unread"):
            assert {one.receive()["status"] for one in clients} == {"UNAVAILABLE"}
        peers.check_others()


@pytest.mark.parametrize("error", ["EIDRM", "EINVAL"])
@pytest.mark.parametrize("call", ["msgctl", "semctl", "shmctl", "shmat"])
@of_clients
def test_ipcrm_while_a_client_arrives(caller: str, call: str, error: str, runtime: Path) -> None:
    """Row 26: what it has found by its key is gone when it looks whose it is, or attaches it."""
    scheme = "sysv-queue" if call == "msgctl" else "sysv-shm"
    with served(listen_url(scheme, runtime), "cpp") as up:
        words = [*peer(caller), "echo", up.url, "--payload", "x", "--timeout", "5"]
        tracer = injecting(call, f"error={error}:when=1")
        done = subprocess.run([*tracer, *words], capture_output=True, text=True, timeout=30)
        assert done.returncode == Exit.UNAVAILABLE, done.stderr
        assert "the server's objects are not here" in done.stderr
        with connect(up.url, timeout=2.0) as bridge:
            assert bytes(bridge.echo(b"next", timeout=2.0)) == b"next"


@pytest.mark.parametrize(("server", "call", "number"), [("cpp", "shmat", 1), ("py", "semget", 5)])
def test_ipcrm_while_a_server_makes(server: str, call: str, number: int, runtime: Path) -> None:
    """Row 26: one is gone as the server opens it. Its client is told so, the next is served."""
    error = "EINVAL" if call == "shmat" else "ENOENT"
    words = [*peer(server), "serve", listen_url("sysv-shm", runtime)]
    tracer = injecting(call, f"error={error}:when={number}")
    process = subprocess.Popen([*tracer, *words], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        _, url = process.stdout.readline().split()
        assert run_client("cpp", "echo", url, "--payload", "x") == Exit.UNAVAILABLE
        assert run_client("cpp", "echo", url, "--payload", "x") == 0
    finally:
        for pid in children(process.pid):
            os.kill(pid, signal.SIGTERM)
        process.communicate(timeout=20)
    assert process.returncode == 0


def injecting(calls: str, what: str) -> list[str]:
    """Before a program's words: strace(1), which does that to some of its system calls."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is missing")
    quiet = ["-f", "-qq", "-o", "/dev/null"]
    if SANITIZED:  # LeakSanitizer cannot work below another tracer
        quiet += ["-E", f"ASAN_OPTIONS={os.environ.get('ASAN_OPTIONS', '')}:detect_leaks=0"]
    return [strace, *quiet, "-e", f"trace={calls}", "-e", f"inject={calls}:{what}"]


@pytest.mark.parametrize("pairing", PAIRINGS, ids="-".join)
def test_the_segment_is_marked_once_both_have_it(pairing: tuple[str, str], runtime: Path) -> None:
    """It has no name then, ipcrm changes nothing, and the kernel removes it with its last user,
    however both go."""
    with ExitStack() as killed:
        up = Server(pairing[1], listen_url("sysv-shm", runtime))
        killed.callback(up.kill)
        client = Client(pairing[0], up.url)
        killed.callback(client.kill)
        client.do(op="echo", size=1)
        assert segments_of(up.pid) == [(0, SHM_DEST | 0o600, 2)]
        (number,) = (one["shmid"] for one in segments() if int(one["cpid"]) == up.pid)
        subprocess.run(["ipcrm", "-m", number], check=True)
        client.do(op="echo", size=1 << 20)
        client.signal(signal.SIGSTOP)  # so that it does not leave by itself
        assert until(lambda: state(client.pid) == "T")
        up.kill()
        assert segments_of(up.pid) == [(0, SHM_DEST | 0o600, 1)]
        client.kill()
        assert segments_of(up.pid) == []
    with served(listen_url("sysv-shm", runtime), "cpp"):
        pass  # it takes what the others have left: semaphores, and files


def segments() -> list[dict[str, str]]:
    """All there are, proc(5)."""
    first, *lines = Path("/proc/sysvipc/shm").read_text().splitlines()
    return [dict(zip(first.split(), line.split(), strict=False)) for line in lines]


def segments_of(pid: int) -> list[tuple[int, int, int]]:
    """Of those that a process has made: the key, the mode, and how many have it attached."""
    mine = [one for one in segments() if int(one["cpid"]) == pid]
    return [(int(one["key"]), int(one["perms"], 8), int(one["nattch"])) for one in mine]


@over_schemes
@of_servers
@pytest.mark.parametrize("successor", LANGUAGES)
def test_objects_of_the_dead_are_reclaimed(
    scheme: str, server: str, successor: str, tmp_path: Path
) -> None:
    """Row 19: of this address's dead servers; what no journal names is left alone."""
    before = sysv_objects()
    foreign = subprocess.run(["ipcmk", "-Q"], check=True, capture_output=True, text=True)
    with served(listen_url(scheme, tmp_path), server) as first:
        words = [*peer("cpp"), "stream", first.url, "--count", "1000000000", "--size", "64"]
        client = subprocess.Popen([*words, "--rate", "100"], stderr=subprocess.DEVNULL)
        assert until(lambda: len(sysv_objects() - before) >= 2, 10.0)
        time.sleep(0.1)
        os.kill(client.pid, signal.SIGSTOP)  # so that it removes nothing
        kill(first.process)
        client.kill()
        client.wait()
        left = sysv_objects() - before
        assert left, "nothing was left: the test tests nothing"
    with served(listen_url(scheme, tmp_path), successor) as second:
        assert sysv_objects() - before == set()
        with connect(second.url) as bridge:
            assert bytes(bridge.echo(b"second", timeout=5.0)) == b"second"
    assert os.listdir(tmp_path) == []
    number = foreign.stdout.split()[-1]
    assert subprocess.run(["ipcrm", "-q", number], check=False).returncode == 0


CALLS = {  # which make them, and which write
    "sysv-queue": ("?msgget", "?msgsnd"),
    "sysv-shm": ("?semget,?shmget", "?semop,?semtimedop"),
}
CRASHES = [
    (scheme, call, number) for scheme in CALLS for call in CALLS[scheme] for number in (1, 2)
] + [(scheme, "?pwrite64", 1) for scheme in CALLS]  # (each thread's calls count apart)
CRASHES += [  # once there is something to read; and half-way through making, or removing
    ("sysv-queue", "?msgrcv", 2),
    ("sysv-queue", "?msgctl", 2),
    ("sysv-shm", "?semctl", 2),
]


@pytest.mark.parametrize(("scheme", "calls", "number"), CRASHES)
@of_servers
def test_a_server_killed_while_it_makes_or_uses_them(
    scheme: str, server: str, calls: str, number: int, tmp_path: Path
) -> None:
    """Row 16: whatever was made until then, the next server removes."""
    before = sysv_objects()
    url = listen_url(scheme, tmp_path)
    tracer = injecting(calls, f"signal=KILL:when={number}")
    first = subprocess.Popen(
        [*tracer, *peer(server), "serve", url], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert first.stdout is not None
    assert first.stdout.readline().startswith(b"ready")
    run_client("py", "echo", url, "--payload", "x", "--timeout", "0.5")
    first.communicate(timeout=20)
    with served(url, "cpp" if server == "py" else "py") as up:
        assert sysv_objects() - before == set()
        with connect(up.url) as bridge:
            assert bytes(bridge.echo(b"next", timeout=5.0)) == b"next"
    assert os.listdir(tmp_path) == []


@contextmanager
def limits(**values: str) -> Iterator[None]:
    """Limits of this run's own namespace, proc(5)."""
    if not enter_private_ipc():
        pytest.skip("only root can have a namespace with limits of its own")
    paths = {Path(f"/proc/sys/kernel/{name}"): value for name, value in values.items()}
    before = {path: path.read_text() for path in paths}
    try:
        for path, value in paths.items():
            path.write_text(value)
        yield
    finally:
        for path, value in before.items():
            path.write_text(value)


@pytest.mark.parametrize(
    ("scheme", "limit"),
    [
        ("sysv-queue", {"msgmni": "1"}),
        ("sysv-shm", {"sem": "32000 1024000000 500 3"}),
        ("sysv-shm", {"shmmni": "0"}),
        ("sysv-shm", {"shmmax": "4096"}),
    ],
    ids=["msgmni", "semmni", "shmmni", "shmmax"],
)
@of_servers
def test_limits_reached_at_set_up(
    scheme: str, limit: dict[str, str], server: str, tmp_path: Path
) -> None:
    """Row 25: RESOURCE_EXHAUSTED; the server goes on, and recovers."""
    with limits(), served(listen_url(scheme, tmp_path), server) as up:
        with limits_now(limit), pytest.raises(Error) as caught:
            connect(up.url, timeout=1.0)
        assert caught.value.status == Status.RESOURCE_EXHAUSTED
        assert sysv_objects() == set()
        with connect(up.url) as bridge:
            assert bytes(bridge.echo(b"again", timeout=5.0)) == b"again"


@contextmanager
def limits_now(values: dict[str, str]) -> Iterator[None]:
    before = {name: Path(f"/proc/sys/kernel/{name}").read_text() for name in values}
    try:
        for name, value in values.items():
            Path(f"/proc/sys/kernel/{name}").write_text(value)
        yield
    finally:
        for name, value in before.items():
            Path(f"/proc/sys/kernel/{name}").write_text(value)


@of_servers
@pytest.mark.parametrize("caller", LANGUAGES)
def test_a_large_payload_through_a_tiny_queue(server: str, caller: str, tmp_path: Path) -> None:
    with limits(msgmnb="64", msgmax="48"), served(listen_url("sysv-queue", tmp_path), server) as up:
        big = tmp_path / "big"
        big.write_text(os.urandom(50_000).hex())
        assert run_client(caller, "echo", up.url, "--payload", f"@{big}", "--timeout", "60") == 0


@over_schemes
@of_servers
def test_nothing_unread_is_lost_when_the_server_leaves(
    scheme: str, server: str, tmp_path: Path
) -> None:
    """A reply that is complete when the server goes is read afterwards, and what it lay in is gone
    though nobody reads."""
    before = sysv_objects()
    with served(listen_url(scheme, tmp_path), server) as up:
        bridge = connect(up.url)
        items = bridge.stream(5, 100, rate_hz=1000.0)
        time.sleep(0.2)  # all five, and the end, lie in the client's queue
        up.process.terminate()
        up.process.wait(5)
        assert until(lambda: sysv_objects() <= before, SEEN_S)
        assert len([bytes(item) for item in items]) == 5
        with pytest.raises(CallError):
            bridge.echo(b"late", timeout=5.0)
        bridge.close()
