"""The one map from a URL to a transport. Whoever needs only one transport can do without it.

    pipe:///dir            stdio:COMMAND WORDS        unix:///path        tcp://127.0.0.1:5000
    shm:///path            sysv-queue:///path     sysv-shm:///path
    zmq+ipc:///path        zmq+tcp://127.0.0.1:5000
    grpc+unix:///path      grpc+tcp://127.0.0.1:5000

Options follow as a query: `?wait=block|spin|adaptive` everywhere (zmq has no spin, grpc
only blocks), `?allow_remote=1` for what ends in tcp, `?curve=FILE` for zmq, `?ca=FILE&cert=FILE&
key=FILE&name=NAME` for grpc+tcp; that of stdio stands before the command: `stdio:?wait=spin COMMAND
WORDS`. In a path `?` is written %3F, `#` %23 and `%` %25; proto/url_vectors.json has the odd cases.
"""

import contextlib
import os
import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote_to_bytes

from ipc_bridge import client, frame, server
from ipc_bridge.errors import Error, Status
from ipc_bridge.handlers import Service
from ipc_bridge.service import Bridge, make_service
from ipc_bridge.session import WINDOW_BYTES_DEFAULT
from ipc_bridge.system import Transport, Wait
from ipc_bridge.transports.pipe import Pipe, Stdio
from ipc_bridge.transports.shm_ring import Shm
from ipc_bridge.transports.stream_socket import Tcp, Unix

Options = dict[str, str]

HOST_AND_PORT = re.compile(r"(?:\[([^\[\]]+)\]|([^\[\]:]+)):([0-9]{1,5})", re.DOTALL)
PORT_MAX = 65535
GRPC_PACKAGES = "grpcio grpcio-health-checking grpcio-reflection"


class Sessions(Protocol):
    """What carries calls by sessions of its own, as gRPC does."""

    def connect(
        self, window_bytes: int, payload_bytes_max: int, timeout: float | None
    ) -> client.Caller:
        """As `client.connect`."""
        ...

    def serve(
        self, service: Service, payload_bytes_max: int, clients_max: int, grace_s: float
    ) -> server.Callee:
        """As `server.Server`."""
        ...


Way = Transport | Sessions  # bytes, which a session needs; or calls


def transport(url: str) -> Transport:
    """The transport that a URL names. Raises Error: INVALID_ARGUMENT."""
    way = way_of(url)
    if not isinstance(way, Transport):
        raise Error(Status.INVALID_ARGUMENT, "this carries calls, not bytes", url)
    return way


def dial(
    url: str,
    *,
    window_bytes: int = WINDOW_BYTES_DEFAULT,
    payload_bytes_max: int = frame.PAYLOAD_BYTES_MAX,
    timeout: float | None = client.CONNECT_TIMEOUT_S,
) -> client.Caller:
    """Reach the server at `url`, for a service of one's own; the options and errors are those of
    `client.connect`."""
    way = way_of(url)
    if not isinstance(way, Transport):
        return way.connect(window_bytes, payload_bytes_max, timeout)
    return client.connect(
        way,
        window_bytes=window_bytes,
        payload_bytes_max=payload_bytes_max,
        timeout=timeout,
    )


def connect(
    url: str,
    *,
    window_bytes: int = WINDOW_BYTES_DEFAULT,
    payload_bytes_max: int = frame.PAYLOAD_BYTES_MAX,
    timeout: float | None = client.CONNECT_TIMEOUT_S,
) -> Bridge:
    """As `dial`, for echo and stream."""
    return Bridge(
        dial(
            url,
            window_bytes=window_bytes,
            payload_bytes_max=payload_bytes_max,
            timeout=timeout,
        )
    )


def listen(
    url: str,
    service: Service,
    *,
    window_bytes: int = WINDOW_BYTES_DEFAULT,
    payload_bytes_max: int = frame.PAYLOAD_BYTES_MAX,
    clients_max: int = server.CLIENTS_MAX_DEFAULT,
    grace_s: float = server.GRACE_S_DEFAULT,
) -> server.Callee:
    """Become the server of `url`; `run` what it returns. The options and errors are those of
    `server.Server`."""
    way = way_of(url)
    if not isinstance(way, Transport):
        return way.serve(service, payload_bytes_max, clients_max, grace_s)
    return server.Server(
        way,
        service,
        window_bytes=window_bytes,
        payload_bytes_max=payload_bytes_max,
        clients_max=clients_max,
        grace_s=grace_s,
    )


