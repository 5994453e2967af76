"""Peers that lie, die, stop or squat, on either end: what must happen then, and to whom.

The cases are these rows of the conformance table: 5 to 7, 14 to 23, 25, 30, and the memory of 4 and
10. Most share one server for each transport and language, which outlives them all; a control client
is connected to it throughout.
"""

import gc
import os
import random
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

from faults_support import (
    CALL_KIND,
    CANCEL_KIND,
    CREDIT_KIND,
    END_KIND,
    EXIT_STATUS,
    GOODBYE_KIND,
    HELLO_KIND,
    LANGUAGES,
    MIB,
    NOBODY,
    SANITIZED,
    TRANSPORTS,
    WINDOW_BYTES,
    Raw,
    Served,
    address,
    call,
    children,
    client,
    cpu_s,
    end,
    ended,
    fds,
    free_port_url,
    header,
    hello,
    is_refusal,
    item,
    kill,
    only_child,
    peer,
    rss_bytes,
    run_client,
    served,
    sleeps,
    state,
    stdio_url,
    stopped,
    stream_call,
    threads,
    until,
)
from ipc_bridge import Bridge, CallError, Error, Status, connect, transport
from ipc_bridge.service import Pattern
from ipc_bridge.transports.pipe import PipeStream
from support import sysv_objects

DATA_LOSS = EXIT_STATUS + Status.DATA_LOSS
DEADLINE_EXCEEDED = EXIT_STATUS + Status.DEADLINE_EXCEEDED
EXISTS = EXIT_STATUS + Status.ALREADY_EXISTS
EXHAUSTED = EXIT_STATUS + Status.RESOURCE_EXHAUSTED
INTERNAL = EXIT_STATUS + Status.INTERNAL
NOT_FOUND = EXIT_STATUS + Status.NOT_FOUND
REFUSED = EXIT_STATUS + Status.PERMISSION_DENIED
UNAVAILABLE = EXIT_STATUS + Status.UNAVAILABLE

SEEN_S = 1.0  # in which a death is seen, and what it held is given back
ENDLESS = str(10**12)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
over_transports = pytest.mark.parametrize("scheme", TRANSPORTS)
of_servers = pytest.mark.parametrize("server", LANGUAGES)
of_clients = pytest.mark.parametrize("caller", LANGUAGES)


# --- what all tests share ---


class Host(NamedTuple):
    """A server that many tests share, and a client that must not notice any of them."""

    scheme: str
    server: Served
    control: Bridge

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def pid(self) -> int:
        return self.server.pid

    def check(self, when: str) -> None:
        """The control client gets the right answer."""
        payload = f"{when}-{time.monotonic_ns()}".encode()
        assert bytes(self.control.echo(payload, timeout=2.0)) == payload


HOSTS = [(scheme, language) for scheme in TRANSPORTS for language in LANGUAGES]


@pytest.fixture(scope="module", params=HOSTS, ids="-".join)
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    scheme, language = request.param
    url = address(scheme, tmp_path_factory.mktemp("host"))
    with served(url, language) as server, connect(server.url) as control:
        host = Host(scheme, server, control)
        host.check("warm")
        # pyzmq makes a thread of its own with the first message that it sends without a copy.
        assert len([*control.stream(1000, 16 << 10)]) == 1000
        yield host


@pytest.fixture
def host(shared: Host) -> Iterator[Host]:
    """The shared server; whatever a test does, its fds and threads come back, and it answers."""
    assert shared.server.process.poll() is None, "an earlier test has ended the shared server"
    shared.check("before")
    before = (fds(shared.pid), threads(shared.pid))
    yield shared
    shared.check("after")
    back = until(lambda: fds(shared.pid) <= before[0] and threads(shared.pid) <= before[1], SEEN_S)
    now = (fds(shared.pid), threads(shared.pid))
    assert back, f"fds and threads of the server were {before}, are {now}"


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Neither children nor descriptors of the test itself, nor System V objects."""
    me = os.getpid()
    before, objects = (children(me), fds(me)), sysv_objects()
    yield
    gc.collect()
    assert (children(me), fds(me)) == before
    assert until(lambda: sysv_objects() <= objects, SEEN_S), sysv_objects() - objects


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory in which nothing may be left."""
    yield tmp_path
    assert [str(path) for path in tmp_path.rglob("*")] == []


# --- rows 5 to 7: what a client may send ---

