"""The peer programs from the outside: words in; texts, JSON, files, signals and exit codes out.

A test runs for each language, and its expectation is the same for both: that is the mirror. Where
texts are long (help, JSON), the two outputs are compared with each other.
"""

import array
import contextlib
import inspect
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ipc_bridge
from ipc_bridge import Error, arguments, endpoint
from ipc_bridge import peer as twin
from ipc_bridge.endpoint import SCHEMES, way_of
from ipc_bridge.frame import PAYLOAD_BYTES_LIMIT, PAYLOAD_BYTES_MAX
from ipc_bridge.server import CLIENTS_MAX_DEFAULT, GRACE_S_DEFAULT
from ipc_bridge.service import ECHO, STREAM, Pattern, make_service
from ipc_bridge.session import WINDOW_BYTES_DEFAULT
from peer_support import GONE_S, Outcome, files, peer, run, served, serving_own, started, stdio_url
from processes import is_gone, only_child, sleeps
from support import (
    EXIT_S,
    LANGUAGES,
    READY_S,
    SLOW,
    TRANSPORTS,
    Exit,
    listen_url,
    until,
    wait_until,
)

OWN_UNARY, OWN_STREAM = 7, 8  # methods of the tests' own service
REQUIRED = {  # the least that a command needs
    "serve": [],
    "echo": ["--payload", "x"],
    "stream": ["--count", "1", "--size", "1"],
    "bench": ["--op", "echo", "--size", "1", "--duration", "1"],
}
WRONG = {  # what `abc` is told to be, by the name of the value
    "BYTES": "a size",
    "N": "a whole number",
    "M": "a whole number",
    "SECONDS": "a decimal number",
    "HZ": "a decimal number",
}

each_language = pytest.mark.parametrize("language", LANGUAGES)
each_server = pytest.mark.parametrize("server", LANGUAGES)


@pytest.fixture
def url(runtime: Path) -> str:
    """An address that nobody serves yet."""
    return f"unix://{runtime}/s"


@pytest.fixture
def served_url(url: str) -> Iterator[str]:
    """Echo and stream, and the tests' own methods, at an address."""
    service = make_service()
    service.unary(OWN_UNARY, lambda call, request: bytes(request) + b"!")
    service.streaming(OWN_STREAM, lambda call, request: [b"a", b"bc"])
    with serving_own(url, service) as at:
        yield at


def failed(outcome: Outcome) -> tuple[int, str]:
    """Code and text of a peer that failed, and printed nothing else."""
    assert outcome.out == b""
    return outcome.code, outcome.err


# --- errors: the same line, the same code ---


