"""What /proc tells of a process, of this one and of others, and what to do to them (proc(5))."""

import contextlib
import ctypes
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support import until


def children(pid: int | None = None) -> set[int]:
    """The children of a process; by default, of this one."""
    found: set[int] = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid or 'self'}/task").iterdir():
            found.update(map(int, (task / "children").read_text().split()))
    return found


def open_fds() -> dict[int, str]:
    """This process's descriptors, and what each is."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of iterdir itself
            found[int(entry.name)] = os.readlink(entry)
    return found


def fds(pid: int) -> int:
    """How many descriptors it has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def status_field(pid: int, name: str) -> int:
    """A number of /proc/PID/status."""
    text = Path(f"/proc/{pid}/status").read_text()
    match = re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
    return int(match[1]) if match else 0


def threads(pid: int) -> int:
    return status_field(pid, "Threads")


def rss_bytes(pid: int) -> int:
    """Its resident size."""
    return 1024 * status_field(pid, "VmRSS")


def memory_peak_bytes(pid: int) -> int:
    """The largest resident size that it had."""
    return 1024 * status_field(pid, "VmHWM")


def _stat(pid: int) -> list[str]:
    """The fields behind the name, so that [0] is the third of proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def state(pid: int) -> str:
    """The state's letter; X if it is gone."""
    try:
        return _stat(pid)[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def is_gone(pid: int) -> bool:
    """Has it ended? (A zombie has.)"""
    return state(pid) in "ZX"


def cpu_s(pid: int) -> float:
    """User and system time, of all threads."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def sleeps(pid: int) -> bool:
    """Has the main thread not run for a while?"""

    def switches() -> int:
        names = ("voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")
        return sum(status_field(pid, name) for name in names)

    before = switches()
    time.sleep(0.1)
    return state(pid) == "S" and switches() == before


def only_child(pid: int) -> int:
    """The server that a client of stdio has started, once it serves."""
    assert until(lambda: len(children(pid)) == 1)
    (child,) = children(pid)
    assert until(lambda: threads(child) > 1)
    return child


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """SIGSTOP, and in the end SIGCONT."""
    os.kill(pid, signal.SIGSTOP)
    try:
        assert until(lambda: state(pid) == "T")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# --- System V objects, which belong to no process ---


def enter_private_ipc() -> bool:
    """Give this process, and all that it starts, a System V IPC namespace of its own, so that what
    is left in it is ours. Only root may; unshare(2)."""
    clone_newipc = 0x08000000
    return bool(ctypes.CDLL(None).unshare(clone_newipc) == 0)


def _sysv_lines() -> Iterator[tuple[str, list[str]]]:
    """The kind and the fields of each that carries our mark: key, id, mode... (proc(5))."""
    for kind in ("msg", "sem", "shm"):
        for line in Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]:
            if int(line.split()[0]) & 0xFFF00000 == 0x1BC00000:
                yield kind, line.split()


def sysv_objects() -> set[str]:
    """The System V objects that carry our mark: their kind, key and id."""
    return {f"{kind} {int(key):#x} {number}" for kind, (key, number, *_) in _sysv_lines()}


def sysv_modes() -> set[int]:
    """Who may use them."""
    return {int(mode, 8) & 0o777 for _, (_, _, mode, *_) in _sysv_lines()}
