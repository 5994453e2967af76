"""gRPC beyond the conformance suite: strangers, keys, and what happens when a peer dies or stops.

A stranger is a client of gRPC that knows nothing of this project: it learns the service by
reflection. The rows are those of the table of cases; `LEFT_OUT` says which have no meaning here.
"""

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import ipc_bridge
from ipc_bridge import Call, CallError, Service, Status, connect
from peer_support import (
    EXIT_STATUS,
    NOBODY,
    Served,
    client,
    ended,
    kill,
    peer,
    run_client,
    served,
    start_server,
)
from processes import cpu_s, fds, stopped, threads
from support import LANGUAGES, ROOT, SLOW, until

SCHEMES = ("grpc+unix", "grpc+tcp")
SEEN_S = 1.0 * SLOW
UNAVAILABLE = EXIT_STATUS + Status.UNAVAILABLE
EXISTS = EXIT_STATUS + Status.ALREADY_EXISTS
REFUSED = EXIT_STATUS + Status.PERMISSION_DENIED
USAGE = 2

LEFT_OUT = {  # rows that other transports must show
    3: "no ring",
    5: "no frames of ours; gRPC checks a declared size against max_receive_message_length",
    6: "no frames of ours: garbage is HTTP/2's concern (test_garbage_disturbs_nobody)",
    7: "no frames of ours",
    16: "nothing is published step by step",
    24: "no shared memory",
    25: "gRPC accepts clients itself, and neither tells nor lets us choose what follows EMFILE",
    26: "no System V objects",
    31: "no stdio",
}

of_schemes = pytest.mark.parametrize("scheme", SCHEMES)
of_servers = pytest.mark.parametrize("server", LANGUAGES)
of_clients = pytest.mark.parametrize("caller", LANGUAGES)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


def address(scheme: str, directory: Path) -> str:
    """A URL to serve at."""
    return "grpc+tcp://127.0.0.1:0" if scheme == "grpc+tcp" else f"grpc+unix://{directory}/g"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory in which nothing may be left."""
    yield tmp_path
    assert [str(path) for path in tmp_path.rglob("*")] == []


def test_each_row_is_shown_or_left_out() -> None:
    """Every row of the table is shown here or by the conformance suite, or says why not."""
    mine, all_transports = (
        (ROOT / "tests" / name).read_text() for name in ("test_grpc.py", "test_conformance.py")
    )
    for row in range(1, 34):
        is_mine = re.search(rf"Row {row}\b", mine) is not None
        assert is_mine or row in LEFT_OUT or re.search(rf"Row {row}\b", all_transports), row
        assert not (is_mine and row in LEFT_OUT), row


# --- strangers ---

STRANGER = r"""
import json, sys
import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

channel = grpc.insecure_channel(sys.argv[1])
database = ProtoReflectionDescriptorDatabase(channel)
pool = descriptor_pool.DescriptorPool(database)
service = pool.FindServiceByName("ipc_bridge.Bridge")

def method(name):
    found = service.methods_by_name[name]
    request, answer = map(message_factory.GetMessageClass, (found.input_type, found.output_type))
    kind = channel.unary_stream if found.server_streaming else channel.unary_unary
    path = f"/{service.full_name}/{name}"
    return kind(path, request.SerializeToString, answer.FromString), request

echo, request = method("Echo")
stream, stream_request = method("Stream")
call, call_request = method("Call")
items = [item.payload for item in stream(stream_request(count=5, size=300), timeout=5)]
try:
    list(stream(stream_request(count=1, size=1, stamped=True), timeout=5))
    refusal = "none"
except grpc.RpcError as error:
    refusal = error.code().name
