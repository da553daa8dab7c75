"""Whatever sequence of Changes: the database holds what plain dicts would hold, also reopened."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from storage import recovery
from storage.task_listing import TaskFilter
from tests.support.storage_bench import StorageBench, storage_bench, task
from zmqcluster.core.effects import Changes
from zmqcluster.core.events import LaneKey
from zmqcluster.core.rows import AssignmentRow, EventRow, JobRow, RateKeyRow, RecordRow, TaskRow
from zmqcluster.model import DeviceId, JobId, JobState, TaskId, TaskState

IN_HANDS = (TaskState.ASSIGNED, TaskState.RUNNING)
ids = st.integers(1, 12).map(TaskId)
instants = st.sampled_from([0, 0, 1, 50, 2**53 - 1])
texts = st.sampled_from(["", "a", "b", "é"])
bodies = st.sampled_from([b"", b"\x80", b"x" * 2000, b"y" * 2001, b"z" * 9000])


@st.composite
def task_rows(draw: st.DrawFn, task_id: TaskId) -> TaskRow:
    """A task in any state, its immutable half a function of its id, so that changes fit it."""
    return task(
        task_id,
        job_id=JobId(task_id % 3),
        rate_key="abc"[task_id % 3],
        priority=task_id % 2,
        task_data=b"d" * (task_id * 400),
        state=draw(st.sampled_from(TaskState)),
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
    """Any changes; whether a task in it is new is decided by who applies it."""

    def some(keys: Any, make: Callable[[Any], Any]) -> dict[Any, Any]:
        return {key: make(key) for key in draw(st.lists(keys, max_size=6, unique=True))}

    def number() -> int:
        return draw(st.integers(0, 9))

    return Changes(
        tasks=some(ids, lambda task_id: draw(task_rows(task_id))),
        assignments=some(
            st.tuples(ids, st.integers(1, 3)),
            lambda key: AssignmentRow(
                key[0], key[1], DeviceId("d"), 1, number(), outcome=draw(texts)
            ),
        ),
        jobs=some(
            st.integers(0, 3).map(JobId),
            lambda job_id: JobRow(
                job_id, draw(texts), JobState.ACTIVE, 1, 0, number(), number(), number()
            ),
        ),
        rate_keys=some(texts, lambda key: RateKeyRow(key, number(), number(), 0, 0)),
        records=some(
            st.tuples(texts, texts),
            lambda key: RecordRow(key[0], key[1], JobId(1), TaskId(number()), 1, 5, draw(bodies)),
        ),
        events=[EventRow(number(), draw(texts), task_id=number())],
        clock_ms=number(),
        wall_ms=number(),
    )


class Model:
    """The rows as dicts, replaced one by one."""

    def __init__(self) -> None:
        self.tasks: dict[TaskId, TaskRow] = {}
        self.others: dict[tuple[str, Any], Any] = {}
        self.events: list[EventRow] = []
        self.clock_ms = 0

    def split(self, made: Changes) -> Changes:
        """The same changes, with the tasks that are not there yet among the new ones."""
        new = {key: row for key, row in made.tasks.items() if key not in self.tasks}
        old = {key: row for key, row in made.tasks.items() if key in self.tasks}
        return structs.replace(made, new_tasks=new, tasks=old)

    def apply(self, made: Changes) -> None:
        self.tasks |= copy.deepcopy(made.new_tasks | made.tasks)
        for name in ("assignments", "jobs", "rate_keys", "records"):
            self.others |= {(name, key): row for key, row in getattr(made, name).items()}
        self.events += made.events
        self.clock_ms = made.clock_ms or self.clock_ms

    def table(self, name: str) -> dict[Any, Any]:
        return {key: row for (table, key), row in self.others.items() if table == name}


@given(st.lists(changes(), max_size=6), st.integers(0, 6))
def test_the_database_holds_what_plain_dicts_would_hold(made: list[Changes], reopen: int) -> None:
    model = Model()

    with tempfile.TemporaryDirectory() as folder, storage_bench(Path(folder)) as bench:
        for turn, each in enumerate(made):
            split = model.split(each)
            bench.change(*split.tasks.values(), **_others(split))
            model.apply(split)
            if turn == reopen:
                bench.reopen()
        _same(bench, model)
        bench.reopen()
        _same(bench, model)
        _same_after_restart(bench, model)


@given(st.lists(changes(), min_size=2, max_size=5))
def test_turns_saved_together_are_as_good_as_one_by_one(made: list[Changes]) -> None:
    model, together = Model(), Changes()

    for each in made:
        split = model.split(each)
        model.apply(split)
        together.add(copy.deepcopy(split))

    with tempfile.TemporaryDirectory() as folder, storage_bench(Path(folder)) as bench:
        bench.change(*together.tasks.values(), **_others(together))
        _same(bench, model)


def _others(made: Changes) -> dict[str, Any]:
    return {name: value for name, value in structs.asdict(made).items() if name != "tasks"}


def _same(bench: StorageBench, model: Model) -> None:
    queries, tasks = bench.queries, model.tasks
    assert queries.tasks_by_id(range(20)) == tasks
    assert queries.jobs_by_id(range(5)) == model.table("jobs")
    assert queries.rate_keys(["", "a", "b", "é"]) == model.table("rate_keys")
    assert [one.event for one in queries.events_after(0)] == model.events
    for table in {name for name, _ in model.table("records")}:
        rows = [row for (name, _), row in sorted(model.table("records").items()) if name == table]
        assert queries.records(table) == rows
    for task_id in tasks:
        detail = queries.task_detail(task_id)
        attempts = {row.attempt: row for (one, _), row in _attempts(model) if one == task_id}
        assert detail is not None
        assert {row.attempt: row for row in detail.attempts} == attempts
    _same_backlog(bench, model)
    for state in TaskState:
        listed = queries.list_tasks(TaskFilter(states=(state,))).rows
        expected = sorted((key for key, row in tasks.items() if row.state is state), reverse=True)
        assert [row.task_id for row in listed] == expected


def _attempts(model: Model) -> list[tuple[tuple[TaskId, int], AssignmentRow]]:
    return list(model.table("assignments").items())


def _same_backlog(bench: StorageBench, model: Model) -> None:
    """Each pending task is either in its lane or among the delayed."""
    pending = [row for row in model.tasks.values() if row.state is TaskState.PENDING]
    ready: dict[LaneKey, list[TaskRow]] = {}
    for row in sorted(pending, key=lambda row: row.task_id):
        if not row.retry_at_ms and not row.not_before_wall:
            lane = LaneKey(row.task_type, row.labels, row.rate_key, row.priority)
            ready.setdefault(lane, []).append(row)
    assert bench.queries.lanes(None, 50) == (sorted(ready), False)
    for lane, rows in ready.items():
        assert bench.queries.backlog(lane, 0, 50) == (rows, False)
    delayed, more = bench.queries.delayed(50)
    expected = {row.task_id for row in pending} - {
        r.task_id for rows in ready.values() for r in rows
    }
    assert ({row.task_id for row in delayed}, more) == (expected, False)


def _same_after_restart(bench: StorageBench, model: Model) -> None:
    found = recovery.load(bench.database)
    in_hands = [row for row in model.tasks.values() if row.state in IN_HANDS]
    assert {row.task_id: row for row in found.held} == {row.task_id: row for row in in_hands}
    assert found.next_task_id == max(model.tasks, default=0) + 1
    assert found.clock_ms == model.clock_ms
    jobs = model.table("jobs").values()
    assert found.totals.pending == sum(row.pending for row in jobs)
    current = {(row.task_id, row.attempt) for row in in_hands}
    attempts = {key for key, _ in _attempts(model)}
    assert {(row.task_id, row.attempt) for row in found.assignments} == current & attempts
