"""gRPC: `grpc+unix` and `grpc+tcp`, the service of bridge.proto as any gRPC client sees it.

Pick it when others are to call the service too: other languages, grpcurl, proxies, and their tools.
It is slow, with Python the slowest of all: every call is a stream of HTTP/2, with its own headers,
and every payload goes through protobuf.

Meeting: gRPC's own. On a Unix socket a lock beside the path comes first, for gRPC's servers take
each other's paths; `grpc+tcp` serves other hosts only with keys (mutual TLS).

The trap: by default gRPC reads ahead up to megabytes, and more on a fast link, so that a slow
reader hardly slows its producer. Here a window below the default is fixed: a producer is at most
that window, and 512 KiB or an item, ahead (measured with 4 KiB items: 0 to 256 KiB). With the
default, up to 6 MiB were measured, and 11 with a client in C++ over TCP: its gRPC, 1.51, is slow
unless it may widen the connection's window. Others are remedied where they bite: servers that share
a port, proxies, channels that share a connection, reconnecting at leisure.

Keys: one's own CA signs a certificate for each side, with the server's host in subjectAltName.
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650
        -subj /CN=ca -keyout ca.key -out ca.pem
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=server
        -addext subjectAltName=DNS:HOST -keyout server.key -out server.csr
    openssl x509 -req -copy_extensions copy -days 365 -in server.csr -CA ca.pem
        -CAkey ca.key -out server.pem
and the last two again for the client; then ?ca=ca.pem&cert=server.pem&key=server.key.

gRPC is a session layer: this gives the faces of Client and Server, not a Stream. Handlers run in a
pool of threads, one for each call: a stream that takes long holds up nobody.

Copy with it: bridge.proto, grpc_options, grpc_tls, grpc_client, grpc_calls, grpc_health,
grpc_server, errors, frame, session, system, unix_address, client, server.
Run: python -m ipc_bridge.peer serve grpc+unix:///tmp/demo.sock
"""

import contextlib
import ipaddress
import os
import socket
from abc import ABC, abstractmethod
from urllib.parse import quote

# Else a fork takes gRPC's own threads along by half: the child's read from the parent's connection
# now and then, and the parent misses what they took (grpcio 1.85). (Read when grpc is loaded.)
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "1")

# gRPC writes what it meets to stderr; what matters here reaches the caller as an Error. Whoever
# wants its log sets GRPC_VERBOSITY. (It is read when the library is loaded.)
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from ipc_bridge.errors import Error, Status
from ipc_bridge.handlers import Service
from ipc_bridge.system import Lock, checked, deadline_after
from ipc_bridge.transports.grpc_client import RpcClient
from ipc_bridge.transports.grpc_options import KEEPALIVE_MS, Arguments
from ipc_bridge.transports.grpc_server import RpcServer
from ipc_bridge.transports.grpc_tls import Keys, channel_credentials, server_credentials
from ipc_bridge.transports.unix_address import UnixAddress


class Grpc(ABC):
    """An address that gRPC serves."""

    url: str

    @abstractmethod
    def connect(
        self, window_bytes: int, payload_bytes_max: int, timeout: float | None
    ) -> RpcClient:
        """Reach the server. The options and errors are those of `client.connect`."""

    @abstractmethod
    def serve(
        self, service: Service, payload_bytes_max: int, clients_max: int, grace_s: float
    ) -> RpcServer:
        """Become the server. The options and errors are those of `server.Server`, but `clients_max`
        bounds the calls that run at once."""


