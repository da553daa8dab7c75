"""Task type `app_sync`: what does this source say about this app?"""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from executors.base import TaskContext
from executors.source_tasks import AppId, BaseUrl, SourceTaskExecutor
from executors.sources import SourceName
from zmqcluster.errors import TaskRejected

TABLE: Final = "app_details"


class AppSyncParams(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """base_url: only for sources that leave it open, such as `json`."""

    source: SourceName
    app_id: AppId
    base_url: BaseUrl = ""


class AppSyncTaskExecutor(SourceTaskExecutor):
    """Keeps an app's details: one record in table `app_details`, keyed source:app."""

    task_type = "app_sync"
    params = AppSyncParams

    async def run(self, context: TaskContext, params: AppSyncParams) -> dict[str, Any]:
        """The details. Raises TaskRejected when the source knows no such app."""
        place = self.place(context, params.source, params.base_url)
        endpoint = place.endpoint(self.task_type)
        rows = await self.rows(context, place, endpoint, {"app_id": params.app_id})
        if not rows:
            raise TaskRejected(f"source {params.source!r} knows no app {params.app_id!r}")
        details = endpoint.kept(rows[0]) | {"source": params.source, "app_id": params.app_id}
        context.add_record(TABLE, f"{params.source}:{params.app_id}", details)
        return details