RUNNING = hello() + stream_call(1, 1000, 16, rate_hz=10)
HOSTILE = {
    "garbage": random.Random(7).randbytes(256),
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "zeros": bytes(64),
    "magic": hello(magic=b"BCPI"),
    "version-0": hello(version=0),
    "version-2": hello(version=2),
    "window-0": hello(window=0),
    "window-too-large": hello(window=(1 << 30) + 1),
    "hello-of-7-bytes": header(HELLO_KIND, 7, code=1, value=1) + b"IPCB\0\0\0",
    "hello-of-9-bytes": header(HELLO_KIND, 9, code=1, value=1) + b"IPCB\0\0\0\0\0",
    "hello-twice": hello() + hello(),
    "kind-0": hello() + header(0),
    "kind-8": hello() + header(8),
    "kind-255": hello() + header(255),
    "call-before-hello": call(1, b"early"),
    "call-id-0": hello() + call(0, b"x"),
    "call-id-2-first": hello() + call(2, b"x"),
    "call-id-again": hello() + call(1, b"x") + call(1, b"x"),
    "call-while-running": RUNNING + call(2, b"x"),
    "call-of-4-GiB": hello() + header(CALL_KIND, 0xFFFFFFFF, code=1, call_id=1),
    "call-of-4-GiB-before-hello": header(CALL_KIND, 0xFFFFFFFF, code=1, call_id=1),
    "hello-of-4-GiB": header(HELLO_KIND, 0xFFFFFFFF, code=1, value=1),
    "item": hello() + item(1, 0, b"x"),
    "end": hello() + end(1, 0, b"x"),
    "goodbye": hello() + header(GOODBYE_KIND),
    "cancel-of-a-later-call": hello() + header(CANCEL_KIND, call_id=1),
    "cancel-of-call-0": hello() + header(CANCEL_KIND),
    "cancel-with-a-payload": RUNNING + header(CANCEL_KIND, 1, call_id=1) + b"x",
    "credit-with-a-payload": RUNNING + header(CREDIT_KIND, 1, call_id=1, value=1) + b"x",
    "credit-above-the-window": RUNNING + header(CREDIT_KIND, call_id=1, value=2 * WINDOW_BYTES),
    "credit-of-4-GiB": RUNNING + header(CREDIT_KIND, call_id=1, value=0xFFFFFFFF),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_client_that_breaks_the_rules_is_refused(host: Host, name: str) -> None:
    with Raw.connect(host.url) as raw:
        raw.send(HOSTILE[name])
        host.check("during")
        assert is_refusal(raw)


@of_servers
@pytest.mark.parametrize("name", ["magic", "kind-8", "call-of-4-GiB", "call-while-running"])
def test_a_stdio_server_refuses_and_leaves(server: str, name: str) -> None:
    before = children(os.getpid())
    with Raw.connect(stdio_url(server)) as raw:
        (child,) = children(os.getpid()) - before
        raw.send(HOSTILE[name])
        assert is_refusal(raw)
        assert until(lambda: state(child) in "ZX", SEEN_S)


FIELDS = {  # first bit and count of bits
    "size": (0, 32),
    "kind": (32, 8),
    "flags": (40, 8),
    "code": (48, 16),
    "call-id": (64, 32),
    "value": (96, 32),
}


def flipped(data: bytes, bit: int) -> bytes:
    out = bytearray(data)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


@pytest.mark.parametrize("field", FIELDS)
def test_any_bit_of_a_call_flipped(host: Host, field: str) -> None:
    """What comes is an answer to a call that is odd but legal, or a refusal."""
    first, count = FIELDS[field]
    for bit in range(first, first + count):
        with Raw.connect(host.url) as raw:
            raw.send(hello() + flipped(call(1, b"four"), bit))
            if bit < 26:  # another size, a legal one: the server waits for the rest
                (_,) = raw.frames(1)
                answers = raw.frames(1, seconds=0.002)
                assert not raw.ended
                if bit == 2:  # to 0: the call is whole, and "four" the start of the next
                    answers = answers or raw.frames(1)
                    assert [answer.payload for answer in answers] == [b""]
                else:
                    assert answers == []
            elif field in ("size", "kind", "call-id") or 40 < bit < 48:
                assert is_refusal(raw), f"bit {bit}"
            else:
                _, answer = raw.frames(2)
                assert (answer.kind, answer.call_id) == (END_KIND, 1), f"bit {bit}"
                legal = {Status.OK, Status.DEADLINE_EXCEEDED}  # of 1 ms, perhaps
                assert answer.code in (legal if field == "value" else {Status.UNIMPLEMENTED})
        if bit % 8 == 0:
            host.check("during")


@pytest.mark.parametrize("field", FIELDS)
def test_any_bit_of_a_hello_flipped(host: Host, field: str) -> None:
    first, count = FIELDS[field]
    for bit in range(first, first + count):
        with Raw.connect(host.url) as raw:
            raw.send(flipped(hello(), bit) + call(1, b"four"))
            if field == "value" and bit - first not in (22, 30, 31):  # another window, a legal one
                _, answer = raw.frames(2)
                assert (answer.kind, answer.payload) == (END_KIND, b"four"), f"bit {bit}"
            else:
                assert is_refusal(raw), f"bit {bit}"
    host.check("during")


def test_a_frame_cut_short_anywhere(host: Host) -> None:
    whole = hello() + call(1, b"cut")
    for size in range(len(whole)):
        with Raw.connect(host.url) as raw:
            raw.send(whole[:size])
    host.check("during")


def test_a_declared_size_makes_no_room(host: Host) -> None:
    huge = header(CALL_KIND, 0xFFFFFFFF, code=1, call_id=1)
    before = rss_bytes(host.pid)
    with ExitStack() as open_still:
        for number in range(40):
            raw = open_still.enter_context(Raw.connect(host.url))
            raw.send((hello() if number % 2 else b"") + huge)
            assert is_refusal(raw)
        host.check("during")
    assert rss_bytes(host.pid) - before < 16 * MIB


def test_one_byte_a_write(host: Host) -> None:
    with Raw.connect(host.url) as raw:
        for byte in hello() + call(1, b"byte by byte") + call(2, b"again"):
            raw.send(bytes([byte]))
        _, first, second = raw.frames(3)
        assert (first.payload, second.payload) == (b"byte by byte", b"again")


def test_many_frames_in_one_write(host: Host) -> None:
    payloads = [str(number).encode() * (number % 50) for number in range(1, 501)]
    calls = b"".join(call(number, payload) for number, payload in enumerate(payloads, 1))
    with Raw.connect(host.url) as raw:
        raw.send(hello() + calls)
        _, *answers = raw.frames(501)
        assert [answer.call_id for answer in answers] == list(range(1, 501))
        assert [answer.payload for answer in answers] == payloads


# --- rows 6 and 9: what a server may send ---


class Script(NamedTuple):
    """A server's lines: at once, after the CALL, and whether it hangs up then."""

    code: int  # with which the client must end
    first: bytes = b""
    answer: bytes = b""
    hangs_up: bool = False
    command: str = "echo"
    timeout: str = "5"


RIGHT_ITEMS = b"".join(item(1, index, bytes(Pattern(8).item(index))) for index in (0, 1))
WRONG_ITEMS = item(1, 0, b"????????") + item(1, 1, b"????????")
SCRIPTS = {
    "garbage": Script(INTERNAL, random.Random(8).randbytes(256)),
    "http": Script(INTERNAL, b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"),
    "magic": Script(INTERNAL, hello(magic=b"BCPI")),
    "version": Script(INTERNAL, hello(version=2)),
    "no-hello": Script(UNAVAILABLE, timeout="0.4"),
    "early-close": Script(UNAVAILABLE, hangs_up=True, timeout="0.4"),
    "hello-then-close": Script(UNAVAILABLE, hello(), hangs_up=True),
    "half-a-hello": Script(UNAVAILABLE, hello()[:20], hangs_up=True),
    "hello-twice": Script(INTERNAL, hello() + hello()),
    "kind-9": Script(INTERNAL, hello(), header(9)),
    "call": Script(INTERNAL, hello(), call(1)),
    "credit": Script(INTERNAL, hello(), header(CREDIT_KIND, call_id=1, value=1)),
    "end-of-an-unknown-call": Script(INTERNAL, hello(), end(7)),
    "end-of-the-session-with-ok": Script(INTERNAL, hello(), end(0)),
    "end-with-status-17": Script(INTERNAL, hello(), end(1, 17, b"what?")),
    "message-not-utf-8": Script(INTERNAL, hello(), end(1, 3, b"\xff\xfe")),
    "message-too-long": Script(INTERNAL, hello(), end(1, 3, b"x" * 1025)),
    "reply-of-4-GiB": Script(INTERNAL, hello(), header(END_KIND, 0xFFFFFFFF, call_id=1)),
    "item-to-echo": Script(INTERNAL, hello(), item(1, 0, b"x")),
    "refusal": Script(EXHAUSTED, end(0, Status.RESOURCE_EXHAUSTED, b"full")),
    "refusal-after-hello": Script(EXHAUSTED, hello(), end(0, Status.RESOURCE_EXHAUSTED, b"full")),
    "goodbye": Script(UNAVAILABLE, hello() + header(GOODBYE_KIND), hangs_up=True),
    "reply-cut-short": Script(
        UNAVAILABLE, hello(), header(END_KIND, 5, call_id=1) + b"he", hangs_up=True
    ),
    "wrong-reply": Script(DATA_LOSS, hello(), end(1, 0, b"jello")),
    "item-of-a-later-call": Script(INTERNAL, hello(), item(2, 0, b""), command="stream"),
    "item-out-of-order": Script(INTERNAL, hello(), item(1, 1, b""), command="stream"),
    "items-without-credit": Script(INTERNAL, hello(), RIGHT_ITEMS, command="overrun"),
    "stream-end-with-payload": Script(INTERNAL, hello(), end(1, 0, b"x"), command="stream"),
    "stream-cut-short": Script(UNAVAILABLE, hello(), RIGHT_ITEMS, hangs_up=True, command="stream"),
    "wrong-items": Script(DATA_LOSS, hello(), WRONG_ITEMS, command="stream"),
    "too-few-items": Script(DATA_LOSS, hello(), RIGHT_ITEMS + end(1), command="stream"),
}
EVERYWHERE = (
    "garbage",
    "no-hello",
    "early-close",
    "end-of-an-unknown-call",
    "items-without-credit",
)
COMMANDS = {
    "echo": ("--payload", "hello"),
    "stream": ("--count", "5", "--size", "8"),
    "overrun": ("--count", "5", "--size", "8", "--window", "1"),
}


@of_clients
@pytest.mark.parametrize(
    ("scheme", "name"),
    [(scheme, name) for scheme in TRANSPORTS for name in SCRIPTS if scheme == "unix"]
    + [(scheme, name) for scheme in TRANSPORTS if scheme != "unix" for name in EVERYWHERE],
)
def test_a_server_that_breaks_the_rules(scheme: str, name: str, caller: str, place: Path) -> None:
    script = SCRIPTS[name]
    peer(caller)
    listener = transport(address(scheme, place)).listen()
    alarm = threading.Timer(10, listener.interrupt)
    alarm.start()
    command = "stream" if script.command == "overrun" else script.command
    words = (command, listener.url, *COMMANDS[script.command], "--timeout", script.timeout)
    try:
        with client(caller, *words) as process:
            stream = listener.accept()
            assert stream is not None, "the client does not come"
            with Raw(stream) as raw:
                raw.send(script.first)
                if script.answer:
                    came = raw.frames(2, seconds=5)
                    assert [frame.kind for frame in came] == [HELLO_KIND, CALL_KIND]
                    raw.send(script.answer)
                if not script.hangs_up:
                    assert ended(process) == script.code
            assert not script.hangs_up or ended(process) == script.code
    finally:
        alarm.cancel()
        alarm.join()
        listener.close()


@of_clients
@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("stdio:/bin/cat", INTERNAL),  # which says what we said
        ("stdio:/bin/true", UNAVAILABLE),
        ("stdio:/bin/echo hello, I am no server of yours", INTERNAL),
        ("stdio:/nonexistent/server", NOT_FOUND),
    ],
    ids=["cat", "true", "echo", "nothing"],
)
def test_a_child_that_is_no_server(caller: str, url: str, code: int) -> None:
    assert run_client(caller, "echo", url, "--payload", "hello") == code


