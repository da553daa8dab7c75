"""One Changes is one transaction, and each row reads back as it was written."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.recovery import begin_epoch
from storage.writer import apply
from tests.support.storage_bench import (
    StorageBench,
    attempt,
    device,
    ended,
    held,
    job,
    storage_bench,
    task,
)
from zmqcluster.core.effects import Changes
from zmqcluster.core.rows import (
    EventRow,
    HeartbeatRow,
    KeyRow,
    RateKeyRow,
    RecordRow,
    SubmissionRow,
    TaskRow,
    TokenRow,
    UniqueKeyRow,
)
from zmqcluster.errors import StorageError
from zmqcluster.model import DeviceId, JobId, JobState, Role, TaskId, TaskState

BIG = b"x" * 200_000
FULL_TASK = TaskRow(
    task_id=TaskId(7),
    job_id=JobId(3),
    parent_id=TaskId(2),
    task_type="crawl",
    labels="eu,gpu",
    rate_key="https://bücher.example",
    unique_key="https://bücher.example/ä",
    priority=9,
    max_retry_count=100,
    timeout_ms=7 * 24 * 3_600_000,
    created_wall=2**53 - 1,
    task_data=b"\x00\xff",
    state=TaskState.DEAD,
    attempt=2**31 - 1,
    failures=1,
    deaths=3,
    cancel_requested=True,
    not_before_wall=4,
    retry_at_ms=5,
    device_id=DeviceId("d1"),
    assigned_wall=6,
    started_wall=7,
    finished_wall=8,
    result=b"\xc0",
    error="IndexError: 'ß'",
)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[StorageBench]:
    with storage_bench(tmp_path) as opened:
        yield opened


@pytest.mark.parametrize("data", [b"", b"x" * 2000, b"x" * 2001, BIG])
def test_a_task_reads_back_as_it_was_written(bench: StorageBench, data: bytes) -> None:
    row = FULL_TASK
    row.task_data = data

    bench.save(row, task(8))

    read = bench.queries.tasks_by_id([7])[TaskId(7)]
    assert read == row
    assert type(read.state) is TaskState
    assert read.cancel_requested is True


def test_a_changed_task_keeps_what_never_changes(bench: StorageBench) -> None:
    bench.save(task(1, task_data=b"small"), task(2, task_data=BIG))
    changed = [held(i, task_data=b"other", rate_key="other", error="e") for i in (1, 2)]

    bench.change(*changed)

    read = bench.queries.tasks_by_id([1, 2])
    assert [row.task_data for row in read.values()] == [b"small", BIG]
    assert {row.rate_key for row in read.values()} == {""}
    assert {(row.state, row.device_id, row.error) for row in read.values()} == {
        (TaskState.ASSIGNED, "d1", "e")
    }


def test_a_change_of_state_does_not_write_large_data_again(bench: StorageBench) -> None:
    bench.save(*(task(i, task_data=BIG) for i in range(1, 11)))
    bench.database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    bench.change(*(held(i, task_data=BIG) for i in range(1, 11)))

    assert bench.path.with_name("cluster.db-wal").stat().st_size < len(BIG)


def test_a_new_task_that_changed_in_the_same_batch_is_written_once_as_it_became(
    bench: StorageBench,
) -> None:
    statements: list[str] = []
    bench.database.conn.set_trace_callback(statements.append)

    bench.save(task(1), tasks={TaskId(1): held(1)})

    assert bench.queries.tasks_by_id([1])[TaskId(1)].state is TaskState.ASSIGNED
    assert not [sql for sql in statements if sql.startswith("UPDATE tasks")]


@pytest.mark.parametrize("data", [b"\x80", BIG])
def test_a_task_pruned_before_its_retry_was_saved_is_written_anew(
    bench: StorageBench, data: bytes
) -> None:
    bench.save(task(1))
    retried = task(5, failures=0, task_data=data)

    bench.change(held(1), retried)

    assert bench.queries.tasks_by_id([5])[TaskId(5)] == retried
    assert bench.queries.tasks_by_id([1])[TaskId(1)].state is TaskState.ASSIGNED


def test_the_last_row_of_each_thing_wins(bench: StorageBench) -> None:
    first = Changes(
        assignments={(TaskId(1), 1): attempt(1), (TaskId(1), 2): attempt(1, 2)},
        jobs={JobId(1): job(1, pending=3)},
        devices={DeviceId("d1"): device("d1")},
        rate_keys={"k": RateKeyRow("k", 1, 2, 3, 4)},
        keys={b"p": KeyRow(b"p", Role.WORKER, DeviceId("d1"), "t", 1)},
        tokens={"t": TokenRow("t", b"p" * 32, Role.WORKER, 1, 2, 3)},
        records={("pages", "u"): RecordRow("pages", "u", JobId(1), TaskId(1), 1, 5, b"old")},
        clock_ms=10,
        wall_ms=20,
    )
    last = Changes(
        assignments={(TaskId(1), 1): attempt(1, outcome="completed", run_us=9, ended_wall=8)},
        jobs={JobId(1): job(1, state=JobState.FINISHED, finished_wall=9, completed=3)},
        devices={DeviceId("d1"): device("d1", state="offline", drained=True, lost=2)},
        rate_keys={"k": RateKeyRow("k", 0, 0, 0, 9)},
        keys={b"p": KeyRow(b"p", Role.WORKER, DeviceId("d1"), "t", 1, revoked_wall=5)},
        tokens={"t": TokenRow("t", b"p" * 32, Role.CLIENT, 1, 2, 0, revoked_wall=6)},
        records={("pages", "u"): RecordRow("pages", "u", JobId(2), TaskId(9), 2, 6, b"new")},
        clock_ms=11,
    )
    bench.save(task(1))

    apply(bench.database, first)
    apply(bench.database, last)

    queries = bench.queries
    detail = queries.task_detail(1)
    assert detail is not None
    assert detail.attempts == [attempt(1, 2), last.assignments[TaskId(1), 1]]
    assert queries.job(1) == last.jobs[JobId(1)]
    assert queries.device("d1") == last.devices[DeviceId("d1")]
    assert queries.rate_keys(["k", "other"]) == last.rate_keys
    assert queries.keys() == list(last.keys.values())
    assert queries.tokens() == list(last.tokens.values())
    assert queries.records("pages") == list(last.records.values())
    assert dict(bench.database.execute("SELECT key, value FROM meta")) == {
        "clock_ms": 11,
        "wall_ms": 20,
    }


def test_lists_are_appended_and_read_back(bench: StorageBench) -> None:
    beats = [HeartbeatRow(DeviceId("d1"), i, 1.5, 2.0, 3, 4.0, 5, 6, 7, 8) for i in range(3)]
    events = [EventRow(5, "lost", 1, 2, 3, "d1", "why"), EventRow(6, "start")]

    bench.save(heartbeats=beats, events=events)
    bench.save(events=[EventRow(7, "stop")])

    assert bench.queries.heartbeats("d1") == beats[::-1]
    assert [one.event for one in bench.queries.events_after(0)] == [*events, EventRow(7, "stop")]
    assert [one.event_id for one in bench.queries.newest_events()] == [3, 2, 1]


@pytest.mark.parametrize(
    ("task_ids", "existing"),
    [((), ()), ((5,), (0,)), (tuple(range(1, 10_001)), ()), ((9, 3, 4, 5, 5, 1), (0, 2, 3))],
)
def test_an_answer_is_given_again_as_it_was(
    bench: StorageBench, task_ids: tuple[int, ...], existing: tuple[int, ...]
) -> None:
    row = SubmissionRow(b"r" * 16, JobId(4), tuple(map(TaskId, task_ids)), existing, 99)

    bench.save(submissions=[row])

    assert bench.queries.submission(b"r" * 16) == row
    assert bench.queries.submission(b"other") is None


def test_ten_thousand_new_tasks_take_a_few_bytes_in_their_answer(bench: StorageBench) -> None:
    row = SubmissionRow(b"r", JobId(0), tuple(map(TaskId, range(10**9, 10**9 + 10_000))), (), 0)

    bench.save(submissions=[row])

    (size,) = bench.database.execute("SELECT length(task_ids) FROM submissions").fetchone()
    assert size < 16


def test_a_unique_key_cannot_be_taken_twice_and_nothing_of_that_batch_stays(
    bench: StorageBench,
) -> None:
    first = UniqueKeyRow(JobId(1), b"h" * 16, TaskId(1))
    bench.save(task(1), unique_keys=[first])

    with pytest.raises(StorageError, match="UNIQUE constraint failed"):
        bench.save(
            task(2),
            unique_keys=[UniqueKeyRow(JobId(1), b"h" * 16, TaskId(2))],
            events=[EventRow(1, "x")],
        )

    assert bench.queries.known_keys([(JobId(1), b"h" * 16)]) == {(JobId(1), b"h" * 16): 1}
    assert bench.queries.tasks_by_id([2]) == {}


def test_a_failing_row_at_the_very_end_leaves_nothing(bench: StorageBench) -> None:
    def break_events() -> None:
        bench.database.execute(
            "CREATE TEMP TRIGGER broken BEFORE INSERT ON events "
            "BEGIN SELECT RAISE(FAIL, 'no event today'); END"
        )

    break_events()
    with pytest.raises(StorageError, match="cannot save to the database: no event today"):
        bench.save(
            task(1),
            jobs={JobId(1): job(1)},
            devices={DeviceId("d"): device("d")},
            events=[EventRow(1, "x")],
        )

    assert [bench.count(name) for name in ("tasks", "jobs", "devices", "events")] == [0] * 4
    bench.save(task(1))
    assert bench.count("tasks") == 1


def test_a_task_cannot_be_new_twice(bench: StorageBench) -> None:
    bench.save(task(1))

    with pytest.raises(StorageError, match="UNIQUE constraint failed"):
        bench.save(task(1), task(2))

    assert bench.count("tasks") == 1


@pytest.mark.parametrize(
    "row", [task(1, created_wall=2**63), task(1, error="\ud800"), task(1, rate_key=b"bytes")]
)
def test_a_value_that_does_not_fit_is_a_storage_error(bench: StorageBench, row: TaskRow) -> None:
    with pytest.raises(StorageError):
        bench.save(task(9), row)

    assert bench.count("tasks") == 0


def test_the_disk_failing_at_commit_is_a_storage_error(bench: StorageBench) -> None:
    bench.database.execute("PRAGMA max_page_count = 80").fetchall()

    with pytest.raises(StorageError, match="the disk is full: free some space"):
        bench.save(*(ended(i, 5, task_data=b"x" * 1500) for i in range(1, 500)))

    assert bench.count("tasks") == 0


def test_a_write_waits_for_no_reader(bench: StorageBench) -> None:
    bench.save(*(task(i) for i in range(1, 50)))
    half_read = sqlite3.connect(bench.path)
    cursor = half_read.execute("SELECT * FROM tasks")
    cursor.fetchone()

    bench.save(task(100))

    half_read.close()
    assert bench.count("tasks") == 50


def test_a_master_whose_successor_has_begun_saves_nothing(bench: StorageBench) -> None:
    mine = begin_epoch(bench.database)
    apply(bench.database, Changes(new_tasks={TaskId(1): task(1)}), mine)
    begin_epoch(bench.database)

    with pytest.raises(StorageError, match="another master has begun here"):
        apply(bench.database, Changes(new_tasks={TaskId(2): task(2)}), mine)

    assert bench.count("tasks") == 1
