"""Jobs, and the exact number of tasks in each state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from storage.dao import DAO
from storage.row_table import RowTable
from zmqcluster.core.rows import JobRow
from zmqcluster.model import NO_JOB, JobId

COUNTED: Final = ("pending", "running", "completed", "failed", "cancelled", "dead")


class JobDAO(DAO):
    """The table `jobs`. Row 0 counts the tasks that belong to no job."""

    _TABLE: Final = RowTable("jobs", JobRow)

    def write(self, rows: Iterable[JobRow]) -> None:
        self._TABLE.write(self._database.conn, rows)

    def by_ids(self, job_ids: Sequence[int]) -> dict[JobId, JobRow]:
        """Those of job_ids that exist."""
        rows = self._TABLE.read_keys(self._database, "job_id", job_ids)
        return {row.job_id: row for row in rows}

    def open(self) -> list[JobRow]:
        """What the core keeps in memory: jobs with anything left to do, and row 0."""
        terms = "(state = 'active' OR pending > 0 OR running > 0) AND job_id > 0"
        unfinished = self._TABLE.read(self._database, terms)
        return self._TABLE.read(self._database, "job_id = 0") + unfinished

    def page(self, before_id: int, limit: int) -> list[JobRow]:
        """Jobs with an id below before_id, newest first."""
        return self._TABLE.read(
            self._database,
            "job_id > ? AND job_id < ?",
            [NO_JOB, before_id],
            order_by="job_id DESC",
            limit=limit,
        )

    def highest_id(self) -> int:
        (highest,) = self._database.conn.execute("SELECT max(job_id) FROM jobs").fetchone()
        return int(highest or 0)

    def totals(self) -> dict[str, int]:
        """Tasks by state, over all jobs that have a row."""
        sums = ", ".join(f"total({name})" for name in COUNTED)
        values = self._database.conn.execute(f"SELECT {sums} FROM jobs").fetchone()
        return {name: int(value) for name, value in zip(COUNTED, values, strict=True)}

    def empty_and_old(self, before_wall: int, limit: int) -> list[JobRow]:
        """Finished jobs without a task left, oldest first; never the newest: ids only grow."""
        return self._TABLE.read(
            self._database,
            """finished_wall > 0 AND finished_wall < ? AND job_id > 0
            AND job_id < (SELECT max(job_id) FROM jobs)
            AND NOT EXISTS (SELECT 1 FROM tasks
                WHERE tasks.job_id > 0 AND tasks.job_id = jobs.job_id)""",
            [before_wall],
            order_by="finished_wall",
            limit=limit,
        )

    def delete(self, job_id: int) -> None:
        self._database.conn.execute("DELETE FROM jobs WHERE job_id = ?", (job_id,))
