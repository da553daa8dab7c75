"""What clients, workers and origins saw, and whether a cluster that did it kept its promises.

One checker for simulated and real clusters. A request is `ok` (answered), `fail` (refused: nothing
may have come of it) or `unknown` (no answer: it may have been carried out, once, or not at all), as
in Jepsen's histories. Whatever is `unknown` may be true or not; whatever is `ok` must be.

A rule is a function that yields what is wrong, in words; its name is the name of the promise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from itertools import pairwise
from math import inf
from typing import Final as Constant

from msgspec import Struct, field

TERMINAL = frozenset({"completed", "failed", "cancelled", "dead"})
IN_FLIGHT = frozenset({"assigned", "running"})

# --- what was seen ------------------------------------------------------------------------------


class Answer(StrEnum):
    """What became of a request, as its client knows."""

    OK = "ok"
    FAIL = "fail"
    UNKNOWN = "unknown"


class Submission(Struct, frozen=True):
    """A batch somebody asked for. unique_keys: one a task, "" for none; task_ids: when OK.

    marks: one a task, its task_data, by which it is known again; none: of no interest.
    """

    answer: Answer
    unique_keys: tuple[str, ...]
    task_ids: tuple[int, ...] = ()
    job_id: int = 0
    marks: tuple[bytes, ...] = ()


class Cancel(Struct, frozen=True):
    """A cancel. task_ids: those the master said it changed, when OK; all asked for otherwise.

    job_id: the whole job, when it is not 0. asked_ms: by the clock of the retries.
    """

    answer: Answer
    task_ids: tuple[int, ...]
    job_id: int = 0
    asked_ms: float = 0.0


class Retry(Struct, frozen=True):
    """Somebody wants ended tasks to have another life. answered_ms: inf for no answer."""

    task_ids: tuple[int, ...]
    answered_ms: float = inf


class Start(Struct, frozen=True):
    """A run really began, as its own process tells. device_id: "" when it does not know."""

    task_id: int
    attempt: int
    device_id: str = ""


class End(Struct, frozen=True):
    """A run came to its end and returned this, as its own process tells."""

    task_id: int
    attempt: int
    result: bytes


class Told(Struct, frozen=True):
    """A client was told that a task ended so."""

    task_id: int
    state: str


class Arrival(Struct, frozen=True):
    """A request reached an origin. at_ms: the origin's clock."""

    origin: str
    at_ms: float


class History(Struct):
    """Everything that was seen from outside."""

    submissions: list[Submission] = field(default_factory=list)
    cancels: list[Cancel] = field(default_factory=list)
    retries: list[Retry] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    arrivals: list[Arrival] = field(default_factory=list)


# --- what is kept -------------------------------------------------------------------------------


class FinalTask(Struct, frozen=True):
    """A task as it is in the end. parent_id: 0 for one that a client submitted. mark: its data."""

    state: str
    attempt: int
    job_id: int = 0
    parent_id: int = 0
    unique_key: str = ""
    device_id: str = ""
    mark: bytes = b""
    result: bytes = b""


class FinalAttempt(Struct, frozen=True):
    """outcome: "" while it is open."""

    outcome: str
    device_id: str = ""


class FinalJob(Struct, frozen=True):
    """What a job says of itself. Job 0, of the tasks without one, only counts."""

    state: str
    pending: int = 0
    running: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    dead: int = 0


class Final(Struct):
    """What is on disk in the end. attempts: by task and number.

    keys: the task of each unique key, by job and hash. events: the attempts whose end somebody can
    find out about later.
    """

    tasks: dict[int, FinalTask]
    attempts: dict[tuple[int, int], FinalAttempt]
    jobs: dict[int, FinalJob] = field(default_factory=dict)
    keys: dict[tuple[int, bytes], int] = field(default_factory=dict)
    events: set[tuple[int, int]] = field(default_factory=set)


# --- the verdict --------------------------------------------------------------------------------