# --- row 14: the server dies ---

PACES = {
    "in-mid-call": ("--count", ENDLESS, "--size", "16", "--rate", "1"),
    "in-mid-stream": ("--count", ENDLESS, "--size", "1024"),
}


@pytest.mark.parametrize("pace", PACES)
@of_servers
@of_clients
@pytest.mark.parametrize("scheme", [*TRANSPORTS, "stdio"])
def test_the_server_is_killed(
    scheme: str, caller: str, server: str, pace: str, tmp_path: Path
) -> None:
    with ExitStack() as running:
        if scheme == "stdio":
            url = stdio_url(server)
        else:
            up = running.enter_context(served(address(scheme, tmp_path), server))
            url, pid = up.url, up.pid
        process = running.enter_context(client(caller, "stream", url, *PACES[pace]))
        if scheme == "stdio":
            pid = only_child(process.pid)
        assert until(lambda: threads(pid) > 1)
        if pace == "in-mid-call":
            assert until(lambda: sleeps(process.pid))
        else:
            used = cpu_s(pid)
            assert until(lambda: cpu_s(pid) > used + 0.03)  # far more than filling a window takes
        assert process.poll() is None
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        assert ended(process) == UNAVAILABLE
        assert time.monotonic() - began < SEEN_S


@over_transports
@of_servers
def test_the_server_is_killed_under_a_client_object(
    scheme: str, server: str, tmp_path: Path
) -> None:
    """Row 18 too: what comes to life at the address later answers no call of the old connection."""
    with served(address(scheme, tmp_path), server) as first:
        url = first.url
        bridge = connect(url)
        assert bytes(bridge.echo(b"first")) == b"first"
        kill(first.process)
    with bridge, served(url, server) as second:
        assert second.url == url
        with pytest.raises(CallError) as caught:
            bridge.echo(b"old", timeout=2.0)
        assert caught.value.status == Status.UNAVAILABLE
        with connect(url, timeout=1.0) as fresh:
            assert bytes(fresh.echo(b"new", timeout=1.0)) == b"new"


