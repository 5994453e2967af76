"""The peer program, server or client: `python -m ipc_bridge.peer`. Its C++ twin `ipc-bridge-peer`
takes the same words, prints the same texts, and leaves with the same codes.

Only the command line is here. argparse splits it and explains it; all values are taken as text and
converted below, so that both programs find the same faults, and name them alike.
"""

import argparse
import contextlib
import json
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import ipc_bridge
from ipc_bridge import client, frame, load, server, session
from ipc_bridge.endpoint import SCHEMES, connect, serve, way_of
from ipc_bridge.errors import Error, Status
from ipc_bridge.service import STAMP, Bridge, Pattern
from ipc_bridge.system import Signals, checked, now_ns

LANGUAGE = "py"
PROGRAM = "python -m ipc_bridge.peer"
EXIT_USAGE = 2
EXIT_STATUS = 10  # plus the status
EXIT_INTERRUPTED = 130  # as a shell reports SIGINT
COUNT_MAX = 10**18 - 1
CLIENTS_MAX = 65_536  # of a server
BENCH_CLIENTS_MAX = 1024  # each costs a thread, and its buffers
DURATION_S_MIN = 0.001
DURATION_S_MAX = 3600.0  # bounds the samples, which stay in memory until the end
METHOD_MAX = (1 << 16) - 1
PID_MAX = 1 << 22  # of Linux
NUMBER_MAX = 1e9  # above what the digits of NUMBER can say
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
SIZE = re.compile(r"([0-9]{1,18})(|KiB|MiB|GiB)")
COUNT = re.compile(r"[0-9]{1,18}")
NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?|\.[0-9]{1,9}")


class CommandLineError(Error):
    """The command line is at fault, and not what it asked for: another exit code."""

    def __init__(self, what: str, where: str = "") -> None:
        super().__init__(Status.INVALID_ARGUMENT, what, where)


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
    run: Callable[["Arguments"], int]


PAYLOAD = "TEXT|@FILE|-"
COMMON = (
    Option("--window", "BYTES", "how far a stream may run ahead of its reader (default 4MiB)"),
    Option("--max-payload", "BYTES", "largest payload taken from the peer (default 64MiB)"),
    Option("--json", "", "print one JSON object, on one line, instead of text"),
)
SERVE = (
    Option("--ready-file", "FILE", "write the URL into FILE once clients may come"),
    Option("--clients-max", "N", "turn further clients away (default 256)"),
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
)
HELP = Option("--help", "", "print this help, and leave")
VERSION = Option("--version", "", "print the version, and leave")


def url_form(scheme: str) -> str:
    """What a URL of a scheme looks like."""
    if scheme == "stdio":
        return "stdio:COMMAND WORDS"
    return f"{scheme}://127.0.0.1:5000" if scheme.endswith("tcp") else f"{scheme}:///tmp/demo"


