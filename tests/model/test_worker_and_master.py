"""Both cores together on virtual time, over a network that loses, with processes that die."""

from __future__ import annotations

from collections import deque
from random import Random

import pytest

from tests.support.master_bench import MasterBench, spec
from tests.support.tiers import scaled
from tests.support.worker_bench import settings
from zmqcluster.core.settings import Settings
from zmqcluster.core.worker import WorkerCore
from zmqcluster.core.worker_events import (
    Connected,
    Disconnected,
    ForgetResults,
    FromMaster,
    HostsReported,
    KillTask,
    Reconnect,
    RunTasks,
    SendToMaster,
    SpoolResults,
    StopWorker,
    WorkerEvent,
)
from zmqcluster.messages import CancelTasks, Inbound, RateRule, TaskOrder, TaskResult, ToWorker
from zmqcluster.model import DeviceId, Outcome, TaskId, TaskState

BEAT_MS = 1_000
TIMEOUT_MS = 3_000
STEP_MS = 50
TASKS = 40
DEVICES = ("d1", "d2", "d3")
# Worker clocks are their own: nothing may depend on them being the master's.
CLOCK_SKEW_MS = 77_000
TYPES = ("quick", "slow")

Key = tuple[int, int]


class Device:
    """A worker process with its hosts, its disk and its connection."""

    def __init__(self, name: str, cluster: Cluster) -> None:
        self.name = name
        self.cluster = cluster
        self.spool: dict[Key, TaskResult] = {}
        self.boots = 0
        self.peer = b""
        self.up: deque[Inbound] = deque()
        self.down: deque[ToWorker] = deque()
        self.boot()

    @property
    def now_ms(self) -> int:
        return self.cluster.now_ms + CLOCK_SKEW_MS

    def boot(self) -> None:
        """As after kill -9: only what was spooled is left."""
        self.boots += 1
        self.running: dict[Key, tuple[int, TaskResult]] = {}
        chosen = settings(
            slots=3,
            sync_slots=1,
            device_id=DeviceId(self.name),
            boot_id=f"{self.name}-{self.boots}".encode().ljust(16, b"."),
        )
        rng = Random(self.boots)
        self.core = WorkerCore(chosen, rng, list(self.spool.values()))
        self.drop_connection()

    def drop_connection(self) -> None:
        if self.peer:
            self.cluster.master_loses(self.name)
        self.peer = b""
        self.up.clear()
        self.down.clear()
        self.feed(Disconnected())

    def connect(self) -> None:
        self.cluster.connections += 1
        self.peer = f"{self.name}#{self.cluster.connections}".encode()
        self.cluster.master.peers[self.name] = self.peer
        self.feed(Connected())

    def feed(self, *events: WorkerEvent) -> None:
        for effect in self.core.handle(self.now_ms, *events):
            match effect:
                case SendToMaster():
                    if self.peer:
                        self.up.append(effect.message)
                case RunTasks():
                    for order in effect.orders:
                        self.start(order)
                case KillTask():
                    key = (effect.ref.task_id, effect.ref.attempt)
                    if key in self.running:
                        ended = TaskResult(*key, effect.outcome)
                        self.running[key] = (self.now_ms + 100, ended)
                case SpoolResults():
                    self.spool |= {(one.task_id, one.attempt): one for one in effect.results}
                case ForgetResults():
                    for ref in effect.refs:
                        self.spool.pop((ref.task_id, ref.attempt))
                case Reconnect():
                    self.drop_connection()
                case StopWorker():
                    raise AssertionError(effect.text)

    def start(self, order: TaskOrder) -> None:
        key = (order.task_id, order.attempt)
        assert key not in self.cluster.started, "no attempt starts twice, anywhere"
        self.cluster.started[key] = self.name
        rng = self.cluster.rng
        outcome = Outcome.FAILED if rng.random() < 0.1 else Outcome.COMPLETED
        result = TaskResult(*key, outcome, b"\xc0", run_us=rng.choice([50, 2_000, 400_000]))
        self.running[key] = (self.now_ms + rng.choice([0, 0, 60, 400, 2_500]), result)

    def turn(self) -> None:
        ended = [result for due_ms, result in self.running.values() if due_ms <= self.now_ms]
        for result in ended:
            del self.running[result.task_id, result.attempt]
        events: list[WorkerEvent] = [FromMaster(message) for message in self.down]
        self.down.clear()
        if ended:
            events.append(HostsReported(ended))
        self.feed(*events)


