"""The command line of the peer program: what can be said, the help that says so, and the values of
what was said. Its C++ twin is cpp/arguments.hpp.

argparse splits the words and explains them; all values are taken as text and converted here, so
that both programs find the same faults, and name them alike.
"""

import argparse
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import ipc_bridge
from ipc_bridge import client, frame, session
from ipc_bridge.console import CommandLineError, read_all, write_out
from ipc_bridge.endpoint import SCHEMES, connect, way_of
from ipc_bridge.errors import Error, Status
from ipc_bridge.service import Bridge
from ipc_bridge.system import checked

LANGUAGE = "py"
PROGRAM = "python -m ipc_bridge.peer"
NUMBER_MAX = 1e9  # above what the digits of NUMBER can say
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
SIZE = re.compile(r"([0-9]{1,18})(|KiB|MiB|GiB)")
COUNT = re.compile(r"[0-9]{1,18}")
NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?|\.[0-9]{1,9}")


# --- what can be said ---


class Option(NamedTuple):
    """One option of a command."""

    name: str
    value: str  # what to write after it; "": nothing, it is a flag
    text: str


class Command(NamedTuple):
    """One command of the program."""

    name: str
    text: str
    usage: str
    options: tuple[Option, ...]
    example: str


PAYLOAD = "TEXT|@FILE|-"
WINDOW = Option("--window", "BYTES", "how far a stream may run ahead of us (default 4MiB)")
COMMON = (
    Option("--max-payload", "BYTES", "largest payload taken from the peer (default 64MiB)"),
    Option("--json", "", "print one JSON object, on one line, instead of text"),
)
SERVE = (
    Option("--ready-file", "FILE", "write the URL into FILE once clients may come"),
    Option("--clients-max", "N", "turn further clients away (of grpc, calls; default 256)"),
    Option("--grace", "SECONDS", "for running calls to end in when told to stop (default 1)"),
)
ECHO = (
    Option("--payload", PAYLOAD, "what to send: the text, what is in FILE, or what stdin brings"),
    Option("--count", "N", "how many times (default 1)"),
    Option("--timeout", "SECONDS", "for connecting (default 5), and for each answer (no limit)"),
)
STREAM = (
    Option("--count", "N", "how many items"),
    Option("--size", "BYTES", "of an item, as 64, 4KiB or 1MiB"),
    Option("--rate", "HZ", "items a second (default: as fast as they are read)"),
    Option("--timeout", "SECONDS", "for connecting (default 5), and for all items (no limit)"),
    WINDOW,
)
BENCH = (
    Option("--op", "echo|stream", "what to measure: round trips, or one endless stream"),
    Option("--size", "BYTES", "of a payload or an item, as 64, 4KiB or 1MiB"),
    Option("--duration", "SECONDS", "how long to measure, at most 3600"),
    Option("--warmup", "SECONDS", "not counted, before that (default 0)"),
    Option("--rate", "HZ", "of all clients, timed from when each was due (default: no pause)"),
    Option("--clients", "N", "connections at once, with a thread each (default 1)"),
    Option("--method", "M", "number of a method of your own; its answers are not verified"),
    Option("--payload", PAYLOAD, "what to send to that method (default: a payload of --size)"),
    Option("--samples", "FILE", "write the latencies into FILE, as u64 little-endian ns"),
    Option("--work", "SECONDS", "sleep so long after each item of a stream (default 0)"),
    Option("--server-pid", "PID|child", "report what that process uses too, or stdio's server"),
    WINDOW,
)
HELP = Option("--help", "", "print this help, and leave")
VERSION = Option("--version", "", "print the version, and leave")
COMMANDS = (
    Command(
        "serve",
        "Serve echo and stream at URL until told to stop (SIGTERM, Ctrl-C).",
        "URL [OPTIONS]",
        SERVE,
        "serve unix:///tmp/demo.sock",
    ),
    Command(
        "echo",
        "Send a payload, compare what comes back, and print it.",
        "URL --payload TEXT|@FILE|- [OPTIONS]",
        ECHO,
        "echo unix:///tmp/demo.sock --payload hello",
    ),
    Command(
        "stream",
        "Read a stream of items, and verify every byte.",
        "URL --count N --size BYTES [OPTIONS]",
        STREAM,
        "stream unix:///tmp/demo.sock --count 1000000 --size 64",
    ),
    Command(
        "bench",
        "Measure latency and throughput, verifying every answer; prints JSON.",
        "URL --op echo|stream --size BYTES --duration SECONDS [OPTIONS]",
        BENCH,
        "bench unix:///tmp/demo.sock --op echo --size 64 --duration 2 --warmup 0.5",
    ),
)

