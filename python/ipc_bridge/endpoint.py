"""The one map from a URL to a transport. Whoever needs only one transport can do without it.

    pipe:///dir            stdio:COMMAND WORDS        unix:///path        tcp://127.0.0.1:5000
    shm:///path            sysv-queue:///path     sysv-shm:///path
    zmq+ipc:///path        zmq+tcp://127.0.0.1:5000

Options follow as a query: `?wait=block|spin|adaptive` everywhere (zmq has no spin),
`?allow_remote=1` for what ends in tcp, `?curve=FILE` for zmq; that of stdio stands before the
command: `stdio:?wait=spin COMMAND WORDS`.
"""

import contextlib
import os
import re
import shlex
from collections.abc import Callable, Iterator
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from ipc_bridge import client, frame, server
from ipc_bridge.errors import Error, Status
from ipc_bridge.service import Bridge, make_service
from ipc_bridge.session import WINDOW_BYTES
from ipc_bridge.system import Transport, Wait
from ipc_bridge.transports.pipe import Pipe, Stdio
from ipc_bridge.transports.shm_ring import Shm
from ipc_bridge.transports.stream_socket import Tcp, Unix

Options = dict[str, str]

HOST_AND_PORT = re.compile(r"(?:\[([^\[\]]+)\]|([^\[\]:]+)):([0-9]{1,5})", re.DOTALL)
PORT_MAX = 65535


def transport(url: str) -> Transport:
    """The transport that a URL names. Raises Error: INVALID_ARGUMENT."""
    scheme, colon, _ = url.partition(":")
    make = SCHEMES.get(scheme)
    if not colon or make is None:
        known = ", ".join(SCHEMES)
        raise Error(Status.INVALID_ARGUMENT, f"unknown scheme; known are {known}", url)
    return make(url)


def dial(
    url: str,
    *,
    window_bytes: int = WINDOW_BYTES,
    payload_bytes_max: int = frame.PAYLOAD_BYTES_MAX,
    timeout: float | None = client.CONNECT_TIMEOUT_S,
) -> client.Caller:
    """Reach the server at `url`, for a service of one's own; the options and errors are those of
    `client.connect`."""
    return client.connect(
        transport(url),
        window_bytes=window_bytes,
        payload_bytes_max=payload_bytes_max,
        timeout=timeout,
    )


def connect(
    url: str,
    *,
    window_bytes: int = WINDOW_BYTES,
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
    service: server.Service,
    *,
    window_bytes: int = WINDOW_BYTES,
    payload_bytes_max: int = frame.PAYLOAD_BYTES_MAX,
    clients_max: int = server.CLIENTS_MAX,
    grace_s: float = server.GRACE_S,
) -> server.Server:
    """Become the server of `url`; `run` what it returns. The options and errors are those of
    `server.Server`."""
    return server.Server(
        transport(url),
        service,
        window_bytes=window_bytes,
        payload_bytes_max=payload_bytes_max,
        clients_max=clients_max,
        grace_s=grace_s,
    )


def serve(
    url: str,
    service: server.Service | None = None,
    *,
    window_bytes: int = WINDOW_BYTES,
    payload_bytes_max: int = frame.PAYLOAD_BYTES_MAX,
    clients_max: int = server.CLIENTS_MAX,
    grace_s: float = server.GRACE_S,
) -> server.Server:
    """As `listen`; the service is echo and stream unless given."""
    return listen(
        url,
        make_service() if service is None else service,
        window_bytes=window_bytes,
        payload_bytes_max=payload_bytes_max,
        clients_max=clients_max,
        grace_s=grace_s,
    )


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
    with _needs("zmq", "zmq", url):
        from ipc_bridge.transports.zeromq import ZmqIpc
    path, options = _path(url, {"wait", "curve"})
    return ZmqIpc(path, _wait(options, url), options.get("curve", ""))


def _zmq_tcp(url: str) -> Transport:
    with _needs("zmq", "zmq", url):
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
    rest, _, query = rest.partition("#")[0].partition("?")
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
    with _needs("sysv_ipc", "sysv", url):
        from ipc_bridge.transports.sysv_queue import SysvQueue
    path, options = _path(url, {"wait"})
    return SysvQueue(path, _wait(options, url))


def _sysv_shm(url: str) -> Transport:
    with _needs("sysv_ipc", "sysv", url):
        from ipc_bridge.transports.sysv_shm import SysvShm
    path, options = _path(url, {"wait"})
    return SysvShm(path, _wait(options, url))


@contextlib.contextmanager
def _needs(module: str, extra: str, url: str) -> Iterator[None]:
    """Say what to install if an import of a transport's own library fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        what = f"{module} is missing: pip install 'ipc-bridge[{extra}]'"
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


SCHEMES: dict[str, Callable[[str], Transport]] = {
    "pipe": _pipe,
    "stdio": _stdio,
    "unix": _unix,
    "tcp": _tcp,
    "shm": _shm,
    "sysv-queue": _sysv_queue,
    "sysv-shm": _sysv_shm,
    "zmq+ipc": _zmq_ipc,
    "zmq+tcp": _zmq_tcp,
}
