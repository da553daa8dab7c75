"""Natural group commit: one writer thread, and the next batch is what came meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from zmqcluster.core.effects import Changes
from zmqcluster.errors import ClusterError, StorageError

# Writes one batch; says whether its step of pruning left anything for another.
Apply = Callable[[Changes], bool]


class Journal:
    """Commits one batch at a time on its own thread.

    apply: writes one Changes durably, or raises StorageError; called on that thread only.
    on_done: called there after each batch; must be quick and thread-safe.
    """

    def __init__(self, apply: Apply, on_done: Callable[[], None]) -> None:
        self._apply = apply
        self._on_done = on_done
        self._work: SimpleQueue[Changes | None] = SimpleQueue()
        self._done: SimpleQueue[ClusterError | None] = SimpleQueue()
        # What apply returned last.
        self.prune_more = False
        self._busy = False
        self._thread = threading.Thread(target=self._write, name="journal", daemon=True)
        self._thread.start()

    def commit(self, changes: Changes) -> None:
        """Begin to write a batch. The caller changes nothing in it any more."""
        assert not self._busy, "one batch at a time"
        self._busy = True
        self._work.put(changes)

    def take_done(self) -> bool:
        """True once for each batch that is on disk.

        Raises StorageError when it may not be: then nobody knows, and the process must end.
        """
        if not self._busy or self._done.empty():
            return False
        error = self._done.get()
        self._busy = False
        if error is not None:
            raise error
        return True

    def close(self) -> None:
        """Wait for the batch under way, and end the thread."""
        self._work.put(None)
        self._thread.join()

    def _write(self) -> None:
        while (changes := self._work.get()) is not None:
            try:
                self.prune_more = self._apply(changes)
            except ClusterError as error:
                self._done.put(error)
            except Exception as error:  # noqa: BLE001  # top of a thread: it must not die silently
                self._done.put(StorageError(f"cannot save: {type(error).__name__}: {error}"))
            else:
                self._done.put(None)
            self._on_done()