URL_OPTIONS = (
    Option("wait", "block|spin|adaptive", "how to wait (default adaptive; zmq and grpc block)"),
    Option("allow_remote", "1", "serve other hosts, unencrypted: tcp, zmq+tcp, grpc+tcp"),
    Option("curve", "FILE", "keys of `ipc-bridge curve-keys`: zmq+ipc, zmq+tcp"),
    Option("ca", "FILE", "who signs the other side's certificate: grpc+tcp"),
    Option("cert", "FILE", "our own certificate: grpc+tcp"),
    Option("key", "FILE", "its private key: grpc+tcp"),
    Option("name", "NAME", "in the server's certificate, if not its host: grpc+tcp"),
)


def url_form(scheme: str) -> str:
    """What a URL of a scheme looks like."""
    if scheme == "stdio":
        return "stdio:COMMAND WORDS"
    return f"{scheme}://127.0.0.1:5000" if scheme.endswith("tcp") else f"{scheme}:///tmp/demo"


def url_help() -> str:
    """The forms of a URL and its options, for every help."""
    forms = "".join(f"  {url_form(scheme)}\n" for scheme in SCHEMES)
    options = "".join(f"  {name + '=' + value:<26}{text}\n" for name, value, text in URL_OPTIONS)
    return (
        f"URL is one of\n{forms}"
        f"and may end in options, as ?wait=spin&allow_remote=1:\n{options}"
        "zmq takes no spin, grpc nothing but block. Those of stdio stand before the command:\n"
        "stdio:?wait=spin COMMAND WORDS. In a path ? is written %3F, # %23 and % %25.\n"
    )


def overview() -> str:
    """The help of the program as a whole."""
    commands = "".join(f"  {command.name:<8}{command.text}\n" for command in COMMANDS)
    examples = "".join(f"  {PROGRAM} {command.example}\n" for command in COMMANDS)
    return (
        f"usage: {PROGRAM} COMMAND URL [OPTIONS]\n\n"
        "Serves, calls and measures an echo and a stream over any local transport. There is a\n"
        "C++ and a Python program; they take the same words, and talk to each other.\n\n"
        f"commands (each has its own --help):\n{commands}\n{url_help()}\n"
        f"examples (start the server, then the others in a second terminal):\n{examples}\n"
        "exit codes: 0 all is well, 2 the command line is wrong, 10 + status a call failed\n"
        "(24 no server, 25 wrong bytes; statuses are gRPC's), 130 interrupted\n"
    )


def version_line() -> str:
    """The same in both languages but for the name of the language."""
    return f"ipc-bridge-peer {ipc_bridge.__version__} ({LANGUAGE})\n"


# --- from words to values ---


class Parser(argparse.ArgumentParser):
    """argparse with our texts for errors, and our way to print."""

    color = False  # Python 3.14 would

    def error(self, message: str) -> NoReturn:
        where, _, what = message.removeprefix("argument ").partition(": ")
        if what == "expected one argument":
            raise CommandLineError("a value is missing", where)
        if where == "the following arguments are required":
            raise CommandLineError("a required word is missing", what)
        raise CommandLineError("this option takes no value", where.rpartition("/")[2])

    def _print_message(self, message: str, file: object = None) -> None:
        write_out(message.encode())


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Lines as they are written, and a sentence to each option on one line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)


