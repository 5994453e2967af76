"""The demo and the overhead: they run, show figures, fail politely, and leave nothing behind."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ipc_bridge.endpoint import SCHEMES
from ipc_bridge.harness import demo
from ipc_bridge.harness.programs import SHORT
from support import Exit

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / os.environ.get("IPC_BRIDGE_BUILD_DIR", "build")
TIMEOUT_S = 100.0
PAIRINGS = [(client, server) for client in ("C++", "Python") for server in ("C++", "Python")]


def start(program: str, *words: str, temporary: Path, build: Path = BUILD) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"ipc_bridge.harness.{program}", *words],
        # A test run in the background of a shell ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"TMPDIR": str(temporary), "IPC_BRIDGE_BUILD_DIR": str(build), "COLUMNS": "100"},
    )


def run(
    program: str, *words: str, temporary: Path, build: Path = BUILD
) -> subprocess.CompletedProcess[str]:
    with start(program, *words, temporary=temporary, build=build) as process:
        try:
            out, errors = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
    return subprocess.CompletedProcess(words, process.returncode, out, errors)


def number(text: str) -> float:
    return float(text.replace(",", ""))


def row(out: str, client: str, server: str) -> list[float]:
    """The figures of one pairing in the table."""
    names = rf"^ *{re.escape(client)} +{re.escape(server)}"
    match = re.search(names + r" +([\d.,]+) us +([\d.,]+) us +([\d,]+) +([\d,]+) *$", out, re.M)
    assert match, out
    return [number(text) for text in match.groups()]


def running_with(text: str) -> list[str]:
    """The command lines of processes that hold a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has just ended
        if text in line:
            found.append(line)
    return found


def test_each_transport_is_shown_once() -> None:
    schemes, _ = demo.parse(["all"])
    assert len(schemes) == len({scheme.partition("+")[0] for scheme in schemes})
    assert {scheme.partition("+")[0] for scheme in SCHEMES} == {
        scheme.partition("+")[0] for scheme in schemes
    }
    for short, scheme in SHORT.items():
        assert demo.parse([short])[0] == [scheme]


@pytest.mark.parametrize("transport", [*SCHEMES, *SHORT])
def test_four_pairings(transport: str, tmp_path: Path) -> None:
    done = run("demo", transport, "--duration", "0.02", temporary=tmp_path)

    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.startswith(f"{SHORT.get(transport, transport)}: client -> server")
    for client, server in PAIRINGS:
        line = rf'{re.escape(client)} -> {re.escape(server)} +echo "hello from {re.escape(client)}"'
        assert re.search(line + r".*verified.*done$", done.stdout, re.M), done.stdout
        p50, p99, items, megabytes = row(done.stdout, client, server)
        assert 0 < p50 <= p99
        assert items > 0
        assert megabytes > 0
    last = done.stdout.splitlines()[-2:]
    assert "by hand" in last[0]
    assert "ipc_bridge.peer echo" in "".join(last)
    assert "\x1b" not in done.stdout, "colour off a terminal"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("words", [["carrier-pigeon"], []], ids=["unknown", "missing"])
def test_a_wrong_name_lists_the_right_ones(words: list[str], tmp_path: Path) -> None:
    done = run("demo", *words, temporary=tmp_path)

    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: INVALID_ARGUMENT: .*\n", done.stderr)
    assert all(name in done.stderr for name in [*SCHEMES, *SHORT, "all"])


