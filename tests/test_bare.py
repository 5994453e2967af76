"""The bare programs: each mechanism in every pairing, waiting both ways, small and large."""

import os
import re
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / os.environ.get("IPC_BRIDGE_BUILD_DIR", "build") / "bare"
SOURCES = {"cpp": ROOT / "cpp" / "bare", "py": ROOT / "python" / "bare"}
MECHANISMS = ("pipe", "stdio_pipe", "tcp", "unix")
LANGUAGES = ("cpp", "py")
LINES_MAX = 59
TIMEOUT_S = 60.0
READY_TIMEOUT_S = 10.0


def program(mechanism: str, language: str) -> list[str]:
    if language == "py":
        return [sys.executable, str(SOURCES["py"] / f"{mechanism}.py")]
    binary = BUILD / mechanism
    if not binary.exists():
        pytest.skip(f"{binary} is not built")
    return [str(binary)]


def first_line(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    ready, _, _ = select.select([server.stdout], [], [], READY_TIMEOUT_S)
    assert ready, "the server prints no ready line"
    return server.stdout.readline()


@contextmanager
def served(
    mechanism: str, language: str, directory: Path, size: int, wait: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that has said that it is ready, and its address."""
    address = "0" if mechanism == "tcp" else str(directory / "address")
    words = [*program(mechanism, language), "serve", address, str(size), wait]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = first_line(server)
            assert re.fullmatch(r"ready \S+\n", line)
            address = line.split()[1]
            assert mechanism == "tcp" or address == str(directory / "address")
            yield server, address
        finally:
            server.kill()


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def ping(
    mechanism: str, client: str, server: str, directory: Path, size: int, wait: str, rounds: int
) -> subprocess.CompletedProcess[str]:
    """One run of client against server; the samples go to directory/samples."""
    words = [*program(mechanism, client), "ping"]
    figures = [str(size), wait, str(rounds), str(directory / "samples")]
    if mechanism == "stdio_pipe":
        child = [*program(mechanism, server), "serve", str(size), wait]
        return run([*words, *figures, "--", *child])
    with served(mechanism, server, directory, size, wait) as (process, address):
        done = run([*words, address, *figures])
        assert process.wait(TIMEOUT_S) == 0
    return done


@pytest.mark.parametrize(("size", "rounds"), [(64, 300), (1 << 20, 5)], ids=["64B", "1MiB"])
@pytest.mark.parametrize("wait", ["block", "spin"])
@pytest.mark.parametrize("server", LANGUAGES)
@pytest.mark.parametrize("client", LANGUAGES)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_round_trips(
    mechanism: str, client: str, server: str, wait: str, size: int, rounds: int, tmp_path: Path
) -> None:
    done = ping(mechanism, client, server, tmp_path, size, wait, rounds)

    assert (done.returncode, done.stderr) == (0, "")
    figures = re.fullmatch(r"p50_ns=(\d+) p99_ns=(\d+) rounds=(\d+)\n", done.stdout)
    assert figures, done.stdout
    p50, p99, counted = map(int, figures.groups())
    raw = (tmp_path / "samples").read_bytes()
    samples = sorted(int.from_bytes(raw[i : i + 8], "little") for i in range(0, len(raw), 8))
    assert len(raw) == 8 * rounds
    assert (p50, p99, counted) == (samples[rounds // 2], samples[rounds * 99 // 100], rounds)
    assert samples[0] > 0
    assert os.listdir(tmp_path) == ["samples"], "something is left on disk"


@pytest.mark.parametrize("server", LANGUAGES)
@pytest.mark.parametrize("client", LANGUAGES)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_samples_file_is_optional(mechanism: str, client: str, server: str, tmp_path: Path) -> None:
    words = [*program(mechanism, client), "ping"]
    if mechanism == "stdio_pipe":
        child = [*program(mechanism, server), "serve", "8", "block"]
        done = run([*words, "8", "block", "20", "--", *child])
    else:
        with served(mechanism, server, tmp_path, 8, "block") as (process, address):
            done = run([*words, address, "8", "block", "20"])
            assert process.wait(TIMEOUT_S) == 0
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("wait", ["block", "spin"])
@pytest.mark.parametrize("client", LANGUAGES)
@pytest.mark.parametrize("answer", ["", "os.write(1, bytes(64))"], ids=["end", "wrong"])
def test_a_bad_peer_is_an_error(client: str, wait: str, answer: str) -> None:
    """Five right echoes, and then the end of file or a wrong one."""
    peer = f"import os\nfor _ in range(5): os.write(1, os.read(0, 64))\nos.read(0, 64)\n{answer}"
    words = [*program("stdio_pipe", client), "ping", "64", wait, "100"]
    done = run([*words, "--", sys.executable, "-c", peer])
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize("client", LANGUAGES)
@pytest.mark.parametrize("mechanism", ["tcp", "unix"])
def test_end_of_file_is_an_error(mechanism: str, client: str, tmp_path: Path) -> None:
    family = socket.AF_INET if mechanism == "tcp" else socket.AF_UNIX
    path = str(tmp_path / "address")
    with socket.socket(family) as listener:
        listener.bind(("127.0.0.1", 0) if mechanism == "tcp" else path)
        listener.listen(1)
        listener.settimeout(TIMEOUT_S)
        address = str(listener.getsockname()[1]) if mechanism == "tcp" else path
        words = [*program(mechanism, client), "ping", address, "64", "block", "100"]
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
            try:
                peer, _ = listener.accept()
                with peer:
                    peer.recv(64, socket.MSG_WAITALL)
                _, errors = process.communicate(timeout=TIMEOUT_S)
            finally:
                process.kill()
    assert process.returncode == 1
    assert errors.startswith("error: ")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_words_that_make_no_sense(mechanism: str, language: str) -> None:
    done = run(program(mechanism, language))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_path_in_use_is_left_alone(language: str, tmp_path: Path) -> None:
    path = tmp_path / "address"
    path.touch()
    done = run([*program("unix", language), "serve", str(path), "64", "block"])
    assert done.returncode == 1
    assert path.exists()


@pytest.mark.parametrize("language", LANGUAGES)
def test_fifos_are_private(language: str, tmp_path: Path) -> None:
    with served("pipe", language, tmp_path, 64, "block"):
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_both_languages_have_the_same_stems() -> None:
    cpp = {path.stem for path in SOURCES["cpp"].glob("*.cpp")}
    python = {path.stem for path in SOURCES["py"].glob("*.py")}
    assert cpp == python
    assert cpp >= set(MECHANISMS)


@pytest.mark.parametrize(
    "source",
    sorted([*SOURCES["cpp"].glob("*.cpp"), *SOURCES["py"].glob("*.py")]),
    ids=lambda path: path.name,
)
def test_a_bare_file_is_short(source: Path) -> None:
    assert len(source.read_text().splitlines()) <= LINES_MAX
