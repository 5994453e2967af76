# A Unix stream socket, bare: the first choice on one machine. Any number of clients, access by
# file permission, and end of file at once when a peer goes, however it goes.
# The trap: the path outlives its server and fails the next bind. Whoever bound it unlinks it.
#   python unix.py serve /tmp/demo 64 block & sleep 1; python unix.py ping /tmp/demo 64 block 100000
import os
import socket
import sys
from array import array
from collections.abc import Callable
from time import perf_counter_ns


def move_all(call: Callable[[memoryview], int], message: memoryview) -> bool:
    done, moved = 0, 1  # one call may move only a part of the message
    while moved and done < len(message):
        try:
            moved = call(message[done:] if done else message)
        except BlockingIOError:  # spinning, not yet
            continue
        done += moved
    return done == len(message)  # if not: end of file


def main(verb: str, path: str, size: str, wait: str, count: str = "1000", file: str = "") -> None:
    serve = verb == "serve"
    peer = socket.socket(socket.AF_UNIX)
    (peer.bind if serve else peer.connect)(path)
    if serve:
        peer.listen(1)
        print("ready", path, flush=True)
        peer, _ = peer.accept()
        os.unlink(path)  # no second client
    peer.setblocking(wait != "spin")
    receive, send, clock = peer.recv_into, peer.send, perf_counter_ns
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