@each_language
@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("", "a command is missing; known are serve, echo, stream, bench"),
        ("shout unix:///x", "unknown command; known are serve, echo, stream, bench, shout"),
        ("--loud", "unknown option, --loud"),
        ("echo", "a required word is missing, URL"),
        ("echo unix:///x", "a required option is missing, --payload"),
        ("stream unix:///x --size 1", "a required option is missing, --count"),
        ("stream unix:///x --count 1", "a required option is missing, --size"),
        ("bench unix:///x --size 1 --duration 1", "a required option is missing, --op"),
        ("bench unix:///x --op echo --duration 1", "a required option is missing, --size"),
        ("bench unix:///x --op echo --size 1", "a required option is missing, --duration"),
        ("echo unix:///x --payload x --loud", "unknown option, --loud"),
        ("echo unix:///x --payload x --loud=9", "unknown option, --loud"),
        ("echo unix:///x --payload x --pay=y", "unknown option, --pay"),
        ("echo unix:///x --payload x -l", "unknown option, -l"),
        ("echo unix:///x y --payload x", "one word too many, y"),
        ("echo unix:///x --payload", "a value is missing, --payload"),
        ("echo unix:///x --payload x --json=1", "this option takes no value, --json"),
        ("stream unix:///x --count 1 --size abc", "'abc' is not a size, --size"),
        ("stream unix:///x --count 1 --size=", "'' is not a size, --size"),
        ("stream unix:///x --count 1 --size 4k", "'4k' is not a size, --size"),
        ("stream unix:///x --count 1 --size -1", "'-1' is not a size, --size"),
        ("stream unix:///x --count 1 --size 65MiB", "'65MiB' is not within 0 to 67108864, --size"),
        ("stream unix:///x --count 1.5 --size 1", "'1.5' is not a whole number, --count"),
        ("stream unix:///x --count 1_0 --size 1", "'1_0' is not a whole number, --count"),
        ("stream unix:///x --count 1 --size 1 --rate 1e3", "'1e3' is not a decimal number, --rate"),
        ("stream unix:///x --count 1 --size 1 --rate nan", "'nan' is not a decimal number, --rate"),
        ("echo unix:///x --payload x --timeout .", "'.' is not a decimal number, --timeout"),
        ("echo unix:///x --payload x --timeout -1", "'-1' is not a decimal number, --timeout"),
        (
            "echo unix:///x --payload x --count 0",
            "'0' is not within 1 to 999999999999999999, --count",
        ),
        (
            "stream unix:///x --count 1 --size 1 --window 0",
            "'0' is not within 1 to 1073741824, --window",
        ),
        (
            "stream unix:///x --count 1 --size 1 --window 2GiB",
            "'2GiB' is not within 1 to 1073741824, --window",
        ),
        (
            "serve unix:///x --max-payload 999999999999999999GiB",
            "'999999999999999999GiB' is not within 0 to {limit}, --max-payload",
        ),
        ("serve unix:///x --clients-max 0", "'0' is not within 1 to 65536, --clients-max"),
        (
            "bench unix:///x --op echo --size 1 --duration 0",
            "'0' is not within 0.001 to 3600, --duration",
        ),
        (
            "bench unix:///x --op echo --size 1 --duration 1 --clients 1025",
            "'1025' is not within 1 to 1024, --clients",
        ),
        (
            "bench unix:///x --op echo --size 1 --duration 1 --method 65536",
            "'65536' is not within 1 to 65535, --method",
        ),
        (
            "bench unix:///x --op sing --size 1 --duration 1",
            "'sing' is neither echo nor stream, --op",
        ),
        (
            "bench unix:///x --op echo --payload x --duration 1",
            "this option goes with --method, --payload",
        ),
        (
            "bench unix:///x --op stream --method 8 --size 1 --duration 1 --rate 9",
            "a method's stream has its own pace, --rate",
        ),
        (
            "bench unix:///x --op stream --size 7 --duration 1 --rate 9",
            "'7' is not within 8 to 67108864, --size",
        ),
        (
            "bench unix:///x --op echo --size 1 --duration 1 --work 1",
            "this option goes with --op stream, --work",
        ),
        (
            "bench unix:///x --op echo --size 1 --duration 1 --server-pid mum",
            "'mum' is not a whole number, --server-pid",
        ),
        ("echo carrier:pigeon --payload x", "unknown scheme; known are {schemes}, carrier:pigeon"),
        ("echo nowhere --payload x", "unknown scheme; known are {schemes}, nowhere"),
        (
            "echo unix:relative --payload x",
            "unix takes an absolute path: unix:///path, unix:relative",
        ),
        ("echo unix:///x?speed=9 --payload x", "unknown option speed, unix:///x?speed=9"),
        (
            "echo unix:///x?wait=long --payload x",
            "wait is block, spin or adaptive, unix:///x?wait=long",
        ),
        (
            "echo zmq+ipc:///x?wait=spin --payload x",
            "ZeroMQ has no spin: its own threads would starve; wait is block, zmq+ipc:///x",
        ),
        ("echo zmq+tcp://h --payload x", "zmq+tcp takes a host and a port, zmq+tcp://h"),
        ("echo tcp://127.0.0.1 --payload x", "tcp takes a host and a port, tcp://127.0.0.1"),
        ("echo tcp://h:65536 --payload x", "tcp takes a host and a port, tcp://h:65536"),
        ("echo tcp://h:-0 --payload x", "tcp takes a host and a port, tcp://h:-0"),
        ("echo tcp://::1:5 --payload x", "tcp takes a host and a port, tcp://::1:5"),
        ("echo tcp://[::1 --payload x", "tcp takes a host and a port, tcp://[::1"),
        (
            "echo unix:///a%00b --payload x",
            "unix takes an absolute path: unix:///path, unix:///a%00b",
        ),
        (
            "echo unix://[/x --payload x",
            "unix takes an absolute path: unix:///path, unix://[/x",
        ),
    ],
)
def test_a_wrong_command_line(language: str, words: str, error: str) -> None:
    error = error.replace("{schemes}", ", ".join(SCHEMES))
    error = error.replace("{limit}", str(PAYLOAD_BYTES_LIMIT))
    line = f"error: INVALID_ARGUMENT: {error}\n"
    assert failed(run(language, *words.split())) == (2, line)


@each_language
@pytest.mark.parametrize("command", arguments.COMMANDS, ids=lambda command: command.name)
def test_each_option_with_a_number_refuses_another_word(
    language: str, command: arguments.Command
) -> None:
    for option in command.options + arguments.COMMON:
        if option.value in WRONG:
            words = ["unix:///x", *REQUIRED[command.name], option.name, "abc"]
            line = f"error: INVALID_ARGUMENT: 'abc' is not {WRONG[option.value]}, {option.name}\n"
            assert failed(run(language, command.name, *words)) == (2, line)


