"""Tasks that wait for a moment: the soonest in memory, the rest in the database.

Everything due before `horizon_ms` is in memory; what is due later may be in the database only.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from zmqcluster.model import TaskId

_NEVER_MS = 2**62


class Delays:
    """A bounded heap of (due, task). Due instants are cluster time, ms."""

    def __init__(self, tasks_max: int) -> None:
        self._max = tasks_max
        self._heap: list[tuple[int, TaskId]] = []
        self._due: dict[TaskId, int] = {}
        self._evicted: list[TaskId] = []
        self.horizon_ms = _NEVER_MS
        self._is_loading = False
        # The soonest that went to the database since the read under way was asked for.
        self._spilled_ms = _NEVER_MS

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, task_id: TaskId) -> bool:
        return task_id in self._due

    def add(self, task_id: TaskId, due_ms: int) -> bool:
        """Keep task_id until due_ms. False: it is due beyond the horizon, the database has it."""
        if due_ms >= self.horizon_ms:
            self._spilled_ms = min(self._spilled_ms, due_ms)
            return False
        self._due[task_id] = due_ms
        heappush(self._heap, (due_ms, task_id))
        if len(self._due) > self._max:
            self._evict()
        return task_id in self._due

    def take_evicted(self) -> list[TaskId]:
        """Tasks that had to leave memory for sooner ones since the last call."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def remove(self, task_id: TaskId) -> None:
        """Forget task_id; unknown is fine."""
        self._due.pop(task_id, None)
        if len(self._heap) > 64 + 2 * len(self._due):
            self._heap = [entry for entry in self._heap if self._due.get(entry[1]) == entry[0]]
            heapify(self._heap)

    def pop_due(self, now_ms: int) -> TaskId | None:
        """The next task whose moment has come, or None."""
        heap = self._heap
        while heap and heap[0][0] <= now_ms:
            due_ms, task_id = heappop(heap)
            if self._due.get(task_id) == due_ms:
                del self._due[task_id]
                return task_id
        return None

    def next_ms(self, now_ms: int) -> int | None:
        """When something falls due, or the database must be asked; None: never, as far as known.

        Once the database must be asked, that waits for room or an answer, and not for time.
        """
        heap = self._heap
        while heap and self._due.get(heap[0][1]) != heap[0][0]:
            heappop(heap)
        soonest = heap[0][0] if heap else _NEVER_MS
        if self.horizon_ms > now_ms:
            soonest = min(soonest, self.horizon_ms)
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
        entries = sorted((due, task_id) for task_id, due in self._due.items())
        keep = len(entries) // 2
        # A horizon in the middle of equal moments would split them: whole moments stay out.
        self.reached(entries[keep][0])
        kept = [entry for entry in entries[:keep] if entry[0] < self.horizon_ms]
        gone = entries[len(kept) :]
        self._heap = kept
        self._due = {task_id: due for due, task_id in kept}
        self._evicted.extend(task_id for _, task_id in gone)
