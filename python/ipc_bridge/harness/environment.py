"""What a run depends on beside the code: the machine, its load, the versions; and what of that
makes the figures doubtful. Nothing here names the machine or its user.
"""

import contextlib
import importlib.metadata
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import ipc_bridge
from ipc_bridge.harness.matrix import core_pair, cores_allowed
from ipc_bridge.harness.programs import ROOT, build_dir

STEAL_MAX = 0.01  # of the time, taken by the host
OTHERS_MAX = 0.05  # of the machine's time, used by programs that are not of this run
LOAD_MAX = 0.5  # for each core, before the run
SPREAD_MAX = 0.15  # of the rounds of a middling cell, to either side of its median
PACKAGES = ("numpy", "protobuf", "pyzmq", "grpcio", "sysv-ipc")
TIMEOUT_S = 10.0  # of a program that is asked for its version


def read(path: str | Path) -> str:
    """A small file; "" where there is none."""
    with contextlib.suppress(OSError):
        return Path(path).read_text(errors="replace").strip()
    return ""


def said(*words: str) -> str:
    """What a program prints; "" if it cannot be run."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=ROOT, check=True
        )
        return done.stdout.strip()
    return ""


def field(text: str, name: str) -> str:
    """The first `name : value` of a text."""
    match = re.search(rf"^{re.escape(name)}\s*[:=]\s*(.*)$", text, re.MULTILINE)
    return match[1].strip().strip('"') if match else ""


# --- what stays the same through a run ---


def describe() -> dict[str, Any]:
    """The machine and the software."""
    return {"machine": machine(), "software": software()}


def machine() -> dict[str, Any]:
    """What unlike machines differ in."""
    cpu = read("/proc/cpuinfo")
    client_core, server_core = core_pair()
    frequency = Path(f"/sys/devices/system/cpu/cpu{client_core}/cpufreq")
    quota, _, period = read("/sys/fs/cgroup/cpu.max").partition(" ")
    return {
        "cpu": field(cpu, "model name") or field(cpu, "CPU implementer") or platform.machine(),
        "architecture": platform.machine(),
        "cores": os.cpu_count() or 0,
        "cores_allowed": len(cores_allowed()),
        "peers_on": [client_core, server_core],
        "threads_of_one_core": read(
            f"/sys/devices/system/cpu/cpu{client_core}/topology/thread_siblings_list"
        ),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "virtual": "hypervisor" in field(cpu, "flags").split(),
        "governor": read(frequency / "scaling_governor"),
        "quota_cores": int(quota) / int(period) if quota.isdigit() and period.isdigit() else None,
        "mitigations": {
            path.name: read(path)
            for path in sorted(Path("/sys/devices/system/cpu/vulnerabilities").glob("*"))
        },
        "priority": priority(),
    }


def priority() -> str:
    """Of this process over others, which the peers inherit: `nice 0` unless asked for more, or a
    real-time policy of sched(7) and its priority."""
    policy = os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK
    name = {os.SCHED_FIFO: "fifo", os.SCHED_RR: "rr"}.get(policy)
    if name:
        return f"{name} {os.sched_getparam(0).sched_priority}"
    return f"nice {os.getpriority(os.PRIO_PROCESS, 0)}"


def software() -> dict[str, Any]:
    """Versions."""
    cache = read(build_dir() / "CMakeCache.txt")
    compiler = field(cache, "CMAKE_CXX_COMPILER:FILEPATH") or field(cache, "CMAKE_CXX_COMPILER")
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "ipc_bridge": ipc_bridge.__version__,
        "revision": said("git", "rev-parse", "HEAD"),
        "modified": bool(said("git", "status", "--porcelain", "--untracked-files=no")),
        "kernel": platform.release(),
        "system": field(read("/etc/os-release"), "PRETTY_NAME"),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "gil": getattr(sys, "_is_gil_enabled", lambda: True)(),
        "compiler": (said(compiler, "--version").splitlines() or [""])[0] if compiler else "",
        "build_type": field(cache, "CMAKE_BUILD_TYPE:STRING"),
        "packages": versions,
    }


# --- what changes ---


class Clock(NamedTuple):
    """The machine's use of its time, in seconds of all cores together."""

    at_s: float
    busy_s: float
    steal_s: float
    own_s: float  # of busy: this process, and those that it has waited for
    throttled_s: float
    load: float

    @classmethod
    def now(cls) -> "Clock":
        """Of proc(5), /proc/stat, and cgroups(7)."""
        ticks = os.sysconf("SC_CLK_TCK")
        words = read("/proc/stat").split("\n", 1)[0].split()[1:9]
        user, nice, system, _, _, irq, soft, steal = (int(word) / ticks for word in words)
        own = 0.0
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
            used = resource.getrusage(who)
            own += used.ru_utime + used.ru_stime
        throttled = re.search(r"throttled_usec (\d+)", read("/sys/fs/cgroup/cpu.stat"))
        return cls(
            time.monotonic(),
            user + nice + system + irq + soft,
            steal,
            own,
            int(throttled[1]) / 1e6 if throttled else 0.0,
            os.getloadavg()[0],
        )


def noise(before: Clock, after: Clock) -> dict[str, Any]:
    """What else happened while the run was on."""
    core_s = max(1e-9, (after.at_s - before.at_s) * (os.cpu_count() or 1))
    others_s = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return {
        "seconds": after.at_s - before.at_s,
        "load_before": before.load,
        "load_after": after.load,
        "steal_share": (after.steal_s - before.steal_s) / core_s,
        "others_share": max(0.0, others_s / core_s),
        "throttled_s": after.throttled_s - before.throttled_s,
    }


def unpinned(placements: Collection[str]) -> list[str]:
    """The warning of a run that has cells placed so, if there is one."""
    if "free" not in placements:
        return []
    which = "" if set(placements) == {"free"} else "cells placed `free`: "
    return [f"{which}no pinning: the system may move the peers, onto one core or two, at any time"]


def warnings(
    machine: dict[str, Any],
    noise: dict[str, Any],
    spread: float | None,
    *,
    server_is_ours: bool = True,
) -> list[str]:
    """Why to trust the figures less: one sentence each. The work of a server that ran already is
    that of another program, and no doubt."""
    found = []
    if machine["cores_allowed"] < 2:
        found.append("one core only: client and server can never run at the same time")
    if machine["virtual"]:
        found.append("a virtual machine: a wake-up across cores goes through the host")
    if machine["governor"] not in ("", "performance"):
        found.append(f"the frequency governor is {machine['governor']}, not performance")
    if machine["quota_cores"] is not None:
        found.append(f"a quota of {machine['quota_cores']:g} cores may stop the peers at any time")
    if noise["throttled_s"] > 0:
        found.append(f"the quota stopped programs for {noise['throttled_s']:.2f} s")
    if noise["steal_share"] > STEAL_MAX:
        found.append(f"the host took {noise['steal_share']:.1%} of the time (steal)")
    if server_is_ours and noise["others_share"] > OTHERS_MAX:
        found.append(f"other programs used {noise['others_share']:.0%} of the machine")
    if noise["load_before"] > LOAD_MAX * machine["cores"]:
        found.append(f"the load average was {noise['load_before']:.1f} at the start")
    if spread is not None and spread > SPREAD_MAX:
        found.append(f"rounds of one cell differ by {spread:.0%} from their median, in the middle")
    return found
