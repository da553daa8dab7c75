"""A restart knows everything that was in flight, and reads nothing of the backlog."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from storage import recovery
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
from zmqcluster.core.rows import KeyRow, RateKeyRow, TokenRow
from zmqcluster.errors import StorageError
from zmqcluster.model import DeviceId, JobId, JobState, TaskId, TaskState
from zmqcluster.views import TaskCounts


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[StorageBench]:
    with storage_bench(tmp_path) as opened:
        yield opened


def test_a_new_database_has_nothing_in_it(bench: StorageBench) -> None:
    found = recovery.load(bench.database)

    assert (found.epoch, found.clock_ms, found.wall_ms) == (0, 0, 0)
    assert (found.next_task_id, found.next_job_id) == (1, 1)
    assert (found.held, found.jobs, found.devices, found.has_delayed) == ([], [], [], False)
    assert found.totals == TaskCounts()


def test_each_start_has_a_higher_epoch_that_outlives_it(bench: StorageBench) -> None:
    assert recovery.begin_epoch(bench.database) == 1

    bench.reopen()

    assert recovery.load(bench.database).epoch == 1
    assert recovery.begin_epoch(bench.database) == 2


def test_all_that_was_in_flight_is_found_again(bench: StorageBench) -> None:
    first, second = held(2, task_data=b"x" * 5000), held(3, state=TaskState.RUNNING, attempt=2)
    bench.save(
        task(1),
        first,
        second,
        ended(9, 5_000),
        assignments={
            (TaskId(2), 1): attempt(2),
            (TaskId(3), 1): attempt(3, outcome="died"),
            (TaskId(3), 2): attempt(3, 2, epoch=4),
            (TaskId(9), 1): attempt(9, outcome="completed"),
        },
        devices={DeviceId("d1"): device("d1", drained=True)},
        keys={b"k": KeyRow(b"k", "worker", DeviceId("d1"), "t", 1, revoked_wall=2)},
        tokens={"t": TokenRow("t", b"p", "worker", 1, 2, 3)},
        clock_ms=77,
        wall_ms=88,
    )

    bench.reopen()
    found = recovery.load(bench.database)

    assert sorted(found.held, key=lambda row: row.task_id) == [first, second]
    assert found.assignments == [attempt(2), attempt(3, 2, epoch=4)]
    assert found.next_task_id == 10
    assert found.devices == [device("d1", drained=True)]
    assert [key.revoked_wall for key in found.keys] == [2]
    assert found.tokens == [TokenRow("t", b"p", "worker", 1, 2, 3)]
    assert (found.clock_ms, found.wall_ms) == (77, 88)


def test_jobs_with_anything_left_to_do_are_found_again(bench: StorageBench) -> None:
    jobs = [
        job(0, pending=1),
        job(1, running=1),
        job(2, state=JobState.FINISHED, finished_wall=5, completed=4),
        # Cancelled, and the sweep over its tasks was not through.
        job(3, state=JobState.CANCELLED, pending=2, cancelled=1),
        job(4),
    ]

    bench.save(jobs={row.job_id: row for row in jobs})
    found = recovery.load(bench.database)

    assert [row.job_id for row in found.jobs] == [0, 1, 3, 4]
    assert found.next_job_id == 5
    assert found.totals == TaskCounts(pending=3, running=1, completed=4, cancelled=1)


def test_only_rate_keys_of_held_tasks_are_read(bench: StorageBench) -> None:
    rows = [RateKeyRow(name, delay_ms=5) for name in ("held", "waits", "unused")]
    bench.save(
        held(1, rate_key="held"),
        held(2, rate_key="unlimited"),
        held(3),
        task(4, rate_key="waits"),
        rate_keys={row.rate_key: row for row in rows},
    )

    assert recovery.load(bench.database).rate_keys == rows[:1]


@pytest.mark.parametrize("field", ["retry_at_ms", "not_before_wall"])
def test_waiting_tasks_are_known_to_exist(bench: StorageBench, field: str) -> None:
    bench.save(held(1, "d1", **{field: 5}))
    assert not recovery.load(bench.database).has_delayed

    bench.save(task(2, **{field: 5}))

    assert recovery.load(bench.database).has_delayed


def test_the_backlog_is_not_read(bench: StorageBench) -> None:
    bench.save(*(task(i) for i in range(1, 20_001)), held(20_001))
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    bench.database.conn.set_progress_handler(count, 100)
    recovery.load(bench.database)

    # About 2,000 instructions; reading the backlog would take 20 for each of its tasks.
    assert steps < 100


def test_a_disk_that_fails_is_a_storage_error(bench: StorageBench) -> None:
    bench.database.execute("DROP TABLE devices")

    with pytest.raises(StorageError, match="cannot read the database: no such table"):
        recovery.load(bench.database)


def test_ids_of_jobs_go_on_where_they_were(bench: StorageBench) -> None:
    bench.save(jobs={JobId(41): job(41)})

    assert recovery.load(bench.database).next_job_id == 42