def url_help() -> str:
    """The forms of a URL, for every help."""
    forms = "".join(f"  {url_form(scheme)}\n" for scheme in SCHEMES)
    return (
        f"URL is one of\n{forms}"
        "and may end in ?wait=block, spin or adaptive (the default); for stdio that stands before\n"
        "the command: stdio:?wait=spin COMMAND WORDS\n"
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
        raise CommandLineError("this option takes no value", where)

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
    """`--name value` as `--name=value`: argparse takes no value that begins with a dash else."""
    names = {option.name for option in command.options + COMMON if option.value}
    joined = []
    rest = iter(words)
    for word in rest:
        value = next(rest, None) if word in names else None
        joined.append(word if value is None else f"{word}={value}")
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
        self.window_bytes = self.size("--window", 1, session.WINDOW_BYTES_MAX, session.WINDOW_BYTES)
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
        value: str | None = self._values[name[2:].replace("-", "_")]
        return value

    @staticmethod
    def _within(text: str, value: int, low: int, high: int, name: str) -> int:
        if not low <= value <= high:
            raise CommandLineError(f"'{text}' is not within {low} to {high}", name)
        return value


# --- the commands ---


def run_serve(arguments: Arguments) -> int:
    """Serve until a signal, or until the parent has gone (stdio)."""
    clients_max = arguments.count("--clients-max", 1, CLIENTS_MAX, server.CLIENTS_MAX)
    grace_s = arguments.number("--grace", 0, NUMBER_MAX, server.GRACE_S)
    log_to_stderr()
    signals = StopSignals()
    with serve(
        arguments.url,
        window_bytes=arguments.window_bytes,
        payload_bytes_max=arguments.payload_bytes_max,
        clients_max=clients_max,
        grace_s=grace_s,
    ) as running:
        signals.watch(running)
        with ready_file(arguments, running.url):
            if not running.url.startswith("stdio:"):  # there, stdout is the wire
                print_result(arguments, {"ready": running.url}, encode(f"ready {running.url}\n"))
            running.run()
    return 0


def run_echo(arguments: Arguments) -> int:
    """Echo one payload, once or often."""
    is_text = arguments.payload_is_text()
    count = arguments.count("--count", 1, COUNT_MAX, 1)
    timeout = arguments.timeout()
    payload = arguments.payload()
    with arguments.connect() as bridge:
        began_ns = now_ns()
        for _ in range(count):
            reply = bytes(bridge.echo(payload, timeout))
            if reply != payload:
                what = "the answer differs from the payload"
                raise Error(Status.DATA_LOSS, what, arguments.url)
        seconds = (now_ns() - began_ns) / 1e9
    figures = {
        "payload": reply.decode("utf-8", "replace") if is_text else None,
        "size_bytes": len(payload),
        "count": count,
        "seconds": seconds,
    }
    print_result(arguments, figures, reply + b"\n" if is_text else reply)
    return 0


def run_stream(arguments: Arguments) -> int:
    """Read one stream, and verify it to the last byte."""
    count = arguments.count("--count", 0, COUNT_MAX)
    size_bytes = arguments.size("--size", 0, arguments.payload_bytes_max)
    rate_hz = arguments.number("--rate", 0, NUMBER_MAX, 0.0)
    timeout = arguments.timeout()
    verifies, seen = Pattern(size_bytes).verifies, 0
    with arguments.connect() as bridge:
        began_ns = now_ns()
        for item in bridge.stream(count, size_bytes, rate_hz, timeout=timeout):
            if not verifies(seen, item):
                what = f"item {seen} differs from the pattern"
                raise Error(Status.DATA_LOSS, what, arguments.url)
            seen += 1
        seconds = (now_ns() - began_ns) / 1e9
    if seen != count:
        raise Error(Status.DATA_LOSS, f"{seen} items instead of {count}", arguments.url)
    figures = {
        "count": count,
        "size_bytes": size_bytes,
        "seconds": seconds,
        "items_per_second": count / seconds,
        "bytes_per_second": count * size_bytes / seconds,
    }
    text = (
        f"{count} items of {size_bytes} bytes verified in {seconds:.3f} s "
        f"({count / seconds:.0f} items/s, {count * size_bytes / seconds / 1e6:.1f} MB/s)\n"
    )
    print_result(arguments, figures, text.encode())
    return 0


def run_bench(arguments: Arguments) -> int:
    """Measure; the result is one JSON object, indented unless --json asks for a single line."""
    plan = make_plan(arguments)
    samples_path = arguments.text("--samples") if arguments.has("--samples") else os.devnull
    # Opened before the measurement, so that a bad path shows at once.
    samples_fd = create(samples_path, samples_path)
    result = load.run(plan)
    write_all(samples_fd, result.samples(), samples_path)
    os.close(samples_fd)
    figures = result.report(LANGUAGE, ipc_bridge.__version__)
    print_result(arguments, figures, json_of(figures, indent=2))
    error = result.error()
    return 0 if error is None else report_error(error)


def make_plan(arguments: Arguments) -> load.Plan:
    """What the options of `bench` ask for."""
    op = arguments.text("--op")
    if op not in ("echo", "stream"):
        raise CommandLineError(f"'{op}' is neither echo nor stream", "--op")
    method = arguments.count("--method", 1, METHOD_MAX, 0)
    has_payload = arguments.has("--payload")
    if has_payload and method == 0:
        raise CommandLineError("this option goes with --method", "--payload")
    rate_hz = arguments.number("--rate", 0, NUMBER_MAX, 0.0)
    stamped = op == "stream" and rate_hz > 0
    if stamped and method:
        raise CommandLineError("a method's stream has its own pace", "--rate")
    size_min = STAMP.size if stamped else 0
    work_s = arguments.number("--work", 0, DURATION_S_MAX, 0.0)
    if op != "stream" and arguments.has("--work"):
        raise CommandLineError("this option goes with --op stream", "--work")
    server_pid = load.CHILD
    if not arguments.has("--server-pid") or arguments.text("--server-pid") != "child":
        server_pid = arguments.count("--server-pid", 1, PID_MAX, 0)
    # A payload of one's own has its own size; the option may still be there, and is not looked at.
    size_bytes = (
        0 if has_payload else arguments.size("--size", size_min, arguments.payload_bytes_max)
    )
    return load.Plan(
        url=arguments.url,
        op=op,
        size_bytes=size_bytes,
        duration_s=arguments.number("--duration", DURATION_S_MIN, DURATION_S_MAX),
        warmup_s=arguments.number("--warmup", 0, DURATION_S_MAX, 0.0),
        rate_hz=rate_hz,
        clients=arguments.count("--clients", 1, BENCH_CLIENTS_MAX, 1),
        method=method,
        payload=arguments.payload() if has_payload else None,
        work_s=work_s,
        server_pid=server_pid,
        window_bytes=arguments.window_bytes,
        payload_bytes_max=arguments.payload_bytes_max,
    )


COMMANDS = (
    Command(
        "serve",
        "Serve echo and stream at URL until told to stop (SIGTERM, Ctrl-C).",
        "URL [OPTIONS]",
        SERVE,
        "serve unix:///tmp/demo.sock",
        run_serve,
    ),
    Command(
        "echo",
        "Send a payload, compare what comes back, and print it.",
        "URL --payload TEXT|@FILE|- [OPTIONS]",
        ECHO,
        "echo unix:///tmp/demo.sock --payload hello",
        run_echo,
    ),
    Command(
        "stream",
        "Read a stream of items, and verify every byte.",
        "URL --count N --size BYTES [OPTIONS]",
        STREAM,
        "stream unix:///tmp/demo.sock --count 1000000 --size 64",
        run_stream,
    ),
    Command(
        "bench",
        "Measure latency and throughput, verifying every answer; prints JSON.",
        "URL --op echo|stream --size BYTES --duration SECONDS [OPTIONS]",
        BENCH,
        "bench unix:///tmp/demo.sock --op echo --size 64 --duration 2 --warmup 0.5",
        run_bench,
    ),
)


# --- signals, files, output ---


class StopSignals:
    """SIGTERM and SIGINT: the first drains the server, the second ends the program at once."""

    def __init__(self) -> None:
        self._signals = Signals(signal.SIGTERM, signal.SIGINT)

    def watch(self, running: server.Callee) -> None:
        """The server to stop; at once if a signal came while it was starting."""
        threading.Thread(target=self._await, args=(running,), daemon=True).start()

    def _await(self, running: server.Callee) -> None:
        self._signals.wait()
        running.stop()
        self._signals.wait()
        os._exit(EXIT_INTERRUPTED)


def on_interrupt(number: int, at: object) -> None:
    """Ctrl-C of a client, wherever it waits."""
    report_error(Error(Status.CANCELLED, "interrupted"))
    os._exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def ready_file(arguments: Arguments, url: str) -> Iterator[None]:
    """--ready-file: there, and whole, as long as the server may be called."""
    if not arguments.has("--ready-file"):
        yield
        return
    path = arguments.text("--ready-file")
    temporary = f"{path}.{os.getpid()}"
    try:
        fd = create(temporary, path)
        write_all(fd, encode(f"{url}\n"), path)
        os.close(fd)
        with checked("rename", path):
            os.rename(temporary, path)
    except Error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)


