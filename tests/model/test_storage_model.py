"""Whatever sequence of Changes: the database holds what plain dicts would hold, also reopened."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from storage import recovery
from storage.task_dao import INLINE_BYTES_MAX
from storage.task_listing import TaskFilter, TaskPage
from tests.support.row_model import (
    DEVICES,
    JOBS,
    REQUESTS,
    RowModel,
    changes,
    numbers,
    texts,
)
from tests.support.storage_bench import StorageBench, storage_bench
from tests.support.tiers import scaled
from zmqcluster.core.effects import Changes
from zmqcluster.core.events import LaneKey
from zmqcluster.core.rows import TaskRow
from zmqcluster.model import JobId, TaskState

# Rows are long to print, and are told all the same.
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

IN_HANDS = (TaskState.ASSIGNED, TaskState.RUNNING)
OPEN = (TaskState.PENDING, *IN_HANDS)
RECORD_TABLES = ("", "a", "b", "é")
# A step: changes to apply, an instant before which to prune, or None: close and open again.
steps = st.lists(changes() | changes() | numbers | st.none(), max_size=8)
filters = st.builds(
    TaskFilter,
    states=st.lists(st.sampled_from(TaskState), max_size=3, unique=True).map(tuple),
    task_type=st.sampled_from([None, None, "crawl", "noop"]),
    job_id=st.sampled_from([None, None, 0, 1, 2]),
    device_id=st.none() | texts,
    rate_key=st.sampled_from([None, None, "a", "b"]),
)


@contextmanager
def _bench() -> Iterator[StorageBench]:
    with tempfile.TemporaryDirectory() as folder, storage_bench(Path(folder)) as bench:
        yield bench


def _take(bench: StorageBench, model: RowModel, step: Changes | int | None) -> None:
    match step:
        case None:
            bench.reopen()
        case int():
            while bench.save(prune_before_wall=step):
                pass
            model.prune(step)
        case Changes():
            split = model.split(step)
            bench.change(*split.tasks.values(), **_others(split))
            model.apply(split)


@settings(max_examples=scaled(30))
@given(steps)
def test_the_database_holds_what_plain_dicts_would_hold(taken: list[Changes | int | None]) -> None:
    model = RowModel()

    with _bench() as bench:
        for step in taken:
            _take(bench, model, step)
        _same(bench, model)
        bench.reopen()
        _same(bench, model)
        _same_after_restart(bench, model)


@settings(max_examples=scaled(12))
@given(st.lists(changes(), min_size=2, max_size=5))
def test_turns_saved_together_are_as_good_as_one_by_one(made: list[Changes]) -> None:
    model, together = RowModel(), Changes()

    for each in made:
        split = model.split(each)
        model.apply(split)
        together.add(copy.deepcopy(split))

    with _bench() as bench:
        bench.change(*together.tasks.values(), **_others(together))
        _same(bench, model)


@settings(max_examples=scaled(30))
@given(steps, filters, st.integers(1, 5), st.booleans())
def test_a_list_read_page_by_page_is_the_whole_list(
    taken: list[Changes | int | None], wanted: TaskFilter, limit: int, newest_first: bool
) -> None:
    model = RowModel()

    with _bench() as bench:
        for step in taken:
            _take(bench, model, step)
        found = _walked(
            lambda cursor: bench.queries.list_tasks(
                wanted, cursor=cursor, limit=limit, newest_first=newest_first
            )
        )
        opened = _walked(lambda cursor: bench.queries.open_tasks(1, cursor or 0, limit))

    expected = [slim(row) for row in model.tasks.values() if fits(row, wanted)]
    expected.sort(key=lambda row: row.task_id, reverse=newest_first)
    assert found == expected
    job_1 = TaskFilter(states=OPEN, job_id=1)
    assert opened == [slim(row) for _, row in sorted(model.tasks.items()) if fits(row, job_1)]


@settings(max_examples=scaled(30))
@given(steps, st.integers(1, 3), st.integers(0, 12))
def test_a_backlog_read_in_portions_is_the_whole_backlog(
    taken: list[Changes | int | None], limit: int, after_id: int
) -> None:
    model = RowModel()

    with _bench() as bench:
        for step in taken:
            _take(bench, model, step)
        ready = _ready(model)
        lanes: list[LaneKey] = []
        more = True
        while more:
            portion, more = bench.queries.lanes(lanes[-1] if lanes else None, limit)
            assert len(portion) == limit or not more
            lanes += portion
        assert lanes == sorted(ready)
        for lane, rows in ready.items():
            behind = [row for row in rows if row.task_id > after_id]
            expected = (behind[:limit], len(behind) > limit)
            assert bench.queries.backlog(lane, after_id, limit) == expected
        _same_delayed(bench, model, limit)


# --- what is the same ----------------------------------------------------------------------------


def _others(made: Changes) -> dict[str, Any]:
    return {name: value for name, value in structs.asdict(made).items() if name != "tasks"}


def _walked(page_at: Any) -> list[TaskRow]:
    rows: list[TaskRow] = []
    cursor: int | None = None
    while True:
        page: TaskPage = page_at(cursor)
        rows += page.rows
        cursor = page.next_cursor
        if cursor is None:
            return rows


def slim(row: TaskRow) -> TaskRow:
    """As it is listed."""
    return structs.replace(row, task_data=b"", result=b"")


def fits(row: TaskRow, wanted: TaskFilter) -> bool:
    if wanted.states and row.state not in wanted.states:
        return False
    pairs = (
        (wanted.task_type, row.task_type),
        (wanted.job_id, row.job_id),
        (wanted.device_id, row.device_id),
        (wanted.rate_key, row.rate_key),
    )
    return all(want is None or want == have for want, have in pairs)


def _same(bench: StorageBench, model: RowModel) -> None:
    queries, tasks, tables = bench.queries, model.tasks, model.tables
    assert queries.tasks_by_id(range(20)) == tasks
    assert queries.jobs_by_id(JOBS) == tables["jobs"]
    assert queries.rate_keys(RECORD_TABLES) == tables["rate_keys"]
    keys = [(JobId(job_id), key) for job_id in JOBS for key in (b"1" * 16, b"2" * 16, bytes(16))]
    assert queries.known_keys(keys) == model.unique
    for request_id in REQUESTS:
        assert queries.submission(request_id) == model.submissions.get(request_id)
    for task_id in range(1, 13):
        detail = queries.task_detail(task_id)
        assert (detail is not None) == (task_id in tasks)
        if detail is not None:
            attempts = [row for (one, _), row in tables["assignments"].items() if one == task_id]
            newest_first = sorted(attempts, key=lambda row: -row.attempt)
            assert (detail.task, detail.attempts) == (tasks[detail.task.task_id], newest_first)
    assert structs.asdict(queries.counts()) == model.totals()
    large = [row for row in tasks.values() if len(row.task_data) > INLINE_BYTES_MAX]
    for table, rows in (
        ("task_bodies", large),
        ("task_assignments", tables["assignments"]),
        ("unique_keys", model.unique),
        ("submissions", model.submissions),
    ):
        assert bench.count(table) == len(rows), f"{table} has something left over"
    _same_lists(bench, model)
    _same_backlog(bench, model)


def _same_lists(bench: StorageBench, model: RowModel) -> None:
    """What people page through."""
    queries, tables = bench.queries, model.tables
    for name in RECORD_TABLES:
        rows = [row for (table, _), row in sorted(tables["records"].items()) if table == name]
        assert queries.records(name) == rows
        assert queries.records(name, "a", 1) == [row for row in rows if row.key > "a"][:1]
    named = [row for job_id, row in sorted(tables["jobs"].items(), reverse=True) if job_id]
    assert queries.list_jobs() == named
    assert queries.list_jobs(3, 1) == [row for row in named if row.job_id < 3][:1]
    devices = [row for _, row in sorted(tables["devices"].items())]
    assert queries.list_devices() == devices
    assert queries.list_devices("D1", 1) == [row for row in devices if row.device_id > "D1"][:1]
    for name in DEVICES:
        assert queries.device(name) == tables["devices"].get(name)
        beats = [row for key, row in sorted(model.heartbeats.items()) if key[0] == name][::-1]
        assert queries.heartbeats(name) == beats
        assert queries.heartbeats(name, 1) == beats[:1]
    for task_id in (1, 2):
        events = [row for row in model.events if row.task_id == task_id]
        assert [one.event for one in queries.events_of_task(task_id)] == events
        assert [one.event for one in queries.events_of_task(task_id, 1)] == events[-1:]
    stored = queries.events_after(0)
    assert [one.event for one in stored] == model.events
    assert queries.newest_events() == stored[::-1]
    if stored:
        assert queries.events_after(stored[0].event_id, 1) == stored[1:2]
        assert queries.newest_events(stored[-1].event_id, 1) == stored[:-1][-1:]
    assert queries.keys() == _aged(tables["keys"])
    assert queries.tokens() == _aged(tables["tokens"])


def _aged(rows: dict[Any, Any]) -> list[Any]:
    """Oldest first."""
    return [
        row for _, row in sorted(rows.items(), key=lambda pair: (pair[1].created_wall, pair[0]))
    ]


def _ready(model: RowModel) -> dict[LaneKey, list[TaskRow]]:
    """What waits for a device and nothing else, by lane, in the order of ids."""
    ready: dict[LaneKey, list[TaskRow]] = {}
    for _, row in sorted(model.tasks.items()):
        if row.state is TaskState.PENDING and not row.retry_at_ms and not row.not_before_wall:
            lane = LaneKey(row.task_type, row.labels, row.rate_key, row.priority)
            ready.setdefault(lane, []).append(row)
    return ready


def _delayed(model: RowModel) -> dict[int, int]:
    """When each task that waits for a moment is due, by the cluster's clock."""
    ahead_ms = model.wall_ms - model.clock_ms
    return {
        row.task_id: row.retry_at_ms or row.not_before_wall - ahead_ms
        for row in model.tasks.values()
        if row.state is TaskState.PENDING and (row.retry_at_ms or row.not_before_wall)
    }


