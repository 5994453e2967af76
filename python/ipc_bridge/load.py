"""The load generator behind `bench`: calls that are timed, verified and counted, and their report.

Each client is a connection with a thread of its own. All keep one schedule: a warm-up that is not
counted, then the measured part; a call that is under way when that ends is still finished and
counted, so that a stall at the end is not lost.

Closed loop: a call follows the answer to the one before. Open loop (a rate): calls have a time at
which they are due, and their clock starts then, so that a stall is charged to every call that it
delays (no "coordinated omission"). The last moments before that time are spun, not slept: a sleeper
wakes up late by about what a call takes, and that would be charged as well.
"""

import array
import contextlib
import os
import resource
import threading
import time
from dataclasses import dataclass
from operator import sub
from typing import Any, NamedTuple

from ipc_bridge import frame
from ipc_bridge.endpoint import connect
from ipc_bridge.errors import CallError, Error, Status
from ipc_bridge.frame import Buffer
from ipc_bridge.service import ECHO, STAMP, Bridge, Pattern
from ipc_bridge.session import WINDOW_BYTES_DEFAULT
from ipc_bridge.system import checked, now_ns

ENDLESS = 1 << 63  # items of a stream that is left when the time is up
SPIN_NS = 200_000  # before a call is due: longer than a wake-up takes, also on a virtual machine
OVERRUN_NS = 1_000_000_000  # for calls that were due in time but are late; then they are given up
LOOK_NS = 1_000_000  # how far apart the looks at the clock shall be in a stream at full speed
LOOK_ITEMS_MAX = 1024  # and how many items, at most
P99_SAMPLES_MIN = 100  # with fewer, it would be the maximum under another name
P99_9_SAMPLES_MIN = 1000
CHILD = -1  # as a server's process: the one that stdio started


@dataclass(frozen=True)
class Plan:
    """What to call, how often, and for how long."""

    url: str
    op: str  # "echo", a unary call, or "stream"
    size_bytes: int
    duration_s: float
    warmup_s: float = 0.0
    rate_hz: float = 0.0  # of all clients together; 0: closed loop
    clients: int = 1
    method: int = 0  # of a service of one's own, whose answers are not verified; 0: the op's own
    payload: bytes | None = None  # of the calls of `method`; None: `size_bytes` of the pattern
    work_s: float = 0.0  # asleep after each item of a stream, as a consumer at work would be
    server_pid: int = 0  # whose use of the machine is reported as well; CHILD, or 0: nobody's
    window_bytes: int = WINDOW_BYTES_DEFAULT
    payload_bytes_max: int = frame.PAYLOAD_BYTES_MAX


class Schedule(NamedTuple):
    """When the warm-up and the measured part begin, and when that ends (monotonic ns)."""

    start_ns: int
    began_ns: int
    end_ns: int


class Usage(NamedTuple):
    """What this process has used."""

    user_s: float
    system_s: float
    voluntary: int  # context switches
    involuntary: int

    def since(self, then: "Usage") -> "Usage":
        """What came on top of an earlier one."""
        return Usage(
            self.user_s - then.user_s,
            self.system_s - then.system_s,
            self.voluntary - then.voluntary,
            self.involuntary - then.involuntary,
        )


class Switches(NamedTuple):
    """A thread's context switches."""

    voluntary: int
    involuntary: int


class ServerUsage(NamedTuple):
    """What another process has used, and its largest resident size."""

    cpu_s: float
    switches: dict[str, Switches]  # by thread: what one has done is gone when it ends
    memory_peak_bytes: int

    def all(self) -> Switches:
        """Context switches, of the threads that are still there."""
        ones = self.switches.values()
        return Switches(sum(one.voluntary for one in ones), sum(one.involuntary for one in ones))

    def since(self, then: "ServerUsage") -> "ServerUsage":
        """What came on top of an earlier one."""
        none = Switches(0, 0)
        switches = {
            thread: Switches(*map(sub, one, then.switches.get(thread, none)))
            for thread, one in self.switches.items()
        }
        return ServerUsage(self.cpu_s - then.cpu_s, switches, self.memory_peak_bytes)


