"""What a worker says of itself, counts, and remembers of attempts that are over."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from zmqcluster.core.worker_events import WorkerSettings
from zmqcluster.messages import Held, Hello, PoolOffer
from zmqcluster.model import PROTOCOL_VERSION

ENDED_REMEMBERED: Final = 8_192


class WorkerCounters(Struct):
    """What happened since the start; nothing is dropped without being counted here."""

    received: int = 0
    started: int = 0
    finished: int = 0
    acknowledged: int = 0
    given_back: int = 0
    aborted: int = 0
    stale_assigns: int = 0
    repeated_orders: int = 0
    unknown_aborts: int = 0
    stray_reports: int = 0
    overdue: int = 0


class Memory:
    """The newest ended attempt of each task, for at least the last ENDED_REMEMBERED tasks."""

    def __init__(self) -> None:
        # Two generations: dropping the older one is cheaper than dropping entries one by one.
        self._recent: dict[int, int] = {}
        self._before: dict[int, int] = {}

    def ended(self, task_id: int, attempt: int) -> None:
        if attempt > self._recent.get(task_id, 0):
            self._recent[task_id] = attempt
        if len(self._recent) >= ENDED_REMEMBERED:
            self._before, self._recent = self._recent, {}

    def newest(self, task_id: int) -> int:
        """0: none that is remembered."""
        return max(self._recent.get(task_id, 0), self._before.get(task_id, 0))


def hello(
    settings: WorkerSettings,
    slots_max: int,
    credit: int,
    draining: bool,
    inventory: tuple[Held, ...],
) -> Hello:
    """The greeting that opens a session. slots_max: most at once over all pools."""
    return Hello(
        version=PROTOCOL_VERSION,
        device_id=settings.device_id,
        boot_id=settings.boot_id,
        name=settings.name,
        capabilities=settings.capabilities,
        task_types=settings.task_types,
        pools=tuple(PoolOffer(one.pool, min(one.slots, slots_max)) for one in settings.pools),
        labels=settings.labels,
        credit=credit,
        inventory=inventory,
        draining=draining,
    )
