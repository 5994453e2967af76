# Pipes on stdin and stdout, bare. Pick them when one program starts the other anyway: no names.
# The trap: stdout is the wire, and a stray print corrupts it. So serve moves the wire away from
# fd 1 first of all, and points fd 1 at stderr.
#     python stdio_pipe.py ping 64 block 100000 -- python stdio_pipe.py serve 64 block
import os
from io import FileIO

import rounds


def read_all(reader: FileIO, message: memoryview) -> bool:
    return rounds.move_all("read", message, reader.readinto)


def write_all(writer: FileIO, message: memoryview) -> None:
    rounds.move_all("write", message, writer.write)


def serve(words: rounds.Words) -> None:
    with rounds.checked("dup"):
        reader, writer = FileIO(0), FileIO(os.dup(1), "w")
    with rounds.checked("dup2"):
        os.dup2(2, 1)
    os.set_blocking(reader.fileno(), words.block)
    os.set_blocking(writer.fileno(), words.block)
    message = memoryview(bytearray(words.size))
    while read_all(reader, message):
        write_all(writer, message)


def ping(words: rounds.Words) -> None:
    down, up = os.pipe(), os.pipe()  # CLOEXEC: a peer that keeps our ends sees no end of file
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

    def round_trip(message: memoryview, reply: memoryview) -> bool:
        write_all(writer, message)
        return read_all(reader, reply)

    rounds.measure(words, round_trip)
    writer.close()  # end of file, so that the peer leaves
    _, status = os.waitpid(child, 0)
    if status != 0:
        rounds.fail("peer", "failed")


if __name__ == "__main__":
    rounds.run("", serve, ping)