@each_language
@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (
            "serve unix://{dir}/no/s",
            15,
            "NOT_FOUND: open: No such file or directory, {dir}/no/s.lock",
        ),
        ("serve pipe://{dir}/no/p", 15, "NOT_FOUND: mkdir: No such file or directory, {dir}/no/p"),
        (
            "serve tcp://192.0.2.1:0",
            17,
            "PERMISSION_DENIED: not a loopback address; ?allow_remote=1 serves other hosts, "
            "unencrypted, tcp://192.0.2.1:0",
        ),
        (
            "serve unix://{dir}/s --ready-file {dir}/no/r",
            15,
            "NOT_FOUND: open: No such file or directory, {dir}/no/r",
        ),
        (
            "serve unix://{dir}/s --ready-file {dir}",
            16,
            "ALREADY_EXISTS: not a file of ours to replace, {dir}",
        ),
        (
            "echo unix://{dir}/s --payload x --timeout 0.1",
            24,
            "UNAVAILABLE: no server, unix://{dir}/s",
        ),
        (
            "stream pipe://{dir}/p --count 1 --size 1 --timeout 0",
            24,
            "UNAVAILABLE: no server, pipe://{dir}/p",
        ),
        (
            "echo unix://{dir}/s --payload @{dir}/no",
            15,
            "NOT_FOUND: open: No such file or directory, {dir}/no",
        ),
        ("echo unix://{dir}/s --payload @{dir}", 23, "INTERNAL: read: Is a directory, {dir}"),
        (
            "echo stdio:{dir}/no --payload x",
            15,
            "NOT_FOUND: spawn: No such file or directory, {dir}/no",
        ),
        (
            "echo tcp://a..B:1 --payload x --timeout 0",
            15,
            "NOT_FOUND: unknown host, tcp://a..B:1",
        ),
        ("serve zmq+tcp://a..B:1", 15, "NOT_FOUND: unknown host, zmq+tcp://a..B:1"),
        ("serve grpc+tcp://a..B:1", 15, "NOT_FOUND: unknown host, grpc+tcp://a..B:1"),
        (
            "echo grpc+tcp://a..B:1 --payload x --timeout 0",
            15,
            "NOT_FOUND: unknown host, grpc+tcp://a..B:1",
        ),
        (
            "echo unix://{dir}/s?&wait=spin --payload x --timeout 0",
            24,
            "UNAVAILABLE: no server, unix://{dir}/s",
        ),
        (
            "bench unix://{dir}/s --op echo --size 1 --duration 1 --samples {dir}/no/f",
            15,
            "NOT_FOUND: open: No such file or directory, {dir}/no/f",
        ),
    ],
)
def test_what_cannot_be_done(
    language: str, words: str, code: int, error: str, runtime: Path
) -> None:
    outcome = run(language, *words.replace("{dir}", str(runtime)).split())
    assert failed(outcome) == (code, f"error: {error}\n".replace("{dir}", str(runtime)))


@each_language
def test_stdio_needs_pipes(language: str) -> None:
    what = "fd 0 is not a pipe; a client starts this program: stdio:COMMAND"
    with open(os.devnull, "rb") as null:
        outcome = run(language, "serve", "stdio:", stdin=null.fileno())
    assert failed(outcome) == (19, f"error: FAILED_PRECONDITION: {what}, stdio:\n")


@each_language
@each_server
def test_an_address_in_use(language: str, server: str, url: str, runtime: Path) -> None:
    line = f"error: ALREADY_EXISTS: another server has this address, {runtime}/s.lock\n"
    with served(url, server) as running:
        assert failed(run(language, "serve", url)) == (16, line)
        assert run(language, "echo", running.url, "--payload", "x").code == 0


@each_language
def test_a_port_in_use(language: str) -> None:
    with serving_own("tcp://127.0.0.1:0", make_service()) as at:
        line = f"error: ALREADY_EXISTS: bind: Address already in use, {at}\n"
        assert failed(run(language, "serve", at)) == (16, line)


@each_language
@each_server
def test_an_oversize_payload(language: str, server: str, url: str) -> None:
    line = f"error: RESOURCE_EXHAUSTED: payload of 1025 bytes, the server takes 1024, {url}\n"
    with served(url, server, "--max-payload", "1KiB"):
        assert failed(run(language, "echo", url, "--payload", "x" * 1025)) == (18, line)
        assert run(language, "echo", url, "--payload", "x" * 1024).code == 0


@each_language
def test_an_oversize_answer(language: str, served_url: str) -> None:
    line = (
        f"error: RESOURCE_EXHAUSTED: payload of 1025 bytes, the client takes 1024, {served_url}\n"
    )
    words = ["echo", served_url, "--max-payload", "1KiB", "--payload", "x" * 1025]
    assert failed(run(language, *words)) == (18, line)


@each_language
@each_server
def test_one_client_too_many(language: str, server: str, url: str) -> None:
    line = f"error: RESOURCE_EXHAUSTED: the server has 1 clients and takes no more, {url}\n"
    with served(url, server, "--clients-max", "1"), ipc_bridge.connect(url) as first:
        first.echo(b"")  # an answer: it counts as a client from now on
        assert failed(run(language, "echo", url, "--payload", "x")) == (18, line)


@each_language
def test_an_unknown_method(language: str, served_url: str) -> None:
    words = "--op echo --method 9 --payload x --duration 0.01 --json"
    outcome = run(language, "bench", served_url, *words.split())
    line = f"error: UNIMPLEMENTED: no unary method 9, {served_url}"
    result = json.loads(outcome.out)
    assert (outcome.code, outcome.err) == (22, f"{line}\n")
    assert f"error: {result['error']}" == line
    assert result["errors"] > 0
    assert result["operations"] == 0


# --- help ---


@pytest.mark.parametrize("command", arguments.COMMANDS, ids=lambda command: command.name)
def test_the_help_of_a_command_is_the_same(command: arguments.Command) -> None:
    texts = {}
    for language in LANGUAGES:
        code, out, err = run(language, command.name, "--help", env={"COLUMNS": "40"})
        assert (code, err) == (0, "")
        texts[language] = out.decode()
        assert run(language, command.name, "-h").out == out
    names = {
        language: set(re.findall(r"(?<!\w)--[a-z-]+", text)) for language, text in texts.items()
    }
    assert names["cpp"] == names["py"]
    for language, text in texts.items():
        words = " ".join(text.split())
        assert f"{command.name} {command.usage}" in words
        assert command.text in words
        assert command.example in words
        for name, value, sentence in (
            *command.options,
            *arguments.COMMON,
            arguments.HELP,
            arguments.VERSION,
        ):
            assert f"{name} {value} {sentence}".replace("  ", " ") in words, language
    tails = {
        text.partition("URL is one of")[2].replace("ipc-bridge-peer", arguments.PROGRAM)
        for text in texts.values()
    }
    assert len(tails) == 1


