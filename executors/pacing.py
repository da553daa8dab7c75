"""The time between two requests of one process to one origin.

The master spaces the tasks of an origin over the whole fleet; this spaces the requests within one
task (robots.txt, then the page), and those of tasks that were handed out before the master knew of
the delay. Requests that are never spaced do not take part.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Self

# Beyond this many, origins that nobody waits for are forgotten, oldest first.
ORIGINS_MAX: Final = 10_000

Clock = Callable[[], float]


class Pacer:
    """Lets the requests to each origin leave one by one, for one event loop.

    clock: seconds, monotonic.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._origins: OrderedDict[str, _Origin] = OrderedDict()

    def turn(self, origin: str, delay_s: float) -> Turn:
        """A turn that comes delay_s after the former request to origin has left."""
        return Turn(self._origin(origin), delay_s, self._clock)

    def wait_s(self, origin: str, delay_s: float) -> float:
        """How long a request asked for now would wait, as far as can be known."""
        known = self._origins.get(origin)
        if known is None or not delay_s:
            return 0.0
        return known.turns * delay_s + max(0.0, known.left_at + delay_s - self._clock())

    def _origin(self, name: str) -> _Origin:
        known = self._origins.get(name)
        if known is None:
            known = self._origins[name] = _Origin()
            if len(self._origins) > ORIGINS_MAX:
                self._forget_one()
        else:
            self._origins.move_to_end(name)
        return known

    def _forget_one(self) -> None:
        for name, origin in self._origins.items():
            if not origin.turns:
                del self._origins[name]
                return


class _Origin:
    """left_at: when the last request left. turns: asked for and not yet over."""

    __slots__ = ("left_at", "lock", "turns")

    def __init__(self) -> None:
        self.left_at = float("-inf")
        self.lock = asyncio.Lock()
        self.turns = 0


class Turn:
    """`async with` waits for it; left() hands it on at once, the end of the block at the latest."""

    def __init__(self, origin: _Origin, delay_s: float, clock: Clock) -> None:
        self._origin = origin
        self._delay_s = delay_s
        self._clock = clock
        self._is_over = False

    async def __aenter__(self) -> Self:
        origin = self._origin
        origin.turns += 1
        try:
            await origin.lock.acquire()
        except BaseException:
            origin.turns -= 1
            raise
        try:
            wait_s = origin.left_at + self._delay_s - self._clock()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
        except BaseException:
            self._end()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        self.left()

    def left(self) -> None:
        """The request leaves right now (or never will)."""
        if not self._is_over:
            self._origin.left_at = self._clock()
            self._end()

    def _end(self) -> None:
        self._is_over = True
        self._origin.turns -= 1
        self._origin.lock.release()