class OneLine(logging.Formatter):
    """A record as one line; with its traceback if IPC_BRIDGE_LOG is `debug`."""

    def formatException(self, info: Any) -> str:  # noqa: N802 (logging's name)
        return super().formatException(info) if log_level() == logging.DEBUG else str(info[1])

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if log_level() == logging.DEBUG else text.replace("\n", ": ")


def log_level() -> int:
    """What IPC_BRIDGE_LOG asks for: debug, info, warning (the default) or error."""
    level = logging.getLevelName(os.environ.get("IPC_BRIDGE_LOG", "").upper())
    return level if isinstance(level, int) else logging.WARNING


def log_to_stderr() -> None:
    """Show what the library logs, a line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(levelname)s: %(message)s"))
    logging.basicConfig(level=log_level(), handlers=[handler])


def read_all(fd: int, where: str) -> bytes:
    """All that can be read, up to the largest payload that there can be."""
    parts, size = [], 0
    with checked("read", where):
        while part := os.read(fd, 1 << 20):
            parts.append(part)
            size += len(part)
            if size > frame.PAYLOAD_BYTES_LIMIT:
                what = f"above {frame.PAYLOAD_BYTES_LIMIT} bytes"
                raise Error(Status.RESOURCE_EXHAUSTED, what, where)
    return b"".join(parts)


def write_all(fd: int, data: Any, where: str) -> None:
    """Write it whole."""
    rest = memoryview(data).cast("B")
    with checked("write", where):
        while rest:
            rest = rest[os.write(fd, rest) :]


def create(path: str, where: str) -> int:
    """A descriptor of a new, empty file."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    with checked("open", where):
        return os.open(path, flags, 0o666)


