"""gRPC beyond the conformance suite: strangers, words, crowds; test_grpc_faults and test_grpc_keys
have the rest.

A stranger is a client of gRPC that knows nothing of this project: it learns the service by
reflection. The rows are those of the table of cases; `LEFT_OUT` says which have no meaning here.
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

import ipc_bridge
from grpc_support import SEEN_S, address, of_clients, of_schemes, of_servers
from ipc_bridge import Call, CallError, Service, Status, connect
from peer_support import peer, served, serving_own
from processes import fds, threads
from support import ROOT, until

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


def test_each_row_is_shown_or_left_out() -> None:
    """Every row of the table is shown by these tests or the conformance suite, or says why not."""
    mine = "".join(path.read_text() for path in (ROOT / "tests").glob("test_grpc*.py"))
    names = ("test_conformance.py", "test_arrival.py")
    others = "".join((ROOT / "tests" / name).read_text() for name in names)
    for row in range(1, 34):
        is_mine = re.search(rf"Row {row}\b", mine) is not None
        assert is_mine or row in LEFT_OUT or re.search(rf"[Rr]ows? (\d+ and )?{row}\b", others), row
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
try:
    call(call_request(method=70000), timeout=5)
    unknown = "none"
except grpc.RpcError as error:
    unknown = f"{error.code().name}: {error.details()}"
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
    "unknown": unknown,
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
        "unknown": "UNIMPLEMENTED: no unary method 70000",
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
        ("grpc+unix:///x?wait=spin", NO_SPIN),
        ("grpc+tcp://h:1?wait=adaptive", NO_SPIN),
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
    assert (done.returncode, done.stdout) == (2, "")
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
    packages = "grpcio grpcio-health-checking grpcio-reflection"
    what = f"FAILED_PRECONDITION: grpc is missing: pip install {packages}, grpc+unix:///x\n"
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
    with serving_own(f"grpc+unix://{place}/g", service) as url, ExitStack() as crowd:
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