class Problem(Struct, frozen=True):
    """A broken promise: the name of its rule, and what happened."""

    promise: str
    text: str

    def __str__(self) -> str:
        return f"{self.text} ({self.promise})"


def problems(
    history: History,
    final: Final,
    *,
    is_at_rest: bool = True,
    delays_ms: dict[str, float] | None = None,
) -> list[Problem]:
    """Every broken promise; empty when all were kept.

    is_at_rest: everything had the time to end. delays_ms: least time between two arrivals at an
    origin, tolerance taken off.
    """
    found = kept_problems(final)
    for rule in _SEEN:
        found += _named(rule, rule(history, final))
    found += _named(impolite, impolite(history, delays_ms or {}))
    found += _named(untold, untold(final))
    if is_at_rest:
        found += _named(unfinished, unfinished(final))
    return found


def kept_problems(final: Final) -> list[Problem]:
    """What is wrong with what is kept, whatever was seen; at any commit boundary."""
    return [problem for rule in _KEPT for problem in _named(rule, rule(final))]


def _named(rule: Callable[..., object], texts: Iterable[str]) -> list[Problem]:
    return [Problem(rule.__name__, text) for text in texts]


# --- what was seen, held against what is kept ---------------------------------------------------


def lost(history: History, final: Final) -> Iterator[str]:
    """What was acknowledged is there, and is what was asked for."""
    for one in _answered(history):
        marks = one.marks or (b"",) * len(one.unique_keys)
        for key, mark, task_id in zip(one.unique_keys, marks, one.task_ids, strict=True):
            task = final.tasks.get(task_id)
            if task is None:
                yield f"task {task_id} was acknowledged and is gone"
            elif (task.unique_key, task.job_id) != (key, one.job_id):
                yield (
                    f"key {key!r} in job {one.job_id} was answered with task {task_id}, which has "
                    f"key {task.unique_key!r} in job {task.job_id}"
                )
            elif mark and not key and task.mark != mark:
                yield f"task {task_id} was acknowledged for {mark!r} and is {task.mark!r}"


def unasked(history: History, final: Final) -> Iterator[str]:
    """What nobody asked for is not there, and what was asked for once is not there twice."""
    submitted = {key: task for key, task in final.tasks.items() if not task.parent_id}
    keys: set[str] = set()
    marks: Counter[bytes] = Counter()
    unkeyed = 0
    for one in history.submissions:
        if one.answer is not Answer.FAIL:
            keys.update(one.unique_keys)
            unkeyed += sum(not key for key in one.unique_keys)
            marks.update(one.marks or (b"",) * len(one.unique_keys))
    for task_id, task in submitted.items():
        if task.unique_key and task.unique_key not in keys:
            yield f"task {task_id} has key {task.unique_key!r}, which nobody asked for"
    found = sum(not task.unique_key for task in submitted.values())
    if found > unkeyed:
        yield f"{found} tasks without a key exist, at most {unkeyed} were asked for"
    unmarked = marks.pop(b"", 0)
    surplus = Counter(task.mark for task in submitted.values()) - marks
    if surplus.total() > unmarked:
        yield f"asked for less often than there are tasks of it: {surplus.most_common(3)}"


def twice(history: History, _: Final) -> Iterator[str]:
    """No receipt names another's task, and no attempt begins twice."""
    receipts: Counter[int] = Counter()
    for one in _answered(history):
        for key, task_id in zip(one.unique_keys, one.task_ids, strict=True):
            receipts[task_id] += not key
    for task_id, count in receipts.items():
        if count > 1:
            yield f"task {task_id} was acknowledged {count} times"
    begun = Counter((one.task_id, one.attempt) for one in history.starts)
    for (task_id, attempt), count in begun.items():
        if count > 1:
            yield f"attempt {attempt} of task {task_id} began {count} times"


