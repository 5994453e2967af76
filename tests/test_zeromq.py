"""What is ZeroMQ's own: a stranger's client, a stalled one, keys, forks, and two hosts.

The stranger is written from FRAME.md alone: this file's upper half imports pyzmq and nothing of
this project.
"""

import contextlib
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

# --- a stranger's client: FRAME.md says all that it knows ---

HEADER = struct.Struct("<IBBHII")
HELLO, CALL, ITEM, END, CREDIT = 1, 2, 3, 4, 5


class Stranger:
    """A DEALER. What it sends is whole frames; what it gets it joins."""

    def __init__(self, endpoint: str, window: int = 1 << 16, messages_max: int = 1000) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.dealer = self.context.socket(zmq.DEALER)
        self.dealer.linger = 0
        self.dealer.rcvtimeo = 5000
        self.dealer.rcvhwm = messages_max  # that its libzmq reads ahead of it
        self.dealer.connect(endpoint)
        self.input = b""
        self.calls = 0
        hello = b"IPCB" + struct.pack("<I", 1 << 20)
        self.dealer.send(HEADER.pack(8, HELLO, 0, 1, 0, window) + hello)
        kind, code, _, _, payload = self.frame()
        assert (kind, code, payload[:4]) == (HELLO, 1, b"IPCB")

    def frame(self) -> tuple[int, int, int, int, bytes]:
        """The next one: kind, code, call_id, value, payload."""
        while len(self.input) < 16 or len(self.input) < 16 + HEADER.unpack_from(self.input)[0]:
            message = b"".join(self.dealer.recv_multipart())
            assert message, "an empty message: the server has ended the session"
            self.input += message
        size, kind, _, code, call_id, value = HEADER.unpack_from(self.input)
        payload, self.input = self.input[16 : 16 + size], self.input[16 + size :]
        return kind, code, call_id, value, payload

    def call(self, method: int, payload: bytes, flags: int = 0) -> None:
        self.calls += 1
        self.dealer.send_multipart(  # a header and its payload may be two parts
            (HEADER.pack(len(payload), CALL, flags, method, self.calls, 0), payload)
        )

    def echo(self, payload: bytes) -> bytes:
        self.call(1, payload)
        kind, code, call_id, _, reply = self.frame()
        assert (kind, code, call_id) == (END, 0, self.calls)
        return reply

    def credit(self, count: int) -> None:
        self.dealer.send(HEADER.pack(0, CREDIT, 0, 0, self.calls, count))

    def close(self) -> None:
        self.dealer.close()
        self.context.term()


# --- from here on with the project's own tools ---

from ipc_bridge import Error, Status, connect  # noqa: E402
from ipc_bridge.harness.curve_keys import make_keys  # noqa: E402
from peer_support import GONE_S, NOBODY, client, peer, run_client, served  # noqa: E402
from probe_support import Client, Server  # noqa: E402
from processes import cpu_s, fds, rss_bytes, sleeps, status_field, stopped  # noqa: E402
from support import (  # noqa: E402
    ANSWER_S,
    LANGUAGES,
    MIB,
    READY_S,
    SANITIZED,
    Exit,
    check_late,
    read_line,
    until,
)

SCHEMES = ("zmq+ipc", "zmq+tcp")
of_servers = pytest.mark.parametrize("server", LANGUAGES)
of_clients = pytest.mark.parametrize("caller", LANGUAGES)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
over_both = pytest.mark.parametrize("scheme", SCHEMES)
FLOOD = """
import sys; sys.path[:] = {path!r}
from test_zeromq import Stranger
caller = Stranger(sys.argv[1].removeprefix("zmq+"))
while True:
    caller.credit(1)
"""
# Messages that a server is busy with for a while.
LEFT = {"cpp": 60_000, "py": 4_000}
# Without keys on one end: who of the two hangs up first decides whether the client hears why.
NO_HANDSHAKE = (Exit.UNAUTHENTICATED, Exit.UNAVAILABLE)