@over_transports
@of_servers
def test_the_server_is_restarted_under_a_client_object(
    scheme: str, server: str, place: Path
) -> None:
    with served(address(scheme, place), server) as first:
        url = first.url
        bridge = connect(url)
        assert bytes(bridge.echo(b"first")) == b"first"
    with bridge, served(url, server):
        with pytest.raises(CallError) as caught:
            bridge.echo(b"old", timeout=2.0)
        assert caught.value.status == Status.UNAVAILABLE
        with connect(url, timeout=1.0) as fresh:
            assert bytes(fresh.echo(b"new", timeout=1.0)) == b"new"


# --- rows 15 and 16: the client dies (the fixture sees that its fds and threads come back) ---

HALF_A_CALL = """
import sys
from faults_support import CALL_KIND, Raw, header, hello
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
    with client(caller, "stream", stdio_url(server), *PACES["in-mid-call"]) as process:
        child = only_child(process.pid)
        process.kill()
        assert until(lambda: state(child) in "ZX", SEEN_S)


CRASHES = [("write", number) for number in range(1, 4)] + [("file", number) for number in (1, 2)]
CRASH_CALLS = {  # with ? for what this machine does not have
    "write": "?sendto,?sendmsg,?writev,?write",
    "file": "?mknod,?mknodat,?unlink,?unlinkat",
}


@of_clients
@pytest.mark.parametrize(("step", "number"), CRASHES)
def test_the_client_is_killed_at_each_step(host: Host, caller: str, step: str, number: int) -> None:
    if step == "file" and host.scheme != "pipe":
        pytest.skip("only pipe makes files to arrive")
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is missing")
    inject = f"inject={CRASH_CALLS[step]}:signal=KILL:when={number}"
    options = ["-f", "-qq", "-o", "/dev/null", "-e", f"trace={CRASH_CALLS[step]}", "-e", inject]
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
    with connect(host.url, timeout=1.0) as fresh:
        assert bytes(fresh.echo(b"fresh", timeout=1.0)) == b"fresh"


# --- row 17: somebody stops ---


def test_a_deadline_holds_against_a_stopped_server(host: Host) -> None:
    with connect(host.url) as bridge:
        with stopped(host.pid):
            began = time.monotonic()
            with pytest.raises(CallError) as caught:
                bridge.echo(b"stopped", timeout=0.4)
            took = time.monotonic() - began
        assert caught.value.status == Status.DEADLINE_EXCEEDED
        assert 0.4 <= took < 0.5
        assert (
            bytes(bridge.echo(b"next", timeout=2.0)) == b"next"
        )  # not the answer to the call before


@of_clients
def test_a_stopped_server_is_not_waited_for(host: Host, caller: str) -> None:
    words = ("echo", host.url, "--payload", "hello", "--timeout")
    with stopped(host.pid):
        began = time.monotonic()
        assert run_client(caller, "--version") == 0
        starts_s = time.monotonic() - began  # on a busy machine a program takes long to start
        began = time.monotonic()
        assert run_client(caller, *words, "0.4") == UNAVAILABLE
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
            assert ended(process) in (DEADLINE_EXCEEDED, UNAVAILABLE)
            assert time.monotonic() - began < 0.5 + 0.5


@of_clients
def test_a_stopped_client_disturbs_nobody(host: Host, caller: str) -> None:
    used = cpu_s(host.pid)
    count = 1_000_000 if caller == "cpp" else 200_000  # or it may be done before it is stopped
    words = ("--count", str(count), "--size", "1024")
    with client(caller, "stream", host.url, *words) as process:
        assert until(lambda: cpu_s(host.pid) > used + 0.02)
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


# --- row 19: what the dead left behind ---


@pytest.mark.parametrize("successor", LANGUAGES)
@of_servers
@pytest.mark.parametrize("scheme", ["pipe", "unix", "shm"])
def test_stale_things_are_reclaimed(
    scheme: str, server: str, successor: str, tmp_path: Path
) -> None:
    peer(successor)
    url = address(scheme, tmp_path)
    with served(url, server) as first:
        kill(first.process)
    if scheme == "pipe":
        for direction in ("c2s", "s2c"):
            os.mkfifo(tmp_path / "p" / f"0123456789abcdef.{direction}", 0o600)
    left = {path.name for path in tmp_path.rglob("*")}
    name = url.rpartition("/")[2]
    assert left >= ({"p", "lock", "listen"} if scheme == "pipe" else {name, f"{name}.lock"})
    with served(url, successor), connect(url, timeout=1.0) as bridge:
        assert bytes(bridge.echo(b"second", timeout=1.0)) == b"second"
    # The directory of a pipe belongs to who made it, and he is dead.
    assert [path.name for path in tmp_path.rglob("*") if not path.is_dir()] == []


# --- row 20: two servers ---


@pytest.mark.parametrize("second", LANGUAGES)
def test_a_second_server_is_told_so(host: Host, second: str) -> None:
    before = sorted(os.listdir(place_of(host))) if not host.scheme.endswith("tcp") else []
    began = time.monotonic()
    assert run_client(second, "--version") == 0
    starts_s = time.monotonic() - began  # on a busy machine a program takes long to start
    began = time.monotonic()
    assert run_client(second, "serve", host.url) == EXISTS
    assert time.monotonic() - began < 2 * starts_s + SEEN_S
    with connect(host.url, timeout=1.0) as fresh:
        assert bytes(fresh.echo(b"first", timeout=1.0)) == b"first"
    assert before == (sorted(os.listdir(place_of(host))) if not host.scheme.endswith("tcp") else [])


def place_of(host: Host) -> Path:
    path = Path(host.url.partition("://")[2])
    return path if host.scheme == "pipe" else path.parent


# --- rows 21 and 22: other people ---


def squat(path: Path, what: str) -> None:
    """Put something at a path that a server would want."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    elsewhere = path.parent / "elsewhere"
    match what.removeprefix("foreign-"):
        case "file":
            path.write_text("not yours")
            path.chmod(0o600)
        case "link":
            elsewhere.write_text("not yours either")
            path.symlink_to(elsewhere)
        case "dangling-link":
            path.symlink_to(elsewhere)
        case "link-to-a-directory":
            elsewhere.mkdir(mode=0o700)
            path.symlink_to(elsewhere)
        case "directory":
            path.mkdir(mode=0o700)
        case "open-directory":
            path.mkdir()
            path.chmod(0o777)
        case "fifo":
            os.mkfifo(path, 0o600)
        case "socket":
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(path))
    if what.startswith("foreign-"):
        os.chown(path, NOBODY, NOBODY)


