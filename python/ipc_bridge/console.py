"""What a program reads, prints and leaves with: files and streams whole, JSON, errors in one line.
Its C++ twin is cpp/console.hpp."""

import contextlib
import json
import os
from typing import Any

from ipc_bridge import frame
from ipc_bridge.errors import Error, Status
from ipc_bridge.system import checked

EXIT_USAGE = 2
EXIT_STATUS = 10  # plus the status
EXIT_INTERRUPTED = 130  # as a shell reports SIGINT


class CommandLineError(Error):
    """The command line is at fault, and not what it asked for: another exit code."""

    def __init__(self, what: str, where: str = "") -> None:
        super().__init__(Status.INVALID_ARGUMENT, what, where)


def read_all(fd: int, where: str) -> bytes:
    """All that can be read, up to the largest payload that there can be."""
    parts, size = [], 0
    with checked("read", where):
        while part := os.read(fd, 1 << 20):
            parts.append(part)
            size += len(part)
            if size > frame.PAYLOAD_BYTES_LIMIT:
                what = f"above {frame.PAYLOAD_BYTES_LIMIT} bytes"
                raise Error(Status.RESOURCE_EXHAUSTED, what, where)
    return b"".join(parts)


def write_all(fd: int, data: Any, where: str) -> None:
    """Write it whole."""
    rest = memoryview(data).cast("B")
    with checked("write", where):
        while rest:
            rest = rest[os.write(fd, rest) :]


def create(path: str, where: str) -> int:
    """A descriptor of a new, empty file."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    with checked("open", where):
        return os.open(path, flags, 0o666)


def write_out(data: bytes) -> None:
    """Print. A reader who has left (| head) has what he wanted."""
    try:
        write_all(1, data, "stdout")
    except Error as error:
        if error.status != Status.UNAVAILABLE:
            raise


def encode(text: str) -> bytes:
    """What came from the command line may be no UTF-8; the bytes stay what they were."""
    return text.encode("utf-8", "surrogateescape")


def json_of(figures: dict[str, Any], indent: int | None = None) -> bytes:
    """As JSON, always UTF-8; on one line unless indented."""
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(figures, ensure_ascii=False, indent=indent, separators=separators)
    return encode(text).decode("utf-8", "replace").encode() + b"\n"


def report_error(error: Error) -> int:
    """Say in one line what is wrong; the exit code for it."""
    line = f"error: {error}".replace("\n", " ") + "\n"
    with contextlib.suppress(Error):
        write_all(2, encode(line), "stderr")
    return EXIT_USAGE if isinstance(error, CommandLineError) else EXIT_STATUS + error.status
