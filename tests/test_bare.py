"""The bare programs: each mechanism in every pairing, waiting both ways, small and large."""

import os
import re
import select
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from processes import sysv_objects

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / os.environ.get("IPC_BRIDGE_BUILD_DIR", "build") / "bare"
SOURCES = {"cpp": ROOT / "cpp" / "bare", "py": ROOT / "python" / "bare"}
MECHANISMS = (
    *("pipe", "stdio_pipe", "tcp", "unix"),
    *("sysv_queue", "sysv_shm", "shm_ring"),
    *("zeromq", "zeromq_req"),
)
BY_KEY = ("sysv_queue", "sysv_shm")
KEY = str(0x1BC00000)  # of the project's own, in the namespace of this test run
STREAMS = MECHANISMS[:4]  # of bytes: the others have no end of file, and no half of a message
LANGUAGES = ("cpp", "py")
LINES_MAX = 59
# With objects to make and remove, a ring that all others leave to the kernel, a stream too, or two
# kinds of address.
LINES_MAX_OF = {
    **{"sysv_queue": 66, "sysv_shm": 99, "counter": 66},
    **{"shm_ring": 111, "grpc_rpc": 99, "zeromq": 66},
}
SHARED = "rounds"  # the one file a language that every mechanism includes
SHARED_LINES_MAX = 149
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
    mechanism: str,
    language: str,
    directory: Path,
    size: int,
    wait: str,
    tracer: tuple[str, ...] = (),
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that has said that it is ready, and its address."""
    address = address_of(mechanism, directory)
    words = [*tracer, *program(mechanism, language), "serve", address, str(size), wait]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True) as server:
        try:
            line = first_line(server)
            assert re.fullmatch(r"ready \S+\n", line)
            address = line.split()[1]
            assert mechanism == "tcp" or address == address_of(mechanism, directory)
            yield server, address
        finally:
            server.kill()


def address_of(mechanism: str, directory: Path) -> str:
    if mechanism in BY_KEY:
        return KEY
    return "0" if mechanism == "tcp" else str(directory / "address")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """No System V object; what a killed server leaves, as such programs do, is removed first."""
    before = sysv_objects()
    yield
    assert sysv_objects() == before


def shape(mechanism: str) -> tuple[str, str]:
    """What the usage text of a mechanism calls its address, with a blank; and its last words."""
    names = {"pipe": "PREFIX ", "stdio_pipe": "", "tcp": "PORT ", **dict.fromkeys(BY_KEY, "KEY ")}
    names["zeromq"] = "ENDPOINT "
    address = names.get(mechanism, "PATH ")
    return address, "" if address else " -- COMMAND..."


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
def test_round_trips_of_zeromq_over_tcp(client: str, server: str) -> None:
    words = [*program("zeromq", server), "serve", "tcp://127.0.0.1:*", "64", "block"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            word, at = first_line(process).split()
            assert word == "ready"
            assert re.fullmatch(r"tcp://127\.0\.0\.1:[1-9]\d+", at)
            done = run([*program("zeromq", client), "ping", at, "64", "block", "100"])
            assert (done.returncode, done.stderr) == (0, "")
            assert re.fullmatch(r"p50_ns=\d+ p99_ns=\d+ rounds=100\n", done.stdout)
            assert process.wait(TIMEOUT_S) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("address", ["unix:{}/address", "127.0.0.1:0"], ids=["unix", "tcp"])
@pytest.mark.parametrize("server", LANGUAGES)
@pytest.mark.parametrize("client", LANGUAGES)
def test_round_trips_of_grpc(client: str, server: str, address: str, tmp_path: Path) -> None:
    """It has addresses and threads of its own, and its server serves on; so it is not in the list.
    (4 MiB is what gRPC takes unless told otherwise, less its own bytes.)"""
    words = [*program("grpc_rpc", server), "serve", address.format(tmp_path), "64", "block"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            word, at = first_line(process).split()
            assert word == "ready"
            for size, rounds in ((64, 100), (5 << 20, 3)):
                ping_words = [*program("grpc_rpc", client), "ping", at, str(size), "block"]
                done = run([*ping_words, str(rounds)])
                assert (done.returncode, done.stderr) == (0, "")
                assert re.fullmatch(rf"p50_ns=\d+ p99_ns=\d+ rounds={rounds}\n", done.stdout)
            done = run([*program("grpc_rpc", client), "stream", at, "64", "block", "1000"])
            assert (done.returncode, done.stderr) == (0, "")
            assert re.fullmatch(r"items_per_second=[1-9]\d*\n", done.stdout)
        finally:
            process.kill()


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
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("", "echo: end of file"),
        ("os.write(1, bytes(64))", "echo: other bytes came back"),
        ("os.write(1, bytes(30))", "read: end of file in the middle of a message"),
    ],
    ids=["end", "wrong", "half"],
)
def test_a_bad_peer_is_an_error(client: str, wait: str, answer: str, error: str) -> None:
    """Five right echoes, and then the end of file, a wrong one or half of one."""
    peer = f"import os\nfor _ in range(5): os.write(1, os.read(0, 64))\nos.read(0, 64)\n{answer}"
    words = [*program("stdio_pipe", client), "ping", "64", wait, "100"]
    done = run([*words, "--", sys.executable, "-c", peer])
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {error}\n")


@pytest.mark.parametrize("client", LANGUAGES)
def test_a_peer_that_fails_is_an_error(client: str) -> None:
    echo = "import os\nwhile data := os.read(0, 64): os.write(1, data)\nraise SystemExit(3)"
    words = [*program("stdio_pipe", client), "ping", "64", "block", "100"]
    done = run([*words, "--", sys.executable, "-c", echo])
    assert (done.returncode, done.stderr) == (1, "error: peer: failed\n")


@pytest.mark.parametrize("client", LANGUAGES)
def test_a_peer_that_cannot_start_is_an_error(client: str) -> None:
    words = [*program("stdio_pipe", client), "ping", "64", "block", "100"]
    done = run([*words, "--", "/nowhere/peer"])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: execvp: No such file or directory\n")


@pytest.mark.parametrize(
    ("answer", "error"),
    [(0, "echo: end of file"), (30, "recv: end of file in the middle of a message")],
    ids=["end", "half"],
)
@pytest.mark.parametrize("client", LANGUAGES)
@pytest.mark.parametrize("mechanism", ["tcp", "unix"])
def test_end_of_file_is_an_error_for_ping(
    mechanism: str, client: str, answer: int, error: str, tmp_path: Path
) -> None:
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
                    peer.send(bytes(answer))
                _, errors = process.communicate(timeout=TIMEOUT_S)
            finally:
                process.kill()
    assert (process.returncode, errors) == (1, f"error: {error}\n")


def connected(mechanism: str, address: str) -> tuple[int, int]:
    """The descriptors from which a stranger reads a server's echoes, and to which it writes."""
    if mechanism == "pipe":
        writer = os.open(address + ".c2s", os.O_WRONLY)
        return os.open(address + ".s2c", os.O_RDONLY), writer
    family = socket.AF_INET if mechanism == "tcp" else socket.AF_UNIX
    peer = socket.socket(family)
    peer.connect(("127.0.0.1", int(address)) if mechanism == "tcp" else address)
    writer = peer.detach()
    return os.dup(writer), writer


