"""Lists of tasks for people: any filter, a bounded amount of work for each page."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct
from sqlite_utils import Database

from storage.task_dao import HELD, SLIM_COLUMNS, UNSUCCESSFUL, task_row
from zmqcluster.core.rows import TaskRow
from zmqcluster.model import TaskState

LIMIT_MAX: Final = 1000
# A filter that fits nothing looks at this many tasks, about 5 ms, before the page ends.
SCANNED_MAX: Final = 20_000
_BEYOND: Final = 2**63 - 1

_HELD_STATES: Final = {TaskState.ASSIGNED, TaskState.RUNNING}
_UNSUCCESSFUL: Final = {TaskState.FAILED, TaskState.CANCELLED, TaskState.DEAD}


class TaskFilter(Struct, frozen=True):
    """Which tasks; None is "any". states: any of them."""

    states: tuple[TaskState, ...] = ()
    task_type: str | None = None
    job_id: int | None = None
    device_id: str | None = None
    rate_key: str | None = None


class TaskPage(Struct, frozen=True):
    """rows: without task_data and result. next_cursor: where to go on, None at the end.

    A page can be short, even empty, and still have a next_cursor.
    """

    rows: list[TaskRow]
    next_cursor: int | None


def list_tasks(
    database: Database,
    wanted: TaskFilter,
    *,
    cursor: int | None = None,
    limit: int = 100,
    newest_first: bool = True,
) -> TaskPage:
    """Tasks in the order of their ids, from behind cursor on."""
    limit = max(1, min(limit, LIMIT_MAX))
    candidates, arguments = _candidates(wanted, cursor, newest_first)
    terms, values = _terms(wanted)
    order = "DESC" if newest_first else "ASC"
    found = database.conn.execute(
        f"""SELECT {SLIM_COLUMNS} FROM tasks WHERE task_id IN (
            SELECT task_id FROM ({candidates}) WHERE {terms} LIMIT ?
        ) ORDER BY task_id {order}""",
        (*arguments, *values, limit + 1),
    ).fetchall()
    rows = [task_row(row) for row in found[:limit]]
    if len(found) > limit:
        return TaskPage(rows, int(rows[-1].task_id))
    end = database.conn.execute(
        f"SELECT task_id FROM ({candidates}) LIMIT 1 OFFSET {SCANNED_MAX - 1}", arguments
    ).fetchone()
    return TaskPage(rows, end[0] if end else None)


def open_tasks(
    database: Database, job_id: int, after_id: int = 0, limit: int = LIMIT_MAX
) -> TaskPage:
    """Tasks of a job that have not ended, in id order; rows without bodies, pages as above."""
    states = (TaskState.PENDING, TaskState.ASSIGNED, TaskState.RUNNING)
    wanted = TaskFilter(states=states, job_id=job_id)
    return list_tasks(database, wanted, cursor=after_id, limit=limit, newest_first=False)


def _candidates(
    wanted: TaskFilter, cursor: int | None, newest_first: bool
) -> tuple[str, tuple[Any, ...]]:
    """The best index's tasks in id order, as a SELECT that ends after SCANNED_MAX of them."""
    states = set(wanted.states)
    source, terms, arguments = "NOT INDEXED", "", list[Any]()
    if states and states <= _HELD_STATES:
        # What is in hands is bounded; sorting all of it is quick.
        source, terms = "INDEXED BY tasks_held", f"{HELD} AND"
    elif wanted.job_id:
        source, terms = "INDEXED BY tasks_of_job", "job_id > 0 AND job_id = ? AND"
        arguments.append(wanted.job_id)
    elif len(states) == 1 and states <= _UNSUCCESSFUL:
        (state,) = states
        source, terms = "INDEXED BY tasks_unsuccessful", f"{UNSUCCESSFUL} AND state = ? AND"
        arguments.append(state)
    edge, order = ("<", "DESC") if newest_first else (">", "ASC")
    start = cursor if cursor is not None else (_BEYOND if newest_first else 0)
    columns = "task_id, state, task_type, job_id, device_id, rate_key"
    sql = f"""SELECT {columns} FROM tasks {source} WHERE {terms} task_id {edge} ?
        ORDER BY task_id {order} LIMIT {SCANNED_MAX}"""
    return sql, (*arguments, start)


def _terms(wanted: TaskFilter) -> tuple[str, list[Any]]:
    """The filter as SQL."""
    terms, values = ["1"], list[Any]()
    if wanted.states:
        terms.append(f"state IN ({','.join('?' * len(wanted.states))})")
        values += wanted.states
    for name in ("task_type", "job_id", "device_id", "rate_key"):
        if (value := getattr(wanted, name)) is not None:
            terms.append(f"{name} = ?")
            values.append(value)
    return " AND ".join(terms), values
