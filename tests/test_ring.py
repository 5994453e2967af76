"""The ring under two threads, whole and with one memory order taken away: each is needed.

The same is explored, order by order, by the model (model_ring.py); here it is the code itself that
fails: a stress that loses a wake-up, or a race that ThreadSanitizer sees. (The single-threaded
tests are in cpp/test_ring.cpp.)
"""

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
RING = Path("ipc_bridge/transports/ring.hpp")
STRESS = ROOT / "tests" / "cpp" / "ring_stress.cpp"
LOST = 3  # of ring_stress: a wake-up was lost
RACE = 66  # of TSan
ROUNDS = "300000"
TRIES = 20  # of a stress that must find something by chance; it takes one on an idle machine
FENCE = "std::atomic_thread_fence(std::memory_order_seq_cst)"


class Mutant(NamedTuple):
    """An order that is taken away: what stands in a function of ring.hpp, and what instead."""

    function: str
    order: str
    weaker: str


FENCES = [Mutant(name, FENCE, "") for name in ("void arm()", "void ring_bell()")]
ORDERS = [
    Mutant("void commit(", "memory_order_release", "memory_order_relaxed"),
    Mutant("bool open()", "memory_order_acquire", "memory_order_relaxed"),
    Mutant("void publish()", "memory_order_release", "memory_order_relaxed"),
    Mutant("bool has_room(", "memory_order_acquire", "memory_order_relaxed"),
]


def build(directory: Path, mutant: Mutant | None, *flags: str) -> str:
    """The stress, against ring.hpp or a mutant of it."""
    text = (ROOT / "cpp" / RING).read_text()
    if mutant is not None:
        before, function, after = text.partition(mutant.function)
        assert function, f"no {mutant.function} in ring.hpp"
        body, end, rest = after.partition("\n    }\n")
        assert body.count(mutant.order) == 1, f"{mutant.function}: {mutant.order}"
        text = before + function + body.replace(mutant.order, mutant.weaker) + end + rest
    (directory / RING).parent.mkdir(parents=True)
    (directory / RING).write_text(text)
    program = str(directory / "stress")
    places = [f"-I{directory}", f"-I{ROOT / 'cpp'}"]
    words = ["g++", "-std=c++20", *flags, "-w", *places, str(STRESS), "-o", program, "-pthread"]
    subprocess.run(words, check=True, timeout=120)
    return program


def run(*words: str) -> int:
    environment = os.environ | {"TSAN_OPTIONS": f"exitcode={RACE} halt_on_error=1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=100, env=environment)
    assert "FATAL" not in done.stderr, done.stderr
    return done.returncode


needs_two_cores = pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="on one core nobody looks while the other writes"
)


def test_no_wake_up_is_lost(tmp_path: Path) -> None:
    assert run(build(tmp_path, None, "-O2"), "pingpong", ROUNDS) == 0


@needs_two_cores
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="another processor, other chances")
@pytest.mark.parametrize("mutant", FENCES, ids=lambda mutant: mutant.function)
def test_without_a_fence_a_wake_up_is_lost(mutant: Mutant, tmp_path: Path) -> None:
    program = build(tmp_path, mutant, "-O2")
    assert any(run(program, "pingpong", ROUNDS) == LOST for _ in range(TRIES))


@pytest.fixture(scope="module")
def tsan(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The flag, where there is such a library."""
    source = tmp_path_factory.mktemp("tsan") / "nothing.cpp"
    source.write_text("int main() {}")
    words = ["g++", "-fsanitize=thread", str(source), "-o", str(source.with_suffix(""))]
    if subprocess.run(words, capture_output=True).returncode:
        pytest.skip("no ThreadSanitizer here")
    return "-fsanitize=thread"


def test_no_race_in_the_ring(tsan: str, tmp_path: Path) -> None:
    program = build(tmp_path, None, "-O1", "-g", tsan)
    assert run(program, "flood", "3000000") == 0
    assert run(program, "pingpong", "3000") == 0


@pytest.mark.parametrize("mutant", ORDERS, ids=lambda mutant: mutant.function)
def test_without_an_order_there_is_a_race(tsan: str, mutant: Mutant, tmp_path: Path) -> None:
    program = build(tmp_path, mutant, "-O1", "-g", tsan)
    assert run(program, "flood", "3000000") == RACE
    shutil.rmtree(tmp_path)
