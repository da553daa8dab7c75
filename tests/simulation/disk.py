"""The disk of the simulated master: what was committed, whatever happens to the process."""

from __future__ import annotations

from tests.support.naive_store import NaiveStore
from zmqcluster.core.state import Past


class Disk(NaiveStore):
    """A naive store with the clocks of a machine that may be away for a while."""

    def boot(self, wall_ms: int) -> Past:
        """What a master that starts now is told, with the clock as the services set it."""
        past = self.past()
        away_ms = max(0, wall_ms - self.wall_ms) if self.wall_ms else 0
        past.clock_ms = self.clock_ms + away_ms if self.clock_ms else wall_ms
        return past