def test_the_overview_is_the_same() -> None:
    texts = [run(language, "--help") for language in LANGUAGES]
    assert (
        texts[0].out.decode().replace("ipc-bridge-peer", arguments.PROGRAM) == texts[1].out.decode()
    )
    assert {text.code for text in texts} == {0}
    for scheme in SCHEMES:
        assert f"  {scheme}:" in texts[0].out.decode()


def test_the_help_tells_the_options_of_a_url() -> None:
    """All there are, and the schemes that take each: those it names, or every one."""
    for scheme in SCHEMES:
        form = arguments.url_form(scheme)
        for name, value, text in arguments.URL_OPTIONS:
            takers = text.partition(": ")[2].split(", ")
            query = f"?{name}={value.partition('|')[0]}"
            query += {"cert": "&key=K", "key": "&cert=C"}.get(name, "")  # they go together
            url = f"stdio:{query} x" if scheme == "stdio" else form + query
            if scheme in takers or takers == [""]:
                way_of(url)
            else:
                with pytest.raises(Error, match="unknown option"):
                    way_of(url)
    source = inspect.getsource(endpoint)
    known = set(re.findall(r'"([a-z_]+)"', " ".join(re.findall(r"\(url, \{(.*?)\}\)", source))))
    assert {option.name for option in arguments.URL_OPTIONS} == known


@each_language
def test_the_window_is_for_who_reads_a_stream(language: str) -> None:
    line = "error: INVALID_ARGUMENT: unknown option, --window\n"
    for words in ("serve unix:///x", "echo unix:///x --payload x"):
        assert failed(run(language, *words.split(), "--window", "1")) == (2, line)


@each_language
def test_the_version(language: str) -> None:
    expected = (0, f"ipc-bridge-peer {ipc_bridge.__version__} ({language})\n".encode(), "")
    assert run(language, "--version") == expected
    assert run(language, "echo", "--version") == expected


def test_the_help_tells_the_defaults() -> None:
    text = " ".join(
        option.text for option in (*arguments.COMMON, *arguments.SERVE, arguments.WINDOW)
    )
    assert f"(default {WINDOW_BYTES_DEFAULT >> 20}MiB)" in text
    assert f"(default {PAYLOAD_BYTES_MAX >> 20}MiB)" in text
    assert f"default {CLIENTS_MAX_DEFAULT})" in text
    assert f"(default {GRACE_S_DEFAULT:g})" in text


@each_language
@pytest.mark.parametrize("colour", ["NO_COLOR", "FORCE_COLOR"])
def test_no_colours(language: str, colour: str) -> None:
    for words in (["--help"], ["echo", "--help"], ["echo"]):
        outcome = run(language, *words, env={colour: "1"})
        assert "\x1b" not in outcome.out.decode() + outcome.err


# --- echo and stream ---


@each_language
@each_server
def test_echo_prints_what_comes_back(language: str, server: str, url: str, tmp_path: Path) -> None:
    every_byte = bytes(range(256)) * 300
    (tmp_path / "payload").write_bytes(every_byte)
    with served(url, server):

        def echoed(*words: str, stdin: bytes = b"") -> bytes:
            outcome = run(language, "echo", url, *words, stdin=stdin)
            assert (outcome.code, outcome.err) == (0, "")
            return outcome.out

        assert echoed("--payload", "hello") == b"hello\n"
        assert echoed("--payload=grüße", "--count", "3") == "grüße\n".encode()
        assert echoed("--payload", "--json") == b"--json\n"
        assert echoed("--payload", "") == b"\n"
        assert echoed("--payload=") == b"\n"
        assert echoed("--payload", "a", "--payload", "b") == b"b\n"
        assert echoed("--payload", f"@{tmp_path}/payload", "--timeout", "9") == every_byte
        assert echoed("--payload", "-", stdin=every_byte) == every_byte
        assert echoed("--payload", "-") == b""


@each_language
@each_server
def test_stream_counts_and_verifies(language: str, server: str, url: str) -> None:
    with served(url, server):
        for count, size, size_bytes in (("0", "5", 5), ("1", "0", 0), ("1000", "4KiB", 4096)):
            outcome = run(language, "stream", url, "--count", count, "--size", size)
            line = rf"{count} items of {size_bytes} bytes verified in [0-9.]+ s "
            assert re.fullmatch(line + r"\([0-9]+ items/s, [0-9.]+ MB/s\)\n", outcome.out.decode())
            assert (outcome.code, outcome.err) == (0, "")
        outcome = run(
            language, "stream", url, "--count", "10", "--size", "1", "--rate", "100", "--json"
        )
        assert json.loads(outcome.out)["seconds"] >= 0.09


@each_language
def test_a_deadline(language: str, served_url: str) -> None:
    words = ["--count", "9", "--size", "1", "--rate", "1", "--timeout", "0.2"]
    code, line = failed(run(language, "stream", served_url, *words))
    # Client and server both keep the deadline; who says so first is a matter of luck.
    assert re.fullmatch(rf"error: DEADLINE_EXCEEDED: [a-z ]+, {served_url}\n", line)
    assert code == 14


