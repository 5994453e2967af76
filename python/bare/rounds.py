# What the bare programs share: words, errors, whole messages, and the rounds that ping times.
# The trap: a ping-pong that compares nothing may time anything. Every reply is compared, outside
# the timed span, and two fillings take turns, so that an old reply never passes for a new one.
import signal
import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter_ns
from typing import NoReturn

Move = Callable[[memoryview], bool]  # of a whole message; False: end of file


@dataclass
class Words:
    verb: str
    address: str
    samples: str  # a file for raw nanoseconds, or ""
    size: int  # bytes a message
    count: int  # rounds, or items of a stream
    block: bool  # asleep in the kernel; False: spin
    command: list[str]  # what starts stdio_pipe's peer


usage = ""  # run sets it


def leave(status: int, text: str) -> NoReturn:
    print(text, file=sys.stderr)
    sys.exit(status)


def fail(call: str, reason: str) -> NoReturn:
    leave(1, f"error: {call}: {reason}")


@contextmanager
def checked(call: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fail(call, error.strerror or str(error))


def say(line: str) -> None:
    with checked("print"):
        print(line, flush=True)  # somebody waits for it


def number(word: str, least: int, most: int) -> int:
    value = int(word) if word.isascii() and word.isdigit() and len(word) <= 20 else most + 1
    if value < least or value > most:
        leave(2, usage)
    return value


# The words, with an address also where the mechanism has none; there ping ends in -- COMMAND.
def parse(argv: list[str], has_address: bool, has_stream: bool) -> Words:
    dashes = argv.index("--") if "--" in argv else len(argv)
    words = argv[1:dashes]
    if not has_address:
        words.insert(1, "none")
    ping = len(words) in (5, 6) and words[0] == "ping"
    stream = has_stream and len(words) == 5 and words[0] == "stream"
    serve = len(words) == 4 and words[0] == "serve"
    has_command = len(argv) - dashes > 1
    words += [""] * (6 - len(words))
    spin = words[3] == "spin"
    known = ping or stream or serve
    right = known and (spin or words[3] == "block") and words[1] != ""
    if not right or has_command != (ping and not has_address):
        leave(2, usage)
    size = number(words[2], 1, 1 << 27)  # 128 MiB
    count = 0 if serve else number(words[4], 1, 1 << 27)  # 1 GiB of samples
    return Words(words[0], words[1], words[5], size, count, not spin, argv[dashes + 1 :])


# Makes of move(rest), which may move only a part of a message, a function that moves all of it.
# False is an end of file before the message; in its middle it is an error.
def whole(call: str, move: Callable[[memoryview], int | None]) -> Move:
    def move_all(message: memoryview) -> bool:
        done = 0
        while done < len(message):
            try:
                count = move(message[done:] if done else message)  # a slice costs 60 ns
            except BlockingIOError:  # spin, not yet
                continue
            except OSError as error:
                fail(call, error.strerror or str(error))
            if count:
                done += count
            elif count == 0 and done == 0:  # else None: how a FileIO says "not yet"
                return False
            elif count == 0:
                fail(call, "end of file in the middle of a message")
        return True

    return move_all


# Times rounds of write_all(message) and read_all(reply), after a tenth as many to warm up, and
# prints the percentiles.
def measure(words: Words, write_all: Move, read_all: Move) -> None:
    sent, back = bytearray(words.size), bytearray(words.size)
    message, reply = memoryview(sent), memoryview(back)
    fillings = b"\x55" * words.size, b"\xaa" * words.size
    ns = array("Q", bytes(8 * words.count))
    warm_up = words.count // 10
    for round in range(warm_up + words.count):
        message[:] = fillings[round % 2]
        start = perf_counter_ns()
        write_all(message)
        replied = read_all(reply)
        took = perf_counter_ns() - start
        if not replied or back != sent:
            fail("echo", "other bytes came back" if replied else "end of file")
        if round >= warm_up:
            ns[round - warm_up] = took
    if words.samples:
        with checked("write samples"), open(words.samples, "wb") as file:
            file.write(ns)
    ordered = sorted(ns)
    p50, p99 = ordered[words.count // 2], ordered[words.count * 99 // 100]
    say(f"p50_ns={p50} p99_ns={p99} rounds={words.count}")


Verb = Callable[[Words], None]


# Does what the words ask for. `address` is its name in the usage text; "": it has none. `stream`
# reads one, where the mechanism has streams of its own.
def run(address: str, serve: Verb, ping: Verb, stream: Verb | None = None) -> None:
    global usage
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in C++: no traceback
    stem = Path(sys.argv[0]).stem
    figures = (f" {address}" if address else "") + " SIZE block|spin"
    usage = f"usage: {stem} serve{figures}\n       {stem} ping{figures} ROUNDS [SAMPLES]"
    usage += "" if address else " -- COMMAND..."
    usage += f"\n       {stem} stream{figures} ITEMS" if stream else ""
    words = parse(sys.argv, bool(address), stream is not None)
    with checked("system call"):
        {"serve": serve, "ping": ping, "stream": stream or ping}[words.verb](words)
