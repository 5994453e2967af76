"""The one map from a URL to a transport. Whoever needs only one transport can do without it.

    pipe:///dir            stdio:COMMAND WORDS        unix:///path        tcp://127.0.0.1:5000

Options follow as a query: `?wait=block|spin|adaptive` everywhere, `?allow_remote=1` for tcp; that
of stdio stands before the command: `stdio:?wait=spin COMMAND WORDS`.
"""

import shlex
from collections.abc import Callable
from urllib.parse import parse_qsl, unquote, urlsplit

from ipc_bridge import client, frame, server
from ipc_bridge.errors import Error, Status
from ipc_bridge.service import Bridge, make_service
from ipc_bridge.session import WINDOW_BYTES
from ipc_bridge.system import Transport, Wait
from ipc_bridge.transports.pipe import Pipe, Stdio
from ipc_bridge.transports.stream_socket import Tcp, Unix

Options = dict[str, str]


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
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port is None or parts.path not in ("", "/"):
        raise Error(Status.INVALID_ARGUMENT, "tcp takes a host and a port", url)
    options = _options(parts.query, {"wait", "allow_remote"}, url)
    return Tcp(host, port, _wait(options, url), _flag(options, "allow_remote", url))


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


def _path(url: str, known: set[str]) -> tuple[str, Options]:
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc or not path.startswith("/"):
        what = f"{parts.scheme} takes an absolute path: {parts.scheme}:///path"
        raise Error(Status.INVALID_ARGUMENT, what, url)
    return path, _options(parts.query, known, url)


def _options(query: str, known: set[str], url: str) -> Options:
    options = dict(parse_qsl(query, keep_blank_values=True))
    for name in options:
        if name not in known:
            raise Error(Status.INVALID_ARGUMENT, f"unknown option {name}", url)
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
}