health = health_pb2_grpc.HealthStub(channel)
states = [
    health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5).status
    for name in ("", "ipc_bridge.Bridge")
]
assert not any(name.startswith("ipc_bridge") for name in sys.modules)
print(json.dumps({
    "services": sorted(database.get_services()),
    "echo": echo(request(payload=b"hello"), timeout=5).payload.decode(),
    "call": call(call_request(method=1, payload=b"by number"), timeout=5).payload.decode(),
    "sizes": [len(item) for item in items],
    "first": list(items[1][:4]),
    "refusal": refusal,
    "states": states,
}))
"""


@of_servers
@of_schemes
def test_a_stranger_calls_by_reflection(scheme: str, server: str, place: Path) -> None:
    with served(address(scheme, place), server) as up:
        target = up.url.replace("grpc+unix://", "unix:").replace("grpc+tcp://", "")
        environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        done = subprocess.run(
            [sys.executable, "-c", STRANGER, target],
            capture_output=True,
            text=True,
            timeout=30,
            env=environment,
            cwd=place,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
    assert {"ipc_bridge.Bridge", "grpc.health.v1.Health"} <= set(found.pop("services"))
    assert found == {
        "echo": "hello",
        "call": "by number",
        "sizes": [300] * 5,
        "first": [(j * j + (j >> 8)) % 251 for j in range(257, 261)],
        "refusal": "INVALID_ARGUMENT",
        "states": [1, 1],
    }


@of_servers
@of_schemes
def test_garbage_disturbs_nobody(scheme: str, server: str, place: Path) -> None:
    """Row 30: and connections that say nothing, as many as there may be."""
    crowd = 200
    with served(address(scheme, place), server) as up, connect(up.url) as control, ExitStack() as s:
        before = fds(up.pid)
        for number in range(crowd):
            raw = s.enter_context(dial(up.url))
            if number % 2:
                raw.sendall(
                    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" if number % 4 == 1 else b"?"
                )
        assert bytes(control.echo(b"during", timeout=SEEN_S)) == b"during"
        with connect(up.url, timeout=SEEN_S * 5) as fresh:
            assert bytes(fresh.echo(b"fresh", timeout=SEEN_S)) == b"fresh"
        if server == "py":  # 1.51 forgets to close some of those that it gives up, after 5 s
            assert until(lambda: fds(up.pid) <= before + 10, 5.0 + 3 * SEEN_S), "the silent stay"


def dial(url: str) -> socket.socket:
    """A connection that says nothing."""
    if url.startswith("grpc+unix://"):
        raw = socket.socket(socket.AF_UNIX)
        raw.connect(url.removeprefix("grpc+unix://"))
        return raw
    host, _, port = url.removeprefix("grpc+tcp://").rpartition(":")
    return socket.create_connection((host, int(port)))


# --- words ---

NO_SPIN = "gRPC waits in threads of its own: wait can only be block"


@of_clients
@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("grpc+unix:///x?wait=spin", "gRPC waits in threads of its own: wait can only be block"),
        (
            "grpc+tcp://h:1?wait=adaptive",
            "gRPC waits in threads of its own: wait can only be block",
        ),
        ("grpc+tcp://h", "grpc+tcp takes a host and a port"),
        ("grpc+unix://x", "grpc+unix takes an absolute path: grpc+unix:///path"),
        ("grpc+tcp://h:1?cert=/c", "cert and key go together"),
        ("grpc+unix:///x?ca=/c", "unknown option ca"),
    ],
)
def test_wrong_urls(caller: str, url: str, what: str) -> None:
    words = [*peer(caller), "echo", url, "--payload", "x"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    where = "grpc+tcp://h:1" if "cert=" in url else url
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert done.stderr.splitlines()[0] == f"error: INVALID_ARGUMENT: {what}, {where}"


def test_without_grpcio_the_rest_works(place: Path) -> None:
    """The library loads, unix works, and grpc says what is missing."""
    program = (
        "import sys\n"
        "sys.modules['grpc'] = None\n"
        "import ipc_bridge\n"
        f"with ipc_bridge.serve('unix://{place}/u'): pass\n"
        "try: ipc_bridge.connect('grpc+unix:///x')\n"
        "except ipc_bridge.Error as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == ""
    what = "FAILED_PRECONDITION: grpc is missing: pip install 'ipc-bridge[grpc]', grpc+unix:///x\n"
    assert done.stdout == what


def test_generated_code_that_does_not_match_is_told_so() -> None:
    """As the stubs of a newer grpcio-tools behave where the library is older."""
    program = (
        "import sys, types\n"
        "class Old(types.ModuleType):\n"
        "    def __getattr__(self, name):\n"
        "        raise RuntimeError('The grpc package installed is at version 1.0')\n"
        "sys.modules['ipc_bridge.bridge_pb2_grpc'] = Old('old')\n"
        "import ipc_bridge\n"
        "try: ipc_bridge.connect('grpc+unix:///x')\n"
        "except ipc_bridge.Error as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.startswith("FAILED_PRECONDITION: generated code and installed libraries")
    assert done.stdout.count("\n") == 1


# --- starting and ending ---


@of_schemes
@of_servers
@of_clients
def test_a_client_waits_for_its_server(scheme: str, caller: str, server: str, place: Path) -> None:
    """Row 23: it is early, and connects once the server is there."""
    peer(server)
    url = free_port_url() if scheme == "grpc+tcp" else address(scheme, place)
    with client(caller, "echo", url, "--payload", "early", "--timeout", "8") as process:
        time.sleep(0.3)  # the case itself: nobody is there yet
        assert process.poll() is None
        with served(url, server):
            assert ended(process) == 0


@of_schemes
@of_clients
def test_without_a_server_a_client_gives_up(scheme: str, caller: str, place: Path) -> None:
    """Row 23: at its deadline."""
    url = free_port_url() if scheme == "grpc+tcp" else address(scheme, place)
    began = time.monotonic()
    assert run_client(caller, "echo", url, "--payload", "x", "--timeout", "0.3") == UNAVAILABLE
    assert 0.3 <= time.monotonic() - began < 0.3 + 3.0 * SEEN_S


def free_port_url() -> str:
    """A URL where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"grpc+tcp://127.0.0.1:{probe.getsockname()[1]}"


