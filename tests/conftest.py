"""Fixtures: the peers of a test, for every transport and pairing, and what they may leave: nothing.

A test takes `peers`; to narrow it, parametrize `transport`, `pairing` or `query` with
`indirect=True`.
"""

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import support
from hosts import HOSTS, SEEN_S, Host
from ipc_bridge import connect, make_service
from peer_support import OWN_STREAM, OWN_UNARY, served, serving_own
from probe_support import Peers
from processes import children, enter_private_ipc, fds, open_fds, sysv_objects, threads
from support import PAIRINGS, SLOW, TRANSPORTS, listen_url, until, wait_until


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "each case of CONFORMANCE at its full count for every transport and pairing"
    parser.addoption("--full", action="store_true", help=what)


def pytest_configure(config: pytest.Config) -> None:
    """Other tests of this project may run on the machine: their System V objects are not ours."""
    support.FULL = config.getoption("full")  # before any test is collected
    enter_private_ipc()


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails if the test leaves a descriptor, a child or a System V object behind."""
    opened, pids, objects = open_fds(), children(), sysv_objects()
    yield
    assert children() == pids
    if open_fds() != opened:
        gc.collect()  # an exception that was caught may hold some, in a cycle
    until(lambda: open_fds() == opened, 1.0 * SLOW)  # gRPC's threads close theirs later
    assert open_fds() == opened
    wait_until(lambda: sysv_objects() <= objects, 1.0 * SLOW, "no System V object is left")


@pytest.fixture
def runtime(nothing_left: None) -> Iterator[Path]:
    """A private directory for addresses, empty again afterwards; its path is short, for a socket's
    has at most 107 bytes."""
    path = tempfile.mkdtemp(prefix="ipcb-", dir="/tmp")
    yield Path(path)
    until(lambda: os.listdir(path) == [], 1.0 * SLOW)  # the watcher of System V goes last
    left = os.listdir(path)
    for name in left:
        if not os.path.isdir(f"{path}/{name}"):
            os.unlink(f"{path}/{name}")
    if not any(os.path.isdir(f"{path}/{name}") for name in left):
        os.rmdir(path)
    assert left == []


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory in which nothing may be left."""
    yield tmp_path
    assert [str(path) for path in tmp_path.rglob("*")] == []


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=PAIRINGS, ids="-".join)
def pairing(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The languages of client and server."""
    client, server = request.param
    return client, server


@pytest.fixture
def query(request: pytest.FixtureRequest) -> str:
    """Of the addresses; by default none."""
    return str(getattr(request, "param", ""))


@pytest.fixture
def peers(transport: str, pairing: tuple[str, str], query: str, runtime: Path) -> Iterator[Peers]:
    """Peers that the test starts as it wants; all must end well."""
    peers = Peers(transport, pairing, runtime, query)
    yield peers
    peers.close()


@pytest.fixture(scope="module", params=HOSTS, ids="-".join)
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Host]:
    """A server for all tests of a module, for each transport and language."""
    scheme, language = request.param
    url = listen_url(scheme, tmp_path_factory.mktemp("host"))
    with served(url, language) as server, connect(server.url) as control:
        host = Host(scheme, server, control)
        host.check("warm")
        # pyzmq makes a thread of its own with the first message that it sends without a copy.
        assert len([*control.stream(1000, 16 << 10)]) == 1000
        yield host


@pytest.fixture
def host(shared: Host, nothing_left: None) -> Iterator[Host]:
    """The shared server; whatever a test does, its fds and threads come back, and it answers."""
    assert shared.server.process.poll() is None, "an earlier test has ended the shared server"
    shared.check("before")
    before = (fds(shared.pid), threads(shared.pid))
    yield shared
    shared.check("after")
    back = until(lambda: fds(shared.pid) <= before[0] and threads(shared.pid) <= before[1], SEEN_S)
    now = (fds(shared.pid), threads(shared.pid))
    assert back, f"fds and threads of the server were {before}, are {now}"


@pytest.fixture
def url(runtime: Path) -> str:
    """An address that nobody serves yet."""
    return f"unix://{runtime}/s"


@pytest.fixture
def served_url(url: str) -> Iterator[str]:
    """Echo and stream, and the tests' own methods, at an address."""
    service = make_service()
    service.unary(OWN_UNARY, lambda call, request: bytes(request) + b"!")
    service.streaming(OWN_STREAM, lambda call, request: [b"a", b"bc"])
    with serving_own(url, service) as at:
        yield at
