"""Task type `data_sync`: the daily data of an app for a range of days."""

from __future__ import annotations

from datetime import date
from typing import Any, Final

from msgspec import Struct

from executors.base import TaskContext
from executors.source_tasks import AppId, BaseUrl, SourceTaskExecutor, check_days
from executors.sources import SourceName

TABLE: Final = "app_data"


class DataSyncParams(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """start_date, end_date: both days included.

    base_url: only for sources that leave it open, such as `json`.
    """

    source: SourceName
    app_id: AppId
    start_date: date
    end_date: date
    base_url: BaseUrl = ""

    def __post_init__(self) -> None:
        check_days(self.start_date, self.end_date)


class DataSyncTaskExecutor(SourceTaskExecutor):
    """Keeps an app's rows: records in table `app_data`, keyed source:app:day:key."""

    task_type = "data_sync"
    params = DataSyncParams

    async def run(self, context: TaskContext, params: DataSyncParams) -> dict[str, Any]:
        """How many rows were kept, and left out because their day is not asked for."""
        place = self.place(context, params.source, params.base_url)
        endpoint = place.endpoint(self.task_type)
        values = {
            "app_id": params.app_id,
            "start_date": params.start_date.isoformat(),
            "end_date": params.end_date.isoformat(),
        }
        rows = await self.rows(context, place, endpoint, values)
        days: set[date] = set()
        kept = 0
        for row in rows:
            day = endpoint.day_of(row)
            if day is None or not params.start_date <= day <= params.end_date:
                continue
            days.add(day)
            kept += 1
            key = f"{params.source}:{params.app_id}:{day}:{endpoint.key_of(row)}"
            named = {"source": params.source, "app_id": params.app_id, "day": day.isoformat()}
            context.add_record(TABLE, key, endpoint.kept(row) | named)
        return {
            "source": params.source,
            "app_id": params.app_id,
            "rows": kept,
            "days": len(days),
            "left_out": len(rows) - kept,
        }
