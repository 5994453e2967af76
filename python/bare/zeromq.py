# ZeroMQ, bare: DEALER to ROUTER over ipc at a path, or over TCP at tcp://127.0.0.1:*. Pick it for
# many clients at one socket, and other hosts one day; zeromq_req is its simplest form. The traps:
# there is no end of file (an empty message says it here), and a second bind takes a path over
# without a word, so look first.
#     python zeromq.py serve /tmp/demo 64 block & sleep 1
#     python zeromq.py ping /tmp/demo 64 block 100000
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


def endpoint(address: str) -> str:
    return address if "://" in address else f"ipc://{address}"


def serve(words: rounds.Words) -> None:
    if os.path.exists(words.address):
        rounds.fail("bind", os.strerror(errno.EADDRINUSE))
    router = zmq.Context().socket(zmq.ROUTER)
    os.umask(0o177)  # bind makes the file with this mode
    router.bind(endpoint(words.address))
    rounds.say(f"ready {router.get_string(zmq.LAST_ENDPOINT).removeprefix('ipc://')}")
    client = receive(router, words.block)  # what a client sent comes behind the client's name
    while message := receive(router, words.block):
        router.send(client, zmq.SNDMORE)
        router.send(message)
        client = receive(router, words.block)
    if os.path.exists(words.address):
        os.unlink(words.address)  # libzmq leaves the file


def ping(words: rounds.Words) -> None:
    dealer = zmq.Context().socket(zmq.DEALER)
    dealer.connect(endpoint(words.address))

    def write(message: memoryview) -> bool:
        dealer.send(message)
        return True

    def read(reply: memoryview) -> bool:
        message = receive(dealer, words.block)
        reply[: len(message)] = message
        return bool(message)

    rounds.measure(words, write, read)
    dealer.send(b"")


if __name__ == "__main__":
    try:
        rounds.run("ENDPOINT", serve, ping)
    except zmq.ZMQError as error:
        rounds.fail("zmq", str(error))
