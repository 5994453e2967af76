"""The statuses of a call, and the errors of this library: each says who broke what.

The statuses are gRPC's, by number and by name, on every transport (gRPC, `doc/statuscodes.md`).
An error's text is `STATUS: what, where`; a program prints it behind `error: `.
"""

import errno
import os
from enum import IntEnum


class Status(IntEnum):
    """How a call ended."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


OK = Status.OK  # for the way of every call: to look a name up in an enum costs 100 ns


MESSAGE_BYTES_MAX = 1024  # a status message on the wire: a sentence, never a dump


class Error(Exception):
    """The base of all: a status, what happened, and where (an address, a method, an option)."""

    def __init__(self, status: Status, what: str, where: str = "") -> None:
        super().__init__(status, what, where)
        self.status = status
        self.what = what
        self.where = where

    def __str__(self) -> str:
        place = f", {self.where}" if self.where else ""
        return f"{self.status.name}: {self.what}{place}"


class UsageError(Error):
    """The local caller asked for what cannot be; nothing was sent, and the connection lives."""


class ProtocolError(Error):
    """The remote peer broke the rules of FRAME.md; the session is over."""

    def __init__(self, what: str, where: str = "") -> None:
        super().__init__(Status.INTERNAL, f"protocol error: {what}", where)


class CallError(Error):
    """A call ended with a status that is not OK: the peer's answer, a deadline, a cancel, or
    the peer's death (UNAVAILABLE)."""


def status_of_errno(number: int) -> Status:
    """The status that says best what an errno means to a caller."""
    return _STATUS_OF_ERRNO.get(number, Status.INTERNAL)


class SystemError(Error):
    """A system call failed: which one, with which errno, on which object."""

    def __init__(self, call: str, number: int, where: str = "") -> None:
        super().__init__(status_of_errno(number), f"{call}: {os.strerror(number)}", where)
        self.call = call
        self.errno = number


_STATUS_OF_ERRNO = {
    errno.ENOENT: Status.NOT_FOUND,
    errno.ENOTDIR: Status.NOT_FOUND,
    errno.EEXIST: Status.ALREADY_EXISTS,
    errno.EADDRINUSE: Status.ALREADY_EXISTS,
    errno.EACCES: Status.PERMISSION_DENIED,
    errno.EPERM: Status.PERMISSION_DENIED,
    errno.ELOOP: Status.PERMISSION_DENIED,  # O_NOFOLLOW met a symbolic link
    errno.EMFILE: Status.RESOURCE_EXHAUSTED,
    errno.ENFILE: Status.RESOURCE_EXHAUSTED,
    errno.ENOMEM: Status.RESOURCE_EXHAUSTED,
    errno.ENOBUFS: Status.RESOURCE_EXHAUSTED,
    errno.ENOSPC: Status.RESOURCE_EXHAUSTED,
    errno.EAGAIN: Status.RESOURCE_EXHAUSTED,  # of a thread or a process that could not be made
    errno.EINVAL: Status.INVALID_ARGUMENT,
    errno.ENAMETOOLONG: Status.INVALID_ARGUMENT,
    errno.EADDRNOTAVAIL: Status.INVALID_ARGUMENT,
    errno.EPROTOTYPE: Status.INVALID_ARGUMENT,  # another scheme's server is at this address
    errno.ECONNREFUSED: Status.UNAVAILABLE,
    errno.ECONNRESET: Status.UNAVAILABLE,
    errno.EPIPE: Status.UNAVAILABLE,
    errno.ENXIO: Status.UNAVAILABLE,
    errno.EHOSTUNREACH: Status.UNAVAILABLE,
    errno.ENETUNREACH: Status.UNAVAILABLE,
    errno.ETIMEDOUT: Status.UNAVAILABLE,
}
