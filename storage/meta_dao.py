"""The handful of numbers that are about the whole database."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from storage.dao import DAO
from storage.statements import MultiRow

EPOCH: Final = "epoch"
CLOCK_MS: Final = "clock_ms"
WALL_MS: Final = "wall_ms"
# Random, made once: tells this database's WAL from another's.
DATABASE_ID: Final = "database_id"


class MetaDAO(DAO):
    """Named integers: epoch, clock_ms, wall_ms, database_id, and what pruned jobs had counted."""

    _WRITE: Final = MultiRow("INSERT OR REPLACE INTO meta (key, value) {}", 2)
    _ADD: Final = MultiRow(
        "INSERT INTO meta (key, value) {} "
        "ON CONFLICT (key) DO UPDATE SET value = value + excluded.value",
        2,
    )

    def write(self, values: Mapping[str, int]) -> None:
        self._WRITE.run(self._database.conn, list(values.items()))

    def add(self, amounts: Mapping[str, int]) -> None:
        """Add to each value; one that is missing counts from 0."""
        self._ADD.run(self._database.conn, list(amounts.items()))

    def epoch(self) -> int:
        """The newest master's. 3 us: asked at each commit."""
        found = self._database.conn.execute("SELECT value FROM meta WHERE key = ?", (EPOCH,))
        row = found.fetchone()
        return int(row[0]) if row else 0

    def read(self) -> dict[str, int]:
        """All of them; a name never written is missing."""
        return dict(self._database.conn.execute("SELECT key, value FROM meta").fetchall())
