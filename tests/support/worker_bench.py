"""WorkerCore on a manual clock: events in, and everything it wants done, sorted by kind."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import TypeVar

from zmqcluster.core.worker import WorkerCore
from zmqcluster.core.worker_events import (
    Connected,
    FromMaster,
    HostReport,
    HostsReported,
    KillTask,
    RunTasks,
    Say,
    SendToMaster,
    StopWorker,
    WorkerEffect,
    WorkerEvent,
    WorkerSettings,
)
from zmqcluster.messages import (
    Assign,
    AttemptRef,
    Control,
    Heartbeat,
    HeartbeatAck,
    Hint,
    PoolOffer,
    TaskOrder,
    TaskResult,
    ToWorker,
    TypeOffer,
    Welcome,
)
from zmqcluster.model import DeviceId, Outcome, Pool

START_MS = 1_000_000
BEAT_MS = 5_000
TIMEOUT_MS = 15_000

OneMessage = TypeVar("OneMessage")
OneEffect = TypeVar("OneEffect")


def settings(*, slots: int = 2, sync_slots: int = 1, **overrides: object) -> WorkerSettings:
    """A device with the types quick (async) and slow (sync)."""
    fields: dict[str, object] = {
        "device_id": DeviceId("d1"),
        "boot_id": b"b" * 16,
        "name": "first",
        "task_types": (TypeOffer("quick", Pool.ASYNC), TypeOffer("slow", Pool.SYNC)),
        "pools": (PoolOffer(Pool.ASYNC, slots), PoolOffer(Pool.SYNC, sync_slots)),
        "master": "localhost:7989",
        "heartbeat_interval_ms": BEAT_MS,
        "device_timeout_ms": TIMEOUT_MS,
        **overrides,
    }
    return WorkerSettings(**fields)  # type: ignore[arg-type]  # Checked by msgspec's users: us.


def order(
    task_id: int,
    attempt: int = 1,
    task_type: str = "quick",
    *,
    start_within_ms: int = 0,
    timeout_ms: int = 60_000,
) -> TaskOrder:
    return TaskOrder(
        task_id, attempt, task_type, b"\x80", timeout_ms, start_within_ms=start_within_ms
    )


def done(
    task_id: int, attempt: int = 1, outcome: Outcome = Outcome.COMPLETED, result: bytes = b"\xc0"
) -> TaskResult:
    return TaskResult(task_id, attempt, outcome, result)


def ref(task_id: int, attempt: int = 1) -> AttemptRef:
    return AttemptRef(task_id, attempt)


class WorkerBench:
    """Feeds a core; take_*() empties what it wanted so far."""

    def __init__(self, chosen: WorkerSettings | None = None, kept: Iterable[TaskResult] = ()):
        self.now_ms = START_MS
        self.core = WorkerCore(chosen or settings(), Random(7), kept)
        self.effects: list[WorkerEffect] = []
        self.assign_seq = 0
        self.epoch = 1

    # --- what happens ---

    def feed(self, *events: WorkerEvent) -> None:
        self.effects.extend(self.core.handle(self.now_ms, *events))

    def hears(self, *messages: ToWorker | Hint) -> None:
        self.feed(*(FromMaster(one) for one in messages))

    def reports(self, *reports: HostReport) -> None:
        self.feed(HostsReported(reports))

    def advance(self, ms: int) -> None:
        """Let time pass as the runtime does: the core is asked whenever it wanted to be."""
        end_ms = self.now_ms + ms
        for _ in range(10_000):
            due_ms = self.core.next_ms(self.now_ms)
            assert due_ms > self.now_ms, "the core is owed nothing after a turn"
            if due_ms > end_ms:
                break
            self.now_ms = due_ms
            self.feed()
        else:
            raise AssertionError("the core asks for turns without end")
        self.now_ms = end_ms
        self.feed()

    def advance_with_acks(self, ms: int, step_ms: int = 1_000) -> None:
        """Let time pass beside a master that answers heartbeats."""
        for _ in range(ms // step_ms):
            self.advance(step_ms)
            self.ack_beats()

    def ack_beats(self, **fields: object) -> None:
        for beat in self.take_sent(Heartbeat):
            self.hears(self.beat_ack(beat.seq, beat.sent_ms, **fields))

    def beat_ack(self, seq: int, sent_ms: int, **fields: object) -> HeartbeatAck:
        chosen = {"epoch": self.epoch, "control": Control(), **fields}
        return HeartbeatAck(seq, sent_ms, **chosen)  # type: ignore[arg-type]  # As above.

    def welcome(self, **fields: object) -> Welcome:
        chosen: dict[str, object] = {"session": 1, "control": Control(), **fields}
        return Welcome(self.epoch, **chosen, **_PACE)  # type: ignore[arg-type]  # As above.

    def connect(self, **fields: object) -> None:
        """Connected, greeted, welcomed; all said meanwhile is taken away."""
        self.feed(Connected())
        self.hears(self.welcome(**fields))
        self.assign_seq = 0

    def opened(self) -> WorkerBench:
        self.connect()
        self.effects.clear()
        return self

    def assign(self, *orders: TaskOrder) -> None:
        self.assign_seq += 1
        self.hears(Assign(self.epoch, self.assign_seq, orders))

    def is_registered(self) -> bool:
        return self.core.is_registered

    # --- what it wants ---

    def take(self, kind: type[OneEffect]) -> list[OneEffect]:
        found: list[OneEffect] = [one for one in self.effects if isinstance(one, kind)]
        self.effects = [one for one in self.effects if not isinstance(one, kind)]
        return found

    def take_sent(self, kind: type[OneMessage]) -> list[OneMessage]:
        found: list[OneMessage] = []
        for effect in list(self.effects):
            if isinstance(effect, SendToMaster) and isinstance(effect.message, kind):
                found.append(effect.message)
                self.effects.remove(effect)
        return found

    def take_runs(self) -> list[tuple[int, int]]:
        return [
            (one.task_id, one.attempt) for effect in self.take(RunTasks) for one in effect.orders
        ]

    def take_kills(self) -> list[tuple[int, int, Outcome]]:
        return [(one.ref.task_id, one.ref.attempt, one.outcome) for one in self.take(KillTask)]

    def take_lines(self) -> list[str]:
        return [one.text for one in self.take(Say)]

    def take_stops(self) -> list[tuple[int, str]]:
        return [(one.code, one.text) for one in self.take(StopWorker)]


_PACE = {"heartbeat_interval_ms": BEAT_MS, "device_timeout_ms": TIMEOUT_MS}
