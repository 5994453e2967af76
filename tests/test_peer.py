"""The peer programs from the outside: words in; texts, JSON, files, signals and exit codes out.

A test runs for each language, and its expectation is the same for both: that is the mirror. Where
texts are long (help, JSON), the two outputs are compared with each other.
"""

import inspect
import json
import logging
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

import ipc_bridge
from ipc_bridge import Error, arguments, endpoint
from ipc_bridge import peer as twin
from ipc_bridge.endpoint import SCHEMES, way_of
from ipc_bridge.frame import PAYLOAD_BYTES_LIMIT, PAYLOAD_BYTES_MAX
from ipc_bridge.server import CLIENTS_MAX_DEFAULT, GRACE_S_DEFAULT
from ipc_bridge.service import make_service
from ipc_bridge.session import WINDOW_BYTES_DEFAULT
from peer_support import (
    REQUIRED,
    Outcome,
    each_language,
    each_server,
    failed,
    files,
    peer,
    run,
    served,
    serving_own,
    started,
)
from support import (
    EXIT_S,
    LANGUAGES,
)

WRONG = {  # what `abc` is told to be, by the name of the value
    "BYTES": "a size",
    "N": "a whole number",
    "M": "a whole number",
    "SECONDS": "a decimal number",
    "HZ": "a decimal number",
}

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
        ("echo unix:///x --payload x -- y", "unknown option, --"),
        ("echo unix:///x -- --payload", "unknown option, --"),
        ("echo unix:///x -h=1", "this option takes no value, --help"),
        ("echo --help=1", "this option takes no value, --help"),
        ("echo --version=1", "this option takes no value, --version"),
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
def test_a_server_of_another_scheme(language: str, url: str, runtime: Path) -> None:
    with served(url, "cpp"):
        other = f"shm://{runtime}/s"
        line = f"error: INVALID_ARGUMENT: connect: Protocol wrong type for socket, {other}\n"
        assert failed(run(language, "echo", other, "--payload", "x")) == (13, line)


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
        assert echoed("--payload", "--") == b"--\n"
        assert echoed("--payload==") == b"=\n"
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


@each_language
@pytest.mark.parametrize(
    "scheme", [scheme for scheme in SCHEMES if scheme != "stdio" and not scheme.endswith("tcp")]
)
def test_a_path_that_is_not_utf8(language: str, scheme: str, runtime: Path) -> None:
    url = f"{scheme}://{runtime}/%FC"
    with started(language, "serve", url) as server:
        assert run(language, "echo", url, "--payload", "x").out == b"x\n"
        server.terminate()
        assert server.wait(EXIT_S) == 0


def test_a_record_is_one_line() -> None:
    record = logging.LogRecord("x", logging.ERROR, "", 0, "%s failed", ("it",), None)
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record.exc_info = (ValueError, error, None)
    assert twin.OneLine("%(levelname)s: %(message)s").format(record) == (
        "ERROR: it failed: two: lines"
    )


# --- stdio ---


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
