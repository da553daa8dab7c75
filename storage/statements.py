"""Write many rows with few statements: one step of SQLite for up to 512 rows.

Python gives the interpreter lock away at each step of a statement. A row a step meant a lock
hand-over a row: beside a busy thread executemany took 1,000 µs a row, this takes 8.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from enum import StrEnum
from itertools import chain, repeat
from operator import attrgetter
from typing import Any, Final

from zmqcluster.model import DeviceState, JobState, Outcome, Role, TaskState

# Statements of these sizes are prepared once and kept by the connection; a batch is cut greedily.
ROWS_MAX: Final = 512
# SQLite's own default limit; distributions only raise it.
PARAMETERS_MAX: Final = 32_766
# Up to here a statement costs more than the rows it is filled up with.
SMALL_SIZE: Final = 16

SqlRow = tuple[Any, ...]


def _register_adapters() -> None:
    """Spare sqlite3 its search for an adapter: it knows str and int, but looks for bytes and enums.

    Measured: 0.5 µs less a task row. Both adapters are C callables.
    """
    sqlite3.register_adapter(bytes, bytes)
    kinds: tuple[type[StrEnum], ...] = (TaskState, JobState, DeviceState, Outcome, Role)
    for kind in kinds:
        sqlite3.register_adapter(kind, attrgetter("_value_"))


_register_adapters()


class MultiRow:
    """One SQL statement about a list of rows, for any number of rows.

    sql: has `{}` where a SELECT of the rows goes, its columns called column1, column2, …
    width: values in a row.

    A statement is prepared for 1, 2, 4 … 512 rows; the last rows of a batch go into the next
    larger one, filled up with rows that its LIMIT leaves out.
    """

    def __init__(self, sql: str, width: int) -> None:
        row = f"({','.join('?' * width)})"
        self._width = width
        self._rows_max = largest_power_of_two(min(ROWS_MAX, (PARAMETERS_MAX - 1) // width))
        sizes = (2**i for i in range(self._rows_max.bit_length()))
        # WHERE 1: without it SQLite takes a following ON CONFLICT for the ON of a join.
        # The very same str object each time: its hash is kept, so the statement cache is quick.
        self._sql = {
            size: sql.format(f"SELECT * FROM (VALUES {','.join([row] * size)}) WHERE 1 LIMIT ?")
            for size in sizes
        }

    def run(self, connection: sqlite3.Connection, rows: Sequence[SqlRow]) -> int:
        """Write rows, in order; says how many rows of the table it touched."""
        touched = start = 0
        while left := len(rows) - start:
            size = self._size(left)
            chunk = rows[start : start + size]
            values = list(chain.from_iterable(chunk))
            # 0 and not None, for which sqlite3 would look for an adapter.
            values.extend(repeat(0, (size - len(chunk)) * self._width))
            values.append(len(chunk))
            touched += connection.execute(self._sql[size], values).rowcount
            start += len(chunk)
        return touched

    def _size(self, left: int) -> int:
        """The statement to use when so many rows are left: a little too large is good."""
        if left >= self._rows_max:
            return self._rows_max
        above = next_power_of_two(left)
        is_near = above <= SMALL_SIZE or left * 4 >= above * 3
        return above if is_near else above // 2


def largest_power_of_two(limit: int) -> int:
    """The largest power of two not above limit, which is at least 1."""
    return 1 << (limit.bit_length() - 1)


def next_power_of_two(least: int) -> int:
    """The smallest power of two not below least, which is at least 1."""
    return 1 << (least - 1).bit_length()


class ByKeys:
    """One SELECT with `IN (…)`, for any number of keys.

    sql: has `{}` where the list goes, after all other parameters.
    """

    def __init__(self, sql: str) -> None:
        sizes = (2**i for i in range(largest_power_of_two(ROWS_MAX).bit_length()))
        self._sql = {size: sql.format(",".join("?" * size)) for size in sizes}

    def run(
        self, connection: sqlite3.Connection, keys: Sequence[Any], *before: Any
    ) -> list[SqlRow]:
        """All rows found; duplicate keys do no harm. before: the other parameters."""
        found: list[SqlRow] = []
        for start in range(0, len(keys), ROWS_MAX):
            part = tuple(keys[start : start + ROWS_MAX])
            size = next_power_of_two(len(part))
            # Filled up with the last key, so that ten prepared statements serve every length.
            full = part + part[-1:] * (size - len(part))
            found += connection.execute(self._sql[size], (*before, *full)).fetchall()
        return found
