"""A server that misbehaves as it is told, to see that the harness notices:

    python tests/own_server.py [--corrupt N] [--stall S --every S] [--busy S] URL

Every N-th answer is wrong; it stands still for S seconds every S seconds; each call takes S longer.
"""

import argparse
import itertools
import signal
import time

import ipc_bridge
from ipc_bridge.service import ECHO, make_service


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--corrupt", type=int, default=0)
    parser.add_argument("--stall", type=float, default=0.0)
    parser.add_argument("--every", type=float, default=1.0)
    parser.add_argument("--busy", type=float, default=0.0)
    parser.add_argument("url")
    asked = parser.parse_args()
    calls = itertools.count(1)
    stall_at_s = time.monotonic() + asked.every

    def echo(call: ipc_bridge.Call, request: memoryview) -> bytes | memoryview:
        nonlocal stall_at_s
        if asked.stall and time.monotonic() >= stall_at_s:
            time.sleep(asked.stall)
            stall_at_s += asked.every
        if asked.busy:
            end_ns = time.perf_counter_ns() + int(asked.busy * 1e9)
            while time.perf_counter_ns() < end_ns:
                pass
        if asked.corrupt and next(calls) % asked.corrupt == 0:
            return bytes(byte ^ 1 for byte in bytes(request))
        return request

    service = make_service()
    service.unary(ECHO, echo)
    with ipc_bridge.serve(asked.url, service) as server:
        signal.signal(signal.SIGTERM, lambda *_: server.stop())
        print(f"ready {server.url}", flush=True)
        server.run()


if __name__ == "__main__":
    main()