def make_parser(command: Command) -> Parser:
    """The parser of one command, from its table."""
    parser = Parser(
        usage=f"{PROGRAM} {command.name} {command.usage}",
        description=command.text,
        epilog=f"{url_help()}\nexample:\n  {PROGRAM} {command.example}\n",
        formatter_class=HelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("URL", help="where the server is; see below")
    for name, value, text in command.options + COMMON:
        if value:
            parser.add_argument(name, metavar=value, help=text)
        else:
            parser.add_argument(name, action="store_true", help=text)
    parser.add_argument("-h", HELP.name, action="help", help=HELP.text)
    parser.add_argument(VERSION.name, action="version", version=version_line(), help=VERSION.text)
    return parser


def join(words: Sequence[str], command: Command) -> list[str]:
    """`--name value` as `--name=value`: argparse takes no value that begins with a dash else. (And
    never `--`: so each gets a `=` before it, which `Arguments` takes off.)"""
    names = {option.name for option in command.options + COMMON if option.value}
    joined = []
    rest = iter(words)
    for word in rest:
        if word == "--":  # the libraries do not agree on what follows
            raise CommandLineError("unknown option", word)
        name, equals, value = word.partition("=")
        found = (value if equals else next(rest, None)) if name in names else None
        joined.append(word if found is None else f"{name}=={found}")
    return joined


class Arguments:
    """The words of one command; each method converts one option, and names it in its error."""

    def __init__(self, command: Command, words: Sequence[str]) -> None:
        found, extra = make_parser(command).parse_known_args(join(words, command))
        self._values: dict[str, Any] = vars(found)
        self.url: str = self._values["URL"]
        for word in extra:
            if word.startswith("-"):
                raise CommandLineError("unknown option", word.partition("=")[0])
            raise CommandLineError("one word too many", word)
        try:
            way_of(self.url)
        except Error as error:
            if error.status != Status.INVALID_ARGUMENT:  # a library that is missing
                raise
            raise CommandLineError(error.what, error.where) from None
        self.json = bool(self._values["json"])
        self.window_bytes = self.size(
            "--window", 1, session.WINDOW_BYTES_LIMIT, session.WINDOW_BYTES_DEFAULT
        )
        self.payload_bytes_max = self.size(
            "--max-payload", 0, frame.PAYLOAD_BYTES_LIMIT, frame.PAYLOAD_BYTES_MAX
        )

    def has(self, name: str) -> bool:
        """Was the option given?"""
        return self._find(name) is not None

    def text(self, name: str) -> str:
        """As it was written."""
        value = self._find(name)
        if value is None:
            raise CommandLineError("a required option is missing", name)
        return value

    def size(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """Bytes: `64`, `4KiB`, `1MiB`, `1GiB`."""
        if default is not None and not self.has(name):
            return default
        text = self.text(name)
        match = SIZE.fullmatch(text)
        if match is None:
            raise CommandLineError(f"'{text}' is not a size", name)
        return self._within(text, int(match[1]) * UNITS[match[2]], low, high, name)

    def count(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number."""
        if default is not None and not self.has(name):
            return default
        text = self.text(name)
        if not COUNT.fullmatch(text):
            raise CommandLineError(f"'{text}' is not a whole number", name)
        return self._within(text, int(text), low, high, name)

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A decimal number, without sign and exponent."""
        if default is not None and not self.has(name):
            return default
        text = self.text(name)
        if not NUMBER.fullmatch(text):
            raise CommandLineError(f"'{text}' is not a decimal number", name)
        value = float(text)
        if not low <= value <= high:
            raise CommandLineError(f"'{text}' is not within {low:g} to {high:g}", name)
        return value

    def timeout(self) -> float | None:
        """--timeout; None: not given."""
        return self.number("--timeout", 0, NUMBER_MAX) if self.has("--timeout") else None

    def payload_is_text(self) -> bool:
        """Does --payload stand on the command line itself?"""
        text = self.text("--payload")
        return text != "-" and not text.startswith("@")

    def payload(self) -> bytes:
        """--payload: the text itself, what a file holds, or what comes on stdin."""
        text = self.text("--payload")
        if self.payload_is_text():
            return os.fsencode(text)
        if text == "-":
            return read_all(0, "stdin")
        path = text[1:]
        with checked("open", path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return read_all(fd, path)
        finally:
            os.close(fd)

    def connect(self) -> Bridge:
        """The connection that all options together ask for."""
        timeout = self.timeout()
        return connect(
            self.url,
            window_bytes=self.window_bytes,
            payload_bytes_max=self.payload_bytes_max,
            timeout=client.CONNECT_TIMEOUT_S if timeout is None else timeout,
        )

    def _find(self, name: str) -> str | None:
        value: str | None = self._values.get(name[2:].replace("-", "_"))
        return value and value[1:]

    @staticmethod
    def _within(text: str, value: int, low: int, high: int, name: str) -> int:
        if not low <= value <= high:
            raise CommandLineError(f"'{text}' is not within {low} to {high}", name)
        return value
