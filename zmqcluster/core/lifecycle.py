"""The life of a task as a table, and what a failure costs it.

The table is the specification: a pair that is missing is a bug of ours, and raises with the story
of the task. Nothing else in the core assigns to `task.state`.
"""

from __future__ import annotations

from enum import StrEnum
from random import Random
from typing import Final

from zmqcluster.core.rows import TaskRow
from zmqcluster.errors import InvariantError
from zmqcluster.model import DEATHS_MAX, Outcome, TaskState


class TaskCause(StrEnum):
    """Why a task changes state."""

    DISPATCHED = "dispatched"
    STARTED = "started"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    RETRIED = "retried"
    LOST = "lost"
    RETURNED = "returned"
    POISONED = "poisoned"
    CANCELLED = "cancelled"
    ADOPTED = "adopted"
    REVIVED = "revived"


_S = TaskState
_C = TaskCause

TASK_TRANSITIONS: Final[dict[tuple[TaskState, TaskCause], TaskState]] = {
    (_S.PENDING, _C.DISPATCHED): _S.ASSIGNED,
    (_S.PENDING, _C.CANCELLED): _S.CANCELLED,
    # A device we gave up on comes back with the attempt nobody has superseded: it goes on.
    (_S.PENDING, _C.ADOPTED): _S.RUNNING,
    # ... or with its end: salvaged, not thrown away.
    (_S.PENDING, _C.SUCCEEDED): _S.COMPLETED,
    (_S.PENDING, _C.FAILED): _S.FAILED,
    (_S.PENDING, _C.POISONED): _S.DEAD,
    (_S.ASSIGNED, _C.STARTED): _S.RUNNING,
    # Short tasks end before anybody says that they began.
    (_S.ASSIGNED, _C.SUCCEEDED): _S.COMPLETED,
    (_S.ASSIGNED, _C.FAILED): _S.FAILED,
    (_S.ASSIGNED, _C.RETRIED): _S.PENDING,
    (_S.ASSIGNED, _C.LOST): _S.PENDING,
    (_S.ASSIGNED, _C.RETURNED): _S.PENDING,
    (_S.ASSIGNED, _C.POISONED): _S.DEAD,
    (_S.ASSIGNED, _C.CANCELLED): _S.CANCELLED,
    (_S.RUNNING, _C.SUCCEEDED): _S.COMPLETED,
    (_S.RUNNING, _C.FAILED): _S.FAILED,
    (_S.RUNNING, _C.RETRIED): _S.PENDING,
    # A busy device can die too, and its task is the one we most want back.
    (_S.RUNNING, _C.LOST): _S.PENDING,
    (_S.RUNNING, _C.RETURNED): _S.PENDING,
    (_S.RUNNING, _C.POISONED): _S.DEAD,
    (_S.RUNNING, _C.CANCELLED): _S.CANCELLED,
    # Terminal states absorb whatever the cluster does; only a person's order revives a task.
    (_S.FAILED, _C.REVIVED): _S.PENDING,
    (_S.CANCELLED, _C.REVIVED): _S.PENDING,
    (_S.DEAD, _C.REVIVED): _S.PENDING,
}

BACKOFF_FIRST_MS: Final = 1_000
BACKOFF_MAX_MS: Final = 300_000


def advance(task: TaskRow, cause: TaskCause) -> None:
    """Move task along the table, or stop the process with its story."""
    try:
        task.state = TASK_TRANSITIONS[task.state, cause]
    except KeyError:
        raise InvariantError(
            f"task {task.task_id} cannot go from {task.state} by {cause}: attempt {task.attempt}, "
            f"{task.failures} failures, {task.deaths} deaths, last held by {task.device_id!r}"
        ) from None


def backoff_ms(failures: int, rng: Random) -> int:
    """How long the next try waits: exponential, with the upper half random ("equal jitter").

    failures: how often it has failed so far, at least 1.
    """
    whole = min(BACKOFF_MAX_MS, BACKOFF_FIRST_MS << min(failures - 1, 20))
    return whole // 2 + rng.randrange(whole // 2 + 1)


def cause_of(task: TaskRow, outcome: Outcome) -> TaskCause:
    """What an attempt's end means for its task, whose failures and deaths count it already."""
    if task.cancel_requested:
        return TaskCause.CANCELLED
    match outcome:
        case Outcome.COMPLETED:
            return TaskCause.SUCCEEDED
        case Outcome.REJECTED:
            return TaskCause.FAILED
        case Outcome.FAILED | Outcome.RETRY | Outcome.TIMED_OUT:
            is_last = task.failures > task.max_retry_count
            return TaskCause.FAILED if is_last else TaskCause.RETRIED
        case Outcome.DIED | Outcome.DEVICE_LOST:
            return TaskCause.POISONED if task.deaths >= DEATHS_MAX else TaskCause.LOST
        case _:
            return TaskCause.RETURNED