def snapshot(directory: Path) -> dict[str, tuple[object, ...]]:
    """All that is in a directory, to the inode."""
    found: dict[str, tuple[object, ...]] = {}
    for path in directory.rglob("*"):
        info = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
        found[str(path)] = (info.st_mode, info.st_uid, info.st_ino, content)
    return found


SQUATS = [
    ("unix", "u", "file"),
    ("unix", "u", "link"),
    ("unix", "u", "dangling-link"),
    ("unix", "u", "directory"),
    ("unix", "u", "fifo"),
    ("unix", "u", "foreign-socket"),
    ("unix", "u.lock", "link"),
    ("unix", "u.lock", "dangling-link"),
    ("unix", "u.lock", "fifo"),
    ("unix", "u.lock", "foreign-file"),
    ("shm", "shm", "file"),
    ("shm", "shm", "link"),
    ("shm", "shm", "foreign-socket"),
    ("shm", "shm.lock", "link"),
    ("pipe", "p", "file"),
    ("pipe", "p", "link-to-a-directory"),
    ("pipe", "p", "open-directory"),
    ("pipe", "p", "foreign-directory"),
    ("pipe", "p/lock", "link"),
    ("pipe", "p/lock", "dangling-link"),
    ("pipe", "p/lock", "foreign-file"),
    ("pipe", "p/listen", "file"),
    ("pipe", "p/listen", "link"),
    ("pipe", "p/listen", "foreign-fifo"),
]


