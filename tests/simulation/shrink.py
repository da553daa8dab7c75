"""A failing run, made as small as it gets while the same check still fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import msgspec
from msgspec import Struct

from tests.simulation.cluster import SimCluster
from tests.simulation.options import FAULTS
from tests.simulation.runs import Case, Failure, check_of, run
from tests.simulation.tape import (
    Boot,
    MasterOp,
    Replay,
    Turned,
    WorkerTape,
    master_test,
    replay_worker,
    worker_test,
)
from zmqcluster.core.settings import Settings

T = TypeVar("T")

# What may be smaller, and the sizes that are tried, the smallest first.
_SMALLER: Final[dict[str, tuple[object, ...]]] = {
    "devices": (1, 2),
    "clients": (1,),
    "tasks": (0, 4, 20),
    "pages": (1, 3, 10),
    "origins": (1,),
    "slots": (1,),
    "strategy": ("least_tasks",),
    "latency_ms": (1,),
    "delay_ms": (0,),
    "concurrency": (0,),
    "retention_ms": (604_800_000,),
    "window_tasks": (50_000,),
    "lane_tasks": (4_096,),
    "delayed_tasks": (4_096,),
}


class Small(Struct, frozen=True):
    """failure: of the smallest run found. test: a pytest file; empty when no core alone fails."""

    failure: Failure
    test: str

    @property
    def text(self) -> str:
        """For people."""
        told = [
            f"smallest run: {self.failure.case.command}",
            f"{self.failure.check}, event {self.failure.at_event}",
            self.failure.text,
        ]
        if self.test:
            return "\n".join((*told, "as a plain test:", self.test))
        alone = "It takes the whole cluster: no core fails by what it was given alone. The end:"
        return "\n".join((*told, alone, *self.failure.trace))


def shrink(failure: Failure, seconds: float, say: Callable[[str], object]) -> Small:
    """The smallest case found within about so many seconds of real time."""
    shrinker = _Shrinker(failure, time.monotonic() + seconds, say)
    for step in (
        shrinker.cut,
        shrinker.drop_fault_classes,
        shrinker.be_smaller,
        shrinker.cut,
        shrinker.drop_faults,
    ):
        step()
        say(f"  {step.__name__}: {shrinker.best.case.command}")
    return Small(shrinker.best, plain_test(shrinker.best, seconds / 2))


class _Shrinker:
    """best: the smallest failure so far; every attempt that fails alike takes its place."""

    def __init__(self, failure: Failure, until_s: float, say: Callable[[str], object]) -> None:
        self.best = failure
        self._check = failure.check
        self._events = failure.case.events
        self._until_s = until_s
        self._faults = 0

    def cut(self) -> None:
        """Fewer events: what comes after the failure is not needed, and perhaps not all before."""
        if self.best.at_event < self.best.case.events:
            self._try(events=self.best.at_event)
        for part in (8, 4, 2):
            while self._try(events=self.best.case.events * (part - 1) // part - 1):
                pass

    def drop_fault_classes(self) -> None:
        for fault in FAULTS:
            options = self.best.case.options
            if options.without(fault) != options:
                self._try(options=options.without(fault), events=self._events)

    def be_smaller(self) -> None:
        for name, sizes in _SMALLER.items():
            for size in sizes:
                options = self.best.case.options
                if getattr(options, name) == size:
                    break
                smaller = msgspec.structs.replace(options, **{name: size})
                if self._try(options=smaller, events=self._events):
                    break

    def drop_faults(self) -> None:
        """Of what was injected, only what it takes."""
        number = self.best.fault_number
        out = self.best.case.left_out
        injected = [one for one in range(1, number + 1) if one not in out]

        def fails(kept: Sequence[int]) -> bool:
            # Faults beyond those seen so far stay out, too.
            gone = frozenset(range(1, number + 1)) - frozenset(kept)
            return self._try(left_out=gone)

        minimised(injected, fails, self._until_s)

    def _try(self, **changes: object) -> bool:
        if time.monotonic() > self._until_s:
            return False
        case = msgspec.structs.replace(self.best.case, **changes)
        if case.events < 1 or case == self.best.case:
            return False
        outcome = run(case)
        if not isinstance(outcome, Failure) or outcome.check != self._check:
            return False
        if outcome.at_event < case.events:
            outcome = msgspec.structs.replace(
                outcome, case=msgspec.structs.replace(case, events=outcome.at_event)
            )
        self.best = outcome
        return True


def minimised(items: Sequence[T], fails: Callable[[Sequence[T]], bool], until_s: float) -> list[T]:
    """ddmin (Zeller): a sub-sequence that fails, of which no part found can be left out."""
    kept = list(items)
    parts = 2
    while len(kept) > 1 and time.monotonic() < until_s:
        size = max(1, len(kept) // parts)
        for start in range(0, len(kept), size):
            fewer = kept[:start] + kept[start + size :]
            if fails(fewer):
                kept = fewer
                parts = max(2, parts - 1)
                break
        else:
            if size == 1:
                break
            parts = min(len(kept), 2 * parts)
    return kept


# --- a plain test -------------------------------------------------------------------------------


class _Tapes(Struct):
    settings: Settings | None = None
    master: list[MasterOp] = []
    workers: list[WorkerTape] = []


def plain_test(failure: Failure, seconds: float) -> str:
    """A pytest file that fails the same check without a world; empty: no core does so alone."""
    until_s = time.monotonic() + seconds
    tapes = _record(failure.case)
    name = f"seed_{failure.case.options.seed}"
    why = f"{failure.text.splitlines()[0][:80]} ({failure.check})".replace('"', "'")
    settings = tapes.settings
    if settings is not None:

        def master_fails(ops: Sequence[MasterOp]) -> bool:
            return _fails_at(failure.check, lambda: Replay(settings).play(_begun(ops)))

        ops = _one_event_a_turn(tapes.master)
        if not master_fails(ops):
            ops = tapes.master
        if master_fails(ops):
            ops = minimised(ops, master_fails, until_s)
            return master_test(name, why, settings, _begun(ops))
    for tape in tapes.workers:

        def worker_fails(turns: Sequence[object], tape: WorkerTape = tape) -> bool:
            fewer = msgspec.structs.replace(tape, turns=list(turns))
            return _fails_at(failure.check, lambda: replay_worker(fewer))

        if worker_fails(tape.turns):
            tape.turns = minimised(tape.turns, worker_fails, until_s)
            return worker_test(name, why, tape)
    return ""


def _record(case: Case) -> _Tapes:
    tapes = _Tapes()

    def prepare(cluster: SimCluster) -> None:
        tapes.settings = cluster.master.settings
        tapes.master = cluster.master.tape
        tapes.workers = cluster.tapes

    run(case, prepare=prepare, keeps_tape=True)
    return tapes


def _begun(ops: Sequence[MasterOp]) -> list[MasterOp]:
    """There is a master before it turns, whatever was left out."""
    if ops and isinstance(ops[0], Boot):
        return list(ops)
    return [Boot(1_700_000_000_000), *ops]


def _one_event_a_turn(ops: Sequence[MasterOp]) -> list[MasterOp]:
    found: list[MasterOp] = []
    for op in ops:
        if isinstance(op, Turned) and len(op.events) > 1:
            found += [Turned(op.now_ms, (one,)) for one in op.events]
        else:
            found.append(op)
    return found


def _fails_at(check: str, do: Callable[[], object]) -> bool:
    try:
        do()
    except Exception as error:  # noqa: BLE001  # The core under test may raise anything.
        return check_of(error) == check
    return False
