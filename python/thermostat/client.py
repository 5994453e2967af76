"""Calls each method once:  python -m thermostat.client URL"""

import contextlib
import sys

from ipc_bridge.client import Caller
from ipc_bridge.endpoint import dial
from ipc_bridge.errors import Error
from thermostat.service import READING, SET_TARGET, TARGET, WATCH, WATCH_REQUEST

TIMEOUT_S = 5.0


def talk(client: Caller) -> None:
    """Edit this: the calls. A reply or item is a view that lives until the next."""
    reply = client.call(SET_TARGET, TARGET.pack(22.0), TIMEOUT_S)
    (before,) = TARGET.unpack(reply)
    print(f"the target was {before:.1f}")

    request = WATCH_REQUEST.pack(4, 0.01)
    for item in client.call_stream(WATCH, request, TIMEOUT_S):
        room, target = READING.unpack(item)  # leaving the loop early cancels
        print(f"{room:.2f}, on the way to {target:.1f}")


def main(url: str) -> int:
    try:
        with contextlib.closing(dial(url)) as client:
            talk(client)
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m thermostat.client URL")
    sys.exit(main(sys.argv[1]))
