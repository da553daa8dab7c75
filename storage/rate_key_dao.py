"""Limits of rate keys, kept so that politeness outlives the master."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from storage.dao import DAO
from storage.row_table import RowTable
from zmqcluster.core.rows import RateKeyRow


class RateKeyDAO(DAO):
    """The table `rate_keys`."""

    _TABLE: Final = RowTable("rate_keys", RateKeyRow)

    def write(self, rows: Iterable[RateKeyRow]) -> None:
        self._TABLE.write(self._database.conn, rows)

    def limited(self, clock_ms: int) -> list[RateKeyRow]:
        """The keys that hold anything back: a delay, a concurrency, or closed at clock_ms."""
        return self._TABLE.read(
            self._database,
            "delay_ms > 0 OR concurrency > 0 OR closed_until_ms > ? OR next_at_ms > ?",
            [clock_ms, clock_ms],
        )

    def by_keys(self, rate_keys: Sequence[str]) -> dict[str, RateKeyRow]:
        """Those of rate_keys that have limits."""
        rows = self._TABLE.read_keys(self._database, "rate_key", rate_keys)
        return {row.rate_key: row for row in rows}
