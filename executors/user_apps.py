"""Task type `user_apps`: which apps does this user have at this source?"""

from __future__ import annotations

from datetime import date
from typing import Any, Final

from msgspec import Struct

from executors.app_sync import AppSyncParams
from executors.base import TaskContext
from executors.data_sync import DataSyncParams
from executors.source_tasks import BaseUrl, Place, SourceTaskExecutor, Username, check_days
from executors.sources import SourceName

TABLE: Final = "apps"


class UserAppsParams(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """follow: also queue app_sync for each app, and, when the dates are given, data_sync.

    base_url: only for sources that leave it open, such as `json`.
    """

    source: SourceName
    username: Username
    follow: bool = False
    start_date: date | None = None
    end_date: date | None = None
    base_url: BaseUrl = ""

    def __post_init__(self) -> None:
        check_days(self.start_date, self.end_date)


class UserAppsTaskExecutor(SourceTaskExecutor):
    """Lists a user's apps: a record each in table `apps`, keyed source:username:app."""

    task_type = "user_apps"
    params = UserAppsParams

    async def run(self, context: TaskContext, params: UserAppsParams) -> dict[str, Any]:
        """The app ids; those without one are counted."""
        place = self.place(context, params.source, params.base_url)
        endpoint = place.endpoint(self.task_type)
        rows = await self.rows(context, place, endpoint, {"username": params.username})
        app_ids: dict[str, None] = {}
        for row in rows:
            app_id = endpoint.key_of(row)
            if not app_id or app_id in app_ids:
                continue
            app_ids[app_id] = None
            kept = {"source": params.source, "username": params.username, "app_id": app_id}
            key = f"{params.source}:{params.username}:{app_id}"
            context.add_record(TABLE, key, endpoint.kept(row) | kept)
            if params.follow:
                _follow(context, params, place, app_id)
        return {
            "source": params.source,
            "username": params.username,
            "app_ids": list(app_ids),
            "skipped": len(rows) - len(app_ids),
            "queued": len(context.children),
        }


def _follow(context: TaskContext, params: UserAppsParams, place: Place, app_id: str) -> None:
    name = f"{params.source}:{app_id}"
    if place.source.app_sync is not None:
        context.add_child(
            "app_sync",
            AppSyncParams(source=params.source, app_id=app_id, base_url=params.base_url),
            unique_key=f"app_sync:{name}",
            rate_key=place.origin,
        )
    if place.source.data_sync is not None and params.start_date and params.end_date:
        context.add_child(
            "data_sync",
            DataSyncParams(
                source=params.source,
                app_id=app_id,
                start_date=params.start_date,
                end_date=params.end_date,
                base_url=params.base_url,
            ),
            unique_key=f"data_sync:{name}:{params.start_date}:{params.end_date}",
            rate_key=place.origin,
        )
