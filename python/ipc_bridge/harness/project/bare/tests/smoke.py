"""Does every client get on with every server?  python tests/smoke.py PROGRAM..."""

import os
import random
import select
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / os.environ.get("BUILD", "build")
LANGUAGES = [name for name, top in (("C++", "cpp"), ("Python", "python")) if (ROOT / top).exists()]
SIZE, WAIT, ROUNDS = "64", "block", "100"
PATIENCE_S = 20.0
# What a usage text may call an address, if it is no path.
ADDRESSES = {"PORT": "0", "ADDRESS": "unix:{}", "KEY": str(random.randrange(1 << 20, 1 << 30))}


def program(name: str, language: str) -> list[str]:
    """The words that start one."""
    if language == "C++":
        return [str(BUILD / name)]
    return [sys.executable, str(ROOT / "python" / f"{name}.py")]


def usage(words: list[str]) -> str:
    """It says what words it takes: an address or none."""
    return subprocess.run(words, stderr=subprocess.PIPE, text=True, check=False).stderr


@contextmanager
def serving(words: list[str], leaves: bool) -> Iterator[str]:
    """A server that is ready, and its address. One that leaves with its client is waited for: what
    it has made by a key would stay if it was ended before it had removed it. Some never leave."""
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            ready, _, _ = select.select([server.stdout], [], [], PATIENCE_S)
            word, _, address = (server.stdout.readline() if ready else "").strip().partition(" ")
            if word != "ready":
                sys.exit(f"{shlex.join(words)} has not become ready")
            yield address
            if leaves:
                server.wait(PATIENCE_S)
        finally:
            server.terminate()


def ping(name: str, client: str, server: str) -> str:
    """What the client prints."""
    serve = [*program(name, server), "serve"]
    words = [*program(name, client), "ping"]
    told = usage(words)
    if "COMMAND" in told:
        return run([*words, SIZE, WAIT, ROUNDS, "--", *serve, SIZE, WAIT])
    with tempfile.TemporaryDirectory() as directory:
        address = f"{directory}/address"
        for word, form in ADDRESSES.items():
            if f" {word} " in told:
                address = form.format(address)
        leaves = address == ADDRESSES["KEY"]
        with serving([*serve, address, SIZE, WAIT], leaves) as address:
            return run([*words, address, SIZE, WAIT, ROUNDS])


def run(words: list[str]) -> str:
    """A program to its end."""
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=PATIENCE_S, check=False)
    if done.returncode != 0 or "rounds=" not in done.stdout:
        sys.exit(f"{shlex.join(words)} ended with {done.returncode} and printed {done.stdout!r}")
    return done.stdout


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for client in LANGUAGES:
            for server in LANGUAGES:
                print(f"{name}: {client} -> {server} ok, {ping(name, client, server)}", end="")
