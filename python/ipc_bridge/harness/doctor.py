"""`ipc-bridge doctor`: what this machine allows and lacks, what was left behind, and what to do.

It changes nothing, and needs none of the libraries that it looks for. Objects are ours by the mark
in their key (ipc_bridge.transports.sysv_objects); whether somebody still uses one, it cannot know:
a live server's look the same, so it tells how to remove them and leaves that to its reader.
"""

import importlib.util
import json
import os
import pwd
import re
import resource
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import click

KEY_MARK, KEY_MASK = 0x1BC00000, 0xFFF00000  # as in sysv_objects, which needs sysv_ipc
CLIENTS = 256  # what a server takes by default: the limits should not bite earlier
SHM_BYTES_EACH = 768 << 10  # of memory for a client of the shared-memory transports
TOOLS = {  # and what each is for
    "cmake": "building the C++ programs",
    "g++": "building the C++ programs",
    "ninja": "building the C++ programs",
    "protoc": "the request of Stream",
    "strace": "tests that inject faults",
    "ipcrm": "removing leftovers",
}
MODULES = {"sysv_ipc": "sysv", "zmq": "zmq", "grpc": "grpc", "numpy": "harness", "rich": "harness"}


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
    """Cores, memory and descriptors."""
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
        advice = "" if there else f"pip install 'ipc-bridge[{extra}]'"
        found.append(Finding("tools", name, "installed" if there else "missing", advice))
    return found


def find_leftovers() -> list[Finding]:
    """System V objects that carry our mark, proc(5)."""
    found = []
    for kind, option in (("msg", "-q"), ("sem", "-s"), ("shm", "-m")):
        try:
            first, *lines = Path(f"/proc/sysvipc/{kind}").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            fields = dict(zip(first.split(), line.split(), strict=False))
            key, number = int(fields["key"]), line.split()[1]  # msqid, semid or shmid
            if key & KEY_MASK != KEY_MARK:
                continue
            advice = (
                f"if no server runs: start one at its address again, or ipcrm {option} {number}"
            )
            owner = int(fields["uid"])
            if owner not in (os.geteuid(), 0) and os.geteuid() != 0:
                advice = f"its owner, {name_of(owner)}, can remove it"
            name = f"{kind} {key:#x}"
            found.append(Finding("leftovers", name, f"id {number} of {name_of(owner)}", advice))
    return found or [Finding("leftovers", "System V objects", "none")]


def name_of(uid: int) -> str:
    """A user's name, or the number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="one JSON array, for programs")
def doctor(as_json: bool) -> int:
    """Say what this machine allows and lacks, what was left behind, and what to do about it.

    Exits with 0 if there is nothing to do, else with 1.
    """
    found = [*find_limits(), *find_machine(), *find_tools(), *find_leftovers()]
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
