"""The disk of the simulated master: what was committed, whatever happens to the process."""

from __future__ import annotations

from typing import Final

from tests.support.naive_store import NaiveStore
from zmqcluster.core.effects import Changes
from zmqcluster.core.state import Past
from zmqcluster.model import NO_JOB, JobId, TaskId

# So many tasks are pruned in one commit.
_STEP: Final = 5


class Disk(NaiveStore):
    """A naive store with the clocks of a machine that may be away for a while, which forgets what
    ended long ago as the database does.

    whole: what it would be if it forgot nothing; for those who judge. pruned: what is gone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.whole = NaiveStore()
        self.pruned: set[TaskId] = set()
        self._began_wall = 0
        # Until something is forgotten both are the same.
        vars(self.whole).update({key: one for key, one in vars(self).items() if key != "whole"})

    def boot(self, wall_ms: int) -> Past:
        """What a master that starts now is told, with the clock as the services set it."""
        past = self.past()
        away_ms = max(0, wall_ms - self.wall_ms) if self.wall_ms else 0
        past.clock_ms = self.clock_ms + away_ms if self.clock_ms else wall_ms
        return past

    def save(self, changes: Changes) -> bool:
        """Apply, and prune a step. True: there is more to prune."""
        for task_id in changes.tasks.keys() & self.pruned:
            # Pruned since the core read it: it is written anew.
            self.tasks.setdefault(task_id, self.whole.tasks[task_id])
        self.apply(changes)
        if self.pruned:
            self._keep(changes)
        self._began_wall = self._began_wall or changes.wall_ms
        before_wall = changes.prune_before_wall
        # Nothing can be older than the disk.
        return before_wall > self._began_wall > 0 and self._prune(before_wall)

    def _keep(self, changes: Changes) -> None:
        whole = self.whole
        whole.tasks |= {one: self.tasks[one] for one in (*changes.new_tasks, *changes.tasks)}
        whole.assignments |= {one: self.assignments[one] for one in changes.assignments}
        whole.jobs |= {one: self.jobs[one] for one in changes.jobs}
        whole.unique_keys |= {
            (one.job_id, one.key_hash): one.task_id for one in changes.unique_keys
        }

    def _prune(self, before_wall: int) -> bool:
        newest = max(self.tasks, default=0)
        past = [
            row
            for task_id, row in self.tasks.items()
            if row.state.is_terminal and 0 < row.finished_wall < before_wall and task_id < newest
        ]
        if past and not self.pruned:
            for name in ("tasks", "assignments", "jobs", "unique_keys"):
                setattr(self.whole, name, dict(getattr(self, name)))
        for row in past[:_STEP]:
            self.pruned.add(row.task_id)
            del self.tasks[row.task_id]
            for number in range(1, row.attempt + 1):
                self.assignments.pop((row.task_id, number), None)
        self.submissions = {
            key: row for key, row in self.submissions.items() if row.at_wall >= before_wall
        }
        if self.pruned:
            self._prune_jobs(before_wall)
        self._prune_rate_keys(before_wall)
        return len(past) > _STEP

    def _prune_jobs(self, before_wall: int) -> None:
        newest = max(self.jobs, default=NO_JOB)
        filled = {row.job_id for row in self.tasks.values()}
        gone: set[JobId] = {
            job_id
            for job_id, row in self.jobs.items()
            if 0 < row.finished_wall < before_wall and NO_JOB < job_id < newest
        } - filled
        for job_id in gone:
            del self.jobs[job_id]
        if gone:
            for key in [one for one in self.unique_keys if one[0] in gone]:
                del self.unique_keys[key]

    def _prune_rate_keys(self, before_wall: int) -> None:
        """One stays while a task or the job that asked for it needs it, or it is closed."""
        used = {row.rate_key for row in self.tasks.values()}
        self.rate_keys = {
            name: row
            for name, row in self.rate_keys.items()
            if row.changed_wall >= before_wall
            or name in used
            or (row.job_id != NO_JOB and row.job_id in self.jobs)
            or max(row.next_at_ms, row.closed_until_ms) > self.clock_ms
        }
