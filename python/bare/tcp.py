# A TCP socket on the loopback, bare. Pick it when the peer may move to another machine one day.
# The trap: Nagle's algorithm holds a small message back until the last is acknowledged, which can
# take 40 ms. TCP_NODELAY turns that off, and it takes both ends.
#     python tcp.py serve 5000 64 block & sleep 1
#     python tcp.py ping 5000 64 block 100000
import socket

import rounds


# One call may move only a part of a message: read_all and write_all call until it is whole.
def moves(peer: socket.socket) -> tuple[rounds.Move, rounds.Move]:
    receive = rounds.whole("recv", peer.recv_into)
    return receive, rounds.whole("send", peer.send)


def serve(words: rounds.Words) -> None:
    port = rounds.number(words.address, 0, 65535)
    listener = socket.socket(socket.AF_INET)
    # REUSEADDR: else the port rests for a minute after a run.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with rounds.checked("bind"):
        listener.bind(("127.0.0.1", port))
    with rounds.checked("listen"):
        listener.listen(1)
    rounds.say(f"ready {listener.getsockname()[1]}")  # 0 has become a free port
    with rounds.checked("accept"):
        peer, _ = listener.accept()
    listener.close()  # one client is all: refuse the next
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setblocking(words.block)
    read_all, write_all = moves(peer)
    message = memoryview(bytearray(words.size))
    while read_all(message):
        write_all(message)


def ping(words: rounds.Words) -> None:
    port = rounds.number(words.address, 0, 65535)
    peer = socket.socket(socket.AF_INET)
    with rounds.checked("connect"):
        peer.connect(("127.0.0.1", port))
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setblocking(words.block)
    read_all, write_all = moves(peer)
    rounds.measure(words, write_all, read_all)


if __name__ == "__main__":
    rounds.run("PORT", serve, ping)
