"""gRPC: who finds what at an address, and what happens when a peer dies, stops or restarts."""

import contextlib
import os
import resource
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from grpc_support import (
    SEEN_S,
    address,
    of_clients,
    of_schemes,
    of_servers,
)
from ipc_bridge import CallError, Status, connect
from ipc_bridge.bridge_pb2 import CallRequest
from ipc_bridge.bridge_pb2_grpc import BridgeStub
from peer_support import client, ended, kill, run_client, served
from probe_support import SMALL, Client, Server, elapsed, of_each_language
from processes import cpu_s, fds, status_field, stopped
from support import (
    ANSWER_S,
    EXIT_S,
    LANGUAGES,
    MIB,
    SLOW,
    Exit,
    check_late,
    fixed_url,
    until,
    wait_until,
)

BRIDGE = "ipc_bridge.Bridge"
SERVING = HealthCheckResponse.SERVING
NOT_SERVING = HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = HealthCheckResponse.SERVICE_UNKNOWN

# --- starting and ending ---


@of_servers
def test_health_is_watched_to_the_end(server: str, place: Path) -> None:
    """By who knows the service's name, and who does not; those that leave disturb nobody."""
    with served(address("grpc+unix", place), server) as up, ExitStack() as stack:
        channel = stack.enter_context(grpc.insecure_channel(f"unix:{place}/g"))
        health: Any = HealthStub(channel)
        of = {name: HealthCheckRequest(service=name) for name in ("", BRIDGE, "nobody's")}
        passing = [health.Watch(of[BRIDGE]) for _ in range(50)]
        assert [next(watch).status for watch in passing] == [SERVING] * 50
        for watch in passing:
            watch.cancel()
        watches = {name: health.Watch(request) for name, request in of.items()}
        found = {name: next(watch).status for name, watch in watches.items()}
        assert found == {"": SERVING, BRIDGE: SERVING, "nobody's": SERVICE_UNKNOWN}
        assert health.Check(of[BRIDGE], timeout=ANSWER_S).status == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            health.Check(of["nobody's"], timeout=ANSWER_S)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        up.process.terminate()
        assert [next(watches[name]).status for name in ("", BRIDGE)] == [NOT_SERVING] * 2
        assert [next(watch, None) for watch in watches.values()] == [None] * 3  # none is cut
        assert up.process.wait(EXIT_S) == 0


@of_servers
@of_schemes
@pytest.mark.parametrize("second", LANGUAGES)
def test_a_second_server_is_told_so(scheme: str, server: str, second: str, place: Path) -> None:
    """Row 20: and the first one serves on, also after the second has left."""
    with served(address(scheme, place), server) as up:
        before = sorted(os.listdir(place))
        assert run_client(second, "serve", up.url) == Exit.ALREADY_EXISTS
        assert sorted(os.listdir(place)) == before
        with connect(up.url, timeout=5.0) as fresh:
            assert bytes(fresh.echo(b"first", timeout=SEEN_S)) == b"first"


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
        assert run_client(server, "serve", address("grpc+unix", tmp_path)) in (
            Exit.ALREADY_EXISTS,
            Exit.PERMISSION_DENIED,
        )
        assert path.lstat().st_ino == before.st_ino
        assert os.listdir(tmp_path) == ["g"]


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
                assert until(lambda: cpu_s(up.pid) > idle + 0.03)
            else:
                assert until(lambda: rests(process.pid))
            assert process.poll() is None
            up.process.kill()
            began = time.monotonic()
            assert ended(process) == Exit.UNAVAILABLE
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
            assert until(lambda: cpu_s(up.pid) > used + 0.03)
            process.kill()
            assert until(lambda: fds(up.pid) <= before, SEEN_S)
        assert until(lambda: rests(up.pid), 2 * SEEN_S), "the handler goes on"
        assert bytes(control.echo(b"after", timeout=SEEN_S)) == b"after"


@of_servers
@pytest.mark.parametrize("options", [(), ("--claims-not-to-block",)])
@pytest.mark.parametrize("end", ["cancel", "kill"])
def test_a_sleeping_handler_learns_of_its_clients_end(
    end: str, options: tuple[str, ...], server: str, place: Path
) -> None:
    """Rows 11 and 15: also in C++, where it sleeps in gRPC's own thread."""
    with Server(server, address("grpc+unix", place), *options) as up, ExitStack() as stack:
        control = stack.enter_context(Client("py", up.url))
        if end == "kill":
            victim = Client("py", up.url)
            stack.callback(victim.kill)
            victim.send(op="call", method=11, seconds=60.0)
            leave: Callable[[], object] = victim.kill
        else:
            channel = stack.enter_context(grpc.insecure_channel(f"unix:{place}/g"))
            request = CallRequest(method=11, payload=struct.pack("<d", 60.0))
            leave = BridgeStub(channel).Call.future(request).cancel
        wait_until(lambda: control.number(14) == 1, ANSWER_S, "the handler has begun")
        leave()
        wait_until(lambda: control.number(18) == 1, SEEN_S, "it has ended")
        assert control.number(14) == 0


