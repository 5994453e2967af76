"""Peers that break the rules of the wire, on either end: rows 5 to 7 and 9 of the conformance
table. A broken frame ends its own session with a typed error, and nobody else notices."""

import os
import random
import shlex
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from hosts import SEEN_S, Host, of_clients, of_servers
from ipc_bridge import Status, transport
from ipc_bridge.service import Pattern
from peer_support import (
    client,
    ended,
    peer,
    run,
    run_client,
    stdio_url,
)
from processes import (
    children,
    rss_bytes,
    state,
)
from raw import (
    CALL_KIND,
    CANCEL_KIND,
    CREDIT_KIND,
    END_KIND,
    GOODBYE_KIND,
    HELLO_KIND,
    INTERNAL,
    WINDOW_BYTES,
    Frame,
    Raw,
    call,
    end,
    header,
    hello,
    is_refusal,
    item,
    split,
    stream_call,
)
from support import FRAMED, MIB, Exit, listen_url, until

pytestmark = pytest.mark.usefixtures("nothing_left")

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
@pytest.mark.parametrize("name", HOSTILE)
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


# A stdio server is a process each time, 10 ms in C++ and 250 in Python: some of all must do.
SIZES = {"cpp": range(len(hello() + call(1, b"cut"))), "py": (0, 5, 20, 24, 30, 42)}
BITS = {"cpp": [2, *range(1, 128, 3)], "py": (2, 25, 26, 35, 44, 50, 64, 100)}


def said_over_stdio(server: str, data: bytes) -> list[Frame]:
    """What a stdio server answers to all that it is ever sent; it leaves without a word beside."""
    done = run(server, "serve", "stdio:", stdin=data)
    assert (done.code, done.err) == (0, "")
    return split(done.out)


@of_servers
def test_a_stdio_frame_cut_short_anywhere(server: str) -> None:
    whole = hello() + call(1, b"cut")
    for size in SIZES[server]:
        (first,) = said_over_stdio(server, whole[:size])
        assert first.kind == HELLO_KIND
    _, answer = said_over_stdio(server, whole)
    assert (answer.kind, answer.payload) == (END_KIND, b"cut")


@of_servers
def test_any_bit_of_a_call_flipped_over_stdio(server: str) -> None:
    """As above; where the rest of a call is missing, there is no answer."""
    for bit in BITS[server]:
        _, *answers = said_over_stdio(server, hello() + flipped(call(1, b"four"), bit))
        said = [(answer.kind, answer.call_id, answer.code) for answer in answers]
        if bit < 26:
            assert said == ([(END_KIND, 1, Status.OK)] if bit == 2 else []), f"bit {bit}"
        elif bit < 40 or 40 < bit < 48 or 64 <= bit < 96:
            assert said == [(END_KIND, 0, INTERNAL)], f"bit {bit}"
        else:
            legal = {Status.OK, Status.DEADLINE_EXCEEDED} if bit >= 96 else {Status.UNIMPLEMENTED}
            assert said in [[(END_KIND, 1, status)] for status in legal], f"bit {bit}"


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


