"""The attempts a worker holds and has not finished: in which order and slots they run."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Final

from msgspec import Struct

from zmqcluster.messages import AttemptRef, Held, TaskOrder
from zmqcluster.model import Outcome, Pool

# Phases of an inventory line (messages.Held), and "no longer held".
QUEUED: Final = 0
RUNNING: Final = 1
DONE: Final = 2
GONE: Final = 3

# Shorter runs are not announced: their result is there before anybody could read it.
ANNOUNCE_AFTER_MS: Final = 50
# Waiting longer than this behind others means the hand-out was misjudged.
WAIT_MS_MAX: Final = 1_000
# The hosts end a run at its deadline; this long after it they are asked again, and so on.
OVERDUE_GRACE_MS: Final = 10_000
# Entries that do not count any more and may lie about in a queue.
SLACK: Final = 1_024


class Work(Struct, gc=False, eq=False):
    """One attempt. since_ms: when it entered its phase. start_by_ms: 0 is "whenever".

    serial: counts arrivals, for order among pools. begun: it has reached what its start window
    guards; its host says so, some time after it got a slot. Without a window both are one.
    kill: what it was asked to end as, if it was. nudge_ms: when an overdue kill is repeated.
    """

    order: TaskOrder
    pool: Pool
    serial: int
    since_ms: int
    phase: int = QUEUED
    start_by_ms: int = 0
    begun: bool = False
    kill: Outcome | None = None
    nudge_ms: int = 0

    @property
    def ref(self) -> AttemptRef:
        return AttemptRef(self.order.task_id, self.order.attempt)


class Lane(Struct, gc=False, eq=False):
    """One pool: its slots and what waits for them, oldest first. waiting: those still QUEUED.

    started: how many began since the last look at who waits too long.
    """

    slots: int
    queue: deque[Work]
    waiting: int = 0
    running: int = 0
    started: int = 0


class WorkQueue:
    """First come, first started, as slots get free; at most one attempt of a task.

    A newer attempt of a task that still runs here waits until the old one's process is gone.
    """

    def __init__(self, slots: dict[Pool, int], running_max: int = 0) -> None:
        self.running = 0
        self._arrivals = 0
        self._running_max = running_max or sum(slots.values())
        self._lanes = {pool: Lane(count, deque()) for pool, count in slots.items()}
        self._is_capped = self._running_max < sum(slots.values())
        # How many tasks can run at once, all pools together.
        self.slots: Final = min(self._running_max, sum(slots.values()))
        self._works: dict[int, Work] = {}
        self._parked: dict[int, Work] = {}
        self._windows: list[tuple[int, int, int]] = []
        self._unannounced: deque[Work] = deque()
        # Runs with a start window, in a slot: those not begun, and those to be told of at once.
        self._starting: dict[int, Work] = {}
        self._at_once: list[AttemptRef] = []

    def __len__(self) -> int:
        return len(self._works) + len(self._parked)

    @property
    def waiting(self) -> int:
        return sum(lane.waiting for lane in self._lanes.values()) + len(self._parked)

    def attempt_of(self, task_id: int) -> int:
        """The newest attempt of this task that is held here; 0: none."""
        work = self._parked.get(task_id) or self._works.get(task_id)
        return work.order.attempt if work else 0

    def find(self, task_id: int, attempt: int) -> Work | None:
        for works in (self._works, self._parked):
            work = works.get(task_id)
            if work is not None and work.order.attempt == attempt:
                return work
        return None

    def add(self, now_ms: int, order: TaskOrder, pool: Pool) -> Work | None:
        """Queue a new attempt; it replaces an older one of its task that has not begun.

        Returns the older attempt that runs and now has to be killed, if there is one.
        """
        start_by_ms = now_ms + order.start_within_ms if order.start_within_ms else 0
        self._arrivals += 1
        work = Work(order, pool, self._arrivals, now_ms, start_by_ms=start_by_ms)
        old = self._works.get(order.task_id)
        is_running = old is not None and old.phase == RUNNING
        if is_running:
            self._parked[order.task_id] = work
        else:
            if old is not None:
                self.drop(old)
            self._enqueue(work)
        if start_by_ms:
            self._watch(start_by_ms, order)
        return old if is_running else None

    def drop(self, work: Work) -> None:
        """Forget a queued attempt."""
        assert work.phase == QUEUED, "what runs has to be killed"
        work.phase = GONE
        if self._parked.get(work.order.task_id) is work:
            del self._parked[work.order.task_id]
            return
        del self._works[work.order.task_id]
        lane = self._lanes[work.pool]
        lane.waiting -= 1
        # What is gone is skipped when its turn comes; behind a slow task that may never be.
        if len(lane.queue) > 2 * lane.waiting + SLACK:
            lane.queue = deque(one for one in lane.queue if one.phase == QUEUED)

    def start(self, now_ms: int) -> list[TaskOrder]:
        """Take as many into slots as there are free ones."""
        orders: list[TaskOrder] = []
        if not self._is_capped:
            for lane in self._lanes.values():
                if lane.waiting:
                    self._start_in(lane, lane.slots - lane.running, now_ms, orders)
            return orders
        while self.running < self._running_max:
            lanes = [one for one in self._lanes.values() if one.waiting and one.running < one.slots]
            if not lanes:
                break
            self._start_in(min(lanes, key=_head_serial), 1, now_ms, orders)
        return orders

    def begin(self, task_id: int, attempt: int) -> None:
        """A run with a start window began in its host. Twice, unknown or ended: nothing."""
        work = self._starting.get(task_id)
        if work is not None and work.order.attempt == attempt:
            del self._starting[task_id]
            work.begun = True
            self._at_once.append(work.ref)

    @property
    def has_starting(self) -> bool:
        return bool(self._starting)

    @property
    def starting(self) -> list[Work]:
        """Runs with a start window that have not begun, as far as their hosts have said."""
        return list(self._starting.values())

    def finish(self, now_ms: int, task_id: int, attempt: int) -> Work | None:
        """A run ended; its slot is free. None: no such run, so nothing happened."""
        work = self._works.get(task_id)
        if work is None or work.phase != RUNNING or work.order.attempt != attempt:
            return None
        del self._works[task_id]
        self._starting.pop(task_id, None)
        work.phase = DONE
        self._lanes[work.pool].running -= 1
        self.running -= 1
        if self._parked:
            successor = self._parked.pop(task_id, None)
            if successor is not None:
                successor.since_ms = now_ms
                self._enqueue(successor)
        return work

    def take_announced(self, now_ms: int, *, is_open: bool) -> list[AttemptRef]:
        """Runs the master should know of by now. is_open: it can be told now.

        While it cannot, only those with a start window are kept for it: the inventory tells of
        what still runs, but these count even when they have ended.
        """
        refs: list[AttemptRef] = []
        if is_open:
            refs, self._at_once = self._at_once, []
        queue = self._unannounced
        while queue and (
            queue[0].phase != RUNNING or queue[0].since_ms + ANNOUNCE_AFTER_MS <= now_ms
        ):
            work = queue.popleft()
            if work.phase == RUNNING:
                refs.append(work.ref)
        return refs

    def take_late(self, now_ms: int, *, all_windows: bool) -> list[AttemptRef]:
        """Drop queued orders whose start window is over; all_windows: whose window is any."""
        refs = []
        heap = self._windows
        while heap and (all_windows or heap[0][0] < now_ms):
            _, task_id, attempt = heappop(heap)
            work = self.find(task_id, attempt)
            if work is not None and work.phase == QUEUED:
                refs.append(work.ref)
                self.drop(work)
        return refs

    def take_queued(self) -> list[AttemptRef]:
        """Drop everything that has not begun."""
        works = [one for one in self._all() if one.phase == QUEUED]
        for work in works:
            self.drop(work)
        return [work.ref for work in works]

    def take_stuck(self, now_ms: int) -> list[AttemptRef]:
        """Drop what has waited long and would wait long again; to be called about once a second.

        As many as began since the last call will begin until the next; one more for each slot is
        a fair stock, and what lies behind these may run sooner elsewhere.
        """
        refs: list[AttemptRef] = []
        for lane in self._lanes.values():
            stock, lane.started = lane.started + lane.slots, 0
            if lane.waiting <= stock:
                continue
            for work in [one for one in lane.queue if one.phase == QUEUED][stock:]:
                if work.since_ms + WAIT_MS_MAX < now_ms:
                    refs.append(work.ref)
                    self.drop(work)
        return refs

    def overdue(self, now_ms: int) -> list[Work]:
        """Runs long past their deadline, or killed long ago, each once a grace period."""
        works = []
        for work in self._works.values():
            if work.phase != RUNNING:
                continue
            if not work.nudge_ms:
                work.nudge_ms = work.since_ms + work.order.timeout_ms + OVERDUE_GRACE_MS
            if work.nudge_ms <= now_ms:
                work.nudge_ms = now_ms + OVERDUE_GRACE_MS
                works.append(work)
        return works

    def inventory(self, now_ms: int) -> Iterator[Held]:
        """A line for each attempt held, running ones first; what has not begun does not run."""
        works = list(self._all())
        for work in works:
            if work.begun:
                order = work.order
                yield Held(order.task_id, order.attempt, RUNNING, now_ms - work.since_ms)
        for work in works:
            if not work.begun:
                yield Held(work.order.task_id, work.order.attempt, QUEUED)

    def window_due_ms(self) -> int | None:
        """When take_late() will have something, as far as known."""
        return self._windows[0][0] + 1 if self._windows else None

    def announce_due_ms(self) -> int | None:
        """When take_announced() will have something, as far as known."""
        return self._unannounced[0].since_ms + ANNOUNCE_AFTER_MS if self._unannounced else None

    def _all(self) -> Iterator[Work]:
        yield from self._works.values()
        yield from self._parked.values()

    def _watch(self, start_by_ms: int, order: TaskOrder) -> None:
        heappush(self._windows, (start_by_ms, order.task_id, order.attempt))
        if len(self._windows) > 2 * len(self) + SLACK:
            self._windows = [one for one in self._windows if self.find(one[1], one[2])]
            heapify(self._windows)

    def _enqueue(self, work: Work) -> None:
        self._works[work.order.task_id] = work
        lane = self._lanes[work.pool]
        lane.queue.append(work)
        lane.waiting += 1

    def _start_in(self, lane: Lane, count: int, now_ms: int, orders: list[TaskOrder]) -> None:
        queue = lane.queue
        while count > 0 and lane.waiting:
            work = queue.popleft()
            if work.phase != QUEUED:
                continue
            work.phase, work.since_ms = RUNNING, now_ms
            lane.waiting -= 1
            lane.running += 1
            lane.started += 1
            self.running += 1
            count -= 1
            if work.start_by_ms:
                self._starting[work.order.task_id] = work
            else:
                work.begun = True
                self._unannounced.append(work)
            orders.append(work.order)


def _head_serial(lane: Lane) -> int:
    while lane.queue[0].phase != QUEUED:
        lane.queue.popleft()
    return lane.queue[0].serial
