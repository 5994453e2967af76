"""`shm` between processes: indices that wrap; and without its native module, or with one of no use:
one line says so; no other fails. (The ring by itself: cpp/test_ring.cpp.)"""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from ipc_bridge import _native
from ipc_bridge.service import make_service
from peer_support import TIMEOUT_S, served, serving_own
from probe_support import Client
from support import LANGUAGES, MIB, Exit

HIDDEN = """
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "ipc_bridge._native":
            raise {error}

sys.meta_path.insert(0, Hide())
from ipc_bridge import peer
sys.exit(peer.main())
"""
ERRORS = {
    "missing": 'ModuleNotFoundError("No module named " + repr(name), name=name)',
    "of another Python": 'ImportError("undefined symbol: Py_Something", name=name)',
}
COMMANDS = {
    "serve": [],
    "echo": ["--payload", "x"],
    "stream": ["--count", "1", "--size", "1"],
    "bench": ["--op", "echo", "--size", "1", "--duration", "1"],
}


def run_without(error: str, *words: str) -> subprocess.CompletedProcess[str]:
    """The Python peer, where the module cannot be imported."""
    command = [sys.executable, "-c", HIDDEN.format(error=ERRORS[error]), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("command", COMMANDS)
def test_shm_without_its_module_says_so(command: str, error: str, runtime: Path) -> None:
    done = run_without(error, command, f"shm://{runtime}/s", *COMMANDS[command])
    assert (done.returncode, done.stdout) == (Exit.FAILED_PRECONDITION, "")
    line = r"error: FAILED_PRECONDITION: shm needs ipc_bridge\._native \(.+\): run `make build`.*\n"
    assert re.fullmatch(line, done.stderr), done.stderr


def test_the_other_transports_do_without_the_module(runtime: Path) -> None:
    """It also has the quick walk over small items; frame.py has a slower one."""
    with served(f"unix://{runtime}/u", "cpp") as up:
        done = run_without("missing", "stream", up.url, "--count", "5000", "--size", "7")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("5000 items of 7 bytes verified")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("edge", [32, 64])
def test_indices_that_wrap(
    edge: int, language: str, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 3: they pass 2^32 or 2^64 within the first record after the hello, either way."""
    monkeypatch.setattr(_native, "make", partial(_native.make, start=(1 << edge) - 512))
    with (
        serving_own(f"shm://{runtime}/s", make_service()) as url,
        Client(language, url) as client,
    ):
        client.do(op="echo", size=5000, seed=edge)
        client.do(op="echo", size=MIB, seed=edge)  # the ring takes it in parts
        assert client.do(op="stream", count=3000, size=1000)["items"] == 3000
