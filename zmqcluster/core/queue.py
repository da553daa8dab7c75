"""The ready queue: a bounded window of the backlog, fair by rate key within each priority.

Ready tasks lie in lanes, one for each (type, labels, rate key, priority). Tasks of the same type
and labels form a shape: any device that can run one can run all. Within a shape and priority, open
lanes take turns, so a slow or closed key never stands in front of another. A lane holds its first
tasks in memory; the rest stays in the database until there is room (`more`). In a full window those
that cannot run now yield to what can: their lanes fall back on the database, whatever they hold.
Where there are more lanes than may be in memory, one that has long given nothing is given up for
another.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Final

from zmqcluster.core.events import LaneKey
from zmqcluster.core.hunger import Hunger
from zmqcluster.core.lanes import Lane, Shape
from zmqcluster.core.rates import RateKey
from zmqcluster.core.rows import TaskRow
from zmqcluster.model import PRIORITY_MAX, TaskId

# Lanes of delayed keys passed over in one turn for want of a free slot.
_ASIDE_MAX: Final = 32
# A lane that somebody runs may be given up for one that finds no room when it has given nothing for
# this long, and sooner for one of higher priority; not at once, because that one may be closed
# itself.
_REST_MS: Final = 10_000
_REST_FOR_HIGHER_MS: Final = 1_000
# This part of the window is made free when it is full, and kept from what cannot run.
_YIELDED: Final = 8
_SPARE: Final = 4
# So many lanes yield in one turn at most.
_YIELDING_MAX: Final = 1_000


class ReadyQueue:
    """Lanes, shapes and the window's bounds. Every operation is O(1) a task."""

    def __init__(self, window_tasks: int, window_bytes: int, lane_tasks: int, lanes: int) -> None:
        self._window_tasks = window_tasks
        self._window_bytes = window_bytes
        self._lane_tasks = lane_tasks
        self._lanes_max = lanes
        self.lanes: dict[LaneKey, Lane] = {}
        # The same by priority, who gave a task longest ago first. Not dicts: finding the first key
        # walks over all that were deleted before it.
        self._by_rest = tuple(OrderedDict[Lane, None]() for _ in range(PRIORITY_MAX + 1))
        # Lanes that have had more than one task in memory since shed() looked at them.
        self._long: dict[Lane, None] = {}
        self._given_up: list[TaskRow] = []
        self.shapes: dict[tuple[str, str], Shape] = {}
        # Those that may have a task to give; who was served longest ago is first.
        self._awake: dict[Shape, None] = {}
        # The share of one lane in memory, when all are to have some.
        self.lane_quota = lane_tasks
        # Shapes that nobody knows to be awake or asleep yet.
        self._untried: dict[Shape, None] = {}
        # What holds tasks that cannot run now: shapes asleep, lanes whose key was closed when their
        # turn came. Who has been so for longest is first.
        self._idle_shapes: OrderedDict[Shape, None] = OrderedDict()
        self._idle_lanes: OrderedDict[Lane, None] = OrderedDict()
        # Shapes that nobody online runs. Their lanes have no share of the window, and are given up
        # first.
        self._stranded: OrderedDict[Shape, None] = OrderedDict()
        self._stranded_lanes = 0
        # Lanes to be read: those with nothing in memory, then those that run dry.
        self._hunger = Hunger()
        self._hungry: deque[Lane] = deque()
        # What is queued, as it was queued: a lane may hold an older row of the same task, too.
        self._where: dict[TaskId, tuple[Lane, TaskRow]] = {}
        # Lanes that have become empty since the last sweep.
        self._emptied: list[Lane] = []
        self._aside: list[Lane] = []
        self._bytes = 0
        # Tasks that refills under way may bring.
        self._reserved = 0
        # Lanes exist in the database that are not in `lanes`.
        self.unlisted = False
        self._has_missed = False
        # Names of rate keys that lost their last lane.
        self._released: list[str] = []

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, task_id: TaskId) -> bool:
        return task_id in self._where

    @property
    def has_room(self) -> bool:
        # Asked several times a turn: `_room > 0`, without asking it.
        return (
            len(self._where) + self._reserved < self._window_tasks
            and self._bytes < self._window_bytes
        )

    @property
    def _room(self) -> int:
        return self._window_tasks - len(self._where) - self._reserved

    @property
    def _has_spare(self) -> bool:
        """Is there room for what cannot run now?"""
        return (
            self._room > self._window_tasks // _SPARE
            and self._bytes < self._window_bytes - self._window_bytes // _SPARE
        )

    def is_starving(self, now_ms: int) -> bool:
        """Could some lane give a task, if only one of it were in memory?"""
        return self._hunger.able(now_ms) is not None

    @property
    def starving(self) -> int:
        """How many lanes have tasks in the database, perhaps, and none in memory."""
        return len(self._hunger)

    def take_missed(self) -> bool:
        """Has a lane found no room, or been given up, since the last call?"""
        missed, self._has_missed = self._has_missed, False
        return missed

    def take_released(self) -> list[str]:
        """Rate keys that have lost their last lane since the last call."""
        released, self._released = self._released, []
        return released

    @property
    def has_lanes_max(self) -> bool:
        return len(self.lanes) >= self._lanes_max

    def lane(
        self, key: LaneKey, rate: RateKey | None, now_ms: int, *, is_stranded: bool = False
    ) -> Lane | None:
        """The lane of this key, made when there is room for one more; else None.

        Another may be given up for it: take_given_up() follows. is_stranded: nobody online runs its
        tasks, so only one of the same kind.
        """
        lane = self.lanes.get(key)
        if lane is not None:
            return lane
        if self.has_lanes_max:
            self.unlisted = self._has_missed = True
            if not self._give_one_up(key.priority, now_ms, is_stranded=is_stranded):
                return None
        shape = self.shapes.get((key.task_type, key.labels))
        if shape is None:
            shape = self.shapes[key.task_type, key.labels] = Shape(key.task_type, key.labels)
            self._untried[shape] = None
        lane = self.lanes[key] = Lane(key, shape, rate, now_ms)
        self._by_rest[key.priority][lane] = None
        shape.lanes += 1
        self._stranded_lanes += shape.is_stranded
        self._share()
        # Tasks of a lane that was forgotten for want of room may lie in the database.
        lane.more = self.unlisted
        self._note_hunger(lane)
        if rate is not None:
            rate.lanes[lane] = None
        return lane

    def admit(self, task: TaskRow, lane: Lane | None) -> bool:
        """Take a new task into the window, or leave it to the database. True: taken."""
        if lane is None:
            return False
        if lane.more or not self.has_room or lane.count >= self.lane_quota:
            if not lane.more:
                lane.more = True
                lane.cursor = max(lane.cursor, task.task_id - 1)
            lane.spill(task)
            self._note_hunger(lane)
            return False
        self.push(task, lane)
        return True

    def readmit(self, task: TaskRow, lane: Lane) -> bool:
        """As admit(), for a task of any age that was on disk only. True: taken."""
        if self.has_room and lane.count < self.lane_quota:
            self.push(task, lane)
            return True
        lane.more = True
        lane.cursor = min(lane.cursor, task.task_id - 1)
        lane.spill(task)
        self._note_hunger(lane)
        return False

    def push(self, task: TaskRow, lane: Lane, *, first: bool = False) -> None:
        """Queue a task whatever the bounds say: it was in memory, or was read for this lane."""
        if first:
            lane.tasks.appendleft(task)
        else:
            lane.tasks.append(task)
        lane.count += 1
        if lane.count == 2:
            self._long[lane] = None
        self._where[task.task_id] = (lane, task)
        self._bytes += task.memory_bytes
        if lane.is_starving:
            self._hunger.discard(lane)
            self._note_hunger(lane)
        self._rotate_in(lane)

    def remove(self, task: TaskRow) -> None:
        """Forget a queued task; its entry is skipped when it comes up. Unknown is fine."""
        queued = self._where.pop(task.task_id, None)
        if queued is not None:
            lane = queued[0]
            self._forget(task, lane)
            if len(lane.tasks) > 64 + 2 * lane.count:
                self._drop_stale(lane)

    def pop(self, shape: Shape, priority: int, now_ms: int) -> TaskRow | None:
        """The next task of this shape and priority whose rate key is open at now_ms."""
        rotation = shape.rotations.get(priority)
        while rotation:
            lane = rotation[0]
            if not lane.count or (lane.rate is not None and not lane.rate.is_open(now_ms)):
                rotation.popleft()
                lane.rotated = False
                if lane.count:
                    self._idle_lanes[lane] = None
                self._drop_if_idle(lane)
                continue
            task = self._take(lane)
            rotation.rotate(-1)
            return task
        return None

    def set_aside(self, lane: Lane) -> bool:
        """Let the lane that was just popped from wait until take_back_aside(). False: too many.

        Its key wants a free slot where others can be handed out ahead. The bound keeps a turn
        short when a thousand such keys wait for slots.
        """
        if len(self._aside) == _ASIDE_MAX:
            return False
        rotation = lane.shape.rotations[lane.key.priority]
        assert rotation[-1] is lane, "a lane goes to the end when it is popped from"
        rotation.pop()
        lane.rotated = False
        self._aside.append(lane)
        return True

    def take_back_aside(self) -> set[Shape]:
        """The turn is over: lanes set aside take part again, in their old order. Their shapes."""
        aside, self._aside = self._aside, []
        for lane in aside:
            self._rotate_in(lane)
        return {lane.shape for lane in aside}

    def reopen(self, rate: RateKey) -> None:
        """A rate key may have opened: its lanes take part again."""
        for lane in rate.lanes:
            if lane.count:
                self._rotate_in(lane)
            elif lane.is_starving:
                self._hunger.reopen(lane)

    def awake(self) -> list[Shape]:
        """Shapes that may have a task to give, and devices to give it to, in turn."""
        for shape in [one for one in self._awake if not any(one.rotations.values())]:
            del self._awake[shape]
        return list(self._awake)

    def served(self, shape: Shape, priority: int, now_ms: int) -> None:
        """What was just popped found a device: other shapes and lanes are first from now on."""
        lane = shape.rotations[priority][-1]
        lane.gave_ms = now_ms
        self._by_rest[priority].move_to_end(lane)
        self._awake.pop(shape, None)
        self._awake[shape] = None

    def take_untried(self) -> list[Shape]:
        """Shapes that are new, or were woken, since the last call."""
        untried, self._untried = self._untried, {}
        return [one for one in untried if self.shapes.get(one.key) is one]

    def sleep(self, shape: Shape, *, is_stranded: bool) -> None:
        """No device can take any of its tasks until wake(); is_stranded: nor does any run them."""
        self._awake.pop(shape, None)
        self._set_asleep(shape, is_asleep=True, is_stranded=is_stranded)
        self._idle_shapes[shape] = None

    def wake(self, key: tuple[str, str]) -> None:
        """Some device may take tasks of this shape again; unknown is fine."""
        shape = self.shapes.get(key)
        if shape is not None and shape.is_asleep:
            self._set_asleep(shape, is_asleep=False, is_stranded=False)
            self._idle_shapes.pop(shape, None)
            self._awake[shape] = self._untried[shape] = None

    def _set_asleep(self, shape: Shape, *, is_asleep: bool, is_stranded: bool) -> None:
        if is_stranded != shape.is_stranded:
            if is_stranded:
                self._stranded[shape] = None
                self._stranded_lanes += shape.lanes
            else:
                del self._stranded[shape]
                self._stranded_lanes -= shape.lanes
            self._share()
        self._hunger.move(shape, is_asleep=is_asleep, is_stranded=is_stranded)

    def waiting(self, rate: RateKey) -> int:
        """How many tasks in memory wait for this key."""
        return sum(lane.count for lane in rate.lanes)

    def sweep(self) -> None:
        """Drop lanes that have nothing left, so that others find room."""
        for lane in self._emptied:
            self._drop_if_idle(lane)
        self._emptied.clear()

    def refills(self, now_ms: int) -> Iterator[tuple[Lane, int]]:
        """Lanes that should be read from the database now, and how many tasks each may get."""
        while self.has_room and (lane := self._next_to_read(now_ms)) is not None:
            quota = self.lane_quota
            if lane.loading or not lane.more or lane.count > quota // 2:
                continue
            lane.loading = min(quota - lane.count, self._room)
            self._reserved += lane.loading
            lane.spilled_id = 0
            yield lane, lane.loading

    def loaded(self, lane: Lane, last_id: int, *, more: bool) -> None:
        """A refill was read up to last_id; more: the database has others after it."""
        self._reserved -= lane.loading
        lane.loading = 0
        lane.cursor = max(lane.cursor, last_id)
        lane.more = more or lane.spilled_id > 0
        if lane.spilled_id:
            # Whatever is in memory by now is skipped when it is read again.
            lane.cursor = min(lane.cursor, lane.spilled_id - 1)
        self._note_hunger(lane)
        self._drop_if_idle(lane)

    def _next_to_read(self, now_ms: int) -> Lane | None:
        hunger = self._hunger
        # Nearly always: everything is in memory, or is being read.
        if not hunger and not self._hungry:
            return None
        lane = hunger.able(now_ms) or hunger.waiting(now_ms)
        while lane is None and self._hungry:
            dry = self._hungry.popleft()
            dry.is_hungry = False
            # Who is passed over is hungry again when it gives a task; who has none by now is in
            # line among those that starve.
            if not dry.shape.is_stranded and not dry.is_starving:
                return dry
        if lane is None and self._has_spare:
            lane = hunger.idle()
        if lane is not None:
            hunger.took(lane)
        return lane

    def take_given_up(self) -> list[TaskRow]:
        """Tasks left to the database since the last call, with the lanes that were given up."""
        gone, self._given_up = self._given_up, []
        return gone

    def yield_idle(self) -> list[TaskRow]:
        """Make some room: tasks that cannot run now, returned, are left to the database.

        Of who has been idle for longest those of the lowest priority, whatever a lane holds.
        """
        gone: list[TaskRow] = []
        passed: list[Lane] = []
        for _ in range(_YIELDING_MAX):
            if self._has_yielded() or (lane := self._pop_idle()) is None:
                break
            if not lane.loading:
                gone += self._shorten(lane, 0, is_enough=self._has_yielded)
            if lane.count:
                passed.append(lane)
        for lane in passed:
            self._rotate_in(lane)
        return gone

    def _has_yielded(self) -> bool:
        return (
            self._room > self._window_tasks // _YIELDED
            and self._bytes < self._window_bytes - self._window_bytes // _YIELDED
        )

    def _pop_idle(self) -> Lane | None:
        """Take a lane with tasks that cannot run now out of its rotation."""
        while self._idle_shapes:
            shape = next(iter(self._idle_shapes))
            for level in sorted(shape.rotations):
                rotation = shape.rotations[level]
                while rotation:
                    lane = rotation.pop()
                    lane.rotated = False
                    if lane.count:
                        return lane
            del self._idle_shapes[shape]
        return self._idle_lanes.popitem(last=False)[0] if self._idle_lanes else None

    def shed(self, now_ms: int) -> list[TaskRow]:
        """Shorten the longest lanes: their newest tasks, returned, are left to the database.

        When all are short, those that rest fall back on the database.
        """
        self._long = {lane: None for lane in self._long if lane.count > 1}
        lanes = [lane for lane in self._long if not lane.loading]
        if not lanes:
            return self._yield_rested(now_ms)
        longest = max(lane.count for lane in lanes)
        # Beyond its share at once, below it by and by: whatever goes has to be read again.
        fewer = longest - max(1, longest // 8)
        keep = self.lane_quota if longest > self.lane_quota else fewer
        gone: list[TaskRow] = []
        for lane in lanes:
            if lane.count > keep:
                gone += self._shorten(lane, keep, is_enough=_never)
        return gone

    def _yield_rested(self, now_ms: int) -> list[TaskRow]:
        gone: list[TaskRow] = []
        for lanes in self._by_rest:
            for _ in range(min(len(lanes), _YIELDING_MAX)):
                lane = next(iter(lanes), None)
                if lane is None or now_ms - lane.gave_ms < _REST_MS or self._has_yielded():
                    break
                # Passed over until its next turn, though others have given a task since it did.
                lanes.move_to_end(lane)
                if lane.count and not lane.loading:
                    gone += self._shorten(lane, 0, is_enough=self._has_yielded)
        if gone:
            self._hunger.give_others_a_turn()
        return gone

    def _shorten(self, lane: Lane, keep: int, *, is_enough: Callable[[], bool]) -> list[TaskRow]:
        gone: list[TaskRow] = []
        lane.more = True
        while lane.count > keep and not is_enough():
            task = lane.tasks.pop()
            if self._is_live(task):
                del self._where[task.task_id]
                gone.append(task)
                self._forget(task, lane)
        # Whatever stays in memory is skipped when it is read again.
        lane.cursor = min((lane.cursor, *(task.task_id - 1 for task in gone)))
        return gone

    def _give_one_up(self, priority: int, now_ms: int, *, is_stranded: bool) -> bool:
        """Forget a lane for one of this priority. False: there is none to forget."""
        lane = None if is_stranded else self._stranded_lane()
        lane = lane or self._rested_lane(priority, now_ms)
        if lane is None or (is_stranded and not lane.shape.is_stranded):
            return False
        for task in lane.tasks:
            if self._is_live(task):
                del self._where[task.task_id]
                self._bytes -= task.memory_bytes
                self._given_up.append(task)
        lane.tasks.clear()
        lane.count, lane.more = 0, False
        self._hunger.discard(lane)
        self._idle_lanes.pop(lane, None)
        self._drop_if_idle(lane)
        return True

    def _stranded_lane(self) -> Lane | None:
        """One that nobody online runs, of the lowest priority of its shape."""
        for shape in self._stranded:
            for level in sorted({*shape.starving, *shape.rotations}):
                if level in shape.starving:
                    return shape.first_starving(level)
                rotation = shape.rotations[level]
                while rotation and not rotation[-1].count:
                    rotation.pop().rotated = False
                if rotation and not rotation[-1].loading:
                    return rotation[-1]
            # Its lanes are being read, or their keys are closed: the next time another is first.
            self._stranded.move_to_end(shape)
            return None
        return None

    def _rested_lane(self, priority: int, now_ms: int) -> Lane | None:
        for level, lanes in enumerate(self._by_rest):
            lane = next(iter(lanes), None)
            rest_ms = _REST_FOR_HIGHER_MS if level < priority else _REST_MS
            if lane is None or now_ms - lane.gave_ms < rest_ms:
                continue
            if not lane.loading:
                return lane
            lanes.move_to_end(lane)
        return None

    def _take(self, lane: Lane) -> TaskRow:
        while True:
            task = lane.tasks.popleft()
            # A stale entry is one whose task was removed (and perhaps queued again elsewhere).
            if self._is_live(task):
                del self._where[task.task_id]
                self._forget(task, lane)
                return task

    def _is_live(self, task: TaskRow) -> bool:
        queued = self._where.get(task.task_id)
        return queued is not None and queued[1] is task

    def _forget(self, task: TaskRow, lane: Lane) -> None:
        lane.count -= 1
        self._bytes -= task.memory_bytes
        if not lane.count:
            lane.tasks.clear()
            self._emptied.append(lane)
            self._idle_lanes.pop(lane, None)
        self._note_hunger(lane)

    def _note_hunger(self, lane: Lane) -> None:
        if not lane.more or lane.loading:
            return
        if not lane.count:
            if not lane.is_starving:
                self._hunger.add(lane)
        elif not lane.is_hungry and lane.count <= self.lane_quota // 2:
            lane.is_hungry = True
            self._hungry.append(lane)

    def _share(self) -> None:
        fair = self._window_tasks // (len(self.lanes) - self._stranded_lanes + 1)
        self.lane_quota = max(1, min(self._lane_tasks, fair))

    def _drop_stale(self, lane: Lane) -> None:
        """Tasks taken out from the middle leave entries behind; many of them are too many."""
        live = {one.task_id: one for one in lane.tasks if self._is_live(one)}
        lane.tasks = deque(live.values())

    def _rotate_in(self, lane: Lane) -> None:
        if not lane.rotated:
            lane.rotated = True
            self._idle_lanes.pop(lane, None)
            shape = lane.shape
            rotation = shape.rotations.get(lane.key.priority)
            if rotation is None:
                rotation = shape.rotations[lane.key.priority] = deque()
            rotation.append(lane)
            if shape.is_asleep:
                self._idle_shapes.setdefault(shape)
            else:
                self._awake[shape] = None

    def _drop_if_idle(self, lane: Lane) -> None:
        if lane.count or lane.more or lane.loading or self.lanes.get(lane.key) is not lane:
            return
        del self.lanes[lane.key]
        del self._by_rest[lane.key.priority][lane]
        self._long.pop(lane, None)
        if lane.rate is not None:
            del lane.rate.lanes[lane]
            if not lane.rate.lanes:
                self._released.append(lane.rate.name)
        lane.shape.lanes -= 1
        self._stranded_lanes -= lane.shape.is_stranded
        self._share()
        if not lane.shape.lanes:
            del self.shapes[lane.shape.key]
            self._awake.pop(lane.shape, None)
            self._idle_shapes.pop(lane.shape, None)
            self._stranded.pop(lane.shape, None)
        elif lane.rotated:
            self._note_gone(lane.shape)

    @staticmethod
    def _note_gone(shape: Shape) -> None:
        """A dropped lane is skipped when it comes up; many of them are too many."""
        shape.gone += 1
        if shape.gone > 64 + shape.lanes:
            shape.gone = 0
            for rotation in shape.rotations.values():
                lanes = list(rotation)
                rotation.clear()
                rotation.extend(lane for lane in lanes if lane.count)
                for lane in lanes:
                    lane.rotated = lane.count > 0


def _never() -> bool:
    return False