def test_json_has_the_same_keys_in_both_languages(url: str) -> None:
    commands = [
        ["echo", url, "--payload", "grüße"],
        ["stream", url, "--count", "3", "--size", "5"],
        ["bench", url, "--op", "echo", "--size", "5", "--duration", "0.05"],
        ["bench", url, "--op", "stream", "--size", "8", "--duration", "0.05", "--rate", "100"],
    ]
    with served(url, "py"):
        for words in commands:
            lines = [run(language, *words, "--json").out.decode() for language in LANGUAGES]
            assert [line.count("\n") for line in lines] == [1, 1]
            cpp, py = map(json.loads, lines)
            assert shape(cpp) == shape(py)
        assert cpp["language"] == "cpp"
        assert py["language"] == "py"
        assert cpp["version"] == py["version"]
        assert json.loads(run("py", *commands[0], "--json").out)["payload"] == "grüße"


def shape(value: Any) -> Any:
    """Keys, in order, and what kind of value each has."""
    if isinstance(value, dict):
        return [(key, shape(inner)) for key, inner in value.items()]
    return "text" if isinstance(value, str) else "number, or none"


@each_language
def test_serve_in_json(language: str, url: str) -> None:
    with started(language, "serve", url, "--json") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f'{{"ready":"{url}"}}\n'.encode()
        process.send_signal(signal.SIGTERM)
        assert process.wait(EXIT_S) == 0


@each_language
def test_a_reader_who_leaves_is_no_error(language: str, served_url: str) -> None:
    commands = [
        ["--help"],
        ["echo", "--help"],
        ["echo", served_url, "--payload", "x"],
        ["stream", served_url, "--count", "1", "--size", "1"],
        ["bench", served_url, "--op", "echo", "--size", "1", "--duration", "0.01"],
    ]
    for words in commands:
        reader, writer = os.pipe()
        os.close(reader)
        outcome = run(language, *words, stdout=writer)
        os.close(writer)
        assert outcome == Outcome(0, b"", "")


@each_language
def test_a_full_disk_is_an_error(language: str, served_url: str) -> None:
    line = "error: RESOURCE_EXHAUSTED: write: No space left on device, stdout\n"
    with open("/dev/full", "wb") as full:
        outcome = run(language, "echo", served_url, "--payload", "x", stdout=full.fileno())
    assert failed(outcome) == (18, line)


@each_language
def test_words_that_are_not_utf8(language: str, runtime: Path) -> None:
    url = f"unix://{runtime}/m" + os.fsdecode(b"\xfcll")  # Latin-1
    with serving_own(url, make_service()):
        assert run(language, "echo", url, "--payload", os.fsdecode(b"\xfc")).out == b"\xfc\n"
        words = ["bench", url, "--op", "echo", "--size", "1", "--duration", "0.01"]
        for form in ([], ["--json"]):
            outcome = run(language, *words, *form)
            assert outcome.code == 0
            assert json.loads(outcome.out)["url"] == f"unix://{runtime}/m\ufffdll"
    words = [*peer(language), "echo", url, "--payload", "x", "--timeout", "0"]
    error = subprocess.run(words, stderr=subprocess.PIPE, check=False).stderr
    assert error == b"error: UNAVAILABLE: no server, " + os.fsencode(url) + b"\n"


def test_a_record_is_one_line() -> None:
    record = logging.LogRecord("x", logging.ERROR, "", 0, "%s failed", ("it",), None)
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record.exc_info = (ValueError, error, None)
    assert twin.OneLine("%(levelname)s: %(message)s").format(record) == (
        "ERROR: it failed: two: lines"
    )


# --- wrong answers ---


def flipping_service() -> ipc_bridge.Service:
    """An echo that flips a bit, and a stream whose item 3 is that of another index."""

    def echo(call: ipc_bridge.Call, request: memoryview) -> bytes:
        reply = bytearray(request)
        reply[-1] ^= 1
        return bytes(reply)

    def stream(call: ipc_bridge.Call, request: memoryview) -> Iterator[memoryview]:
        pattern = Pattern(100)
        for index in range(10):
            yield pattern.item(index if index != 3 else 4)

    service = ipc_bridge.Service()
    service.unary(ECHO, echo)
    service.streaming(STREAM, stream)
    return service


@each_language
def test_wrong_answers_are_found(language: str, url: str) -> None:
    with serving_own(url, flipping_service()):
        line = f"error: DATA_LOSS: the answer differs from the payload, {url}\n"
        assert failed(run(language, "echo", url, "--payload", "hello")) == (25, line)
        line = f"error: DATA_LOSS: item 3 differs from the pattern, {url}\n"
        assert failed(run(language, "stream", url, "--count", "10", "--size", "100")) == (25, line)


@each_language
@pytest.mark.parametrize("count", [9, 11])
def test_a_wrong_count_of_items_is_found(language: str, count: int, url: str) -> None:
    service = ipc_bridge.Service()
    service.streaming(STREAM, lambda call, request: [b""] * count)
    line = f"error: DATA_LOSS: {count} items instead of 10, {url}\n"
    with serving_own(url, service):
        assert failed(run(language, "stream", url, "--count", "10", "--size", "0")) == (25, line)


