"""Fixtures: the peers of a test, for every transport and pairing, and what they may leave: nothing.

A test takes `peers`; to narrow it, parametrize `transport` or `pairing` with `indirect=True`.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import (
    PAIRINGS,
    SLOW,
    TRANSPORTS,
    Peers,
    children,
    enter_private_ipc,
    open_fds,
    sysv_objects,
    wait_until,
)


def pytest_configure() -> None:
    """Other tests of this project may run on the machine: their System V objects are not ours."""
    enter_private_ipc()


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Fails if the test leaves a descriptor, a child or a System V object behind."""
    fds, pids, objects = open_fds(), children(), sysv_objects()
    yield
    assert children() == pids
    with contextlib.suppress(AssertionError):  # the next one says which
        wait_until(lambda: open_fds() == fds, 1.0 * SLOW, "gRPC's threads close theirs later")
    assert open_fds() == fds
    wait_until(lambda: sysv_objects() <= objects, 1.0 * SLOW, "no System V object is left")


@pytest.fixture
def runtime(nothing_left: None) -> Iterator[Path]:
    """A private directory for addresses, empty again afterwards; its path is short, for a socket's
    has at most 107 bytes."""
    path = tempfile.mkdtemp(prefix="ipcb-", dir="/tmp")
    yield Path(path)
    left = os.listdir(path)
    for name in left:
        if not os.path.isdir(f"{path}/{name}"):
            os.unlink(f"{path}/{name}")
    if not any(os.path.isdir(f"{path}/{name}") for name in left):
        os.rmdir(path)
    assert left == []


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=PAIRINGS, ids="-".join)
def pairing(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The languages of client and server."""
    client, server = request.param
    return client, server


@pytest.fixture
def peers(transport: str, pairing: tuple[str, str], runtime: Path) -> Iterator[Peers]:
    """Peers that the test starts as it wants; all must end well."""
    peers = Peers(transport, pairing, runtime)
    yield peers
    peers.close()
