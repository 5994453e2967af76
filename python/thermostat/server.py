"""Serves until SIGTERM or Ctrl-C:  python -m thermostat.server URL"""

import signal
import sys

from ipc_bridge.endpoint import listen
from ipc_bridge.errors import Error
from thermostat.service import make_service


def main(url: str) -> int:
    try:
        with listen(url, make_service()) as server:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: server.stop())
            print(f"ready {server.url}", flush=True)  # whoever starts us waits for this line
            server.run()
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m thermostat.server URL")
    sys.exit(main(sys.argv[1]))
