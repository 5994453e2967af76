"""The library installed: components, what they want, pkg-config, and the wheel. (The consumer
projects of docs/library.md are built by test_docs.)"""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from ipc_bridge.harness import parts
from support import QUICK, ROOT, SLOW

TIMEOUT_S = 170.0 * SLOW
CONSUMER = """
cmake_minimum_required(VERSION 3.25)
project(consumer LANGUAGES CXX)
find_package(ipc_bridge REQUIRED COMPONENTS {component})
add_executable(consumer main.cpp)
target_link_libraries(consumer PRIVATE ipc_bridge::{component})
"""
MAIN = """
#include <iostream>
#include <ipc_bridge/endpoint.hpp>
#include <thread>

int main(int, char** argv) {
    const auto server = ipc_bridge::serve(argv[1]);
    std::jthread serving([&] { server->run(); });
    auto bridge = ipc_bridge::connect(server->url);
    std::cout << ipc_bridge::text_of(bridge.echo(ipc_bridge::bytes_of("installed"))) << '\\n';
    bridge.close();
    server->stop();
}
"""
NATIVE = "from ipc_bridge import _native; print(_native.__file__, _native.is_capacity(1 << 16))"

pytestmark = pytest.mark.timeout(TIMEOUT_S + 10)


def run(*words: str, check: bool = True) -> str:
    """What a command prints, errors included."""
    done = subprocess.run(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env=os.environ | QUICK,
    )
    assert not check or done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the library is installed; not where it was configured for."""
    build, prefix = tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("prefix")
    run("cmake", "-S", str(ROOT), "-B", str(build), "-DIPC_BRIDGE_PROGRAMS=OFF")
    run("cmake", "--build", str(build), "--parallel", "2")
    run("cmake", "--install", str(build), "--prefix", str(prefix))
    return prefix


def configure(
    prefix: Path, project: Path, component: str, *options: str, check: bool = True
) -> str:
    (project / "CMakeLists.txt").write_text(CONSUMER.format(component=component))
    (project / "main.cpp").write_text(MAIN)
    words = ["cmake", "-S", str(project), "-B", str(project / "build"), *options]
    return run(*words, f"-DCMAKE_PREFIX_PATH={prefix}", check=check)


def test_all_transports_by_url(prefix: Path, runtime: Path, tmp_path: Path) -> None:
    configure(prefix, tmp_path, "endpoint")
    run("cmake", "--build", str(tmp_path / "build"))

    assert run(str(tmp_path / "build" / "consumer"), f"unix://{runtime}/sock") == "installed\n"


@pytest.mark.parametrize("name", ["core", "service", "endpoint", *parts.transports()])
def test_every_component_is_found(name: str, prefix: Path, tmp_path: Path) -> None:
    configure(prefix, tmp_path, name)

    environment = [f"PKG_CONFIG_PATH={prefix}/lib/pkgconfig"]
    flags = run("env", *environment, "pkg-config", "--cflags", "--libs", f"ipc_bridge-{name}")
    assert "-pthread" in flags
    assert "/include" in flags


def test_a_component_that_is_not_there(prefix: Path, tmp_path: Path) -> None:
    said = configure(prefix, tmp_path, "carrier-pigeon", check=False)

    assert "carrier-pigeon" in said
    assert "CMake Error" in said


def test_a_component_says_what_it_lacks(prefix: Path, tmp_path: Path) -> None:
    without = "-DCMAKE_DISABLE_FIND_PACKAGE_Protobuf=ON"
    said = configure(prefix, tmp_path, "service", without, check=False)

    assert "service needs Protobuf" in " ".join(said.split())


def test_a_transport_wants_nothing_of_the_service(prefix: Path, tmp_path: Path) -> None:
    configure(prefix, tmp_path, "unix", "-DCMAKE_DISABLE_FIND_PACKAGE_Protobuf=ON")


def test_nothing_installed_names_this_tree(prefix: Path) -> None:
    for path in prefix.rglob("*"):
        if path.is_file():
            assert str(ROOT).encode() not in path.read_bytes(), path


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel installs."""
    place = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(place), str(ROOT))
    (wheel,) = place.glob("ipc_bridge-*.whl")
    zipfile.ZipFile(wheel).extractall(place / "site")
    return place / "site"


def python(unpacked: Path, *words: str) -> str:
    """With the wheel, and without the hook by which an editable install finds this tree."""
    path = f"PYTHONPATH={unpacked}:{sysconfig.get_path('purelib')}"
    return run("env", "-C", "/", path, sys.executable, "-S", *words)


def test_the_wheel_holds_the_package_alone(unpacked: Path) -> None:
    names = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*")}
    assert {"ipc_bridge/py.typed", "ipc_bridge/bridge_pb2.py", "ipc_bridge/client.py"} <= names
    tops = {path.name for path in unpacked.iterdir()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"ipc_bridge"}
    assert not [name for name in names if "__pycache__" in name]
    (module,) = unpacked.glob("ipc_bridge/_native*.so")  # nothing but shm fails without it
    assert python(unpacked, "-c", NATIVE) == f"{module} True\n"


def test_an_installed_export_copies_the_same(unpacked: Path, tmp_path: Path) -> None:
    held = python(unpacked, "-c", "from ipc_bridge.harness import parts; print(parts.TREE)")
    assert held == f"{unpacked}/ipc_bridge/harness/tree\n"
    for words in (["all"], [*parts.transports(), "--bare"]):
        program = ["-m", "ipc_bridge.harness.cli", "export", *words]
        theirs, ours = tmp_path / f"theirs{len(words)}", tmp_path / f"ours{len(words)}"
        python(unpacked, *program, str(theirs))
        run(sys.executable, *program, str(ours))
        assert contents(theirs) == contents(ours)


def contents(project: Path) -> dict[str, bytes]:
    files = [path for path in project.rglob("*") if path.is_file()]
    return {str(path.relative_to(project)): path.read_bytes() for path in files}


@pytest.mark.parametrize("missing", ["click", "numpy"])
def test_the_tools_say_what_they_lack(missing: str) -> None:
    script = f"import sys; sys.modules[{missing!r}] = None; sys.argv[1:] = ['compare', 'a', 'b']; "
    said = run(
        sys.executable,
        "-c",
        script + "from ipc_bridge.harness.cli import main; sys.exit(main())",
        check=False,
    )
    what = f"{missing} is missing: pip install '.[harness]' in the project"
    assert said == f"error: FAILED_PRECONDITION: {what}\n"
