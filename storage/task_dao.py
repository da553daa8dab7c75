"""Tasks: the one table where every microsecond counts."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, Final

import msgspec

from storage.dao import DAO
from storage.meta_dao import CLOCK_MS, WALL_MS
from storage.statements import ByKeys, MultiRow, SqlRow
from zmqcluster.core.events import LaneKey
from zmqcluster.core.rows import TaskRow
from zmqcluster.model import TaskId, TaskState

FIELDS: Final = TaskRow.__struct_fields__
# What changes in a task's life; the rest, task_data above all, is written once.
MUTABLE: Final = FIELDS[FIELDS.index("state") :]
NAMES: Final = ", ".join(FIELDS)
DATA_AT: Final = FIELDS.index("task_data")
# SQLite writes a changed row anew, whole. With 64 KB of task_data that took 390 µs for each change
# of state; so data above this lies in a table of its own, and is NULL in the task's row.
INLINE_BYTES_MAX: Final = 2_000
COLUMNS: Final = NAMES.replace(
    "task_data",
    "coalesce(task_data, "
    "(SELECT task_data FROM task_bodies WHERE task_bodies.task_id = tasks.task_id))",
)
# Rows for lists: without the bodies, which may be a MiB each and lie on pages of their own.
SLIM_COLUMNS: Final = NAMES.replace("task_data", "x''").replace("result", "x''")
# One answer to LoadBacklog carries at most this much task data (but always one task).
BACKLOG_BYTES_MAX: Final = 16 * 1024 * 1024
FETCHED_AT_ONCE: Final = 128

READY: Final = "state = 'pending' AND retry_at_ms = 0 AND not_before_wall = 0"
HELD: Final = "state IN ('assigned', 'running')"
UNSUCCESSFUL: Final = "state IN ('failed', 'cancelled', 'dead')"
LANE: Final = "task_type, labels, rate_key, priority"

_STATES: Final = {state.value: state for state in TaskState}
_mutable_values: Final = attrgetter("task_id", *MUTABLE)


class TaskDAO(DAO):
    """The table `tasks`."""

    _INSERT: Final = MultiRow(f"INSERT INTO tasks ({NAMES}) {{}}", len(FIELDS))
    _INSERT_MISSING: Final = MultiRow(f"INSERT OR IGNORE INTO tasks ({NAMES}) {{}}", len(FIELDS))
    _INSERT_BODIES: Final = MultiRow("INSERT OR IGNORE INTO task_bodies (task_id, task_data) {}", 2)
    _UPDATE: Final = MultiRow(
        "UPDATE tasks SET "
        + ", ".join(f"{name} = new.column{i}" for i, name in enumerate(MUTABLE, start=2))
        + " FROM ({}) AS new WHERE tasks.task_id = new.column1",
        1 + len(MUTABLE),
    )
    _BY_IDS: Final = ByKeys(f"SELECT {COLUMNS} FROM tasks WHERE task_id IN ({{}})")
    _DELETE: Final = ByKeys("DELETE FROM tasks WHERE task_id IN ({})")
    _DELETE_BODIES: Final = ByKeys("DELETE FROM task_bodies WHERE task_id IN ({})")

    def insert(self, rows: Iterable[TaskRow]) -> None:
        """Write tasks that are new; one that exists is an error."""
        self._insert(self._INSERT, rows)

    def update(self, rows: Sequence[TaskRow]) -> None:
        """Write what changed in tasks that exist.

        One that was pruned since the core read it (a retry of an old task) is written anew.
        """
        values = [_mutable_values(row) for row in rows]
        if self._UPDATE.run(self._database.conn, values) < len(rows):
            self._insert(self._INSERT_MISSING, rows)

    def by_ids(self, task_ids: Sequence[int]) -> dict[TaskId, TaskRow]:
        """Those of task_ids that exist, with their bodies."""
        rows = map(task_row, self._BY_IDS.run(self._database.conn, task_ids))
        return {row.task_id: row for row in rows}

    def held(self) -> list[TaskRow]:
        """Tasks in a device's hands."""
        sql = f"SELECT {COLUMNS} FROM tasks INDEXED BY tasks_held WHERE {HELD}"
        return list(map(task_row, self._database.conn.execute(sql).fetchall()))

    def highest_id(self) -> int:
        (highest,) = self._database.conn.execute("SELECT max(task_id) FROM tasks").fetchone()
        return int(highest or 0)

    def backlog(self, lane: LaneKey, after_id: int, limit: int) -> tuple[list[TaskRow], bool]:
        """Ready tasks of a lane with an id above after_id, in id order; are there more?

        May stop short of limit for the sake of memory (BACKLOG_BYTES_MAX).
        """
        cursor = self._database.conn.execute(
            f"SELECT {COLUMNS} FROM tasks INDEXED BY tasks_ready WHERE {READY} "
            "AND task_type = ? AND labels = ? AND rate_key = ? AND priority = ? AND task_id > ? "
            "ORDER BY task_id LIMIT ?",
            (*msgspec.structs.astuple(lane), after_id, limit + 1),
        )
        return _bounded(cursor, limit)

    def lanes(self, after: LaneKey | None, limit: int) -> tuple[list[LaneKey], bool]:
        """The distinct lanes of ready tasks after this one, in order; are there more?

        At most four looks into the index for each lane, however many tasks it has.
        """
        connection = self._database.conn
        lanes: list[LaneKey] = []
        key: SqlRow | None = msgspec.structs.astuple(after) if after is not None else None
        while len(lanes) <= limit:
            sql, arguments = (_NEXT_LANE, key) if key is not None else (_FIRST_LANE, ())
            key = connection.execute(sql, arguments).fetchone()
            if key is None:
                return lanes, False
            lanes.append(LaneKey(*key))
        return lanes[:limit], True

    def delayed(self, limit: int) -> tuple[list[TaskRow], bool]:
        """Pending tasks that wait for a retry or their schedule, soonest first; are there more?

        The two run by different clocks; the last saved pair of them makes them comparable.
        """
        connection = self._database.conn
        clocks = dict(connection.execute("SELECT key, value FROM meta").fetchall())
        wall_ahead_ms = clocks.get(WALL_MS, 0) - clocks.get(CLOCK_MS, 0)

        def due_ms(row: TaskRow) -> int:
            return row.retry_at_ms or row.not_before_wall - wall_ahead_ms

        rows: list[TaskRow] = []
        read_up_to_ms: int | None = None
        for sql in (_RETRY, _SCHEDULED):
            found, is_cut = _bounded(connection.execute(sql, (limit + 1,)), limit + 1)
            rows += found
            if is_cut and found:
                last_ms = due_ms(found[-1])
                read_up_to_ms = last_ms if read_up_to_ms is None else min(read_up_to_ms, last_ms)
        if read_up_to_ms is not None:
            # Beyond this moment one of the two has rows that were not read.
            rows = [row for row in rows if due_ms(row) <= read_up_to_ms]
        rows.sort(key=due_ms)
        return rows[:limit], read_up_to_ms is not None or len(rows) > limit

    def has_delayed(self) -> bool:
        (found,) = self._database.conn.execute(
            f"SELECT EXISTS ({_RETRY.replace('?', '1')}) OR EXISTS ({_SCHEDULED.replace('?', '1')})"
        ).fetchone()
        return bool(found)

    def finished_before(
        self, before_wall: int, limit: int, bytes_max: int
    ) -> tuple[list[int], bool]:
        """Terminal tasks that ended before this instant, oldest first; are there more?

        bytes_max: of their bodies together; one task may exceed it alone.
        Never the task with the highest id: the next id is counted from it, and ids only grow.
        """
        found = self._database.conn.execute(_FINISHED, (before_wall, limit + 1)).fetchall()
        task_ids: list[int] = []
        bytes_left = bytes_max
        for task_id, body_bytes in found[:limit]:
            if bytes_left <= 0:
                break
            task_ids.append(task_id)
            bytes_left -= body_bytes
        return task_ids, len(task_ids) < len(found)

    def delete(self, task_ids: Sequence[int]) -> None:
        self._DELETE.run(self._database.conn, task_ids)
        self._DELETE_BODIES.run(self._database.conn, task_ids)

    def _insert(self, statement: MultiRow, rows: Iterable[TaskRow]) -> None:
        values, bodies = list[SqlRow](), list[SqlRow]()
        for row in rows:
            row_values = msgspec.structs.astuple(row)
            if len(row.task_data) > INLINE_BYTES_MAX:
                bodies.append((row.task_id, row.task_data))
                row_values = (*row_values[:DATA_AT], None, *row_values[DATA_AT + 1 :])
            values.append(row_values)
        statement.run(self._database.conn, values)
        self._INSERT_BODIES.run(self._database.conn, bodies)


