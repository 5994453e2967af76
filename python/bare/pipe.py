# Two named pipes (FIFOs), bare: the least overhead of the kernel's byte streams, but one way each
# and for one client. The trap: open() waits for the other end. So both peers open the same FIFO
# first; in crossed orders each would wait for the other for ever.
#   python pipe.py serve /tmp/demo 64 block & sleep 1; python pipe.py ping /tmp/demo 64 block 100000
import os
import sys
from array import array
from collections.abc import Callable
from io import FileIO
from time import perf_counter_ns


def move_all(call: Callable[[memoryview], int], message: memoryview) -> bool:
    done, moved = 0, -1  # one call may move only a part of the message
    while moved != 0 and done < len(message):
        moved = call(message[done:] if done else message)
        done += moved or 0  # None: spinning, not yet
    return done == len(message)  # if not: end of file


def main(verb: str, prefix: str, size: str, wait: str, count: str = "1000", file: str = "") -> None:
    serve = verb == "serve"
    c2s, s2c = prefix + ".c2s", prefix + ".s2c"
    if serve:
        os.mkfifo(c2s, 0o600)
        os.mkfifo(s2c, 0o600)
        print("ready", prefix, flush=True)
    ends = FileIO(c2s, "r" if serve else "w"), FileIO(s2c, "w" if serve else "r")
    reader, writer = ends if serve else ends[::-1]
    for path in (c2s, s2c) if serve else ():
        os.unlink(path)  # both are in
    for end in (reader, writer):
        os.set_blocking(end.fileno(), wait != "spin")
    receive, send, clock = reader.readinto, writer.write, perf_counter_ns
    sent, echo = bytearray(int(size)), bytearray(int(size))
    message, reply = memoryview(sent), memoryview(echo)
    while serve:
        if not move_all(receive, message):
            return
        move_all(send, message)
    rounds = int(count)
    ns = array("Q", bytes(8 * rounds))
    for turn in range(rounds - rounds // 10, 2 * rounds):
        message[:] = bytes([turn % 256]) * len(message)  # no byte like the last reply's
        start = clock()
        move_all(send, message)
        move_all(receive, reply)
        ns[turn % rounds] = clock() - start  # over warm-up's
        if echo != sent:
            raise ValueError("echo: Bad message")
    with open(file or os.devnull, "wb") as out:
        out.write(ns)
    ordered = sorted(ns)
    print(f"p50_ns={ordered[rounds // 2]} p99_ns={ordered[rounds * 99 // 100]} {rounds=}")


if __name__ == "__main__":
    sys.excepthook = lambda _kind, error, _trace: print(f"error: {error}", file=sys.stderr)
    main(*sys.argv[1:])