@each_language
@pytest.mark.parametrize("rate", [[], ["--rate", "100"]], ids=["closed", "open"])
def test_bench_counts_wrong_answers(language: str, rate: list[str], url: str) -> None:
    with serving_own(url, flipping_service()):
        words = ["--op", "echo", "--size", "100", "--duration", "0.1", "--json", *rate]
        outcome = run(language, "bench", url, *words)
    result = json.loads(outcome.out)
    failures = result["verification_failures"]
    assert failures == result["operations"] > 0
    assert (result["errors"], result["error"]) == (0, None)
    line = f"error: DATA_LOSS: {failures} answers differ from the pattern, {url}\n"
    assert (outcome.code, outcome.err) == (25, line)


@each_language
def test_bench_finds_a_wrong_item(language: str, url: str) -> None:
    def stream(call: ipc_bridge.Call, request: memoryview) -> Iterator[memoryview]:
        pattern, index = Pattern(100), 0
        while True:
            yield pattern.item(index if index != 3 else 4)
            index += 1

    service = ipc_bridge.Service()
    service.streaming(STREAM, stream)
    with serving_own(url, service):
        words = ["--op", "stream", "--size", "100", "--duration", "0.1", "--json"]
        outcome = run(language, "bench", url, *words)
    assert json.loads(outcome.out)["verification_failures"] == 1
    assert outcome.code == 25


# --- bench ---


