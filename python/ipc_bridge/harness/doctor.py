"""`ipc-bridge doctor`: what this machine allows and lacks, what was left behind, and what to do.

It changes nothing, and needs none of the libraries that it looks for. Objects are ours by the mark
in their key (ipc_bridge.transports.sysv_objects), files by their names and kinds; in use is what a
process has open: a server's lock, its journal, and the keys noted there. (Not seen are processes in
another PID namespace; so it tells how to remove a thing, and leaves that to its reader.)
"""

import contextlib
import importlib.util
import json
import os
import pwd
import re
import resource
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import click

KEY_MARK, KEY_MASK = 0x1BC00000, 0xFFF00000  # as in sysv_objects, which needs sysv_ipc
KEYS_EACH = 4
KEY = struct.Struct("<I")
JOURNAL = re.compile(r"\.keys-[0-9a-f]{8}$")
LOCK_BYTES_MAX = 4  # empty, or "made" in a pipe's
SHM = Path("/dev/shm")
RING_BYTES = 2 * 16 * (64 + 16384)  # of the bare shm_ring, which has no other mark
CLIENTS = 256  # what a server takes by default: the limits should not bite earlier
SHM_BYTES_EACH = 2304 << 10  # of memory for a client of the shared-memory transports
SEND_BUFFER_BYTES = 512 << 10  # what unix asks for; the kernel doubles it
TOOLS = {  # and what each is for
    "cmake": "building the C++ programs",
    "g++": "building the C++ programs",
    "ninja": "building the C++ programs",
    "pkg-config": "building against what is installed",
    "protoc": "the request of Stream",
    "grpc_cpp_plugin": "gRPC in C++",
    "grpc_python_plugin": "gRPC in Python",
    "clang-format": "make lint",
    "strace": "tests that inject faults",
    "ipcrm": "removing leftovers",
}
MODULES = {  # and the extra that brings each
    "sysv_ipc": "sysv",
    "zmq": "zmq",
    "grpc": "grpc",
    "grpc_health": "grpc",
    "grpc_reflection": "grpc",
    "click": "harness",
    "jinja2": "harness",
    "jsonschema": "harness",
    "matplotlib": "harness",
    "numpy": "harness",
    "rich": "harness",
    "scipy": "harness",
}


@dataclass
class Finding:
    """One line: `advice` says what to do, "" that nothing need be done."""

    topic: str
    name: str
    value: str
    advice: str = ""


def read_number(path: str, field: int = 0) -> int | None:
    """A number of proc(5); None where there is no such file."""
    try:
        return int(Path(path).read_text().split()[field])
    except (OSError, ValueError, IndexError):
        return None


# Their file of /proc/sys/kernel and field, what suffices for CLIENTS, and what it bounds.
LIMITS = [
    ("msgmax", "msgmax", 0, 4096, "bytes of a message: smaller is slower"),
    ("msgmnb", "msgmnb", 0, 8192, "bytes in a queue: smaller is slower"),
    ("msgmni", "msgmni", 0, 2 * CLIENTS, "queues: two for each client of sysv-queue"),
    ("semmni", "sem", 3, 4 * CLIENTS, "semaphore sets: four for each client of sysv-shm"),
    ("semmns", "sem", 1, 4 * CLIENTS, "semaphores: four for each client of sysv-shm"),
    ("shmmni", "shmmni", 0, CLIENTS, "segments: one for each client of sysv-shm"),
    ("shmmax", "shmmax", 0, 512 << 10, "bytes of a segment"),
    ("shmall", "shmall", 0, CLIENTS * 128, "pages of all segments"),
]


def find_limits() -> list[Finding]:
    """The limits of System V IPC in this namespace."""
    found = []
    for name, file, field, enough, what in LIMITS:
        value = read_number(f"/proc/sys/kernel/{file}", field)
        if value is None:
            found.append(Finding("limits", name, "unknown", "this kernel has no System V IPC"))
            continue
        advice = "" if value >= enough else f"raise kernel.{file} by sysctl(8) to {enough} or more"
        found.append(Finding("limits", name, f"{value} ({what})", advice))
    return found


def find_machine() -> list[Finding]:
    """Cores, memory, buffers and descriptors."""
    cores = len(os.sched_getaffinity(0))
    found = [Finding("machine", "cores", str(cores))]
    if cores < 2:
        found[0].advice = "one core: wait=spin only wastes it, and cross-core figures cannot be had"
    available = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    free = int(available[1]) << 10 if available else 0
    need = CLIENTS * SHM_BYTES_EACH
    small = f"{CLIENTS} clients of shm may need {need >> 20} MiB: serve fewer, by --clients-max"
    value = f"{free >> 20} MiB available"
    found.append(Finding("machine", "memory", value, "" if free >= need else small))
    try:  # no bound for shm, whose memory has no name, nor for System V: the mount is not theirs
        info = os.statvfs("/dev/shm")
        value = f"{info.f_bavail * info.f_frsize >> 20} MiB free, for the bare shm_ring only"
    except OSError as error:
        value = f"{error.strerror}, needed by the bare shm_ring only"
    found.append(Finding("machine", "/dev/shm", value))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = locked == resource.RLIM_INFINITY
    found.append(Finding("machine", "memlock", "unlimited" if unlimited else f"{locked} bytes"))
    # No advice: the usual 208 KiB cost unix a few wake-ups for payloads above that, and no more.
    room = read_number("/proc/sys/net/core/wmem_max")
    what = f"bytes of a send buffer: unix asks for {SEND_BUFFER_BYTES}"
    found.append(Finding("machine", "wmem_max", "unknown" if room is None else f"{room} ({what})"))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = "" if files >= 4 * CLIENTS else f"a server of {CLIENTS} clients: ulimit -n 1024"
    found.append(Finding("machine", "open files", str(files), advice))
    return found


