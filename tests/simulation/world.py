"""Virtual time, chance, and the count of everything that happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from heapq import heappop, heappush
from random import Random
from typing import Any, Final

from tests.simulation.options import Options

# Something to do, and what with.
Thing = tuple[Callable[..., object], tuple[Any, ...]]

# When, what, more of it, and what was said.
Noted = tuple[int, str, tuple[Any, ...], bytes]

WALL_AT_ZERO: Final = 1_700_000_000_000
NEVER: Final = 1 << 60
_TRACED: Final = 60
_DIGESTED: Final = 1_024


class Alarm:
    """Wakes its owner at the earliest moment asked for since it last did. Costs few steps: a later
    wish waits for the earlier alarm, which then is set anew."""

    __slots__ = ("_armed_ms", "_due_ms", "_noted_ms", "_wake", "_world", "is_off")

    def __init__(self, world: World, wake: Callable[[], object]) -> None:
        self.is_off = False
        self._world = world
        self._wake = wake
        self._due_ms = self._armed_ms = NEVER
        # When the world will call anyway: a moment that is wished for again is there already.
        self._noted_ms: set[int] = set()

    def set(self, due_ms: int) -> None:
        """Wake at due_ms, whatever was wished before."""
        self._due_ms = due_ms
        if due_ms < self._armed_ms:
            self._armed_ms = due_ms
            if due_ms in self._noted_ms:
                return
            self._noted_ms.add(due_ms)
            self._world.at(due_ms - self._world.now_ms, self._fire, due_ms)

    def hurry(self, due_ms: int) -> None:
        """Wake at due_ms at the latest."""
        if due_ms < self._due_ms:
            self.set(due_ms)

    def _fire(self, armed_ms: int) -> None:
        self._noted_ms.discard(armed_ms)
        if armed_ms == self._armed_ms and not self.is_off:
            self._armed_ms = NEVER
            due_ms, self._due_ms = self._due_ms, NEVER
            if due_ms <= armed_ms:
                self._wake()
                return
            if due_ms < NEVER:
                self.set(due_ms)
        self._world.events -= 1


class Violation(AssertionError):
    """A promise was broken. Its text is the story. promise: the rule, when a history shows it."""

    def __init__(self, text: str, promise: str = "") -> None:
        super().__init__(text)
        self.promise = promise


class World:
    """One run: an agenda of things to happen, in order of time and of their making.

    rng draws what the world is like, chance what goes wrong in it. left_out: numbers of faults
    that are not injected in this run, though chance drew them. events: things that happened: a
    frame arrives or is lost on the way, a process wakes, a run begins or ends, a commit is done, a
    fault strikes. An alarm that was put off meanwhile is none.
    """

    def __init__(self, options: Options, left_out: frozenset[int] = frozenset()) -> None:
        self.options = options
        self.rng = Random(f"world {options.seed}")
        self.chance = Random(f"chance {options.seed}")
        self.now_ms = 0
        self.wall_step_ms = 0
        # How often somebody set the wall clock.
        self.wall_steps = 0
        # When the faults ended.
        self.healed_ms: int | None = None
        self.is_faulty = True
        self.events = 0
        self.faults: Counter[str] = Counter()
        self.fault_number = 0
        self.left_out = left_out
        # What the digest has not seen yet, as that is quicker with much at once; and a few before.
        self._noted: list[Noted] = []
        self._before: list[Noted] = []
        self._digest = blake2b(digest_size=16)
        # What happens at each moment from now on (ms), what of it is left of the one that is now,
        # and the moments to come, as a heap.
        self._agenda: dict[int, list[Thing]] = {0: []}
        self._left = iter(self._agenda[0])
        self._moments: list[int] = []

    @property
    def wall_ms(self) -> int:
        return WALL_AT_ZERO + self.now_ms + self.wall_step_ms

    @property
    def digest(self) -> str:
        """Of everything noted so far: two runs of one seed have the same."""
        self._take_in()
        return self._digest.hexdigest()

    @property
    def trace(self) -> list[Noted]:
        """What was noted last."""
        return [*self._before, *self._noted][-_TRACED:]

    def at(self, delay_ms: int, do: Callable[..., object], *args: Any) -> None:
        """Call do(*args) delay_ms from now."""
        due_ms = self.now_ms + delay_ms
        things = self._agenda.get(due_ms)
        if things is None:
            self._agenda[due_ms] = [(do, args)]
            heappush(self._moments, due_ms)
        else:
            things.append((do, args))

    def step(self) -> bool:
        """The next thing happens. False: nothing ever will."""
        for do, args in self._left:
            self.events += 1
            do(*args)
            return True
        if not self._moments:
            return False
        self._pass_on()
        return self.step()

    def run(self, events: int) -> None:
        """Until so many have happened."""
        while self.events < events:
            for do, args in self._left:
                self.events += 1
                do(*args)
                if self.events >= events:
                    return
            self._pass_on()

    def _pass_on(self) -> None:
        """Nothing is left to do now: time passes, until there is."""
        del self._agenda[self.now_ms]
        self.now_ms = heappop(self._moments)
        self._left = iter(self._agenda[self.now_ms])

    def note(self, what: str, *more: Any, data: bytes = b"") -> None:
        """Part of the trace; data: what was said, for the digest."""
        self._noted.append((self.now_ms, what, more, data))
        if len(self._noted) == _DIGESTED:
            self._take_in()

    def _take_in(self) -> None:
        noted, self._noted = self._noted, []
        self._before = noted[-_TRACED:]
        self._digest.update(repr([(at_ms, what) for at_ms, what, *_ in noted]).encode())
        self._digest.update(b"".join([data for *_, data in noted]))

    def fault(self, kind: str) -> bool:
        """A fault is about to be injected. False: not in this run."""
        if not self.is_faulty:
            return False
        self.fault_number += 1
        if self.fault_number in self.left_out:
            return False
        self.faults[kind] += 1
        self.note(kind, "is fault", self.fault_number)
        return True

    def roll(self, kind: str, rate: float) -> bool:
        """Does this fault happen here? rate: 0..1."""
        if not rate or not self.is_faulty:
            return False
        return self.chance.random() < rate and self.fault(kind)

    def every(self, mean_ms: int, kind: str, do: Callable[[], object]) -> None:
        """From now on, as long as faults are on, do this now and then; 0: never."""
        if mean_ms and self.is_faulty:
            wait_ms = 1 + int(self.chance.expovariate(1 / mean_ms))
            self.at(wait_ms, self._once, mean_ms, kind, do)

    def _once(self, mean_ms: int, kind: str, do: Callable[[], object]) -> None:
        if self.fault(kind):
            do()
        self.every(mean_ms, kind, do)
