"""Who finds what at an address: rows 19 to 23 of the conformance table. What the dead left, a
second server, squatters, other users, and a client that is early."""

import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hosts import ENDLESS, SEEN_S, Host, needs_root, of_clients, of_servers
from ipc_bridge import connect
from peer_support import (
    NOBODY,
    client,
    ended,
    kill,
    peer,
    run_client,
    served,
)
from processes import stopped, sysv_modes
from support import LANGUAGES, SLOW, TRANSPORTS, Exit, fixed_url, listen_url, until

WITH_SOCKETS = ["unix", "shm", "sysv-queue", "sysv-shm", "zmq+ipc"]
WITH_FILES = ["pipe", *WITH_SOCKETS, "grpc+unix"]
of_all = pytest.mark.parametrize("scheme", [name for name in TRANSPORTS if name != "stdio"])

pytestmark = pytest.mark.usefixtures("nothing_left")

# --- row 19: what the dead left behind ---


@pytest.mark.parametrize("successor", LANGUAGES)
@of_servers
@pytest.mark.parametrize("scheme", WITH_FILES)
def test_stale_things_are_reclaimed(
    scheme: str, server: str, successor: str, tmp_path: Path
) -> None:
    peer(successor)
    url = listen_url(scheme, tmp_path)
    with served(url, server) as first:
        kill(first.process)
    if scheme == "pipe":
        for direction in ("c2s", "s2c"):
            os.mkfifo(tmp_path / "pipe" / f"0123456789abcdef.{direction}", 0o600)
    left = {path.name for path in tmp_path.rglob("*")}
    name = url.rpartition("/")[2]
    assert left >= ({"pipe", "lock", "listen"} if scheme == "pipe" else {name, f"{name}.lock"})
    with served(url, successor), connect(url) as bridge:
        assert bytes(bridge.echo(b"second", timeout=5.0)) == b"second"
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("successor", LANGUAGES)
@of_servers
def test_a_directory_that_no_server_has_made_stays(
    server: str, successor: str, tmp_path: Path
) -> None:
    ours = tmp_path / "pipe"
    ours.mkdir(mode=0o700)
    with served(f"pipe://{ours}", server) as first:
        kill(first.process)
    with served(f"pipe://{ours}", successor):
        pass
    assert list(tmp_path.rglob("*")) == [ours]


# --- row 20: two servers ---


@pytest.mark.parametrize("second", LANGUAGES)
def test_a_second_server_is_told_so(host: Host, second: str) -> None:
    before = sorted(os.listdir(place_of(host))) if not host.scheme.endswith("tcp") else []
    began = time.monotonic()
    assert run_client(second, "--version") == 0
    starts_s = time.monotonic() - began  # on a busy machine a program takes long to start
    began = time.monotonic()
    assert run_client(second, "serve", host.url) == Exit.ALREADY_EXISTS
    assert time.monotonic() - began < 2 * starts_s + SEEN_S
    with connect(host.url) as fresh:
        assert bytes(fresh.echo(b"first", timeout=5.0)) == b"first"
    assert before == (sorted(os.listdir(place_of(host))) if not host.scheme.endswith("tcp") else [])


def place_of(host: Host) -> Path:
    path = Path(host.url.partition("://")[2])
    return path if host.scheme == "pipe" else path.parent


# --- rows 21 and 22: other people ---


