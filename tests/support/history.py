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
from typing import TypeVar

from msgspec import Struct, field

TERMINAL = frozenset({"completed", "failed", "cancelled", "dead"})
IN_FLIGHT = frozenset({"assigned", "running"})
# Outcomes that a run brings about by what it says, and all that count as its failure.
_SAID = frozenset({"failed", "retry", "rejected"})
_FAILING = _SAID | {"timed_out"}
# Outcomes without a word of the holder, whose process may be there yet.
_GIVEN_UP = frozenset({"device_lost", "dispatch_lost"})
_DEATHS_MAX = 3

# --- what was seen ------------------------------------------------------------------------------


class Answer(StrEnum):
    """What became of a request, as its client knows."""

    OK = "ok"
    FAIL = "fail"
    UNKNOWN = "unknown"


class Submission(Struct, frozen=True):
    """A batch somebody asked for. unique_keys: one a task, "" for none; task_ids: when OK.

    marks, retries: one a task, its task_data by which it is known again, and how often it may fail
    before it is given up; none: of no interest. can_fail: some of its functions may fail.
    """

    answer: Answer
    unique_keys: tuple[str, ...]
    task_ids: tuple[int, ...] = ()
    job_id: int = 0
    marks: tuple[bytes, ...] = ()
    retries: tuple[int, ...] = ()
    can_fail: bool = True


class Cancel(Struct, frozen=True):
    """A cancel. task_ids: those the master said it changed, when OK; all asked for otherwise.

    job_id: the whole job, when it is not 0. answered_ms: inf for no answer. attempts: the number
    of a task's last attempt, by task, as it was seen once the answer was there; of some tasks.
    """

    answer: Answer
    task_ids: tuple[int, ...]
    job_id: int = 0
    asked_ms: float = 0.0
    answered_ms: float = inf
    attempts: dict[int, int] = {}


class Retry(Struct, frozen=True):
    """Somebody wants ended tasks to have another life.

    task_ids: those the master said it changed, when OK; all asked for otherwise. answered_ms: inf
    for no answer.
    """

    answer: Answer
    task_ids: tuple[int, ...]
    asked_ms: float = 0.0
    answered_ms: float = inf


class Start(Struct, frozen=True):
    """A run really began, as its own process tells. device_id, at_ms: "" and 0 for not known."""

    task_id: int
    attempt: int
    device_id: str = ""
    at_ms: float = 0.0


class End(Struct, frozen=True):
    """A run came to its end and returned this, as its own process tells. at_ms: 0: not known."""

    task_id: int
    attempt: int
    result: bytes
    at_ms: float = 0.0


class Told(Struct, frozen=True):
    """A client was told, or saw on record, that a task ended so."""

    task_id: int
    state: str
    at_ms: float


class Arrival(Struct, frozen=True):
    """A request reached an origin, and kept it busy until it left. By the origin's clock."""

    origin: str
    at_ms: float
    until_ms: float = 0.0


class History(Struct):
    """Everything that was seen from outside; all of it but the arrivals by one clock."""

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
    max_retry_count: int = 0


class FinalAttempt(Struct, frozen=True):
    """outcome: "" while it is open. has_begun: as far as the master heard."""

    outcome: str
    device_id: str = ""
    has_begun: bool = False


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

    keys: the task of each unique key, by job and hash. events: kind, task and attempt of all that
    somebody can find out later; job_events: kind and job.
    """

    tasks: dict[int, FinalTask]
    attempts: dict[tuple[int, int], FinalAttempt]
    jobs: dict[int, FinalJob] = field(default_factory=dict)
    keys: dict[tuple[int, bytes], int] = field(default_factory=dict)
    events: set[tuple[str, int, int]] = field(default_factory=set)
    job_events: set[tuple[str, int]] = field(default_factory=set)


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
    concurrency: dict[str, int] | None = None,
) -> list[Problem]:
    """Every broken promise; empty when all were kept.

    is_at_rest: everything had the time to end. delays_ms: least time between two arrivals at an
    origin, tolerance taken off. concurrency: most requests at once at an origin.
    """
    found = kept_problems(final)
    for rule in _SEEN:
        found += _named(rule, rule(history, final))
    found += _named(impolite, impolite(history, delays_ms or {}))
    found += _named(crowded, crowded(history, concurrency or {}))
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
    revived_ms = _revived_ms(history)
    gone_ms: dict[int, float] = {}
    for one in history.told:
        if one.state == "cancelled" and revived_ms.get(one.task_id, -inf) < one.at_ms:
            gone_ms[one.task_id] = min(one.at_ms, gone_ms.get(one.task_id, inf))
    runs = [(one, "began") for one in history.starts] + [(one, "ended") for one in history.ends]
    for run, word in runs:
        kept = final.attempts.get((run.task_id, run.attempt))
        is_given_up = kept is not None and kept.outcome in _GIVEN_UP
        if run.at_ms > gone_ms.get(run.task_id, inf) and not is_given_up:
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
    revived_ms = _revived_ms(history)
    for one in history.told:
        task = final.tasks.get(one.task_id)
        if task is None:
            yield f"a client was told of the end of task {one.task_id}, which is not there"
        elif one.state != task.state:
            # No retry changes what is completed.
            is_last = one.state == "completed" or revived_ms.get(one.task_id, -inf) < one.at_ms
            if is_last:
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
                failures = sum(one.outcome in _FAILING for one in life)
                is_due = last in _FAILING and failures > task.max_retry_count
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
        failures = sum(one.outcome in _FAILING for one in life)
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


_COUNTED: Constant = ("pending", "running", *sorted(TERMINAL))
_SEEN: Constant = (
    lost, unasked, torn, twice, unrecorded, invented, misjudged,
    uncancelled, restarted, undead, unwanted, mistold,
)  # fmt: skip
_KEPT: Constant = (doubled, orphaned, misnumbered, misended, undeserved, overtried, miscounted)
