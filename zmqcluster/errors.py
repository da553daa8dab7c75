"""Every error this project raises on purpose, split by whose fault it is."""

from __future__ import annotations


class ClusterError(Exception):
    """Root of the tree: catching it catches nothing that is not ours."""


class ConfigError(ClusterError):
    """The operator's fault: said in one line before anything starts; exit code 2."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key
        self.problem = problem


class StartError(ClusterError):
    """The process cannot start or go on; the message says what to do. Exit code 1."""


class MasterUnreachable(ClusterError):
    """No answer from the master in time. Exit code 3."""


class RequestRefused(ClusterError):
    """The master understood a request and said no.

    code: one of model.RefusalCode; status tells REST and exit codes apart.
    """

    def __init__(self, code: str, problem: str) -> None:
        super().__init__(problem)
        self.code = code
        self.problem = problem


class RemoteProtocolError(ClusterError):
    """A peer's fault: the frame is dropped and counted, and the loop goes on."""


class LocalProtocolError(ClusterError):
    """Our own bug, seen while speaking to a peer: fails the test, stops the process."""


class StorageError(ClusterError):
    """The disk's fault. A failed commit is unknown, not undone: stop and rebuild from disk."""


class InvariantError(ClusterError):
    """Our own bug, seen in the state itself; carries the task's story."""


class TaskRetryable(ClusterError):
    """Raised by a task: not now; try again no sooner than after_ms (0: the usual back-off)."""

    def __init__(self, reason: str, after_ms: int = 0) -> None:
        super().__init__(reason)
        self.after_ms = after_ms


class TaskRejected(ClusterError):
    """Raised by a task: this can never work, so no retry."""