@of_servers
@of_schemes
@pytest.mark.parametrize("second", LANGUAGES)
def test_a_second_server_is_told_so(scheme: str, server: str, second: str, place: Path) -> None:
    """Row 20: and the first one serves on, also after the second has left."""
    with served(address(scheme, place), server) as up:
        before = sorted(os.listdir(place))
        assert run_client(second, "serve", up.url) == EXISTS
        assert sorted(os.listdir(place)) == before
        with connect(up.url, timeout=5.0) as fresh:
            assert bytes(fresh.echo(b"first", timeout=SEEN_S)) == b"first"


@of_servers
@pytest.mark.parametrize("successor", LANGUAGES)
def test_a_stale_socket_is_reclaimed(server: str, successor: str, place: Path) -> None:
    """Row 19."""
    url = address("grpc+unix", place)
    with served(url, server) as first:
        kill(first.process)
    assert {path.name for path in place.iterdir()} == {"g", "g.lock"}
    with served(url, successor), connect(url, timeout=5.0) as bridge:
        assert bytes(bridge.echo(b"second", timeout=SEEN_S)) == b"second"


@of_servers
@pytest.mark.parametrize("what", ["file", "link", "socket"])
def test_a_squatted_name_is_left_alone(server: str, what: str, tmp_path: Path) -> None:
    """Row 21: gRPC by itself would unlink a socket, also one that is in use."""
    path = tmp_path / "g"
    with socket.socket(socket.AF_UNIX) as other:
        if what == "file":
            path.write_text("not yours")
        elif what == "link":
            path.symlink_to(tmp_path / "elsewhere")
        else:
            other.bind(str(path))
            other.listen(1)
        before = path.lstat()
        assert run_client(server, "serve", address("grpc+unix", tmp_path)) in (EXISTS, REFUSED)
        assert path.lstat().st_ino == before.st_ino
        assert os.listdir(tmp_path) == ["g"]


@of_servers
def test_the_socket_is_private(server: str, place: Path) -> None:
    """Whatever the umask."""
    before = os.umask(0)
    try:
        with served(address("grpc+unix", place), server):
            modes = {stat.S_IMODE(path.stat().st_mode) for path in place.iterdir()}
            assert modes == {0o600}
    finally:
        os.umask(before)


@needs_root
@of_servers
@of_clients
def test_another_user_is_refused_at_the_socket(caller: str, server: str) -> None:
    """Row 22: by the socket's mode; and a client asks whose socket it is."""
    place = Path("/tmp") / f"ipc-bridge-grpc-{os.getpid()}"
    place.mkdir()
    os.chmod(place, 0o777)
    try:
        url = f"grpc+unix://{place}/g"
        with served(url, server):
            words = ("echo", url, "--payload", "hello", "--timeout", "0.4")
            assert run_client(caller, *words, nobody=True) == REFUSED
        with served(url, server, nobody=True):
            assert (place / "g").stat().st_uid == NOBODY
            assert run_client(caller, "echo", url, "--payload", "secret") == REFUSED
    finally:
        shutil.rmtree(place)


# --- death, silence, restart ---

PACES = {
    "slow": ("--count", "1000000000", "--size", "16", "--rate", "1"),
    "fast": ("--count", "1000000000", "--size", "1024"),
}