@pytest.mark.parametrize("sent", [64, 100], ids=["whole", "half"])
@pytest.mark.parametrize("wait", ["block", "spin"])
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("mechanism", STREAMS)
def test_end_of_file_for_serve(
    mechanism: str, language: str, wait: str, sent: int, tmp_path: Path
) -> None:
    """Between messages it is the end of the work, in the middle of one an error."""
    if mechanism == "stdio_pipe":
        words = [*program(mechanism, language), "serve", "64", wait]
        done = subprocess.run(
            words, input=bytes(sent), capture_output=True, timeout=TIMEOUT_S, check=False
        )
        status, errors, echoed = done.returncode, done.stderr.decode(), done.stdout
    else:
        with served(mechanism, language, tmp_path, 64, wait) as (process, address):
            reader, writer = connected(mechanism, address)
            os.write(writer, bytes(sent))
            echoed = os.read(reader, 64)
            for fd in (reader, writer) if mechanism == "pipe" else (writer, reader):
                os.close(fd)
            assert process.stderr is not None
            status, errors = process.wait(TIMEOUT_S), process.stderr.read()
    assert echoed == bytes(64)
    call = "read" if "pipe" in mechanism else "recv"
    middle = f"error: {call}: end of file in the middle of a message\n"
    assert (status, errors) == ((0, "") if sent == 64 else (1, middle))