def _same_backlog(bench: StorageBench, model: RowModel) -> None:
    """Each pending task is either in its lane or among the delayed."""
    ready = _ready(model)
    assert bench.queries.lanes(None, 50) == (sorted(ready), False)
    for lane, rows in ready.items():
        assert bench.queries.backlog(lane, 0, 50) == (rows, False)
    rows, more = bench.queries.delayed(50)
    assert ({row.task_id for row in rows}, more) == (set(_delayed(model)), False)
    assert all(row == model.tasks[row.task_id] for row in rows)


def _same_delayed(bench: StorageBench, model: RowModel, limit: int) -> None:
    """A cut list has the soonest; it may be shorter than asked for, but never empty of them."""
    due = _delayed(model)
    rows, more = bench.queries.delayed(limit)
    found = [due[row.task_id] for row in rows]
    assert found == sorted(due.values())[: len(found)]
    assert more == (len(rows) < len(due))
    assert len(rows) == min(limit, len(due)) or more
    assert bool(rows) == bool(due)


def _same_after_restart(bench: StorageBench, model: RowModel) -> None:
    epoch = recovery.load(bench.database).epoch
    assert recovery.begin_epoch(bench.database) == epoch + 1
    found = recovery.load(bench.database)
    in_hands = [row for row in model.tasks.values() if row.state in IN_HANDS]
    assert {row.task_id: row for row in found.held} == {row.task_id: row for row in in_hands}
    assert (found.epoch, found.clock_ms, found.wall_ms) == (
        epoch + 1,
        model.clock_ms,
        model.wall_ms,
    )
    assert found.next_task_id == max(model.tasks, default=0) + 1
    assert found.next_job_id == max(model.tables["jobs"], default=0) + 1
    assert structs.asdict(found.totals) == model.totals()
    current = {(row.task_id, row.attempt) for row in in_hands}
    attempts = model.tables["assignments"]
    assert {(row.task_id, row.attempt): row for row in found.assignments} == {
        key: row for key, row in attempts.items() if key in current
    }
    assert {row.job_id: row for row in found.jobs} == {
        job_id: row
        for job_id, row in model.tables["jobs"].items()
        if not job_id or row.state == "active" or row.pending or row.running
    }
    assert found.devices == [row for _, row in sorted(model.tables["devices"].items())]
    held_keys = {row.rate_key for row in in_hands if row.rate_key}
    assert {row.rate_key: row for row in found.rate_keys} == {
        key: row for key, row in model.tables["rate_keys"].items() if key in held_keys
    }
    assert found.keys == _aged(model.tables["keys"])
    assert found.tokens == _aged(model.tables["tokens"])
    assert found.has_delayed == bool(_delayed(model))
