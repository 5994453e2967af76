"""Export: every transport leaves as a project that builds and runs with this tree out of reach."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ipc_bridge.harness import parts
from support import ROOT, SLOW

TRANSPORTS = list(parts.transports())
LANGUAGES = ("C++", "Python")
PAIRINGS = [(client, server) for client in LANGUAGES for server in LANGUAGES]
TIMEOUT_S = 300.0 * SLOW  # of a build of everything, on a machine that has other work
STRICT = "-DCMAKE_CXX_FLAGS=-Werror"  # beside the warnings that the project asks for
# Neither optimised nor with debug information, and a library's sources in one go.
QUICK = f"{STRICT} -DCMAKE_BUILD_TYPE=None -DCMAKE_UNITY_BUILD=ON"
RELEASE = f"{STRICT} -DCMAKE_BUILD_TYPE=Release"  # some of gcc's warnings come with optimising
RELEASED = "sysv-shm"  # of the headers that all share it has most, and is soon built
THERMOSTAT = """the target was 20.0
20.00, on the way to 22.0
21.00, on the way to 22.0
21.50, on the way to 22.0
21.75, on the way to 22.0
"""

pytestmark = pytest.mark.timeout(TIMEOUT_S + 10)


def environment() -> dict[str, str]:
    """Ours, without what leads to this tree."""
    kept = {name: value for name, value in os.environ.items() if str(ROOT) not in value}
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "IPC_BRIDGE_BUILD_DIR"):
        kept.pop(name, None)
    folders = [one for one in os.environ["PATH"].split(":") if not one.startswith(str(ROOT))]
    return kept | {"PATH": ":".join(folders)}


def hiding() -> list[str]:
    """The first words of a command that sees an empty directory in place of this tree. Without the
    right to mount, the check of what a build has read (see `smoke`) must do."""
    alone = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    hide = f"mount -t tmpfs none {shlex.quote(str(ROOT))}"
    words = [*alone, "sh", "-c", f'cd / && {hide} && exec "$@"', "sh"]
    tried = subprocess.run([*words, "true"], capture_output=True, check=False)
    return words if tried.returncode == 0 else []


HIDDEN = hiding()


def export(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ipc_bridge.harness.cli", "export", *words],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def exported(*words: str) -> str:
    """What an export that succeeds says."""
    done = export(*words)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def away(*words: str, where: Path) -> str:
    """Run a command in a directory, with this tree out of reach; what it prints."""
    done = subprocess.run(
        [*HIDDEN, "env", "-C", str(where), *words],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env=environment() | {"CCACHE_BASEDIR": str(where)},  # whoever uses it: it hits next time
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def smoke(project: Path, python: str, how: str = QUICK) -> str:
    """Build a project and run its smoke test, where this tree cannot be read."""
    out = away("make", "smoke", f"CMAKE_ARGS={how}", f"PYTHON={python}", where=project)
    for file in project.glob("build/**/*.d"):
        assert str(ROOT) not in file.read_text(), "a header of this tree was included"
    return out


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """That of a fresh virtual environment, outside of this tree."""
    return fresh_python(tmp_path_factory.mktemp("venv"), "--without-pip")


def fresh_python(place: Path, *options: str) -> str:
    words = [sys._base_executable, "-m", "venv", *options, str(place)]  # type: ignore[attr-defined]
    subprocess.run(words, check=True)
    return str(place / "bin" / "python")


def test_this_tree_can_be_hidden() -> None:
    """On the machine where it counts, that is: as root."""
    if os.geteuid() == 0 and "CI" in os.environ:
        assert HIDDEN
    if HIDDEN:
        listing = ["ls", "-A", str(ROOT)]
        assert subprocess.run([*HIDDEN, *listing], capture_output=True, check=True).stdout == b""


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_pair_stands_alone(transport: str, python: str, tmp_path: Path) -> None:
    said = exported(transport, str(tmp_path / "new"), "--name", "my_bridge")

    sizes = re.findall(r"^(\S+): \d+ lines of code of service and programs, ([\d,]+)", said, re.M)
    assert [language for language, _ in sizes] == list(LANGUAGES)
    out = smoke(tmp_path / "new", python, RELEASE if transport == RELEASED else QUICK)
    for client, server in PAIRINGS:
        schemes = parts.transports()[transport].schemes
        assert all(f"{scheme}: {client} -> {server} ok\n" in out for scheme in schemes)
    assert out.partition("each of them printed:\n")[2].startswith(THERMOSTAT)


def test_all_transports_in_one_project(python: str, tmp_path: Path) -> None:
    exported("all", str(tmp_path))

    out = smoke(tmp_path, python)
    assert len(re.findall(r"^\S+: \S+ -> \S+ ok$", out, re.M)) == 4 * sum(
        len(one.schemes) for one in parts.transports().values()
    )


def test_bare_programs_stand_alone(python: str, tmp_path: Path) -> None:
    exported(*TRANSPORTS, str(tmp_path), "--bare", "--name", "floors")

    out = smoke(tmp_path, python)
    rounds = re.findall(r"^\w+: \S+ -> \S+ ok, p50_ns=\d+ p99_ns=\d+ rounds=100$", out, re.M)
    assert len(rounds) == 4 * len(TRANSPORTS)

    away("make", "clean", where=tmp_path)
    written = json.loads((tmp_path / ".exported.json").read_text())["files"]
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {*written, ".exported.json"}


@pytest.mark.parametrize("bare", [[], ["--bare"]], ids=["pair", "bare"])
def test_one_language_alone(bare: list[str], python: str, tmp_path: Path) -> None:
    exported("unix", str(tmp_path), "--language", "python", *bare)

    assert len(re.findall(r"^unix: Python -> Python ok", smoke(tmp_path, python), re.M)) == 1
    assert not (tmp_path / "cpp").exists()
    assert not (tmp_path / "CMakeLists.txt").exists()


def test_half_a_pair_may_be_deleted(python: str, tmp_path: Path) -> None:
    """A server in C++ and a client in Python; then no server at all."""
    exported("unix", str(tmp_path))
    (tmp_path / "cpp/thermostat/client.cpp").unlink()
    (tmp_path / "python/thermostat/server.py").unlink()
    service = tmp_path / "python/thermostat/service.py"
    service.write_text(service.read_text().partition("# --- from here on")[0])
    there = {path for path in tmp_path.rglob("*") if path.is_file()}

    out = smoke(tmp_path, python)
    assert re.findall(r"^\S+: \S+ -> \S+ ok$", out, re.M) == ["unix: Python -> C++ ok"]
    assert "nothing to be compared with; see whether this is right:\n" + THERMOSTAT in out

    away("make", "clean", where=tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == there

    (tmp_path / "cpp/thermostat/server.cpp").unlink()
    words = [python, "tests/smoke.py", "unix"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        "nothing to test: it takes a client and a server\n",
    )


def test_cpp_alone_has_no_python(tmp_path: Path) -> None:
    exported("unix", str(tmp_path), "--language", "cpp")

    assert not (tmp_path / "python").exists()
    assert not (tmp_path / "pyproject.toml").exists()
    assert "Python" not in (tmp_path / "README.md").read_text().replace("Python's", "")


def test_the_python_half_installs_as_a_package(tmp_path: Path) -> None:
    python = fresh_python(tmp_path / "venv")
    project = tmp_path / "new"
    exported("unix", str(project), "--language", "python", "--name", "parted")
    away(
        python, "-m", "pip", "install", "--quiet", "--target", f"{tmp_path}/to", ".", where=project
    )

    script = "import thermostat.service, parted.client; print(parted.client.__file__)"
    out = away("env", f"PYTHONPATH={tmp_path}/to", python, "-c", script, where=tmp_path)
    assert out == f"{tmp_path}/to/parted/client.py\n"
    assert (tmp_path / "to/parted/py.typed").exists()


# --- what is in it ---


def text_of(project: Path) -> str:
    files = [path for path in project.rglob("*") if path.is_file()]
    return "\n".join(path.read_text() for path in files if path.name != "FRAME.md")


@pytest.mark.parametrize("bare", [[], ["--bare"]], ids=["pair", "bare"])
def test_a_name_replaces_ours_everywhere(bare: list[str], tmp_path: Path) -> None:
    exported(*(TRANSPORTS if bare else ["all"]), str(tmp_path), "--name", "renamed", *bare)

    assert not re.search(r"ipc_bridge|IPC_BRIDGE|@[A-Z]+@", text_of(tmp_path))
    assert not list(tmp_path.rglob("*ipc_bridge*"))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_readme_promises_no_wait_that_is_refused(transport: str, tmp_path: Path) -> None:
    exported(transport, str(tmp_path))
    readme = (tmp_path / "README.md").read_text()

    offered = "`?wait=block|spin|adaptive`" in readme
    assert offered == (transport not in ("zmq", "grpc"))
    assert ("`FRAME.md` describes the wire" in readme) == (transport != "grpc")


def test_only_what_a_transport_needs(tmp_path: Path) -> None:
    exported("unix", str(tmp_path))

    package = {path.stem for path in tmp_path.glob("python/ipc_bridge/**/*.py")} - {"__init__"}
    headers = {path.stem for path in tmp_path.glob("cpp/ipc_bridge/**/*.hpp")}
    core = {"client", "connection", "endpoint", "errors", "frame", "handlers", "packed"}
    core |= {"server", "session", "system"}
    assert package == headers == {*core, "stream_socket", "unix_address"}
    assert "protobuf" not in text_of(tmp_path)
    assert "google" not in text_of(tmp_path)


def test_the_map_knows_only_what_was_exported(python: str, tmp_path: Path) -> None:
    exported("tcp", str(tmp_path))

    script = "from ipc_bridge.endpoint import dial; dial('unix:///tmp/demo')"
    done = subprocess.run(
        [python, "-c", script],
        env=environment() | {"PYTHONPATH": str(tmp_path / "python")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "known are tcp, unix:///tmp/demo" in done.stderr
    for name in ("python/ipc_bridge/endpoint.py", "cpp/ipc_bridge/endpoint.hpp"):
        text = (tmp_path / name).read_text()
        assert "allow_remote" in text
        assert not re.search(r"[Uu]nix|[Pp]ipe|[Ss]tdio", text)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("language", ["py", "cpp"])
def test_what_others_bring_is_known(transport: str, language: str) -> None:
    stem = parts.transports()[transport].stem
    file = parts.SOURCES[language] / parts.PACKAGE / "transports" / (stem + parts.SUFFIX[language])
    assert file.exists(), "both languages use one stem"
    _, others = parts.closure([file])
    known = parts.PYTHON_PACKAGES if language == "py" else parts.CPP_PACKAGES
    assert others <= set(known)


# --- what it may overwrite ---


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    done = export("unix", str(tmp_path))

    assert (done.returncode, done.stdout) == (16, "")
    assert re.fullmatch(r"error: ALREADY_EXISTS: the directory is not empty; .*\n", done.stderr)
    assert os.listdir(tmp_path) == ["mine"]


def test_a_new_repository_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    exported("unix", str(tmp_path), "--bare")


def test_force_keeps_what_export_did_not_write(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    project = tmp_path / "project"
    (project / "cpp").mkdir(parents=True)
    (project / "README.md").write_text("mine")
    (project / "Makefile").symlink_to(outside / "Makefile")
    (project / "cpp" / "thermostat").symlink_to(outside)
    said = exported("unix", str(project), "--force")

    kept = re.findall(r"^kept as it was: (.*)$", said, re.M)
    programs = [f"cpp/thermostat/{name}" for name in ("client.cpp", "server.cpp", "service.hpp")]
    assert kept == ["Makefile", "README.md", *programs]
    assert (project / "README.md").read_text() == "mine"
    assert os.listdir(outside) == []


def test_force_updates_what_was_not_edited(tmp_path: Path) -> None:
    exported("unix", str(tmp_path), "--name", "first")
    service = tmp_path / "python/thermostat/service.py"
    service.write_text("mine")
    (tmp_path / "cpp/thermostat/client.cpp").unlink()
    for _ in range(2):
        said = exported("unix", str(tmp_path), "--name", "second", "--force")
        kept = re.findall(r"^kept as it was: (.*)$", said, re.M)
        assert kept == ["cpp/thermostat/client.cpp (deleted)", "python/thermostat/service.py"]
    assert service.read_text() == "mine"
    assert "second" in (tmp_path / "CMakeLists.txt").read_text()
    manifest = json.loads((tmp_path / ".exported.json").read_text())
    assert {"CMakeLists.txt", "python/second/client.py"} <= set(manifest["files"])


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["udp"], r"unknown transport; known are .*, all, udp"),
        (["unix", "--name", "Bad-Name"], r"'Bad-Name' is no name .*, --name"),
        (["unix", "--name", "class"], r"'class' is no name .*, --name"),
        (["unix", "--name", "template"], r"'template' is no name .*, --name"),
        (["unix", "--name", "json"], r"'json' is the name of something else, --name"),
        (["unix", "--name", "pipe"], r"'pipe' is the name of something else, --name"),
        (["unix", "--name", "unix"], r"'unix' is the name of something else, --name"),
        (["zmq", "--name", "zmq"], r"'zmq' is the name of something else, --name"),
        (["unix", "--name", "install"], r"'install' is the name of something else, --name"),
        (["unix", "--name", "thermostat"], r"'thermostat' is the name .*, --name"),
        ([], r"Missing argument .*"),
    ],
    ids=[
        "transport",
        "shape",
        "keyword",
        "cpp",
        "module",
        "libc",
        "macro",
        "package",
        "target",
        "service",
        "nothing",
    ],
)
def test_wrong_words_write_nothing(words: list[str], what: str, tmp_path: Path) -> None:
    done = export(*words, *([str(tmp_path / "new")] if words else []))

    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: INVALID_ARGUMENT: {what}\n", done.stderr)
    assert os.listdir(tmp_path) == []


def test_a_name_with_a_space(tmp_path: Path) -> None:
    """The command that is told, and `make export`, take it as one word."""
    said = exported("unix", str(tmp_path / "a b"), "--bare")
    assert said.endswith(f"next: make -C '{tmp_path}/a b' smoke\n")

    words = ["make", "-n", "-o", "setup", "-o", "configure", "export", "DEST=../it's  mine"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if " export unix " in line)
    assert shlex.split(line)[-1] == "../it's  mine"


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = export("unix", str(tmp_path / "file"))

    assert done.returncode == 16
    assert "this is not a directory" in done.stderr

    done = export("unix", str(tmp_path / "file" / "below"))
    assert re.fullmatch(r"error: NOT_FOUND: write: Not a directory, .*/below\n", done.stderr)


def test_a_manifest_that_leads_out(tmp_path: Path) -> None:
    project, outside = tmp_path / "project", tmp_path / "outside"
    project.mkdir()
    (project / ".exported.json").symlink_to(outside)
    done = export("unix", str(project), "--force")

    assert done.stderr.startswith("error: FAILED_PRECONDITION: this is no manifest")
    assert os.listdir(tmp_path) == ["project"]
