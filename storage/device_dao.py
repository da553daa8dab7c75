"""Devices as last seen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from storage.dao import DAO
from storage.row_table import RowTable
from zmqcluster.core.rows import DeviceRow


class DeviceDAO(DAO):
    """The table `devices`: one row for each device that ever registered."""

    _TABLE: Final = RowTable("devices", DeviceRow)

    def write(self, rows: Iterable[DeviceRow]) -> None:
        self._TABLE.write(self._database.conn, rows)

    def all(self) -> list[DeviceRow]:
        return self._TABLE.read(self._database, order_by="device_id")

    def get(self, device_id: str) -> DeviceRow | None:
        found = self._TABLE.read(self._database, "device_id = ?", [device_id])
        return found[0] if found else None

    def page(self, after_id: str, limit: int) -> list[DeviceRow]:
        """Devices with an id above after_id, in order."""
        return self._TABLE.read(
            self._database, "device_id > ?", [after_id], order_by="device_id", limit=limit
        )
