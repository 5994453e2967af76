# A Unix stream socket, bare. Pick it first on one machine: access by file permission, room for
# many clients (here: one), and end of file at once when a peer goes, however it goes.
# The trap: the path outlives its server and fails the next bind. Whoever bound it unlinks it.
#     python unix.py serve /tmp/demo 64 block & sleep 1
#     python unix.py ping /tmp/demo 64 block 100000
import os
import socket

import rounds


def read_all(peer: socket.socket, message: memoryview) -> bool:
    return rounds.move_all("recv", message, peer.recv_into)


def write_all(peer: socket.socket, message: memoryview) -> None:
    rounds.move_all("send", message, peer.send)


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
    with rounds.checked("unlink"):
        os.unlink(words.address)  # one client is all
    peer.setblocking(words.block)
    message = memoryview(bytearray(words.size))
    while read_all(peer, message):
        write_all(peer, message)


def ping(words: rounds.Words) -> None:
    peer = socket.socket(socket.AF_UNIX)
    with rounds.checked("connect"):
        peer.connect(words.address)
    peer.setblocking(words.block)

    def round_trip(message: memoryview, reply: memoryview) -> bool:
        write_all(peer, message)
        return read_all(peer, reply)

    rounds.measure(words, round_trip)


if __name__ == "__main__":
    rounds.run("PATH", serve, ping)
