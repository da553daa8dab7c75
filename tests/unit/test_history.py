"""The checker of histories: a whole one passes, and each way to break a promise has its rule."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from tests.support.history import (
    Answer,
    Arrival,
    Cancel,
    End,
    Final,
    FinalAttempt,
    FinalJob,
    FinalTask,
    History,
    Retry,
    Start,
    Submission,
    Told,
    problems,
)

ORIGIN = "http://o"


def whole() -> tuple[History, Final]:
    """A job of three: done at the second try and with a child, cancelled, and named by a key."""
    history = History(
        submissions=[
            Submission(Answer.OK, ("", "", "k"), (1, 2, 3), 9, (b"a", b"b", b"c")),
            Submission(Answer.FAIL, ("",), marks=(b"d",)),
        ],
        cancels=[Cancel(Answer.OK, (2,), asked_ms=50)],
        starts=[Start(1, 1, "w1"), Start(1, 2, "w2"), Start(3, 1)],
        ends=[End(1, 2, b"2")],
        told=[Told(1, "completed")],
        arrivals=[Arrival(ORIGIN, 0), Arrival(ORIGIN, 100)],
    )
    final = Final(
        tasks={
            1: FinalTask("completed", 2, 9, device_id="w2", mark=b"a", result=b"2"),
            2: FinalTask("cancelled", 0, 9, mark=b"b"),
            3: FinalTask("completed", 1, 9, unique_key="k", device_id="w1", mark=b"c"),
            4: FinalTask("dead", 0, 9, parent_id=1, mark=b"e"),
        },
        attempts={
            (1, 1): FinalAttempt("failed", "w1"),
            (1, 2): FinalAttempt("completed", "w2"),
            (3, 1): FinalAttempt("completed", "w1"),
        },
        jobs={9: FinalJob("finished", completed=2, cancelled=1, dead=1)},
        keys={(9, b"#k"): 3},
        events={(1, 1)},
    )
    return history, final


def task(final: Final, task_id: int, **fields: object) -> None:
    final.tasks[task_id] = msgspec.structs.replace(final.tasks[task_id], **fields)


def resubmitted(history: History, **fields: object) -> None:
    history.submissions[0] = msgspec.structs.replace(history.submissions[0], **fields)


Break = Callable[[History, Final], object]

BROKEN: list[tuple[str, str, Break]] = [
    ("lost", "was acknowledged and is gone", lambda _, final: final.tasks.pop(2)),
    ("lost", "which has key", lambda _, final: task(final, 3, unique_key="other")),
    ("lost", "in job 8", lambda history, _: resubmitted(history, job_id=8)),
    ("lost", "was acknowledged for", lambda _, final: task(final, 1, mark=b"x")),
    ("unasked", "which nobody asked for", lambda _, final: task(final, 3, unique_key="other")),
    ("unasked", "without a key", lambda _, final: final.tasks.update({5: FinalTask("dead", 0)})),
    # Of a refused request nothing may have come, also when another one got nothing.
    ("unasked", "less often", lambda _, final: task(final, 2, mark=b"d")),
    ("unasked", "less often", lambda _, final: task(final, 2, mark=b"a")),
    ("twice", "acknowledged 2 times", lambda history, _: resubmitted(history, task_ids=(1, 1, 3))),
    ("twice", "began 2 times", lambda history, _: history.starts.append(Start(3, 1))),
    ("unrecorded", "no record", lambda _, final: final.attempts.pop((1, 1))),
    ("unrecorded", "on w3", lambda history, _: history.starts.append(Start(3, 1, "w3"))),
    ("invented", "never began", lambda history, _: history.starts.pop()),
    ("invented", "its run gave", lambda _, final: task(final, 1, result=b"1")),
    ("uncancelled", "task 2", lambda _, final: task(final, 2, state="completed")),
    ("unwanted", "task 2", lambda history, _: history.cancels.clear()),
    ("mistold", "not there", lambda history, _: history.told.append(Told(7, "dead"))),
    ("mistold", "it is cancelled", lambda history, _: history.told.append(Told(2, "completed"))),
    ("impolite", "after 99", lambda history, _: history.arrivals.append(Arrival(ORIGIN, 199))),
    ("doubled", "2 tasks of job 9", lambda _, final: task(final, 2, unique_key="k")),
    ("doubled", "0 keys lead to task 3", lambda _, final: final.keys.clear()),
    ("doubled", "2 keys lead to task 3", lambda _, final: final.keys.update({(8, b"#k"): 3})),
    ("orphaned", "child of task 2", lambda _, final: task(final, 4, parent_id=2)),
    ("orphaned", "child of task 7", lambda _, final: task(final, 4, parent_id=7)),
    (
        "misnumbered",
        "attempt 3 of task 1",
        lambda _, final: final.attempts.update({(1, 3): FinalAttempt("died")}),
    ),
    ("misnumbered", "1 attempts on record, of 2", lambda _, final: final.attempts.pop((1, 1))),
    (
        "misnumbered",
        "is ''",
        lambda _, final: final.attempts.update({(1, 1): FinalAttempt("")}),
    ),
    (
        "misended",
        "2 completed attempts",
        lambda _, final: final.attempts.update({(1, 1): FinalAttempt("completed", "w1")}),
    ),
    ("misended", "completed by w3", lambda _, final: task(final, 1, device_id="w3")),
    ("miscounted", "says 1 cancelled, there are 0", lambda _, final: task(final, 2, state="dead")),
    (
        "miscounted",
        "is active",
        lambda _, final: final.jobs.update(
            {9: FinalJob("active", completed=2, cancelled=1, dead=1)}
        ),
    ),
    ("untold", "failed, without an event", lambda _, final: final.events.clear()),
    ("unfinished", "still pending", lambda _, final: task(final, 2, state="pending")),
]


def test_a_history_that_kept_all_promises_has_no_problems() -> None:
    history, final = whole()

    assert problems(history, final, delays_ms={ORIGIN: 100}) == []


@pytest.mark.parametrize(("promise", "words", "break_it"), BROKEN)
def test_a_broken_promise_is_told(promise: str, words: str, break_it: Break) -> None:
    history, final = whole()
    break_it(history, final)

    found = problems(history, final, delays_ms={ORIGIN: 100})

    assert [one for one in found if one.promise == promise and words in one.text], found


def test_what_nobody_answered_may_be_carried_out_once_or_not_at_all() -> None:
    for marks in ((b"f",), ()):
        history, final = whole()
        history.submissions.append(Submission(Answer.UNKNOWN, ("",), marks=marks))
        assert problems(history, final) == []

        final.tasks[5] = FinalTask("dead", 0, mark=b"f")
        assert problems(history, final) == []

        final.tasks[6] = FinalTask("dead", 0, mark=b"f")
        assert {one.promise for one in problems(history, final)} == {"unasked"}


@pytest.mark.parametrize(
    ("retry", "is_fine"),
    [(Retry((2,), 40), False), (Retry((2,), 60), True), (Retry((2,)), True), (Retry((1,)), False)],
)
def test_a_cancelled_task_may_complete_when_a_retry_may_have_come_after_it(
    retry: Retry, is_fine: bool
) -> None:
    history, final = whole()
    history.retries.append(retry)
    task(final, 2, state="completed", attempt=1)

    found = [one for one in problems(history, final) if one.promise == "uncancelled"]

    assert (not found) == is_fine


def test_an_open_task_is_fine_before_everything_rests() -> None:
    history, final = whole()
    history.cancels.clear()
    task(final, 2, state="running", attempt=1, device_id="w1")
    final.attempts[2, 1] = FinalAttempt("", "w1")
    final.jobs[9] = FinalJob("active", running=1, completed=2, dead=1)

    assert problems(history, final, is_at_rest=False) == []
    assert {one.promise for one in problems(history, final)} == {"unfinished"}
