# A TCP socket on the loopback, bare: what works the same when the peer moves to another machine.
# The trap: Nagle's algorithm holds a small message back until the last is acknowledged, which can
# take 40 ms. TCP_NODELAY turns that off, and it takes both ends.
#     python tcp.py serve 5000 64 block & sleep 1; python tcp.py ping 5000 64 block 100000
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


def main(verb: str, port: str, size: str, wait: str, count: str = "1000", file: str = "") -> None:
    serve = verb == "serve"
    peer = socket.socket(socket.AF_INET)
    (peer.bind if serve else peer.connect)(("127.0.0.1", int(port)))
    if serve:  # port 0 has become a free one
        peer.listen(1)
        print("ready", peer.getsockname()[1], flush=True)
        peer, _ = peer.accept()
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
