"""TaskScheduler: the loops of one process, each on its own thread, started and stopped together."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from zmqcluster.errors import ClusterError, ConfigError
from zmqcluster.model import SchedulerMode

log = logging.getLogger(__name__)


class Loop(Protocol):
    """What a runtime is to the scheduler. run() ends by itself on trouble, or after stop()."""

    def run(self) -> object: ...
    def stop(self) -> None: ...


class TaskScheduler:
    """Owns `_master_schedule()` and `_worker_schedule()`; which of them run is the mode.

    on_end: called, on the loop's thread, when a loop ends; with its error unless it was stopped.
    """

    def __init__(
        self,
        mode: SchedulerMode,
        *,
        master: Loop | None = None,
        worker: Loop | None = None,
        on_end: Callable[[ClusterError | None], None] = lambda _: None,
    ) -> None:
        needed = {
            "master": (master, mode is not SchedulerMode.WORKER),
            "worker": (worker, mode is not SchedulerMode.MASTER),
        }
        for name, (loop, is_needed) in needed.items():
            if (loop is not None) != is_needed:
                problem = f"mode {mode} {'needs' if is_needed else 'has no'} {name} loop"
                raise ConfigError("mode", problem)
        self.mode = mode
        self._master = master
        self._worker = worker
        self._on_end = on_end
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the loops of this mode. Again: nothing happens."""
        if self._threads:
            return
        if self._master is not None:
            self._spawn(self._master_schedule, "master")
        if self._worker is not None:
            self._spawn(self._worker_schedule, "worker")
        log.info("TaskScheduler started in %s mode", self.mode)

    def stop(self, timeout_s: float | None = None) -> bool:
        """End the loops, the worker's first: its last results still find the master.

        Returns whether all have ended in time. Again, or before start: nothing happens.
        """
        for loop, name in ((self._worker, "worker"), (self._master, "master")):
            for thread in self._threads:
                if loop is not None and thread.name == name:
                    loop.stop()
                    thread.join(timeout_s)
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        return not self._threads

    def _master_schedule(self) -> None:
        """Receive, decide, commit, send, until stopped."""
        assert self._master is not None
        self._run(self._master)

    def _worker_schedule(self) -> None:
        """Pull, run, report, until stopped or drained."""
        assert self._worker is not None
        self._run(self._worker)

    def _run(self, loop: Loop) -> None:
        try:
            loop.run()
        except ClusterError as error:
            self._on_end(error)
        except Exception as error:
            # The top of the process: a bug of ours ends it, with its story in the log.
            log.exception("The %s loop failed", threading.current_thread().name)
            self._on_end(ClusterError(f"internal error: {type(error).__name__}: {error}"))
        else:
            self._on_end(None)

    def _spawn(self, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()
