# Pipes on stdin and stdout, bare: the parent starts its peer as a child, so nobody needs a name.
# The trap: stdout is the wire, and a stray print corrupts it. So serve moves the wire away from
# fd 1 first of all and points fd 1 at stderr.
#     python stdio_pipe.py ping 64 block 100000 -- python stdio_pipe.py serve 64 block
import os
import sys
from array import array
from collections.abc import Callable
from io import FileIO
from subprocess import PIPE, Popen
from time import perf_counter_ns
from typing import cast


def move_all(call: Callable[[memoryview], int], message: memoryview) -> bool:
    done, moved = 0, -1  # one call may move only a part of the message
    while moved != 0 and done < len(message):
        moved = call(message[done:] if done else message)
        done += moved or 0  # None: spinning, not yet
    return done == len(message)  # if not: end of file


def main(verb: str, size: str, wait: str, count: str = "1000", *words: str) -> None:
    reader, writer = FileIO(0), FileIO(os.dup(1), "w")
    if verb == "serve":
        os.dup2(2, 1)
    else:
        peer = Popen(words[words.index("--") + 1 :], bufsize=0, stdin=PIPE, stdout=PIPE)
        reader, writer = cast(FileIO, peer.stdout), cast(FileIO, peer.stdin)
    for end in (reader, writer):
        os.set_blocking(end.fileno(), wait != "spin")
    receive, send, clock = reader.readinto, writer.write, perf_counter_ns
    sent, echo = bytearray(int(size)), bytearray(int(size))
    message, reply = memoryview(sent), memoryview(echo)
    while verb == "serve":
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
    with open(os.devnull if words[0] == "--" else words[0], "wb") as out:
        out.write(ns)
    ordered = sorted(ns)
    print(f"p50_ns={ordered[rounds // 2]} p99_ns={ordered[rounds * 99 // 100]} {rounds=}")
    writer.close()  # end of file, so that PEER leaves
    sys.exit(peer.wait() != 0)


if __name__ == "__main__":
    sys.excepthook = lambda _kind, error, _trace: print(f"error: {error}", file=sys.stderr)
    main(*sys.argv[1:])