class Worker:
    """One client, and what it measured."""

    def __init__(self, plan: Plan, bridge: Bridge, number: int) -> None:
        self.operations = 0
        self.operations_warmup = 0
        self.bytes = 0  # of the answers
        self.samples = array.array("Q")  # ns
        self.ages = array.array("Q")  # ns
        self.errors = 0
        self.error: Error | None = None  # the first
        self.failures = 0  # answers that differ from the pattern
        self.began_ns = 0  # of the measured part; 0: it was not reached
        self.ended_ns = 0
        self._plan = plan
        self._bridge = bridge
        self._number = number
        self._schedule = Schedule(0, 0, 0)
        self._turn_ns = 0  # when the next part of the schedule begins

    def run(self, schedule: Schedule) -> None:
        """Keep the schedule to its end, or until the connection is of no further use."""
        self._schedule = schedule
        self._turn_ns = schedule.began_ns
        try:
            if self._plan.op == "echo":
                self._call()
            elif self._plan.method:
                self._read_streams()
            elif self._plan.rate_hz:
                self._read_stamped_stream()
            else:
                self._read_stream()
        except Error as error:
            self._note(error)
        self.ended_ns = now_ns()

    def _call(self) -> None:
        """Unary calls. Payloads are made before the timed span, answers compared after it."""
        plan, schedule, pattern = self._plan, self._schedule, Pattern(self._plan.size_bytes)
        call, method = self._bridge.call, plan.method or ECHO
        interval_ns = 1e9 / plan.rate_hz if plan.rate_hz else 0.0
        index = self._number
        while True:
            payload: Buffer = pattern.item(index) if plan.payload is None else plan.payload
            start_ns = schedule.start_ns + int(index * interval_ns) if interval_ns else now_ns()
            if start_ns >= self._turn_ns and not self._turn(start_ns):
                return
            if not interval_ns:
                start_ns = now_ns()
            elif now_ns() < schedule.end_ns + OVERRUN_NS:
                sleep_until(start_ns)
            else:
                return
            try:
                reply = call(method, payload)
                self.samples.append(now_ns() - start_ns)
                self.operations += 1
                self.bytes += len(reply)
                if plan.method == 0 and not pattern.verifies(index, reply):
                    self.failures += 1
            except CallError as error:
                self._note(error)
                if error.status == Status.UNAVAILABLE:
                    return
            index += plan.clients

    def _read_stream(self) -> None:
        """One endless stream. A look at the clock costs about what a small item does, so they are
        as rare as LOOK_NS allows; leaving the loop cancels the stream."""
        size_bytes, work_s = self._plan.size_bytes, self._plan.work_s
        verifies = Pattern(size_bytes).verifies
        stride = left = 1  # items until the next look
        looked_ns = now_ns()
        for index, item in enumerate(self._bridge.stream(ENDLESS, size_bytes)):
            if not verifies(index, item):
                self.failures += 1
            if work_s:
                time.sleep(work_s)
            left -= 1
            if left:
                continue
            self._count(stride, stride * size_bytes)
            at_ns = now_ns()
            if at_ns >= self._turn_ns and not self._turn(at_ns):
                return
            quick = at_ns - looked_ns < LOOK_NS
            stride = left = min(2 * stride, LOOK_ITEMS_MAX) if quick else max(1, stride // 2)
            looked_ns = at_ns

    def _read_stamped_stream(self) -> None:
        """One endless, paced stream. The samples are latencies one way: from the time at which an
        item was sent to its arrival. Its age runs from the time at which it was due, by the
        producer's own pace, to the end of the work on it: it grows where a consumer is too slow,
        while the producer waits for it and the latency cannot show it."""
        size_bytes, work_s = self._plan.size_bytes, self._plan.work_s
        rate_hz = self._plan.rate_hz / self._plan.clients
        first_due_ns: int | None = None
        verifies, unpack = Pattern(size_bytes).verifies, STAMP.unpack_from
        items = self._bridge.stream(ENDLESS, size_bytes, rate_hz, stamped=True)
        for index, item in enumerate(items):
            at_ns = now_ns()
            if at_ns >= self._turn_ns and not self._turn(at_ns):
                return
            self._count(1, len(item))
            if len(item) == size_bytes and verifies(index, item, STAMP.size):
                sent_ns = unpack(item)[0]
                self.samples.append(max(0, at_ns - sent_ns))
                if first_due_ns is None:
                    first_due_ns = sent_ns - int(index * 1e9 / rate_hz)
                if work_s:
                    time.sleep(work_s)
                due_ns = first_due_ns + int(index * 1e9 / rate_hz)
                self.ages.append(max(0, now_ns() - due_ns))
            else:
                self.failures += 1

    def _read_streams(self) -> None:
        """The streams of a method of one's own, one after the other."""
        plan = self._plan
        payload = Pattern(plan.size_bytes).item(0) if plan.payload is None else plan.payload
        while now_ns() < self._turn_ns or self._turn(now_ns()):
            for item in self._bridge.call_stream(plan.method, payload):
                self._count(1, len(item))
                at_ns = now_ns()
                if at_ns >= self._turn_ns and not self._turn(at_ns):
                    return

    def _count(self, operations: int, count: int) -> None:
        self.operations += operations
        self.bytes += count

    def _turn(self, at_ns: int) -> bool:
        """A part of the schedule is over: begin the next one; False if that was the last."""
        schedule = self._schedule
        open_loop = self._plan.op == "echo" and self._plan.rate_hz > 0
        if self.began_ns == 0:
            self.operations_warmup = self.operations
            self.operations = self.bytes = 0
            del self.samples[:]
            del self.ages[:]
            # Where no call is due at a given time, the part has its full length, however late.
            self.began_ns = schedule.began_ns if open_loop else at_ns
            self._turn_ns = self.began_ns + schedule.end_ns - schedule.began_ns
            if at_ns < self._turn_ns:
                return True
        if open_loop:
            sleep_until(schedule.end_ns)  # no further call is due, but the part has its length
        return False

    def _note(self, error: Error) -> None:
        self.errors += 1
        self.error = self.error or error


class Result(NamedTuple):
    """What all clients measured together."""

    plan: Plan
    workers: list[Worker]
    usage: Usage  # of all calls, the warm-up's too: a look in between would disturb them
    server: ServerUsage | None  # of the same
    memory_peak_bytes: int

    def samples(self) -> "array.array[int]":
        """All latencies, in nanoseconds."""
        samples = array.array("Q")
        for worker in self._measured():
            samples += worker.samples
        return samples

    def ages(self) -> "array.array[int]":
        """Of the items of paced streams, in nanoseconds."""
        ages = array.array("Q")
        for worker in self._measured():
            ages += worker.ages
        return ages

    def error(self) -> Error | None:
        """The first error, or what stands for it: wrong answers."""
        for worker in self.workers:
            if worker.error:
                return worker.error
        failures = sum(worker.failures for worker in self.workers)
        if failures:
            what = f"{failures} answers differ from the pattern"
            return Error(Status.DATA_LOSS, what, self.plan.url)
        return None

    def report(self, language: str, version: str) -> dict[str, Any]:
        """The figures, by name."""
        plan, workers, usage = self.plan, self._measured(), self.usage
        size_bytes = plan.size_bytes if plan.payload is None else len(plan.payload)
        ended_ns = max((worker.ended_ns for worker in workers), default=0)
        seconds = (ended_ns - min((worker.began_ns for worker in workers), default=0)) / 1e9
        operations = sum(worker.operations for worker in workers)
        total_bytes = sum(worker.bytes for worker in workers)
        error = next((worker.error for worker in self.workers if worker.error), None)
        samples = self.samples()
        return {
            "language": language,
            "version": version,
            "url": plan.url,
            "op": plan.op,
            "size_bytes": size_bytes,
            "clients": plan.clients,
            "rate_hz": plan.rate_hz,
            "warmup_s": plan.warmup_s,
            "seconds": seconds,
            "operations": operations,
            "operations_warmup": sum(worker.operations_warmup for worker in workers),
            "bytes": total_bytes,
            "operations_per_second": operations / seconds if seconds else 0.0,
            "bytes_per_second": total_bytes / seconds if seconds else 0.0,
            "errors": sum(worker.errors for worker in self.workers),
            "error": str(error) if error else None,
            "verification_failures": sum(worker.failures for worker in self.workers),
            "samples": len(samples),
            "latency_ns": percentiles(samples),
            "age_ns": percentiles(self.ages(), P99_SAMPLES_MIN),
            "cpu_s": {"user": usage.user_s, "system": usage.system_s},
            "context_switches": {
                "voluntary": usage.voluntary,
                "involuntary": usage.involuntary,
            },
            "memory_peak_bytes": self.memory_peak_bytes,
            "server": self._report_server(),
        }

    def _report_server(self) -> dict[str, Any] | None:
        if self.server is None:
            return None
        return {
            "cpu_s": self.server.cpu_s,
            "context_switches": self.server.all()._asdict(),
            "memory_peak_bytes": self.server.memory_peak_bytes,
        }

    def _measured(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.began_ns]


def run(plan: Plan) -> Result:
    """Do what the plan says. Raises Error if a client cannot connect, or there is no such server
    process."""
    with contextlib.ExitStack() as connections:
        workers = []
        for number in range(plan.clients):
            bridge = connect(
                plan.url, window_bytes=plan.window_bytes, payload_bytes_max=plan.payload_bytes_max
            )
            workers.append(Worker(plan, connections.enter_context(bridge), number))
        server_pid = child_pid() if plan.server_pid == CHILD else plan.server_pid
        server_before = None
        if server_pid:
            forget_memory_peak(server_pid)  # of what it did for others before
            server_before = server_usage_now(server_pid)
        before = usage_now()
        start_ns = now_ns()
        began_ns = start_ns + int(plan.warmup_s * 1e9)
        schedule = Schedule(start_ns, began_ns, began_ns + int(plan.duration_s * 1e9))
        threads = [
            threading.Thread(target=worker.run, args=(schedule,), daemon=True) for worker in workers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        usage, server = usage_now().since(before), None
        if server_before:
            with contextlib.suppress(Error):  # it has gone: the calls have noticed, and say so
                server = server_usage_now(server_pid).since(server_before)
        return Result(plan, workers, usage, server, memory_peak_bytes())


def sleep_until(at_ns: int) -> None:
    """Sleep until shortly before a time, and spin the rest."""
    left_ns = at_ns - now_ns()
    if left_ns > SPIN_NS:
        time.sleep((left_ns - SPIN_NS) / 1e9)
    while now_ns() < at_ns:
        time.sleep(0)  # lets another thread have the GIL


def percentiles(samples: "array.array[int]", p99_min: int = 1) -> dict[str, int | None]:
    """Nearest rank: each is a time that occurred. None where there are too few samples; for the p99
    of latencies any number will do, as they are there to look at, and ages are not."""
    ordered, count = sorted(samples), len(samples)

    def at(per_mille: int, count_min: int = 1) -> int | None:
        return ordered[-(-count * per_mille // 1000) - 1] if count >= count_min else None

    return {
        "p50": at(500),
        "p90": at(900),
        "p99": at(990, p99_min),
        "p99_9": at(999, P99_9_SAMPLES_MIN),
        "max": at(1000),
    }


def usage_now() -> Usage:
    """All threads of this process, the children apart."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Usage(used.ru_utime, used.ru_stime, used.ru_nvcsw, used.ru_nivcsw)


def status_field(path: str, name: str) -> int:
    """A number of a status file of proc(5); 0 if it is not there."""
    with open(path, encoding="utf-8", errors="replace") as status:
        for line in status:
            if line.startswith(name):
                return int(line.split()[1])
    return 0


def memory_peak_bytes() -> int:
    """The largest resident size. (ru_maxrss of getrusage(2) would not do: a new program inherits
    that of the process that started it, and a harness is larger than what it starts.)"""
    return status_field("/proc/self/status", "VmHWM:") * 1024


def forget_memory_peak(pid: int) -> None:
    """Let the largest resident size of a process be that from here on: proc(5), clear_refs. Of one
    that is not ours, it stays that of its whole life."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/clear_refs", "wb", buffering=0) as file:
        file.write(b"5")


def server_usage_now(pid: int) -> ServerUsage:
    """All threads of another process. The time is that of its clock, clock_getcpuclockid(3), which
    counts nanoseconds, and the threads that have ended. Raises Error: NOT_FOUND."""
    path = f"/proc/{pid}"
    with checked("open", path):
        threads = os.listdir(f"{path}/task")
    with checked("clock_gettime", path):
        cpu_ns = time.clock_gettime_ns(~pid << 3 | 2)
    switches = {}
    for thread in threads:
        status = f"{path}/task/{thread}/status"
        with contextlib.suppress(OSError):  # it has just ended
            switches[thread] = Switches(
                status_field(status, "voluntary_ctxt_switches:"),
                status_field(status, "nonvoluntary_ctxt_switches:"),
            )
    with checked("open", path):
        memory_peak = status_field(f"{path}/status", "VmHWM:") * 1024
    return ServerUsage(cpu_ns / 1e9, switches, memory_peak)


def child_pid() -> int:
    """The process that the main thread has started. Raises Error: NOT_FOUND."""
    path = f"/proc/self/task/{os.getpid()}/children"
    with checked("open", path), open(path, encoding="ascii") as children:
        words = children.read().split()
    if not words:
        raise Error(Status.NOT_FOUND, "no server was started by this client", path)
    return int(words[0])
