"""Answers the core's questions to the database, on the master's loop."""

from __future__ import annotations

from storage.queries import Queries
from zmqcluster.core.effects import (
    Action,
    ListLanes,
    LoadBacklog,
    LoadDelayed,
    LoadOpenTasks,
)
from zmqcluster.core.events import (
    BacklogLoaded,
    DelayedLoaded,
    Event,
    Facts,
    LanesListed,
    OpenTasksLoaded,
)
from zmqcluster.core.master import MasterCore
from zmqcluster.core.rows import RateKeyRow
from zmqcluster.messages import Inbound
from zmqcluster.model import JobId

_NO_FACTS = Facts()


class Lookups:
    """Reads committed rows; every answer goes to the core before its next Committed."""

    def __init__(self, queries: Queries, core: MasterCore) -> None:
        self._queries = queries
        self._core = core

    def facts_for(self, message: Inbound) -> Facts:
        """What the core wants to know before it handles message."""
        wants = self._core.wants(message)
        if wants.nothing:
            return _NO_FACTS
        queries = self._queries
        submitted = queries.submission(wants.request_id) if wants.request_id else None
        tasks = queries.tasks_by_id(wants.tasks) if wants.tasks else {}
        if tasks:
            wants = wants.plus(self._core.wants_of(message, tasks))
        return Facts(
            submitted=(
                (submitted.job_id, submitted.task_ids, submitted.existing) if submitted else None
            ),
            keys=queries.known_keys(wants.keys) if wants.keys else {},
            tasks=tasks,
            jobs=queries.jobs_by_id(wants.jobs) if wants.jobs else {},
            rates=self._rates(wants.rates),
        )

    def answer(self, action: Action) -> Event | None:
        """The event that answers a Load… or List… action; None for every other action."""
        match action:
            case LoadBacklog(lane, after_id, limit):
                rows, more = self._queries.backlog(lane, after_id, limit)
                return BacklogLoaded(lane, tuple(rows), more)
            case ListLanes(after, limit):
                lanes, more = self._queries.lanes(after, limit)
                rates = self._rates(self._core.rates_of(lanes))
                return LanesListed(tuple(lanes), more, rates)
            case LoadDelayed(limit):
                rows, more = self._queries.delayed(limit)
                rates = self._rates(self._core.rates_of(rows))
                return DelayedLoaded(tuple(rows), more, rates)
            case LoadOpenTasks(job_id, after_id, limit):
                return self._open_tasks(job_id, after_id, limit)
            case _:
                return None

    def _rates(self, names: tuple[str, ...]) -> dict[str, RateKeyRow]:
        """All of names, those without a row too."""
        found = self._queries.rate_keys(names) if names else {}
        return {name: found.get(name) or RateKeyRow(name) for name in names}

    def _open_tasks(self, job_id: JobId, after_id: int, limit: int) -> OpenTasksLoaded:
        page = self._queries.open_tasks(job_id, after_id, limit)
        found = self._queries.tasks_by_id([row.task_id for row in page.rows])
        rows = tuple(found[task_id] for task_id in sorted(found))
        return OpenTasksLoaded(job_id, rows, page.next_cursor or 0)