def test_make_knows_a_wrong_name_before_it_builds() -> None:
    words = ["make", "--no-print-directory", "demo", "TRANSPORT=carrier-pigeon"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (2, "")
    names = re.match(r"error: INVALID_ARGUMENT: .* known are (.*): carrier-pigeon\n", done.stderr)
    assert names
    assert set(names[1].split()) == {*SCHEMES, *SHORT, "all"}


def test_make_clean_removes_what_the_build_generates() -> None:
    ignored = (ROOT / ".gitignore").read_text().split("# generated ")[1].split("\n\n")[0]
    made = [line.lstrip("/") for line in ignored.splitlines()[1:]]
    out = subprocess.check_output(["make", "-n", "clean"], cwd=ROOT, text=True)
    assert made
    assert set(made) <= set(out.split())


def test_an_unbuilt_peer_says_what_to_do(tmp_path: Path) -> None:
    done = run("demo", "unix", temporary=tmp_path, build=tmp_path)

    assert done.returncode > 2
    assert re.fullmatch(r"error: NOT_FOUND: .*`make build`.*\n", done.stderr)


def test_a_pairing_that_fails_stops_no_other(tmp_path: Path) -> None:
    build, temporary = tmp_path / "build", tmp_path / "temporary"
    build.mkdir()
    temporary.mkdir()
    broken = build / "ipc-bridge-peer"
    broken.write_text("#!/bin/sh\necho 'error: INTERNAL: broken on purpose' >&2\nexit 23\n")
    broken.chmod(0o755)

    done = run("demo", "unix", "--duration", "0.02", temporary=temporary, build=build)

    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.count("broken on purpose") == 3
    assert min(row(done.stdout, "Python", "Python")) > 0
    assert os.listdir(temporary) == []


@pytest.mark.parametrize("transport", ["unix", "stdio"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupt_ends_all(transport: str, number: signal.Signals, tmp_path: Path) -> None:
    with start("demo", transport, "--duration", "50", temporary=tmp_path) as process:
        try:
            assert process.stdout is not None
            seen = ""
            while "measuring" not in seen:
                piece = os.read(process.stdout.fileno(), 4096)
                assert piece, seen
                seen += piece.decode()
            process.send_signal(number)
            _, errors = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()

    assert process.returncode == Exit.INTERRUPTED
    assert errors == "error: CANCELLED: interrupted\n"
    assert os.listdir(tmp_path) == []
    assert running_with(str(tmp_path)) == []


def test_overhead_of_one_transport(tmp_path: Path) -> None:
    """Over the bare program, and over a cache line."""
    words = ["--transport", "shm,shm-line", "--language", "cpp", "--rounds", "1", "--json"]
    done = run("overhead", *words, temporary=tmp_path)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["op"], found["size_bytes"], found["rounds"]) == ("echo", 64, 1)
    assert [(cell["wait"], cell["placement"]) for cell in found["cells"]] == [
        ("spin", "cross-core"),
        ("block", "same-core"),
        ("block", "cross-core"),
        ("spin", "cross-core"),
    ]
    for cell in found["cells"]:
        assert cell["bare_p50_ns"] > 0
        assert cell["pair_p50_ns"] > 0
        assert cell["ratio_min"] <= cell["ratio"] <= cell["ratio_max"]
    assert os.listdir(tmp_path) == []


def test_overhead_of_a_stream(tmp_path: Path) -> None:
    done = run("overhead", "--stream", "--rounds", "1", "--json", temporary=tmp_path)

    assert done.returncode == 0, done.stderr
    cells = json.loads(done.stdout)["cells"]
    assert [(cell["client"], cell["server"]) for cell in cells] == [("cpp", "cpp"), ("py", "cpp")]
    assert all(cell["items_per_second"] > 0 for cell in cells)
    assert os.listdir(tmp_path) == []


def test_overhead_of_a_stream_over_a_bare_one(tmp_path: Path) -> None:
    words = ["--stream", "--transport", "grpc+unix", "--rounds", "1", "--json"]
    done = run("overhead", *words, temporary=tmp_path)

    assert done.returncode == 0, done.stderr
    cells = json.loads(done.stdout)["cells"]
    pairings = [("cpp", "cpp"), ("py", "cpp"), ("py", "py")]
    assert [(cell["client"], cell["server"]) for cell in cells] == pairings
    for cell in cells:
        assert cell["bare_items_per_second"] > 0
        assert cell["ratio_min"] <= cell["ratio"] <= cell["ratio_max"]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "words",
    [["--size", "abc"], ["--transport", "udp"], ["--rounds", "0"], ["--language", "c"]],
    ids=lambda words: words[0],
)
def test_overhead_names_the_wrong_option(words: list[str], tmp_path: Path) -> None:
    done = run("overhead", *words, temporary=tmp_path)

    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: INVALID_ARGUMENT: '{words[1]}' .*, {words[0]}\n", done.stderr)
