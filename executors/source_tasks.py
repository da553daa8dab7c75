"""What user_apps, app_sync and data_sync share: their sources, one HTTP client, pages of JSON."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from executors.base import ExecutorSettings, TaskContext, TaskExecutor
from executors.fetch import Fetcher, Limits
from executors.sources import Endpoint, Source, SourceName, at, load_source
from executors.urls import BadUrl, canonical, join
from zmqcluster.errors import TaskRejected, TaskRetryable

PAGES_MAX: Final = 100
DAYS_MAX: Final = 3_660
# Rather than hold a slot for longer until its turn comes, a task is tried again then.
WAIT_S_MAX: Final = 30.0
LIMITS: Final = Limits(bytes_max=16 * 1024 * 1024)

AppId = Annotated[str, Meta(min_length=1, max_length=256)]
Username = Annotated[str, Meta(min_length=1, max_length=256)]
BaseUrl = Annotated[str, Meta(pattern=r"^(https?://.+)?$", max_length=2048)]


def check_days(start: date | None, end: date | None) -> None:
    """Raises ValueError, said to whoever submits, for a range that makes no sense."""
    if start is None or end is None:
        if start is not end:
            raise ValueError("start_date and end_date: give both or none")
        return
    if end < start:
        raise ValueError(f"end_date: {end} given; it must not be before start_date {start}")
    if (end - start).days >= DAYS_MAX:
        raise ValueError(f"end_date: {end} given; at most {DAYS_MAX} days at once are allowed")


class Place(Struct, frozen=True):
    """A source as one task uses it. origin: the rate key of everything it asks."""

    name: str
    source: Source
    base_url: str
    origin: str

    @property
    def delay_s(self) -> float:
        """Least time between two requests; 0 is none."""
        return self.source.delay_s or 0.0

    def endpoint(self, name: str) -> Endpoint:
        """Raises TaskRejected when the source does not offer this."""
        found: Endpoint | None = getattr(self.source, name)
        if found is None:
            raise TaskRejected(f"source {self.name!r} has no [{name}]")
        return found


class SourceTaskExecutor(TaskExecutor):
    """Base of the three; one HTTP client a host process each.

    A task may ask for several pages, and the fleet spaces only starts: so one of a source with a
    delay counts as begun with its last request (or, not knowing which that is, at its end), keeps
    the delay between its own, and nobody else asks meanwhile.
    """

    tells_begin = True

    async def setup(self, settings: ExecutorSettings) -> None:
        """Open the connection pool. Raises ConfigError for a bad egress_allow."""
        self._fetcher = Fetcher(settings)
        await self._fetcher.open()
        self._own = _own_folder(settings)
        self._told: set[str] = set()
        # Files are read once a host: a changed one counts from the next start on.
        self._sources: dict[str, Source] = {}

    async def close(self) -> None:
        await self._fetcher.close()

    def place(self, context: TaskContext, name: SourceName, base_url: str) -> Place:
        """Find the source and tell the fleet its limits, once a host. Raises TaskRejected."""
        source = self._sources.get(name) or load_source(name, self._own)
        self._sources[name] = source
        if source.base_url and base_url and base_url != source.base_url:
            raise TaskRejected(f"base_url: source {name!r} has its own, {source.base_url}")
        address = source.base_url or base_url
        if not address:
            raise TaskRejected(f"base_url: source {name!r} needs one with the task")
        try:
            origin = canonical(address).origin
        except BadUrl as error:
            raise TaskRejected(f"base_url: {address!r:.200} given; {error}") from None
        if origin not in self._told and (source.delay_s or source.concurrency):
            self._told.add(origin)
            context.report_rate(origin, source.delay_s, source.concurrency)
        return Place(name, source, address, origin)

    async def rows(
        self, context: TaskContext, place: Place, endpoint: Endpoint, values: Mapping[str, str]
    ) -> list[Any]:
        """All rows an endpoint gives for these values, page after page, at most PAGES_MAX."""
        url = endpoint.url(place.base_url, values)
        self._raise_if_far(place)
        rows: list[Any] = []
        for _ in range(PAGES_MAX):
            document = await self._json(context, place, url, is_last=not endpoint.next)
            rows += endpoint.rows(document)
            following = _next_url(place, endpoint, url, document)
            if following is None:
                return rows
            url = following
        raise TaskRejected(f"{place.name}: more than {PAGES_MAX} pages; ask for less at once")

    def _raise_if_far(self, place: Place) -> None:
        wait_s = self._fetcher.pacer.wait_s(place.origin, place.delay_s)
        if wait_s > WAIT_S_MAX:
            raise TaskRetryable(f"{place.origin} is asked slowly", int(wait_s * 1000))

    async def _json(self, context: TaskContext, place: Place, url: str, *, is_last: bool) -> Any:
        def on_leaving() -> None:
            if not context.is_paced and place.delay_s:
                # Nobody counts this start; the next one has to keep its distance all the same.
                context.report_rate(place.origin, closed_for_s=place.delay_s)
            elif is_last:
                context.tell_begun()

        try:
            response = await self._fetcher.fetch(
                url,
                LIMITS,
                {"Accept": "application/json"},
                delay_s=place.delay_s or None,
                on_leaving=on_leaving,
            )
        except TaskRetryable as later:
            if later.after_ms:
                context.report_rate(place.origin, closed_for_s=later.after_ms / 1000)
            raise
        try:
            return msgspec.json.decode(response.body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise TaskRejected(f"{url}: not JSON ({error})") from None


def _own_folder(settings: ExecutorSettings) -> Path | None:
    if settings.sources_dir:
        return Path(settings.sources_dir)
    return Path(settings.data_dir) / "sources" if settings.data_dir else None


def _next_url(place: Place, endpoint: Endpoint, url: str, document: Any) -> str | None:
    """The next page's URL, if there is one and it is the same site's."""
    link = at(document, endpoint.next) if endpoint.next else None
    if not link:
        return None
    try:
        target = join(url, str(link))
    except BadUrl as error:
        raise TaskRejected(f"{url}: next page {link!r:.200}: {error}") from None
    if target.origin != place.origin:
        raise TaskRejected(f"{url}: its next page is on another site, {target.origin}")
    if target.url == url:
        return None
    return target.url