def serve(
    url: str,
    service: Service | None = None,
    *,
    window_bytes: int = WINDOW_BYTES_DEFAULT,
    payload_bytes_max: int = frame.PAYLOAD_BYTES_MAX,
    clients_max: int = server.CLIENTS_MAX_DEFAULT,
    grace_s: float = server.GRACE_S_DEFAULT,
) -> server.Callee:
    """As `listen`; the service is echo and stream unless given."""
    return listen(
        url,
        make_service() if service is None else service,
        window_bytes=window_bytes,
        payload_bytes_max=payload_bytes_max,
        clients_max=clients_max,
        grace_s=grace_s,
    )


def way_of(url: str) -> Way:
    """What a URL leads to. Raises Error: INVALID_ARGUMENT."""
    scheme, colon, _ = url.partition(":")
    make = SCHEMES.get(scheme)
    if not colon or make is None:
        known = ", ".join(SCHEMES)
        raise Error(Status.INVALID_ARGUMENT, f"unknown scheme; known are {known}", url)
    return make(url)


def _unix(url: str) -> Transport:
    path, options = _path(url, {"wait"})
    return Unix(path, _wait(options, url))


def _tcp(url: str) -> Transport:
    host, port, options = _host(url, {"wait", "allow_remote"})
    return Tcp(host, port, _wait(options, url), _flag(options, "allow_remote", url))


def _shm(url: str) -> Transport:
    path, options = _path(url, {"wait"})
    return Shm(path, _wait(options, url))


def _zmq_ipc(url: str) -> Transport:
    with _needs("zmq", "pyzmq", url):
        from ipc_bridge.transports.zeromq import ZmqIpc
    path, options = _path(url, {"wait", "curve"})
    return ZmqIpc(path, _wait(options, url), options.get("curve", ""))


def _zmq_tcp(url: str) -> Transport:
    with _needs("zmq", "pyzmq", url):
        from ipc_bridge.transports.zeromq import ZmqTcp
    host, port, options = _host(url, {"wait", "curve", "allow_remote"})
    allow_remote = _flag(options, "allow_remote", url)
    return ZmqTcp(host, port, _wait(options, url), options.get("curve", ""), allow_remote)


def _pipe(url: str) -> Transport:
    path, options = _path(url, {"wait"})
    return Pipe(path, _wait(options, url))


def _stdio(url: str) -> Transport:
    """A command's words may hold any character, so the query stands before them, if at all."""
    command = url.removeprefix("stdio:")
    query = ""
    if command.startswith("?"):
        query, _, command = command[1:].partition(" ")
    try:
        words = shlex.split(command)
    except ValueError:
        raise Error(Status.INVALID_ARGUMENT, "a quote is not closed", url) from None
    return Stdio(words, _wait(_options(query, {"wait"}, url), url))


class Parts(NamedTuple):
    """The parts of `scheme://authority/path?query`."""

    scheme: str
    authority: str
    path: str
    query: str


def _split(url: str) -> Parts:
    """(urllib.parse lowers, strips and refuses more than C++ can follow.)"""
    scheme, _, rest = url.partition(":")
    if "#" in rest:  # a fragment means nothing here; and cut off, two paths would be one
        raise Error(Status.INVALID_ARGUMENT, "write # as %23", url)
    rest, _, query = rest.partition("?")
    authority = ""
    if rest.startswith("//"):
        authority, slash, rest = rest[2:].partition("/")
        rest = slash + rest
    return Parts(scheme, authority, _unquote(rest), query)


def _unquote(text: str) -> str:
    """%XX of RFC 3986 2.1; what is not one stays. The bytes of a path need not be UTF-8."""
    return os.fsdecode(unquote_to_bytes(os.fsencode(text)))


def _sysv_queue(url: str) -> Transport:
    # sysv_ipc is an extra ([sysv]), and only these transports need it.
    with _needs("sysv_ipc", "sysv-ipc", url):
        from ipc_bridge.transports.sysv_queue import SysvQueue
    path, options = _path(url, {"wait"})
    return SysvQueue(path, _wait(options, url))


def _sysv_shm(url: str) -> Transport:
    with _needs("sysv_ipc", "sysv-ipc", url):
        from ipc_bridge.transports.sysv_shm import SysvShm
    path, options = _path(url, {"wait"})
    return SysvShm(path, _wait(options, url))