def address(scheme: str, directory: Path) -> str:
    return f"{scheme}://127.0.0.1:0" if scheme.endswith("tcp") else f"{scheme}://{directory}/z"


@contextlib.contextmanager
def stranger(url: str, window: int = 1 << 16, messages_max: int = 1000) -> Iterator[Stranger]:
    made = Stranger(url.removeprefix("zmq+"), window, messages_max)
    try:
        yield made
    finally:
        made.close()


@of_servers
@over_both
def test_a_strangers_client_works(scheme: str, server: str, tmp_path: Path) -> None:
    asked = b"\x08\xe8\x07\x10\x40"  # a StreamRequest: count 1000, size 64
    with served(address(scheme, tmp_path), server) as up, stranger(up.url, 4096) as caller:
        assert caller.echo(b"hello") == b"hello"
        assert caller.echo(bytes(100_000)) == bytes(100_000)
        caller.call(2, asked, flags=1)
        for index in range(1000):
            kind, _, call_id, value, payload = caller.frame()
            assert (kind, call_id, value, len(payload)) == (ITEM, 3, index, 64)
            caller.credit(80)
        assert caller.frame()[:3] == (END, 0, 3)
        assert caller.echo(b"") == b""


@of_servers
@over_both
def test_a_client_is_told_of_its_end_and_may_not_go_on(
    scheme: str, server: str, tmp_path: Path
) -> None:
    """A ROUTER cannot hang up: what comes after is not taken for a new client's."""
    with served(address(scheme, tmp_path), server) as up, stranger(up.url) as caller:
        caller.dealer.send(HEADER.pack(0, 9, 0, 0, 0, 0))
        kind, code, call_id, _, text = caller.frame()
        assert (kind, code, call_id) == (END, Status.INTERNAL, 0)
        assert text
        assert caller.dealer.recv_multipart() == [b""]
        caller.dealer.send(HEADER.pack(8, HELLO, 0, 1, 0, 1) + b"IPCB" + bytes(4))
        caller.dealer.rcvtimeo = 200
        with pytest.raises(zmq.Again):
            caller.dealer.recv()


@of_servers
@over_both
def test_a_stalled_client_costs_its_window_and_nobody_else_an_item(
    scheme: str, server: str, tmp_path: Path
) -> None:
    """A ROUTER drops without a word above its high-water mark; there is none, and credit bounds."""
    with served(address(scheme, tmp_path), server) as up:
        with connect(up.url) as bridge:  # so that what is kept for good is there already
            assert sum(1 for _ in bridge.stream(1000, 64)) == 1000
        before = rss_bytes(up.pid)
        words = ("--count", str(10**9), "--size", "65536", "--window", "8MiB")
        with client("cpp", "stream", up.url, *words) as stalled:
            assert until(lambda: rss_bytes(up.pid) > before)
            with stopped(stalled.pid):
                for caller in LANGUAGES:
                    items = ("--count", "100000", "--size", "64")
                    assert run_client(caller, "stream", up.url, *items) == 0
                assert rss_bytes(up.pid) - before < 8 * MIB + 16 * MIB
                with connect(up.url) as bridge:
                    assert bytes(bridge.echo(b"alive", timeout=5.0)) == b"alive"


@of_servers
def test_a_client_that_stops_again_and_again_is_served_on(server: str, tmp_path: Path) -> None:
    """Each time the server looks for room, and any of its looks may be its periodic one."""
    words = ("--count", str(10**9), "--size", "16384", "--window", "8MiB")
    with (
        served(address("zmq+ipc", tmp_path), server) as up,
        client("cpp", "stream", up.url, *words) as process,
    ):
        for _ in range(150):
            with stopped(process.pid):
                time.sleep(0.01)
            time.sleep(0.005)
        used = cpu_s(up.pid)
        assert until(lambda: cpu_s(up.pid) > used), "it sleeps"


