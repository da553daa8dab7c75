"""Which lane is read next: those with tasks in the database and none in memory.

What can run goes first, by priority; then what waits for a busy device, as a device is soon free;
and into spare room what nobody online runs and what has a closed key. So however many lanes cannot
give a task, and whatever their priority, none that can waits for them.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, TypeVar

from zmqcluster.model import PRIORITY_MAX

if TYPE_CHECKING:
    from zmqcluster.core.lanes import Lane, Shape

    # By priority.
    Shapes = tuple[OrderedDict[Shape, None], ...]

T = TypeVar("T")


class Hunger:
    """Starving lanes. Those of one shape and priority are in its `starving`, first come first."""

    def __init__(self) -> None:
        self._awake: Shapes = _levels()
        self._asleep: Shapes = _levels()
        self._stranded: Shapes = _levels()
        # Lanes whose key was closed when their turn came, until it reopens.
        self._shut: tuple[OrderedDict[Lane, None], ...] = _levels()
        # Where the search begins, for one read; and where it began the last time it was not at the
        # top.
        self._first = PRIORITY_MAX
        self._turn = 0
        self._count = 0

    def __len__(self) -> int:
        """How many lanes starve."""
        return self._count

    def add(self, lane: Lane) -> None:
        """It has nothing in memory from now on."""
        shape, level = lane.shape, lane.key.priority
        lane.is_starving = True
        self._count += 1
        shape.starving.setdefault(level, OrderedDict())[lane] = None
        self._of(shape)[level][shape] = None

    def discard(self, lane: Lane) -> None:
        """It is read, has a task again, or is gone; one that does not starve is fine."""
        if not lane.is_starving:
            return
        lane.is_starving = False
        self._count -= 1
        self._leave_line(lane)

    def reopen(self, lane: Lane) -> None:
        """Its key may be open again."""
        if lane in self._shut[lane.key.priority]:
            self.discard(lane)
            self.add(lane)

    def move(self, shape: Shape, *, is_asleep: bool, is_stranded: bool) -> None:
        """The shape falls asleep or wakes up, and all its lanes with it."""
        former = self._of(shape)
        shape.is_asleep, shape.is_stranded = is_asleep, is_stranded
        for level in shape.starving:
            del former[level][shape]
            self._of(shape)[level][shape] = None

    def able(self, now_ms: int) -> Lane | None:
        """The next one that can give a task once it is read, as far as one knows."""
        return self._next(self._awake, now_ms)

    def waiting(self, now_ms: int) -> Lane | None:
        """The next one that can give a task once a device is free."""
        return self._next(self._asleep, now_ms)

    def idle(self) -> Lane | None:
        """The next one of those that cannot."""
        for level in range(PRIORITY_MAX, -1, -1):
            for shape in self._stranded[level]:
                return shape.first_starving(level)
            for lane in self._shut[level]:
                return lane
        return None

    def give_others_a_turn(self) -> None:
        """The next read is for another priority: what was read before has turned out not to run."""
        self._turn = self._first = (self._turn or PRIORITY_MAX + 1) - 1

    def took(self, lane: Lane) -> None:
        """It is read: the other shapes of its priority are first from now on."""
        self.discard(lane)
        self._first = PRIORITY_MAX
        shapes, shape = self._of(lane.shape)[lane.key.priority], lane.shape
        if shape in shapes:
            shapes.move_to_end(shape)

    def _next(self, levels: Shapes, now_ms: int) -> Lane | None:
        for level in (*range(self._first, -1, -1), *range(PRIORITY_MAX, self._first, -1)):
            while levels[level]:
                shape: Shape = next(iter(levels[level]))
                lane = shape.first_starving(level)
                if lane.rate is None or lane.rate.is_open(now_ms):
                    return lane
                self._leave_line(lane)
                self._shut[level][lane] = None
        return None

    def _leave_line(self, lane: Lane) -> None:
        level = lane.key.priority
        if lane in self._shut[level]:
            del self._shut[level][lane]
            return
        shape = lane.shape
        del shape.starving[level][lane]
        if not shape.starving[level]:
            del shape.starving[level]
            del self._of(shape)[level][shape]

    def _of(self, shape: Shape) -> Shapes:
        if shape.is_stranded:
            return self._stranded
        return self._asleep if shape.is_asleep else self._awake


def _levels() -> tuple[OrderedDict[T, None], ...]:
    # Not dicts: finding the first key walks over all that were deleted before it.
    return tuple(OrderedDict() for _ in range(PRIORITY_MAX + 1))
