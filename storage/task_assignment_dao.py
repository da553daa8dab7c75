"""Attempts: who held a task, and how that ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from storage.dao import DAO
from storage.row_table import RowTable
from storage.statements import ByKeys
from zmqcluster.core.rows import AssignmentRow


class TaskAssignmentDAO(DAO):
    """The table `task_assignments`, one row an attempt.

    It has no second index on purpose: SQLite then overwrites a replaced row in place.
    """

    _TABLE: Final = RowTable("task_assignments", AssignmentRow)
    _DELETE: Final = ByKeys("DELETE FROM task_assignments WHERE task_id IN ({})")

    def write(self, rows: Iterable[AssignmentRow]) -> None:
        self._TABLE.write(self._database.conn, rows)

    def of_task(self, task_id: int, limit: int) -> list[AssignmentRow]:
        """The newest attempts of a task, newest first."""
        return self._TABLE.read(
            self._database, "task_id = ?", [task_id], order_by="attempt DESC", limit=limit
        )

    def held(self) -> list[AssignmentRow]:
        """The current attempt of each task that a device has in its hands."""
        return self._TABLE.read(
            self._database,
            """(task_id, attempt) IN (SELECT task_id, attempt FROM tasks
                WHERE state IN ('assigned', 'running'))""",
        )

    def delete_of_tasks(self, task_ids: Sequence[int]) -> None:
        self._DELETE.run(self._database.conn, task_ids)
