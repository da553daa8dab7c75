"""How near this process is to the end of its descriptors, told once each time that changes."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from typing import Final

from zmqcluster.core.events import Noticed

# Counting 10,000 takes 5 ms.
LOOK_MS: Final = 2_000
SCARCE_PCT: Final = 80
# It was scarce until this few are in use: connections that come and go must not fill the log.
ENOUGH_PCT: Final = 70

_WORDS: Final = {
    "descriptors_enough": ("info", "{used} of {limit} descriptors are in use: enough again"),
    "descriptors_scarce": (
        "warning",
        "{used} of {limit} descriptors are in use: soon nobody can connect; raise the limit "
        "(`ulimit -n`, LimitNOFILE=), and see who holds so many connections",
    ),
    "descriptors_gone": (
        "error",
        "all {limit} descriptors are in use: nobody can connect; raise the limit (`ulimit -n`, "
        "LimitNOFILE=), and see who holds so many connections",
    ),
}


class Descriptors:
    """count: how many are in use; raises OSError (EMFILE, ENFILE) when not even that can be found
    out. limit: how many there may be, as of now."""

    def __init__(
        self, count: Callable[[], int] | None = None, limit: Callable[[], int] | None = None
    ) -> None:
        self._count = count or _count
        self._limit = limit or _limit
        self._told = "descriptors_enough"
        self._next_ms = 0

    def look(self, now_ms: int) -> list[Noticed]:
        """What an operator has to know; looks at most each LOOK_MS."""
        if now_ms < self._next_ms:
            return []
        self._next_ms = now_ms + LOOK_MS
        used, limit = self._used(), self._limit()
        kind = self._kind(used, limit)
        if kind == self._told:
            return []
        self._told = kind
        level, words = _WORDS[kind]
        return [Noticed(kind, level, words.format(used=used, limit=limit))]

    def _used(self) -> int:
        try:
            return self._count()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            return self._limit()

    def _kind(self, used: int, limit: int) -> str:
        if used >= limit:
            return "descriptors_gone"
        is_scarce = used * 100 >= limit * SCARCE_PCT
        was_scarce = self._told != "descriptors_enough" and used * 100 > limit * ENOUGH_PCT
        return "descriptors_scarce" if is_scarce or was_scarce else "descriptors_enough"


def _count() -> int:
    return len(os.listdir("/dev/fd")) - 1  # Less the one it takes to look.


def _limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
