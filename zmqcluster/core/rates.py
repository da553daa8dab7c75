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

    starting: flights granted under a delay and not yet known to have begun (Flight.is_starting).
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

    def is_idle(self, now_ms: int) -> bool:
        """Nothing depends on it: it may be forgotten."""
        is_held_back = self.has_limits or self.opens_at_ms() > now_ms
        return not (is_held_back or self.running or self.lanes)

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

    def grant(self) -> bool:
        """An attempt under this key is handed out. True: the key stays closed until it begins."""
        self.running += 1
        self.starting += self.is_delayed
        return self.is_delayed

    def began(self, now_ms: int, *, was_starting: bool) -> None:
        """An attempt is known to run."""
        self.starting -= was_starting
        self._touched(now_ms)

    def ended(self, now_ms: int, *, was_starting: bool, has_run: bool) -> None:
        """An attempt is over. has_run: it may have touched the origin."""
        self.running -= 1
        self.starting -= was_starting
        # The last request of a task may have come at its very end.
        if has_run and (was_starting or self.concurrency == 1):
            self._touched(now_ms)

    def lost(self, now_ms: int, start_within_ms: int, *, was_starting: bool) -> None:
        """Nobody knows what became of an attempt: it may begin until its window has passed."""
        self.running -= 1
        self.starting -= was_starting
        if self.has_limits:
            self.next_at_ms = max(self.next_at_ms, now_ms + start_within_ms + self.delay_ms)

    def _touched(self, at_ms: int) -> None:
        if self.delay_ms:
            self.next_at_ms = max(self.next_at_ms, at_ms + self.delay_ms)

    def row(self) -> RateKeyRow:
        return RateKeyRow(
            rate_key=self.name,
            delay_ms=self.delay_ms,
            concurrency=self.concurrency,
            next_at_ms=self.next_at_ms,
            closed_until_ms=self.closed_until_ms,
        )
