"""What the tests of faults stand on: peers as programs, hand-made frames, and a look into /proc."""

import os
import re
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import pytest

import ipc_bridge
from ipc_bridge.bridge_pb2 import StreamRequest
from ipc_bridge.system import END, Stream, deadline_after, now_ns

ROOT = Path(__file__).resolve().parents[1]
PEER = ROOT / os.environ.get("IPC_BRIDGE_BUILD_DIR", "build") / "ipc-bridge-peer"
SANITIZED = "sanitize" in str(PEER)  # everything takes several times as long
LANGUAGES = ("py", "cpp")
TRANSPORTS = ("pipe", "unix", "tcp", "shm", "sysv-queue", "sysv-shm", "zmq+ipc", "zmq+tcp")
TIMEOUT_S = 20.0  # for a program that should have ended long ago
NOBODY = 65534
EXIT_STATUS = 10  # plus the status
MIB = 1 << 20
WINDOW_BYTES = 4 * MIB

# --- programs ---


AS_NOBODY = f"""
import os, sys
from ipc_bridge import peer
try:
    from ipc_bridge.transports import grpc_rpc
except ImportError:
    pass
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
sys.exit(peer.main())
"""  # Python itself may stand where nobody else can read it, so it is loaded before


def peer(language: str, nobody: bool = False) -> list[str]:
    """The words that start a peer; as another user, if root asks for that."""
    if language == "py":
        return [sys.executable, *(["-c", AS_NOBODY] if nobody else ["-m", "ipc_bridge.peer"])]
    if not PEER.exists():
        pytest.fail(f"{PEER} is not built: run make build")
    if not nobody:
        return [str(PEER)]
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", str(PEER)]


def address(transport: str, directory: Path) -> str:
    """A URL to serve at."""
    if transport.endswith("tcp"):
        return f"{transport}://127.0.0.1:0"
    name = {"pipe": "p", "unix": "u"}.get(transport, transport)
    return f"{transport}://{directory}/{name}"


def stdio_url(language: str) -> str:
    """The URL of a server that its client starts."""
    return f"stdio:{shlex.join([*peer(language), 'serve', 'stdio:'])}"


def free_port_url(scheme: str) -> str:
    """A URL of tcp, or on top of it, where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"{scheme}://127.0.0.1:{probe.getsockname()[1]}"


class Served(NamedTuple):
    """A server that has said that it is ready."""

    process: subprocess.Popen[str]
    url: str

    @property
    def pid(self) -> int:
        return self.process.pid


def start_server(url: str, language: str, *words: str, nobody: bool = False) -> Served:
    """Start a server, and wait for its ready line."""
    process = subprocess.Popen(
        [*peer(language, nobody), "serve", url, *words], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert select.select([process.stdout], [], [], 10)[0], "the server prints no ready line"
        line = process.stdout.readline()
        match = re.fullmatch(r"ready (\S+)\n", line)
        assert match, f"no ready line: {line!r}"
    except BaseException:
        kill(process)
        raise
    return Served(process, match[1])


@contextmanager
def served(url: str, language: str, *words: str, nobody: bool = False) -> Iterator[Served]:
    """A server; unless it has been killed, it must leave cleanly at SIGTERM."""
    server = start_server(url, language, *words, nobody=nobody)
    try:
        yield server
        if server.process.poll() is None:
            server.process.terminate()
            # A kill just before may not have shown in poll() yet.
            assert server.process.wait(5) in (0, -signal.SIGKILL)
    finally:
        kill(server.process)


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9, and take leave of it."""
    process.kill()
    process.wait(TIMEOUT_S)
    for stream in (process.stdout, process.stderr, process.stdin):
        if stream:
            stream.close()


@contextmanager
def client(language: str, *words: str, nobody: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A client under way."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [*peer(language, nobody), *words], stdout=pipe, stderr=pipe, text=True
    )
    try:
        yield process
    finally:
        kill(process)


def ended(process: subprocess.Popen[str], seconds: float = TIMEOUT_S) -> int:
    """The exit code of a client. If it is an error, one line of stderr says so, and no more."""
    out, errors = process.communicate(timeout=seconds)
    code = process.returncode
    if code == 0:
        assert errors == ""
    else:
        assert re.fullmatch(r"error: [^\n]+\n", errors), f"exit code {code}, stderr {errors!r}"
        assert out == ""
    return code


def run_client(language: str, *words: str, nobody: bool = False) -> int:
    """Run a client to its end: the exit code (see `ended`)."""
    with client(language, *words, nobody=nobody) as process:
        return ended(process)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """SIGSTOP, and in the end SIGCONT."""
    os.kill(pid, signal.SIGSTOP)
    try:
        assert until(lambda: state(pid) == "T")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# --- /proc ---


