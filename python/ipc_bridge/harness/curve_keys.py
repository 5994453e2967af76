"""`ipc-bridge curve-keys DIR`: the keys that encrypt ZeroMQ, and say who may come.

    ipc-bridge curve-keys keys
    ipc-bridge-peer serve 'zmq+tcp://192.0.2.1:5000?curve=keys/server.keys'
    ipc-bridge-peer echo 'zmq+tcp://192.0.2.1:5000?curve=keys/client.keys' --payload hello

Bring client.keys to the other host by a way that you trust. A further client is a further file of
its own, made in another directory, and a line `client PUBLIC_KEY` in server.keys.
"""

import os
from pathlib import Path

import click
import zmq

from ipc_bridge.system import checked

HEAD = "# CURVE keys of a {} (IPC Bridge, ZeroMQ). Keep them secret.\n"


def make_keys(directory: Path) -> list[Path]:
    """Write server.keys and client.keys, mode 0600, or none. Raises Error: ALREADY_EXISTS."""
    server_public, server_secret = (key.decode() for key in zmq.curve_keypair())
    client_public, client_secret = (key.decode() for key in zmq.curve_keypair())
    with checked("mkdir", directory):
        directory.mkdir(mode=0o700, exist_ok=True)
    texts = {
        "server": f"secret {server_secret}\npublic {server_public}\nclient {client_public}\n",
        "client": f"secret {client_secret}\npublic {client_public}\nserver {server_public}\n",
    }
    made: list[Path] = []
    try:
        for name, text in texts.items():
            path = directory / f"{name}.keys"
            with checked("open", path):
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            made.append(path)
            with os.fdopen(fd, "w") as file:
                file.write(HEAD.format(name) + text)
    except BaseException:  # half a pair fits no other half
        for path in made:
            path.unlink()
        raise
    return made


@click.command(name="curve-keys")
@click.argument("directory", type=click.Path(path_type=Path))
def curve_keys(directory: Path) -> None:
    """Make the keys of a server and a client of ZeroMQ in DIRECTORY, for `?curve=FILE`."""
    for path in make_keys(directory):
        click.echo(str(path))
