"""Does every client get on with every server?  python tests/smoke.py SCHEME..."""

import os
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
PROGRAMS = {
    "C++": {role: [str(BUILD / f"thermostat-{role}")] for role in ("server", "client")},
    "Python": {role: [sys.executable, "-m", f"thermostat.{role}"] for role in ("server", "client")},
}
SOURCES = {"C++": "cpp/thermostat/{}.cpp", "Python": "python/thermostat/{}.py"}
PATIENCE_S = 20.0


def languages(role: str) -> list[str]:
    """Those that have such a program."""
    return [one for one, path in SOURCES.items() if (ROOT / path.format(role)).exists()]


@contextmanager
def serving(language: str, scheme: str, directory: str) -> Iterator[str]:
    """A server that is ready, and its URL; on stdio a client starts its own."""
    program = PROGRAMS[language]["server"]
    if scheme == "stdio":
        yield "stdio:" + shlex.join([*program, "stdio:"])
        return
    where = "127.0.0.1:0" if scheme.endswith("tcp") else f"{directory}/address"
    words = [*program, f"{scheme}://{where}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            ready, _, _ = select.select([server.stdout], [], [], PATIENCE_S)
            word, _, url = (server.stdout.readline() if ready else "").strip().partition(" ")
            if word != "ready":
                sys.exit(f"{shlex.join(words)} has not become ready")
            yield url
        finally:
            server.terminate()
            code = server.wait(PATIENCE_S)
    if code != 0:
        sys.exit(f"{shlex.join(words)} ended with {code}")


def talk(client: str, server: str, scheme: str) -> str:
    """What the client prints."""
    with (
        tempfile.TemporaryDirectory() as directory,
        serving(server, scheme, directory) as url,
    ):
        words = [*PROGRAMS[client]["client"], url]
        done = subprocess.run(
            words, stdout=subprocess.PIPE, text=True, timeout=PATIENCE_S, check=False
        )
    if done.returncode != 0 or not done.stdout:
        sys.exit(f"{shlex.join(words)} ended with {done.returncode} and printed {done.stdout!r}")
    return done.stdout


def main(schemes: list[str]) -> None:
    pairings = [(one, other) for one in languages("client") for other in languages("server")]
    if not pairings:
        sys.exit("nothing to test: it takes a client and a server")
    expected = ""
    for scheme in schemes:
        for client, server in pairings:
            printed = talk(client, server, scheme)
            expected = expected or printed
            if printed != expected:
                sys.exit(f"{client} -> {server} over {scheme} prints other text:\n{printed}")
            print(f"{scheme}: {client} -> {server} ok")
    if len(pairings) * len(schemes) == 1:
        print("one pairing alone has nothing to be compared with; see whether this is right:")
    else:
        print("each of them printed:")
    print(expected, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