def write_out(data: bytes) -> None:
    """Print. A reader who has left (| head) has what he wanted."""
    try:
        write_all(1, data, "stdout")
    except Error as error:
        if error.status != Status.UNAVAILABLE:
            raise


def encode(text: str) -> bytes:
    """What came from the command line may be no UTF-8; the bytes stay what they were."""
    return text.encode("utf-8", "surrogateescape")


def json_of(figures: dict[str, Any], indent: int | None = None) -> bytes:
    """As JSON, always UTF-8; on one line unless indented."""
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(figures, ensure_ascii=False, indent=indent, separators=separators)
    return encode(text).decode("utf-8", "replace").encode() + b"\n"


def print_result(arguments: Arguments, figures: dict[str, Any], text: bytes) -> None:
    """The figures with --json, else the text."""
    write_out(json_of(figures) if arguments.json else text)


def report_error(error: Error) -> int:
    """Say in one line what is wrong; the exit code for it."""
    line = f"error: {error}".replace("\n", " ") + "\n"
    with contextlib.suppress(Error):
        write_all(2, encode(line), "stderr")
    return EXIT_USAGE if isinstance(error, CommandLineError) else EXIT_STATUS + error.status


def version_line() -> str:
    """The same in both languages but for the name of the language."""
    return f"ipc-bridge-peer {ipc_bridge.__version__} ({LANGUAGE})\n"


def run(words: Sequence[str]) -> int:
    """Do what the words say; the exit code."""
    first = words[0] if words else ""
    if first in ("-h", HELP.name):
        write_out(overview().encode())
        return 0
    if first == VERSION.name:
        write_out(version_line().encode())
        return 0
    known = ", ".join(command.name for command in COMMANDS)
    if not words:
        raise CommandLineError(f"a command is missing; known are {known}")
    for command in COMMANDS:
        if command.name == first:
            return command.run(Arguments(command, words[1:]))
    what = "unknown option" if first.startswith("-") else f"unknown command; known are {known}"
    raise CommandLineError(what, first)


def main() -> int:
    """The program."""
    signal.signal(signal.SIGINT, on_interrupt)
    try:
        return run(sys.argv[1:])
    except Error as error:
        return report_error(error)


if __name__ == "__main__":
    sys.exit(main())
