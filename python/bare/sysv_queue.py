# A pair of System V message queues, bare. Pick them to learn them: messages stay whole, in order.
# The trap: a queue belongs to nobody. It has no end of file (here: an empty message), and outlives
# all its users until somebody removes it: ipcs shows it, ipcrm -Q KEY ends it.
#     python sysv_queue.py serve 7000 64 block & sleep 1
#     python sysv_queue.py ping 7000 64 block 100000
import errno
import os

import rounds
import sysv_ipc

CHUNK_BYTES = 8192  # msgmax by default; what is larger goes in several messages
KEY_MAX = 1 << 30


def open_queue(key: int, flags: int) -> sysv_ipc.MessageQueue:
    try:
        return sysv_ipc.MessageQueue(key, flags, 0o600, CHUNK_BYTES)
    except sysv_ipc.ExistentialError:  # sysv_ipc's errors have no errno
        rounds.fail("msgget", os.strerror(errno.EEXIST if flags else errno.ENOENT))


# One call moves one chunk: read_all and write_all call until the message is whole.
def moves(
    reader: sysv_ipc.MessageQueue, writer: sysv_ipc.MessageQueue, block: bool
) -> tuple[rounds.Move, rounds.Move]:
    def receive(rest: memoryview) -> int | None:
        try:
            chunk, _ = reader.receive(block)
        except sysv_ipc.BusyError:
            return None
        rest[: len(chunk)] = chunk
        return len(chunk)

    def transmit(rest: memoryview) -> int | None:
        try:
            writer.send(rest[:CHUNK_BYTES], block)
        except sysv_ipc.BusyError:
            return None
        return min(len(rest), CHUNK_BYTES)

    return rounds.whole("msgrcv", receive), rounds.whole("msgsnd", transmit)


def serve(words: rounds.Words) -> None:
    key = rounds.number(words.address, 1, KEY_MAX)
    queues = [open_queue(key + end, sysv_ipc.IPC_CREX) for end in (0, 1)]
    rounds.say(f"ready {key}")
    read_all, write_all = moves(queues[0], queues[1], words.block)
    message = memoryview(bytearray(words.size))
    while read_all(message):
        write_all(message)
    for queue in queues:  # ping has read all: nothing unread is lost
        queue.remove()


def ping(words: rounds.Words) -> None:
    key = rounds.number(words.address, 1, KEY_MAX)
    writer, reader = open_queue(key, 0), open_queue(key + 1, 0)
    read_all, write_all = moves(reader, writer, words.block)
    rounds.measure(words, write_all, read_all)
    writer.send(b"")  # the end


if __name__ == "__main__":
    rounds.run("KEY", serve, ping)
