"""CURVE for ZeroMQ (RFC 26): files of keys, and who may come."""

import os
import struct

import zmq
import zmq.utils.z85

from ipc_bridge.errors import Error, Status
from ipc_bridge.system import checked
from ipc_bridge.transports.zeromq_socket import NOBLOCK, is_readable

ZAP_ADDRESS = "inproc://zeromq.zap.01"  # where libzmq asks whether a key may come (RFC 27)
KEY_CHARACTERS = 40  # Z85 of 32 bytes (RFC 32)
KEYS_BYTES_MAX = 1 << 20  # of a file of keys: more clients than a server takes


class CurveKeys:
    """A file of CURVE keys (RFC 26), as `ipc-bridge curve-keys DIR` makes them for either end.

    A line is a word and a key: `secret` and `public` are one's own; at a client `server` is the
    server's public key, at a server each `client` is the public key of one that may come.
    """

    def __init__(self, path: str) -> None:
        """Raises Error: NOT_FOUND, PERMISSION_DENIED unless it is ours alone, INVALID_ARGUMENT."""
        keys: dict[str, list[str]] = {"secret": [], "public": [], "server": [], "client": []}
        for line in self._read(path).splitlines():
            word, *rest = line.split() or [""]
            if not word or word.startswith("#"):
                continue
            if word not in keys or len(rest) != 1 or not _is_key(rest[0]):
                raise Error(Status.INVALID_ARGUMENT, "not a file of CURVE keys", path)
            keys[word].append(rest[0])
        if len(keys["secret"]) != 1 or len(keys["public"]) != 1 or len(keys["server"]) > 1:
            raise Error(Status.INVALID_ARGUMENT, "not a file of CURVE keys", path)
        self.path = path
        self.secret, self.public = keys["secret"][0], keys["public"][0]
        self.server = "".join(keys["server"])
        self.clients = keys["client"]

    def prepare_dealer(self, dealer: zmq.Socket[bytes]) -> None:
        """Raises Error: INVALID_ARGUMENT if they are a server's."""
        if not self.server:
            raise Error(Status.INVALID_ARGUMENT, "a client's keys name its server", self.path)
        dealer.set(zmq.CURVE_SECRETKEY, self.secret.encode())
        dealer.set(zmq.CURVE_PUBLICKEY, self.public.encode())
        dealer.set(zmq.CURVE_SERVERKEY, self.server.encode())

    def prepare_router(self, router: zmq.Socket[bytes]) -> None:
        """Raises Error: INVALID_ARGUMENT if they are a client's."""
        if not self.clients:
            raise Error(Status.INVALID_ARGUMENT, "a server's keys name its clients", self.path)
        router.set(zmq.CURVE_SERVER, 1)
        router.set(zmq.CURVE_SECRETKEY, self.secret.encode())
        router.set(zmq.ZAP_DOMAIN, b"ipc-bridge")  # else nobody is asked

    @staticmethod
    def _read(path: str) -> str:
        with checked("open", path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            info = os.fstat(fd)
            if info.st_uid != os.geteuid() or info.st_mode & 0o077:
                what = "the file of keys is not ours alone (mode 0600)"
                raise Error(Status.PERMISSION_DENIED, what, path)
            with checked("read", path):
                return os.read(fd, KEYS_BYTES_MAX).decode("utf-8", "replace")
        finally:
            os.close(fd)


def _is_key(text: str) -> bool:
    """Whether it is Z85 of 32 bytes; zmq.utils.z85 takes that for granted."""
    if len(text) != KEY_CHARACTERS or not text.isascii():
        return False
    try:
        return len(zmq.utils.z85.decode(text)) == KEY_CHARACTERS // 5 * 4
    except (KeyError, struct.error):  # no character of Z85; five that are more than 32 bits
        return False


class KeyChecker:
    """Answers libzmq, which asks over ZAP (RFC 27) whether a client with some key may come."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: CurveKeys) -> None:
        self._keys = {zmq.utils.z85.decode(key) for key in keys.clients}
        self.socket = context.socket(zmq.REP)
        self.socket.bind(ZAP_ADDRESS)

    def answer(self) -> None:
        """All that is asked now."""
        while is_readable(self.socket):
            asked = self.socket.recv_multipart(NOBLOCK)
            # version, request, domain, address, routing id, mechanism, credentials
            known = len(asked) == 7 and asked[5] == b"CURVE" and asked[6] in self._keys
            status = (b"200", b"OK") if known else (b"400", b"unknown key")
            request = asked[1] if len(asked) > 1 else b""
            self.socket.send_multipart((b"1.0", request, *status, b"", b""), NOBLOCK)