def bench(language: str, url: str, samples: Path, words: str) -> dict[str, Any]:
    """Run a benchmark that must succeed; checks what holds for all."""
    outcome = run(language, "bench", url, *words.split(), "--json", "--samples", str(samples))
    assert (outcome.code, outcome.err) == (0, "")
    result: dict[str, Any] = json.loads(outcome.out)
    latencies = array.array("Q", samples.read_bytes())
    ordered = sorted(latencies)
    assert result["samples"] == len(latencies)
    assert (result["errors"], result["error"], result["verification_failures"]) == (0, None, 0)
    assert result["operations"] > 0
    per_second = result["operations"] / result["seconds"]
    assert result["operations_per_second"] == pytest.approx(per_second)
    assert result["bytes_per_second"] == pytest.approx(result["bytes"] / result["seconds"])
    for name, share in (("p50", 50), ("p90", 90), ("p99", 99), ("max", 100)):
        rank = -(-len(ordered) * share // 100)
        assert result["latency_ns"][name] == (ordered[rank - 1] if ordered else None)
    assert (result["latency_ns"]["p99_9"] is None) == (len(ordered) < 1000)
    if result["age_ns"]["p50"] is not None:  # one of each item that has a latency
        assert (result["age_ns"]["p99"] is None) == (len(ordered) < 100)
    assert result["memory_peak_bytes"] > 1 << 20
    assert result["cpu_s"]["user"] + result["cpu_s"]["system"] > 0
    return result


@each_language
@each_server
def test_bench_echo(language: str, server: str, url: str, tmp_path: Path) -> None:
    words = "--op echo --size 1KiB --duration 0.2 --warmup 0.1 --clients 2"
    with served(url, server):
        result = bench(language, url, tmp_path / "samples", words)
    assert result["samples"] == result["operations"]
    assert result["bytes"] == 1024 * result["operations"]
    assert 0.2 <= result["seconds"] < 0.2 + SLOW
    assert (result["clients"], result["warmup_s"], result["rate_hz"]) == (2, 0.1, 0.0)


@each_language
@each_server
def test_bench_stream(language: str, server: str, url: str, tmp_path: Path) -> None:
    words = "--op stream --size 64 --duration 0.2 --warmup 0.1 --clients 2"
    with served(url, server):
        result = bench(language, url, tmp_path / "samples", words)
    assert result["samples"] == 0
    assert result["bytes"] == 64 * result["operations"]
    assert 0.2 <= result["seconds"] < 0.2 + SLOW


@each_language
def test_bench_echo_at_a_rate(language: str, served_url: str, tmp_path: Path) -> None:
    words = "--op echo --size 0 --duration 0.2 --warmup 0.1 --rate 500 --clients 3"
    result = bench(language, served_url, tmp_path / "samples", words)
    assert result["samples"] == result["operations"]
    assert result["operations"] == pytest.approx(100, abs=3)  # a client's share is a whole number
    assert result["rate_hz"] == 500


@each_language
@each_server
def test_bench_stream_at_a_rate(language: str, server: str, url: str, tmp_path: Path) -> None:
    words = "--op stream --size 8 --duration 0.5 --rate 200 --clients 2"
    with served(url, server):
        result = bench(language, url, tmp_path / "samples", words)
    assert result["samples"] == result["operations"] < 1000  # 100, and what was late at the start
    assert result["latency_ns"]["p50"] < 1e9  # one clock for both


@each_language
@each_server
def test_bench_shows_a_consumer_that_is_too_slow(
    language: str, server: str, url: str, tmp_path: Path
) -> None:
    """Items come every 5 ms, and each takes 10: the last is late by half the time. The producer
    runs ahead by the window, so that the latency shows it as well; with a window of one item, the
    producer waits, and the age alone shows it."""
    words = "--op stream --size 1KiB --duration 0.6 --rate 200 --work 0.01"
    with served(url, server):
        ahead = bench(language, url, tmp_path / "samples", words)
        waiting = bench(language, url, tmp_path / "samples", f"{words} --window 1")
    for result in (ahead, waiting):
        assert result["operations"] <= 60
        assert result["age_ns"]["p99"] is None, "of so few it would be the maximum"
        assert result["age_ns"]["max"] >= 250e6
    assert ahead["latency_ns"]["max"] >= 240e6
    assert waiting["latency_ns"]["p50"] < 0.5 * waiting["age_ns"]["p50"]


@each_language
@each_server
def test_bench_shows_the_work_on_an_item(
    language: str, server: str, url: str, tmp_path: Path
) -> None:
    words = "--op stream --size 8 --duration 0.4 --rate 25 --work 0.01"
    with served(url, server):
        result = bench(language, url, tmp_path / "samples", words)
    assert result["age_ns"]["p50"] - result["latency_ns"]["p50"] >= 9e6
    words = words.replace(" --rate 25", "")
    with served(url, server):
        result = bench(language, url, tmp_path / "samples", words)
    assert 1 <= result["operations"] <= 41


@each_language
@each_server
def test_bench_reports_what_the_server_uses(
    language: str, server: str, url: str, tmp_path: Path
) -> None:
    words = "--op echo --size 64 --duration 0.2 --warmup 0.1"
    samples = tmp_path / "samples"
    with served(f"{url}?wait=block", server) as running:
        pid = running.process.pid
        used = bench(language, f"{url}?wait=block", samples, f"{words} --server-pid {pid}")
        assert bench(language, url, samples, words)["server"] is None
    calls = used["operations"] + used["operations_warmup"]
    assert used["operations_warmup"] > 0
    assert 0 < used["server"]["cpu_s"] < 1
    # A call wakes the server once, unless it has not slept since the one before, and on a Unix
    # socket perhaps once more, when the client has read the answer and there is room again.
    assert 0 < used["server"]["context_switches"]["voluntary"] < 2.1 * calls + 10
    assert used["server"]["memory_peak_bytes"] > 1 << 20
    command = " ".join([*map(str, peer(server)), "serve", "stdio:"])
    used = bench(language, f"stdio:{command}", samples, f"{words} --server-pid child")
    assert used["server"]["cpu_s"] > 0


@each_language
def test_bench_reports_the_servers_memory_of_its_own_time(
    language: str, served_url: str, tmp_path: Path
) -> None:
    """A harness lets a server do large work, and then small: the peak is not that of the large."""
    code = "large = b'x' * (96 << 20); del large; print(flush=True); input()"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            words = f"--op echo --size 64 --duration 0.05 --server-pid {process.pid}"
            used = bench(language, served_url, tmp_path / "samples", words)
        finally:
            process.kill()
    assert 1 << 20 < used["server"]["memory_peak_bytes"] < 80 << 20


@each_language
def test_bench_needs_the_server_that_it_shall_watch(language: str, served_url: str) -> None:
    with started("py", "--version") as process:
        pid = process.pid
    words = ["bench", served_url, *REQUIRED["bench"], "--server-pid"]
    line = f"error: NOT_FOUND: open: No such file or directory, /proc/{pid}\n"
    assert failed(run(language, *words, str(pid))) == (15, line)
    code, line = failed(run(language, *words, "child"))
    assert code == 15
    assert line.startswith("error: NOT_FOUND: no server was started by this client, /proc/self/")


@each_language
@pytest.mark.parametrize("op", ["echo", "stream"])
def test_bench_a_method_of_ones_own(
    language: str, op: str, served_url: str, tmp_path: Path
) -> None:
    (tmp_path / "payload").write_bytes(b"12345")
    method = {"echo": OWN_UNARY, "stream": OWN_STREAM}[op]
    words = f"--op {op} --method {method} --payload @{tmp_path}/payload --size 99 --duration 0.1"
    result = bench(language, served_url, tmp_path / "samples", words)
    assert result["size_bytes"] == 5
    if op == "echo":
        assert result["bytes"] == 6 * result["operations"]
    else:
        assert result["bytes"] == pytest.approx(1.5 * result["operations"], abs=1)


@each_language
def test_a_stall_is_charged_to_all_calls_that_it_delays(
    language: str, url: str, tmp_path: Path
) -> None:
    stall = threading.Event()

    def echo(call: ipc_bridge.Call, request: memoryview) -> memoryview:
        if not stall.is_set():
            stall.set()
            time.sleep(0.3)
        return request

    service = ipc_bridge.Service()
    service.unary(ECHO, echo)
    words = "--op echo --size 9 --duration 0.5 --rate 100 --json --samples"
    with serving_own(url, service):
        outcome = run(language, "bench", url, *words.split(), str(tmp_path / "samples"))
    assert outcome.code == 0
    samples = array.array("Q", (tmp_path / "samples").read_bytes())
    assert len(samples) == 50
    assert len([ns for ns in samples if ns > 100e6]) >= 18  # due in the first 200 of the 300 ms


@each_language
def test_bench_reports_a_server_that_goes(language: str, url: str) -> None:
    calls = threading.Semaphore(0)

    def echo(call: ipc_bridge.Call, request: memoryview) -> memoryview:
        calls.release()
        return request

    service = ipc_bridge.Service()
    service.unary(ECHO, echo)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(contextlib.ExitStack())
        server.enter_context(serving_own(url, service))
        words = ["bench", url, "--op", "echo", "--size", "1", "--duration", "60", "--json"]
        process = stack.enter_context(started(language, *words))
        assert calls.acquire(timeout=READY_S)
        server.close()
        out, err = process.communicate(timeout=EXIT_S)
    result = json.loads(out)
    assert result["errors"] == 1
    assert f"error: {result['error']}\n" == err.decode()
    assert process.returncode == 24
    assert result["operations"] > 0
    assert result["seconds"] < 60


# --- signals and files ---


@each_language
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "stdio"])
def test_a_signal_drains_and_leaves_nothing(
    language: str, number: signal.Signals, scheme: str, runtime: Path
) -> None:
    where = "127.0.0.1:0" if scheme.endswith("tcp") else f"{runtime}/s"
    address = f"{scheme}://{where}"
    ready = runtime / "ready"
    with served(address, language, "--ready-file", str(ready), "--grace", "30") as server:
        assert ready.read_text() == f"{server.url}\n"
        assert not server.url.endswith(":0")
        with ipc_bridge.connect(server.url) as bridge:
            items = iter(bridge.stream(count=50, size=9, rate_hz=100))
            next(items)
            server.process.send_signal(number)
            assert len(list(items)) == 49
        assert server.process.wait(EXIT_S) == 0
    assert files(runtime) == []