@contextlib.contextmanager
def _needs(module: str, package: str, url: str) -> Iterator[None]:
    """Say what to install if an import of a transport's own library fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        what = f"{module} is missing: pip install {package}"
        raise Error(Status.FAILED_PRECONDITION, what, url) from None


def _path(url: str, known: set[str]) -> tuple[str, Options]:
    parts = _split(url)
    if parts.authority or not parts.path.startswith("/") or "\0" in parts.path:
        what = f"{parts.scheme} takes an absolute path: {parts.scheme}:///path"
        raise Error(Status.INVALID_ARGUMENT, what, url)
    return parts.path, _options(parts.query, known, url)


def _host(url: str, known: set[str]) -> tuple[str, int, Options]:
    parts = _split(url)
    match = HOST_AND_PORT.fullmatch(parts.authority)
    port = int(match[3]) if match else PORT_MAX + 1
    if match is None or port > PORT_MAX or parts.path not in ("", "/"):
        what = f"{parts.scheme} takes a host and a port"
        raise Error(Status.INVALID_ARGUMENT, what, url)
    host = match[1] or match[2]
    return host, port, _options(parts.query, known, url)


def _grpc_unix(url: str) -> Sessions:
    path, options = _path(url, {"wait"})
    _check_wait(options, url)
    way: Sessions = _grpc_rpc(url).GrpcUnix(path)
    return way


def _grpc_tcp(url: str) -> Sessions:
    host, port, options = _host(url, {"wait", "allow_remote", "ca", "cert", "key", "name"})
    _check_wait(options, url)
    grpc_rpc = _grpc_rpc(url)
    keys = grpc_rpc.Keys(*(options.get(name, "") for name in ("ca", "cert", "key", "name")))
    way: Sessions = grpc_rpc.GrpcTcp(host, port, keys, _flag(options, "allow_remote", url))
    return way


def _grpc_rpc(url: str) -> Any:
    """The module, which takes a while to load, and a library that not everybody has."""
    try:
        from ipc_bridge.transports import grpc_rpc
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("grpc", "grpc_health", "grpc_reflection"):
            what = (
                f"the generated code is missing or of no use ({error}); `make build` makes it, "
                "and so does pip install, where protobuf-compiler-grpc is installed"
            )
            raise Error(Status.FAILED_PRECONDITION, what, url) from None
        what = f"{error.name} is missing: pip install {GRPC_PACKAGES}"
        raise Error(Status.FAILED_PRECONDITION, what, url) from None
    except (AttributeError, RuntimeError, TypeError) as error:  # what gencode raises, by its age
        what = f"generated code and installed libraries do not match: {error}".splitlines()[0]
        raise Error(Status.FAILED_PRECONDITION, what, url) from None
    return grpc_rpc


def _check_wait(options: Options, url: str) -> None:
    """Sessions that wait in gRPC's own threads, which always block."""
    if options.get("wait", "block") != "block":
        what = "gRPC waits in threads of its own: wait can only be block"
        raise Error(Status.INVALID_ARGUMENT, what, url)


def _options(query: str, known: set[str], url: str) -> Options:
    options: Options = {}
    for pair in filter(None, query.split("&")):
        name, _, value = pair.partition("=")
        name = _unquote(name)
        if name not in known:
            raise Error(Status.INVALID_ARGUMENT, f"unknown option {name}", url)
        options[name] = _unquote(value)
    return options


def _wait(options: Options, url: str) -> Wait:
    try:
        return Wait(options.get("wait", Wait.ADAPTIVE))
    except ValueError:
        raise Error(Status.INVALID_ARGUMENT, "wait is block, spin or adaptive", url) from None


def _flag(options: Options, name: str, url: str) -> bool:
    value = options.get(name, "0")
    if value not in ("0", "1"):
        raise Error(Status.INVALID_ARGUMENT, f"{name} is 0 or 1", url)
    return value == "1"


SCHEMES: dict[str, Callable[[str], Way]] = {
    "pipe": _pipe,
    "stdio": _stdio,
    "unix": _unix,
    "tcp": _tcp,
    "shm": _shm,
    "sysv-queue": _sysv_queue,
    "sysv-shm": _sysv_shm,
    "zmq+ipc": _zmq_ipc,
    "zmq+tcp": _zmq_tcp,
    "grpc+unix": _grpc_unix,
    "grpc+tcp": _grpc_tcp,
}
