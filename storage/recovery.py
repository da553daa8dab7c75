"""What the core needs to go on after a stop: all that is in flight, nothing of the backlog."""

from __future__ import annotations

import secrets

from msgspec import Struct
from sqlite_utils import Database

from storage.access_dao import AccessDAO
from storage.database import storage_errors, transaction
from storage.device_dao import DeviceDAO
from storage.job_dao import JobDAO
from storage.meta_dao import CLOCK_MS, DATABASE_ID, EPOCH, WALL_MS, MetaDAO
from storage.rate_key_dao import RateKeyDAO
from storage.task_assignment_dao import TaskAssignmentDAO
from storage.task_dao import TaskDAO
from storage.totals import totals
from zmqcluster.core.rows import (
    AssignmentRow,
    DeviceRow,
    JobRow,
    KeyRow,
    RateKeyRow,
    TaskRow,
    TokenRow,
)
from zmqcluster.model import JobId, TaskId
from zmqcluster.views import TaskCounts


class Recovered(Struct, frozen=True):
    """The state of a master at the end of its last committed turn.

    epoch: 0 in a new database. clock_ms, wall_ms: the two clocks at that commit (0: never saved).
    held: assigned or running tasks, with their data. assignments: the current attempt of each.
    jobs: those with anything left to do, and row 0 if anything was ever counted in it.
    rate_keys: only those of held tasks. keys, tokens: all, revoked ones too.
    totals: tasks by state since the beginning, pruned ones included.
    """

    epoch: int
    clock_ms: int
    wall_ms: int
    next_task_id: TaskId
    next_job_id: JobId
    held: list[TaskRow]
    assignments: list[AssignmentRow]
    jobs: list[JobRow]
    devices: list[DeviceRow]
    rate_keys: list[RateKeyRow]
    keys: list[KeyRow]
    tokens: list[TokenRow]
    has_delayed: bool
    totals: TaskCounts


def load(database: Database) -> Recovered:
    """Read it all. Raises StorageError."""
    with storage_errors("cannot read the database"):
        meta = MetaDAO(database).read()
        tasks, jobs, access = TaskDAO(database), JobDAO(database), AccessDAO(database)
        held = tasks.held()
        rate_keys = {row.rate_key: None for row in held if row.rate_key}
        return Recovered(
            epoch=meta.get(EPOCH, 0),
            clock_ms=meta.get(CLOCK_MS, 0),
            wall_ms=meta.get(WALL_MS, 0),
            next_task_id=TaskId(tasks.highest_id() + 1),
            next_job_id=JobId(jobs.highest_id() + 1),
            held=held,
            assignments=TaskAssignmentDAO(database).held(),
            jobs=jobs.open(),
            devices=DeviceDAO(database).all(),
            rate_keys=list(RateKeyDAO(database).by_keys(list(rate_keys)).values()),
            keys=access.keys(),
            tokens=access.tokens(),
            has_delayed=tasks.has_delayed(),
            totals=totals(database),
        )


def begin_epoch(database: Database) -> int:
    """Commit that a new master lives, and return its number: each start has a higher one."""
    meta = MetaDAO(database)
    with transaction(database, "cannot save to the database"):
        known = meta.read()
        epoch = known.get(EPOCH, 0) + 1
        meta.write({EPOCH: epoch, DATABASE_ID: known.get(DATABASE_ID, secrets.randbits(62))})
    if DATABASE_ID not in known:
        # It is of use only in the file itself.
        with storage_errors("cannot save to the database"):
            database.conn.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    return epoch