@of_servers
@pytest.mark.parametrize("options", [(), ("--claims-not-to-block",)])
@pytest.mark.parametrize("method", [15, 19])
def test_items_are_sent_before_anything_else(
    method: int, options: tuple[str, ...], server: str, place: Path
) -> None:
    """Those that were made before the handler fails, or sleeps; also where a batch of several is
    the first to be sent, of which gRPC may keep some for a while."""
    with Server(server, address("grpc+unix", place), *options) as up, connect(up.url) as bridge:
        items = bridge.call_stream(method, timeout=4.0 * SLOW)  # keep-alive would send them after 5
        assert [len(item) for item in islice(items, 3)] == [64] * 3
        items.close()
        assert bytes(bridge.echo(b"next", timeout=ANSWER_S)) == b"next"


def test_a_call_without_a_thread_is_refused(place: Path) -> None:
    """And the server goes on. (In C++ a streaming call has a thread only from a pause on.)"""
    with served(address("grpc+unix", place), "py") as up, contextlib.ExitStack() as running:
        bridges = [running.enter_context(connect(up.url)) for _ in range(5)]
        size = status_field(up.pid, "VmSize") << 10  # a stack more is too much
        resource.prlimit(up.pid, resource.RLIMIT_AS, (size + MIB, resource.RLIM_INFINITY))
        slow = [iter(one.stream(10**9, 16, rate_hz=10.0, timeout=10.0)) for one in bridges]
        with pytest.raises(CallError) as caught:  # the hellos have left a few threads
            list(map(next, slow))
        assert caught.value.status == Status.RESOURCE_EXHAUSTED
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(up.pid, resource.RLIMIT_AS, unlimited)
        with connect(up.url) as fresh:
            assert bytes(fresh.echo(b"again", timeout=5.0)) == b"again"


def rests(pid: int) -> bool:
    """Does it use no CPU to speak of?"""
    before = cpu_s(pid)
    time.sleep(0.2)
    return cpu_s(pid) - before <= 0.02


@of_schemes
@of_servers
def test_a_deadline_holds_against_a_stopped_server(scheme: str, server: str, place: Path) -> None:
    """Row 17: and the next answer is not the one to the call before."""
    with served(address(scheme, place), server) as up, of_each_language(up.url) as clients:
        with stopped(up.pid):
            for client in clients:
                check_late(
                    0.4, partial(elapsed, client, op="echo", size=SMALL, seed=1, timeout=0.4)
                )
        for client in clients:
            client.do(op="echo", size=SMALL, seed=2, timeout=5.0)


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
    with fixed_url(scheme, tmp_path) as url, ExitStack() as running:
        with served(url, server) as first:
            clients = running.enter_context(of_each_language(url))
            kill(first.process)
        running.enter_context(served(url, server))
        for seed in range(1, 6):
            for client in clients:
                answer = client.ask(op="echo", size=SMALL, seed=seed, timeout=5.0)
                assert answer.get("status") in (None, "UNAVAILABLE"), client.popen.args


@pytest.mark.parametrize("scheme", ["grpc+tcp"])
def test_forks_in_mid_stream(scheme: str, place: Path) -> None:
    """Row 33: each child connects anew, and the parent misses no byte of its stream."""
    program = (
        "import os, sys; from ipc_bridge import connect; from ipc_bridge.service import Pattern\n"
        "url, verifies = sys.argv[1], Pattern(1000).verifies\n"
        "with connect(url) as bridge:\n"
        "    items = enumerate(bridge.stream(20_000, 1000))\n"
        "    for index, item in items:\n"
        "        assert verifies(index, item)\n"
        "        if index % 4000 == 0:\n"
        "            if (child := os.fork()) == 0:\n"
        "                code = 1\n"
        "                try:\n"
        "                    with connect(url, timeout=5.0) as mine:\n"
        "                        code = bytes(mine.echo(b'anew', timeout=5.0)) != b'anew'\n"
        "                finally:\n"
        "                    os._exit(code)\n"
        "            assert os.waitpid(child, 0)[1] == 0\n"
        "    assert index == 19_999\n"
    )
    with served(address(scheme, place), "cpp") as up:
        words = [sys.executable, "-c", program, up.url]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
