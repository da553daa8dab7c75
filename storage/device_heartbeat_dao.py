"""Samples of the devices' heartbeats: history for people, never used to decide."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from storage.dao import DAO
from storage.row_table import RowTable
from zmqcluster.core.rows import HeartbeatRow


class DeviceHeartbeatDAO(DAO):
    """The table `device_heartbeats`; two samples of one device in one ms are one."""

    _TABLE: Final = RowTable("device_heartbeats", HeartbeatRow)

    def write(self, rows: Iterable[HeartbeatRow]) -> None:
        self._TABLE.write(self._database.conn, rows)

    def of_device(self, device_id: str, limit: int) -> list[HeartbeatRow]:
        """The newest samples of a device, newest first."""
        return self._TABLE.read(
            self._database, "device_id = ?", [device_id], order_by="at_wall DESC", limit=limit
        )

    def prune(self, before_wall: int, limit: int) -> int:
        """Delete the oldest samples before this instant; says how many."""
        cursor = self._database.conn.execute(
            """DELETE FROM device_heartbeats WHERE (device_id, at_wall) IN (
                SELECT device_id, at_wall FROM device_heartbeats
                WHERE at_wall < ? ORDER BY at_wall LIMIT ?)""",
            (before_wall, limit),
        )
        return cursor.rowcount
