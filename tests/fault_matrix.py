"""What can go wrong, what happens then, and which tests show it on which transport.

`python tests/fault_matrix.py` writes the table of docs/faults.md from what pytest collects;
test_fault_matrix.py holds both together. A case that is neither shown nor left out for a reason is
a gap, and fails there.
"""

import re
import subprocess
import sys
from typing import NamedTuple

from support import ROOT, TRANSPORTS

PAGE = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- the matrix: made by tests/fault_matrix.py -->\n", "<!-- end of the matrix -->\n"
ORDER = sorted(TRANSPORTS, key=lambda name: (name.startswith(("zmq", "grpc")), name == "stdio"))

Names = tuple[str, ...]
GRPC: Names = ("grpc+unix", "grpc+tcp")
ZMQ: Names = ("zmq+ipc", "zmq+tcp")
SYSV: Names = ("sysv-queue", "sysv-shm")
TCP: Names = ("tcp", "zmq+tcp", "grpc+tcp")


class Case(NamedTuple):
    """A row: the tests by name, with the transports where their ids do not tell; and the reasons of
    what is left out, by transport."""

    what: str
    then: str
    tests: dict[str, Names | None]
    left_out: dict[Names, str]


def shown_by(*names: str, **at: Names) -> dict[str, Names | None]:
    return {**dict.fromkeys(names), **at}


NO_FRAMES: dict[Names, str] = {GRPC: "gRPC has no frames of ours; its own are tested with garbage"}
ONE_CLIENT: dict[Names, str] = {("stdio",): "One client, and it has started the server itself"}
NO_FILE: dict[Names, str] = {TCP: "A port has no owner and leaves no file"}

