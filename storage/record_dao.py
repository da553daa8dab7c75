"""The catalogue: rows that came with accepted results."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from storage.dao import DAO
from storage.row_table import RowTable
from storage.statements import MultiRow
from zmqcluster.core.rows import RecordRow


class RecordDAO(DAO):
    """The table `records`: the last row of a (table_name, key) wins, and keeps its first place."""

    _TABLE: Final = RowTable("records", RecordRow, verb="INSERT")
    _UPSERT: Final = MultiRow(
        f"INSERT INTO records ({_TABLE.columns}) {{}} "
        "ON CONFLICT (table_name, key) DO UPDATE SET job_id = excluded.job_id, "
        "task_id = excluded.task_id, attempt = excluded.attempt, at_wall = excluded.at_wall, "
        "body = excluded.body",
        len(RecordRow.__struct_fields__),
    )

    def write(self, rows: Iterable[RecordRow]) -> None:
        self._UPSERT.run(self._database.conn, [msgspec.structs.astuple(row) for row in rows])

    def page(self, table_name: str, after_key: str | None, limit: int) -> list[RecordRow]:
        """Rows of one table with a key above after_key (None: all), in the order of their keys."""
        where, arguments = "table_name = ?", [table_name]
        if after_key is not None:
            where, arguments = f"{where} AND key > ?", [table_name, after_key]
        return self._TABLE.read(self._database, where, arguments, order_by="key", limit=limit)
