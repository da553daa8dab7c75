"""Rate keys: how often and how many at once, for the whole fleet.

A key with a delay hands out one start at a time, and the next one only `delay_ms` after the former
attempt is known to have begun (and, where only one runs at once, to have ended). Both are learned
from messages that were sent after the fact, so however late they come, two starts are never closer
at the origin than the delay. Whatever is unknown keeps the key closed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from zmqcluster.core.rows import RateKeyRow

if TYPE_CHECKING:
    from zmqcluster.core.queue import Lane


class RateKey(Struct, weakref=False):
    """One origin's limits and what of it is in flight.

    starting: grants of a delayed key not yet known to have begun (0 or 1).
    """

    name: str
    delay_ms: int = 0
    concurrency: int = 0
    next_at_ms: int = 0
    closed_until_ms: int = 0
    running: int = 0
    starting: int = 0
    lanes: dict[Lane, None] = {}

    @property
    def has_limits(self) -> bool:
        return bool(self.delay_ms or self.concurrency)

    @property
    def is_delayed(self) -> bool:
        return self.delay_ms > 0

    @property
    def is_idle(self) -> bool:
        """Nothing depends on it: it may be forgotten."""
        return not (self.has_limits or self.running or self.lanes)

    def is_open(self, now_ms: int) -> bool:
        return (
            now_ms >= self.next_at_ms
            and now_ms >= self.closed_until_ms
            and not self.starting
            and (not self.concurrency or self.running < self.concurrency)
        )

    def opens_at_ms(self) -> int:
        """When time alone would open it; a full or starting key waits for a message instead."""
        return max(self.next_at_ms, self.closed_until_ms)

    def grant(self) -> None:
        """An attempt under this key is handed out."""
        self.running += 1
        if self.is_delayed:
            self.starting = 1

    def began(self, now_ms: int) -> None:
        """The attempt handed out last is known to run."""
        if self.starting:
            self.starting = 0
            self.next_at_ms = max(self.next_at_ms, now_ms + self.delay_ms)

    def ended(self, now_ms: int, *, has_run: bool) -> None:
        """An attempt is over. has_run: it may have touched the origin."""
        self.running = max(0, self.running - 1)
        if self.starting and not has_run:
            self.starting = 0
        elif self.starting or self.concurrency == 1:
            # The last request of a task may have come at its very end.
            self.starting = 0
            self.next_at_ms = max(self.next_at_ms, now_ms + self.delay_ms)

    def lost(self, now_ms: int, start_within_ms: int) -> None:
        """Nobody knows what became of an attempt: it may begin until its window has passed."""
        self.running = max(0, self.running - 1)
        self.starting = 0
        if self.has_limits:
            self.next_at_ms = max(self.next_at_ms, now_ms + start_within_ms + self.delay_ms)

    def row(self) -> RateKeyRow:
        return RateKeyRow(
            rate_key=self.name,
            delay_ms=self.delay_ms,
            concurrency=self.concurrency,
            next_at_ms=self.next_at_ms,
            closed_until_ms=self.closed_until_ms,
        )