def unrecorded(history: History, final: Final) -> Iterator[str]:
    """Whatever began is on record, for the device on which it began."""
    for one in history.starts:
        kept = final.attempts.get((one.task_id, one.attempt))
        if kept is None:
            yield f"attempt {one.attempt} of task {one.task_id} began, and no record of it is kept"
        elif one.device_id and one.device_id != kept.device_id:
            yield (
                f"attempt {one.attempt} of task {one.task_id} began on {one.device_id}, on record "
                f"is {kept.device_id}"
            )


def invented(history: History, final: Final) -> Iterator[str]:
    """What completed really ran, and has the result of that run."""
    begun = {(one.task_id, one.attempt) for one in history.starts}
    for (task_id, number), attempt in final.attempts.items():
        if begun and attempt.outcome == "completed" and (task_id, number) not in begun:
            yield f"attempt {number} of task {task_id} completed and never began"
    results = {(one.task_id, one.attempt): one.result for one in history.ends}
    for task_id, task in final.tasks.items():
        if task.state == "completed":
            wanted = results.get((task_id, task.attempt), task.result)
            if task.result != wanted:
                yield f"task {task_id} has the result {task.result!r}, its run gave {wanted!r}"


def uncancelled(history: History, final: Final) -> Iterator[str]:
    """What was acknowledged as cancelled never completes, until somebody wants it again."""
    revived_ms: dict[int, float] = {}
    for retry in history.retries:
        for task_id in retry.task_ids:
            revived_ms[task_id] = max(retry.answered_ms, revived_ms.get(task_id, 0.0))
    for one in history.cancels:
        for task_id in one.task_ids if one.answer is Answer.OK else ():
            task = final.tasks.get(task_id)
            # A retry that was under way may have been carried out after the cancel.
            is_last = task_id not in revived_ms or revived_ms[task_id] < one.asked_ms
            if task is not None and task.state == "completed" and is_last:
                yield f"task {task_id} completed after its cancel was acknowledged"


def unwanted(history: History, final: Final) -> Iterator[str]:
    """Nothing is cancelled that nobody wanted to cancel."""
    asked = [one for one in history.cancels if one.answer is not Answer.FAIL]
    task_ids = {task_id for one in asked for task_id in one.task_ids}
    job_ids = {one.job_id for one in asked if one.job_id}
    for task_id, task in final.tasks.items():
        is_asked = task_id in task_ids or task.job_id in job_ids
        if task.state == "cancelled" and not is_asked:
            yield f"task {task_id} is cancelled, and nobody asked for that"


def mistold(history: History, final: Final) -> Iterator[str]:
    """What was told as completed is so for ever, and nothing is told of what is not there."""
    for one in history.told:
        task = final.tasks.get(one.task_id)
        if task is None:
            yield f"a client was told of the end of task {one.task_id}, which is not there"
        elif one.state == "completed" != task.state:
            yield f"a client was told that task {one.task_id} completed, and it is {task.state}"


def impolite(history: History, delays_ms: dict[str, float]) -> Iterator[str]:
    """Arrivals at an origin keep its delay."""
    by_origin: dict[str, list[float]] = {}
    for one in history.arrivals:
        by_origin.setdefault(one.origin, []).append(one.at_ms)
    for origin, delay_ms in delays_ms.items():
        for former, later in pairwise(sorted(by_origin.get(origin, []))):
            if later - former < delay_ms:
                yield f"{origin} was hit after {later - former:.1f} ms, its delay is {delay_ms} ms"


def _answered(history: History) -> Iterator[Submission]:
    return (one for one in history.submissions if one.answer is Answer.OK)


# --- what is kept, alone ------------------------------------------------------------------------


