"""Whatever devices, clients, clocks and kills do, in any order: the master keeps its promises."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.support.core_audit import audit_store
from tests.support.master_bench import WALL_AT_ZERO, MasterBench, spec
from tests.support.model_worker import CREDIT, ModelWorker
from tests.support.tiers import stateful
from zmqcluster.core.rows import TaskRow
from zmqcluster.core.settings import Settings
from zmqcluster.messages import (
    CancelTasks,
    Changed,
    DrainDevice,
    Enrolled,
    RateRule,
    RetryTasks,
    RevokeDevice,
    SetStrategy,
    Submit,
    Submitted,
    TaskSpec,
)
from zmqcluster.model import Outcome, Pool, Strategy, TaskState

NAMES = ("d1", "d2", "d3")
# Who runs what; nobody runs mystery, and nobody is a unicorn.
TYPES = {
    "d1": {"noop": Pool.SYNC},
    "d2": {"noop": Pool.ASYNC, "echo": Pool.SYNC},
    "d3": {"echo": Pool.ASYNC},
}
LABELS = {"d1": (), "d2": ("gpu",), "d3": ("eu", "gpu", "zone")}
# Every bound is small, so that all of them are met in a few steps.
SETTINGS = Settings(
    window_tasks=8,
    lane_tasks=4,
    lanes=4,
    delayed_tasks=6,
    max_retry_count=1,
    retention_ms=10**12,
)
SLOW_MS = 1_000
RULES = (RateRule("slow", delay_ms=SLOW_MS), RateRule("one", concurrency=1))
OUTCOMES = st.sampled_from(
    [
        Outcome.COMPLETED,
        Outcome.COMPLETED,
        Outcome.COMPLETED,
        Outcome.FAILED,
        Outcome.RETRY,
        Outcome.REJECTED,
        Outcome.TIMED_OUT,
        Outcome.DIED,
    ]
)
SPECS = st.builds(
    lambda *fields: fields,
    st.sampled_from(["noop", "noop", "echo", "mystery"]),
    st.sampled_from([(), (), (), ("gpu",), ("gpu", "eu"), ("zone",), ("unicorn",)]),
    st.sampled_from(["", "", "a", "b", "c"]),
    st.sampled_from(["", "", "slow", "one", "k1", "k2", "k3"]),
    st.sampled_from([0, 5, 9]),
    st.sampled_from([0, 0, 0, -5_000, 700, 20_000]),
)
Spec = tuple[str, tuple[str, ...], str, str, int, int]
BATCHES = st.lists(SPECS, min_size=1, max_size=12)
DEVICES = st.sampled_from(NAMES)
HEAL_STEPS = 1_000


class MasterMachine(RuleBasedStateMachine):
    """Devices d1..d3 are honest; the network, the clocks and the operator are not kind."""

    @initialize()
    def start(self) -> None:
        self.bench = MasterBench(SETTINGS)
        self.workers = {
            name: ModelWorker(self.bench, name, TYPES[name], LABELS[name]) for name in NAMES
        }
        # Those of whom it is acknowledged, and who was meant by which request.
        self.revoked: set[str] = set()
        self.revocations: dict[bytes, str] = {}
        self.jobs = [0]
        self.requests: list[Submit] = []
        self.answers: dict[bytes, Submitted] = {}
        self.cancelled: dict[int, int] = {}
        self.cancels: dict[bytes, int] = {}
        self.retried: dict[int, int] = {}
        self.serial = 0
        for name in ("first", "second"):
            answer = self.bench.submit(job=name, rates=RULES)
            self.jobs.append(answer.job_id)
        for name in NAMES:
            self.enrol(name)

    # --- devices --------------------------------------------------------------------------------

    @rule(name=DEVICES)
    def connect(self, name: str) -> None:
        if not self.workers[name].is_linked:
            self.workers[name].connect()
            assert not (name in self.revoked and self.workers[name].in_session)

    @rule(name=DEVICES, is_noticed=st.booleans())
    def break_connection(self, name: str, is_noticed: bool) -> None:
        if self.workers[name].is_linked:
            self.workers[name].hang_up(is_noticed=is_noticed)

    @rule(name=DEVICES, is_noticed=st.booleans())
    def kill_worker(self, name: str, is_noticed: bool) -> None:
        if self.workers[name].is_linked:
            self.workers[name].reboot(is_noticed=is_noticed)

    @rule(name=DEVICES)
    def clone(self, name: str) -> None:
        """A copy of its data directory is started elsewhere, or here again after a kill."""
        if self.workers[name].is_linked:
            self.workers[name].reboot(is_noticed=False)
            self.workers[name].connect()

    @rule(name=DEVICES)
    def beat(self, name: str) -> None:
        self.workers[name].beat()

    @rule(name=DEVICES)
    def begin(self, name: str) -> None:
        self.workers[name].start_one()

    @rule(name=DEVICES, outcome=OUTCOMES, children=st.lists(SPECS, max_size=4))
    def finish(self, name: str, outcome: Outcome, children: list[Spec]) -> None:
        specs = tuple(self._spec(one) for one in children) if outcome is Outcome.COMPLETED else ()
        self.workers[name].finish_one(outcome, specs, retry_after_ms=3_000)

    @rule(name=DEVICES)
    def resend(self, name: str) -> None:
        self.workers[name].resend()

    @rule(name=DEVICES)
    def give_back(self, name: str) -> None:
        self.workers[name].give_back()

    @rule(name=DEVICES)
    def lose_orders(self, name: str) -> None:
        self.workers[name].lose_orders()

    # --- clients --------------------------------------------------------------------------------

    @rule(batch=BATCHES, job=st.integers(0, 2))
    def submit(self, batch: list[Spec], job: int) -> None:
        request = Submit(self._id(), tuple(map(self._spec, batch)), self.jobs[job])
        self.requests.append(request)
        self.bench.hears("client", request)

    @rule(data=st.data())
    def replay(self, data: st.DataObject) -> None:
        if self.requests:
            self.bench.hears("client", data.draw(st.sampled_from(self.requests)))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = CancelTasks(self._id(), self._some_tasks(data))
        self.cancels[request.request_id] = self.serial
        self.bench.hears("client", request)

    @rule(job=st.integers(1, 2))
    def cancel_job(self, job: int) -> None:
        self.bench.hears("client", CancelTasks(self._id(), job_id=self.jobs[job]))

    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        task_ids = self._some_tasks(data)
        # From here on they may run again, whether or not the answer is seen.
        request = RetryTasks(self._id(), task_ids)
        for task_id in task_ids:
            self.cancelled.pop(task_id, None)
            self.retried[task_id] = self.serial
        self.bench.hears("client", request)

    @rule(name=DEVICES, on=st.booleans())
    def drain(self, name: str, on: bool) -> None:
        self.bench.hears("client", DrainDevice(self._id(), name, on))

    @rule(strategy=st.sampled_from(Strategy))
    def set_strategy(self, strategy: Strategy) -> None:
        self.bench.hears("client", SetStrategy(self._id(), strategy))

    @rule(name=DEVICES)
    def revoke(self, name: str) -> None:
        """It goes on running what it has; whatever it says is refused from now on."""
        request = RevokeDevice(self._id(), name)
        self.revocations[request.request_id] = name
        self.bench.hears("client", request)
        if self.workers[name].is_linked:
            self.workers[name].hang_up(is_noticed=False)

    @rule(name=DEVICES)
    def enrol(self, name: str) -> None:
        """A new key, which only a device gets that has none."""
        if self.bench.commits and not self.bench.pending_turns:
            self._listen()
            answer = self.bench.enrols(name, f"{name} {self._id()!r}".encode().ljust(32)[:32])
            assert isinstance(answer, Enrolled) or name not in self.revoked, answer
            self.revoked.discard(name)

    # --- time, disk, death ----------------------------------------------------------------------

    @rule(ms=st.sampled_from([10, 400, 1_100, 6_000, 17_000]), beating=st.booleans())
    def pass_time(self, ms: int, beating: bool) -> None:
        for _ in range(0, ms, 500):
            self.bench.advance(min(ms, 500))
            self._listen()
            for worker in self.workers.values():
                if beating:
                    worker.beat()

    @rule(ms=st.sampled_from([-86_400_000, -3_000, 3_000, 86_400_000]))
    def step_wall_clock(self, ms: int) -> None:
        self.bench.wall_step_ms += ms
        self.bench.advance(1)

    @rule()
    def disk_is_slow(self) -> None:
        self.bench.commits = False

    @rule()
    def disk_catches_up(self) -> None:
        self.bench.commits = True
        self.bench.commit()

    @rule(turns=st.integers(1, 4))
    def disk_falls_behind(self, turns: int) -> None:
        """Some turns are on disk; what they made the master read is older than its decisions."""
        self.bench.commit_some(turns)

    @rule(downtime_ms=st.sampled_from([0, 700, 20_000]))
    def kill_master(self, downtime_ms: int) -> None:
        """What was decided and not committed is gone, with the answers to it."""
        self._listen()
        for worker in self.workers.values():
            worker.hang_up(is_noticed=False)
        self.bench.commits = True
        self.bench.restart(downtime_ms=downtime_ms)

    # --- what must hold -------------------------------------------------------------------------

    @invariant()
    def promises_hold(self) -> None:
        self._listen()
        store = self.bench.store
        audit_store(store)
        for answer in self.answers.values():
            assert all(task_id in store.tasks for task_id in answer.task_ids)
        for task_id, attempt in self.cancelled.items():
            task = store.tasks[task_id]  # type: ignore[index]
            assert task.state is not TaskState.COMPLETED, "completed after an acknowledged cancel"
            assert task.attempt <= attempt, "began again after an acknowledged cancel"
        seen = [key for one in self.workers.values() for key in one.seen]
        assert len(seen) == len(set(seen)), "an attempt number was handed out twice"
        for name, worker in self.workers.items():
            for task_id, _ in worker.seen:
                assert self._can_run(name, store.tasks[task_id]), "given to who cannot run it"  # type: ignore[index]
        self._check_politeness()

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        self.disk_catches_up()
        # Whatever was scheduled by a clock that was then set back is due now.
        self.bench.wall_step_ms = 100 * 86_400_000
        for name in NAMES:
            self.enrol(name)
            self.bench.hears("client", DrainDevice(self._id(), name, on=False))
        for _ in range(HEAL_STEPS):
            if not self._unfinished():
                break
            self._heal_a_little()
        assert not self._unfinished(), ("not everything came to an end", self._unfinished())
        for task in self.bench.store.tasks.values():
            assert task.state.is_terminal or task.state is TaskState.PENDING
        self.bench.audit()

    # --- helpers --------------------------------------------------------------------------------

    def _unfinished(self) -> list[TaskRow]:
        """What somebody could run, and nobody has."""
        return [
            task
            for task in self.bench.store.tasks.values()
            if not task.state.is_terminal and any(self._can_run(name, task) for name in NAMES)
        ]

    def _can_run(self, name: str, task: TaskRow) -> bool:
        labels = set(task.labels.split(",")) if task.labels else set()
        return task.task_type in TYPES[name] and labels <= set(LABELS[name])

    def _heal_a_little(self) -> None:
        self.bench.advance(500)
        self._listen()
        for worker in self.workers.values():
            if not worker.is_linked:
                worker.connect()
            worker.beat()
            worker.listen()
            while worker.start_one():
                worker.listen()
            for _ in range(CREDIT):
                worker.finish_one(Outcome.COMPLETED)
            worker.resend()
        self.promises_hold()

    def _listen(self) -> None:
        for worker in self.workers.values():
            worker.listen()
        for message in self.bench.takes("client"):
            if isinstance(message, Submitted):
                first = self.answers.setdefault(message.request_id, message)
                assert first == message, "the same request got another answer"
            elif isinstance(message, Changed):
                self._on_changed(message)
        self.bench.forget()

    def _on_changed(self, message: Changed) -> None:
        if message.request_id in self.revocations:
            self.revoked.add(self.revocations[message.request_id])
        asked = self.cancels.get(message.request_id, 0)
        for task_id in message.task_ids if asked else ():
            if self.retried.get(task_id, 0) < asked:
                attempt = self.bench.store.tasks[task_id].attempt  # type: ignore[index]
                self.cancelled[task_id] = attempt

    def _check_politeness(self) -> None:
        tasks = self.bench.store.tasks
        begun = sorted(
            at_ms
            for one in self.workers.values()
            for task_id, at_ms in one.begun
            if tasks[task_id].rate_key == "slow"  # type: ignore[index]
        )
        assert all(b - a >= SLOW_MS for a, b in pairwise(begun)), begun

    def _some_tasks(self, data: st.DataObject) -> tuple[int, ...]:
        known = sorted(self.bench.store.tasks)
        return tuple(data.draw(st.lists(st.sampled_from(known), max_size=3, unique=True)))

    def _spec(self, drawn: Spec) -> TaskSpec:
        task_type, labels, unique_key, rate_key, priority, soon_ms = drawn
        wall_ms = WALL_AT_ZERO + self.bench.now_ms + self.bench.wall_step_ms
        return spec(
            task_type,
            labels=labels,
            unique_key=unique_key,
            rate_key=rate_key,
            priority=priority,
            not_before_ms=wall_ms + soon_ms if soon_ms else 0,
        )

    def _id(self) -> bytes:
        self.serial += 1
        return b"machine %d" % self.serial


TestMasterMachine = MasterMachine.TestCase
TestMasterMachine.settings = stateful(examples=80, steps=40)