WRONG_WORDS = [
    "",
    "serve",
    "ping",
    "help",
    "echo A 64 block",
    "serve A 64",
    "serve A 64 sleep",
    "serve A 64 block 100",
    "serve A 0 block",
    "serve A -1 block",
    "serve A 64x block",
    "serve A 99999999999999999999999 block",
    "ping A 64 block",
    "ping A 64 block 0",
    "ping A 64 block -5",
    "ping A 64 block +5",
    "ping A 64 block ten",
    "ping A 64 block 1_0",
    "ping A 1073741824 block 10",
    "ping A 64 adaptive 10",
    "ping A 64 block 10 samples more",
]


@pytest.mark.parametrize("text", WRONG_WORDS, ids=lambda text: text or "none")
@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_wrong_words_are_usage(mechanism: str, language: str, text: str, tmp_path: Path) -> None:
    address = address_of(mechanism, tmp_path)
    words = [address if word == "A" else word for word in text.split()]
    command = []
    if mechanism == "stdio_pipe":
        words = [word for word in words if word != address]
        command = ["--", "true"] if words[:1] == ["ping"] else []
    done = run([*program(mechanism, language), *words, *command])
    name, end = shape(mechanism)
    usage = (
        f"usage: {mechanism} serve {name}SIZE block|spin\n"
        f"       {mechanism} ping {name}SIZE block|spin ROUNDS [SAMPLES]{end}\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", usage)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("mechanism", "text"),
    [
        ("stdio_pipe", "ping 64 block 10"),
        ("stdio_pipe", "ping 64 block 10 --"),
        ("stdio_pipe", "ping 64 block 10 samples --"),
        ("stdio_pipe", "serve 64 block -- true"),
        ("unix", "ping /nowhere 64 block 10 -- true"),
        ("tcp", "serve 65536 64 block"),
        ("tcp", "serve http 64 block"),
        ("tcp", "ping -1 64 block 10"),
    ],
)
@pytest.mark.parametrize("language", LANGUAGES)
def test_words_of_one_mechanism_are_usage(mechanism: str, text: str, language: str) -> None:
    done = run([*program(mechanism, language), *text.split()])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"usage: {mechanism} serve ")


NOBODY = "No such file or directory"


