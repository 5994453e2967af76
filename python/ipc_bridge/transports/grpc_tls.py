"""Files of keys for `grpc+tcp`, and what gRPC makes of them; grpc_rpc says how to make them."""

from typing import NamedTuple

import grpc

from ipc_bridge.system import checked


class Keys(NamedTuple):
    """Files in PEM form that let the peers of `grpc+tcp` know each other; "" for none."""

    ca: str = ""  # who signs the other side's certificate
    cert: str = ""  # one's own
    key: str = ""  # and its private key
    name: str = ""  # that a client wants in the server's certificate, instead of the host


def channel_credentials(keys: Keys) -> grpc.ChannelCredentials | None:
    """Those of a client; None: it has no keys. Raises Error: NOT_FOUND."""
    if not keys.ca and not keys.cert:
        return None
    return grpc.ssl_channel_credentials(_read_if(keys.ca), _read_if(keys.key), _read_if(keys.cert))


def server_credentials(keys: Keys) -> grpc.ServerCredentials | None:
    """Those of a server, which wants its clients' certificates if it has who signs them; None: it
    has no keys. Raises Error: NOT_FOUND."""
    if not keys.cert:
        return None
    pair = (_read(keys.key), _read(keys.cert))
    return grpc.ssl_server_credentials([pair], _read_if(keys.ca), bool(keys.ca))


def _read(path: str) -> bytes:
    """A file of keys, whole. Raises Error."""
    with checked("open", path), open(path, "rb") as file:
        return file.read()


def _read_if(path: str) -> bytes | None:
    return _read(path) if path else None