@pytest.mark.parametrize("pace", PACES)
@of_schemes
@of_servers
@of_clients
def test_the_server_is_killed(
    scheme: str, server: str, caller: str, pace: str, tmp_path: Path
) -> None:
    """Row 14: in mid-call and in mid-stream."""
    with served(address(scheme, tmp_path), server) as up:
        idle, before = cpu_s(up.pid), fds(up.pid)
        with client(caller, "stream", up.url, *PACES[pace]) as process:
            assert until(lambda: fds(up.pid) > before)
            if pace == "fast":
                assert until(lambda: cpu_s(up.pid) > idle + 0.05)
            else:
                assert until(lambda: rests(process.pid))
            assert process.poll() is None
            up.process.kill()
            began = time.monotonic()
            assert ended(process) == UNAVAILABLE
            assert time.monotonic() - began < SEEN_S


@of_schemes
@of_servers
@of_clients
def test_the_client_is_killed_in_mid_stream(
    scheme: str, server: str, caller: str, place: Path
) -> None:
    """Row 15: what it held is given back."""
    with served(address(scheme, place), server) as up, connect(up.url) as control:
        before = fds(up.pid)
        used = cpu_s(up.pid)
        with client(caller, "stream", up.url, *PACES["fast"]) as process:
            assert until(lambda: cpu_s(up.pid) > used + 0.05)
            process.kill()
            assert until(lambda: fds(up.pid) <= before, SEEN_S)
        assert until(lambda: rests(up.pid), 2 * SEEN_S), "the handler goes on"
        assert bytes(control.echo(b"after", timeout=SEEN_S)) == b"after"


def rests(pid: int) -> bool:
    """Does it use no CPU to speak of?"""
    before = cpu_s(pid)
    time.sleep(0.2)
    return cpu_s(pid) - before <= 0.02


@of_schemes
@of_servers
def test_a_deadline_holds_against_a_stopped_server(scheme: str, server: str, place: Path) -> None:
    """Row 17: and the next answer is not the one to the call before."""
    with served(address(scheme, place), server) as up, connect(up.url) as bridge:
        bridge.echo(b"warm")
        with stopped(up.pid):
            began = time.monotonic()
            with pytest.raises(CallError) as caught:
                bridge.echo(b"stopped", timeout=0.4)
            assert 0.4 <= time.monotonic() - began < 0.4 + 0.3 * SEEN_S
        assert caught.value.status == Status.DEADLINE_EXCEEDED
        assert bytes(bridge.echo(b"next", timeout=5.0)) == b"next"


@of_schemes
@of_servers
@of_clients
def test_a_stopped_client_disturbs_nobody(
    scheme: str, server: str, caller: str, place: Path
) -> None:
    """Row 17: the producer stops with it, and goes on with it."""
    with served(address(scheme, place), server) as up, connect(up.url) as control:
        used = cpu_s(up.pid)
        with client(caller, "stream", up.url, "--count", "30000", "--size", "1024") as process:
            assert until(lambda: cpu_s(up.pid) > used + 0.02)
            with stopped(process.pid):
                for _ in range(5):
                    assert bytes(control.echo(b"during", timeout=2.0)) == b"during"
                assert until(lambda: rests(up.pid)), "the server spins"
            assert ended(process, 60.0) == 0


@of_schemes
@of_servers
def test_a_restart_under_a_client(scheme: str, server: str, tmp_path: Path) -> None:
    """Row 18: UNAVAILABLE, or gRPC has connected again; never another call's answer."""
    with served(address(scheme, tmp_path), server) as first:
        url = first.url
        bridge = connect(url)
        assert bytes(bridge.echo(b"first")) == b"first"
        kill(first.process)
    with bridge, served(url, server):
        for number in range(5):
            assert outcome(bridge, b"%d" % number) in (b"%d" % number, Status.UNAVAILABLE)


def outcome(bridge: ipc_bridge.Bridge, payload: bytes) -> bytes | Status:
    """What comes of an echo."""
    try:
        return bytes(bridge.echo(payload, timeout=5.0))
    except CallError as error:
        return error.status


# --- a crowd ---


@of_schemes
@of_servers
def test_connects_and_disconnects(scheme: str, server: str, place: Path) -> None:
    """Row 27, in small: fds and threads stay as they are."""
    with served(address(scheme, place), server) as up:

        def round_trip() -> None:
            with connect(up.url) as bridge:
                assert bytes(bridge.echo(b"x", timeout=5.0)) == b"x"

        for _ in range(10):
            round_trip()
        before = (fds(up.pid), threads(up.pid))
        for _ in range(150):
            round_trip()
        assert until(lambda: fds(up.pid) <= before[0] + 2, 2 * SEEN_S)
        assert threads(up.pid) <= before[1] + 8


