"""What the tests of the harness need: its command line run as a program, and results to look at."""

import contextlib
import io
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from ipc_bridge.console import report_error
from ipc_bridge.errors import Error
from ipc_bridge.harness import cli, results
from ipc_bridge.harness.matrix import Cell, Floor
from ipc_bridge.harness.results import Document
from ipc_bridge.harness.runner import Measured, Plan, Round

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 100.0
TINY = ["--rounds", "2", "--duration", "0.03", "--warmup", "0.01"]  # as quick as a process starts


def start(*words: str, temporary: Path) -> subprocess.Popen[str]:
    """`ipc-bridge`, from the root of the tree; `temporary` is where it may leave nothing."""
    return subprocess.Popen(
        [sys.executable, "-m", "ipc_bridge.harness.cli", *words],
        # A test run in the background of a shell ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary), "COLUMNS": "120"},
        cwd=ROOT,
    )


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """With a short path, for a Unix socket's has at most 107 bytes; empty again at the end."""
    with tempfile.TemporaryDirectory(prefix="ipcb-", dir="/tmp") as directory:
        yield Path(directory)
        assert os.listdir(directory) == []


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    with temporary_directory() as temporary, start(*words, temporary=temporary) as process:
        try:
            out, errors = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
    return subprocess.CompletedProcess(words, process.returncode, out, errors)


def run_on_terminal(*words: str, columns: int) -> tuple[int, str]:
    """On a terminal: the exit code, and all that it showed, without its control sequences."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, columns))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    with temporary_directory() as temporary, os.fdopen(ours, "rb", buffering=0) as screen:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "ipc_bridge.harness.cli", *words],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                env=environment | {"TMPDIR": str(temporary), "TERM": "xterm"},
                cwd=ROOT,
            )
        finally:
            os.close(theirs)
        with process:
            try:
                shown = b""
                with contextlib.suppress(OSError):  # EIO: all have closed it
                    while part := screen.read(1 << 16):
                        shown += part
                process.wait(TIMEOUT_S)
            finally:
                process.kill()
    return process.returncode, re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", shown.decode())


def call(*words: str) -> subprocess.CompletedProcess[str]:
    """The same within this process, which is quicker: for commands that start no program."""
    out, errors = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
        # An error goes to the descriptor, whole, and not by way of sys.stderr.
        mock.patch("ipc_bridge.console.write_all", lambda _, data, __: errors.write(data.decode())),
        mock.patch.dict(os.environ, COLUMNS="120"),
    ):
        try:
            code = cli.run(words)
        except Error as error:
            code = report_error(error)
    return subprocess.CompletedProcess(words, code, out.getvalue(), errors.getvalue())


def bench(tmp_path: Path, *words: str, code: int = 0) -> Document:
    """A run, and its document, which is valid."""
    out = tmp_path / "out"
    done = run("bench", *TINY, *words, "--out", str(out))
    assert done.returncode == code, done.stdout + done.stderr
    return results.load(out)


def echo_round(number: int, p50_ns: float) -> Round:
    """What a round of echoes looks like."""
    names = ("min", "p10", "p25", "p50", "p75", "p90", "p95", "p99", "p99_9", "max")
    shares = (0.8, 0.9, 0.95, 1, 1.1, 1.2, 1.4, 2, 5, 20)
    cost = {"cpu_us_per_call": p50_ns / 2e3, "switches_per_call": 1.0, "memory_peak_bytes": 8 << 20}
    return {
        "round": number,
        "operations": 5000,
        "seconds": 0.1,
        "operations_per_second": 1e9 / p50_ns,
        "bytes_per_second": 64e9 / p50_ns,
        "errors": 0,
        "verification_failures": 0,
        "latency_ns": {name: int(p50_ns * s) for name, s in zip(names, shares, strict=True)}
        | {"p99_99": None},
        "age_ns": None,
        "client": cost,
        "server": cost,
    }


def stream_round(number: int, bytes_per_second: float) -> Round:
    """What a round of a stream looks like."""
    return echo_round(number, 1e4) | {
        "latency_ns": None,
        "bytes_per_second": bytes_per_second,
        "operations_per_second": bytes_per_second / (64 << 10),
    }


MACHINE = {
    "cpu": "A CPU",
    "architecture": "x86_64",
    "cores": 2,
    "cores_allowed": 2,
    "peers_on": [0, 1],
    "threads_of_one_core": "0",
    "memory_bytes": 8 << 30,
    "virtual": False,
    "governor": "performance",
    "quota_cores": None,
    "mitigations": {"spectre_v2": "Mitigation: <b>IBRS</b>"},
    "priority": "nice 0",
}


def made(
    cells: dict[Cell, list[Round]],
    floors: dict[Floor, list[Round]],
    *,
    validate: bool = True,
    **about: Any,
) -> Document:
    """A document as a run would write it, from figures that a test has made."""
    measured = Measured(rounds=max(map(len, cells.values()), default=0))
    measured.cells.update(cells)
    measured.floors.update(floors)
    plan = Plan([*cells], rounds=max(1, measured.rounds), duration_s=0.1, warmup_s=0.05)
    head = {
        "created": "2026-01-02T03:04:05+00:00",
        "profile": "quick",
        "command": ["ipc-bridge", "bench"],
        "interrupted": False,
        "machine": MACHINE,
        "software": {
            "ipc_bridge": "0",
            "revision": "0" * 40,
            "modified": False,
            "kernel": "6.1",
            "system": "Debian",
            "python": "CPython 3.11",
            "gil": True,
            "compiler": "g++ 12",
            "build_type": "Release",
            "packages": {"numpy": "2"},
        },
        "noise": {
            "seconds": 60.0,
            "load_before": 0.1,
            "load_after": 1.0,
            "steal_share": 0.0,
            "others_share": 0.0,
            "throttled_s": 0.0,
        },
        "warnings": [],
    }
    document = results.document(plan, measured, {}, head | about)
    if validate:
        results.validate(document, "made")
    return document
