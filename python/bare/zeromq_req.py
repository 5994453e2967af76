# ZeroMQ, bare: REQ to REP over ipc, its simplest form: send and receive take turns, by force. Pick
# it for a lesson. The trap: a peer that dies in between leaves the other waiting for ever, so real
# programs take DEALER and ROUTER (zeromq). An empty message is our end of file.
#     python zeromq_req.py serve /tmp/demo 64 block & sleep 1
#     python zeromq_req.py ping /tmp/demo 64 block 100000
import errno
import os

import rounds
import zmq


# A message is whole or not there: no loop, but to spin.
def receive(socket: zmq.Socket[bytes], block: bool) -> bytes:
    while True:
        try:
            return socket.recv(0 if block else zmq.DONTWAIT)
        except zmq.Again:
            pass


def serve(words: rounds.Words) -> None:
    if os.path.exists(words.address):
        rounds.fail("bind", os.strerror(errno.EADDRINUSE))
    rep = zmq.Context().socket(zmq.REP)
    os.umask(0o177)  # bind makes the file with this mode
    rep.bind(f"ipc://{words.address}")
    rounds.say(f"ready {words.address}")
    while message := receive(rep, words.block):
        rep.send(message)
    os.unlink(words.address)  # libzmq leaves the file


def ping(words: rounds.Words) -> None:
    req = zmq.Context().socket(zmq.REQ)
    req.connect(f"ipc://{words.address}")

    def write(message: memoryview) -> bool:
        req.send(message)
        return True

    def read(reply: memoryview) -> bool:
        message = receive(req, words.block)
        reply[: len(message)] = message
        return bool(message)

    rounds.measure(words, write, read)
    req.send(b"")


if __name__ == "__main__":
    try:
        rounds.run("PATH", serve, ping)
    except zmq.ZMQError as error:
        rounds.fail("zmq", str(error))
