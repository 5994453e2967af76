"""A model of the shm ring and of how its peers sleep, with store buffers: every order explored.

    make model

Two threads run the protocol of transports/ring.hpp, an access to shared memory a step. A store goes
into the thread's store buffer first, and reaches memory some time later: on "x86" in order, on
"weak" (as on aarch64) in any order that its releases allow. So a thread's load may overtake its own
earlier store, which no sequentially consistent model checker shows. Explored are all
interleavings, of the buffers too. It is an error if a reader takes what was not written, or if
nobody can go on while there is work to do: a lost wake-up.

`WEAKENED` takes one order away at a time, or a step of the way to sleep. What a relaxed order
permits, beyond delayed stores, is written out: there, a load stands where the processor might
perform it. (What this does not have is speculation past a branch, which no store may follow on any
processor: the load of the head in has_room is safe by that alone, and its acquire is for the
compiler.)
"""

import sys
from collections.abc import Callable, Generator
from functools import cache
from typing import Any, NamedTuple

LINES = 3  # of a ring; a record takes one, and one more holds the 0 that ends it
RECORDS = 4  # through the ring, so that it wraps
PUBLISH = 2  # records read before the writer is told: lazily, as the ring does

# What a thread does next: a word, then what it needs.
Step = tuple[Any, ...]
# A turn of a thread's loop: gives steps, is sent what was loaded, and returns the state of the next
# turn, or None once it is done.
Turn = Generator[Step, int, tuple[int, ...] | None]
Thread = Callable[..., Turn]

FENCE: Step = ("fence",)
SLEEP: Step = ("sleep", False)  # until a bell is there, and leaves it: 1
NAP: Step = ("sleep", True)  # or until the deadline, whenever that is: 0
HUSH: Step = ("hush",)  # take the bells that are there


def load(name: str) -> Step:
    return ("load", name)


def store(name: str, value: int, release: bool = False) -> Step:
    return ("store", name, value, release)


