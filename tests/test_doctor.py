"""`ipc-bridge doctor` sees limits, missing tools and leftovers, and says what to do."""

import json
import os
import subprocess
import sys

import pytest

from ipc_bridge.harness import doctor
from processes import sysv_objects

sysv_ipc = pytest.importorskip("sysv_ipc")


def run(*words: str, path: str | None = None) -> tuple[int, str]:
    environment = os.environ | ({"PATH": path} if path is not None else {})
    done = subprocess.run(
        [sys.executable, "-m", "ipc_bridge.harness.cli", "doctor", *words],
        capture_output=True,
        text=True,
        env=environment,
        timeout=30,
        check=False,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_every_finding_is_there_in_json() -> None:
    code, out = run("--json")
    found = json.loads(out)
    names = {one["name"] for one in found}
    assert names >= {
        "msgmax",
        "msgmnb",
        "msgmni",
        "semmni",
        "shmmax",
        "cores",
        "memory",
        "/dev/shm",
    }
    assert names >= {"memlock", "memory", "cmake", "strace", "sysv_ipc"}
    assert code == int(any(one["advice"] for one in found))


def test_a_leftover_is_found_with_its_remedy() -> None:
    before = sysv_objects()
    queue = sysv_ipc.MessageQueue(doctor.KEY_MARK | 0x12344, sysv_ipc.IPC_CREX, 0o600)
    try:
        code, out = run()
        assert code == 1
        assert f"ipcrm -q {queue.id}" in out
        assert sysv_objects() - before == {f"msg {queue.key:#x} {queue.id}"}  # nothing is changed
    finally:
        queue.remove()
    assert f"{doctor.KEY_MARK | 0x12344:#x}" not in run()[1]


def test_a_missing_tool_is_told() -> None:
    code, out = run(path="/nonexistent")
    assert code == 1
    assert "cmake             missing" in out
    assert "make setup" in out


def test_the_mark_is_that_of_the_transports() -> None:
    from ipc_bridge.transports import sysv_objects as objects

    assert (doctor.KEY_MARK, doctor.KEY_MASK) == (objects.KEY_MARK, objects.KEY_MASK)


def test_a_low_limit_has_an_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "read_number", lambda path, field=0: 1)
    assert all("sysctl" in one.advice for one in doctor.find_limits())
    monkeypatch.setattr(doctor, "read_number", lambda path, field=0: None)
    assert all(one.value == "unknown" for one in doctor.find_limits())
