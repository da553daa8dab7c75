"""Forget what is past its retention, a small step at a time, so no commit is ever held up."""

from __future__ import annotations

from typing import Final

from sqlite_utils import Database

from storage.device_heartbeat_dao import DeviceHeartbeatDAO
from storage.event_dao import EventDAO
from storage.job_dao import COUNTED, JobDAO
from storage.meta_dao import MetaDAO
from storage.rate_key_dao import RateKeyDAO
from storage.submission_dao import SubmissionDAO
from storage.task_assignment_dao import TaskAssignmentDAO
from storage.task_dao import TaskDAO
from storage.unique_key_dao import UniqueKeyDAO

PRUNED_TASKS_MAX: Final = 500
# SQLite walks through every page of a large body to free it: 500 bodies of a MiB took 0.7 s.
PRUNED_BYTES_MAX: Final = 16 * 1024 * 1024
PRUNED_ROWS_MAX: Final = 1_000
PRUNED_JOBS_MAX: Final = 20
# What is old and still needed is looked at again when a day has passed.
LOOK_AGAIN_MS: Final = 24 * 3_600_000
# Names of the numbers in which the counts of pruned jobs live on.
PRUNED_PREFIX: Final = "pruned_"


def prune(database: Database, before_wall: int) -> bool:
    """Delete a step's worth of what ended before this instant; is there more?

    Records stay: they are what the cluster worked for. The keys of enrolled devices stay too.
    """
    rows_max = PRUNED_ROWS_MAX
    steps = (
        _prune_tasks(database, before_wall),
        EventDAO(database).prune(before_wall, rows_max) >= rows_max,
        DeviceHeartbeatDAO(database).prune(before_wall, rows_max) >= rows_max,
        SubmissionDAO(database).prune(before_wall, rows_max) >= rows_max,
        _prune_jobs(database, before_wall),
        RateKeyDAO(database).prune(before_wall, before_wall + LOOK_AGAIN_MS, rows_max) >= rows_max,
    )
    return any(steps)


def _prune_tasks(database: Database, before_wall: int) -> bool:
    """Ended tasks with their bodies and attempts; are there more?"""
    tasks = TaskDAO(database)
    task_ids, more = tasks.finished_before(before_wall, PRUNED_TASKS_MAX, PRUNED_BYTES_MAX)
    tasks.delete(task_ids)
    TaskAssignmentDAO(database).delete_of_tasks(task_ids)
    return more


def _prune_jobs(database: Database, before_wall: int) -> bool:
    """Finished jobs without tasks: first their unique keys, then themselves; are there more?

    Their counts are added up, so that totals stay exact.
    """
    jobs, keys = JobDAO(database), UniqueKeyDAO(database)
    keys_left = PRUNED_ROWS_MAX
    old = jobs.empty_and_old(before_wall, PRUNED_JOBS_MAX)
    for job in old:
        keys_left -= keys.delete_of_job(job.job_id, keys_left)
        if keys_left <= 0:
            return True
        MetaDAO(database).add({PRUNED_PREFIX + name: getattr(job, name) for name in COUNTED})
        jobs.delete(job.job_id)
    return len(old) >= PRUNED_JOBS_MAX
