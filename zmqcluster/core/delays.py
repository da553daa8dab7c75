"""Tasks that wait for a moment: the soonest in memory, the rest in the database.

Everything due before `horizon_ms` is in memory; what is due later may be in the database only.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from zmqcluster.core.rows import TaskRow
from zmqcluster.model import TaskId

_NEVER_MS = 2**62


class Delays:
    """A heap of (due, task), bounded by count and bytes. Due instants are cluster time, ms."""

    def __init__(self, tasks_max: int, bytes_max: int) -> None:
        self._tasks_max = tasks_max
        self._bytes_max = bytes_max
        self._heap: list[tuple[int, TaskId]] = []
        self._waiting: dict[TaskId, tuple[int, TaskRow]] = {}
        self._bytes = 0
        # How many tasks wait here, by rate key, and the keys of which none does any more.
        self._by_key: dict[str, int] = {}
        self._released: list[str] = []
        self._evicted: list[TaskRow] = []
        self.horizon_ms = _NEVER_MS
        self._is_loading = False
        # The soonest that went to the database since the read under way was asked for.
        self._spilled_ms = _NEVER_MS

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, task_id: TaskId) -> bool:
        return task_id in self._waiting

    def has_key(self, rate_key: str) -> bool:
        """Does any task in here have this rate key?"""
        return rate_key in self._by_key

    def add(self, task: TaskRow, due_ms: int) -> bool:
        """Keep task until due_ms. False: it is due beyond the horizon, the database has it."""
        if due_ms >= self.horizon_ms:
            self._spilled_ms = min(self._spilled_ms, due_ms)
            return False
        self._keep(task, due_ms)
        heappush(self._heap, (due_ms, task.task_id))
        if len(self._waiting) > self._tasks_max or self._bytes > self._bytes_max:
            self._evict()
        return task.task_id in self._waiting

    def take_evicted(self) -> list[TaskRow]:
        """Tasks that had to leave memory for sooner ones since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def take_released(self) -> list[str]:
        """Rate keys whose last task has left since the last call."""
        released, self._released = self._released, []
        return released

    def remove(self, task_id: TaskId) -> None:
        """Forget task_id; unknown is fine."""
        if task_id in self._waiting:
            self._drop(task_id)
        if len(self._heap) > 64 + 2 * len(self._waiting):
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapify(self._heap)

    def pop_due(self) -> TaskRow:
        """The next task, if is_due()."""
        return self._drop(heappop(self._heap)[1])

    def is_due(self, now_ms: int) -> bool:
        """Has the moment of any task in here come?"""
        if not self._heap or self._heap[0][0] > now_ms:
            return False
        self._drop_moved()
        return bool(self._heap) and self._heap[0][0] <= now_ms

    def next_ms(self, now_ms: int) -> int | None:
        """When something falls due, or the database must be asked; None: never, as far as known.

        What is due already waits for room, and the database for room or an answer: not for time.
        """
        self._drop_moved()
        soonest = self._heap[0][0] if self._heap else _NEVER_MS
        if soonest <= now_ms:
            return None
        if now_ms < self.horizon_ms < soonest:
            soonest = self.horizon_ms
        return None if soonest == _NEVER_MS else soonest

    def needs_load(self, now_ms: int) -> bool:
        return not self._is_loading and now_ms >= self.horizon_ms

    def asked(self) -> None:
        """The database is being read."""
        self._is_loading = True
        self._spilled_ms = _NEVER_MS

    def loaded(self) -> None:
        """The read has come, and what it brought is added next; see reached()."""
        self._is_loading = False
        self.horizon_ms = self._spilled_ms

    def reached(self, until_ms: int) -> None:
        """The database may have others that are due from until_ms on."""
        self.horizon_ms = min(self.horizon_ms, until_ms)
        self._spilled_ms = min(self._spilled_ms, until_ms)

    def _evict(self) -> None:
        """Keep the sooner half, so that a burst costs one sort and not one a task."""
        entries = sorted((due, task_id) for task_id, (due, _) in self._waiting.items())
        count = bytes_kept = 0
        for _, task_id in entries[: len(entries) // 2]:
            bytes_kept += self._waiting[task_id][1].memory_bytes
            if bytes_kept > self._bytes_max // 2:
                break
            count += 1
        # A horizon in the middle of equal moments would split them: whole moments stay out.
        self.reached(entries[count][0])
        self._heap = [entry for entry in entries[:count] if entry[0] < self.horizon_ms]
        self._evicted += [self._drop(task_id) for _, task_id in entries[len(self._heap) :]]

    def _keep(self, task: TaskRow, due_ms: int) -> None:
        if task.task_id in self._waiting:
            self._drop(task.task_id)
        self._waiting[task.task_id] = (due_ms, task)
        self._bytes += task.memory_bytes
        if task.rate_key:
            self._by_key[task.rate_key] = self._by_key.get(task.rate_key, 0) + 1

    def _drop(self, task_id: TaskId) -> TaskRow:
        _, task = self._waiting.pop(task_id)
        self._bytes -= task.memory_bytes
        if task.rate_key:
            self._by_key[task.rate_key] -= 1
            if not self._by_key[task.rate_key]:
                del self._by_key[task.rate_key]
                self._released.append(task.rate_key)
        return task

    def _is_live(self, entry: tuple[int, TaskId]) -> bool:
        waiting = self._waiting.get(entry[1])
        return waiting is not None and waiting[0] == entry[0]

    def _drop_moved(self) -> None:
        heap = self._heap
        while heap and not self._is_live(heap[0]):
            heappop(heap)