CASES = {
    1: Case("payloads of 0 bytes, 1 byte, all values", "come back equal",
        shown_by("test_any_bytes_come_back"), {}),
    2: Case("sizes at every limit, one more, one less", "come back equal",
        shown_by("test_sizes_around_every_buffer"), {}),
    3: Case("a ring wraps at any offset; its indices pass 2^32, 2^64", "come back equal",
        shown_by(test_indices_that_wrap=("shm",)),
        {tuple(name for name in TRANSPORTS if name != "shm"): "No ring"}),
    4: Case("64 MiB; one byte above the largest payload",
        "equal; RESOURCE_EXHAUSTED, and the connection lives",
        shown_by("test_large_payloads"), {}),
    5: Case("a declared size of 4 GiB, nothing sent", "refused; no memory is taken",
        shown_by("test_a_declared_size_makes_no_room",
                 test_a_stdio_server_refuses_and_leaves=("stdio",)), NO_FRAMES),
    6: Case("wrong magic, other version, any bit flipped, cut short",
        "a typed error for that client alone",
        shown_by("test_a_client_that_breaks_the_rules_is_refused", "test_any_bit_of_a_call_flipped",
                 "test_a_frame_cut_short_anywhere", "test_garbage_disturbs_nobody",
                 test_a_stdio_server_refuses_and_leaves=("stdio",),
                 test_a_stdio_frame_cut_short_anywhere=("stdio",)), {}),
    7: Case("one byte a write; many frames a read", "equal",
        shown_by("test_one_byte_a_write", "test_many_frames_in_one_write",
                 test_stdio_frames_in_any_pieces=("stdio",)), NO_FRAMES),
    8: Case("streams of 0, 1, a million items", "exact count, order and bytes; one end",
        shown_by("test_streams_of_any_length"), {}),
    9: Case("a window of one byte", "each item waits for the credit of the one before",
        shown_by("test_a_window_of_one_byte"), {}),
    10: Case("a reader stops; leaves early and sends 8 MiB",
        "no deadlock; the producer runs ahead by the window at most",
        shown_by("test_a_reader_that_stops_stops_the_producer",
                 "test_a_stream_left_early_makes_way_for_a_large_call"), {}),
    11: Case("cancel, at any moment, also as the end comes", "one end; the producer stops",
        shown_by("test_cancel_stops_the_producer", "test_cancel_races_the_end"), {}),
    12: Case("a deadline of 0, of 1 ms, midway, while sending",
        "DEADLINE_EXCEEDED in time; the server's work is freed",
        shown_by("test_a_deadline_frees_a_sleeping_handler", "test_a_deadline_midway_in_a_stream",
                 "test_a_deadline_while_sending"), {}),
    13: Case("unknown method; a handler throws; a second call at once",
        "UNIMPLEMENTED; INTERNAL; FAILED_PRECONDITION; the connection lives",
        shown_by("test_a_failed_call_leaves_the_connection",
                 "test_a_second_call_on_a_busy_connection"), {}),
    14: Case("`kill -9` of the server", "UNAVAILABLE within 1 s, never a short success",
        shown_by("test_the_server_is_killed", "test_the_server_is_killed_in_mid_call",
                 "test_the_server_is_killed_however_one_waits"), {}),
    15: Case("`kill -9` of the client", "what it held is given back within 1 s",
        shown_by("test_the_client_is_killed_in_mid_stream",
                 test_a_stdio_server_goes_with_its_client=("stdio",)), {}),
    16: Case("killed at each step of a write or of setting up", "the next client is fine",
        shown_by("test_the_client_is_killed_at_each_step",
                 "test_a_server_killed_while_it_makes_or_uses_them"),
        {GRPC: "gRPC publishes nothing step by step", **ONE_CLIENT}),
    17: Case("SIGSTOP of either", "deadlines hold, others are served, no answer comes twice",
        shown_by("test_a_deadline_holds_against_a_stopped_server",
                 "test_a_stopped_client_disturbs_nobody",
                 test_a_deadline_while_sending=("stdio",)), {}),
    18: Case("the server restarts under a client", "UNAVAILABLE, never an answer to an older call",
        shown_by("test_the_server_is_restarted_under_a_client_object",
                 "test_a_restart_under_a_client"),
        ONE_CLIENT),
    19: Case("what a dead server left", "reclaimed, if its lock is free and it is ours",
        shown_by("test_stale_things_are_reclaimed", "test_objects_of_the_dead_are_reclaimed"),
        {**NO_FILE, **ONE_CLIENT}),
    20: Case("a second server at an address", "ALREADY_EXISTS within 1 s; the first is untouched",
        shown_by("test_a_second_server_is_told_so"), ONE_CLIENT),
    21: Case("a name that somebody has taken: link, file, other owner", "refused, and left alone",
        shown_by("test_a_squatted_name_is_refused_and_left_alone",
                 test_a_squatted_name_is_left_alone=("grpc+unix",)),
        {**NO_FILE, **ONE_CLIENT}),
    22: Case("another user connects", "refused",
        shown_by("test_another_user_is_refused", test_keys=("zmq+tcp",),
                 test_mutual_tls=("grpc+tcp",)),
        {("tcp",): "A socket of the loopback device has no owner", **ONE_CLIENT}),
    23: Case("the client is early", "it waits until its deadline",
        shown_by("test_a_client_waits_for_its_server", "test_without_a_server_a_client_gives_up"),
        ONE_CLIENT),
    24: Case("shared objects that are wrong: size, seal, key, index, length",
        "a typed error; no SIGBUS, nothing read or written outside",
        shown_by("test_a_server_that_breaks_the_mechanism",
                 "test_clients_that_break_the_mechanism"),
        {tuple(name for name in TRANSPORTS if name not in (*SYSV, "shm")): "Nothing is shared"}),
    25: Case("no descriptors, queues or segments are left",
        "RESOURCE_EXHAUSTED or a wait; no spinning; it recovers",
        shown_by("test_a_server_out_of_descriptors", "test_limits_reached_at_set_up"),
        {**ONE_CLIENT, GRPC: "gRPC accepts by itself, and does not let us choose",
         ZMQ: "libzmq ends the process or spins when accept(2) has no descriptor left"}),
    26: Case("`ipcrm` of what is in use", "UNAVAILABLE within 1 s",
        shown_by("test_ipcrm_of_live_objects", "test_ipcrm_at_any_moment",
                 test_ipcrm_while_a_client_arrives=SYSV,
                 test_ipcrm_while_a_server_makes=("sysv-shm",)),
        {tuple(name for name in TRANSPORTS if name not in SYSV): "No System V objects"}),
    27: Case("a hundred at once; ten thousand come and go", "fair; memory and descriptors flat",
        shown_by("test_many_clients_at_once", "test_a_hundred_clients_share_fairly",
                 "test_ten_thousand_come_and_go", "test_connects_and_disconnects"), ONE_CLIENT),
    28: Case("SIGALRM a thousand times a second", "no effect",
        shown_by("test_signals_all_the_time"), {}),
    29: Case("`http_proxy` is set", "no effect",
        shown_by(test_a_proxy_has_no_effect=GRPC),
        {tuple(name for name in TRANSPORTS if name not in GRPC): "No HTTP"}),
    30: Case("a crowd that never says hello", "it expires, and holds up nobody",
        shown_by("test_a_crowd_that_never_says_hello", "test_garbage_disturbs_nobody",
                 "test_a_thousand_who_never_finish_the_meeting"), ONE_CLIENT),
    31: Case("a print in a handler", "goes to stderr; the frames stay whole",
        shown_by(test_a_print_in_a_stdio_handler=("stdio",)),
        {tuple(name for name in TRANSPORTS if name != "stdio"): "Stdout is not the wire"}),
    32: Case("SIGTERM; Ctrl-C in a blocked client", "drained within the grace; gone within 2 s",
        shown_by("test_sigterm_cuts_an_endless_stream", "test_sigterm_lets_a_short_stream_end",
                 "test_a_signal_drains_and_leaves_nothing", "test_ctrl_c_ends_a_blocked_client",
                 "test_ctrl_c_ends_a_client_and_its_child"), {}),
    33: Case("a fork of a connected client", "FAILED_PRECONDITION in the child; the parent goes on",
        shown_by("test_a_fork_of_a_connected_client"), {}),
}  # fmt: skip


