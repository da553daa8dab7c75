"""A table whose columns are the fields of one row struct: what all the DAOs have in common."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any, Final, Generic, TypeVar

import msgspec
from sqlite_utils import Database

from storage.statements import ByKeys, MultiRow, SqlRow
from zmqcluster.core.rows import Row

R = TypeVar("R", bound=Row)
NO_LIMIT: Final = -1


class RowTable(Generic[R]):
    """The SQL of one table. verb: what happens to a row whose key is there already.

    A row is the whole truth about its thing, so the default replaces.
    """

    def __init__(self, name: str, row_type: type[R], verb: str = "INSERT OR REPLACE") -> None:
        fields = row_type.__struct_fields__
        self.name = name
        self.columns = ", ".join(fields)
        self._fields = fields
        self._row_type = row_type
        self._by_keys: dict[str, ByKeys] = {}
        self._insert = MultiRow(f"{verb} INTO {name} ({self.columns}) {{}}", len(fields))

    def write(self, connection: sqlite3.Connection, rows: Iterable[R]) -> None:
        """Write all rows, in the caller's transaction."""
        self._insert.run(connection, [msgspec.structs.astuple(row) for row in rows])

    def read(
        self,
        database: Database,
        where: str = "1",
        arguments: Sequence[Any] = (),
        *,
        order_by: str = "",
        limit: int = NO_LIMIT,
    ) -> list[R]:
        """The rows that match. For tables that are read now and then: about 3 µs a row."""
        order = f" ORDER BY {order_by}" if order_by else ""
        sql = f"SELECT {self.columns} FROM {self.name} WHERE {where}{order} LIMIT ?"
        return self._typed(database.conn.execute(sql, (*arguments, limit)).fetchall())

    def read_keys(self, database: Database, column: str, keys: Sequence[Any]) -> list[R]:
        """The rows whose column is one of keys."""
        if column not in self._by_keys:
            select = f"SELECT {self.columns} FROM {self.name} WHERE {column} IN ({{}})"
            self._by_keys[column] = ByKeys(select)
        return self._typed(self._by_keys[column].run(database.conn, keys))

    def _typed(self, found: list[SqlRow]) -> list[R]:
        # Not strict: SQLite has no booleans.
        return [
            msgspec.convert(dict(zip(self._fields, row, strict=True)), self._row_type, strict=False)
            for row in found
        ]
