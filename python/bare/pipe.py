# Two named pipes (FIFOs), bare. Pick them for the least overhead, one client, one way each.
# The trap: open waits for the other end. Both peers open the same FIFO first; in crossed orders
# each would wait for the other for ever.
#     python pipe.py serve /tmp/demo 64 block & sleep 1
#     python pipe.py ping /tmp/demo 64 block 100000
import os
from io import FileIO

import rounds


# One call may move only a part of a message: read_all and write_all call until it is whole.
def moves(reader: FileIO, writer: FileIO) -> tuple[rounds.Move, rounds.Move]:
    receive = rounds.whole("read", reader.readinto)
    return receive, rounds.whole("write", writer.write)


def open_end(path: str, flags: int, words: rounds.Words) -> FileIO:
    with rounds.checked("open"):
        end = os.open(path, flags)
    os.set_blocking(end, words.block)  # not before: O_NONBLOCK changes open
    return FileIO(end, "r" if flags == os.O_RDONLY else "w")


def serve(words: rounds.Words) -> None:
    c2s, s2c = words.address + ".c2s", words.address + ".s2c"
    with rounds.checked("mkfifo"):
        os.mkfifo(c2s, 0o600)
        try:
            os.mkfifo(s2c, 0o600)
        except OSError:
            os.unlink(c2s)  # half a pair is no use to anybody
            raise
    rounds.say(f"ready {words.address}")
    reader = open_end(c2s, os.O_RDONLY, words)
    writer = open_end(s2c, os.O_WRONLY, words)
    with rounds.checked("unlink"):
        os.unlink(c2s)  # both peers are in
        os.unlink(s2c)
    read_all, write_all = moves(reader, writer)
    message = memoryview(bytearray(words.size))
    while read_all(message):
        write_all(message)


def ping(words: rounds.Words) -> None:
    writer = open_end(words.address + ".c2s", os.O_WRONLY, words)
    reader = open_end(words.address + ".s2c", os.O_RDONLY, words)
    read_all, write_all = moves(reader, writer)
    rounds.measure(words, write_all, read_all)


if __name__ == "__main__":
    rounds.run("PREFIX", serve, ping)
