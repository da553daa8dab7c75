"""A database in a temporary folder, and rows to put into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from storage.database import open_writer
from storage.queries import Queries
from storage.writer import apply
from zmqcluster.core.effects import Changes
from zmqcluster.core.rows import AssignmentRow, DeviceRow, JobRow, TaskRow
from zmqcluster.model import DeviceId, Durability, JobId, JobState, TaskId, TaskState


class StorageBench:
    """One writer and one reader on the same file, as in a master."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # What is tested here does not hang on fsync, and tests stay quick without.
        self.database: Database = open_writer(path, Durability.NORMAL)
        self.queries = Queries(path)

    def save(self, *tasks: TaskRow, **fields: Any) -> bool:
        """Apply new tasks and other fields of a Changes."""
        new = {row.task_id: row for row in tasks}
        return apply(self.database, Changes(new_tasks=new, **fields))

    def change(self, *tasks: TaskRow, **fields: Any) -> bool:
        """Apply changed tasks and other fields of a Changes."""
        return apply(self.database, Changes(tasks={row.task_id: row for row in tasks}, **fields))

    def count(self, table: str) -> int:
        return self.database[table].count

    def reopen(self) -> None:
        self.close()
        self.__init__(self.path)  # type: ignore[misc]  # A new life in the same object.

    def close(self) -> None:
        self.queries.close()
        self.database.close()


@contextmanager
def storage_bench(folder: Path) -> Iterator[StorageBench]:
    bench = StorageBench(folder / "cluster.db")
    try:
        yield bench
    finally:
        bench.close()


def task(task_id: int, **fields: Any) -> TaskRow:
    """A task row; what is not given is ordinary."""
    given: dict[str, Any] = {
        "task_id": TaskId(task_id),
        "job_id": JobId(0),
        "parent_id": TaskId(0),
        "task_type": "crawl",
        "labels": "",
        "rate_key": "",
        "unique_key": "",
        "priority": 5,
        "max_retry_count": 3,
        "timeout_ms": 60_000,
        "created_wall": 1_000,
        "task_data": b"\x80",
    }
    return TaskRow(**(given | fields))


def held(task_id: int, device_id: str = "d1", **fields: Any) -> TaskRow:
    """A task in the hands of a device."""
    given: dict[str, Any] = {"state": TaskState.ASSIGNED, "attempt": 1, "assigned_wall": 2_000}
    return task(task_id, device_id=DeviceId(device_id), **(given | fields))


def ended(task_id: int, finished_wall: int, **fields: Any) -> TaskRow:
    """A task that is over."""
    given: dict[str, Any] = {"state": TaskState.COMPLETED, "attempt": 1, "result": b"\xc0"}
    return task(task_id, finished_wall=finished_wall, **(given | fields))


def attempt(task_id: int, number: int = 1, **fields: Any) -> AssignmentRow:
    given: dict[str, Any] = {"device_id": DeviceId("d1"), "epoch": 1, "assigned_wall": 2_000}
    return AssignmentRow(task_id=TaskId(task_id), attempt=number, **(given | fields))


def job(job_id: int, **fields: Any) -> JobRow:
    given: dict[str, Any] = {"name": "j", "state": JobState.ACTIVE, "created_wall": 1_000}
    return JobRow(job_id=JobId(job_id), **(given | fields))


def device(device_id: str, **fields: Any) -> DeviceRow:
    given: dict[str, Any] = {
        "name": "a device",
        "state": "online",
        "host": "h",
        "platform": "linux",
        "cpu_count": 2,
        "memory_bytes": 2**33,
        "addresses": '["10.0.0.1"]',
        "task_types": '["crawl"]',
        "labels": "[]",
        "slots": 100,
        "boot_id": "ab",
        "drained": False,
        "registered_wall": 1_000,
        "last_seen_wall": 2_000,
    }
    return DeviceRow(device_id=DeviceId(device_id), **(given | fields))
