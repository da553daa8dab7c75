"""Rules that hold what was seen against what is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from math import inf
from typing import Final as Constant
from typing import TypeVar

from tests.support.history.kept import FAILING, TERMINAL
from tests.support.history.shapes import Answer, Cancel, Final, History, Retry, Submission

# Outcomes that a run brings about by what it says.
_SAID: Constant = FAILING - {"timed_out"}
# Outcomes without a word of the holder, whose process may be there yet.
_GIVEN_UP: Constant = frozenset({"device_lost", "dispatch_lost"})


def lost(history: History, final: Final) -> Iterator[str]:
    """What was acknowledged is there, and is what was asked for."""
    for one in _answered(history.submissions):
        marks = one.marks or (b"",) * len(one.unique_keys)
        retries = one.retries or (None,) * len(one.unique_keys)
        for key, mark, retry_count, task_id in zip(
            one.unique_keys, marks, retries, one.task_ids, strict=True
        ):
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
            elif not key and retry_count not in (None, task.max_retry_count):
                yield (
                    f"task {task_id} was acknowledged for {retry_count} retries and has "
                    f"{task.max_retry_count}"
                )
    revived = {task_id for kind, task_id, _ in final.events if kind == "task_revived"}
    for retry in _answered(history.retries):
        for task_id in set(retry.task_ids) - revived:
            yield f"task {task_id} was to have another life, and has none"


def unasked(history: History, final: Final) -> Iterator[str]:
    """What nobody asked for is not there, and what was asked for once is not there twice."""
    submitted = {key: task for key, task in final.tasks.items() if not task.parent_id}
    keys: set[str] = set()
    marks: Counter[bytes] = Counter()
    unkeyed = 0
    for one in _possible(history.submissions):
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


def torn(history: History, final: Final) -> Iterator[str]:
    """A request that nobody answered was carried out as a whole, or not at all."""
    asked = Counter(mark for one in history.submissions for mark in one.marks)
    kept = {one.mark for one in final.tasks.values()}
    for one in history.submissions:
        if one.answer is Answer.UNKNOWN:
            # By its mark a task is known again when there is one of it. One with a key may have
            # been there before.
            marks = [
                mark
                for key, mark in zip(one.unique_keys, one.marks, strict=False)
                if mark and not key and asked[mark] == 1
            ]
            there = kept.intersection(marks)
            if 0 < len(there) < len(marks):
                yield f"of a batch of {len(marks)} without an answer only {sorted(there)} are there"


def twice(history: History, _: Final) -> Iterator[str]:
    """No receipt names another's task, and no attempt begins twice."""
    receipts: Counter[int] = Counter()
    for one in _answered(history.submissions):
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


def misjudged(history: History, final: Final) -> Iterator[str]:
    """What returned did not fail, nor did what never does."""
    for one in history.ends:
        kept = final.attempts.get((one.task_id, one.attempt))
        if kept is not None and kept.outcome in _SAID:
            yield f"attempt {one.attempt} of task {one.task_id} returned, and is {kept.outcome}"
    sound = {
        task_id
        for one in _answered(history.submissions)
        for task_id, key in zip(one.task_ids, one.unique_keys, strict=True)
        # Who asked for a key first, and for what, is not known.
        if not one.can_fail and not key
    }
    for (task_id, number), attempt in final.attempts.items():
        if attempt.outcome in _SAID and task_id in sound:
            yield f"attempt {number} of task {task_id}, which never fails, is {attempt.outcome}"


def uncancelled(history: History, final: Final) -> Iterator[str]:
    """What was acknowledged as cancelled ends so and never else, until somebody wants it again."""
    revived_ms = _revived_ms(history)
    ended_ms = {(one.task_id, one.attempt): one.at_ms for one in history.ends}
    of_job: dict[int, list[int]] = {}
    for task_id, task in final.tasks.items():
        if task.state == "completed":
            of_job.setdefault(task.job_id, []).append(task_id)
    for one in _answered(history.cancels):
        for task_id in one.task_ids:
            kept = final.tasks.get(task_id)
            # A retry that was under way may have been carried out after the cancel.
            is_last = revived_ms.get(task_id, -inf) < one.asked_ms
            if kept is not None and kept.state in TERMINAL - {"cancelled"} and is_last:
                yield f"task {task_id} is {kept.state} after its cancel was acknowledged"
        for task_id in of_job.get(one.job_id, []) if one.job_id else ():
            # Of a job, what had ended by then may have completed.
            at_ms = ended_ms.get((task_id, final.tasks[task_id].attempt), -inf)
            if at_ms > one.answered_ms and revived_ms.get(task_id, -inf) < one.asked_ms:
                yield f"task {task_id} completed after the cancel of job {one.job_id}"


def restarted(history: History, final: Final) -> Iterator[str]:
    """After an acknowledged cancel there is no new attempt, until somebody wants one again."""
    revived_ms = _revived_ms(history)
    for one in _answered(history.cancels):
        for task_id, number in one.attempts.items():
            task = final.tasks.get(task_id)
            is_last = revived_ms.get(task_id, -inf) < one.asked_ms
            if task is not None and task.attempt > number and is_last:
                yield (
                    f"task {task_id} had attempt {task.attempt}, and its cancel was acknowledged "
                    f"at attempt {number}"
                )