@over_both
@pytest.mark.parametrize("caller", LANGUAGES)
def test_a_stopped_server_costs_a_client_no_memory(
    scheme: str, caller: str, tmp_path: Path
) -> None:
    """A DEALER takes every request: there is a bound, as a socket's buffer is elsewhere."""
    with served(address(scheme, tmp_path), "cpp") as up, Client(caller, up.url) as bridge:
        for _ in range(10):
            bridge.do(op="echo", size=MIB)
        before = rss_bytes(bridge.pid)
        with stopped(up.pid):
            for _ in range(50):
                answer = bridge.ask(op="echo", size=MIB, timeout=0.02)
                assert answer["status"] in ("DEADLINE_EXCEEDED", "UNAVAILABLE")
            assert rss_bytes(bridge.pid) - before < 16 * MIB or SANITIZED
        with connect(up.url) as fresh:
            assert bytes(fresh.echo(b"alive", timeout=5.0)) == b"alive"


@contextlib.contextmanager
def serving(program: str, url: str, server: str) -> Iterator[tuple[str, int]]:
    """The peer serves all clients in one thread; the probe, whose handlers block, in one each."""
    if program == "peer":
        with served(url, server, "--max-payload", "1MiB") as up:
            yield up.url, up.pid
    else:
        with Server(server, url, "--max-payload", str(MIB)) as up:
            yield up.url, up.pid


@of_servers
@pytest.mark.parametrize("program", ["peer", "probe"])
def test_a_client_that_names_itself_is_refused(program: str, server: str, tmp_path: Path) -> None:
    """Such a name may come again on another connection, and be taken for the first."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with (
        serving(program, address("zmq+ipc", tmp_path), server) as (url, _),
        context.socket(zmq.DEALER) as dealer,
    ):
        dealer.linger, dealer.rcvtimeo, dealer.routing_id = 0, 2000, b"me"
        dealer.connect(url.removeprefix("zmq+"))
        dealer.send(HEADER.pack(8, HELLO, 0, 1, 0, 1) + b"IPCB" + bytes(4))
        assert dealer.recv_multipart() == [b""]
        with connect(url) as bridge:
            assert bytes(bridge.echo(b"alive", timeout=5.0)) == b"alive"
    context.term()


@of_servers
def test_what_is_left_of_who_has_gone_is_not_his_successors(server: str, tmp_path: Path) -> None:
    """His descriptor is the next client's, while messages of his are still to be read."""
    with served(address("zmq+tcp", tmp_path), server) as up:
        for _ in range(4):  # it is a matter of timing
            with stranger(up.url) as caller:
                caller.echo(b"")
                caller.dealer.sndhwm = 0
                with stopped(up.pid):
                    for _ in range(LEFT[server]):
                        caller.credit(1)
                    time.sleep(0.2)  # until they are in the kernel
                    caller.close()
            for _ in range(4):
                with stranger(up.url) as caller:
                    for _ in range(4):
                        assert caller.echo(b"hello") == b"hello"


@of_servers
@pytest.mark.parametrize("program", ["peer", "probe"])
def test_a_flood_keeps_nobody_from_the_server(program: str, server: str, tmp_path: Path) -> None:
    """Of what costs a client nothing and a server little: credit for a call that has ended."""
    with serving(program, address("zmq+ipc", tmp_path), server) as (url, _), connect(url) as bridge:
        words = [sys.executable, "-c", FLOOD.format(path=sys.path), url]
        with subprocess.Popen(words) as one, subprocess.Popen(words) as other:
            try:
                time.sleep(1.0)  # the case itself: they are at it
                for _ in range(5):
                    assert bytes(bridge.echo(b"alive", timeout=5.0)) == b"alive"
                assert one.poll() is other.poll() is None
            finally:
                one.kill()
                other.kill()


@of_servers
def test_a_server_stops_in_the_midst_of_streams(server: str, tmp_path: Path) -> None:
    """In the loop that serves all, a wide window keeps each of them due."""
    words = ("--count", str(10**9), "--size", "0", "--window", "1GiB")
    with (
        served(address("zmq+ipc", tmp_path), server, "--grace", "0.1") as up,
        client("cpp", "stream", up.url, *words),
        client("cpp", "stream", up.url, *words),
    ):
        used = cpu_s(up.pid)
        assert until(lambda: cpu_s(up.pid) > used + 0.2)
        began_s = time.monotonic()
        assert up.stop() == 0
        assert time.monotonic() - began_s < GONE_S