def until(holds: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Poll for an effect: does it come in time?"""
    end_ns = deadline_after(seconds)
    while not holds():
        if now_ns() >= end_ns:
            return False
        time.sleep(0.005)
    return True


def status_field(pid: int, name: str) -> int:
    """A number of /proc/PID/status."""
    text = Path(f"/proc/{pid}/status").read_text()
    match = re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
    return int(match[1]) if match else 0


def rss_bytes(pid: int) -> int:
    return 1024 * status_field(pid, "VmRSS")


def threads(pid: int) -> int:
    return status_field(pid, "Threads")


def fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _stat(pid: int) -> list[str]:
    """The fields behind the name, so that [0] is the third of proc(5)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def state(pid: int) -> str:
    """The state's letter; X if it is gone."""
    try:
        return _stat(pid)[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def cpu_s(pid: int) -> float:
    """User and system time, of all threads."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> set[int]:
    """The processes whose parent it is."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                if int(_stat(int(name))[1]) == pid:
                    found.add(int(name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def only_child(pid: int) -> int:
    """The server that a client of stdio has started, once it serves."""
    assert until(lambda: len(children(pid)) == 1)
    (child,) = children(pid)
    assert until(lambda: threads(child) > 1)
    return child


def sleeps(pid: int) -> bool:
    """Has the main thread not run for a while?"""

    def switches() -> int:
        names = ("voluntary_ctxt_switches", "nonvoluntary_ctxt_switches")
        return sum(status_field(pid, name) for name in names)

    before = switches()
    time.sleep(0.1)
    return state(pid) == "S" and switches() == before


# --- frames ---

HELLO_KIND, CALL_KIND, ITEM_KIND, END_KIND, CREDIT_KIND, CANCEL_KIND, GOODBYE_KIND = range(1, 8)
INTERNAL = 13


def header(
    kind: int, size: int = 0, flags: int = 0, code: int = 0, call_id: int = 0, value: int = 0
) -> bytes:
    """Any header, also a wrong one."""
    return struct.pack("<IBBHII", size, kind, flags, code, call_id, value)


def hello(magic: bytes = b"IPCB", version: int = 1, window: int = WINDOW_BYTES) -> bytes:
    return header(HELLO_KIND, 8, code=version, value=window) + struct.pack("<4sI", magic, 64 * MIB)


def call(call_id: int, payload: bytes = b"", method: int = 1, streaming: bool = False) -> bytes:
    return header(CALL_KIND, len(payload), int(streaming), method, call_id) + payload


def stream_call(call_id: int, count: int, size: int, rate_hz: float = 0.0) -> bytes:
    asked = StreamRequest(count=count, size=size, rate_hz=rate_hz).SerializeToString()
    return call(call_id, asked, method=2, streaming=True)


def item(call_id: int, index: int, payload: bytes) -> bytes:
    return header(ITEM_KIND, len(payload), call_id=call_id, value=index) + payload


def end(call_id: int, status: int = 0, payload: bytes = b"") -> bytes:
    return header(END_KIND, len(payload), code=status, call_id=call_id) + payload


class Frame(NamedTuple):
    """What came."""

    kind: int
    flags: int
    code: int
    call_id: int
    value: int
    payload: bytes


class Raw:
    """A connection without a session: any bytes go out, frames come in."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.ended = False  # the peer has gone
        self._bytes = bytearray()

    @classmethod
    def connect(cls, url: str, seconds: float = 5.0) -> Self:
        return cls(ipc_bridge.transport(url).connect(deadline_after(seconds)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *about: object) -> None:
        self.stream.close()

    def send(self, data: bytes, seconds: float = 5.0) -> None:
        """Write it all, and read while there is no room; a peer that has gone shows at reading."""
        rest, end_ns = memoryview(data), deadline_after(seconds)
        buffer = memoryview(bytearray(MIB))
        while rest:
            count = self.stream.try_write([rest])
            if count == END:
                return
            rest = rest[count:]
            if not count:
                assert self.stream.wait(True, True, end_ns), "the peer does not read"
                self._take_in(buffer, self.stream.try_read(buffer))

    def frames(self, count: int | None = None, seconds: float = 2.0) -> list[Frame]:
        """So many frames; None: all, until the peer closes. Fewer if it closes, or is silent."""
        found: list[Frame] = []
        buffer, end_ns = memoryview(bytearray(MIB)), deadline_after(seconds)
        while True:
            while (count is None or len(found) < count) and (frame := self._take()):
                found.append(frame)
            if len(found) == count or self.ended:
                return found
            got = self.stream.read(buffer, end_ns)
            if got == 0:
                return found
            self._take_in(buffer, got)

    def _take_in(self, buffer: memoryview, got: int) -> None:
        self.ended = self.ended or got == END
        self._bytes += buffer[: max(got, 0)]

    def _take(self) -> Frame | None:
        if len(self._bytes) < 16:
            return None
        size, kind, flags, code, call_id, value = struct.unpack_from("<IBBHII", self._bytes)
        if len(self._bytes) < 16 + size:
            return None
        payload = bytes(self._bytes[16 : 16 + size])
        del self._bytes[: 16 + size]
        return Frame(kind, flags, code, call_id, value, payload)


def is_refusal(raw: Raw) -> bool:
    """Does the peer end the session: by END of call 0 that says why, or by closing?

    (TCP may lose the END, as the peer closes with input still unread.)
    """
    frames = raw.frames()
    last = next((one for one in frames if (one.kind, one.call_id) == (END_KIND, 0)), None)
    if last is None:
        return raw.ended
    return raw.ended and last == frames[-1] and last.code == INTERNAL and bool(last.payload)