def undead(history: History, final: Final) -> Iterator[str]:
    """`cancelled` means that its process is gone, unless its device counts as lost."""
    gone_ms: dict[int, tuple[int, float]] = {}
    for one in history.told:
        if one.state == "cancelled":
            former = gone_ms.get(one.task_id, (-1, inf))
            # Of the last life anybody was told of; within it, of the first who heard.
            if (one.attempt, -one.at_ms) > (former[0], -former[1]):
                gone_ms[one.task_id] = (one.attempt, one.at_ms)
    runs = [(one, "began") for one in history.starts] + [(one, "ended") for one in history.ends]
    for run, word in runs:
        kept = final.attempts.get((run.task_id, run.attempt))
        is_given_up = kept is not None and kept.outcome in _GIVEN_UP
        last, told_ms = gone_ms.get(run.task_id, (-1, inf))
        if run.attempt <= last and run.at_ms > told_ms and not is_given_up:
            yield (
                f"attempt {run.attempt} of task {run.task_id} {word} after a client was told that "
                "it is cancelled"
            )


def unwanted(history: History, final: Final) -> Iterator[str]:
    """Nothing is cancelled, or has another life, that nobody wanted to."""
    # A retry that was carried out after a cancel undid it.
    undone_ms: dict[int, float] = {}
    for retry in _answered(history.retries):
        for task_id in retry.task_ids:
            undone_ms[task_id] = max(retry.asked_ms, undone_ms.get(task_id, 0.0))
    wanted_ms: dict[int, float] = {}
    job_wanted_ms: dict[int, float] = {}
    for one in _possible(history.cancels):
        for task_id in one.task_ids:
            wanted_ms[task_id] = max(one.answered_ms, wanted_ms.get(task_id, 0.0))
        job_wanted_ms[one.job_id] = max(one.answered_ms, job_wanted_ms.get(one.job_id, 0.0))
    job_wanted_ms.pop(0, None)
    for task_id, task in final.tasks.items():
        if task.state == "cancelled":
            last_ms = max(wanted_ms.get(task_id, -inf), job_wanted_ms.get(task.job_id, -inf))
            if last_ms < undone_ms.get(task_id, 0.0):
                yield f"task {task_id} is cancelled, and nobody asked for that"
    asked = Counter(task_id for one in _possible(history.retries) for task_id in one.task_ids)
    lives = Counter(task_id for kind, task_id, _ in final.events if kind == "task_revived")
    for task_id, count in lives.items():
        if count > asked[task_id]:
            yield f"task {task_id} was revived {count} times, asked for {asked[task_id]} times"


def mistold(history: History, final: Final) -> Iterator[str]:
    """An end of which a client was told lasts until somebody wants the task again."""
    revived = {
        (task_id, attempt) for kind, task_id, attempt in final.events if kind == "task_revived"
    }
    for one in history.told:
        task = final.tasks.get(one.task_id)
        if task is None:
            yield f"a client was told of the end of task {one.task_id}, which is not there"
        elif one.state != task.state:
            # No retry changes what is completed; of another life there is an event.
            lives = [at for task_id, at in revived if task_id == one.task_id]
            if one.state == "completed" or max(lives, default=-1) < one.attempt:
                yield f"task {one.task_id} was told to be {one.state}, and is {task.state}"


def impolite(history: History, delays_ms: dict[str, float]) -> Iterator[str]:
    """Arrivals at an origin keep its delay."""
    by_origin: dict[str, list[float]] = {}
    for one in history.arrivals:
        by_origin.setdefault(one.origin, []).append(one.at_ms)
    for origin, delay_ms in delays_ms.items():
        for former, later in pairwise(sorted(by_origin.get(origin, []))):
            if later - former < delay_ms:
                yield f"{origin} was hit after {later - former:.1f} ms, its delay is {delay_ms} ms"


def crowded(history: History, concurrency: dict[str, int]) -> Iterator[str]:
    """There are never more requests at an origin than it allows."""
    for origin, most in concurrency.items():
        stays = [one for one in history.arrivals if one.origin == origin]
        # One that leaves in the moment in which another comes is not there with it.
        changes = sorted(
            [(one.until_ms, -1) for one in stays if one.until_ms > one.at_ms]
            + [(one.at_ms, 1) for one in stays if one.until_ms > one.at_ms]
        )
        there = 0
        for at_ms, change in changes:
            there += change
            if there > most:
                yield f"{origin} had {there} requests at once at {at_ms:.1f} ms, it allows {most}"


R = TypeVar("R", Submission, Cancel, Retry)


def _answered(requests: Iterable[R]) -> Iterator[R]:
    """Those that were carried out."""
    return (one for one in requests if one.answer is Answer.OK)


def _possible(requests: Iterable[R]) -> Iterator[R]:
    """Those that may have been carried out."""
    return (one for one in requests if one.answer is not Answer.FAIL)


def _revived_ms(history: History) -> dict[int, float]:
    """Until when a task may have got another life; inf when that may yet come."""
    until_ms: dict[int, float] = {}
    for one in _possible(history.retries):
        for task_id in one.task_ids:
            until_ms[task_id] = max(one.answered_ms, until_ms.get(task_id, -inf))
    return until_ms


SEEN: Constant[tuple[Callable[[History, Final], Iterator[str]], ...]] = (
    lost, unasked, torn, twice, unrecorded, invented, misjudged,
    uncancelled, restarted, undead, unwanted, mistold,
)  # fmt: skip
