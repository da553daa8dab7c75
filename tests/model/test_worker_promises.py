"""Whatever master, network and hosts do: nothing starts twice, and no result is lost."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.tiers import stateful
from tests.support.worker_bench import WorkerBench, order, ref, settings
from zmqcluster.core.worker import WorkerCore
from zmqcluster.core.worker_events import (
    Connected,
    Disconnected,
    ForgetResults,
    FromMaster,
    HandshakeFailed,
    KeyRefused,
    KillTask,
    RunTasks,
    SendToMaster,
    SpoolResults,
    StopWorker,
    WorkerEvent,
)
from zmqcluster.messages import (
    Abort,
    Assign,
    AttemptRef,
    Heartbeat,
    HelloAgain,
    Hint,
    ResultAck,
    Results,
    Started,
    TaskOrder,
    TaskResult,
    ToWorker,
)
from zmqcluster.model import Outcome

TASKS = st.integers(1, 6)
ATTEMPTS = st.integers(1, 3)
REFS = st.lists(st.builds(AttemptRef, TASKS, ATTEMPTS), max_size=4).map(tuple)
TYPES = st.sampled_from(["quick", "slow", "mystery"])
WINDOWS = st.sampled_from([0, 0, 300, 5_000])
EPOCHS = st.integers(1, 3)
SLOTS = 3

Key = tuple[int, int]


class WorkerPromises(RuleBasedStateMachine):
    """A hostile master, a flapping network, and hosts that end runs in any order."""

    @initialize(kept_bytes_max=st.sampled_from([400, 1 << 20]))
    def begin(self, kept_bytes_max: int) -> None:
        chosen = settings(slots=2, sync_slots=1, kept_bytes_max=kept_bytes_max)
        self.worker = WorkerBench(chosen)
        self.running: dict[Key, TaskOrder] = {}
        self.started: set[Key] = set()
        self.ended: dict[Key, TaskResult] = {}
        self.orders: dict[Key, TaskOrder] = {}
        # Orders with a start window: what hosts said, and what the master was told.
        self.reported: set[Key] = set()
        self.told: set[Key] = set()
        self.acked: set[Key] = set()
        self.seen: set[Key] = set()
        self.spooled: set[Key] = set()
        self.has_stopped = False

    def feed(self, *events: WorkerEvent) -> None:
        self.worker.feed(*events)
        self.obey()

    def begun(self) -> set[Key]:
        """What runs as far as the master should know."""
        return {
            key
            for key, one in self.running.items()
            if not one.start_within_ms or key in self.reported
        }

    def hear(self, message: ToWorker | Hint) -> None:
        self.feed(FromMaster(message))

    def obey(self) -> None:
        """Do what the core wants, and check each step."""
        effects, self.worker.effects = self.worker.effects, []
        for effect in effects:
            match effect:
                case RunTasks():
                    for one in effect.orders:
                        key = (one.task_id, one.attempt)
                        assert key not in self.started, "an attempt starts once"
                        tasks = {task_id for task_id, _ in self.running}
                        assert one.task_id not in tasks, "one attempt of a task at a time"
                        self.started.add(key)
                        self.orders[key] = one
                        self.running[key] = one
                case KillTask():
                    assert (effect.ref.task_id, effect.ref.attempt) in self.running
                case SpoolResults():
                    self.spooled |= {(one.task_id, one.attempt) for one in effect.results}
                case ForgetResults():
                    self.spooled -= {(one.task_id, one.attempt) for one in effect.refs}
                case SendToMaster(message=Results() as message):
                    for result in message.results:
                        key = (result.task_id, result.attempt)
                        assert self.ended.setdefault(key, result) == result
                        self.seen.add(key)
                case SendToMaster(message=Heartbeat() as message):
                    phases = {(one.task_id, one.attempt): one.phase for one in message.inventory}
                    assert {key for key, phase in phases.items() if phase == 1} == self.begun()
                    assert set(self.running) <= set(phases)
                case SendToMaster(message=Started() as message):
                    told = {(one.task_id, one.attempt) for one in message.refs}
                    windows = {key for key in told if self.orders[key].start_within_ms}
                    assert windows <= self.reported, "a start is told when its host has told it"
                    assert not windows & self.told, "... and once"
                    self.told |= windows
                case StopWorker():
                    self.has_stopped = True

    @rule()
    def connects(self) -> None:
        self.feed(Connected())
        self.hear(self.worker.welcome())

    @rule(event=st.sampled_from([Connected(), Disconnected(), KeyRefused(), HandshakeFailed()]))
    def link_changes(self, event: WorkerEvent) -> None:
        self.feed(event)

    @rule(
        epoch=st.sampled_from([1, 1, 1, 2, 3]),
        orders=st.lists(st.tuples(TASKS, ATTEMPTS, TYPES, WINDOWS), max_size=5),
    )
    def assigns(self, epoch: int, orders: list[tuple[int, int, str, int]]) -> None:
        built = tuple(order(t, a, kind, start_within_ms=w) for t, a, kind, w in orders)
        self.hear(Assign(epoch, 1, built))

    @rule(refs=REFS)
    def aborts(self, refs: tuple[AttemptRef, ...]) -> None:
        self.hear(Abort(refs))

    @rule(epoch=EPOCHS, refs=REFS)
    def hints(self, epoch: int, refs: tuple[AttemptRef, ...]) -> None:
        self.hear(Hint(epoch, 0, refs))

    @rule(epoch=EPOCHS)
    def restarts(self, epoch: int) -> None:
        self.hear(HelloAgain(epoch))

    @rule(epoch=EPOCHS)
    def welcomes(self, epoch: int) -> None:
        self.worker.epoch = epoch
        self.hear(self.worker.welcome())

    @precondition(lambda self: self.seen)
    @rule(data=st.data())
    def acknowledges(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.seen)))
        self.acked.add(key)
        self.hear(ResultAck((ref(*key), ref(99))))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def run_begins(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.running)))
        if self.running[key].start_within_ms:
            self.reported.add(key)
        for _ in range(2):
            self.worker.reports(Started((ref(*key),)))
            self.obey()

    @precondition(lambda self: self.running)
    @rule(
        data=st.data(),
        outcome=st.sampled_from([Outcome.COMPLETED, Outcome.FAILED, Outcome.RETURNED]),
        size=st.sampled_from([1, 500]),
    )
    def run_ends(self, data: st.DataObject, outcome: Outcome, size: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[key]
        result = TaskResult(*key, outcome, b"x" * size)
        self.worker.reports(result)
        self.obey()
        self.worker.reports(result)
        self.obey()

    @rule(ms=st.sampled_from([1, 60, 250, 3_000, 16_000]))
    def time_passes(self, ms: int) -> None:
        self.worker.advance(ms)
        self.obey()

    @invariant()
    def every_ended_run_is_kept_or_acknowledged(self) -> None:
        core: WorkerCore = self.worker.core
        kept = set(core._outbox)
        ended = (self.started - set(self.running)) | set(self.ended)
        assert ended <= kept | self.acked
        assert self.spooled <= kept
        assert core.running == len(self.running) <= SLOTS
        assert not self.has_stopped


TestWorkerPromises = WorkerPromises.TestCase
TestWorkerPromises.settings = stateful(examples=60, steps=40)
