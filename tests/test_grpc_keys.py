"""gRPC with TLS: keys on both sides, wrong ones, none; and two hosts."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from grpc_support import of_clients, of_servers
from hosts import needs_root
from peer_support import Served, kill, peer, run_client, served, start_server
from support import Exit


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
            assert run_client(caller, "echo", up.url + other, *words, "0.6") == Exit.UNAVAILABLE, (
                other
            )


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
    assert run_client(server, "serve", url) == Exit.PERMISSION_DENIED
    assert run_client(server, "serve", f"{url}?cert={keys}/server.pem&key={keys}/server.key") == (
        Exit.PERMISSION_DENIED
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
    assert run_client(server, "serve", missing) == Exit.NOT_FOUND
    (tmp_path / "bad.pem").write_text("no certificate")
    bad = f"{url}?cert={tmp_path}/bad.pem&key={keys}/server.key"
    assert run_client(server, "serve", bad) == Exit.INVALID_ARGUMENT


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
                assert call(*words) == Exit.UNAVAILABLE
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
