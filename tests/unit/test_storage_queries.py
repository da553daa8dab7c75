"""Questions: right, bounded, and quick by an index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage import task_dao, task_listing
from storage.queries import LIMIT_MAX, Queries
from storage.task_listing import TaskFilter
from tests.support.storage_bench import StorageBench, device, ended, held, job, storage_bench, task
from zmqcluster.core.events import LaneKey
from zmqcluster.core.rows import EventRow, TaskRow, UniqueKeyRow
from zmqcluster.errors import StorageError
from zmqcluster.model import DeviceId, JobId, TaskId, TaskState
from zmqcluster.views import TaskCounts

LANE = LaneKey("crawl", "", "", 5)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[StorageBench]:
    with storage_bench(tmp_path) as opened:
        yield opened


def _ids(rows: list[TaskRow]) -> list[int]:
    return [row.task_id for row in rows]


def test_backlog_holds_the_ready_tasks_of_its_lane_in_order(bench: StorageBench) -> None:
    bench.save(
        task(1),
        held(2),
        ended(3, 5),
        task(4, retry_at_ms=5),
        task(5, not_before_wall=5),
        task(6, rate_key="k"),
        task(7, priority=6),
        task(8, labels="gpu"),
        task(9, task_type="noop"),
        task(10, task_data=b"x" * 5000),
        task(11),
    )

    rows, more = bench.queries.backlog(LANE, 0, 2)
    rest, no_more = bench.queries.backlog(LANE, 10, 2)

    assert (rows, more) == ([task(1), task(10, task_data=b"x" * 5000)], True)
    assert (rest, no_more) == ([task(11)], False)
    assert bench.queries.backlog(LANE, 11, 2) == ([], False)


def test_backlog_stops_short_before_it_fills_the_memory(
    bench: StorageBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_dao, "BACKLOG_BYTES_MAX", 25_000)
    bench.save(*(task(i, task_data=b"x" * 10_000) for i in range(1, 10)))

    rows, more = bench.queries.backlog(LANE, 0, 9)

    assert (_ids(rows), more) == ([1, 2, 3], True)
    # It let go of its place in the file: the WAL can be emptied.
    checkpoint = bench.database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    assert checkpoint == (0, 0, 0)


def test_lanes_are_listed_once_each_in_order(bench: StorageBench) -> None:
    lanes = [
        LaneKey("a", "", "", 5),
        LaneKey("crawl", "", "", 0),
        LaneKey("crawl", "", "", 9),
        LaneKey("crawl", "", "https://a.example", 5),
        LaneKey("crawl", "", "https://é.example", 5),
        LaneKey("crawl", "", "https://\U0001f600.example", 5),
        LaneKey("crawl", "eu,gpu", "", 1),
    ]
    rows = [
        task(
            i,
            task_type=lane.task_type,
            labels=lane.labels,
            rate_key=lane.rate_key,
            priority=lane.priority,
        )
        for i, lane in enumerate(lanes * 20, start=1)
    ]
    bench.save(*rows, held(999, task_type="busy"), task(1000, task_type="later", retry_at_ms=4))

    assert lanes == sorted(lanes)
    assert bench.queries.lanes(None, 100) == (lanes, False)
    assert bench.queries.lanes(None, 7) == (lanes, False)
    assert bench.queries.lanes(None, 6) == (lanes[:6], True)
    assert bench.queries.lanes(lanes[2], 2) == (lanes[3:5], True)
    assert bench.queries.lanes(lanes[-1], 2) == ([], False)


def test_listing_lanes_does_not_walk_over_their_tasks(bench: StorageBench) -> None:
    bench.save(*(task(i, rate_key="ab"[i % 2]) for i in range(1, 10_001)))

    steps = _instructions(bench, lambda queries: queries.lanes(None, 10))

    # About 100 instructions a lane; walking would take 10 for each task.
    assert steps < 1_000


def test_waiting_tasks_come_soonest_first_by_either_clock(bench: StorageBench) -> None:
    bench.save(
        task(1, retry_at_ms=500),
        task(2, not_before_wall=1_000_400),
        task(3, not_before_wall=1_000_600),
        task(4, retry_at_ms=450, not_before_wall=7),
        task(5),
        held(6, "d1", retry_at_ms=1),
        clock_ms=100,
        wall_ms=1_000_100,
    )

    rows, more = bench.queries.delayed(10)
    first, others = bench.queries.delayed(2)

    assert (_ids(rows), more) == ([2, 4, 1, 3], False)
    assert (_ids(first), others) == ([2, 4], True)


def test_waiting_tasks_beyond_the_limit_are_known_to_exist(bench: StorageBench) -> None:
    bench.save(*(task(i, retry_at_ms=i) for i in range(1, 5)))

    assert [_ids(bench.queries.delayed(3)[0]), bench.queries.delayed(3)[1]] == [[1, 2, 3], True]
    assert bench.queries.delayed(4)[1] is False


def test_keys_are_known_within_their_job(bench: StorageBench) -> None:
    rows = [UniqueKeyRow(JobId(i % 3), b"%016d" % i, TaskId(i)) for i in range(1, 1500)]
    bench.save(unique_keys=rows)
    asked = [(row.job_id, row.key_hash) for row in rows]

    found = bench.queries.known_keys([*asked, (JobId(1), b"%016d" % 2), (JobId(9), b"none")])

    assert found == {key: row.task_id for key, row in zip(asked, rows, strict=True)}


def test_open_tasks_of_a_job_are_found_page_by_page(
    bench: StorageBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_listing, "SCANNED_MAX", 4)
    job_1: dict[str, Any] = {"job_id": JobId(1)}
    bench.save(
        *(ended(i, 5, **job_1) for i in range(1, 11)),
        task(11, **job_1),
        task(12),
        held(13, "d1", **job_1),
        task(14, retry_at_ms=5, **job_1),
    )

    found: list[int] = []
    cursor: int | None = 0
    pages = 0
    while cursor is not None:
        page = bench.queries.open_tasks(1, cursor, 2)
        found += _ids(page.rows)
        cursor = page.next_cursor
        pages += 1

    assert found == [11, 13, 14]
    assert pages == 4


FILTERS: list[tuple[TaskFilter, list[int]]] = [
    (TaskFilter(), [8, 7, 6, 5, 4, 3, 2, 1]),
    (TaskFilter(states=(TaskState.PENDING,)), [7, 1]),
    (TaskFilter(states=(TaskState.ASSIGNED, TaskState.RUNNING)), [6, 3, 2]),
    (TaskFilter(states=(TaskState.RUNNING,)), [6]),
    (TaskFilter(states=(TaskState.FAILED,)), [5]),
    (TaskFilter(states=(TaskState.FAILED, TaskState.DEAD)), [8, 5]),
    (TaskFilter(states=(TaskState.COMPLETED,)), [4]),
    (TaskFilter(states=(TaskState.CANCELLED,)), []),
    (TaskFilter(task_type="noop"), [8, 7]),
    (TaskFilter(job_id=1), [6, 5, 1]),
    (TaskFilter(job_id=0), [8, 7, 4, 3, 2]),
    (TaskFilter(job_id=1, states=(TaskState.FAILED,)), [5]),
    (TaskFilter(device_id="d2"), [5, 3]),
    (TaskFilter(device_id="d2", states=(TaskState.ASSIGNED,)), [3]),
    (TaskFilter(rate_key="k"), [7]),
    (TaskFilter(rate_key="k", job_id=1), []),
]


@pytest.mark.parametrize("scanned", [1, 3, 20_000])
@pytest.mark.parametrize("newest_first", [True, False])
def test_every_filter_finds_its_tasks_whatever_the_pages(
    bench: StorageBench, monkeypatch: pytest.MonkeyPatch, scanned: int, newest_first: bool
) -> None:
    monkeypatch.setattr(task_listing, "SCANNED_MAX", scanned)
    job_1: dict[str, Any] = {"job_id": JobId(1)}
    bench.save(
        task(1, **job_1),
        held(2),
        held(3, "d2"),
        ended(4, 5),
        ended(5, 6, state=TaskState.FAILED, device_id=DeviceId("d2"), **job_1),
        held(6, "d1", state=TaskState.RUNNING, **job_1),
        task(7, task_type="noop", rate_key="k"),
        ended(8, 7, state=TaskState.DEAD, task_type="noop"),
    )

    for wanted, expected in FILTERS:
        for limit in (1, 2, 100):
            found = _all_pages(bench.queries, wanted, limit, newest_first)
            assert found == (expected if newest_first else expected[::-1]), (wanted, limit)


def _all_pages(queries: Queries, wanted: TaskFilter, limit: int, newest_first: bool) -> list[int]:
    found: list[int] = []
    cursor: int | None = None
    for _ in range(30):
        page = queries.list_tasks(wanted, cursor=cursor, limit=limit, newest_first=newest_first)
        assert len(page.rows) <= limit
        found += _ids(page.rows)
        if (cursor := page.next_cursor) is None:
            return found
    raise AssertionError("the pages never end")


def test_lists_leave_the_bodies_on_disk(bench: StorageBench) -> None:
    bench.save(ended(1, 5, task_data=b"d" * 9, result=b"r" * 9, error="e"))

    (row,) = bench.queries.list_tasks(TaskFilter()).rows

    assert (row.task_data, row.result, row.error) == (b"", b"", "e")
    assert row.finished_wall == 5


def test_a_page_is_never_longer_than_the_limit_of_pages(bench: StorageBench) -> None:
    bench.save(
        *(task(i) for i in range(1, 1200)),
        events=[EventRow(i, "x") for i in range(1200)],
        jobs={JobId(i): job(i) for i in range(1200)},
    )
    queries = bench.queries

    assert len(queries.list_tasks(TaskFilter(), limit=10**9).rows) == LIMIT_MAX
    assert len(queries.events_after(0, 10**9)) == LIMIT_MAX
    assert len(queries.list_jobs(limit=10**9)) == LIMIT_MAX
    assert len(queries.list_jobs(limit=-1)) == 1


def test_a_filter_that_fits_nothing_looks_at_a_bounded_number_of_tasks(
    bench: StorageBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_listing, "SCANNED_MAX", 100)
    bench.save(*(task(i) for i in range(1, 10_001)))
    wanted = TaskFilter(device_id="nobody")

    steps = _instructions(bench, lambda queries: queries.list_tasks(wanted))
    page = bench.queries.list_tasks(wanted)

    assert (page.rows, page.next_cursor) == ([], 9_901)
    assert steps < 5_000


def test_a_task_is_shown_with_its_story(bench: StorageBench) -> None:
    bench.save(task(1), task(2), events=[EventRow(i, "e", task_id=1 + i % 2) for i in range(500)])

    detail = bench.queries.task_detail(1)

    assert detail is not None
    assert detail.task == task(1)
    assert [one.event.at_wall for one in detail.events] == list(range(100, 500, 2))
    assert bench.queries.task_detail(3) is None
    assert [one.event.at_wall for one in bench.queries.events_of_task(2, 2)] == [497, 499]


def test_jobs_and_devices_are_listed_in_pages(bench: StorageBench) -> None:
    bench.save(
        jobs={JobId(i): job(i, pending=i) for i in range(5)},
        devices={DeviceId(name): device(name) for name in "cab"},
    )
    queries = bench.queries

    assert [row.job_id for row in queries.list_jobs(limit=2)] == [4, 3]
    assert [row.job_id for row in queries.list_jobs(before_id=3)] == [2, 1]
    assert queries.jobs_by_id([0, 2, 99]) == {0: job(0), 2: job(2, pending=2)}
    assert queries.job(99) is None
    assert [row.device_id for row in queries.list_devices(limit=2)] == ["a", "b"]
    assert [row.device_id for row in queries.list_devices(after_id="b")] == ["c"]
    assert queries.device("a") == device("a")
    assert queries.device("x") is None
    assert queries.counts() == TaskCounts(pending=10)


def test_a_reader_sees_what_is_committed_and_can_be_closed_twice(bench: StorageBench) -> None:
    other = Queries(bench.path)
    bench.save(task(1))

    assert list(other.tasks_by_id([1])) == [1]

    other.close()
    other.close()
    with pytest.raises(StorageError, match="cannot read the database"):
        other.counts()


def _instructions(bench: StorageBench, ask: Any) -> int:
    """How many instructions SQLite took for a question, in tens."""
    tens = 0

    def count() -> int:
        nonlocal tens
        tens += 1
        return 0

    connection = bench.queries._database.conn
    connection.set_progress_handler(count, 10)
    ask(bench.queries)
    connection.set_progress_handler(None, 10)
    return tens * 10


def test_delayed_tasks_cut_short_by_their_bodies_are_not_the_last(
    bench: StorageBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [task(number, retry_at_ms=number * 10, task_data=b"x" * 1000) for number in range(1, 9)]
    later = task(9, not_before_wall=10**9)
    bench.save(*rows, later)
    monkeypatch.setattr(task_dao, "BACKLOG_BYTES_MAX", 3_000)

    found, more = bench.queries.delayed(100)

    assert more
    assert 0 < len(found) < 8
    assert [row.task_id for row in found] == list(range(1, len(found) + 1))