def collected() -> dict[str, set[str]]:
    """Of every test function, the transports that its ids name."""
    words = [
        sys.executable,
        "-m",
        "pytest",
        "tests",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    out = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found: dict[str, set[str]] = {}
    for name, parameters in re.findall(r"^tests/\w+\.py::(\w+)(.*)$", out, re.M):
        here = found.setdefault(name, set())
        for one in sorted(TRANSPORTS, key=len, reverse=True):  # sysv-shm is not shm
            if re.search(rf"[\[-]{re.escape(one)}[-\]]", parameters):
                here.add(one)
                parameters = parameters.replace(one, "")
    return found


def shown(case: Case, tests: dict[str, set[str]]) -> set[str]:
    """The transports on which a case is shown, by tests that are there."""
    on: set[str] = set()
    for name, at in case.tests.items():
        assert name in tests, f"no such test: {name}"
        on.update(tests[name] if at is None else at)
    return on


def table(tests: dict[str, set[str]]) -> str:
    """The matrix in Markdown, with the reasons of the gaps below."""
    heads = [name.replace("+", "+<br>") for name in ORDER]
    lines = [f"| | what goes wrong | what happens | {' | '.join(heads)} |"]
    lines.append(f"|{'---|' * (3 + len(ORDER))}")
    reasons: dict[str, int] = {}
    for number, case in CASES.items():
        on = shown(case, tests)
        marks = []
        for name in ORDER:
            why = [reason for names, reason in case.left_out.items() if name in names]
            marks.append("●" if name in on else f"[{reasons.setdefault(why[0], len(reasons) + 1)}]")
        lines.append(f"| {number} | {case.what} | {case.then} | {' | '.join(marks)} |")
    lines.append("")
    lines += [f"{number}. {reason}." for reason, number in reasons.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    text = PAGE.read_text()
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(head + BEGIN + "\n" + table(collected()) + "\n" + END + tail)


if __name__ == "__main__":
    main()