def need(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


class Protocol(NamedTuple):
    """The two sides; `weak` names what is missing."""

    weak: str = ""

    # --- the pieces, as in ring.hpp ---

    def commit(self, ring: str, tail: int) -> Turn:
        yield store(f"{ring} n {(tail + 1) % LINES}", 0)
        yield store(f"{ring} bytes {tail % LINES}", tail + 1)
        yield store(f"{ring} n {tail % LINES}", 1, release=self.weak != "commit relaxed")
        return None

    def take(self, ring: str, head: int) -> Generator[Step, int, bool]:
        """Read the record at `head`: False if there is none."""
        early = (
            (yield load(f"{ring} bytes {head % LINES}")) if self.weak == "read relaxed" else None
        )
        if not (yield load(f"{ring} n {head % LINES}")):
            return False
        if self.weak == "publish relaxed":  # the load waits until after the head is stored
            return True
        got = (yield load(f"{ring} bytes {head % LINES}")) if early is None else early
        need(got == head + 1, f"record {head} read as {got - 1}")
        return True

    def publish(self, ring: str, head: int, published: int) -> Turn:
        yield store(f"{ring} head", head, release=self.weak != "publish relaxed")
        if self.weak == "publish relaxed":
            for late in range(published, head):
                got = yield load(f"{ring} bytes {late % LINES}")
                need(got == late + 1, f"record {late} read as {got - 1}")
        return None

    def bell(self, peer: int) -> Turn:
        if self.weak != "no bell fence":
            yield FENCE
        if (yield load(f"asleep {peer}")) and (yield ("exchange", f"asleep {peer}", 0)):
            yield ("bell", peer)
        return None

    def arm(self, me: int) -> Turn:
        yield store(f"asleep {me}", 1)
        if self.weak != "no arm fence":
            yield FENCE
        return None

    def has_room(self, ring: str, tail: int, seen: int) -> Generator[Step, int, int]:
        """The peer's head, loaded only if the one that was `seen` leaves no room."""
        return seen if tail + 2 - seen <= LINES else (yield load(f"{ring} head"))

    def sleep(self, me: int, until: Step) -> Turn:
        """The rest of RingStream.sleep, once nothing was found after arming."""
        rings = yield until
        yield store(f"asleep {me}", 0)
        if rings:
            yield HUSH
        return None

    # --- a stream: side 0 writes, side 1 reads; each sleeps when it cannot ---

    def writer(self, tail: int, seen: int) -> Turn:
        if tail == RECORDS:
            return None
        seen = yield from self.has_room("ring", tail, seen)
        if tail + 2 - seen > LINES:
            yield from self.arm(0)
            seen = yield load("ring head")
            if tail + 2 - seen > LINES:
                yield from self.sleep(0, SLEEP)
            else:
                yield store("asleep 0", 0)
            return tail, seen
        yield from self.commit("ring", tail)
        yield from self.bell(1)
        return tail + 1, seen

    def reader(self, head: int, published: int) -> Turn:
        if head == RECORDS:
            return None
        if not (yield from self.take("ring", head)):
            yield from self.arm(1)
            if not (yield load(f"ring n {head % LINES}")):
                yield from self.sleep(1, SLEEP)
            else:
                yield store("asleep 1", 0)
            return head, published
        head += 1
        if head - published >= PUBLISH:
            yield from self.publish("ring", head, published)
            yield from self.bell(0)
            published = head
        return head, published

    # --- a ping-pong: each answers what has come. (There is always room.) ---

    def pinger(self, rounds: int, sent: int, naps: int) -> Turn:
        """Sends first, and waits as RingStream.sleep does, with a deadline that may come once."""
        if sent < min(rounds + 1, LINES):
            yield from self.commit("ping", sent)
            yield from self.bell(1)
            return rounds, sent + 1, naps
        if rounds == LINES:
            return None
        if (yield from self.take("pong", rounds)):
            return rounds + 1, sent, naps
        yield from self.arm(0)
        if (yield load(f"pong n {rounds % LINES}")):
            yield store("asleep 0", 0)
            return rounds, sent, naps
        yield from self.sleep(0, SLEEP if naps else NAP)
        return rounds, sent, 1

    def ponger(self, rounds: int, sent: int) -> Turn:
        """Waits as a loop of epoll does, which is told by RingStream.arm whether to sleep: nobody
        disarms, or takes the bells, when it wakes."""
        if sent < rounds:
            yield from self.commit("pong", sent)
            yield from self.bell(0)
            return rounds, sent + 1
        if rounds == LINES:
            return None
        if (yield from self.take("ping", rounds)):
            return rounds + 1, sent
        if self.weak != "bells taken late":
            yield HUSH
        yield from self.arm(1)
        if (yield load(f"ping n {rounds % LINES}")):
            yield store("asleep 1", 0)
            return rounds, sent
        if self.weak == "bells taken late":
            yield HUSH
        yield SLEEP
        return rounds, sent

    # --- both ways at once: one flag a side says that it waits for room, for a record, or both ---

    def left(self, tail: int, seen: int, head: int, published: int) -> Turn:
        return (yield from self.both(0, tail, seen, head, published))

    def right(self, tail: int, seen: int, head: int, published: int) -> Turn:
        return (yield from self.both(1, tail, seen, head, published))

    def both(self, me: int, tail: int, seen: int, head: int, published: int) -> Turn:
        out, come = f"ring{me}", f"ring{1 - me}"
        writes, reads = tail < LINES, head < LINES
        if not writes and not reads:
            return None
        if writes:
            seen = yield from self.has_room(out, tail, seen)
            if tail + 2 - seen <= LINES:
                yield from self.commit(out, tail)
                yield from self.bell(1 - me)
                return tail + 1, seen, head, published
        if reads and (yield from self.take(come, head)):
            head += 1
            if head - published >= PUBLISH:
                yield from self.publish(come, head, published)
                yield from self.bell(1 - me)
                published = head
            return tail, seen, head, published
        yield from self.arm(me)
        if writes and self.weak != "no look for room":
            seen = yield load(f"{out} head")
        room = writes and tail + 2 - seen <= LINES
        if room or (reads and (yield load(f"{come} n {head % LINES}"))):
            yield store(f"asleep {me}", 0)
        else:
            yield from self.sleep(me, SLEEP)
        return tail, seen, head, published


SCENARIOS: dict[str, Callable[[Protocol], tuple[Thread, Thread]]] = {
    "stream": lambda protocol: (protocol.writer, protocol.reader),
    "ping-pong": lambda protocol: (protocol.pinger, protocol.ponger),
    "both ways": lambda protocol: (protocol.left, protocol.right),
}
# What is missing, and on which processors that is an error. (x86 keeps loads in order, and stores;
# a compiler need not, which is what "read" and "publish" stand for there.)
WEAKENED = {
    "no bell fence": ("x86", "weak"),
    "no arm fence": ("x86", "weak"),
    "commit relaxed": ("weak",),
    "read relaxed": ("x86", "weak"),
    "publish relaxed": ("x86", "weak"),
    "bells taken late": ("x86", "weak"),
    "no look for room": ("x86", "weak"),
}


class Place(NamedTuple):
    """Where a thread stands: the state of its turn, what it has loaded in it, its stores under way
    (name, value, release), and whether its bell has rung."""

    turn: tuple[int, ...] | None
    loaded: tuple[int, ...]
    buffer: tuple[tuple[str, int, bool], ...]
    bell: bool


class Everything(NamedTuple):
    """A state of the whole."""

    places: tuple[Place, ...]
    memory: frozenset[tuple[str, int]]  # what is not 0


def explore(threads: tuple[Thread, ...], processor: str) -> tuple[int, str]:
    """Visit all states: how many there are, and what is wrong in one of them ("": nothing)."""

    @cache
    def ahead(who: int, turn: tuple[int, ...], loaded: tuple[int, ...]) -> Step:
        """The next step; at the end of a turn, "turn" and the next one's state."""
        run = threads[who](*turn)
        try:
            step = next(run)
            for value in loaded:
                step = run.send(value)
        except StopIteration as stop:
            return ("turn", stop.value)
        return step

    begun = (Place((0,) * (thread.__code__.co_argcount - 1), (), (), False) for thread in threads)
    start = Everything(tuple(begun), frozenset())
    seen, todo = {start}, [start]
    while todo:
        now = todo.pop()
        try:
            later = [
                new for who in range(len(threads)) for new in moves(now, who, ahead, processor)
            ]
        except AssertionError as error:
            return len(seen), str(error)
        if not later and any(place.turn is not None for place in now.places):
            return len(seen), "nobody can go on: a lost wake-up"
        for new in later:
            if new not in seen:
                seen.add(new)
                todo.append(new)
    return len(seen), ""


def moves(
    now: Everything, who: int, ahead: Callable[..., Any], processor: str
) -> Generator[Everything, None, None]:
    """The states that a thread, or its store buffer, can lead to."""
    me = now.places[who]
    memory = dict(now.memory)

    def new(place: Place, written: dict[str, int] | None = None) -> Everything:
        changed = memory | (written or {})
        places = (*now.places[:who], place, *now.places[who + 1 :])
        return Everything(places, frozenset(item for item in changed.items() if item[1]))

    for at, (name, value, release) in enumerate(me.buffer):
        before = me.buffer[:at]
        if at and (processor == "x86" or release or any(name == other[0] for other in before)):
            continue
        rest = (*before, *me.buffer[at + 1 :])
        yield new(me._replace(buffer=rest), {name: value})

    if me.turn is None:
        return
    word, *about = ahead(who, me.turn, me.loaded)
    on = me._replace(loaded=(*me.loaded, 0))
    if word == "turn":
        yield new(me._replace(turn=about[0], loaded=()))
    elif word == "load":
        own = [value for name, value, _ in me.buffer if name == about[0]]
        value = own[-1] if own else memory.get(about[0], 0)
        yield new(me._replace(loaded=(*me.loaded, value)))
    elif word == "store":
        yield new(on._replace(buffer=(*me.buffer, tuple(about))))
    elif word == "fence":
        if not me.buffer:
            yield new(on)
    elif word == "exchange":  # acts on memory: at once, after what the buffer holds for it
        waits = bool(me.buffer) if processor == "x86" else any(about[0] == s[0] for s in me.buffer)
        if not waits:
            old = memory.get(about[0], 0)
            yield new(me._replace(loaded=(*me.loaded, old)), {about[0]: about[1]})
    elif word == "bell":
        state = new(on)
        places = list(state.places)
        places[about[0]] = places[about[0]]._replace(bell=True)
        yield state._replace(places=tuple(places))
    elif word == "hush":
        yield new(on._replace(bell=False))
    elif word == "sleep":
        if me.bell:
            yield new(me._replace(loaded=(*me.loaded, 1)))
        if about[0]:
            yield new(on)


def check(weak: str, processor: str) -> tuple[int, str]:
    """Explore all scenarios with one order missing: the states, and what goes wrong."""
    total = 0
    for name, threads in SCENARIOS.items():
        states, wrong = explore(threads(Protocol(weak)), processor)
        total += states
        if wrong:
            return total, f"{name}: {wrong}"
    return total, ""


def main() -> int:
    """Print a line for each order that is taken away; 1 if one is not as it should be."""
    bad = False
    for processor in ("x86", "weak"):
        for weak in ("", *WEAKENED):
            states, wrong = check(weak, processor)
            expected = bool(weak) and processor in WEAKENED[weak]
            bad |= bool(wrong) != expected
            print(f"{processor:4}  {weak or 'whole':16} {states:8} states  {wrong or 'no error'}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
