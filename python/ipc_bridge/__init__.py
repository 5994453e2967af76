"""IPC Bridge: one echo and stream service over every local transport, C++ and Python on either end.

from ipc_bridge import connect

with connect("unix:///tmp/demo.sock") as bridge:
    reply = bridge.echo(b"hello", timeout=1.0)
    for item in bridge.stream(count=1000, size=4096):
        ...
"""

from ipc_bridge.endpoint import connect, dial, listen, serve, transport
from ipc_bridge.errors import CallError, Error, ProtocolError, Status, UsageError
from ipc_bridge.handlers import Call, Pause, Service
from ipc_bridge.server import Server
from ipc_bridge.service import Bridge, make_service
from ipc_bridge.system import Wait

__version__ = "0.1.0"

__all__ = [
    "Bridge",
    "Call",
    "CallError",
    "Error",
    "Pause",
    "ProtocolError",
    "Server",
    "Service",
    "Status",
    "UsageError",
    "Wait",
    "connect",
    "dial",
    "listen",
    "make_service",
    "serve",
    "transport",
]
