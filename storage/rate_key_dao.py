"""Limits of rate keys, kept so that politeness outlives the master."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from storage.dao import DAO
from storage.meta_dao import CLOCK_MS
from storage.row_table import RowTable
from storage.statements import ByKeys
from zmqcluster.core.rows import RateKeyRow


class RateKeyDAO(DAO):
    """The table `rate_keys`."""

    _TABLE: Final = RowTable("rate_keys", RateKeyRow)

    def write(self, rows: Iterable[RateKeyRow]) -> None:
        self._TABLE.write(self._database.conn, rows)

    def by_keys(self, rate_keys: Sequence[str]) -> dict[str, RateKeyRow]:
        """Those of rate_keys that have limits."""
        rows = self._TABLE.read_keys(self._database, "rate_key", rate_keys)
        return {row.rate_key: row for row in rows}

    def prune(self, before_wall: int, again_wall: int, limit: int) -> int:
        """Forget rows written before this instant that nothing needs; says how many were looked at.

        Needed is one that is still closed, or has a task, or a job that asked for it: its turn
        comes again when again_wall is past retention, so that it does not stand before others.
        """
        connection = self._database.conn
        found = connection.execute(_OLD, (before_wall, limit)).fetchall()
        needed = [rate_key for rate_key, is_needed in found if is_needed]
        _DELETE.run(connection, [rate_key for rate_key, is_needed in found if not is_needed])
        connection.executemany(
            "UPDATE rate_keys SET changed_wall = ? WHERE rate_key = ?",
            [(again_wall, rate_key) for rate_key in needed],
        )
        return len(found)


_DELETE: Final = ByKeys("DELETE FROM rate_keys WHERE rate_key IN ({})")
_OLD: Final = f"""
    SELECT rate_key,
        EXISTS (SELECT 1 FROM tasks INDEXED BY tasks_of_rate_key
            WHERE tasks.rate_key = rate_keys.rate_key AND tasks.rate_key > '')
        OR EXISTS (SELECT 1 FROM jobs WHERE jobs.job_id = rate_keys.job_id AND jobs.job_id > 0)
        OR max(next_at_ms, closed_until_ms) > (SELECT value FROM meta WHERE key = '{CLOCK_MS}')
    FROM rate_keys INDEXED BY rate_keys_by_age
    WHERE changed_wall < ? ORDER BY changed_wall LIMIT ?"""
