"""The peer program, server or client: `python -m ipc_bridge.peer`. Its C++ twin `ipc-bridge-peer`
takes the same words, prints the same texts, and leaves with the same codes.

Here is what each command does; what it may be told stands in `arguments`.
"""

import contextlib
import logging
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ipc_bridge
from ipc_bridge import load, server
from ipc_bridge.arguments import (
    COMMANDS,
    HELP,
    LANGUAGE,
    NUMBER_MAX,
    VERSION,
    Arguments,
    overview,
    version_line,
)
from ipc_bridge.console import (
    EXIT_INTERRUPTED,
    CommandLineError,
    create,
    encode,
    json_of,
    report_error,
    write_all,
    write_out,
)
from ipc_bridge.endpoint import serve
from ipc_bridge.errors import Error, Status
from ipc_bridge.service import STAMP, Pattern
from ipc_bridge.system import Signals, checked, now_ns

COUNT_MAX = 10**18 - 1
CLIENTS_MAX = 65_536  # of a server
BENCH_CLIENTS_MAX = 1024  # each costs a thread, and its buffers
DURATION_S_MIN = 0.001
DURATION_S_MAX = 3600.0  # bounds the samples, which stay in memory until the end
METHOD_MAX = (1 << 16) - 1
PID_MAX = 1 << 22  # of Linux

# --- the commands ---


def run_serve(arguments: Arguments) -> int:
    """Serve until a signal, or until the parent has gone (stdio)."""
    clients_max = arguments.count("--clients-max", 1, CLIENTS_MAX, server.CLIENTS_MAX_DEFAULT)
    grace_s = arguments.number("--grace", 0, NUMBER_MAX, server.GRACE_S_DEFAULT)
    log_to_stderr()
    signals = StopSignals()
    with serve(
        arguments.url,
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


# --- signals, the ready file, output ---


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


def end_at_interrupt() -> None:
    """Ctrl-C ends a client, wherever it waits: also if it comes just before the wait."""
    signals = Signals(signal.SIGINT)

    def watch() -> None:
        signals.wait()
        report_error(Error(Status.CANCELLED, "interrupted"))
        os._exit(EXIT_INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def ready_file(arguments: Arguments, url: str) -> Iterator[None]:
    """--ready-file: there, and whole, as long as the server may be called."""
    if not arguments.has("--ready-file"):
        yield
        return
    path = arguments.text("--ready-file")
    with contextlib.suppress(OSError):
        if not stat.S_ISREG(os.lstat(path).st_mode):  # /dev/null, perhaps
            raise Error(Status.ALREADY_EXISTS, "not a file of ours to replace", path)
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
    """A record as one line, without a traceback: in C++ there is none."""

    def formatException(self, info: Any) -> str:  # noqa: N802 (logging's name)
        return str(info[1])

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", ": ")


def log_to_stderr() -> None:
    """Show what the library logs, a line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def print_result(arguments: Arguments, figures: dict[str, Any], text: bytes) -> None:
    """The figures with --json, else the text."""
    write_out(json_of(figures) if arguments.json else text)


RUN: dict[str, Callable[[Arguments], int]] = {
    "serve": run_serve,
    "echo": run_echo,
    "stream": run_stream,
    "bench": run_bench,
}


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
            if first != "serve":  # which has signals of its own
                end_at_interrupt()
            return RUN[first](Arguments(command, words[1:]))
    what = "unknown option" if first.startswith("-") else f"unknown command; known are {known}"
    raise CommandLineError(what, first)


def main() -> int:
    """The program."""
    try:
        return run(sys.argv[1:])
    except Error as error:
        return report_error(error)
    except KeyboardInterrupt:  # before a server watches its signals
        report_error(Error(Status.CANCELLED, "interrupted"))
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
