"""How many tasks are in each state: exact, and as quick as there are jobs."""

from __future__ import annotations

from sqlite_utils import Database

from storage.job_dao import COUNTED, JobDAO
from storage.meta_dao import MetaDAO
from storage.pruning import PRUNED_PREFIX
from zmqcluster.views import TaskCounts


def totals(database: Database) -> TaskCounts:
    """Tasks by state since the database began, those of pruned jobs included.

    running: assigned or running.
    """
    kept, meta = JobDAO(database).totals(), MetaDAO(database).read()
    return TaskCounts(**{name: kept[name] + meta.get(PRUNED_PREFIX + name, 0) for name in COUNTED})
