# Pipes on stdin and stdout, bare. Pick them when one program starts the other anyway: no names.
# The trap: stdout is the wire, and a stray print corrupts it. So serve moves the wire away from
# fd 1 first of all, and points fd 1 at stderr.
#     python stdio_pipe.py ping 64 block 100000 -- python stdio_pipe.py serve 64 block
import os
from io import FileIO

import rounds


# One call may move only a part of a message: read_all and write_all call until it is whole.
def moves(reader: FileIO, writer: FileIO) -> tuple[rounds.Move, rounds.Move]:
    receive = rounds.whole("read", reader.readinto)
    return receive, rounds.whole("write", writer.write)


def serve(words: rounds.Words) -> None:
    with rounds.checked("dup"):
        reader, writer = FileIO(0), FileIO(os.dup(1), "w")
    with rounds.checked("dup2"):
        os.dup2(2, 1)
    os.set_blocking(reader.fileno(), words.block)
    os.set_blocking(writer.fileno(), words.block)
    read_all, write_all = moves(reader, writer)
    message = memoryview(bytearray(words.size))
    while read_all(message):
        write_all(message)


def ping(words: rounds.Words) -> None:
    with rounds.checked("pipe2"):  # CLOEXEC: a peer that keeps our ends sees no end of file
        down, up = os.pipe(), os.pipe()
    with rounds.checked("fork"):
        child = os.fork()
    if child == 0:
        os.dup2(down[0], 0)
        os.dup2(up[1], 1)
        with rounds.checked("execvp"):
            os.execvp(words.command[0], words.command)
    os.close(down[0])
    os.close(up[1])
    reader, writer = FileIO(up[0]), FileIO(down[1], "w")
    os.set_blocking(reader.fileno(), words.block)
    os.set_blocking(writer.fileno(), words.block)
    read_all, write_all = moves(reader, writer)
    rounds.measure(words, write_all, read_all)
    writer.close()  # end of file, so that the peer leaves
    _, status = os.waitpid(child, 0)
    if status != 0:
        rounds.fail("peer", "failed")


if __name__ == "__main__":
    rounds.run("", serve, ping)
