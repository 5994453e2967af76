"""`ipc-bridge doctor` sees limits, missing tools and leftovers, and says what to do."""

import json
import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ipc_bridge.harness import doctor
from peer_support import kill, served
from probe_support import Client
from processes import stopped, sysv_objects
from support import LANGUAGES, ROOT, listen_url

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
    assert names >= {"memlock", "wmem_max", "memory", "cmake", "strace", "sysv_ipc"}
    assert code == int(any(one["advice"] for one in found))


def leftovers(*directories: Path) -> dict[str, str]:
    """The advice to each."""
    return {one.name: one.advice for one in doctor.find_leftovers(directories) if one.advice}


@pytest.mark.parametrize(
    ("kind", "option"),
    [("MessageQueue", "-q"), ("Semaphore", "-s"), ("SharedMemory", "-m")],
)
def test_a_leftover_is_found_with_its_remedy(kind: str, option: str) -> None:
    before = sysv_objects()
    size = {"size": 4096} if kind == "SharedMemory" else {}
    made = getattr(sysv_ipc, kind)(doctor.KEY_MARK | 0x12344, sysv_ipc.IPC_CREX, 0o600, **size)
    try:
        code, out = run()
        assert code == 1
        assert f"ipcrm {option} {made.id}" in out
        (left,) = sysv_objects() - before  # nothing is changed
        assert left.endswith(f" {made.key:#x} {made.id}")
    finally:
        made.remove()
    assert f"{doctor.KEY_MARK | 0x12344:#x}" not in run()[1]


def test_what_belongs_to_others_is_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what has no mark of ours, whosever it is."""
    (tmp_path / "it.lock").touch(0o600)
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(tmp_path / "it"))
    queues = [
        sysv_ipc.MessageQueue(key, sysv_ipc.IPC_CREX, 0o600)
        for key in (doctor.KEY_MARK | 0x12344, (doctor.KEY_MARK ^ 0x40000000) | 0x12344)
    ]
    try:
        ours, lock = f"msg {queues[0].key:#x}", f"{tmp_path}/it.lock"
        left = leftovers(tmp_path)
        assert ours in left
        assert lock not in left  # the socket is not 0600
        (tmp_path / "it").chmod(0o600)
        assert leftovers(tmp_path).keys() >= {ours, lock}
        assert not any(f"{queues[1].key:#x}" in name for name in leftovers(tmp_path))
        monkeypatch.setattr(os, "geteuid", lambda: 65534 if os.getuid() != 65534 else 65533)
        assert not {ours, lock} & leftovers(tmp_path).keys()
    finally:
        for queue in queues:
            queue.remove()


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("scheme", ["pipe", "unix", "sysv-queue", "sysv-shm", "zmq+ipc"])
def test_what_a_server_has_is_named_once_it_is_dead(
    scheme: str, language: str, tmp_path: Path
) -> None:
    """And the next one at its address, as advised, leaves nothing to name."""
    address, url = tmp_path / scheme, listen_url(scheme, tmp_path)
    keys: set[int] = set()

    def named() -> set[str]:
        """What is this server's. (Where root is not at hand, other tests have objects, too.)"""
        left = leftovers(tmp_path)
        return {one for one in left if one.startswith("/") or int(one.split()[1], 0) in keys}

    with served(url, language) as up, Client("cpp", up.url) as client:
        client.do(op="echo", size=1)
        for journal in tmp_path.glob("*.keys-*"):
            (first,) = doctor.KEY.unpack(journal.read_bytes())
            keys |= {*range(first, first + doctor.KEYS_EACH)}
        assert named() == set()
        with stopped(client.pid):  # so that it removes nothing
            kill(up.process)
            names = named()
    kinds = {name.split()[0] for name in names if not name.startswith("/")}
    assert kinds == {"sysv-queue": {"msg"}, "sysv-shm": {"sem"}}.get(scheme, set())
    assert str(address if scheme == "pipe" else f"{address}.lock") in names
    assert any(name.startswith(f"{address}.keys-") for name in names) == scheme.startswith("sysv")
    with served(url, language):
        assert named() == set()


def test_a_bare_ring_is_named_once_nobody_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "SHM", tmp_path)
    bare = [sys.executable, str(ROOT / "python" / "bare" / "shm_ring.py")]
    path = tmp_path / "it"
    with subprocess.Popen(
        [*bare, "serve", str(path), "64", "block"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"ready")
        assert str(path) not in leftovers(tmp_path)
        process.kill()
    assert leftovers(tmp_path)[str(path)] == f"rm {path}"


def test_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """Else a slip of the pen would read as "none"."""
    done = subprocess.run(
        [sys.executable, "-m", "ipc_bridge.harness.cli", "doctor", str(tmp_path / "no")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: INVALID_ARGUMENT: ")
    assert f"'{tmp_path}/no' does not exist" in done.stderr


def test_a_missing_tool_is_told() -> None:
    code, out = run(path="/nonexistent")
    assert code == 1
    assert "cmake             missing" in out
    assert "make setup" in out


def test_every_tool_and_module_of_setup_is_looked_for() -> None:
    """The commands that .make/setup looks for, and what the extras for users bring."""
    listed = (ROOT / ".make" / "setup").read_text().partition('SYSTEM_PACKAGES="')[2].partition('"')
    commands = {line.split()[1] for line in listed[0].strip().splitlines()}
    commands = {command for command in commands if not re.search(r"/|^-|[.]h", command)}
    assert commands <= doctor.TOOLS.keys()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {
        re.split("[><=]", one)[0]
        for extra in ("sysv", "zmq", "grpc", "harness")
        for one in extras["optional-dependencies"][extra]
    }
    modules = {
        "pyzmq": "zmq",
        "grpcio": "grpc",
        "grpcio-health-checking": "grpc_health",
        "grpcio-reflection": "grpc_reflection",
    }
    assert {modules.get(one, one.replace("-", "_")) for one in named} == doctor.MODULES.keys()


def test_the_mark_is_that_of_the_transports() -> None:
    from ipc_bridge.transports import sysv_objects as objects

    assert (doctor.KEY_MARK, doctor.KEY_MASK) == (objects.KEY_MARK, objects.KEY_MASK)
    assert (doctor.KEYS_EACH, doctor.KEY.format) == (objects.KEYS_EACH, objects.SLOT.format)


def test_a_low_limit_has_an_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "read_number", lambda path, field=0: 1)
    assert all("sysctl" in one.advice for one in doctor.find_limits())
    monkeypatch.setattr(doctor, "read_number", lambda path, field=0: None)
    assert all(one.value == "unknown" for one in doctor.find_limits())