@of_servers
@pytest.mark.parametrize(("scheme", "name", "what"), SQUATS)
def test_a_squatted_name_is_refused_and_left_alone(
    scheme: str, name: str, what: str, server: str, tmp_path: Path
) -> None:
    if what.startswith("foreign-") and os.geteuid() != 0:
        pytest.skip("only root can give things away")
    squat(tmp_path / name, what)
    before = snapshot(tmp_path)
    assert run_client(server, "serve", address(scheme, tmp_path)) in (EXISTS, REFUSED)
    assert snapshot(tmp_path) == before


@pytest.fixture
def public_place() -> Iterator[Path]:
    """A directory that everybody can enter, and where everybody can make things."""
    with tempfile.TemporaryDirectory(prefix="ipc-bridge-faults-") as name:
        os.chmod(name, 0o777)
        yield Path(name)
        assert os.listdir(name) == []


@needs_root
@of_servers
@of_clients
@pytest.mark.parametrize("scheme", ["pipe", "unix", "shm"])
def test_another_user_is_refused(scheme: str, caller: str, server: str, public_place: Path) -> None:
    """(tcp cannot tell who comes: a socket of the loopback device has no owner.)"""
    with served(address(scheme, public_place), server) as up, connect(up.url) as control:
        words = ("echo", up.url, "--payload", "hello", "--timeout", "0.4")
        assert run_client(caller, *words, nobody=True) == REFUSED
        assert bytes(control.echo(b"hello", timeout=1.0)) == b"hello"