@pytest.mark.parametrize(
    ("mechanism", "text", "error"),
    [
        ("pipe", "ping {}/nobody 64 block 10", f"open: {NOBODY}"),
        ("pipe", "serve {}/no/body 64 block", f"mkfifo: {NOBODY}"),
        ("unix", "ping {}/nobody 64 block 10", f"connect: {NOBODY}"),
        ("unix", "serve {}/no/body 64 block", f"bind: {NOBODY}"),
        ("unix", "serve {}/" + "x" * 108 + " 64 block", "bind: AF_UNIX path too long"),
        ("unix", "ping {}/" + "x" * 108 + " 64 block 9", "connect: AF_UNIX path too long"),
        ("tcp", "ping 1 64 block 10", "connect: Connection refused"),
        ("sysv_queue", f"ping {KEY} 64 block 10", f"msgget: {NOBODY}"),
        ("sysv_shm", f"ping {KEY} 64 block 10", f"shmget: {NOBODY}"),
        ("shm_ring", "ping {}/nobody 64 block 10", f"open: {NOBODY}"),
        ("shm_ring", "serve {}/no/body 64 block", f"open: {NOBODY}"),
    ],
)
@pytest.mark.parametrize("language", LANGUAGES)
def test_errors_name_the_call(
    mechanism: str, text: str, error: str, language: str, tmp_path: Path
) -> None:
    done = run([*program(mechanism, language), *text.format(tmp_path).split()])
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {error}\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("samples", "error"),
    [("/dev/full", "No space left on device"), ("/nowhere/samples", NOBODY)],
)
@pytest.mark.parametrize("rounds", [1, 5000])
@pytest.mark.parametrize("language", LANGUAGES)
def test_samples_that_cannot_be_written(
    language: str, rounds: int, samples: str, error: str
) -> None:
    words = [*program("stdio_pipe", language), "ping", "8", "block", str(rounds), samples]
    done = run([*words, "--", *program("stdio_pipe", language), "serve", "8", "block"])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: write samples: {error}\n"


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("mechanism", STREAMS)
def test_a_message_is_one_call_each_way(
    mechanism: str, language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In block mode, at both ends: 20 rounds and 2 to warm up are 22 reads and 22 writes, with no
    other system call between the first and the last. (ZeroMQ's threads make their own.)"""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    # The leak checker of a sanitizer build cannot work under a tracer.
    options = os.environ.get("ASAN_OPTIONS", "")
    monkeypatch.setenv("ASAN_OPTIONS", f"{options}:detect_leaks=0".lstrip(":"))
    size = 61  # no other read or write answers with this number
    logs = tmp_path / "logs"
    logs.mkdir()
    traced = (strace, "-ff", "-qq", "-o", str(logs / "log"))
    words = [*traced, *program(mechanism, language), "ping"]
    figures = [str(size), "block", "20"]
    if mechanism == "stdio_pipe":
        child = [*program(mechanism, language), "serve", str(size), "block"]
        done = run([*words, *figures, "--", *child])
    else:
        with served(mechanism, language, tmp_path, size, "block", traced) as (process, address):
            done = run([*words, address, *figures])
            assert process.wait(TIMEOUT_S) == 0
    assert done.returncode == 0, done.stderr

    read, write = ("read", "write") if "pipe" in mechanism else ("recvfrom", "sendto")
    both = []
    for log in logs.iterdir():
        calls = log.read_text().splitlines()
        moved = [
            i for i, call in enumerate(calls) if re.match(rf"({read}|{write})\(.* = {size}$", call)
        ]
        if moved:
            both.append([call.split("(")[0] for call in calls[moved[0] : moved[-1] + 1]])
    assert sorted(both) == [[read, write] * 22, [write, read] * 22]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("mechanism", ["unix", "zeromq", "zeromq_req", "shm_ring"])
def test_a_path_in_use_is_left_alone(mechanism: str, language: str, tmp_path: Path) -> None:
    path = tmp_path / "address"
    path.touch()
    done = run([*program(mechanism, language), "serve", str(path), "64", "block"])
    what = "open: File exists" if mechanism == "shm_ring" else "bind: Address already in use"
    assert (done.returncode, done.stderr) == (1, f"error: {what}\n")
    assert path.read_bytes() == b""


@pytest.mark.parametrize("taken", [".c2s", ".s2c"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_fifo_in_use_is_left_alone(language: str, taken: str, tmp_path: Path) -> None:
    (tmp_path / f"address{taken}").touch()
    done = run([*program("pipe", language), "serve", str(tmp_path / "address"), "64", "block"])
    assert (done.returncode, done.stderr) == (1, "error: mkfifo: File exists\n")
    assert os.listdir(tmp_path) == [f"address{taken}"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_port_is_free_at_once(language: str, tmp_path: Path) -> None:
    """The server's end closes first, and so it is the one whose port rests."""
    with served("tcp", language, tmp_path, 64, "block") as (process, port):
        peer = socket.create_connection(("127.0.0.1", int(port)))
        peer.send(bytes(64))
        peer.recv(64, socket.MSG_WAITALL)
        process.kill()
        process.wait(TIMEOUT_S)
        with peer:
            assert peer.recv(1) == b""
    words = [*program("tcp", language), "serve", port, "64", "block"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert first_line(server) == f"ready {port}\n"
        finally:
            server.kill()


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("mechanism", ["pipe", "unix", "shm_ring", "zeromq", "zeromq_req"])
def test_names_are_private(mechanism: str, language: str, tmp_path: Path) -> None:
    with served(mechanism, language, tmp_path, 64, "block"):
        modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
        assert modes == {0o600}


def test_both_languages_have_the_same_stems() -> None:
    cpp = {path.stem for path in SOURCES["cpp"].glob("*.?pp")}
    python = {path.stem for path in SOURCES["py"].glob("*.py")}
    assert cpp == python
    assert cpp >= {*MECHANISMS, SHARED}


@pytest.mark.parametrize(
    "source",
    sorted([*SOURCES["cpp"].glob("*.?pp"), *SOURCES["py"].glob("*.py")]),
    ids=lambda path: path.name,
)
def test_a_bare_file_is_short(source: Path) -> None:
    lines_max = LINES_MAX_OF.get(source.stem, LINES_MAX)
    lines_max = SHARED_LINES_MAX if source.stem == SHARED else lines_max
    assert len(source.read_text().splitlines()) <= lines_max


def names(source: Path) -> list[str]:
    """The functions and types at a file's top level, in order."""
    pattern = {".py": r"^(?:def|class) (\w+)", ".cpp": CPP_NAME, ".hpp": HPP_NAME}
    found = re.findall(pattern[source.suffix], source.read_text(), re.MULTILINE)
    return [name for name in found if name not in CPP_ONLY]


CPP_ONLY = {"main", "name_socket", "Chunk", "Slot"}  # Python has no need of them
CPP_NAME = r"^(?:(?:class|struct) (?=\w+ )|[\w:]+ (?=\w+\())(\w+)"
HPP_NAME = r"^(?:struct (?=\w+ {)|(?:\[\[noreturn\]\] )?(?:inline )?[\w:]+ (?=\w+\())(\w+)"


@pytest.mark.parametrize("stem", [*MECHANISMS, "grpc_rpc", SHARED])
def test_both_languages_have_the_same_names_in_order(stem: str) -> None:
    suffix = ".hpp" if stem == SHARED else ".cpp"
    python = names(SOURCES["py"] / f"{stem}.py")
    assert names(SOURCES["cpp"] / f"{stem}{suffix}") == python
    assert python


# --- the lesson ---


def counted(first: str, second: str, count: int, how: str) -> int:
    """What is lost of 2 * count, counted up by two processes."""
    words = [*program("counter", first), "first", KEY, str(count), how]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert first_line(process) == f"ready {KEY}\n"
        done = run([*program("counter", second), "second", KEY, str(count), how])
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        text, _ = process.communicate(timeout=TIMEOUT_S)
    figures = re.fullmatch(r"counted=(\d+) lost=(\d+)\n", text)
    assert figures
    total, lost = map(int, figures.groups())
    assert total + lost == 2 * count
    return lost


@pytest.mark.parametrize("second", LANGUAGES)
@pytest.mark.parametrize("first", LANGUAGES)
def test_a_shared_counter_loses_nothing_under_a_semaphore(first: str, second: str) -> None:
    assert counted(first, second, 10_000, "locked") == 0


@pytest.mark.parametrize(("first", "second"), [("cpp", "cpp"), ("cpp", "py"), ("py", "py")])
def test_a_shared_counter_alone_loses_updates(first: str, second: str) -> None:
    """Not each time, but soon, also where both share one core."""
    count = 20_000_000 if (first, second) == ("cpp", "cpp") else 1_000_000
    assert any(counted(first, second, count, "bare") for _ in range(100))


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_lessons_words_are_judged(language: str) -> None:
    done = run([*program("counter", language), "third", KEY, "5", "bare"])
    usage = "usage: counter first|second KEY COUNT bare|locked\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", usage)
    done = run([*program("counter", language), "second", KEY, "5", "bare"])
    assert (done.returncode, done.stderr) == (1, f"error: shmget: {NOBODY}\n")