@of_schemes
@of_servers
def test_streams_do_not_starve_a_unary_call(scheme: str, server: str, place: Path) -> None:
    """Row 27: a call is answered while 20 streams run, more than there are cores or pollers."""
    with served(address(scheme, place), server) as up, ExitStack() as crowd:
        for _ in range(20):
            bridge = crowd.enter_context(connect(up.url))
            next(iter(bridge.stream(10**9, 64, rate_hz=20.0)))
        with connect(up.url) as control:
            for _ in range(5):
                assert bytes(control.echo(b"now", timeout=2.0 * SEEN_S)) == b"now"


def test_handlers_that_block_do_not_starve_others(place: Path) -> None:
    """Sixteen at once in a server of ours, which runs in this process."""

    def wait(call: Call, request: memoryview) -> bytes:
        call.sleep(30.0)
        return b""

    service = Service()
    service.unary(7, wait)
    service.unary(8, lambda call, request: request)
    with serving(f"grpc+unix://{place}/g", service) as url, ExitStack() as crowd:
        waiting = [crowd.enter_context(connect(url)) for _ in range(16)]
        calls = [threading.Thread(target=expire, args=(bridge,)) for bridge in waiting]
        for call in calls:
            call.start()
        with connect(url) as control:
            assert bytes(control.call(8, b"now", timeout=2.0 * SEEN_S)) == b"now"
        for call in calls:
            call.join(10.0)


def expire(bridge: ipc_bridge.Bridge) -> None:
    """A call that lasts to its deadline."""
    with pytest.raises(CallError):
        bridge.call(7, b"", timeout=0.5)


@contextmanager
def serving(url: str, service: Service) -> Iterator[str]:
    """A service of the test's own, in a thread of it."""
    with ipc_bridge.serve(url, service, grace_s=0.1) as up:
        thread = threading.Thread(target=up.run)
        thread.start()
        try:
            yield up.url
        finally:
            up.stop()
            thread.join(10.0)
    assert not thread.is_alive()


STUCK = """
import signal, sys, time, ipc_bridge
service = ipc_bridge.Service()
service.unary(7, lambda call, request: time.sleep(60.0))
with ipc_bridge.serve(sys.argv[1], service, grace_s=0.1) as up:
    signal.signal(signal.SIGTERM, lambda *_: up.stop())
    print("ready", flush=True)
    up.run()
"""


def test_a_handler_that_goes_on_does_not_hold_up_the_end(place: Path) -> None:
    """Row 32: it is left behind, and the program ends."""
    url = f"grpc+unix://{place}/g"
    words = [sys.executable, "-c", STUCK, url]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            with connect(url) as bridge:
                expire(bridge)
            process.terminate()
            assert process.wait(5.0 * SEEN_S) == 0
        finally:
            process.kill()


@of_servers
def test_one_call_too_many(server: str, place: Path) -> None:
    with (
        served(address("grpc+unix", place), server, "--clients-max", "1") as up,
        connect(up.url) as first,
        connect(up.url) as second,
    ):
        items = iter(first.stream(10**9, 16, rate_hz=10.0))
        next(items)
        with pytest.raises(CallError) as caught:
            second.echo(b"x", timeout=5.0)
        assert caught.value.status == Status.RESOURCE_EXHAUSTED
        assert caught.value.what == "the server has 1 calls under way and takes no more"


@of_servers
@of_clients
def test_a_proxy_has_no_effect(server: str, caller: str, place: Path) -> None:
    """Row 29."""
    proxies = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "grpc_proxy")}
    with served(address("grpc+tcp", place), server) as up:
        words = [*peer(caller), "echo", up.url, "--payload", "x", "--timeout", "5"]
        assert subprocess.run(words, env=os.environ | proxies, timeout=20).returncode == 0


# --- keys ---


def openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, a server's and a client's keys, made as grpc_rpc's head says; and a stranger's CA."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is missing")
    place = tmp_path_factory.mktemp("keys")
    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    for ca in ("ca", "other"):
        files = ("-keyout", f"{place}/{ca}.key", "-out", f"{place}/{ca}.pem")
        openssl("req", "-x509", "-subj", f"/CN={ca}", *new, *files)
    names = "subjectAltName=DNS:bridge.test,IP:127.0.0.1,IP:10.77.0.1"
    for name, ca in (("server", "ca"), ("client", "ca"), ("stranger", "other")):
        files = ("-keyout", f"{place}/{name}.key", "-out", f"{place}/{name}.csr")
        openssl("req", "-subj", f"/CN={name}", "-addext", names, *new, *files)
        signer = ("-CA", f"{place}/{ca}.pem", "-CAkey", f"{place}/{ca}.key")
        files = ("-in", f"{place}/{name}.csr", "-out", f"{place}/{name}.pem")
        openssl("x509", "-req", "-copy_extensions", "copy", *signer, *files)
    return place