@of_servers
def test_stdio_frames_in_any_pieces(server: str) -> None:
    """Row 7 over stdio: one byte a write, then many frames in one."""
    payloads = [str(number).encode() * (number % 50) for number in range(1, 501)]
    calls = [call(number, payload) for number, payload in enumerate(payloads, 1)]
    with Raw.connect(stdio_url(server)) as raw:
        for byte in hello() + calls[0]:
            raw.send(bytes([byte]))
        raw.send(b"".join(calls[1:]))
        _, *answers = raw.frames(501)
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
    "garbage": Script(Exit.INTERNAL, random.Random(8).randbytes(256)),
    "http": Script(Exit.INTERNAL, b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"),
    "magic": Script(Exit.INTERNAL, hello(magic=b"BCPI")),
    "version": Script(Exit.INTERNAL, hello(version=2)),
    "no-hello": Script(Exit.UNAVAILABLE, timeout="0.4"),
    "early-close": Script(Exit.UNAVAILABLE, hangs_up=True, timeout="0.4"),
    "hello-then-close": Script(Exit.UNAVAILABLE, hello(), hangs_up=True),
    "half-a-hello": Script(Exit.UNAVAILABLE, hello()[:20], hangs_up=True),
    "hello-twice": Script(Exit.INTERNAL, hello() + hello()),
    "kind-9": Script(Exit.INTERNAL, hello(), header(9)),
    "call": Script(Exit.INTERNAL, hello(), call(1)),
    "credit": Script(Exit.INTERNAL, hello(), header(CREDIT_KIND, call_id=1, value=1)),
    "end-of-an-unknown-call": Script(Exit.INTERNAL, hello(), end(7)),
    "end-of-the-session-with-ok": Script(Exit.INTERNAL, hello(), end(0)),
    "end-with-status-17": Script(Exit.INTERNAL, hello(), end(1, 17, b"what?")),
    "message-not-utf-8": Script(Exit.INTERNAL, hello(), end(1, 3, b"\xff\xfe")),
    "message-too-long": Script(Exit.INTERNAL, hello(), end(1, 3, b"x" * 1025)),
    "reply-of-4-GiB": Script(Exit.INTERNAL, hello(), header(END_KIND, 0xFFFFFFFF, call_id=1)),
    "item-to-echo": Script(Exit.INTERNAL, hello(), item(1, 0, b"x")),
    "refusal": Script(Exit.RESOURCE_EXHAUSTED, end(0, Status.RESOURCE_EXHAUSTED, b"full")),
    "refusal-after-hello": Script(
        Exit.RESOURCE_EXHAUSTED, hello(), end(0, Status.RESOURCE_EXHAUSTED, b"full")
    ),
    "goodbye": Script(Exit.UNAVAILABLE, hello() + header(GOODBYE_KIND), hangs_up=True),
    "reply-cut-short": Script(
        Exit.UNAVAILABLE, hello(), header(END_KIND, 5, call_id=1) + b"he", hangs_up=True
    ),
    "wrong-reply": Script(Exit.DATA_LOSS, hello(), end(1, 0, b"jello")),
    "item-of-a-later-call": Script(Exit.INTERNAL, hello(), item(2, 0, b""), command="stream"),
    "item-out-of-order": Script(Exit.INTERNAL, hello(), item(1, 1, b""), command="stream"),
    "items-without-credit": Script(Exit.INTERNAL, hello(), RIGHT_ITEMS, command="overrun"),
    "stream-end-with-payload": Script(Exit.INTERNAL, hello(), end(1, 0, b"x"), command="stream"),
    "stream-cut-short": Script(
        Exit.UNAVAILABLE, hello(), RIGHT_ITEMS, hangs_up=True, command="stream"
    ),
    "wrong-items": Script(Exit.DATA_LOSS, hello(), WRONG_ITEMS, command="stream"),
    "too-few-items": Script(Exit.DATA_LOSS, hello(), RIGHT_ITEMS + end(1), command="stream"),
}
EVERYWHERE = (
    "garbage",
    "no-hello",
    "early-close",
    "half-a-hello",
    "reply-of-4-GiB",
    "reply-cut-short",
    "stream-cut-short",
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
    [(scheme, name) for scheme in FRAMED for name in SCRIPTS if scheme == "unix"]
    + [(scheme, name) for scheme in FRAMED if scheme != "unix" for name in EVERYWHERE],
)
def test_a_server_that_breaks_the_rules(scheme: str, name: str, caller: str, runtime: Path) -> None:
    script = SCRIPTS[name]
    peer(caller)
    listener = transport(listen_url(scheme, runtime)).listen()
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


CALL_BYTES = {"echo": 16 + len("hello"), "stream": 16 + 4, "overrun": 16 + 4}  # 08 05 10 08


@of_clients
@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_child_that_breaks_the_rules(name: str, caller: str, tmp_path: Path) -> None:
    """The same over stdio, by a shell that knows how much a client says before it waits."""
    script = SCRIPTS[name]
    for part, data in (("first", script.first), ("answer", script.answer)):
        (tmp_path / part).write_bytes(data)
    lines = [f"cat {tmp_path}/first"]
    if script.answer:
        said = len(hello()) + CALL_BYTES[script.command]
        lines += [f"head -c {said} >{tmp_path}/said", f"cat {tmp_path}/answer"]
    lines += [] if script.hangs_up else ["cat >/dev/null"]
    url = "stdio:" + shlex.join(["/bin/sh", "-c", "; ".join(lines)])
    command = "stream" if script.command == "overrun" else script.command
    words = (command, url, *COMMANDS[script.command], "--timeout", script.timeout)
    assert run_client(caller, *words) == script.code
    if script.answer:
        assert [frame.kind for frame in split((tmp_path / "said").read_bytes())] == [
            HELLO_KIND,
            CALL_KIND,
        ]


@of_clients
@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("stdio:/bin/cat", Exit.INTERNAL),  # which says what we said
        ("stdio:/bin/true", Exit.UNAVAILABLE),
        ("stdio:/bin/echo hello, I am no server of yours", Exit.INTERNAL),
        ("stdio:/nonexistent/server", Exit.NOT_FOUND),
    ],
    ids=["cat", "true", "echo", "nothing"],
)
def test_a_child_that_is_no_server(caller: str, url: str, code: int) -> None:
    assert run_client(caller, "echo", url, "--payload", "hello") == code