_RETRY: Final = (
    f"SELECT {COLUMNS} FROM tasks INDEXED BY tasks_retry "
    "WHERE state = 'pending' AND retry_at_ms > 0 ORDER BY retry_at_ms LIMIT ?"
)
_SCHEDULED: Final = (
    f"SELECT {COLUMNS} FROM tasks INDEXED BY tasks_scheduled "
    "WHERE state = 'pending' AND retry_at_ms = 0 AND not_before_wall > 0 "
    "ORDER BY not_before_wall LIMIT ?"
)
# length() of a blob is in its row's header: nothing of the blob is read.
_FINISHED: Final = """
    SELECT task_id, length(result) + coalesce(length(task_data), (
        SELECT length(task_data) FROM task_bodies WHERE task_bodies.task_id = tasks.task_id))
    FROM tasks INDEXED BY tasks_finished
    WHERE finished_wall > 0 AND finished_wall < ?
    AND state IN ('completed', 'failed', 'cancelled', 'dead')
    AND task_id < (SELECT max(task_id) FROM tasks)
    ORDER BY finished_wall LIMIT ?"""
_FIRST_LANE: Final = (
    f"SELECT {LANE} FROM tasks INDEXED BY tasks_ready WHERE {READY} ORDER BY {LANE} LIMIT 1"
)
# The next priority, else the next rate key, … Only the last column of each is compared by ">":
# SQLite seeks behind all its equals then, but walks over them for "(a, b, …) > (?, ?, …)".
_NEXT_LANE: Final = (
    " UNION ALL ".join(
        f"SELECT * FROM (SELECT {LANE} FROM tasks INDEXED BY tasks_ready WHERE {READY} "
        f"AND {terms} ORDER BY {LANE} LIMIT 1)"
        for terms in (
            "task_type = ?1 AND labels = ?2 AND rate_key = ?3 AND priority > ?4",
            "task_type = ?1 AND labels = ?2 AND rate_key > ?3",
            "task_type = ?1 AND labels > ?2",
            "task_type > ?1",
        )
    )
    + " LIMIT 1"
)


def task_row(values: Sequence[Any]) -> TaskRow:
    """A row of the table, in the order of TaskRow's fields."""
    row = TaskRow(*values)
    row.state = _STATES[row.state]
    row.cancel_requested = bool(row.cancel_requested)
    return row


def _bounded(cursor: sqlite3.Cursor, limit: int) -> tuple[list[TaskRow], bool]:
    """At most limit rows and about BACKLOG_BYTES_MAX of bodies; is there anything left?"""
    rows: list[TaskRow] = []
    bytes_left = BACKLOG_BYTES_MAX
    try:
        while fetched := cursor.fetchmany(FETCHED_AT_ONCE):
            for values in fetched:
                if len(rows) == limit or bytes_left < 0:
                    return rows, True
                row = task_row(values)
                bytes_left -= len(row.task_data)
                rows.append(row)
        return rows, False
    finally:
        # A cursor left half-way would pin the WAL, which then grows without bound.
        cursor.close()
