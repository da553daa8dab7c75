"""The only file that reads a clock: cluster time for every decision, wall time for people."""

from __future__ import annotations

import time
from typing import Final, Protocol

# CLOCK_MONOTONIC stands still while a machine sleeps, so a laptop that wakes after an hour would
# believe its leases; CLOCK_BOOTTIME counts the sleep. macOS's monotonic clock is the best there is.
_STEADY_CLOCK: Final[int] = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Clock(Protocol):
    """Where a runtime gets its time from."""

    def monotonic_ms(self) -> int:
        """Milliseconds since some fixed moment before this process; never steps back."""

    def wall_ms(self) -> int:
        """Milliseconds since 1970 in UTC, as the operator's clock has it; may step."""


class SystemClock:
    """The clocks of this machine."""

    def monotonic_ms(self) -> int:
        return time.clock_gettime_ns(_STEADY_CLOCK) // 1_000_000

    def wall_ms(self) -> int:
        return time.time_ns() // 1_000_000


class ManualClock:
    """A clock for tests: it moves when told to."""

    def __init__(self, monotonic_ms: int = 1_000_000, wall_ms: int = 1_700_000_000_000) -> None:
        self._monotonic_ms = monotonic_ms
        self._wall_ms = wall_ms

    def monotonic_ms(self) -> int:
        return self._monotonic_ms

    def wall_ms(self) -> int:
        return self._wall_ms

    def advance(self, ms: int) -> None:
        """Let ms pass on both clocks."""
        assert ms >= 0, "cluster time never steps back"
        self._monotonic_ms += ms
        self._wall_ms += ms

    def step_wall(self, ms: int) -> None:
        """Set the wall clock forward or back, as an operator or NTP does."""
        self._wall_ms += ms