def query(keys: Path, who: str, ca: str = "ca") -> str:
    return f"?ca={keys}/{ca}.pem&cert={keys}/{who}.pem&key={keys}/{who}.key"


@of_servers
@of_clients
def test_mutual_tls(server: str, caller: str, keys: Path) -> None:
    """With keys both ways; without them, or with a stranger's, nobody gets in."""
    with served_with_keys(server, f"grpc+tcp://127.0.0.1:0{query(keys, 'server')}") as up:
        words = ("--payload", "hello", "--timeout")
        assert run_client(caller, "echo", up.url + query(keys, "client"), *words, "5") == 0
        more = ("stream", up.url + query(keys, "client"), "--count", "100", "--size", "5000")
        assert run_client(caller, *more) == 0
        named = query(keys, "client") + "&name=bridge.test"
        assert run_client(caller, "echo", up.url + named, *words, "5") == 0
        wrong = query(keys, "client") + "&name=elsewhere.test"
        for other in ("", f"?ca={keys}/ca.pem", query(keys, "stranger"), wrong):
            assert run_client(caller, "echo", up.url + other, *words, "0.6") == UNAVAILABLE, other


@contextmanager
def served_with_keys(server: str, url: str, prefix: tuple[str, ...] = ()) -> Iterator[Served]:
    if not prefix:
        with served(url, server) as up:
            yield up
        return
    words = [*prefix, *peer(server), "serve", url]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Served(process, process.stdout.readline().removeprefix("ready ").strip())
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(10)


@of_servers
@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_other_hosts_need_keys(server: str, host: str, keys: Path) -> None:
    """A server takes no other host's calls unless it knows its clients, or is told to."""
    url = f"grpc+tcp://{host}:0"
    assert run_client(server, "serve", url) == REFUSED
    assert run_client(server, "serve", f"{url}?cert={keys}/server.pem&key={keys}/server.key") == (
        REFUSED
    )
    for allowed in ("?allow_remote=1", query(keys, "server")):
        up = start_server(url + allowed, server)
        up.process.terminate()
        assert up.process.wait(10) == 0
        kill(up.process)


@of_servers
def test_keys_that_are_of_no_use(server: str, keys: Path, tmp_path: Path) -> None:
    url = "grpc+tcp://127.0.0.1:0"
    missing = f"{url}?cert={tmp_path}/none.pem&key={tmp_path}/none.key"
    assert run_client(server, "serve", missing) == EXIT_STATUS + Status.NOT_FOUND
    (tmp_path / "bad.pem").write_text("no certificate")
    bad = f"{url}?cert={tmp_path}/bad.pem&key={keys}/server.key"
    assert run_client(server, "serve", bad) == EXIT_STATUS + Status.INVALID_ARGUMENT


@needs_root
@of_servers
@of_clients
def test_two_hosts(server: str, caller: str, keys: Path) -> None:
    """In two network namespaces: with keys echo and stream pass across; without, nothing does."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is missing")
    names = [f"ipcb{os.getpid()}{side}" for side in "ab"]
    enter = [("ip", "netns", "exec", name) for name in names]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "v0", "netns", names[0], "type", "veth",
               "peer", "name", "v1", "netns", names[1])  # fmt: skip
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"v{number}")
            ip("-n", name, "link", "set", f"v{number}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        url = f"grpc+tcp://10.77.0.1:5001{query(keys, 'server')}"
        with served_with_keys(server, url, enter[0]) as up:

            def call(*words: str) -> int:
                done = subprocess.run(
                    [*enter[1], *peer(caller), *words], capture_output=True, timeout=20
                )
                return done.returncode

            ours = up.url + query(keys, "client")
            assert call("echo", ours, "--payload", "across", "--timeout", "5") == 0
            assert call("stream", ours, "--count", "200", "--size", "10000") == 0
            for other in ("", query(keys, "stranger")):
                words = ("echo", up.url + other, "--payload", "x", "--timeout", "0.6")
                assert call(*words) == UNAVAILABLE
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
