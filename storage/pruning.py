"""Forget what is past its retention, a small step at a time, so no commit is ever held up."""

from __future__ import annotations

from typing import Final

from sqlite_utils import Database

from storage.device_heartbeat_dao import DeviceHeartbeatDAO
from storage.event_dao import EventDAO
from storage.job_dao import COUNTED, JobDAO
from storage.meta_dao import MetaDAO
from storage.submission_dao import SubmissionDAO
from storage.task_assignment_dao import TaskAssignmentDAO
from storage.task_dao import TaskDAO
from storage.unique_key_dao import UniqueKeyDAO

PRUNED_TASKS_MAX: Final = 500
PRUNED_ROWS_MAX: Final = 1_000
PRUNED_JOBS_MAX: Final = 20
# Names of the numbers in which the counts of pruned jobs live on.
PRUNED_PREFIX: Final = "pruned_"


def prune(database: Database, before_wall: int) -> int:
    """Delete a step's worth of what ended before this instant; says how many tasks went.

    Records stay: they are what the cluster worked for. The keys of enrolled devices stay too.
    """
    tasks = TaskDAO(database)
    task_ids = tasks.finished_before(before_wall, PRUNED_TASKS_MAX)
    tasks.delete(task_ids)
    TaskAssignmentDAO(database).delete_of_tasks(task_ids)
    EventDAO(database).prune(before_wall, PRUNED_ROWS_MAX)
    DeviceHeartbeatDAO(database).prune(before_wall, PRUNED_ROWS_MAX)
    SubmissionDAO(database).prune(before_wall, PRUNED_ROWS_MAX)
    _prune_jobs(database, before_wall)
    return len(task_ids)


def _prune_jobs(database: Database, before_wall: int) -> None:
    """Finished jobs without tasks: first their unique keys, then themselves.

    Their counts are added up, so that totals stay exact.
    """
    jobs, keys = JobDAO(database), UniqueKeyDAO(database)
    keys_left = PRUNED_ROWS_MAX
    for job in jobs.empty_and_old(before_wall, PRUNED_JOBS_MAX):
        keys_left -= keys.delete_of_job(job.job_id, keys_left)
        if keys_left <= 0:
            return
        MetaDAO(database).add({PRUNED_PREFIX + name: getattr(job, name) for name in COUNTED})
        jobs.delete(job.job_id)
