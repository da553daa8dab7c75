"""Write what the core decided: one `Changes`, one transaction."""

from __future__ import annotations

from sqlite_utils import Database

from storage.access_dao import AccessDAO
from storage.database import transaction
from storage.device_dao import DeviceDAO
from storage.device_heartbeat_dao import DeviceHeartbeatDAO
from storage.event_dao import EventDAO
from storage.job_dao import JobDAO
from storage.meta_dao import CLOCK_MS, WALL_MS, MetaDAO
from storage.pruning import prune
from storage.rate_key_dao import RateKeyDAO
from storage.record_dao import RecordDAO
from storage.submission_dao import SubmissionDAO
from storage.task_assignment_dao import TaskAssignmentDAO
from storage.task_dao import TaskDAO
from storage.unique_key_dao import UniqueKeyDAO
from zmqcluster.core.effects import Changes
from zmqcluster.errors import StorageError


def apply(database: Database, changes: Changes, epoch: int = 0) -> bool:
    """Commit these changes, all or none of them, in the order of their fields.

    epoch: of the master that decided them; 0 for nobody's, which is not looked at.

    Returns whether pruning, if it was part of them, left anything for another step.

    Raises StorageError. Then it is unknown whether they are on disk: send nothing, stop, and
    rebuild from what the next start finds.
    """
    with transaction(database, "cannot save to the database"):
        if epoch:
            _require_epoch(database, epoch)
        _write(database, changes)
        if changes.prune_before_wall:
            return prune(database, changes.prune_before_wall)
    return False


def _require_epoch(database: Database, epoch: int) -> None:
    """The lock of the data directory keeps a second master away, but a lock can be removed."""
    now = MetaDAO(database).epoch()
    if now != epoch:
        raise StorageError(
            f"cannot save to the database: another master has begun here (epoch {now}, this one "
            f"is {epoch}): see that only one runs"
        )


def _write(database: Database, changes: Changes) -> None:
    """Everything but the pruning. Empty parts cost next to nothing."""
    tasks, new, changed = TaskDAO(database), changes.new_tasks, changes.tasks
    # In a batch of several turns a new task has often changed already: its last row is enough.
    tasks.insert([changed.get(task_id, row) for task_id, row in new.items()])
    UniqueKeyDAO(database).write(changes.unique_keys)
    tasks.update([row for task_id, row in changed.items() if task_id not in new])
    TaskAssignmentDAO(database).write(changes.assignments.values())
    JobDAO(database).write(changes.jobs.values())
    DeviceDAO(database).write(changes.devices.values())
    DeviceHeartbeatDAO(database).write(changes.heartbeats)
    RateKeyDAO(database).write(changes.rate_keys.values())
    access = AccessDAO(database)
    access.write_keys(changes.keys.values())
    access.write_tokens(changes.tokens.values())
    SubmissionDAO(database).write(changes.submissions)
    RecordDAO(database).write(changes.records.values())
    EventDAO(database).write(changes.events)
    clocks = {CLOCK_MS: changes.clock_ms, WALL_MS: changes.wall_ms}
    MetaDAO(database).write({name: value for name, value in clocks.items() if value})
