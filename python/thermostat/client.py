"""Calls each method once:  python -m thermostat.client URL"""

import contextlib
import sys

from ipc_bridge.endpoint import dial
from ipc_bridge.errors import Error
from thermostat.service import Thermostat

TIMEOUT_S = 5.0


def main(url: str) -> int:
    try:
        with contextlib.closing(dial(url)) as client:
            thermostat = Thermostat(client)
            before = thermostat.set_target(22.0, TIMEOUT_S)
            print(f"the target was {before:.1f}")
            for reading in thermostat.watch(count=4, seconds=0.01, timeout=TIMEOUT_S):
                print(f"{reading.room:.2f}, on the way to {reading.target:.1f}")
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m thermostat.client URL")
    sys.exit(main(sys.argv[1]))