@of_servers
@pytest.mark.parametrize(("program", "scheme"), [("peer", "zmq+tcp"), ("probe", "zmq+ipc")])
def test_who_does_not_read_answers_is_hung_up_on(
    program: str, scheme: str, server: str, tmp_path: Path
) -> None:
    """A ROUTER takes every answer, and cannot stop reading one client: both are bounded here."""
    with (
        serving(program, address(scheme, tmp_path), server) as (url, pid),
        connect(url) as bridge,
        stranger(url, messages_max=1) as caller,
    ):
        for _ in range(100):
            bridge.echo(bytes(256 << 10))
        before = status_field(pid, "VmHWM")
        for _ in range(1000):  # 250 MiB, and as much of answers
            caller.call(1, bytes(256 << 10))
        assert bytes(bridge.echo(b"alive", timeout=5.0)) == b"alive"
        while (frame := caller.frame())[2] != 0:
            assert frame[:2] == (END, Status.OK)
        assert frame[:2] == (END, Status.RESOURCE_EXHAUSTED)
        assert caller.dealer.recv_multipart() == [b""]
        assert bytes(bridge.echo(b"alive", timeout=5.0)) == b"alive"
        if not SANITIZED:  # which keeps what was freed
            assert (status_field(pid, "VmHWM") - before) << 10 < 32 * MIB


@needs_root
@of_servers
@of_clients
def test_another_user_is_refused(caller: str, server: str) -> None:
    """Row 22: by the socket's mode; where somebody has opened that, by the server; and a client
    asks whose socket it is."""
    place = Path("/tmp") / f"ipc-bridge-zmq-{os.getpid()}"
    place.mkdir()
    os.chmod(place, 0o777)
    try:
        url = f"zmq+ipc://{place}/z"
        words = ("echo", url, "--payload", "hello", "--timeout", "0.4")
        with served(url, server), connect(url) as control:
            assert run_client(caller, *words, nobody=True) == Exit.PERMISSION_DENIED
            os.chmod(place / "z", 0o666)
            assert run_client(caller, *words, nobody=True) in (
                Exit.PERMISSION_DENIED,
                Exit.UNAVAILABLE,
            )
            assert bytes(control.echo(b"hello", timeout=5.0)) == b"hello"
        with served(url, server, nobody=True):
            assert (place / "z").stat().st_uid == NOBODY
            assert run_client(caller, "echo", url, "--payload", "secret") == Exit.PERMISSION_DENIED
    finally:
        shutil.rmtree(place)


@of_servers
def test_who_comes_and_goes_leaves_nothing(server: str, tmp_path: Path) -> None:
    with served(address("zmq+ipc", tmp_path), server) as up:
        used = fds(up.pid)
        for _ in range(200):  # so many, for Python's collector to have its say
            with connect(up.url) as bridge:
                bridge.echo(b"x")
        memory = rss_bytes(up.pid)
        for _ in range(300):
            with connect(up.url) as bridge:
                bridge.echo(b"x")
        assert until(lambda: fds(up.pid) <= used)
        if not SANITIZED:
            assert rss_bytes(up.pid) - memory < 16 * MIB


def test_a_python_client_is_interrupted(tmp_path: Path) -> None:
    """KeyboardInterrupt comes out of a blocked call."""
    code = (
        "import sys; from ipc_bridge import connect\n"
        "bridge = connect(sys.argv[1])\n"
        "print('connected', flush=True)\n"
        "try:\n    list(bridge.stream(100, 16, 0.1))\n"
        "except KeyboardInterrupt:\n    sys.exit(7)\n"
    )
    with served(address("zmq+ipc", tmp_path), "cpp") as up:
        words = [sys.executable, "-c", code, up.url]
        with subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"connected\n"
            assert until(lambda: sleeps(process.pid))
            process.send_signal(signal.SIGINT)
            assert process.wait(5) == 7


