# A lesson: two processes count up one number in shared memory. That is three steps, read, add and
# write, and what the other one wrote in between is lost, in any language: no lock within one
# process helps, nor does Python's GIL. Under a semaphore that both take nothing is lost.
#     python counter.py first 7000 1000000 bare & sleep 1; ./counter second 7000 1000000 bare
#     python counter.py first 7000 100000 locked & sleep 1; ./counter second 7000 100000 locked
import errno
import os
import sys

import rounds
import sysv_ipc


def open_semaphore(key: int, flags: int, value: int) -> sysv_ipc.Semaphore:
    return sysv_ipc.Semaphore(key, flags, 0o600, value)


def main(words: list[str]) -> None:
    rounds.usage = "usage: counter first|second KEY COUNT bare|locked"
    known = len(words) == 4 and words[0] in ("first", "second") and words[3] in ("bare", "locked")
    if not known:
        rounds.leave(2, rounds.usage)
    is_first, is_locked = words[0] == "first", words[3] == "locked"
    key, count = rounds.number(words[1], 1, 1 << 30), rounds.number(words[2], 1, 1 << 30)

    flags = sysv_ipc.IPC_CREX if is_first else 0
    try:
        segment = sysv_ipc.SharedMemory(key, flags, 0o600, 8 * is_first, b"\0")  # else: blanks
    except sysv_ipc.ExistentialError:  # sysv_ipc's errors have no errno
        rounds.fail("shmget", os.strerror(errno.EEXIST if is_first else errno.ENOENT))
    counter = memoryview(segment).cast("B")[:8].cast("q")
    lock = open_semaphore(key, flags, 1)
    mine = open_semaphore(key + (1 if is_first else 2), flags, 0)
    others = open_semaphore(key + (2 if is_first else 1), flags, 0)
    if is_first:
        rounds.say(f"ready {key}")

    others.release()  # both are here
    mine.acquire()
    for _ in range(count):
        if is_locked:
            lock.acquire()
        counter[0] += 1
        if is_locked:
            lock.release()
    if not is_first:
        others.release()
        return
    mine.acquire()  # both have counted
    counted = counter[0]
    segment.remove()
    for semaphore in (lock, mine, others):
        semaphore.remove()
    rounds.say(f"counted={counted} lost={2 * count - counted}")


if __name__ == "__main__":
    main(sys.argv[1:])
