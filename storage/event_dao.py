"""What people should be able to find out later, in the order it happened."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from storage.dao import DAO
from storage.row_table import RowTable
from zmqcluster.core.rows import EventRow


class StoredEvent(msgspec.Struct, frozen=True):
    """An event with its place in the order; ids only grow, with gaps."""

    event_id: int
    event: EventRow


class EventDAO(DAO):
    """The table `events`, only ever appended to and pruned at the old end."""

    _TABLE: Final = RowTable("events", EventRow, verb="INSERT")
    _SELECT: Final = f"SELECT event_id, {_TABLE.columns} FROM events"

    def write(self, rows: Iterable[EventRow]) -> None:
        self._TABLE.write(self._database.conn, rows)

    def after(self, event_id: int, limit: int) -> list[StoredEvent]:
        """Events after this one, oldest first."""
        return self._read("WHERE event_id > ? ORDER BY event_id LIMIT ?", event_id, limit)

    def newest(self, before_id: int, limit: int) -> list[StoredEvent]:
        """Events before this one, newest first."""
        return self._read("WHERE event_id < ? ORDER BY event_id DESC LIMIT ?", before_id, limit)

    def of_task(self, task_id: int, limit: int) -> list[StoredEvent]:
        """The newest events of a task, oldest first."""
        where = "WHERE task_id > 0 AND task_id = ? ORDER BY event_id DESC LIMIT ?"
        return self._read(where, task_id, limit)[::-1]

    def prune(self, before_wall: int, limit: int) -> int:
        """Delete the oldest events before this instant; says how many.

        The newest event stays: its successor must have a higher id.
        """
        cursor = self._database.conn.execute(
            """DELETE FROM events WHERE event_id IN (
                SELECT event_id FROM events WHERE at_wall < ? ORDER BY at_wall LIMIT ?)
            AND event_id < (SELECT max(event_id) FROM events)""",
            (before_wall, limit),
        )
        return cursor.rowcount

    def _read(self, rest: str, *arguments: int) -> list[StoredEvent]:
        found = self._database.conn.execute(f"{self._SELECT} {rest}", arguments).fetchall()
        return [StoredEvent(event_id, EventRow(*values)) for event_id, *values in found]
