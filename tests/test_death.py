"""Peers that die or stop, on either end: rows 14 to 18 of the conformance table."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import pytest

from hosts import ENDLESS, SEEN_S, Host, of_clients, of_servers, over_transports
from ipc_bridge import connect
from peer_support import (
    client,
    ended,
    kill,
    peer,
    run_client,
    served,
    stdio_url,
)
from probe_support import SMALL, Client, Peers, elapsed, of_each_language
from processes import (
    cpu_s,
    fds,
    only_child,
    sleeps,
    state,
    stopped,
    threads,
)
from support import FRAMED, LANGUAGES, SLOW, Exit, check_late, fixed_url, listen_url, until

pytestmark = pytest.mark.usefixtures("nothing_left")

# --- row 14: the server dies ---

PACES = {
    "waiting": ("--count", ENDLESS, "--size", "16", "--rate", "1"),
    "in-mid-stream": ("--count", ENDLESS, "--size", "1024"),
}


@pytest.mark.parametrize("pace", PACES)
@of_servers
@of_clients
@pytest.mark.parametrize("scheme", [*FRAMED, "stdio"])
def test_the_server_is_killed(
    scheme: str, caller: str, server: str, pace: str, tmp_path: Path
) -> None:
    with ExitStack() as running:
        if scheme == "stdio":
            url = stdio_url(server)
        else:
            up = running.enter_context(served(listen_url(scheme, tmp_path), server))
            url, pid = up.url, up.pid
        process = running.enter_context(client(caller, "stream", url, *PACES[pace]))
        if scheme == "stdio":
            pid = only_child(process.pid)
        assert until(lambda: threads(pid) > 1)
        if pace == "waiting":
            assert until(lambda: sleeps(process.pid))
        else:
            used = cpu_s(pid)
            assert until(lambda: cpu_s(pid) > used + 0.03)  # far more than filling a window takes
        assert process.poll() is None
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        assert ended(process) == Exit.UNAVAILABLE
        assert time.monotonic() - began < SEEN_S + 1.0 * SLOW  # for the program to leave, too


def test_the_server_is_killed_in_mid_call(
    transport: str, pairing: tuple[str, str], tmp_path: Path
) -> None:
    with closing(Peers(transport, pairing, tmp_path)) as peers:
        client = peers.start()
        call_and_kill(peers, client)


@pytest.mark.parametrize("wait", ["spin", "block"])
@of_clients
@pytest.mark.parametrize("scheme", ["shm", "sysv-queue", "sysv-shm"])
def test_the_server_is_killed_however_one_waits(
    scheme: str, caller: str, wait: str, tmp_path: Path
) -> None:
    """Who spins has to look at the life-line, too; who blocks, wherever it does, to be woken."""
    (server,) = set(LANGUAGES) - {caller}
    with closing(Peers(scheme, (caller, server), tmp_path)) as peers:
        peers.serve()
        peers.url += f"?wait={wait}"
        call_and_kill(peers, peers.connect(), wait)


def call_and_kill(peers: Peers, client: Client, wait: str = "adaptive") -> None:
    """The server is killed once the client waits for an answer."""
    client.do(op="echo", size=1)
    used = cpu_s(client.pid)
    client.send(op="call", method=11, seconds=60.0)
    if wait == "spin":
        assert until(lambda: cpu_s(client.pid) > used + 0.1)
    else:
        assert until(lambda: sleeps(client.pid))
    began = time.monotonic()
    peers.kill_server(client)
    assert client.receive(SEEN_S)["status"] == "UNAVAILABLE"
    assert time.monotonic() - began < SEEN_S


@over_transports
@of_servers
def test_the_server_is_killed_under_a_client_object(
    scheme: str, server: str, tmp_path: Path
) -> None:
    """Row 18 too: what comes to life at the address later answers no call of the old connection."""
    with fixed_url(scheme, tmp_path) as url, ExitStack() as running:
        with served(url, server) as first:
            clients = running.enter_context(of_each_language(url))
            kill(first.process)
        check_restarted(url, server, clients)


@over_transports
@of_servers
def test_the_server_is_restarted_under_a_client_object(
    scheme: str, server: str, runtime: Path
) -> None:
    with fixed_url(scheme, runtime) as url, ExitStack() as running:
        with served(url, server):
            clients = running.enter_context(of_each_language(url))
        check_restarted(url, server, clients)


def check_restarted(url: str, server: str, clients: list[Client]) -> None:
    """A new server at the address is nothing to those of the old one; who comes is served."""
    with served(url, server) as second:
        assert second.url == url
        for old in clients:
            status = old.ask(op="echo", size=SMALL, seed=1, timeout=2.0).get("status")
            assert status == "UNAVAILABLE", old.popen.args
        with connect(url, timeout=1.0) as fresh:
            assert bytes(fresh.echo(b"new", timeout=1.0)) == b"new"


# --- rows 15 and 16: the client dies (the fixture sees that its fds and threads come back) ---

HALF_A_CALL = """
import sys
from raw import CALL_KIND, Raw, header, hello
raw = Raw.connect(sys.argv[1])
raw.send(hello() + header(CALL_KIND, 1 << 20, code=1, call_id=1) + bytes(1 << 19))
print("sent", flush=True)
sys.stdin.read()
"""


def test_the_client_is_killed_in_mid_request(host: Host) -> None:
    before = fds(host.pid)
    pipe = subprocess.PIPE
    words = [sys.executable, "-c", HALF_A_CALL, host.url]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=environment)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "sent\n"
        assert until(lambda: fds(host.pid) > before)
        host.check("during")
    finally:
        kill(process)


@of_clients
def test_the_client_is_killed_in_mid_stream(host: Host, caller: str) -> None:
    before = fds(host.pid)
    used = cpu_s(host.pid)
    with client(caller, "stream", host.url, *PACES["in-mid-stream"]) as process:
        assert until(lambda: fds(host.pid) > before)
        assert until(lambda: cpu_s(host.pid) > used + 0.05)
        host.check("during")
        assert process.poll() is None
        process.kill()


@of_servers
@of_clients
def test_a_stdio_server_goes_with_its_client(caller: str, server: str) -> None:
    with client(caller, "stream", stdio_url(server), *PACES["waiting"]) as process:
        child = only_child(process.pid)
        process.kill()
        assert until(lambda: state(child) in "ZX", SEEN_S)


CRASHES = [("write", number) for number in range(1, 4)] + [("own", number) for number in (1, 2)]
WRITES = "?sendto,?sendmsg,?writev,?write"  # with ? for what this machine does not have
OWN_CALLS = {  # by which no other transport arrives or writes
    "pipe": "?mknod,?mknodat,?unlink,?unlinkat",
    "sysv-queue": "?msgsnd",
    "sysv-shm": "?semop,?semtimedop",
}


@of_clients
@pytest.mark.parametrize(("step", "number"), CRASHES)
def test_the_client_is_killed_at_each_step(host: Host, caller: str, step: str, number: int) -> None:
    calls = WRITES if step == "write" else OWN_CALLS.get(host.scheme)
    if calls is None:
        pytest.skip("it has no calls of its own")
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is missing")
    inject = f"inject={calls}:signal=KILL:when={number}"
    options = ["-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}", "-e", inject]
    words = ["echo", host.url, "--payload", "hello", "--count", "2"]
    done = subprocess.run(
        [strace, *options, *peer(caller), *words], capture_output=True, text=True, timeout=20
    )
    if "ptrace" in done.stderr.lower():
        pytest.skip(f"strace cannot trace here: {done.stderr.strip()}")
    killed = done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)
    # (shm: only who sleeps is woken by a system call. The steps of its ring are in test_ring.cpp.)
    few = number > 2 or host.scheme == "shm"
    assert killed or (few and done.returncode == 0), done.stderr
    with connect(host.url) as fresh:
        assert bytes(fresh.echo(b"fresh", timeout=5.0)) == b"fresh"


# --- row 17: somebody stops ---


def test_a_deadline_holds_against_a_stopped_server(host: Host) -> None:
    with of_each_language(host.url) as clients:
        with stopped(host.pid):
            for client in clients:
                check_late(
                    0.4, partial(elapsed, client, op="echo", size=SMALL, seed=1, timeout=0.4)
                )
        for client in clients:  # it says whether this is the answer to the call before
            client.do(op="echo", size=SMALL, seed=2, timeout=5.0)


@of_clients
def test_a_stopped_server_is_not_waited_for(host: Host, caller: str) -> None:
    words = ("echo", host.url, "--payload", "hello", "--timeout")
    with stopped(host.pid):
        began = time.monotonic()
        assert run_client(caller, "--version") == 0
        starts_s = time.monotonic() - began  # on a busy machine a program takes long to start
        began = time.monotonic()
        assert run_client(caller, *words, "0.4") == Exit.UNAVAILABLE
        assert time.monotonic() - began < 2 * starts_s + 0.4 + 1.0
    assert run_client(caller, *words, "2") == 0


@of_clients
def test_a_server_that_stops_in_mid_stream(host: Host, caller: str) -> None:
    before = fds(host.pid)
    words = ("--count", ENDLESS, "--size", "16", "--rate", "50", "--timeout", "0.5")
    with client(caller, "stream", host.url, *words) as process:
        assert until(lambda: fds(host.pid) > before)
        with stopped(host.pid):
            began = time.monotonic()
            assert ended(process) in (Exit.DEADLINE_EXCEEDED, Exit.UNAVAILABLE)
            assert time.monotonic() - began < 0.5 + 5.0 * SLOW  # else for ever


@of_clients
def test_a_stopped_client_disturbs_nobody(host: Host, caller: str) -> None:
    used = cpu_s(host.pid)
    count = 1_000_000 if caller == "cpp" else 200_000  # or it may be done before it is stopped
    words = ("--count", str(count), "--size", "1024")
    with client(caller, "stream", host.url, *words) as process:
        assert until(lambda: cpu_s(host.pid) > used)
        with stopped(process.pid):
            for _ in range(20):
                host.check("during")
            assert until(lambda: sleeps_all(host.pid)), "the server spins"
        assert ended(process) == 0


def sleeps_all(pid: int) -> bool:
    """Does it use no CPU to speak of?"""
    before = cpu_s(pid)
    time.sleep(0.2)
    return cpu_s(pid) - before <= 0.02
