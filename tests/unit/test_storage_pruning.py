"""Retention: what is old goes in small steps, what ids and promises hang on stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage import pruning, recovery
from storage.writer import apply
from tests.support.storage_bench import StorageBench, attempt, ended, held, job, storage_bench, task
from zmqcluster.core.effects import Changes
from zmqcluster.core.rows import (
    EventRow,
    HeartbeatRow,
    RateKeyRow,
    RecordRow,
    SubmissionRow,
    UniqueKeyRow,
)
from zmqcluster.model import DeviceId, JobId, JobState, TaskId, TaskState
from zmqcluster.views import TaskCounts

OLD = 1_000
NOW = 9_000
BEFORE = 5_000


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[StorageBench]:
    with storage_bench(tmp_path) as opened:
        yield opened


def test_old_ended_tasks_go_with_their_attempts_and_bodies(bench: StorageBench) -> None:
    states = (TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED, TaskState.DEAD)
    bench.save(
        *(ended(i, OLD, state=state, task_data=b"x" * 5000) for i, state in enumerate(states, 1)),
        ended(5, NOW, task_data=b"x" * 5000),
        task(6),
        held(7),
        task(8),
        assignments={(TaskId(i), n): attempt(i, n) for i in range(1, 8) for n in (1, 2)},
    )

    bench.save(prune_before_wall=BEFORE)

    assert sorted(bench.queries.tasks_by_id(range(1, 9))) == [5, 6, 7, 8]
    assert bench.count("task_bodies") == 1
    assert bench.count("task_assignments") == 6


def test_the_newest_ids_stay_however_old_so_that_no_id_is_used_again(bench: StorageBench) -> None:
    finished = job(1, state=JobState.FINISHED, finished_wall=OLD)
    bench.save(
        ended(1, OLD),
        ended(2, OLD),
        jobs={JobId(1): finished},
        events=[EventRow(OLD, "a"), EventRow(OLD, "b")],
    )

    bench.save(prune_before_wall=BEFORE)
    bench.save(events=[EventRow(NOW, "c")])

    found = recovery.load(bench.database)
    assert (found.next_task_id, found.next_job_id) == (3, 2)
    assert [one.event_id for one in bench.queries.events_after(0)] == [2, 3]


def test_a_step_is_small_and_says_whether_there_may_be_more(bench: StorageBench) -> None:
    count = pruning.PRUNED_TASKS_MAX + 10
    bench.save(*(ended(i, OLD + i % 7) for i in range(1, count + 1)), task(count + 1))

    left = [(bench.save(prune_before_wall=BEFORE), bench.count("tasks")) for _ in range(2)]

    assert left == [(True, 11), (False, 1)]


@pytest.mark.parametrize("body", ["task_data", "result"])
def test_large_bodies_make_a_step_smaller(
    bench: StorageBench, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    monkeypatch.setattr(pruning, "PRUNED_BYTES_MAX", 10_000)
    bench.save(*(ended(i, OLD, **{body: b"x" * 4_000}) for i in range(1, 6)), task(9))

    left = [(bench.save(prune_before_wall=BEFORE), bench.count("tasks")) for _ in range(3)]

    assert left == [(True, 3), (False, 1), (False, 1)]


Rows = Callable[[int], dict[str, Any]]

# Each kind of thing that grows by itself: devices beat and events happen while no task ends.
HISTORY: dict[str, Rows] = {
    "events": lambda count: {"events": [EventRow(OLD, "x")] * (count + 1)},
    "device_heartbeats": lambda count: {
        "heartbeats": [
            HeartbeatRow(DeviceId("d"), OLD + i, 1, 2, 3, 4, 5, 6, 7, 8) for i in range(count)
        ]
    },
    "submissions": lambda count: {
        "submissions": [SubmissionRow(b"%d" % i, JobId(0), (), (), OLD) for i in range(count)]
    },
    "rate_keys": lambda count: {
        "rate_keys": {f"k{i}": RateKeyRow(f"k{i}", 5, changed_wall=OLD) for i in range(count)}
    },
    "jobs": lambda count: {
        "jobs": {
            JobId(i): job(i, state=JobState.FINISHED, finished_wall=OLD)
            for i in range(1, count + 2)
        }
    },
}


@pytest.mark.parametrize("table", HISTORY)
def test_history_that_one_step_does_not_finish_asks_for_another(
    bench: StorageBench, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    monkeypatch.setattr(pruning, "PRUNED_ROWS_MAX", 20)
    bench.save(**HISTORY[table](2 * 20 + 5))

    steps = [bench.save(prune_before_wall=BEFORE) for _ in range(3)]

    assert steps == [True, True, False]
    assert bench.count(table) == (1 if table in {"events", "jobs"} else 0)


NEEDED: dict[str, dict[str, Any]] = {
    "a task": {"new_tasks": {TaskId(1): task(1, rate_key="k")}},
    "an ended task": {"new_tasks": {TaskId(1): ended(1, NOW, rate_key="k"), TaskId(2): task(2)}},
    "its job": {"jobs": {JobId(7): job(7)}},
    "the time": {"clock_ms": 299},
}


@pytest.mark.parametrize("need", NEEDED)
def test_limits_stay_while_anything_needs_them(bench: StorageBench, need: str) -> None:
    rows = (
        RateKeyRow("k", 5, 0, 0, 300, job_id=JobId(7), changed_wall=OLD),
        RateKeyRow("new", 5, changed_wall=NOW),
        RateKeyRow("other", 5, changed_wall=OLD),
    )
    given: dict[str, Any] = {"rate_keys": {row.rate_key: row for row in rows}, "clock_ms": 300}
    apply(bench.database, Changes(**(given | NEEDED[need])))

    bench.save(prune_before_wall=BEFORE)

    assert sorted(bench.queries.rate_keys(["k", "new", "other"])) == ["k", "new"]


def test_limits_that_are_needed_do_not_stand_before_others(
    bench: StorageBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "PRUNED_ROWS_MAX", 20)
    needed = {f"k{i}": RateKeyRow(f"k{i}", 5, changed_wall=OLD) for i in range(40)}
    tasks = [task(i, rate_key=name) for i, name in enumerate(needed, 1)]
    bench.save(*tasks, rate_keys=needed | {"z": RateKeyRow("z", 5, changed_wall=OLD + 1)})

    steps = [bench.save(prune_before_wall=BEFORE) for _ in range(3)]

    assert steps == [True, True, False]
    assert sorted(bench.queries.rate_keys([*needed, "z"])) == sorted(needed)


def test_history_goes_by_age_and_the_catalogue_stays(bench: StorageBench) -> None:
    at = (OLD, NOW)
    bench.save(
        heartbeats=[HeartbeatRow(DeviceId("d"), wall, 1, 2, 3, 4, 5, 6, 7, 8) for wall in at],
        submissions=[SubmissionRow(b"%d" % wall, JobId(0), (), (), wall) for wall in at],
        events=[EventRow(wall, "x") for wall in at],
        records={("t", "k"): RecordRow("t", "k", JobId(0), TaskId(1), 1, OLD, b"row")},
    )

    bench.save(prune_before_wall=BEFORE)

    assert [row.at_wall for row in bench.queries.heartbeats("d")] == [NOW]
    assert bench.queries.submission(b"%d" % OLD) is None
    assert bench.queries.submission(b"%d" % NOW) is not None
    assert [one.event.at_wall for one in bench.queries.events_after(0)] == [NOW]
    assert bench.count("records") == 1


def _keys(job_id: int, count: int) -> list[UniqueKeyRow]:
    return [UniqueKeyRow(JobId(job_id), b"%016d" % i, TaskId(i)) for i in range(count)]


def test_unique_keys_outlive_their_tasks_until_their_job_is_gone(bench: StorageBench) -> None:
    jobs = {
        JobId(0): job(0),
        JobId(1): job(1, state=JobState.FINISHED, finished_wall=OLD, completed=1),
        JobId(2): job(2, pending=1),
        JobId(3): job(3, state=JobState.FINISHED, finished_wall=NOW),
        JobId(4): job(4),
    }
    keys = [key for job_id in range(4) for key in _keys(job_id, 3)]
    bench.save(
        ended(1, OLD),
        ended(2, OLD, job_id=JobId(2)),
        task(9),
        unique_keys=keys,
        jobs=jobs,
    )

    bench.save(prune_before_wall=BEFORE)

    left = bench.queries.known_keys([(key.job_id, key.key_hash) for key in keys])
    assert {job_id for job_id, _ in left} == {0, 2, 3}
    assert sorted(row.job_id for row in bench.queries.list_jobs()) == [2, 3, 4]


def test_an_old_job_with_a_task_left_stays(bench: StorageBench) -> None:
    finished = job(1, state=JobState.FINISHED, finished_wall=OLD)
    bench.save(
        ended(1, NOW, job_id=JobId(1)),
        task(2),
        unique_keys=_keys(1, 3),
        jobs={JobId(1): finished, JobId(2): job(2)},
    )

    bench.save(prune_before_wall=BEFORE)

    assert bench.queries.job(1) == finished
    assert bench.count("unique_keys") == 3


def test_a_job_with_many_keys_goes_in_steps(
    bench: StorageBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "PRUNED_ROWS_MAX", 10)
    finished = job(1, state=JobState.FINISHED, finished_wall=OLD)
    bench.save(unique_keys=_keys(1, 25), jobs={JobId(1): finished, JobId(2): job(2)})

    left = []
    for _ in range(4):
        more = bench.save(prune_before_wall=BEFORE)
        left.append((more, bench.count("unique_keys"), bench.count("jobs")))

    assert left == [(True, 15, 2), (True, 5, 2), (False, 0, 1), (False, 0, 1)]


def test_totals_still_count_what_was_pruned(bench: StorageBench) -> None:
    finished = {"state": JobState.FINISHED, "finished_wall": OLD}
    bench.save(
        jobs={
            JobId(0): job(0, completed=7),
            JobId(1): job(1, completed=5, failed=2, **finished),
            JobId(2): job(2, cancelled=1, dead=3, **finished),
            JobId(3): job(3, pending=4),
        }
    )
    before = bench.queries.counts()

    bench.save(prune_before_wall=BEFORE)

    assert bench.count("jobs") == 2
    expected = TaskCounts(pending=4, completed=12, failed=2, cancelled=1, dead=3)
    assert bench.queries.counts() == before == expected
    assert recovery.load(bench.database).totals == before
