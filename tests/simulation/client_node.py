"""Simulated people and programs: they submit, wait, cancel, retry and drain through ClientCore."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Final

from tests.simulation.links import Link
from tests.simulation.oracle.room import TERMINAL
from tests.simulation.workload import endless_spec, page_spec, plain_specs, rules
from tests.simulation.world import Alarm
from zmqcluster import codec
from zmqcluster.core.client import ClientCore
from zmqcluster.core.client_events import (
    Answered,
    Ask,
    Await,
    ClientEvent,
    Ended,
    FromMaster,
    LinkDown,
    LinkUp,
    SendToMaster,
    Unanswered,
)
from zmqcluster.core.events import Principal
from zmqcluster.messages import (
    CancelTasks,
    Changed,
    ClientMessage,
    DrainDevice,
    Refused,
    RetryTasks,
    RevokeDevice,
    SetStrategy,
    Submit,
    Submitted,
    ToClient,
)
from zmqcluster.model import NO_JOB, DeviceId, JobId, Role, Strategy, TaskId

if TYPE_CHECKING:
    from tests.simulation.cluster import SimCluster


CANCEL_AGAIN_MS: Final = 20_000
REVOKE_AGAIN_MS: Final = 5_000
# Answers are remembered for as long as tasks are; nobody asks again as late as that.
ASKED_AGAIN_MS: Final = 60_000
_ANSWERS: Final = (Submitted, Changed)


class ClientNode:
    """Submits its share of the work in a few batches, and waits for all of it.

    awaited: tasks whose ends it wants. unanswered: requests given up; nobody knows of them.
    """

    def __init__(self, cluster: SimCluster, name: str, *, crawls: bool) -> None:
        self.cluster, self.world = cluster, cluster.world
        self.name = name
        self.principal = Principal(Role.CLIENT)
        self.core = ClientCore(Random(f"{name} {self.world.options.seed}"))
        self.link: Link | None = None
        self.awaited: set[TaskId] = set()
        self.ended: set[TaskId] = set()
        self.jobs: list[JobId] = []
        self.unanswered: list[ClientMessage] = []
        self._regretted: list[TaskId] = []
        self._asked: dict[bytes, ClientMessage] = {}
        # Whatever it asked for since it was first started, and when.
        self._wanted: dict[bytes, int] = {}
        self._boots = self._marks = self._jobs_made = 0
        self._alarm = Alarm(self.world, self._feed)
        self._connect_later()
        if crawls:
            self._submit_crawl()
        self._submit_plain()

    # --- what it wants --------------------------------------------------------------------------

    def _submit_crawl(self) -> None:
        options = self.world.options
        seed = page_spec(0, options)
        request_id = self.core.new_request_id()
        self._ask(Submit(request_id, (seed,), 0, f"crawl of {self.name}", rules(options), True))

    def _submit_plain(self) -> None:
        options, rng = self.world.options, self.world.rng
        left = options.tasks // options.clients
        while left > 0:
            count = min(left, rng.choice([1, 1, 5, 40]))
            left -= count
            specs = tuple(plain_specs(rng, self._new_marks(count), self.world.wall_ms))
            # Some make a job of it; a name that comes twice shows a request carried out twice.
            self._jobs_made += 1
            job_name = f"job {self._jobs_made} of {self.name}" if rng.random() < 0.3 else ""
            message = Submit(
                self.core.new_request_id(), specs, 0, job_name, watch=rng.random() < 0.5
            )
            self.world.at(rng.randrange(5_000), self._ask, message)

        if options.endless:
            specs = tuple(map(endless_spec, self._new_marks(options.endless)))
            message = Submit(self.core.new_request_id(), specs)
            self.world.at(rng.randrange(5_000), self._ask, message)
            self.world.at(rng.randrange(10_000), self._end_endless)

    def _new_marks(self, count: int) -> list[str]:
        """Texts that nobody else puts into a task."""
        self._marks += count
        return [f"{self.name} {self._marks - index}" for index in range(count)]

    def _end_endless(self) -> None:
        """What never ends is cancelled sooner or later, as people do who see it running."""
        is_open = [
            row.task_id
            for row in self.cluster.master.disk.tasks.values()
            if row.task_type == "endless" and row.state not in TERMINAL
        ]
        if is_open:
            self._cancel(tuple(is_open))
        self.world.at(CANCEL_AGAIN_MS, self._end_endless)

    def _cancel(self, task_ids: tuple[TaskId, ...], job_id: JobId = NO_JOB) -> None:
        message = CancelTasks(self.core.new_request_id(), task_ids, job_id)
        self.cluster.oracle.cancel_asked(message)
        self._ask(message)

    def cancel_something(self) -> None:
        rng = self.world.chance
        if self.jobs and rng.random() < 0.2:
            self._cancel((), rng.choice(self.jobs))
        elif self.awaited:
            self._regretted = [rng.choice(sorted(self.awaited))]
            self._cancel(tuple(self._regretted))

    def retry_something(self) -> None:
        """What was cancelled last, as often as not: people change their minds."""
        rng = self.world.chance
        candidates = self._regretted if rng.random() < 0.5 else sorted(self.ended)
        if candidates:
            message = RetryTasks(self.core.new_request_id(), (rng.choice(candidates),))
            self.cluster.oracle.retry_asked(message)
            self._ask(message)

    def drain_something(self) -> None:
        rng = self.world.chance
        self._drain(rng.choice(self.cluster.device_ids), on=rng.random() < 0.5)

    def _drain(self, device_id: DeviceId, *, on: bool) -> None:
        if not on:
            self.cluster.oracle.resume_asked(device_id)
        self._ask(DrainDevice(self.core.new_request_id(), device_id, on))

    def change_strategy(self) -> None:
        strategy = self.world.chance.choice(list(Strategy))
        self._ask(SetStrategy(self.core.new_request_id(), strategy))

    def revoke(self, device_id: DeviceId) -> None:
        """Again and again, until it is carried out."""
        if not self.cluster.oracle.is_revoked(device_id):
            self._ask(RevokeDevice(self.core.new_request_id(), device_id))
            self.world.at(REVOKE_AGAIN_MS, self.revoke, device_id)

    def resume_all(self) -> None:
        for device_id in self.cluster.device_ids:
            self._drain(device_id, on=False)

    def crash(self) -> None:
        """The program dies and is started again. It has its requests written down, and asks those
        again that were not answered, or not; what it waits for it knows, and asks for anew."""
        world = self.world
        self._boots += 1
        link, self.link = self.link, None
        if link is not None:
            link.cut(peer_notices=False)
        self.core = ClientCore(Random(f"{self.name} {self._boots} {world.options.seed}"))
        asked, self._asked = self._asked, {}
        for message in asked.values():
            is_old = world.now_ms - self._wanted[message.request_id] > ASKED_AGAIN_MS
            if world.chance.random() < 0.5 and not is_old:
                self._ask(message)
            else:
                self.unanswered.append(message)
        self._feed(Await(tuple(sorted(self.awaited))))
        self._connect_later()

    def _ask(self, message: ClientMessage) -> None:
        self._asked[message.request_id] = message
        self._wanted.setdefault(message.request_id, self.world.now_ms)
        if isinstance(message, Submit):
            self.cluster.oracle.submit_asked(message)
        self._feed(Ask(message))

    # --- links ----------------------------------------------------------------------------------

    def _connect_later(self) -> None:
        self.world.at(1 + int(self.world.rng.random() * 200), self._connect)

    def _connect(self) -> None:
        if self.link is None:
            self.link = self.cluster.connect(self)
            if self.link is None:
                self._connect_later()

    def linked(self, link: Link) -> None:
        if link is self.link:
            self._feed(LinkUp())

    def unlinked(self, link: Link) -> None:
        if link is self.link:
            self.link = None
            self._feed(LinkDown())
            self._connect_later()

    def hear(self, link: Link, frame: bytes) -> None:
        if link is self.link:
            message = codec.decode_to_client(frame)
            self.world.note("client hears", self.name, type(message).__name__, data=frame)
            if isinstance(message, _ANSWERS) and message.request_id not in self._wanted:
                self.cluster.oracle.fail(f"{self.name} is told what others asked for: {message}")
            self._feed(FromMaster(message))

    def hear_hint(self, frame: bytes) -> None:
        """Hints are for workers."""

    # --- the loop -------------------------------------------------------------------------------

    def _feed(self, *events: ClientEvent) -> None:
        for effect in self.core.handle(self.world.now_ms, *events):
            match effect:
                case SendToMaster(message):
                    if self.link is not None:
                        self.link.send_up(codec.encode(message))
                case Answered(request_id, answer):
                    self._on_answer(self._asked.pop(request_id), answer)
                case Unanswered(request_id):
                    self.cluster.oracle.unanswered(self._asked[request_id])
                    self.unanswered.append(self._asked.pop(request_id))
                case Ended(end):
                    self.cluster.oracle.heard_end(end)
                    self.ended.add(TaskId(end.task_id))
        self._plan()

    def _plan(self) -> None:
        due_ms = self.core.next_ms()
        if due_ms is not None:
            self._alarm.set(max(due_ms, self.world.now_ms + 1))

    def _on_answer(self, asked: ClientMessage, answer: ToClient) -> None:
        oracle = self.cluster.oracle
        match asked, answer:
            case Submit(), Submitted():
                oracle.submitted(asked, answer)
                if answer.job_id:
                    self.jobs.append(JobId(answer.job_id))
                task_ids = tuple(TaskId(one) for one in answer.task_ids)
                self.awaited.update(task_ids)
                self._feed(Await(task_ids))
            case CancelTasks(), Changed():
                oracle.cancel_acked(asked, answer.task_ids)
            case DrainDevice(), Changed() if asked.on:
                oracle.drain_acked(DeviceId(asked.device_id))
            case RevokeDevice(), Changed():
                oracle.revoke_acked(DeviceId(asked.device_id))
            case RetryTasks(), _:
                changed = answer.task_ids if isinstance(answer, Changed) else ()
                oracle.retry_answered(asked, changed)
            case ((Submit() | CancelTasks()), Refused()):
                oracle.refused(asked)
            case _:
                pass
