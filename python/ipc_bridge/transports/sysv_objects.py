"""System V objects that outlive nobody: their keys, and the journal of them.

Queues, semaphores and segments belong to no process: what is not removed stays until the machine
restarts. So every key carries this project's mark (ipcs shows it, `ipc-bridge doctor` finds it),
and a server notes each in a journal beside its address *before* it makes the objects. The journal
is a file with a lock of its own: free, its server is dead, and the next one to start removes what
it names. Two servers may thus overlap, as one drains.

Copy with it: errors, system. (Not ftok(3): its keys collide.)
"""

import contextlib
import glob
import os
import secrets
import struct
import threading
from pathlib import Path
from typing import Any

import sysv_ipc

from ipc_bridge.errors import Error, Status
from ipc_bridge.system import Lock

KEY_MARK = 0x1BC00000  # the first 12 bits of every key of ours
KEY_MASK = 0xFFF00000
KEYS_EACH = 4  # a connection's keys follow each other; a queue, a semaphore and a segment may share
SLOT = struct.Struct("<I")  # of the journal, and of an answer: a connection's first key; 0: none


def is_ours(key: int) -> bool:
    """Does a key carry this project's mark?"""
    return key & KEY_MASK == KEY_MARK


# A queue, a semaphore or a segment, each of a class of sysv_ipc, which has no types for mypy.
Object = Any


# Somebody has removed an object, or closed it to us, by its mode: nothing more will come.
REMOVED = (sysv_ipc.ExistentialError, sysv_ipc.PermissionsError)


def is_gone(one: Object) -> bool:
    """Has somebody removed it, or closed it to us?"""
    try:
        _ = one.uid  # asks the kernel
    except REMOVED:
        return True
    return False


def remove(one: Object) -> None:
    """Idempotent, whoever was first."""
    with contextlib.suppress(sysv_ipc.Error, OSError):
        one.remove()


def remove_objects(key: int) -> None:
    """Remove whatever has this key, if it is ours by its owner too."""
    for kind in (sysv_ipc.MessageQueue, sysv_ipc.Semaphore, sysv_ipc.SharedMemory):
        with contextlib.suppress(sysv_ipc.Error, OSError, ValueError):
            found = kind(key)
            if os.geteuid() in (found.uid, found.cuid):
                found.remove()


def refusal(call: str, error: Exception) -> Error:
    """What a client is told when something cannot be made. (sysv_ipc's errors have no errno.)"""
    exists = isinstance(error, sysv_ipc.PermissionsError)
    status = Status.PERMISSION_DENIED if exists else Status.RESOURCE_EXHAUSTED
    return Error(status, f"{call}: {error}")


def limit(name: str) -> int:
    """A limit of this IPC namespace, proc(5)."""
    return int(Path(f"/proc/sys/kernel/{name}").read_text())


def reclaim(path: str) -> None:
    """Remove what dead servers of an address left: their journals name it, and nobody holds their
    locks. (A key noted but not made yet may have come to another server since; one chance in
    262,144 for each server killed in that instant.)"""
    for name in glob.glob(f"{glob.escape(path)}.keys-*"):
        try:
            lock = Lock(name)
        except Error:  # alive, or not ours
            continue
        keys = os.pread(lock.fileno(), os.fstat(lock.fileno()).st_size, 0)
        for (key,) in SLOT.iter_unpack(keys[: len(keys) - len(keys) % SLOT.size]):
            if is_ours(key):
                for number in range(KEYS_EACH):
                    remove_objects(key + number)
        lock.close()


class Journal:
    """The keys in use by one server, in a file that outlives it if need be.

    It ends, and its file with it, once it is closed and the last key is released.
    """

    def __init__(self, path: str) -> None:
        """Reclaim what dead servers of the address `path` left, and begin. Raises Error."""
        reclaim(path)
        self._lock = Lock(f"{path}.keys-{secrets.token_hex(4)}")
        self._changes = threading.Lock()
        self._slots: list[int] = []  # as in the file
        self._closed = False

    def reserve(self) -> int:
        """The first of KEYS_EACH keys, noted before anything is made with them."""
        with self._changes:
            key = 0
            while key in (0, *self._slots):  # not those of a connection that is about to go
                key = KEY_MARK | secrets.randbits(32) & ~KEY_MASK & -KEYS_EACH
            self._note(self._slots.index(0) if 0 in self._slots else len(self._slots), key)
            return key

    def release(self, key: int) -> None:
        """Nothing has these keys any more."""
        with self._changes:
            with contextlib.suppress(OSError):  # no harm: who reclaims this key finds nothing
                self._note(self._slots.index(key), 0)
            self._end_if_over()

    def close(self) -> None:
        """No key will be reserved any more. Idempotent."""
        with self._changes:
            self._closed = True
            self._end_if_over()

    def _note(self, slot: int, key: int) -> None:
        self._slots[slot : slot + 1] = [key]
        os.pwrite(self._lock.fileno(), SLOT.pack(key), slot * SLOT.size)

    def _end_if_over(self) -> None:
        if self._closed and not any(self._slots):
            self._lock.close()