@each_language
def test_the_grace_has_an_end(language: str, url: str) -> None:
    with served(url, language, "--grace", "0.1") as server, ipc_bridge.connect(url) as bridge:
        items = iter(bridge.stream(count=1000, size=9, rate_hz=100))
        next(items)
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(ipc_bridge.CallError, match="UNAVAILABLE"):
            list(items)
        assert server.process.wait(EXIT_S) == 0


@each_language
def test_a_second_signal_leaves_at_once(language: str, url: str, runtime: Path) -> None:
    with served(url, language, "--grace", "600") as server, ipc_bridge.connect(url) as bridge:
        items = iter(bridge.stream(count=1 << 60, size=9, rate_hz=10))
        next(items)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: files(runtime) == [], EXIT_S, "the first signal stops the listening")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(GONE_S) == Exit.INTERRUPTED


BLOCKED = {
    "echo": "echo {url} --payload x",
    "stream": "stream {url} --count 1 --size 1",
    "bench-echo": "bench {url} --op echo --size 1 --duration 60",
    "bench-stream": "bench {url} --op stream --size 1 --duration 60 --clients 2",
}
INTERRUPTED = (Exit.INTERRUPTED, b"", b"error: CANCELLED: interrupted\n")


@each_language
@pytest.mark.parametrize(
    ("scheme", "name"),
    [("unix", name) for name in BLOCKED]
    + [
        (scheme, name)
        for scheme in TRANSPORTS
        for name in ("echo", "stream")
        if scheme not in ("unix", "stdio")
    ],
)
def test_ctrl_c_ends_a_blocked_client(language: str, scheme: str, name: str, runtime: Path) -> None:
    entered, release = threading.Semaphore(0), threading.Event()

    def wait(call: ipc_bridge.Call, request: memoryview) -> list[bytes]:
        entered.release()
        release.wait(READY_S)
        return []

    service = ipc_bridge.Service()
    service.unary(ECHO, lambda call, request: b"".join(wait(call, request)))
    service.streaming(STREAM, wait)
    with serving_own(listen_url(scheme, runtime), service) as url:
        with started(language, *BLOCKED[name].replace("{url}", url).split()) as process:
            assert entered.acquire(timeout=READY_S)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=GONE_S)
        release.set()
    assert (process.returncode, out, err) == INTERRUPTED


@each_language
@each_server
@pytest.mark.parametrize("scheme", ["stdio"])
def test_ctrl_c_ends_a_client_and_its_child(language: str, server: str, scheme: str) -> None:
    """A terminal signals both."""
    words = ("--count", "2", "--size", "1", "--rate", "0.01")
    with started(language, "stream", stdio_url(server), *words) as process:
        child = only_child(process.pid)
        assert until(lambda: sleeps(process.pid))
        end_s = time.monotonic() + GONE_S
        for pid in (process.pid, child):
            os.kill(pid, signal.SIGINT)
        out, err = process.communicate(timeout=GONE_S)
        assert until(lambda: is_gone(child), end_s - time.monotonic())
    assert (process.returncode, out, err) == INTERRUPTED


@each_language
def test_stdio_prints_nothing_but_frames(language: str, runtime: Path) -> None:
    ready = runtime / "ready"
    with started(language, "serve", "stdio:", "--ready-file", str(ready)) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        hello = process.stdout.read(24)
        assert hello[4] == 1  # its kind
        assert hello[16:20] == b"IPCB"
        assert ready.read_text() == "stdio:\n"
        process.stdin.close()
        assert process.wait(EXIT_S) == 0
        assert process.stdout.read() == b""
    assert files(runtime) == []


@each_language
@each_server
def test_stdio_from_client_to_child(language: str, server: str, tmp_path: Path) -> None:
    command = " ".join([*map(str, peer(server)), "serve", "stdio:"])
    assert run(language, "echo", f"stdio:{command}", "--payload", "hi") == (0, b"hi\n", "")
    words = "--op stream --size 1KiB --duration 0.1 --clients 2"
    bench(language, f"stdio:?wait=spin {command}", tmp_path / "samples", words)
