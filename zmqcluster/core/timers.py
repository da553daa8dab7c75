"""Named moments in the future: set, moved and forgotten in O(log n)."""

from __future__ import annotations

from heapq import heapify, heappop, heappush


class Timers:
    """One deadline a name; setting it again moves it. Cluster time, ms."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, str]] = []
        self._due: dict[str, tuple[int, int]] = {}
        self._serial = 0

    def set(self, name: str, at_ms: int) -> None:
        """Fire name at at_ms, and at no earlier moment set before."""
        self._serial += 1
        self._due[name] = (at_ms, self._serial)
        heappush(self._heap, (at_ms, self._serial, name))
        if len(self._heap) > 64 + 2 * len(self._due):
            # Moments that were moved or cancelled may lie a day ahead.
            self._heap = [one for one in self._heap if self._due.get(one[2]) == one[:2]]
            heapify(self._heap)

    def set_no_later(self, name: str, at_ms: int) -> None:
        """Like set, but an earlier moment already set stays."""
        due = self._due.get(name)
        if due is None or at_ms < due[0]:
            self.set(name, at_ms)

    def cancel(self, name: str) -> None:
        """Forget name; unknown names are fine."""
        self._due.pop(name, None)

    def pop_due(self, now_ms: int) -> str | None:
        """The next name whose moment has come, or None."""
        if not self._heap or self._heap[0][0] > now_ms:
            return None
        self._drop_moved()
        if not self._heap or self._heap[0][0] > now_ms:
            return None
        name = heappop(self._heap)[2]
        del self._due[name]
        return name

    def next_ms(self) -> int | None:
        """When the next one fires, or None."""
        self._drop_moved()
        return self._heap[0][0] if self._heap else None

    def _drop_moved(self) -> None:
        heap = self._heap
        while heap and self._due.get(heap[0][2]) != heap[0][:2]:
            heappop(heap)
