"""What sites see: their delays, how many come at once, and that a closed one is left alone."""

from __future__ import annotations

from msgspec import Struct

from tests.simulation.disk import Disk
from tests.simulation.oracle.room import Key, Room
from tests.simulation.oracle.seen import Seen
from tests.simulation.workload import is_limited
from tests.simulation.world import World
from tests.support.history import Arrival, Start
from zmqcluster.messages import TaskOrder
from zmqcluster.model import DeviceId, TaskId


class Closures(Struct):
    """Sites that said "not now", and from which turn on the master knew (and kept) it.

    A closure counts once it is on disk, for what was handed out in its turn or later.
    """

    # (turn, rate key, until): decided, being written, on disk.
    learned: list[tuple[int, str, int]] = []
    writing: list[tuple[int, str, int]] = []
    kept: dict[str, list[tuple[int, int]]] = {}
    decided: dict[Key, int] = {}
    # How often the wall clock had been set when the master last looked at it, and when it did for
    # the clocks that are decided on, being written, on disk.
    steps_seen: int = 0
    steps_read: int = 0
    steps_writing: int = 0
    wall_steps: int = 0

    def begin(self) -> None:
        self.writing, self.learned = self.learned, []
        self.steps_writing = self.steps_read

    def committed(self) -> None:
        for turn, name, until_ms in self.writing:
            self.kept.setdefault(name, []).append((turn, until_ms))
        self.writing = []
        self.wall_steps = self.steps_writing

    def forget_undone(self, wall_steps: int) -> None:
        """A master starts: it knows what is on disk."""
        self.learned, self.writing = [], []
        if wall_steps != self.wall_steps:
            # How long it was away is read off the wall clock, which was set meanwhile.
            self.kept.clear()
        self.steps_seen = self.steps_read = self.steps_writing = self.wall_steps = wall_steps

    def closed_until_ms(self, name: str, key: Key) -> int:
        """Until when the master knew of it when it handed this attempt out."""
        turn = self.decided.get(key, 0)
        closed = [until_ms for at, until_ms in self.kept.get(name, ()) if at <= turn]
        return max(closed, default=0)


class Origin(Struct):
    """What a rate key's site saw. open: attempts whose request may be there."""

    last_ms: int = -(10**9)
    last_by: str = ""
    open: dict[Key, str] = {}


class Sites(Room):
    """By rate key: each is one site."""

    def __init__(self, world: World, disk: Disk, seen: Seen) -> None:
        super().__init__(world, disk)
        self.closures = Closures()
        self._seen = seen
        self._origins: dict[str, Origin] = {}
        # Attempts that were given up and came back, and the turn in which they did.
        self._adopted: dict[Key, int] = {}

    def closed(self, turn: int, told: str) -> None:
        """The master learned that a site said "not now". told: what its event says."""
        name, _, lasts = told.partition(" for ")
        self.closures.learned.append((turn, name, self.world.now_ms + int(lasts.split()[0])))

    def adopted(self, turn: int, key: Key) -> None:
        self._adopted[key] = turn

    def began(self, worker: str, device_id: DeviceId, order: TaskOrder) -> None:
        """Its first request leaves now."""
        now_ms = self.world.now_ms
        self._seen.starts.append(Start(order.task_id, order.attempt, device_id, now_ms))
        row = self.disk.tasks[TaskId(order.task_id)]
        if not is_limited(row.rate_key):
            return
        origin = self._origins.setdefault(row.rate_key, Origin())
        key = (order.task_id, order.attempt)
        options = self.world.options
        closed_ms = self.closures.closed_until_ms(row.rate_key, key)
        if now_ms < closed_ms:
            self.fail(
                f"{row.rate_key} said that it is closed for {closed_ms - now_ms} ms more, and "
                f"{worker} begins {key}, which was handed out since"
            )
        gap_ms = now_ms - origin.last_ms
        if gap_ms < options.delay_ms:
            self.fail(
                f"{row.rate_key} was hit by {worker} (attempt {key}) {gap_ms} ms after "
                f"{origin.last_by}: its delay is {options.delay_ms} ms"
            )
        # Of a worker that was given up, nobody knows whether its requests are still open; if it
        # comes back with them, that was not known of what was handed out before.
        decided = self.closures.decided.get(key, 0)
        still_open = [
            one
            for one in origin.open
            if self._is_believed(one) and self._adopted.get(one, 0) <= decided
        ]
        if options.concurrency and len(still_open) >= options.concurrency:
            self.fail(
                f"{row.rate_key} has {still_open} open, and {worker} begins {key}: "
                f"at most {options.concurrency} at once"
            )
        origin.last_ms, origin.last_by = now_ms, f"{worker} (attempt {key})"
        origin.open[key] = worker
        self._seen.arrivals.append(Arrival(row.rate_key, now_ms))

    def left(self, order: TaskOrder) -> None:
        """Its last request is over, however it ended."""
        row = self.disk.tasks[TaskId(order.task_id)]
        if row.rate_key in self._origins:
            self._origins[row.rate_key].open.pop((order.task_id, order.attempt), None)

    def _is_believed(self, key: Key) -> bool:
        """Does the master believe that this attempt is still out?"""
        row = self.disk.assignments[TaskId(key[0]), key[1]]
        return not row.outcome
