"""What a database must hold after any Changes, as plain dicts; and any Changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from hypothesis import strategies as st
from msgspec import structs

from storage.pruning import LOOK_AGAIN_MS
from tests.support.storage_bench import device, task
from zmqcluster.core.effects import Changes
from zmqcluster.core.rows import (
    AssignmentRow,
    EventRow,
    HeartbeatRow,
    JobRow,
    KeyRow,
    RateKeyRow,
    RecordRow,
    Row,
    SubmissionRow,
    TaskRow,
    TokenRow,
    UniqueKeyRow,
)
from zmqcluster.model import DeviceId, JobId, JobState, TaskId, TaskState

K = TypeVar("K")
R = TypeVar("R", bound=Row)
S = TypeVar("S", HeartbeatRow, SubmissionRow)
COUNTED = ("pending", "running", "completed", "failed", "cancelled", "dead")

ids = st.integers(1, 12).map(TaskId)
numbers = st.integers(0, 9)
instants = st.sampled_from([0, 0, 0, 0, 1, 3, 50, 2**53 - 1])
# Most of what there is waits, or is over.
states = st.sampled_from([*TaskState, *[TaskState.PENDING] * 5, *[TaskState.COMPLETED] * 2])
texts = st.sampled_from(["", "a", "b", "é"])
hashes = st.sampled_from([b"1" * 16, b"2" * 16, b"\0" * 16])
bodies = st.sampled_from([b"", b"\x80", b"y" * 20])
# The last three have no tasks.
JOBS = (0, 1, 2, 3, 4, 5)
DEVICES = ("d1", "D1", "é")
REQUESTS = (b"r", b"\0", b"x" * 32)


@st.composite
def task_rows(draw: st.DrawFn, task_id: TaskId) -> TaskRow:
    """A task in any state, its immutable half a function of its id, so that changes fit it."""
    return task(
        task_id,
        job_id=JobId(task_id % 3),
        task_type=("crawl", "noop")[task_id % 5 == 0],
        labels=("", "a,b")[task_id % 7 == 0],
        rate_key="abc"[task_id % 3],
        priority=task_id % 2,
        # From 2,001 bytes on it lies in a table of its own; more would only be long to print.
        task_data=b"d" * (2_001 if task_id % 4 == 1 else task_id),
        state=draw(states),
        attempt=draw(st.integers(0, 3)),
        cancel_requested=draw(st.booleans()),
        not_before_wall=draw(instants),
        retry_at_ms=draw(instants),
        device_id=DeviceId(draw(texts)),
        finished_wall=draw(instants),
        result=draw(bodies),
        error=draw(texts),
    )


@st.composite
def changes(draw: st.DrawFn) -> Changes:
    """Any changes; whether a thing in it is new is decided by who applies it."""

    def some(
        keys: Iterable[Any] | st.SearchStrategy[Any], make: Callable[[Any], R], most: int = 4
    ) -> Any:
        strategy = keys if isinstance(keys, st.SearchStrategy) else st.sampled_from(list(keys))
        return {key: make(key) for key in draw(st.lists(strategy, max_size=most, unique=True))}

    def number() -> int:
        return draw(numbers)

    return Changes(
        unique_keys=list(
            some(
                st.tuples(st.integers(0, 2).map(JobId), hashes),
                lambda key: UniqueKeyRow(key[0], key[1], TaskId(number())),
            ).values()
        ),
        tasks=some(ids, lambda task_id: draw(task_rows(task_id)), most=10),
        assignments=some(
            st.tuples(ids, st.integers(1, 3)),
            lambda key: AssignmentRow(
                key[0], key[1], DeviceId("d"), 1, number(), outcome=draw(texts)
            ),
        ),
        jobs=some(
            map(JobId, JOBS),
            lambda job_id: JobRow(
                job_id,
                draw(texts),
                draw(st.sampled_from(JobState)),
                1,
                draw(instants),
                *(number() for _ in COUNTED),
            ),
        ),
        devices=some(
            DEVICES,
            lambda name: device(name, name=draw(texts), drained=draw(st.booleans()), lost=number()),
        ),
        heartbeats=list(
            some(
                st.tuples(st.sampled_from(DEVICES), numbers),
                lambda key: HeartbeatRow(
                    DeviceId(key[0]), key[1], 0.5, 1.25, number(), 0.0, 2**62, 0, number(), 0
                ),
            ).values()
        ),
        rate_keys=some(
            texts, lambda key: RateKeyRow(key, number() % 2, number() % 2, number(), number())
        ),
        keys=some(
            hashes,
            lambda key: KeyRow(key, "worker", DeviceId(draw(texts)), "t", number(), number()),
        ),
        tokens=some(
            texts, lambda key: TokenRow(key, b"k" * 32, "worker", number(), 9, number(), number())
        ),
        submissions=list(
            some(
                REQUESTS,
                lambda key: SubmissionRow(
                    key,
                    JobId(1),
                    tuple(draw(st.lists(ids, max_size=6))),
                    tuple(draw(st.lists(st.integers(0, 3), max_size=4))),
                    number(),
                ),
            ).values()
        ),
        records=some(
            st.tuples(texts, texts),
            lambda key: RecordRow(key[0], key[1], JobId(1), TaskId(number()), 1, 5, draw(bodies)),
        ),
        events=[EventRow(number(), draw(texts), task_id=number() % 3) for _ in range(number() % 4)],
        clock_ms=number(),
        wall_ms=number(),
    )


class RowModel:
    """The rows as dicts, replaced one by one."""

    # Fields of Changes that are rows by what makes them unique.
    KEYED = ("assignments", "jobs", "devices", "rate_keys", "keys", "tokens", "records")

    def __init__(self) -> None:
        self.tasks: dict[TaskId, TaskRow] = {}
        self.tables: dict[str, dict[Any, Any]] = {name: {} for name in self.KEYED}
        self.unique: dict[tuple[JobId, bytes], TaskId] = {}
        self.heartbeats: dict[tuple[str, int], HeartbeatRow] = {}
        self.submissions: dict[bytes, SubmissionRow] = {}
        self.events: list[EventRow] = []
        self.clock_ms = self.wall_ms = 0
        self.pruned = dict.fromkeys(COUNTED, 0)

    def split(self, made: Changes) -> Changes:
        """The same changes as a core would make them: new tasks apart, no unique key twice."""
        return structs.replace(
            made,
            new_tasks={key: row for key, row in made.tasks.items() if key not in self.tasks},
            tasks={key: row for key, row in made.tasks.items() if key in self.tasks},
            unique_keys=[
                row for row in made.unique_keys if (row.job_id, row.key_hash) not in self.unique
            ],
        )

    def apply(self, made: Changes) -> None:
        self.tasks |= copy.deepcopy(made.new_tasks | made.tasks)
        for name in self.KEYED:
            self.tables[name] |= getattr(made, name)
        self.unique |= {(row.job_id, row.key_hash): row.task_id for row in made.unique_keys}
        self.heartbeats |= {(row.device_id, row.at_wall): row for row in made.heartbeats}
        self.submissions |= {row.request_id: row for row in made.submissions}
        self.events += made.events
        self.clock_ms = made.clock_ms or self.clock_ms
        self.wall_ms = made.wall_ms or self.wall_ms

    def prune(self, before_wall: int) -> None:
        """Forget all that is past; the newest of what is numbered stays, for numbers only grow."""
        for task_id in [key for key, row in self.tasks.items() if self._is_past(row, before_wall)]:
            if task_id < max(self.tasks):
                del self.tasks[task_id]
                attempts = self.tables["assignments"]
                for key in [key for key in attempts if key[0] == task_id]:
                    del attempts[key]
        self.events = [
            row
            for index, row in enumerate(self.events, start=1)
            if row.at_wall >= before_wall or index == len(self.events)
        ]
        self.heartbeats = _since(before_wall, self.heartbeats)
        self.submissions = _since(before_wall, self.submissions)
        self._prune_rate_keys(before_wall)
        jobs = self.tables["jobs"]
        filled = {row.job_id for row in self.tasks.values()}
        for job_id, job in list(jobs.items()):
            is_past = 0 < job.finished_wall < before_wall
            if 0 < job_id < max(jobs) and job_id not in filled and is_past:
                for name in COUNTED:
                    self.pruned[name] += getattr(job, name)
                self.unique = {key: row for key, row in self.unique.items() if key[0] != job_id}
                del jobs[job_id]

    def _prune_rate_keys(self, before_wall: int) -> None:
        """A key stays while it is closed or has a task, and is looked at again later."""
        used = {row.rate_key for row in self.tasks.values()}
        kept = self.tables["rate_keys"]
        for key, row in list(kept.items()):
            if row.changed_wall >= before_wall:
                continue
            shut = self.clock_ms and max(row.next_at_ms, row.closed_until_ms) > self.clock_ms
            if key in used or shut:
                again_wall = before_wall + LOOK_AGAIN_MS
                kept[key] = structs.replace(row, changed_wall=again_wall)
            else:
                del kept[key]

    def totals(self) -> dict[str, int]:
        jobs = self.tables["jobs"].values()
        return {name: self.pruned[name] + sum(getattr(j, name) for j in jobs) for name in COUNTED}

    @staticmethod
    def _is_past(row: TaskRow, before_wall: int) -> bool:
        return row.state.is_terminal and 0 < row.finished_wall < before_wall


def _since(before_wall: int, rows: dict[K, S]) -> dict[K, S]:
    return {key: row for key, row in rows.items() if row.at_wall >= before_wall}
