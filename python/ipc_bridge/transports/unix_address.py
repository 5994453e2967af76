"""A path where one server listens on a Unix socket, under a lock: `unix` and `meeting` stand on it.

The lock beside the path (`path.lock`) tells a second server at once that it is one, and makes it
safe to remove what a dead one left: a socket file says nothing about who made it, or whether it
still listens.
"""

import contextlib
import errno
import os
import socket
import stat

from ipc_bridge.errors import Error, Status
from ipc_bridge.system import Lock, check_peer, checked, persist

BACKLOG = 1024  # clients that may knock at once before connect(2) has to try again
PATH_BYTES_MAX = 107  # sockaddr_un.sun_path less its NUL, unix(7)
LATER = (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN)  # EAGAIN: the backlog is full, connect(2)


class UnixDoor:
    """A listening socket, and the lock; `close` removes both files. The socket is not its own:
    whoever accepts closes it."""

    def __init__(self, sock: socket.socket, lock: Lock, path: str) -> None:
        self.sock = sock
        self.lock = lock
        self._path = path
        self._inode = os.stat(path).st_ino

    def close(self) -> None:
        """Remove the address. Idempotent."""
        if self.lock.fileno() < 0:
            return
        with contextlib.suppress(OSError):
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)
        self.lock.close()


class UnixAddress:
    """A path for sockets of one kind: SOCK_STREAM, or SOCK_SEQPACKET, which keeps records whole."""

    def __init__(self, path: str, url: str, kind: socket.SocketKind) -> None:
        """Raises Error: INVALID_ARGUMENT for a path that is empty or too long."""
        if not 0 < len(os.fsencode(path)) <= PATH_BYTES_MAX:
            what = f"a socket's path takes 1 to {PATH_BYTES_MAX} bytes"
            raise Error(Status.INVALID_ARGUMENT, what, path)
        self.path = path
        self.url = url
        self._kind = kind

    def connect(self, deadline_ns: int) -> socket.socket:
        """Reach the server, which runs as us or root. Raises as Transport.connect."""
        return persist(self.attempt, LATER, self.url, deadline_ns)

    def attempt(self) -> socket.socket:
        """Try once: a socket in non-blocking mode. Raises OSError, one of LATER if the server is
        not there yet; and Error: PERMISSION_DENIED."""
        sock = self._make_socket()
        try:
            sock.setblocking(False)
            sock.connect(self.path)
            check_peer(sock, self.url)
        except BaseException:
            sock.close()
            raise
        return sock

    def listen(self) -> UnixDoor:
        """Become its server. Raises as Transport.listen."""
        with contextlib.ExitStack() as undo:
            lock = Lock(self.path + ".lock")
            undo.callback(lock.close)
            sock = self._make_socket()
            undo.callback(sock.close)
            self.reclaim()
            with checked("bind", self.path):
                os.fchmod(sock.fileno(), 0o600)  # the file is born with this mode
                sock.bind(self.path)
                sock.listen(BACKLOG)
                door = UnixDoor(sock, lock, self.path)
            undo.pop_all()
            return door

    def _make_socket(self) -> socket.socket:
        with checked("socket", self.url):
            return socket.socket(socket.AF_UNIX, self._kind)

    def reclaim(self) -> None:
        """Remove a dead server's socket; only under the lock, and only if it is ours."""
        try:
            info = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return
        if not stat.S_ISSOCK(info.st_mode) or info.st_uid != os.geteuid():
            what = "something that is not our socket is in the way"
            raise Error(Status.ALREADY_EXISTS, what, self.path)
        with self._make_socket() as probe:
            probe.setblocking(False)
            if probe.connect_ex(self.path) != errno.ECONNREFUSED:
                what = "another program listens on this socket"
                raise Error(Status.ALREADY_EXISTS, what, self.path)
        with contextlib.suppress(OSError):  # then it is bind that fails
            os.unlink(self.path)
