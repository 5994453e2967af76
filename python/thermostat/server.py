"""Serves until SIGTERM or Ctrl-C:  python -m thermostat.server URL"""

import signal
import sys
import threading

from ipc_bridge.endpoint import listen
from ipc_bridge.errors import Error
from ipc_bridge.server import Callee
from ipc_bridge.system import Signals
from thermostat.service import make_service


def stop_at(signals: Signals, server: Callee) -> None:
    signals.wait()
    server.stop()


def main(url: str) -> int:
    signals = Signals(signal.SIGTERM, signal.SIGINT)
    try:
        with listen(url, make_service()) as server:
            threading.Thread(target=stop_at, args=(signals, server), daemon=True).start()
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
