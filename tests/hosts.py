"""A server that many tests share, and what tests of faults say alike."""

import os
import time
from typing import NamedTuple

import pytest

from ipc_bridge import Bridge
from peer_support import Served
from support import FRAMED, LANGUAGES, SLOW

SEEN_S = 1.0 * SLOW  # in which a death is seen, and what it held is given back
ENDLESS = str(10**12)  # items of a stream

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")
over_transports = pytest.mark.parametrize("scheme", FRAMED)
of_servers = pytest.mark.parametrize("server", LANGUAGES)
of_clients = pytest.mark.parametrize("caller", LANGUAGES)


class Host(NamedTuple):
    """A server that many tests share, and a client that must not notice any of them."""

    scheme: str
    server: Served
    control: Bridge

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def pid(self) -> int:
        return self.server.pid

    def check(self, when: str) -> None:
        """The control client gets the right answer."""
        payload = f"{when}-{time.monotonic_ns()}".encode()
        assert bytes(self.control.echo(payload, timeout=5.0)) == payload


HOSTS = [(scheme, language) for scheme in FRAMED for language in LANGUAGES]