@needs_root
@of_servers
@of_clients
@pytest.mark.parametrize("scheme", ["unix", "shm"])
def test_another_user_is_refused_at_an_open_door(
    scheme: str, caller: str, server: str, public_place: Path
) -> None:
    """Somebody has opened the socket's mode for all: the server still asks who comes."""
    with served(address(scheme, public_place), server) as up, connect(up.url) as control:
        os.chmod(address(scheme, public_place).partition("://")[2], 0o666)
        words = ("echo", up.url, "--payload", "hello", "--timeout", "0.4")
        assert run_client(caller, *words, nobody=True) in (REFUSED, UNAVAILABLE)
        assert bytes(control.echo(b"hello", timeout=1.0)) == b"hello"


@needs_root
@of_servers
@of_clients
@pytest.mark.parametrize("scheme", ["pipe", "unix", "shm"])
def test_a_client_does_not_talk_to_another_users_server(
    scheme: str, caller: str, server: str, public_place: Path
) -> None:
    with served(address(scheme, public_place), server, nobody=True) as up:
        assert run_client(caller, "echo", up.url, "--payload", "secret") == REFUSED


# --- row 23: the client is early ---


@over_transports
@of_servers
@of_clients
def test_a_client_waits_for_its_server(scheme: str, caller: str, server: str, place: Path) -> None:
    peer(server)
    url = free_port_url(scheme) if scheme.endswith("tcp") else address(scheme, place)
    with client(caller, "echo", url, "--payload", "early", "--timeout", "5") as process:
        time.sleep(0.3)  # the case itself: nobody is there yet
        assert process.poll() is None
        with served(url, server):
            assert ended(process) == 0


@over_transports
@of_clients
def test_without_a_server_a_client_gives_up(scheme: str, caller: str, place: Path) -> None:
    url = free_port_url(scheme) if scheme.endswith("tcp") else address(scheme, place)
    began = time.monotonic()
    assert run_client(caller, "echo", url, "--payload", "x", "--timeout", "0.3") == UNAVAILABLE
    assert 0.3 <= time.monotonic() - began < 0.3 + 1.0


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
@over_transports
def test_a_server_out_of_descriptors(scheme: str, server: str, spare: int, place: Path) -> None:
    """Whoever comes then waits; the server sleeps, and takes clients again once it can."""
    if scheme.startswith("zmq"):
        pytest.skip(
            "libzmq ends the process (ipc), or spins (tcp), when accept(2) has no descriptor"
        )
    if scheme != "pipe" and spare != 3:
        pytest.skip("only on pipe does a client cost several descriptors")
    if SANITIZED and server == "cpp":
        pytest.skip("UBSan looks at memory through a pipe(2) of its own, and errs without one")
    with served(address(scheme, place), server) as up:
        quiet = threads(up.pid)
        with connect(up.url) as warm:
            warm.echo(b"warm")
        assert until(lambda: threads(up.pid) == quiet)
        before = limit_fds(up.pid, spare)
        with ExitStack() as open_still:
            for _ in range(spare + 3):
                with suppress(Error):
                    open_still.enter_context(Raw.connect(up.url, 0.1))
            used = cpu_s(up.pid)
            time.sleep(0.5)  # the time in which it must not spin
            assert up.process.poll() is None, "the server has died"
            assert cpu_s(up.pid) - used < 0.1
        # Not enough for even one client of pipe; and System V's first needs a watcher's, too.
        if spare < 3 or scheme.startswith("sysv"):
            resource.prlimit(up.pid, resource.RLIMIT_NOFILE, before)
        with connect(up.url, timeout=2.0) as bridge:
            assert bytes(bridge.echo(b"again", timeout=1.0)) == b"again"


