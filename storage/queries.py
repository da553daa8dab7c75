"""Read-only questions to the database, for the master's loop and for REST: all bounded.

One object owns one read-only connection. It may be used from several threads, one at a time: each
question takes a lock for as long as it reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Final

from msgspec import Struct
from sqlite_utils import Database

from storage import task_listing
from storage.access_dao import AccessDAO
from storage.database import open_reader, storage_errors
from storage.device_dao import DeviceDAO
from storage.device_heartbeat_dao import DeviceHeartbeatDAO
from storage.event_dao import EventDAO, StoredEvent
from storage.job_dao import JobDAO
from storage.rate_key_dao import RateKeyDAO
from storage.record_dao import RecordDAO
from storage.submission_dao import SubmissionDAO
from storage.task_assignment_dao import TaskAssignmentDAO
from storage.task_dao import TaskDAO
from storage.task_listing import TaskFilter, TaskPage
from storage.totals import totals
from storage.unique_key_dao import JobKey, UniqueKeyDAO
from zmqcluster.core.events import LaneKey
from zmqcluster.core.rows import (
    AssignmentRow,
    DeviceRow,
    HeartbeatRow,
    JobRow,
    KeyRow,
    RateKeyRow,
    RecordRow,
    SubmissionRow,
    TaskRow,
    TokenRow,
)
from zmqcluster.model import JobId, TaskId
from zmqcluster.views import TaskCounts

# No page of anything is longer, whatever is asked for.
LIMIT_MAX: Final = task_listing.LIMIT_MAX
DETAIL_MAX: Final = 200
_BEYOND: Final = 2**63 - 1


class TaskDetail(Struct, frozen=True):
    """One task, whole. attempts: newest first. events: oldest first. Both the newest DETAIL_MAX."""

    task: TaskRow
    attempts: list[AssignmentRow]
    events: list[StoredEvent]


class Queries:
    """All questions raise StorageError when the disk fails, and nothing else."""

    def __init__(self, path: str | Path) -> None:
        self._database = open_reader(path)
        self._lock = Lock()

    def close(self) -> None:
        """Safe to call twice."""
        with self._lock:
            self._database.close()

    # What the master's loop asks for.

    def backlog(self, lane: LaneKey, after_id: int, limit: int) -> tuple[list[TaskRow], bool]:
        """Ready tasks of a lane with an id above after_id, in id order; are there more?"""
        with self._reading() as database:
            return TaskDAO(database).backlog(lane, after_id, limit)

    def lanes(self, after: LaneKey | None, limit: int) -> tuple[list[LaneKey], bool]:
        """The lanes with ready tasks after this one, in order; are there more?"""
        with self._reading() as database:
            return TaskDAO(database).lanes(after, limit)

    def delayed(self, limit: int) -> tuple[list[TaskRow], bool]:
        """Tasks that wait for a retry or their schedule, soonest first; are there more?"""
        with self._reading() as database:
            return TaskDAO(database).delayed(limit)

    def known_keys(self, keys: Sequence[JobKey]) -> dict[JobKey, TaskId]:
        """The tasks of those (job_id, key hash) that are taken."""
        with self._reading() as database:
            return UniqueKeyDAO(database).known(keys)

    def tasks_by_id(self, task_ids: Sequence[int]) -> dict[TaskId, TaskRow]:
        """Those that exist, with their bodies: the caller bounds how many."""
        with self._reading() as database:
            return TaskDAO(database).by_ids(task_ids)

    def jobs_by_id(self, job_ids: Sequence[int]) -> dict[JobId, JobRow]:
        """Those that exist."""
        with self._reading() as database:
            return JobDAO(database).by_ids(job_ids)

    def rate_keys(self, rate_keys: Sequence[str]) -> dict[str, RateKeyRow]:
        """Those that have limits."""
        with self._reading() as database:
            return RateKeyDAO(database).by_keys(rate_keys)

    def submission(self, request_id: bytes) -> SubmissionRow | None:
        """The answer this request was given, if it was."""
        with self._reading() as database:
            return SubmissionDAO(database).get(request_id)

    def open_tasks(self, job_id: int, after_id: int = 0, limit: int = LIMIT_MAX) -> TaskPage:
        """Tasks of a job that have not ended, in id order, without their bodies.

        Go on from next_cursor until it is None: a page may be short, even empty, before that.
        """
        with self._reading() as database:
            return task_listing.open_tasks(database, job_id, after_id, limit)

    # What people ask for.

    def list_tasks(
        self,
        wanted: TaskFilter,
        *,
        cursor: int | None = None,
        limit: int = 100,
        newest_first: bool = True,
    ) -> TaskPage:
        """Tasks in the order of their ids from behind cursor on, without their bodies.

        A page may be short, even empty, and still have a next_cursor: at most 20,000 tasks are
        looked at for each.
        """
        with self._reading() as database:
            return task_listing.list_tasks(
                database, wanted, cursor=cursor, limit=limit, newest_first=newest_first
            )

    def task_detail(self, task_id: int) -> TaskDetail | None:
        """A task with its attempts and events, as of one moment."""
        with self._reading() as database, database.atomic():
            task = TaskDAO(database).by_ids([task_id]).get(TaskId(task_id))
            if task is None:
                return None
            return TaskDetail(
                task=task,
                attempts=TaskAssignmentDAO(database).of_task(task_id, DETAIL_MAX),
                events=EventDAO(database).of_task(task_id, DETAIL_MAX),
            )

    def list_jobs(self, before_id: int | None = None, limit: int = 100) -> list[JobRow]:
        """Jobs below before_id, newest first."""
        with self._reading() as database:
            return JobDAO(database).page(before_id or _BEYOND, _page(limit))

    def job(self, job_id: int) -> JobRow | None:
        return self.jobs_by_id([job_id]).get(JobId(job_id))

    def list_devices(self, after_id: str = "", limit: int = LIMIT_MAX) -> list[DeviceRow]:
        """Devices above after_id, by id."""
        with self._reading() as database:
            return DeviceDAO(database).page(after_id, _page(limit))

    def device(self, device_id: str) -> DeviceRow | None:
        with self._reading() as database:
            return DeviceDAO(database).get(device_id)

    def heartbeats(self, device_id: str, limit: int = 100) -> list[HeartbeatRow]:
        """The newest samples of a device, newest first."""
        with self._reading() as database:
            return DeviceHeartbeatDAO(database).of_device(device_id, _page(limit))

    def events_after(self, event_id: int, limit: int = 100) -> list[StoredEvent]:
        """Events after this one, oldest first: for a stream that goes on."""
        with self._reading() as database:
            return EventDAO(database).after(event_id, _page(limit))

    def newest_events(self, before_id: int | None = None, limit: int = 100) -> list[StoredEvent]:
        """Events before this one, newest first: for looking back."""
        with self._reading() as database:
            return EventDAO(database).newest(before_id or _BEYOND, _page(limit))

    def events_of_task(self, task_id: int, limit: int = DETAIL_MAX) -> list[StoredEvent]:
        """The newest events of a task, oldest first."""
        with self._reading() as database:
            return EventDAO(database).of_task(task_id, _page(limit))

    def counts(self) -> TaskCounts:
        """Tasks by state since the database began."""
        with self._reading() as database:
            return totals(database)

    def keys(self) -> list[KeyRow]:
        """All enrolled keys, revoked ones too."""
        with self._reading() as database:
            return AccessDAO(database).keys()

    def tokens(self) -> list[TokenRow]:
        """All join tokens, used up and revoked ones too."""
        with self._reading() as database:
            return AccessDAO(database).tokens()

    def records(
        self, table_name: str, after_key: str | None = None, limit: int = 100
    ) -> list[RecordRow]:
        """Rows of the catalogue above after_key, by key; the empty key is one, too."""
        with self._reading() as database:
            return RecordDAO(database).page(table_name, after_key, _page(limit))

    @contextmanager
    def _reading(self) -> Iterator[Database]:
        with self._lock, storage_errors("cannot read the database"):
            yield self._database


def _page(limit: int) -> int:
    return max(1, min(limit, LIMIT_MAX))
