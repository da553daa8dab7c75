"""A store as simple as possible: dicts of rows. What the database must be equal to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from msgspec import Struct
from msgspec.structs import replace

from zmqcluster.core.effects import (
    Action,
    Changes,
    ListLanes,
    LoadBacklog,
    LoadDelayed,
    LoadOpenTasks,
)
from zmqcluster.core.events import (
    BacklogLoaded,
    DelayedLoaded,
    Event,
    Facts,
    LaneKey,
    LanesListed,
    OpenTasksLoaded,
)
from zmqcluster.core.master import MasterCore
from zmqcluster.core.rows import (
    AssignmentRow,
    DeviceRow,
    EventRow,
    JobRow,
    KeyRow,
    RateKeyRow,
    RecordRow,
    SubmissionRow,
    TaskRow,
    TokenRow,
)
from zmqcluster.core.state import Past
from zmqcluster.messages import Inbound
from zmqcluster.model import NO_JOB, DeviceId, JobId, TaskId, TaskState

K = TypeVar("K")
V = TypeVar("V", bound=Struct)

_NO_FACTS = Facts()
_IMMUTABLE = (
    "job_id", "parent_id", "task_type", "labels", "rate_key", "unique_key", "priority",
    "max_retry_count", "timeout_ms", "created_wall", "task_data",
)  # fmt: skip


class NaiveStore:
    """Applies Changes and answers reads; copies in and out, as a disk would."""

    def __init__(self) -> None:
        self.tasks: dict[TaskId, TaskRow] = {}
        self.assignments: dict[tuple[TaskId, int], AssignmentRow] = {}
        self.jobs: dict[JobId, JobRow] = {}
        self.devices: dict[DeviceId, DeviceRow] = {}
        self.rate_keys: dict[str, RateKeyRow] = {}
        self.keys: dict[bytes, KeyRow] = {}
        self.tokens: dict[str, TokenRow] = {}
        self.unique_keys: dict[tuple[JobId, bytes], TaskId] = {}
        self.submissions: dict[bytes, SubmissionRow] = {}
        self.records: dict[tuple[str, str], RecordRow] = {}
        self.events: list[EventRow] = []
        self.epoch = 0
        self.clock_ms = 0
        self.wall_ms = 0

    def apply(self, changes: Changes) -> None:
        for task_id, task in changes.new_tasks.items():
            assert task_id not in self.tasks, "a task is inserted once"
            self.tasks[task_id] = replace(task)
        for key in changes.unique_keys:
            assert (key.job_id, key.key_hash) not in self.unique_keys, "a unique key is taken once"
            self.unique_keys[key.job_id, key.key_hash] = key.task_id
        for task_id, task in changes.tasks.items():
            former = self.tasks[task_id]
            assert all(getattr(former, name) == getattr(task, name) for name in _IMMUTABLE)
            self.tasks[task_id] = replace(task)
        _take_over(self.assignments, changes.assignments)
        _take_over(self.jobs, changes.jobs)
        _take_over(self.devices, changes.devices)
        _take_over(self.rate_keys, changes.rate_keys)
        _take_over(self.keys, changes.keys)
        _take_over(self.tokens, changes.tokens)
        _take_over(self.records, changes.records)
        for submission in changes.submissions:
            self.submissions[submission.request_id] = submission
        self.events.extend(changes.events)
        self.clock_ms = changes.clock_ms or self.clock_ms
        self.wall_ms = changes.wall_ms or self.wall_ms

    def past(self) -> Past:
        """What a master that starts now would be told; begins the next epoch."""
        self.epoch += 1
        in_flight = (TaskState.ASSIGNED, TaskState.RUNNING)
        return Past(
            epoch=self.epoch,
            clock_ms=self.clock_ms,
            next_task_id=max(self.tasks, default=0) + 1,
            next_job_id=max(self.jobs, default=0) + 1,
            in_flight=[replace(one) for one in self.tasks.values() if one.state in in_flight],
            jobs=[
                replace(one)
                for one in self.jobs.values()
                if one.pending or one.running or one.job_id == NO_JOB
            ],
            devices=_copies(self.devices),
            rate_keys=_copies(self.rate_keys),
            keys=_copies(self.keys),
            tokens=_copies(self.tokens),
        )

    def read(self, action: Action) -> Event | None:
        """The event that answers a Load… or List… action; None for other actions."""
        match action:
            case LoadBacklog(lane, after_id, limit):
                rows = [
                    replace(row)
                    for task_id, row in sorted(self.tasks.items())
                    if task_id > after_id and _is_ready(row) and lane_of(row) == lane
                ]
                return BacklogLoaded(lane, tuple(rows[:limit]), len(rows) > limit)
            case ListLanes(after, limit):
                lanes = sorted({lane_of(row) for row in self.tasks.values() if _is_ready(row)})
                lanes = [one for one in lanes if after is None or one > after]
                listed = tuple(lanes[:limit])
                return LanesListed(listed, len(lanes) > limit, self._rates_of(listed))
            case LoadDelayed(limit):
                rows = [replace(row) for row in self.tasks.values() if _is_delayed(row)]
                ahead_ms = self.wall_ms - self.clock_ms
                rows.sort(key=lambda row: row.retry_at_ms or row.not_before_wall - ahead_ms)
                rows, more = rows[:limit], len(rows) > limit
                return DelayedLoaded(tuple(rows), more, self._rates_of(rows))
            case LoadOpenTasks(job_id, after_id, limit):
                rows = [
                    replace(row)
                    for task_id, row in sorted(self.tasks.items())
                    if task_id > after_id and row.job_id == job_id and _is_pending(row)
                ]
                next_id = rows[limit - 1].task_id if len(rows) > limit else 0
                return OpenTasksLoaded(job_id, tuple(rows[:limit]), next_id)
            case _:
                return None

    def facts(self, core: MasterCore, message: Inbound) -> Facts:
        """What the core wants to know before this message."""
        wants = core.wants(message)
        if wants.nothing:
            return _NO_FACTS
        row = self.submissions.get(wants.request_id)
        tasks = {one: replace(self.tasks[one]) for one in wants.tasks if one in self.tasks}
        wants = wants.plus(core.wants_of(message, tasks))
        return Facts(
            submitted=(row.job_id, row.task_ids, row.existing) if row else None,
            keys={key: self.unique_keys[key] for key in wants.keys if key in self.unique_keys},
            tasks=tasks,
            jobs={one: replace(self.jobs[one]) for one in wants.jobs if one in self.jobs},
            rates=self.rates_named(wants.rates),
        )

    def _rates_of(self, named: Iterable[TaskRow | LaneKey]) -> dict[str, RateKeyRow]:
        return self.rates_named(one.rate_key for one in named if one.rate_key)

    def rates_named(self, names: Iterable[str]) -> dict[str, RateKeyRow]:
        return {one: replace(self.rate_keys.get(one) or RateKeyRow(one)) for one in names}


def _take_over(kept: dict[K, V], new: dict[K, V]) -> None:
    if new:
        kept.update({key: replace(row) for key, row in new.items()})


def _copies(rows: dict[K, V]) -> list[V]:
    return [replace(row) for row in rows.values()]


def _is_pending(row: TaskRow) -> bool:
    return row.state is TaskState.PENDING


def _is_delayed(row: TaskRow) -> bool:
    return _is_pending(row) and bool(row.retry_at_ms or row.not_before_wall)


def _is_ready(row: TaskRow) -> bool:
    return _is_pending(row) and not row.retry_at_ms and not row.not_before_wall


def lane_of(row: TaskRow) -> LaneKey:
    return LaneKey(row.task_type, row.labels, row.rate_key, row.priority)