INTERRUPTED = """
import signal, sys, time, ipc_bridge
signal.signal(signal.SIGALRM, lambda number, at: None)
with ipc_bridge.connect(sys.argv[1]) as bridge:
    print("connected", flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, float(line), float(line))
        began = time.monotonic()
        try:
            bridge.echo(b"x", timeout=0.4)
        except ipc_bridge.CallError as error:
            print(error.status.name, time.monotonic() - began, flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0)
"""


@pytest.mark.parametrize("every_s", [0.001, 0.15])
def test_a_deadline_holds_while_signals_come(every_s: float, tmp_path: Path) -> None:
    """Row 28: pyzmq repeats what they interrupt, in its own time."""
    with served(address("zmq+ipc", tmp_path), "cpp") as up:
        words = [sys.executable, "-c", INTERRUPTED, up.url]
        with subprocess.Popen(
            words, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:

            def expire() -> float:
                assert process.stdin is not None
                process.stdin.write(f"{every_s}\n".encode())
                status, took_s = read_line(process, ANSWER_S).split()
                assert status == "DEADLINE_EXCEEDED"
                return float(took_s)

            try:
                assert read_line(process, READY_S) == "connected\n"
                with stopped(up.pid):
                    for _ in range(3):
                        check_late(0.4, expire)
            finally:
                process.kill()


def test_a_fork_of_a_connected_client(tmp_path: Path) -> None:
    """Row 33: a typed error in the child, and a new connection there; the parent goes on."""
    with served(address("zmq+ipc", tmp_path), "cpp") as up, connect(up.url) as bridge:
        assert bytes(bridge.echo(b"before")) == b"before"
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                bridge.echo(b"child", timeout=5.0)
            except Error as error:
                with connect(up.url) as own:
                    right = bytes(own.echo(b"own", timeout=5.0)) == b"own"
                code = 0 if right and error.status == Status.FAILED_PRECONDITION else 2
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert bytes(bridge.echo(b"after", timeout=5.0)) == b"after"


# --- keys ---


def test_the_command_makes_private_keys_once(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "ipc_bridge.harness.cli", "curve-keys", str(tmp_path / "k")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    paths = done.stdout.split()
    assert [Path(path).name for path in paths] == ["server.keys", "client.keys"]
    assert {stat.S_IMODE(os.stat(path).st_mode) for path in paths} == {0o600}
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode == Exit.ALREADY_EXISTS
    assert again.stderr.startswith("error: ALREADY_EXISTS: ")
    os.unlink(paths[0])  # a new one would not fit the other
    assert subprocess.run(words, capture_output=True, check=False).returncode == again.returncode
    assert not os.path.exists(paths[0])


@over_both
@of_servers
@of_clients
def test_keys(scheme: str, caller: str, server: str, tmp_path: Path) -> None:
    make_keys(tmp_path / "a")
    make_keys(tmp_path / "b")
    known = (tmp_path / "a" / "client.keys").read_text().splitlines()
    other = (tmp_path / "b" / "client.keys").read_text().splitlines()
    mixed = tmp_path / "mixed.keys"  # of the right server, but a client that it does not know
    mixed.touch(0o600)
    mixed.write_text("\n".join([*other[:3], known[3]]))
    open_to_all = tmp_path / "open.keys"
    open_to_all.write_text("\n".join(known))
    open_to_all.chmod(0o644)
    url = f"{address(scheme, tmp_path)}?curve={tmp_path}/a/server.keys"

    def code(where: str, keys: str, timeout: str = "2") -> int:
        query = f"?curve={keys}" if keys else ""
        words = ("--payload", "hello", "--timeout", timeout)
        return run_client(caller, "echo", f"{where}{query}", *words)

    with served(url, server) as up:
        assert code(up.url, f"{tmp_path}/a/client.keys") == 0
        assert code(up.url, "", "0.5") in NO_HANDSHAKE
        assert code(up.url, str(mixed)) == Exit.UNAUTHENTICATED
        assert code(up.url, f"{tmp_path}/b/client.keys", "0.3") == Exit.UNAVAILABLE
        assert code(up.url, f"{tmp_path}/a/server.keys") == Exit.INVALID_ARGUMENT
        assert code(up.url, f"{tmp_path}/none.keys") == Exit.NOT_FOUND
        assert code(up.url, str(open_to_all)) == Exit.PERMISSION_DENIED
        assert code(up.url, f"{tmp_path}/a/client.keys") == 0
    with served(address(scheme, tmp_path), server) as up:
        assert code(up.url, f"{tmp_path}/a/client.keys", "0.5") in NO_HANDSHAKE


@of_servers
def test_files_that_hold_no_keys(server: str, tmp_path: Path) -> None:
    """Either end says so, whatever stands there; blanks between the words are no matter."""
    make_keys(tmp_path / "a")
    file = tmp_path / "some.keys"
    file.touch(0o600)
    ends = {
        "server": ("serve", "zmq+tcp://127.0.0.1:0"),
        "client": ("echo", f"zmq+ipc://{tmp_path}/none", "--payload", "x", "--timeout", "0.2"),
    }
    for end, (verb, url, *words) in ends.items():
        lines = (tmp_path / "a" / f"{end}.keys").read_text().splitlines()
        word = lines[3].split()[0]
        # No character of Z85, or not of ASCII; more than 32 bits; of another length.
        for key in ("~" * 40, "\u00e9" * 40, "\u00e9" * 20, "#" * 40, "0" * 39, "0" * 40 + " 0"):
            file.write_text("\n".join([*lines[:3], f"{word} {key}"]))
            code = run_client(server, verb, f"{url}?curve={file}", *words)
            assert code == Exit.INVALID_ARGUMENT, (end, key)
    file.write_text("\n".join(lines).replace(" ", " \t"))
    assert run_client(server, verb, f"{url}?curve={file}", *words) == Exit.UNAVAILABLE


@of_servers
def test_beyond_loopback_it_takes_keys(server: str) -> None:
    assert run_client(server, "serve", "zmq+tcp://0.0.0.0:0") == Exit.PERMISSION_DENIED


# --- two hosts ---

HOSTS = ("192.0.2.1", "192.0.2.2")  # TEST-NET-1, in namespaces of this test's own
LINKS = [f"ipcb{end}{os.getpid() % 10**6}" for end in "ab"]


@pytest.fixture
def hosts() -> Iterator[list[list[str]]]:
    """The words that run a command on one of two hosts; skipped where they cannot be made."""
    ip = shutil.which("ip")
    if os.geteuid() != 0 or ip is None:
        pytest.skip("only root can make network namespaces, with ip(8)")
    names = [f"ipcb-{os.getpid()}-{end}" for end in "ab"]

    def run(*words: str) -> int:
        return subprocess.run([ip, *words], capture_output=True, check=False).returncode

    try:
        for name in names:
            if run("netns", "add", name):
                pytest.skip("network namespaces cannot be made here")
        if run("link", "add", LINKS[0], "type", "veth", "peer", "name", LINKS[1]):
            pytest.skip("a veth pair cannot be made here")
        for name, link, host in zip(names, LINKS, HOSTS, strict=True):
            assert run("link", "set", link, "netns", name) == 0
            inside = ("netns", "exec", name, ip)
            assert run(*inside, "address", "add", f"{host}/24", "dev", link) == 0
            assert run(*inside, "link", "set", link, "up") == 0
        yield [[ip, "netns", "exec", name] for name in names]
    finally:
        for name in names:
            run("netns", "delete", name)


@of_servers
@of_clients
def test_two_hosts(caller: str, server: str, hosts: list[list[str]], tmp_path: Path) -> None:
    """Row 22 for who has no keys; echo and stream for who has."""
    make_keys(tmp_path)
    url = f"zmq+tcp://{HOSTS[0]}:5000"
    serve = [*hosts[0], *peer(server), "serve", f"{url}?curve={tmp_path}/server.keys"]

    def call(keys: str, *words: str) -> int:
        done = subprocess.run(
            [*hosts[1], *peer(caller), words[0], f"{url}{keys}", *words[1:]],
            capture_output=True,
            timeout=30,
            check=False,
        )
        return done.returncode

    with subprocess.Popen(serve, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"ready {url}\n".encode()
            keys = f"?curve={tmp_path}/client.keys"
            assert call(keys, "echo", "--payload", "across") == 0
            assert call(keys, "stream", "--count", "20000", "--size", "1000") == 0
            assert call("", "echo", "--payload", "no", "--timeout", "1") in NO_HANDSHAKE
        finally:
            process.terminate()
        assert process.wait(5) == 0


@pytest.mark.parametrize("scheme", ["tcp", "zmq+tcp"])  # (over gRPC it would take 25 s)
def test_a_host_vanishes(scheme: str, hosts: list[list[str]]) -> None:
    """Row 14: without a word, while servers are idle and clients wait for an item. Both take it for
    gone in 10 s. All pairings at once, for it takes that long."""
    wait = ("--count", "2", "--size", "1", "--rate", "0.001")
    with contextlib.ExitStack() as running:

        def start(*words: str) -> subprocess.Popen[bytes]:
            process = running.enter_context(subprocess.Popen(words, stdout=subprocess.PIPE))
            running.callback(process.kill)
            return process

        servers, clients = [], []
        for server in LANGUAGES:
            address = f"{scheme}://{HOSTS[0]}:0?allow_remote=1"
            up = start(*hosts[0], *peer(server), "serve", address)
            url = read_line(up, READY_S).removeprefix("ready ").strip()
            servers.append((up.pid, fds(up.pid)))
            clients += [start(*hosts[1], *peer(one), "stream", url, *wait) for one in LANGUAGES]
        assert until(lambda: all(fds(pid) >= before + len(LANGUAGES) for pid, before in servers))
        assert until(lambda: all(sleeps(client.pid) for client in clients))
        nowhere = ("lladdr", "02:00:00:00:00:99", "nud", "permanent")
        for host, other, link in zip(hosts, reversed(HOSTS), LINKS, strict=True):
            lose = ("ip", "neigh", "replace", other, "dev", link, *nowhere)
            subprocess.run([*host, *lose], check=True)
        began = time.monotonic()
        assert [client.wait(30) for client in clients] == [Exit.UNAVAILABLE] * len(clients)
        assert time.monotonic() - began > 3, "the host was still there"
        assert until(lambda: all(fds(pid) <= before for pid, before in servers)), "a slot is taken"


def test_time_passes_for_strangers(tmp_path: Path) -> None:
    """(HANDSHAKE_IVL is 5 s, as is that of HELLO.) Who speaks no ZMTP is hung up on, and who speaks
    nothing but ZMTP: row 30."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with contextlib.ExitStack() as stack:
        stack.callback(context.destroy, 0)
        mutes: list[socket.socket] = []
        dealers: list[zmq.Socket[bytes]] = []  # (pyzmq closes what nobody holds)
        servers: list[tuple[int, int]] = []
        for language in LANGUAGES:
            directory = tmp_path / language
            directory.mkdir()
            up = stack.enter_context(served(address("zmq+ipc", directory), language))
            servers.append((up.pid, fds(up.pid)))
            mute = stack.enter_context(socket.socket(socket.AF_UNIX))
            mute.connect(up.url.removeprefix("zmq+ipc://"))
            mutes.append(mute)
            for _ in range(20):
                dealer = context.socket(zmq.DEALER)
                dealer.reconnect_ivl = -1
                dealer.connect(up.url.removeprefix("zmq+"))
                dealers.append(dealer)
        began = time.monotonic()
        assert until(lambda: all(fds(pid) > before + 20 for pid, before in servers))
        for mute in mutes:
            mute.settimeout(7)
            while mute.recv(1024):
                pass
        assert time.monotonic() - began > 3
        assert until(lambda: all(fds(pid) < before + 5 for pid, before in servers))