def find_tools() -> list[Finding]:
    """Programs and Python modules."""
    found = []
    for name, what in TOOLS.items():
        path = shutil.which(name)
        advice = "" if path else f"for {what}: make setup, or your package manager"
        found.append(Finding("tools", name, path or "missing", advice))
    for name, extra in MODULES.items():
        there = importlib.util.find_spec(name) is not None
        advice = "" if there else f"pip install '.[{extra}]' in the project"
        found.append(Finding("tools", name, "installed" if there else "missing", advice))
    return found


def find_leftovers(directories: Iterable[Path]) -> list[Finding]:
    """What nobody uses any more, of the System V objects that carry our mark, and of the files that
    servers and the bare shm_ring leave in some directories if they are killed."""
    used = files_in_use()
    found = find_objects(keys_in_use(used))
    for directory in directories:
        with contextlib.suppress(OSError):
            for path in sorted(directory.iterdir()):
                with contextlib.suppress(OSError):
                    found += find_files(path, used)
    return found or [Finding("leftovers", "objects and files", "none")]


def files_in_use() -> dict[str, str]:
    """The files that processes have open, and the way to each in /proc. (One user does not see
    those of another.)"""
    used = {}
    for process in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            for entry in process.iterdir():
                with contextlib.suppress(OSError):
                    used[os.readlink(entry)] = str(entry)
    return used


def keys_in_use(used: dict[str, str]) -> set[int]:
    """The keys in the journals of live servers, sysv_objects."""
    keys = set()
    for name, way in used.items():
        if JOURNAL.search(name.removesuffix(" (deleted)")):
            with contextlib.suppress(OSError, struct.error):
                for (first,) in KEY.iter_unpack(Path(way).read_bytes()):
                    keys |= set(range(first, first + KEYS_EACH))
    return keys


def find_objects(used: set[int]) -> list[Finding]:
    """System V objects with our mark that the user can remove, proc(5)."""
    found = []
    for kind, option in (("msg", "-q"), ("sem", "-s"), ("shm", "-m")):
        try:
            first, *lines = Path(f"/proc/sysvipc/{kind}").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            fields = dict(zip(first.split(), line.split(), strict=False))
            key, number = int(fields["key"]), line.split()[1]  # msqid, semid or shmid
            owner = int(fields["uid"])
            if key & KEY_MASK == KEY_MARK and key not in used and is_removable(owner):
                value = f"id {number} of {name_of(owner)}"
                advice = f"start a server at its address again, or ipcrm {option} {number}"
                found.append(Finding("leftovers", f"{kind} {key:#x}", value, advice))
    return found


def find_files(path: Path, used: dict[str, str]) -> list[Finding]:
    """Is it a lock, a journal or a ring that nobody has open?"""
    info = path.lstat()
    if not is_removable(info.st_uid):
        return []
    lock, address = path, path.with_name(path.name.removesuffix(".lock"))
    if stat.S_ISDIR(info.st_mode):
        lock, address = path / "lock", path / "listen"  # of a pipe
        info = lock.lstat()
    if str(lock.resolve()) in used or not stat.S_ISREG(info.st_mode):
        return []
    if JOURNAL.search(path.name):
        value, advice = "a dead server's journal", f"start a server at {JOURNAL.sub('', str(path))}"
    elif address != path and info.st_size <= LOCK_BYTES_MAX and has_door(address):
        value, advice = "a dead server's lock", f"start a server there, or rm {lock} {address}"
    elif path.parent == SHM and info.st_size == RING_BYTES:
        value, advice = "a ring of the bare shm_ring", f"rm {path}"
    else:
        return []
    return [Finding("leftovers", str(path), value, advice)]


def has_door(path: Path) -> bool:
    """Is it where clients arrive: a socket or a FIFO, 0600?"""
    mode = path.lstat().st_mode
    return (stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)) and stat.S_IMODE(mode) == 0o600


def is_removable(owner: int) -> bool:
    """May this user remove what belongs to that one?"""
    return os.geteuid() in (owner, 0)


def name_of(uid: int) -> str:
    """A user's name, or the number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def usual_directories() -> list[Path]:
    """Where addresses mostly are, and the bare shm_ring."""
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    return [Path(tempfile.gettempdir()), Path(runtime), SHM]


DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command()
@click.argument("directories", nargs=-1, type=DIRECTORY)
@click.option("--json", "as_json", is_flag=True, help="one JSON array, for programs")
def doctor(directories: tuple[Path, ...], as_json: bool) -> int:
    """Say what this machine allows and lacks, what was left behind, and what to do about it.

    What servers that were killed have left is looked for in DIRECTORIES; by default in those for
    temporary and run-time files. Exits with 0 if there is nothing to do, else with 1.
    """
    left = find_leftovers(directories or usual_directories())
    found = [*find_limits(), *find_machine(), *find_tools(), *left]
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found]))
    else:
        for topic in dict.fromkeys(one.topic for one in found):
            click.echo(topic)
            for one in found:
                if one.topic == topic:
                    mark = "!" if one.advice else " "
                    click.echo(f" {mark} {one.name:17} {one.value}")
                    if one.advice:
                        click.echo(f"   {'':17} -> {one.advice}")
    return int(any(one.advice for one in found))