@of_servers
def test_a_server_out_of_memory_turns_one_client_away(server: str, place: Path) -> None:
    """Who asks for more than there is goes, and nobody else does."""
    if SANITIZED and server == "cpp":
        pytest.skip("a sanitizer reserves more than any limit")
    url = address("unix", place)
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
def test_who_only_stops_sending_keeps_no_thread_busy(server: str, place: Path) -> None:
    """Its end-of-file shows while the server waits to write an answer that is not read."""
    with served(address("pipe", place), server) as up, Raw.connect(up.url) as raw:
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
def test_a_crowd_has_a_bound(scheme: str, server: str, place: Path) -> None:
    """However quickly they come: the oldest makes room before the next is let in."""
    with served(address(scheme, place), server) as up, ExitStack() as crowd:
        most = 0
        for number in range(800):
            crowd.enter_context(Raw.connect(up.url))
            if number % 10 == 0:
                most = max(most, threads(up.pid))
        assert max(most, threads(up.pid)) <= STRANGERS_MAX + 8  # of its own, or about to end


@of_servers
@over_transports
def test_ten_thousand_come_and_go(scheme: str, server: str, place: Path) -> None:
    """Row 27: fds, threads and memory stay what they were."""
    many = 10_000 if scheme == "unix" else 3000
    if SANITIZED:
        many = 1000
    with served(address(scheme, place), server) as up:
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
def test_a_hundred_clients_share_fairly(scheme: str, server: str, place: Path) -> None:
    """Row 27: each has its turn, max/min < 10. One loop asks all of them, so that it is the server
    that shares, and not the clients' scheduler."""
    with served(address(scheme, place), server) as up, ExitStack() as crowd:
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
def test_a_crowd_that_never_says_hello(scheme: str, server: str, place: Path) -> None:
    with served(address(scheme, place), server) as up, ExitStack() as crowd:
        for _ in range(300):
            crowd.enter_context(Raw.connect(up.url))
        began = time.monotonic()
        with connect(up.url, timeout=CROWD_S) as bridge:
            assert bytes(bridge.echo(b"hello", timeout=CROWD_S)) == b"hello"
        assert time.monotonic() - began < CROWD_S


def test_who_never_says_hello_is_dropped(tmp_path: Path) -> None:
    """After 5 s; all servers wait at the same time."""
    with ExitStack() as running:
        silent: list[Raw] = []
        for language in LANGUAGES:
            for scheme in TRANSPORTS:
                directory = tmp_path / language
                directory.mkdir(exist_ok=True)
                up = running.enter_context(served(address(scheme, directory), language))
                silent.append(running.enter_context(Raw.connect(up.url)))
                silent[-1].send(hello()[:10])  # a part of one is none
        began = time.monotonic()
        for raw in silent:
            left = 5 + SEEN_S - (time.monotonic() - began)
            raw.frames(seconds=max(0.0, left))
            assert raw.ended
        assert time.monotonic() - began > 3.0


# --- what it costs ---


@pytest.mark.parametrize("wait", ["block", "adaptive"])
@of_servers
def test_who_idles_costs_nothing(server: str, wait: str, tmp_path: Path) -> None:
    with ExitStack() as running:
        pids = []
        for scheme in TRANSPORTS:
            up = running.enter_context(served(f"{address(scheme, tmp_path)}?wait={wait}", server))
            bridge = running.enter_context(connect(up.url))
            assert bytes(bridge.echo(b"warm")) == b"warm"
            pids.append(up.pid)
        time.sleep(0.1)
        before = [cpu_s(pid) for pid in pids]
        time.sleep(1.0)
        used = [cpu_s(pid) - old for pid, old in zip(pids, before, strict=True)]
        assert max(used) <= 0.02, dict(zip(TRANSPORTS, used, strict=True))


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
    assert peak - before < window + 8 * MIB
