"""One run by name, and what came of it: a report, or the failure that anybody can repeat."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final

import msgspec
from msgspec import Struct

from tests.simulation.cluster import Report, SimCluster
from tests.simulation.options import Options, draw
from tests.simulation.world import Noted, Violation

EVENTS: Final = 20_000
# No run takes a tenth of it (and of the time its events take): whatever does, goes in circles.
RUN_S: Final = 10
EVENTS_A_SECOND: Final = 2_000
_TOLD: Final = 50


class Case(Struct, frozen=True):
    """Everything a run depends on, beside the code. events: of the part with faults."""

    options: Options
    events: int = EVENTS
    left_out: frozenset[int] = frozenset()

    @property
    def command(self) -> str:
        """What to type to see this very run."""
        seed = self.options.seed
        drawn = draw(seed)
        words = [f"python scripts/simulate.py --seed {seed} --events {self.events}"]
        for name in self.options.__struct_fields__:
            value = getattr(self.options, name)
            if value != getattr(drawn, name):
                words.append(f"--set {name}={value}")
        if self.left_out:
            words.append(f"--left-out {_told_numbers(self.left_out)}")
        return " ".join(words)


class Failure(Struct, frozen=True):
    """A run that broke a promise. check: where that was noticed, the same for the same trouble.

    trace: what happened last, oldest first. at_event, fault_number: how many there were by then.
    """

    case: Case
    check: str
    text: str
    trace: tuple[str, ...] = ()
    at_event: int = 0
    fault_number: int = 0


def case_of(seed: int, events: int = EVENTS) -> Case:
    return Case(draw(seed), events)


def run(
    case: Case,
    *,
    prepare: Callable[[SimCluster], object] | None = None,
    keeps_tape: bool = False,
) -> Report | Failure:
    """Run it. Whatever goes wrong in it is a Failure: a core must not raise either.

    prepare: called with the cluster before anything has happened. keeps_tape: see tape.py.
    """
    with _without_collector():
        return _run(case, prepare, keeps_tape=keeps_tape)


def _run(
    case: Case, prepare: Callable[[SimCluster], object] | None, *, keeps_tape: bool
) -> Report | Failure:
    cluster: SimCluster | None = None
    try:
        with _bounded(RUN_S + case.events // EVENTS_A_SECOND):
            cluster = SimCluster(case.options, case.left_out, keeps_tape=keeps_tape)
            if prepare is not None:
                prepare(cluster)
            return cluster.run(case.events)
    except Exception as error:  # noqa: BLE001  # The core under test may raise anything.
        return Failure(
            case,
            check_of(error),
            f"{type(error).__name__}: {error}",
            tuple(map(_told_entry, cluster.world.trace))[-_TOLD:] if cluster else (),
            cluster.world.events if cluster else 0,
            cluster.world.fault_number if cluster else 0,
        )


def check_of(error: BaseException) -> str:
    """Where this was noticed: kind, file and function of the first cause.

    Not the line: a replay knows a little less than the world, and may notice a little earlier.
    """
    while error.__context__ is not None:
        error = error.__context__
    places = [
        (Path(frame.f_code.co_filename).name, frame.f_code.co_name)
        for frame in _frames(error.__traceback__)
    ]
    # A check says so through fail(); what called it tells checks apart.
    while len(places) > 1 and places[-1][1] in ("fail", "_fail"):
        places.pop()
    name, function = places[-1]
    if isinstance(error, Violation) and error.promise:
        name, function = "history", error.promise
    return f"{type(error).__name__} in {name}, {function}()"


def parse_numbers(text: str) -> frozenset[int]:
    """ "1-3,7" -> {1, 2, 3, 7}. Raises ValueError."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def with_words(options: Options, words: list[str]) -> Options:
    """Options changed by "name=value" words. Raises ValueError naming the bad one."""
    raw = msgspec.structs.asdict(options)
    for word in words:
        name, _, value = word.partition("=")
        if name not in raw:
            raise ValueError(f"there is no option {name!r}; there are: {', '.join(raw)}")
        raw[name] = value
    return msgspec.convert(raw, Options, strict=False)


def _told_numbers(numbers: frozenset[int]) -> str:
    parts: list[str] = []
    ordered = sorted(numbers)
    first = 0
    for index, number in enumerate(ordered):
        if index + 1 == len(ordered) or ordered[index + 1] != number + 1:
            start = ordered[first]
            parts.append(str(number) if start == number else f"{start}-{number}")
            first = index + 1
    return ",".join(parts)


def _told_entry(entry: Noted) -> str:
    at_ms, what, more, _ = entry
    return f"{at_ms:>8} ms  " + " ".join(map(str, (what, *more)))


def _frames(traceback: TracebackType | None) -> Iterator[FrameType]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


@contextmanager
def _without_collector() -> Iterator[None]:
    """A run makes few cycles, and looking for them all the time takes a tenth of it.

    Afterwards only what it made is looked through: not, for each run, everything there is.
    """
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()
        gc.enable()


@contextmanager
def _bounded(seconds: int) -> Iterator[None]:
    """A machine that never comes back is a failure, too."""

    def on_alarm(_signal: int, _frame: FrameType | None) -> None:
        raise Violation(f"this run is not over after {seconds} s: something goes round in circles")

    former = signal.signal(signal.SIGALRM, on_alarm)
    # pytest-timeout uses the same timer: give it back as it was.
    former_s, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, former_s)
        signal.signal(signal.SIGALRM, former)