class Cluster:
    """A master, three devices, and a seed that decides what goes wrong."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.connections = 0
        self.started: dict[Key, str] = {}
        chosen = Settings(heartbeat_interval_ms=BEAT_MS, device_timeout_ms=TIMEOUT_MS)
        self.master = MasterBench(chosen, seed)
        self.devices = {name: Device(name, self) for name in DEVICES}

    @property
    def now_ms(self) -> int:
        return self.master.now_ms

    def master_loses(self, name: str) -> None:
        if name in self.master.peers:
            self.master.loses(name)
            del self.master.peers[name]

    def step(self, *, is_faulty: bool) -> None:
        if is_faulty:
            self.break_something()
        for device in self.devices.values():
            if not device.peer and self.rng.random() < 0.5:
                device.connect()
            while device.up and device.peer:
                self.master.hears(device.name, device.up.popleft())
        self.master.advance(STEP_MS)
        self.deliver(loss=0.02 if is_faulty else 0.0)
        for device in self.devices.values():
            device.turn()

    def deliver(self, loss: float) -> None:
        """What the master sends arrives, or not: a full queue drops what TCP would not."""
        by_peer = {device.peer: device for device in self.devices.values() if device.peer}
        for send in self.master.sends:
            device = by_peer.get(send.peer)
            if device is not None and self.rng.random() >= loss:
                device.down.append(send.message)  # type: ignore[arg-type]  # peers are workers
        self.master.sends.clear()

    def break_something(self) -> None:
        device = self.devices[self.rng.choice(DEVICES)]
        roll = self.rng.random()
        if roll < 0.02:
            device.drop_connection()
        elif roll < 0.03:
            device.boot()
        elif roll < 0.04:
            # The master dies and is started again; connections break with it.
            self.master.restart(downtime_ms=self.rng.choice([0, 500, 5_000]))
            for one in self.devices.values():
                one.peer = b""
                one.drop_connection()
        elif roll < 0.06 and device.up:
            device.up.popleft()

    def submit(self) -> None:
        specs = [
            spec(
                self.rng.choice(TYPES),
                rate_key="http://a" if self.rng.random() < 0.2 else "",
                max_retry_count=50,
            )
            for _ in range(TASKS)
        ]
        self.master.submit(*specs, rates=(RateRule("http://a", delay_ms=200, concurrency=2),))

    def states(self) -> dict[TaskId, TaskState]:
        return {task_id: row.state for task_id, row in self.master.store.tasks.items()}


@pytest.mark.parametrize("seed", range(scaled(12)))
def test_every_task_ends_and_no_attempt_runs_twice(seed: int) -> None:
    cluster = Cluster(seed)
    cluster.submit()
    for _ in range(300):
        cluster.step(is_faulty=True)

    for _ in range(2_400):
        cluster.step(is_faulty=False)
        if all(state.is_terminal for state in cluster.states().values()):
            break
    for _ in range(100):
        cluster.step(is_faulty=False)

    left = {task_id: state for task_id, state in cluster.states().items() if not state.is_terminal}
    assert left == {}
    assert len(cluster.states()) == TASKS
    for device in cluster.devices.values():
        assert (device.core.running, device.core.waiting, device.core.kept) == (0, 0, 0)
        assert device.spool == {}


@pytest.mark.parametrize("seed", range(4))
def test_cancelled_tasks_are_gone_everywhere_and_never_completed(seed: int) -> None:
    cluster = Cluster(seed)
    cluster.submit()
    for _ in range(20):
        cluster.step(is_faulty=True)
    wanted = tuple(task_id for task_id, state in cluster.states().items() if not state.is_terminal)
    cluster.master.hears("client", CancelTasks(b"cancel", wanted))
    assert len(cluster.master.takes("client")) == 1
    handed_out = set(cluster.master.store.assignments)

    for _ in range(400):
        cluster.step(is_faulty=False)

    states = cluster.states()
    assert {states[task_id] for task_id in wanted} == {TaskState.CANCELLED}
    later = {task_id for task_id, _ in set(cluster.master.store.assignments) - handed_out}
    assert not later & set(wanted)
    assert all(device.core.running == 0 for device in cluster.devices.values())


def test_without_faults_every_task_runs_once() -> None:
    cluster = Cluster(1)
    cluster.rng.random = lambda: 0.4  # type: ignore[method-assign]  # no task fails
    cluster.submit()

    for _ in range(400):
        cluster.step(is_faulty=False)

    assert set(cluster.states().values()) == {TaskState.COMPLETED}
    assert len(cluster.started) == TASKS
