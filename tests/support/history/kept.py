"""Rules about what is kept, whatever was seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final as Constant

from tests.support.history.shapes import Final, FinalAttempt, FinalTask

TERMINAL: Constant = frozenset({"completed", "failed", "cancelled", "dead"})
IN_FLIGHT: Constant = frozenset({"assigned", "running"})
# All that counts as a failure of the task.
FAILING: Constant = frozenset({"failed", "retry", "rejected", "timed_out"})
_DEATHS_MAX: Constant = 3
_COUNTED: Constant = ("pending", "running", *sorted(TERMINAL))


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
        by = last and (last.outcome, last.device_id)
        if wanted and by != ("completed", task.device_id):
            yield f"task {task_id} is completed by {task.device_id}, and its last attempt is {last}"


def undeserved(final: Final) -> Iterator[str]:
    """Failed is what was rejected, or failed once more than it may; dead what died three times."""
    firsts = _first_attempts(final)
    for task_id, task in final.tasks.items():
        if task.state in ("failed", "dead"):
            life = _life(final, firsts, task_id, task)
            last = life[-1].outcome if life else "no attempt"
            if task.state == "failed":
                failures = sum(one.outcome in FAILING for one in life)
                is_due = last in FAILING and failures > task.max_retry_count
                if not is_due and last != "rejected":
                    yield (
                        f"task {task_id} is failed after {failures} failures of "
                        f"{task.max_retry_count} + 1, the last attempt is {last}"
                    )
            elif (deaths := sum(map(_is_death, life))) < _DEATHS_MAX or not _is_death(life[-1]):
                yield f"task {task_id} is dead after {deaths} deaths, the last attempt is {last}"


def overtried(final: Final) -> Iterator[str]:
    """Nothing is tried again that was rejected, failed too often or died three times."""
    firsts = _first_attempts(final)
    for task_id, task in final.tasks.items():
        life = _life(final, firsts, task_id, task)
        if task.state in TERMINAL:
            life = life[:-1]
        failures = sum(one.outcome in FAILING for one in life)
        deaths = sum(map(_is_death, life))
        is_rejected = any(one.outcome == "rejected" for one in life)
        if is_rejected or failures > task.max_retry_count or deaths >= _DEATHS_MAX:
            yield (
                f"task {task_id} is tried again after {failures} failures of "
                f"{task.max_retry_count} + 1 and {deaths} deaths: "
                f"{[one.outcome for one in life]}"
            )


def miscounted(final: Final) -> Iterator[str]:
    """Jobs count their tasks, and have ended when these have."""
    counts = Counter(
        (one.job_id, "running" if one.state in IN_FLIGHT else str(one.state))
        for one in final.tasks.values()
    )
    for job_id in {one.job_id for one in final.tasks.values()} - {0, *final.jobs}:
        yield f"job {job_id} has tasks and is not there"
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
    """Every end that was no completion, and every cancel, can be found out later."""
    for (task_id, number), attempt in final.attempts.items():
        kind = f"task_{attempt.outcome}"
        is_loss = attempt.outcome not in ("", "completed")
        if is_loss and (kind, task_id, number) not in final.events:
            yield f"attempt {number} of task {task_id} is {attempt.outcome}, without an event"
    kinds = ("cancel_requested", "task_cancelled")
    told = {task_id for kind, task_id, _ in final.events if kind in kinds}
    for task_id, task in final.tasks.items():
        is_told = task_id in told or ("job_cancelled", task.job_id) in final.job_events
        if task.state == "cancelled" and not is_told:
            yield f"task {task_id} is cancelled, without an event"


def unfinished(final: Final) -> Iterator[str]:
    """Everything ends."""
    for task_id, task in final.tasks.items():
        if task.state not in TERMINAL:
            yield f"task {task_id} is still {task.state}"


def _first_attempts(final: Final) -> dict[int, int]:
    """Where the present life begins, of what was revived."""
    firsts: dict[int, int] = {}
    for kind, task_id, number in final.events:
        if kind == "task_revived":
            firsts[task_id] = max(number + 1, firsts.get(task_id, 1))
    return firsts


def _life(
    final: Final, firsts: dict[int, int], task_id: int, task: FinalTask
) -> list[FinalAttempt]:
    """The attempts of its present life, in order."""
    numbers = range(firsts.get(task_id, 1), task.attempt + 1)
    kept = (final.attempts.get((task_id, number)) for number in numbers)
    return [one for one in kept if one is not None]


def _is_death(attempt: FinalAttempt) -> bool:
    """Alone, or (as far as was known) with its device."""
    return attempt.outcome == "died" or (attempt.outcome == "device_lost" and attempt.has_begun)


# True at any commit boundary.
KEPT: Constant[tuple[Callable[[Final], Iterator[str]], ...]] = (
    doubled, orphaned, misnumbered, misended, undeserved, overtried, miscounted
)  # fmt: skip
