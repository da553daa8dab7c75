"""The checker of histories: a whole one passes, and each way to break a promise has its rule."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

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
    Problem,
    Retry,
    Start,
    Submission,
    Told,
    problems,
)
from tests.support.history.kept import KEPT, unfinished, untold
from tests.support.history.seen import SEEN, crowded, impolite

ORIGIN = "http://o"
OK, FAIL, UNKNOWN = Answer.OK, Answer.FAIL, Answer.UNKNOWN


def whole() -> tuple[History, Final]:
    """A job whose tasks ended in every way there is; the attempts are in the order of their tasks.

    1: done at the second try, with the child 4. 2: cancelled while it ran. 3: done, named by a key.
    5: failed at its second life. 6: dead. 7: rejected.
    """
    history = History(
        submissions=[
            Submission(
                OK, ("", "", "k", "", "", ""), (1, 2, 3, 5, 6, 7), 9,
                (b"a", b"b", b"c", b"e", b"f", b"g"), (1, 1, 1, 1, 1, 1),
            ),
            Submission(FAIL, ("",), marks=(b"no",)),
        ],
        cancels=[Cancel(OK, (2,), 0, 50, 60, {2: 1}), Cancel(FAIL, (1,), 0, 50, 60)],
        retries=[Retry(OK, (5,), 100, 110), Retry(FAIL, (6,), 100, 110)],
        starts=[
            Start(1, 1, "w1", 10), Start(1, 2, "w2", 30), Start(2, 1, "w1", 55),
            Start(3, 1, "", 10), Start(5, 1, "w1", 10), Start(5, 3, "w1", 120),
            Start(5, 4, "w1", 130), Start(7, 1, "w1", 10),
        ],
        ends=[End(1, 2, b"2", 40)],
        told=[
            Told(1, "completed", 2, 70), Told(2, "cancelled", 1, 70), Told(5, "failed", 1, 90),
        ],
        arrivals=[Arrival(ORIGIN, 0, 100), Arrival(ORIGIN, 100, 150)],
    )  # fmt: skip
    final = Final(
        tasks={
            1: FinalTask("completed", 2, 9, 0, "", "w2", b"a", b"2", 1),
            2: FinalTask("cancelled", 1, 9, 0, "", "w1", b"b", b"", 1),
            3: FinalTask("completed", 1, 9, 0, "k", "w1", b"c", b"", 1),
            4: FinalTask("cancelled", 0, 9, 1, "", "", b"child", b"", 1),
            5: FinalTask("failed", 4, 9, 0, "", "w1", b"e", b"", 1),
            6: FinalTask("dead", 4, 9, 0, "", "w1", b"f", b"", 1),
            7: FinalTask("failed", 1, 9, 0, "", "w1", b"g", b"", 1),
        },
        attempts={
            (1, 1): FinalAttempt("failed", "w1", has_begun=True),
            (1, 2): FinalAttempt("completed", "w2", has_begun=True),
            (2, 1): FinalAttempt("cancelled", "w1", has_begun=True),
            (3, 1): FinalAttempt("completed", "w1", has_begun=True),
            (5, 1): FinalAttempt("rejected", "w1", has_begun=True),
            (5, 2): FinalAttempt("dispatch_lost", "w2"),
            (5, 3): FinalAttempt("timed_out", "w1", has_begun=True),
            (5, 4): FinalAttempt("retry", "w1", has_begun=True),
            (6, 1): FinalAttempt("died", "w1"),
            (6, 2): FinalAttempt("device_lost", "w1", has_begun=True),
            (6, 3): FinalAttempt("device_lost", "w1"),
            (6, 4): FinalAttempt("died", "w1"),
            (7, 1): FinalAttempt("rejected", "w1", has_begun=True),
        },
        jobs={9: FinalJob("finished", completed=2, failed=2, cancelled=2, dead=1)},
        keys={(9, b"#k"): 3},
        job_events={("job_cancelled", 8)},
    )
    history.cancels.append(Cancel(UNKNOWN, (4,)))
    final.events = {
        (f"task_{one.outcome}", task_id, number)
        for (task_id, number), one in final.attempts.items()
        if one.outcome != "completed"
    } | {("task_revived", 5, 1), ("cancel_requested", 2, 1), ("task_cancelled", 4, 0)}
    return history, final


def found_in(history: History, final: Final) -> list[Problem]:
    return problems(history, final, delays_ms={ORIGIN: 100}, concurrency={ORIGIN: 1})


def task(final: Final, task_id: int, **fields: object) -> None:
    final.tasks[task_id] = msgspec.structs.replace(final.tasks[task_id], **fields)


def outcome(final: Final, task_id: int, number: int, is_now: str) -> None:
    """The attempt ended so, and its event says so."""
    former = final.attempts[task_id, number]
    final.attempts[task_id, number] = msgspec.structs.replace(former, outcome=is_now)
    final.events.discard((f"task_{former.outcome}", task_id, number))
    final.events.add((f"task_{is_now}", task_id, number))


def state(final: Final, task_id: int, is_now: str) -> None:
    """The task ended so, and its job counts it so."""
    tally = msgspec.structs.asdict(final.jobs[9])
    tally[final.tasks[task_id].state] -= 1
    tally[is_now] += 1
    final.jobs[9] = FinalJob(**tally)
    task(final, task_id, state=is_now)


def tally(final: Final, **fields: object) -> None:
    final.jobs[9] = msgspec.structs.replace(final.jobs[9], **fields)


def resubmitted(history: History, **fields: object) -> None:
    history.submissions[0] = msgspec.structs.replace(history.submissions[0], **fields)


def another_try(final: Final, task_id: int) -> None:
    """It went on after its last attempt, and was cancelled then."""
    state(final, task_id, "cancelled")
    final.events.add(("task_cancelled", task_id, 0))
    number = final.tasks[task_id].attempt + 1
    task(final, task_id, attempt=number)
    final.attempts[task_id, number] = FinalAttempt("cancelled", "w1")
    final.events.add(("task_cancelled", task_id, number))


Break = Callable[[History, Final], object]


def both(*breaks: Break) -> Break:
    return lambda history, final: [one(history, final) for one in breaks]


# The promise, words of the problem, and what breaks it and no other.
BROKEN: list[tuple[str, str, Break]] = [
    (
        "lost",
        "task 8 was acknowledged and is gone",
        lambda h, _: h.submissions.append(Submission(OK, ("",), (8,))),
    ),
    ("lost", "has key 'k'", lambda h, _: h.submissions.append(Submission(OK, ("other",), (3,), 9))),
    ("lost", "has key 'k'", lambda h, _: h.submissions.append(Submission(OK, ("k",), (3,), 8))),
    ("lost", "has key '' in job 9", lambda h, _: resubmitted(h, job_id=8)),
    (
        "lost",
        "was acknowledged for b'x'",
        both(
            lambda h, _: resubmitted(h, marks=(b"x", *h.submissions[0].marks[1:])),
            lambda h, _: h.submissions.append(Submission(UNKNOWN, ("",), marks=(b"a",))),
        ),
    ),
    ("lost", "for 2 retries and has 1", lambda h, _: resubmitted(h, retries=(2, 1, 1, 1, 1, 1))),
    (
        "lost",
        "was to have another life, and has none",
        lambda h, _: h.retries.append(Retry(OK, (7,), 100, 110)),
    ),
    (
        "unasked",
        "which nobody asked for",
        both(
            lambda _, f: f.tasks.update(
                {8: FinalTask("cancelled", 0, 9, unique_key="x", mark=b"x")}
            ),
            lambda _, f: f.keys.update({(9, b"#x"): 8}),
            lambda _, f: f.events.add(("task_cancelled", 8, 0)),
            lambda _, f: tally(f, cancelled=3),
            lambda h, _: h.cancels.append(Cancel(UNKNOWN, (8,))),
            lambda h, _: h.submissions.append(Submission(UNKNOWN, ("",), marks=(b"x",))),
        ),
    ),
    (
        "unasked",
        "6 tasks without a key exist, at most 5",
        both(
            lambda _, f: task(f, 4, parent_id=0),
            lambda h, _: h.submissions.append(Submission(UNKNOWN, ("q",), marks=(b"child",))),
        ),
    ),
    # Of a refused request nothing may have come, also when another one got nothing.
    (
        "unasked",
        "less often",
        both(
            lambda _, f: task(f, 4, parent_id=0, mark=b"no"),
            lambda h, _: h.submissions.append(Submission(UNKNOWN, ("",), marks=(b"x",))),
        ),
    ),
    (
        "torn",
        "of a batch of 2",
        both(
            lambda _, f: task(f, 4, parent_id=0),
            lambda h, _: h.submissions.append(
                Submission(UNKNOWN, ("", ""), marks=(b"child", b"x"))
            ),
        ),
    ),
    (
        "twice",
        "acknowledged 2 times",
        lambda h, _: h.submissions.append(Submission(OK, ("",), (1,), 9)),
    ),
    ("twice", "began 2 times", lambda h, _: h.starts.append(Start(3, 1))),
    ("unrecorded", "no record", lambda h, _: h.starts.append(Start(3, 2))),
    ("unrecorded", "on w3", lambda h, _: h.starts.__setitem__(3, Start(3, 1, "w3"))),
    ("invented", "never began", lambda h, _: h.starts.remove(Start(3, 1, "", 10))),
    ("invented", "its run gave", lambda _, f: task(f, 1, result=b"1")),
    ("misjudged", "returned, and is failed", lambda h, _: h.ends.append(End(1, 1, b"1", 20))),
    (
        "misjudged",
        "never fails",
        lambda h, _: h.submissions.__setitem__(
            0, msgspec.structs.replace(h.submissions[0], can_fail=False)
        ),
    ),
    (
        "uncancelled",
        "task 1 is completed after its cancel",
        lambda h, _: h.cancels.append(Cancel(OK, (1,))),
    ),
    (
        "uncancelled",
        "task 6 is dead after its cancel",
        lambda h, _: h.cancels.append(Cancel(OK, (6,))),
    ),
    ("uncancelled", "cancel of job 9", lambda h, _: h.cancels.append(Cancel(OK, (), 9, 20, 30))),
    (
        "restarted",
        "had attempt 1, and",
        lambda h, _: h.cancels.__setitem__(0, Cancel(OK, (2,), 0, 50, 60, {2: 0})),
    ),
    (
        "undead",
        "attempt 1 of task 2 began",
        lambda h, _: h.told.append(Told(2, "cancelled", 1, 54)),
    ),
    ("undead", "attempt 1 of task 2 ended", lambda h, _: h.ends.append(End(2, 1, b"", 71))),
    ("unwanted", "task 2 is cancelled", lambda h, _: h.cancels.pop(0)),
    ("unwanted", "task 2 is cancelled", lambda h, _: h.cancels.__setitem__(0, Cancel(FAIL, (2,)))),
    # The only cancel there was is undone.
    (
        "unwanted",
        "task 2 is cancelled",
        both(
            lambda h, _: h.retries.append(Retry(OK, (2,), 61, 65)),
            lambda _, f: f.events.add(("task_revived", 2, 0)),
        ),
    ),
    (
        "unwanted",
        "revived 1 times, asked for 0",
        both(lambda h, _: h.retries.clear(), lambda h, _: h.told.pop()),
    ),
    (
        "unwanted",
        "revived 1 times, asked for 0",
        both(lambda h, _: h.retries.__setitem__(0, Retry(FAIL, (5,))), lambda h, _: h.told.pop()),
    ),
    ("unwanted", "revived 2 times, asked for 1", lambda _, f: f.events.add(("task_revived", 5, 0))),
    ("mistold", "not there", lambda h, _: h.told.append(Told(8, "dead", 3, 0))),
    (
        "mistold",
        "told to be completed, and is failed",
        lambda h, _: h.told.append(Told(5, "completed", 4, 0)),
    ),
    (
        "mistold",
        "told to be dead, and is failed",
        lambda h, _: h.told.append(Told(5, "dead", 4, 111)),
    ),
    ("impolite", "after 99.0 ms", lambda h, _: h.arrivals.append(Arrival(ORIGIN, 199, 200))),
    (
        "crowded",
        "2 requests at once",
        lambda h, _: h.arrivals.__setitem__(0, Arrival(ORIGIN, 0, 101)),
    ),
    (
        "doubled",
        "2 tasks of job 9",
        both(
            lambda _, f: task(f, 2, unique_key="k"),
            lambda h, _: resubmitted(h, unique_keys=("", "k", "k", "", "", "")),
            lambda _, f: f.keys.update({(9, b"#2"): 2}),
        ),
    ),
    ("doubled", "0 keys lead to task 3", lambda _, f: f.keys.clear()),
    ("doubled", "2 keys lead to task 3", lambda _, f: f.keys.update({(8, b"#k"): 3})),
    ("orphaned", "child of task 2", lambda _, f: task(f, 4, parent_id=2)),
    ("orphaned", "child of task 8", lambda _, f: task(f, 4, parent_id=8)),
    (
        "misnumbered",
        "attempt 5 of task 6",
        both(
            lambda _, f: f.attempts.update({(6, 5): FinalAttempt("died", "w1")}),
            lambda _, f: f.events.add(("task_died", 6, 5)),
        ),
    ),
    ("misnumbered", "3 attempts on record, of 4", lambda _, f: f.attempts.pop((5, 2))),
    ("misnumbered", "is ''", lambda _, f: f.attempts.update({(1, 1): FinalAttempt("", "w1")})),
    (
        "misended",
        "2 completed attempts",
        lambda _, f: f.attempts.update({(1, 1): FinalAttempt("completed", "w1")}),
    ),
    (
        "misended",
        "cancelled with 1 completed",
        lambda _, f: f.attempts.update(
            {(3, 1): f.attempts[3, 1], (2, 1): FinalAttempt("completed", "w1")}
        ),
    ),
    ("misended", "completed by w3", lambda _, f: task(f, 1, device_id="w3")),
    # A failure that was none, of the master's own making.
    ("undeserved", "last attempt is dispatch_lost", lambda _, f: outcome(f, 7, 1, "dispatch_lost")),
    ("undeserved", "failed after 1 failures of 1 + 1", lambda _, f: outcome(f, 5, 3, "returned")),
    # What failed in a former life does not count.
    (
        "undeserved",
        "failed after 1 failures of 1 + 1",
        both(lambda _, f: outcome(f, 5, 3, "returned"), lambda _, f: outcome(f, 5, 1, "failed")),
    ),
    ("undeserved", "last attempt is no attempt", lambda _, f: state(f, 4, "failed")),
    ("undeserved", "last attempt is no attempt", lambda _, f: state(f, 4, "dead")),
    ("undeserved", "dead after 2 deaths", lambda _, f: outcome(f, 6, 1, "returned")),
    ("undeserved", "dead after 2 deaths", lambda _, f: outcome(f, 6, 4, "device_lost")),
    (
        "overtried",
        "['rejected']",
        both(lambda h, _: h.cancels.append(Cancel(UNKNOWN, (7,))), lambda _, f: another_try(f, 7)),
    ),
    (
        "overtried",
        "after 2 failures of 1 + 1",
        both(lambda h, _: h.cancels.append(Cancel(UNKNOWN, (5,))), lambda _, f: another_try(f, 5)),
    ),
    (
        "overtried",
        "and 3 deaths",
        both(lambda h, _: h.cancels.append(Cancel(UNKNOWN, (6,))), lambda _, f: another_try(f, 6)),
    ),
    ("miscounted", "says 3 cancelled, there are 2", lambda _, f: tally(f, cancelled=3)),
    ("miscounted", "says 1 pending, there are 0", lambda _, f: tally(f, pending=1, state="active")),
    ("miscounted", "is active", lambda _, f: tally(f, state="active")),
    ("miscounted", "job 9 has tasks and is not there", lambda _, f: f.jobs.clear()),
    ("untold", "failed, without an event", lambda _, f: f.events.discard(("task_failed", 1, 1))),
    # Another one about the same attempt is not it.
    (
        "untold",
        "rejected, without an event",
        lambda _, f: f.events.discard(("task_rejected", 5, 1)),
    ),
    (
        "untold",
        "task 2 is cancelled, without an event",
        both(
            lambda _, f: f.events.discard(("cancel_requested", 2, 1)),
            lambda _, f: outcome(f, 2, 1, "device_lost"),
        ),
    ),
    (
        "unfinished",
        "still pending",
        both(
            lambda _, f: task(f, 4, state="pending"),
            lambda _, f: tally(f, cancelled=1, pending=1, state="active"),
        ),
    ),
]

RULES = (*SEEN, *KEPT, impolite, crowded, untold, unfinished)


def test_a_history_that_kept_all_promises_has_no_problems() -> None:
    assert found_in(*whole()) == []


@pytest.mark.parametrize(("promise", "words", "break_it"), BROKEN)
def test_a_broken_promise_is_told_and_no_other(promise: str, words: str, break_it: Break) -> None:
    history, final = whole()
    break_it(history, final)

    found = found_in(history, final)

    assert {one.promise for one in found} == {promise}, found
    assert any(words in one.text for one in found), found


def test_each_rule_was_seen_to_find_something() -> None:
    assert {one.__name__ for one in RULES} == {promise for promise, _, _ in BROKEN}


# --- what nobody answered, both ways -------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "fine"),
    [(OK, {1}), (FAIL, {0}), (UNKNOWN, {0, 1})],
)
@pytest.mark.parametrize("mark", [b"new", b""])
def test_a_batch_is_there_as_often_as_its_answer_allows(
    answer: Answer, fine: set[int], mark: bytes
) -> None:
    for count in range(3):
        history, final = whole()
        history.submissions.append(
            Submission(answer, ("",), (11,) * (answer is OK), 9 * (answer is OK), (mark,))
        )
        history.cancels.append(Cancel(UNKNOWN, (), 9))
        for task_id in range(11, 11 + count):
            final.tasks[task_id] = FinalTask("cancelled", 0, 9, mark=mark)
        tally(final, cancelled=2 + count)
        final.job_events.add(("job_cancelled", 9))

        assert (not found_in(history, final)) == (count in fine), (count, found_in(history, final))


@pytest.mark.parametrize(
    ("answer", "fine"),
    [
        (OK, {"cancelled"}),
        (FAIL, {"completed"}),
        (UNKNOWN, {"cancelled", "completed"}),
    ],
)
def test_a_task_is_cancelled_as_the_answer_to_its_cancel_allows(
    answer: Answer, fine: set[str]
) -> None:
    for is_now in ("cancelled", "completed"):
        history, final = whole()
        history.cancels[0] = Cancel(answer, (2,), 0, 50, 60 if answer is OK else inf)
        history.told.pop(1)
        state(final, 2, is_now)
        outcome(final, 2, 1, is_now)

        assert (not found_in(history, final)) == (is_now in fine), found_in(history, final)


@pytest.mark.parametrize(
    ("answer", "fine"),
    [(OK, {1}), (FAIL, {0}), (UNKNOWN, {0, 1})],
)
def test_a_task_has_as_many_lives_as_the_answer_to_its_retry_allows(
    answer: Answer, fine: set[int]
) -> None:
    """Task 7 is told to have failed, and has another life or not."""
    for lives in range(3):
        history, final = whole()
        history.told.append(Told(7, "failed", 1, 95))
        history.retries.append(Retry(answer, (7,), 100, 110 if answer is OK else inf))
        final.events |= {("task_revived", 7, 1 + life) for life in range(lives)}
        if lives:
            task(final, 7, attempt=2)
            state(final, 7, "completed")
            final.attempts[7, 2] = FinalAttempt("completed", "w1", has_begun=True)
            history.starts.append(Start(7, 2, "w1", 120))

        assert (not found_in(history, final)) == (lives in fine), found_in(history, final)


# --- time ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retry", "is_fine"),
    [
        (Retry(OK, (2,), 30, 40), False),
        (Retry(OK, (2,), 30, 55), True),
        (Retry(OK, (2,), 70, 80), True),
        (Retry(UNKNOWN, (2,), 30), True),
        (Retry(FAIL, (2,), 70, 80), False),
        (Retry(OK, (1,), 70, 80), False),
    ],
)
def test_a_cancel_holds_until_a_retry_that_may_have_come_after_it(
    retry: Retry, is_fine: bool
) -> None:
    history, final = whole()
    history.retries.append(retry)
    final.events |= {("task_revived", one, 0) for one in retry.task_ids if retry.answer is OK}
    history.cancels[0] = Cancel(OK, (2,), 0, 50, 60, {2: 0})
    history.told.pop(1)
    state(final, 2, "completed")
    outcome(final, 2, 1, "completed")

    found = {one.promise for one in found_in(history, final)}

    assert found == (set() if is_fine else {"uncancelled", "restarted"})


def test_an_end_may_be_heard_of_when_the_task_has_another_life_already() -> None:
    history, final = whole()
    history.told.append(Told(5, "cancelled", 1, 111))
    history.cancels.append(Cancel(OK, (5,), 0, 20, 30))

    assert not found_in(history, final), "attempt 3 began at 120, in the life after that"


def test_a_run_of_a_device_that_counts_as_lost_may_outlive_its_cancel() -> None:
    history, final = whole()
    history.ends.append(End(2, 1, b"", 80))
    outcome(final, 2, 1, "device_lost")

    assert found_in(history, final) == []


def test_what_had_ended_before_its_job_was_cancelled_may_be_completed() -> None:
    history, final = whole()
    history.cancels.append(Cancel(OK, (), 9, 30, 41))

    assert found_in(history, final) == []


def test_an_unanswered_batch_may_find_the_keys_of_others() -> None:
    history, final = whole()
    history.submissions.append(Submission(UNKNOWN, ("k", ""), marks=(b"c", b"x")))

    assert found_in(history, final) == []


def test_an_open_task_is_fine_before_everything_rests() -> None:
    history, final = whole()
    task(final, 4, state="running", attempt=1, device_id="w1")
    final.attempts[4, 1] = FinalAttempt("", "w1")
    tally(final, state="active", cancelled=1, running=1)

    assert problems(history, final, is_at_rest=False) == []
    assert {one.promise for one in problems(history, final)} == {"unfinished"}
