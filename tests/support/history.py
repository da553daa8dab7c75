"""What clients, workers and origins saw, and whether a cluster that did it kept its promises.

One checker for simulated and real clusters. A request is `ok` (answered), `fail` (refused: nothing
may have come of it) or `unknown` (no answer: it may have been carried out, once, or not at all), as
in Jepsen's histories. Whatever is `unknown` may be true or not; whatever is `ok` must be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from itertools import pairwise

from msgspec import Struct, field

TERMINAL = frozenset({"completed", "failed", "cancelled", "dead"})


class Answer(StrEnum):
    """What became of a request, as its client knows."""

    OK = "ok"
    FAIL = "fail"
    UNKNOWN = "unknown"


class Submission(Struct, frozen=True):
    """A batch somebody asked for. unique_keys: one a task, "" for none; task_ids: when OK."""

    answer: Answer
    unique_keys: tuple[str, ...]
    task_ids: tuple[int, ...] = ()
    job_id: int = 0


class Cancel(Struct, frozen=True):
    """A cancel. task_ids: those the master said it changed, when OK; all asked for otherwise."""

    answer: Answer
    task_ids: tuple[int, ...]


class Start(Struct, frozen=True):
    """A run really began, as its own process tells."""

    task_id: int
    attempt: int
    worker: str = ""


class Arrival(Struct, frozen=True):
    """A request reached an origin. at_ms: the origin's clock."""

    origin: str
    at_ms: float


class History(Struct):
    """Everything that was seen from outside."""

    submissions: list[Submission] = field(default_factory=list)
    cancels: list[Cancel] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    arrivals: list[Arrival] = field(default_factory=list)


class FinalTask(Struct, frozen=True):
    """A task as it is in the end. parent_id: 0 for one that a client submitted."""

    state: str
    attempt: int
    job_id: int = 0
    parent_id: int = 0
    unique_key: str = ""


class Final(Struct):
    """What is on disk in the end. attempts: (task, attempt) -> outcome, "" while it is open."""

    tasks: dict[int, FinalTask]
    attempts: dict[tuple[int, int], str]


def problems(
    history: History,
    final: Final,
    *,
    is_at_rest: bool = True,
    delays_ms: dict[str, float] | None = None,
) -> list[str]:
    """Every broken promise, in words; empty when all were kept.

    is_at_rest: everything had the time to end. delays_ms: least time between two arrivals at an
    origin, tolerance taken off.
    """
    found = [*_lost(history, final), *_twice(history, final), *_keys(final), *_ends(history, final)]
    found += _cancelled(history, final)
    found += _impolite(history, delays_ms or {})
    if is_at_rest:
        found += [
            f"task {task_id} is still {task.state}"
            for task_id, task in final.tasks.items()
            if task.state not in TERMINAL
        ]
    return found


def _lost(history: History, final: Final) -> Iterator[str]:
    """Acknowledged tasks exist; tasks nobody asked for do not."""
    wanted = 0
    keyed: set[str] = set()
    for one in history.submissions:
        if one.answer is Answer.FAIL:
            continue
        keyed.update(filter(None, one.unique_keys))
        wanted += sum(not key for key in one.unique_keys)
        for task_id in one.task_ids:
            if task_id not in final.tasks:
                yield f"task {task_id} was acknowledged and is gone"
    submitted = [task for task in final.tasks.values() if not task.parent_id]
    unkeyed = sum(not task.unique_key for task in submitted)
    if unkeyed > wanted:
        yield f"{unkeyed} tasks without a key exist, at most {wanted} were asked for"
    for task in submitted:
        if task.unique_key and task.unique_key not in keyed:
            yield f"a task with key {task.unique_key!r} exists, which nobody asked for"
    for task_id, task in final.tasks.items():
        if task.parent_id and final.tasks[task.parent_id].state != "completed":
            yield f"task {task_id} is a child of task {task.parent_id}, which did not complete"


def _twice(history: History, final: Final) -> Iterator[str]:
    """No receipt names another's task, no attempt begins twice."""
    receipts: Counter[int] = Counter()
    for one in history.submissions:
        for key, task_id in zip(one.unique_keys, one.task_ids, strict=False):
            receipts[task_id] += not key
    for task_id, count in receipts.items():
        if count > 1:
            yield f"task {task_id} was acknowledged {count} times"
    begun = Counter((one.task_id, one.attempt) for one in history.starts)
    for (task_id, attempt), count in begun.items():
        if count > 1:
            yield f"attempt {attempt} of task {task_id} began {count} times"
        if (task_id, attempt) not in final.attempts:
            yield f"attempt {attempt} of task {task_id} began, and no record of it is kept"


def _keys(final: Final) -> Iterator[str]:
    """One task a unique key within its job."""
    keys = Counter((one.job_id, one.unique_key) for one in final.tasks.values() if one.unique_key)
    for (job_id, key), count in keys.items():
        if count > 1:
            yield f"{count} tasks of job {job_id} have the key {key!r}"


def _ends(history: History, final: Final) -> Iterator[str]:
    """A completed task has one completed attempt, its last one, which really began."""
    begun = {(one.task_id, one.attempt) for one in history.starts}
    completions: Counter[int] = Counter()
    for (task_id, attempt), outcome in final.attempts.items():
        if outcome == "completed":
            completions[task_id] += 1
            if history.starts and (task_id, attempt) not in begun:
                yield f"attempt {attempt} of task {task_id} completed and never began"
    for task_id, task in final.tasks.items():
        wanted = int(task.state == "completed")
        if completions[task_id] != wanted:
            yield f"task {task_id} is {task.state} with {completions[task_id]} completed attempts"
        if wanted and final.attempts.get((task_id, task.attempt)) != "completed":
            yield f"task {task_id} is completed, and its last attempt {task.attempt} is not"


def _cancelled(history: History, final: Final) -> Iterator[str]:
    """What was acknowledged as cancelled never completed."""
    for one in history.cancels:
        for task_id in one.task_ids if one.answer is Answer.OK else ():
            if final.tasks[task_id].state == "completed":
                yield f"task {task_id} completed after its cancel was acknowledged"


def _impolite(history: History, delays_ms: dict[str, float]) -> Iterator[str]:
    """Arrivals at an origin keep its delay."""
    by_origin: dict[str, list[float]] = {}
    for one in history.arrivals:
        by_origin.setdefault(one.origin, []).append(one.at_ms)
    for origin, delay_ms in delays_ms.items():
        for former, later in pairwise(sorted(by_origin.get(origin, []))):
            if later - former < delay_ms:
                yield f"{origin} was hit after {later - former:.1f} ms, its delay is {delay_ms} ms"
