"""A table whose columns are the fields of one row struct: what all the DAOs have in common."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

import msgspec
from sqlite_utils import Database

from storage.statements import ROWS_MAX, MultiRow
from zmqcluster.core.rows import Row

R = TypeVar("R", bound=Row)


class RowTable(Generic[R]):
    """The SQL of one table. verb: what happens to a row whose key is there already.

    A row is the whole truth about its thing, so the default replaces.
    """

    def __init__(self, name: str, row_type: type[R], verb: str = "INSERT OR REPLACE") -> None:
        fields = row_type.__struct_fields__
        self.name = name
        self.columns = ", ".join(fields)
        self._row_type = row_type
        self._insert = MultiRow(f"{verb} INTO {name} ({self.columns}) {{}}", len(fields))

    def write(self, connection: sqlite3.Connection, rows: Iterable[R]) -> None:
        """Write all rows, in the caller's transaction."""
        self._insert.run(connection, [msgspec.structs.astuple(row) for row in rows])

    def read(
        self,
        database: Database,
        where: str | None = None,
        arguments: Sequence[Any] = (),
        *,
        order_by: str | None = None,
        limit: int | None = None,
    ) -> list[R]:
        """The rows that match. For tables that are read now and then, not for the hot path."""
        found = database[self.name].rows_where(
            where, arguments, order_by=order_by, select=self.columns, limit=limit
        )
        return self._typed(list(found))

    def read_keys(self, database: Database, column: str, keys: Sequence[Any]) -> list[R]:
        """The rows whose column is one of keys."""
        found: list[dict[str, Any]] = []
        for start in range(0, len(keys), ROWS_MAX):
            part = keys[start : start + ROWS_MAX]
            where = f"{column} IN ({','.join('?' * len(part))})"
            found += database[self.name].rows_where(where, part, select=self.columns)
        return self._typed(found)

    def _typed(self, found: list[dict[str, Any]]) -> list[R]:
        # Not strict: SQLite has no booleans.
        return [msgspec.convert(row, self._row_type, strict=False) for row in found]
