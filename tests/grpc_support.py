"""What the tests of gRPC share: addresses, and the names of their cases."""

from pathlib import Path

import pytest

from support import LANGUAGES, SANITIZED

SCHEMES = ("grpc+unix", "grpc+tcp")
SEEN_S = 5.0 if SANITIZED else 1.0

of_schemes = pytest.mark.parametrize("scheme", SCHEMES)
of_servers = pytest.mark.parametrize("server", LANGUAGES)
of_clients = pytest.mark.parametrize("caller", LANGUAGES)


def address(scheme: str, directory: Path) -> str:
    """A URL to serve at."""
    return "grpc+tcp://127.0.0.1:0" if scheme == "grpc+tcp" else f"grpc+unix://{directory}/g"
