"""Commit before send: holds what turns order until what they changed is on disk."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from zmqcluster.core.effects import Action, Changes, Turn


class Pipeline:
    """One batch of changes under way at most; what is decided meanwhile is the next one.

    No timer: a batch is whatever came while the former one was written (natural group commit).
    """

    def __init__(self) -> None:
        self.is_busy = False
        self._batch = Changes()
        self._is_batch_empty = True
        # Actions of decided turns, oldest first, held back until their turn is on disk.
        self._held: deque[tuple[int, list[Action]]] = deque()
        self._committing_turn = 0
        self._safe_turn = 0

    @property
    def size(self) -> int:
        """How many task rows wait for the next commit."""
        return self._batch.size

    @property
    def is_settled(self) -> bool:
        """Everything decided is on disk and was taken."""
        return not (self.is_busy or self._held)

    def add(self, turn: Turn) -> None:
        """A turn was decided."""
        if turn.writes:
            self._batch.add(turn.changes)
            self._is_batch_empty = False
        self._held.append((turn.number, turn.actions))

    def begin(self) -> Changes | None:
        """The batch to write now, the caller's from here on. None: there is nothing to begin."""
        if self.is_busy or not self._held:
            return None
        last_turn = self._held[-1][0]
        if self._is_batch_empty:
            self._safe_turn = last_turn
            return None
        self._committing_turn, self.is_busy = last_turn, True
        batch, self._batch, self._is_batch_empty = self._batch, Changes(), True
        return batch

    def done(self) -> int:
        """The batch under way is on disk; the turn up to which everything is."""
        self._safe_turn, self.is_busy = self._committing_turn, False
        return self._safe_turn

    def take(self) -> Iterator[Action]:
        """Each action whose cause is on disk, once, in the order in which they were decided."""
        while self._held and self._held[0][0] <= self._safe_turn:
            yield from self._held.popleft()[1]
