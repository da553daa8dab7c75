"""Rate keys: how often and how many at once, for the whole fleet.

A key with a delay hands out one start at a time, and the next one only `delay_ms` after the former
attempt is known to have begun (and, where only one runs at once, to have ended). Both are learned
from messages that were sent after the fact, so however late they come, two starts are never closer
at the origin than the delay. Whatever is unknown keeps the key closed.

A key is in memory while something depends on it; else its row is on disk, and comes back with
whatever names it (MasterState.recall).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from zmqcluster.core.rows import RateKeyRow
from zmqcluster.model import NO_JOB, JobId

if TYPE_CHECKING:
    from zmqcluster.core.lanes import Lane


class RateKey(Struct, weakref=False):
    """One origin's limits and what of it is in flight.

    starting: flights granted under a delay and not yet known to have begun (Flight.is_starting).
    lanes: those in memory. recalled_ms: next_at_ms as it would be if it were read back now.
    saving_turn: the turn whose commit brings its row to the disk; 0: the row is there.
    """

    name: str
    delay_ms: int = 0
    concurrency: int = 0
    next_at_ms: int = 0
    closed_until_ms: int = 0
    running: int = 0
    starting: int = 0
    lanes: dict[Lane, None] = {}
    job_id: JobId = NO_JOB
    recalled_ms: int = 0
    saving_turn: int = 0

    @classmethod
    def of_row(cls, row: RateKeyRow, epoch: int, started_ms: int, latest_ms: int) -> RateKey:
        """As the database has it. Fail closed: whatever a former master handed out just before its
        end counts as begun at started_ms, when this one (of this epoch) started.

        latest_ms: no honest row is closed for longer.
        """
        next_at_ms = min(row.next_at_ms, latest_ms)
        if row.delay_ms and row.epoch != epoch:
            next_at_ms = max(next_at_ms, started_ms + row.delay_ms)
        return cls(
            name=row.rate_key,
            delay_ms=row.delay_ms,
            concurrency=row.concurrency,
            next_at_ms=next_at_ms,
            closed_until_ms=min(row.closed_until_ms, latest_ms),
            job_id=row.job_id,
            recalled_ms=next_at_ms,
        )

    @property
    def has_limits(self) -> bool:
        return bool(self.delay_ms or self.concurrency)

    @property
    def is_delayed(self) -> bool:
        return self.delay_ms > 0

    @property
    def is_used(self) -> bool:
        """Attempts are out, or tasks in memory wait for it in a lane."""
        return bool(self.running or self.lanes)

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

    def row(self, epoch: int = 0, wall_ms: int = 0) -> RateKeyRow:
        return RateKeyRow(
            rate_key=self.name,
            delay_ms=self.delay_ms,
            concurrency=self.concurrency,
            next_at_ms=self.next_at_ms,
            closed_until_ms=self.closed_until_ms,
            job_id=self.job_id,
            epoch=epoch,
            changed_wall=wall_ms,
        )
