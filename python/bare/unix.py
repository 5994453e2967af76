# A Unix stream socket, bare. Pick it first on one machine: access by file permission, room for
# many clients (here: one), and end of file at once when a peer goes, however it goes.
# The trap: the path outlives its server and fails the next bind. Whoever bound it unlinks it.
#     python unix.py serve /tmp/demo 64 block & sleep 1
#     python unix.py ping /tmp/demo 64 block 100000
import os
import socket

import rounds


# One call may move only a part of a message: read_all and write_all call until it is whole.
def moves(peer: socket.socket) -> tuple[rounds.Move, rounds.Move]:
    room = 512 << 10  # Linux doubles it; each 208 KiB by default is a wake-up
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
    receive = rounds.whole("recv", peer.recv_into)
    return receive, rounds.whole("send", peer.send)


def serve(words: rounds.Words) -> None:
    listener = socket.socket(socket.AF_UNIX)
    os.fchmod(listener.fileno(), 0o600)  # bind gives the path this mode, from the start
    with rounds.checked("bind"):
        listener.bind(words.address)
    with rounds.checked("listen"):
        listener.listen(1)
    rounds.say(f"ready {words.address}")
    with rounds.checked("accept"):
        peer, _ = listener.accept()
    listener.close()  # one client is all: refuse the next
    with rounds.checked("unlink"):
        os.unlink(words.address)
    peer.setblocking(words.block)
    read_all, write_all = moves(peer)
    message = memoryview(bytearray(words.size))
    while read_all(message):
        write_all(message)


def ping(words: rounds.Words) -> None:
    peer = socket.socket(socket.AF_UNIX)
    with rounds.checked("connect"):
        peer.connect(words.address)
    peer.setblocking(words.block)
    read_all, write_all = moves(peer)
    rounds.measure(words, write_all, read_all)


if __name__ == "__main__":
    rounds.run("PATH", serve, ping)