def doubled(final: Final) -> Iterator[str]:
    """One task a unique key within its job, and that key leads to it."""
    keys = Counter((one.job_id, one.unique_key) for one in final.tasks.values() if one.unique_key)
    for (job_id, key), count in keys.items():
        if count > 1:
            yield f"{count} tasks of job {job_id} have the key {key!r}"
    holders = Counter(final.keys.values())
    holders.subtract(task_id for task_id, one in final.tasks.items() if one.unique_key)
    for task_id, surplus in holders.items():
        if surplus:
            task = final.tasks.get(task_id)
            yield f"{surplus + 1} keys lead to task {task_id}, which is {task}"


def orphaned(final: Final) -> Iterator[str]:
    """Children come with the completion of their parent."""
    for task_id, task in final.tasks.items():
        if task.parent_id:
            parent = final.tasks.get(task.parent_id)
            if parent is None or parent.state != "completed":
                yield f"task {task_id} is a child of task {task.parent_id}, which did not complete"


def misnumbered(final: Final) -> Iterator[str]:
    """Attempts are numbered from 1 without a gap, and only the last one may be open."""
    numbers: Counter[int] = Counter()
    for (task_id, number), attempt in final.attempts.items():
        task = final.tasks.get(task_id)
        if task is None or number > task.attempt:
            yield f"attempt {number} of task {task_id} is on record, the task is {task}"
            continue
        numbers[task_id] += 1
        is_open = number == task.attempt and task.state in IN_FLIGHT
        if (attempt.outcome == "") != is_open:
            yield f"attempt {number} of task {task_id} is {attempt.outcome!r}, the task {task}"
        elif is_open and attempt.device_id != task.device_id:
            yield f"attempt {number} of task {task_id} is with {attempt.device_id}, the task {task}"
    for task_id, task in final.tasks.items():
        if numbers[task_id] != task.attempt:
            yield f"task {task_id} has {numbers[task_id]} attempts on record, of {task.attempt}"


def misended(final: Final) -> Iterator[str]:
    """A completed task has one completed attempt, its last one, of the device it names."""
    completions = Counter(
        task_id for (task_id, _), one in final.attempts.items() if one.outcome == "completed"
    )
    for task_id, task in final.tasks.items():
        wanted = int(task.state == "completed")
        if completions[task_id] != wanted:
            yield f"task {task_id} is {task.state} with {completions[task_id]} completed attempts"
        last = final.attempts.get((task_id, task.attempt))
        if wanted and last != FinalAttempt("completed", task.device_id):
            yield f"task {task_id} is completed by {task.device_id}, and its last attempt is {last}"


def miscounted(final: Final) -> Iterator[str]:
    """Jobs count their tasks, and have ended when these have."""
    counts = Counter(
        (one.job_id, "running" if one.state in IN_FLIGHT else str(one.state))
        for one in final.tasks.values()
    )
    for job_id, job in final.jobs.items():
        for name in _COUNTED:
            said, found = getattr(job, name), counts[job_id, name]
            if said != found:
                yield f"job {job_id} says {said} {name}, there are {found}"
        is_open = job.pending + job.running > 0
        has_ended = not is_open and job.completed + job.failed + job.cancelled + job.dead > 0
        if job_id and job.state == ("finished" if is_open else "active" if has_ended else None):
            yield f"job {job_id} is {job.state}: {job}"


def untold(final: Final) -> Iterator[str]:
    """Every end that was no completion can be found out later."""
    for (task_id, number), attempt in final.attempts.items():
        if attempt.outcome not in ("", "completed") and (task_id, number) not in final.events:
            yield f"attempt {number} of task {task_id} is {attempt.outcome}, without an event"


def unfinished(final: Final) -> Iterator[str]:
    """Everything ends."""
    for task_id, task in final.tasks.items():
        if task.state not in TERMINAL:
            yield f"task {task_id} is still {task.state}"


_COUNTED: Constant = ("pending", "running", *sorted(TERMINAL))
_SEEN: Constant = (
    lost, unasked, twice, unrecorded, invented, uncancelled, unwanted, mistold
)  # fmt: skip
_KEPT: Constant = (doubled, orphaned, misnumbered, misended, miscounted)