def squat(path: Path, what: str) -> None:
    """Put something at a path that a server would want."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    elsewhere = path.parent / "elsewhere"
    match what.removeprefix("foreign-"):
        case "file":
            path.write_text("not yours")
            path.chmod(0o600)
        case "link":
            elsewhere.write_text("not yours either")
            path.symlink_to(elsewhere)
        case "dangling-link":
            path.symlink_to(elsewhere)
        case "link-to-a-directory":
            elsewhere.mkdir(mode=0o700)
            path.symlink_to(elsewhere)
        case "directory":
            path.mkdir(mode=0o700)
        case "open-directory":
            path.mkdir()
            path.chmod(0o777)
        case "fifo":
            os.mkfifo(path, 0o600)
        case "socket":
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(path))
    if what.startswith("foreign-"):
        os.chown(path, NOBODY, NOBODY)


def snapshot(directory: Path) -> dict[str, tuple[object, ...]]:
    """All that is in a directory, to the inode."""
    found: dict[str, tuple[object, ...]] = {}
    for path in directory.rglob("*"):
        info = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
        found[str(path)] = (info.st_mode, info.st_uid, info.st_ino, content)
    return found


SQUATS = [
    ("unix", "unix", "file"),
    ("unix", "unix", "link"),
    ("unix", "unix", "dangling-link"),
    ("unix", "unix", "directory"),
    ("unix", "unix", "fifo"),
    ("unix", "unix", "foreign-socket"),
    ("unix", "unix.lock", "link"),
    ("unix", "unix.lock", "dangling-link"),
    ("unix", "unix.lock", "fifo"),
    ("unix", "unix.lock", "foreign-file"),
    ("shm", "shm", "file"),
    ("shm", "shm", "link"),
    ("shm", "shm", "foreign-socket"),
    ("shm", "shm.lock", "link"),
    ("sysv-queue", "sysv-queue", "file"),
    ("sysv-queue", "sysv-queue.lock", "link"),
    ("sysv-shm", "sysv-shm", "link"),
    ("sysv-shm", "sysv-shm.lock", "foreign-file"),
    ("zmq+ipc", "zmq+ipc", "file"),
    ("zmq+ipc", "zmq+ipc", "link"),
    ("zmq+ipc", "zmq+ipc", "foreign-socket"),
    ("zmq+ipc", "zmq+ipc.lock", "link"),
    ("pipe", "pipe", "file"),
    ("pipe", "pipe", "link-to-a-directory"),
    ("pipe", "pipe", "open-directory"),
    ("pipe", "pipe", "foreign-directory"),
    ("pipe", "pipe/lock", "link"),
    ("pipe", "pipe/lock", "dangling-link"),
    ("pipe", "pipe/lock", "foreign-file"),
    ("pipe", "pipe/listen", "file"),
    ("pipe", "pipe/listen", "link"),
    ("pipe", "pipe/listen", "foreign-fifo"),
]


@of_servers
@pytest.mark.parametrize(("scheme", "name", "what"), SQUATS)
def test_a_squatted_name_is_refused_and_left_alone(
    scheme: str, name: str, what: str, server: str, tmp_path: Path
) -> None:
    if what.startswith("foreign-") and os.geteuid() != 0:
        pytest.skip("only root can give things away")
    squat(tmp_path / name, what)
    before = snapshot(tmp_path)
    assert run_client(server, "serve", listen_url(scheme, tmp_path)) in (
        Exit.ALREADY_EXISTS,
        Exit.PERMISSION_DENIED,
    )
    assert snapshot(tmp_path) == before


@pytest.fixture
def public_place() -> Iterator[Path]:
    """A directory that everybody can enter, and where everybody can make things."""
    with tempfile.TemporaryDirectory(prefix="ipc-bridge-faults-") as name:
        os.chmod(name, 0o777)
        yield Path(name)
        assert os.listdir(name) == []


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("scheme", WITH_FILES)
def test_what_peers_make_is_private(scheme: str, language: str, runtime: Path) -> None:
    """0600 in a directory of 0700, whatever the umask."""
    count = 5 if scheme == "pipe" else 2  # a directory, its lock and three FIFOs; a socket, a lock
    words = ("--count", ENDLESS, "--size", "16", "--rate", "10")
    before = os.umask(0)
    try:
        with served(listen_url(scheme, runtime), language) as up, ExitStack() as running:
            with stopped(up.pid):  # a client's FIFOs are there until the server has opened them
                running.enter_context(client(language, "stream", up.url, *words))
                assert until(lambda: len(list(runtime.rglob("*"))) >= count)
                modes = {
                    (path.is_dir(), stat.S_IMODE(path.stat().st_mode))
                    for path in runtime.rglob("*")
                }
            assert modes - {(True, 0o700)} == {(False, 0o600)}
            if scheme.startswith("sysv"):
                assert until(lambda: bool(sysv_modes()))
                assert sysv_modes() == {0o600}
    finally:
        os.umask(before)


@needs_root
@of_servers
@of_clients
@pytest.mark.parametrize("scheme", WITH_FILES)
def test_another_user_is_refused(scheme: str, caller: str, server: str, public_place: Path) -> None:
    """(tcp cannot tell who comes: a socket of the loopback device has no owner.)"""
    with served(listen_url(scheme, public_place), server) as up, connect(up.url) as control:
        words = ("echo", up.url, "--payload", "hello", "--timeout", "0.4")
        assert run_client(caller, *words, nobody=True) == Exit.PERMISSION_DENIED
        assert bytes(control.echo(b"hello", timeout=5.0)) == b"hello"


@needs_root
@of_servers
@of_clients
@pytest.mark.parametrize("scheme", WITH_SOCKETS)
def test_another_user_is_refused_at_an_open_door(
    scheme: str, caller: str, server: str, public_place: Path
) -> None:
    """Somebody has opened the socket's mode for all: the server still asks who comes."""
    with served(listen_url(scheme, public_place), server) as up, connect(up.url) as control:
        os.chmod(listen_url(scheme, public_place).partition("://")[2], 0o666)
        words = ("echo", up.url, "--payload", "hello", "--timeout", "0.4")
        assert run_client(caller, *words, nobody=True) in (Exit.PERMISSION_DENIED, Exit.UNAVAILABLE)
        assert bytes(control.echo(b"hello", timeout=5.0)) == b"hello"


@needs_root
@of_servers
@of_clients
@pytest.mark.parametrize("scheme", WITH_FILES)
def test_a_client_does_not_talk_to_another_users_server(
    scheme: str, caller: str, server: str, public_place: Path
) -> None:
    with served(listen_url(scheme, public_place), server, nobody=True) as up:
        assert run_client(caller, "echo", up.url, "--payload", "secret") == Exit.PERMISSION_DENIED


# --- row 23: the client is early ---


@of_all
@of_servers
@of_clients
def test_a_client_waits_for_its_server(
    scheme: str, caller: str, server: str, runtime: Path
) -> None:
    peer(server)
    with (
        fixed_url(scheme, runtime) as url,
        client(caller, "echo", url, "--payload", "early", "--timeout", "8") as process,
    ):
        time.sleep(0.3)  # the case itself: nobody is there yet
        assert process.poll() is None
        with served(url, server):
            assert ended(process) == 0


@of_all
@of_clients
def test_without_a_server_a_client_gives_up(scheme: str, caller: str, runtime: Path) -> None:
    with fixed_url(scheme, runtime) as url:
        began = time.monotonic()
        code = run_client(caller, "echo", url, "--payload", "x", "--timeout", "0.3")
        assert code == Exit.UNAVAILABLE
        assert 0.3 <= time.monotonic() - began < 0.3 + 3.0 * SLOW  # a program takes long to start