class GrpcUnix(Grpc):
    """`grpc+unix:///path`: a socket file, mode 0600, and `path.lock` while a server lives."""

    def __init__(self, path: str) -> None:
        """Raises Error: INVALID_ARGUMENT for a path that is empty or too long."""
        self.url = f"grpc+unix://{path}"
        self._address = UnixAddress(path, self.url, socket.SOCK_STREAM)

    def connect(
        self, window_bytes: int, payload_bytes_max: int, timeout: float | None
    ) -> RpcClient:
        deadline_ns = deadline_after(timeout)
        # Once by ourselves: gRPC asks nobody whose socket it is, and is slow to try again.
        self._address.connect(deadline_ns).close()
        target = f"unix:{quote(os.fsencode(self._address.path))}"
        caller = RpcClient(target, None, [], self.url, window_bytes, payload_bytes_max)
        try:
            caller.meet(deadline_ns, "no server")
        except BaseException:
            caller.close()
            raise
        return caller

    def serve(
        self, service: Service, payload_bytes_max: int, clients_max: int, grace_s: float
    ) -> RpcServer:
        lock = Lock(self._address.path + ".lock")

        def cleanup() -> None:
            with contextlib.suppress(OSError):
                os.unlink(self._address.path)
            lock.close()

        # The file is born with its mode. (umask(2) is the process's: others that make files now
        # get narrower ones.)
        before = os.umask(0o177)
        try:
            self._address.reclaim()
            return RpcServer(
                f"unix:{quote(os.fsencode(self._address.path))}",
                None,
                lambda port: self.url,
                cleanup,
                service,
                payload_bytes_max,
                clients_max,
                grace_s,
            )
        except BaseException:
            lock.close()
            raise
        finally:
            os.umask(before)


class GrpcTcp(Grpc):
    """`grpc+tcp://host:port`; port 0 lets the kernel choose. A server binds loopback unless it has
    keys by which it knows its clients, or `allow_remote` is set."""

    def __init__(
        self, host: str, port: int, keys: Keys | None = None, allow_remote: bool = False
    ) -> None:
        """Raises Error: INVALID_ARGUMENT for a certificate without its key."""
        self.host = host
        self.port = port
        self.url = f"grpc+tcp://{_authority(host, port)}"
        self._keys = keys or Keys()
        self._allow_remote = allow_remote
        if bool(self._keys.cert) != bool(self._keys.key):
            raise Error(Status.INVALID_ARGUMENT, "cert and key go together", self.url)

    def connect(
        self, window_bytes: int, payload_bytes_max: int, timeout: float | None
    ) -> RpcClient:
        deadline_ns = deadline_after(timeout)
        _, address = self._resolve()
        arguments: Arguments = [("grpc.keepalive_time_ms", KEEPALIVE_MS)]
        credentials, missing = channel_credentials(self._keys), "no server"
        if credentials:
            missing = "no server, or none that shares our keys"
            arguments.append(("grpc.ssl_target_name_override", self._keys.name or self.host))
        target = _authority(address, self.port)
        caller = RpcClient(
            target, credentials, arguments, self.url, window_bytes, payload_bytes_max
        )
        try:
            caller.meet(deadline_ns, missing)
        except BaseException:
            caller.close()
            raise
        return caller

    def serve(
        self, service: Service, payload_bytes_max: int, clients_max: int, grace_s: float
    ) -> RpcServer:
        family, address = self._resolve()
        keys = self._keys
        is_loopback = ipaddress.ip_address(address).is_loopback
        if not is_loopback and not (keys.ca and keys.cert) and not self._allow_remote:
            what = (
                "not a loopback address: ?ca=F&cert=F&key=F serves hosts with keys, "
                "?allow_remote=1 any"
            )
            raise Error(Status.PERMISSION_DENIED, what, self.url)
        if keys.ca and not keys.cert:
            what = "a server with ca needs cert and key"
            raise Error(Status.INVALID_ARGUMENT, what, self.url)
        credentials = server_credentials(keys)
        self._check_free(family, address)
        return RpcServer(
            _authority(address, self.port),
            credentials,
            lambda port: f"grpc+tcp://{_authority(self.host, port)}",
            lambda: None,
            service,
            payload_bytes_max,
            clients_max,
            grace_s,
        )

    def _resolve(self) -> tuple[socket.AddressFamily, str]:
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):  # the latter for what no name of a host can be
            raise Error(Status.NOT_FOUND, "unknown host", self.url) from None
        return found[0][0], str(found[0][4][0])

    def _check_free(self, family: socket.AddressFamily, address: str) -> None:
        """gRPC does not say why it cannot listen: bind the address once before it does."""
        with socket.socket(family, socket.SOCK_STREAM) as sock, checked("bind", self.url):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((address, self.port))
            sock.listen(1)


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


__all__ = ["GrpcTcp", "GrpcUnix", "Keys"]
