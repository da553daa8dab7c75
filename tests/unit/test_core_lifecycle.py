"""A task's life as a table: each row is reached, every other pair is refused with a story."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from tests.support.master_bench import MasterBench, held, spec
from zmqcluster.core.lifecycle import (
    BACKOFF_FIRST_MS,
    BACKOFF_MAX_MS,
    TASK_TRANSITIONS,
    TaskCause,
    advance,
    backoff_ms,
)
from zmqcluster.core.rows import TaskRow
from zmqcluster.errors import InvariantError
from zmqcluster.messages import CancelTasks, RetryTasks, TaskOrder
from zmqcluster.model import TERMINAL_STATES, JobId, Outcome, TaskId, TaskState

S, C = TaskState, TaskCause
Story = Callable[[MasterBench, TaskOrder], None]


def row(state: TaskState) -> TaskRow:
    return TaskRow(
        task_id=TaskId(7), job_id=JobId(0), parent_id=TaskId(0), task_type="noop", labels="",
        rate_key="", unique_key="", priority=5, max_retry_count=0, timeout_ms=1, created_wall=0,
        task_data=b"", state=state,
    )  # fmt: skip


@pytest.mark.parametrize("state", list(S))
@pytest.mark.parametrize("cause", list(C))
def test_every_pair_is_in_the_table_or_refused_with_the_story(
    state: TaskState, cause: TaskCause
) -> None:
    task = row(state)
    if (state, cause) in TASK_TRANSITIONS:
        advance(task, cause)
        assert task.state is TASK_TRANSITIONS[state, cause]
    else:
        with pytest.raises(InvariantError, match=rf"task 7 cannot go from {state} by {cause}"):
            advance(task, cause)
        assert task.state is state


def test_only_a_persons_order_leaves_a_terminal_state() -> None:
    ways_out = {cause for (state, cause) in TASK_TRANSITIONS if state in TERMINAL_STATES}

    assert ways_out == {C.REVIVED}
    assert (S.COMPLETED, C.REVIVED) not in TASK_TRANSITIONS


def lose(master: MasterBench, order: TaskOrder) -> None:
    master.loses("d1")
    master.advance(1_000)


def lose_running(master: MasterBench, order: TaskOrder) -> None:
    master.starts("d1", order)
    lose(master, order)


def late(outcome: Outcome) -> Story:
    """The device is lost, comes back with an end, and nobody else had the task meanwhile."""

    def story(master: MasterBench, order: TaskOrder) -> None:
        lose_running(master, order)
        master.device("d1", types=("other",), inventory=(held(order, phase=2),))
        master.ends("d1", order, outcome)

    return story


def late_and_poisoned(master: MasterBench, order: TaskOrder) -> None:
    for _ in range(2):
        master.ends("d1", order, Outcome.DIED)
        master.advance(10_000)
        [order] = master.orders("d1")
    master.loses("d1")
    master.advance(1_000)
    master.device("d1", types=("other",), inventory=(held(order, phase=2),))
    master.ends("d1", order, Outcome.DIED)


def adopted(master: MasterBench, order: TaskOrder) -> None:
    lose_running(master, order)
    master.device("d1", inventory=(held(order),))


def ended(outcome: Outcome, *, running: bool, times: int = 1) -> Story:
    def story(master: MasterBench, order: TaskOrder) -> None:
        for index in range(times):
            if index:
                master.beat("d1")
                master.advance(10_000)
                [order] = master.orders("d1")
            if running:
                master.starts("d1", order)
            master.ends("d1", order, outcome)

    return story


def cancelled(*, running: bool) -> Story:
    def story(master: MasterBench, order: TaskOrder) -> None:
        if running:
            master.starts("d1", order)
        master.changes(CancelTasks(b"c", (order.task_id,)))
        master.ends("d1", order, Outcome.CANCELLED)

    return story


def revived(first: Story) -> Story:
    def story(master: MasterBench, order: TaskOrder) -> None:
        first(master, order)
        master.device("d1", types=("other",))
        assert master.changes(RetryTasks(b"r", (order.task_id,))).task_ids == (order.task_id,)

    return story


# How the master as a whole gets along each row, and where the task is then.
STORIES: dict[tuple[TaskState, TaskCause], tuple[Story, int]] = {
    (S.PENDING, C.DISPATCHED): (lambda master, order: None, 0),
    (S.PENDING, C.ADOPTED): (adopted, 0),
    (S.PENDING, C.SUCCEEDED): (late(Outcome.COMPLETED), 0),
    (S.PENDING, C.FAILED): (late(Outcome.REJECTED), 0),
    (S.PENDING, C.POISONED): (late_and_poisoned, 0),
    (S.ASSIGNED, C.STARTED): (lambda master, order: master.starts("d1", order), 0),
    (S.ASSIGNED, C.SUCCEEDED): (ended(Outcome.COMPLETED, running=False), 0),
    (S.ASSIGNED, C.FAILED): (ended(Outcome.FAILED, running=False), 0),
    (S.ASSIGNED, C.RETRIED): (ended(Outcome.TIMED_OUT, running=False), 1),
    (S.ASSIGNED, C.LOST): (lose, 0),
    (S.ASSIGNED, C.POISONED): (ended(Outcome.DIED, running=False, times=3), 0),
    (S.ASSIGNED, C.CANCELLED): (cancelled(running=False), 0),
    (S.RUNNING, C.SUCCEEDED): (ended(Outcome.COMPLETED, running=True), 0),
    (S.RUNNING, C.FAILED): (ended(Outcome.RETRY, running=True), 0),
    (S.RUNNING, C.RETRIED): (ended(Outcome.FAILED, running=True), 1),
    (S.RUNNING, C.LOST): (lose_running, 0),
    (S.RUNNING, C.POISONED): (ended(Outcome.DIED, running=True, times=3), 0),
    (S.RUNNING, C.CANCELLED): (cancelled(running=True), 0),
    (S.FAILED, C.REVIVED): (revived(ended(Outcome.FAILED, running=True)), 0),
    (S.CANCELLED, C.REVIVED): (revived(cancelled(running=True)), 0),
    (S.DEAD, C.REVIVED): (revived(ended(Outcome.DIED, running=True, times=3)), 0),
}
# A device that returns an attempt gets it straight back, and one that never had a device is
# cancelled in test_core_requests.py: their ends are not where the table alone would leave them.
ELSEWHERE = {(S.ASSIGNED, C.RETURNED), (S.RUNNING, C.RETURNED), (S.PENDING, C.CANCELLED)}


@pytest.mark.parametrize("pair", sorted(STORIES))
def test_the_master_gets_along_each_row(pair: tuple[TaskState, TaskCause]) -> None:
    story, retries = STORIES[pair]
    master = MasterBench()
    master.device("d1")
    [task_id] = master.submit(spec(max_retry_count=retries)).task_ids
    [order] = master.orders("d1")

    story(master, order)

    assert master.state(task_id) is TASK_TRANSITIONS[pair]
    master.audit()


def test_every_row_has_a_story() -> None:
    assert STORIES.keys() | ELSEWHERE == TASK_TRANSITIONS.keys()


@pytest.mark.parametrize("running", [False, True])
def test_what_a_device_returns_is_nobodys_fault_and_goes_on(running: bool) -> None:
    master = MasterBench()
    master.device("d1")
    [task_id] = master.submit(spec(max_retry_count=0)).task_ids
    [order] = master.orders("d1")
    if running:
        master.starts("d1", order)

    master.leaves("d1")

    task = master.task(task_id)
    assert (task.state, task.failures, task.deaths) == (S.PENDING, 0, 0)
    assert master.store.assignments[task.task_id, 1].outcome == "returned"


def test_backoff_doubles_to_its_bound_and_at_least_half_of_it_is_certain() -> None:
    rng = Random(3)

    for failures in (1, 2, 5, 9, 30, 1_000):
        whole = min(BACKOFF_MAX_MS, BACKOFF_FIRST_MS * 2 ** min(failures - 1, 20))
        drawn = [backoff_ms(failures, rng) for _ in range(200)]
        assert whole // 2 <= min(drawn) < max(drawn) <= whole


def test_deaths_and_failures_are_counted_apart() -> None:
    master = MasterBench()
    master.device("d1")
    [task_id] = master.submit(spec(max_retry_count=1)).task_ids

    for outcome in (Outcome.DIED, Outcome.FAILED, Outcome.DIED):
        [order] = master.orders("d1")
        master.ends("d1", order, outcome, error="why")
        master.advance(2_100)

    task = master.task(task_id)
    assert (task.failures, task.deaths) == (1, 2)
    assert not task.state.is_terminal
    assert master.store.assignments[task.task_id, 2].error == "why"


def test_losing_a_device_that_had_not_begun_the_task_is_no_death_of_it() -> None:
    master = MasterBench()
    [task_id] = master.submit().task_ids

    for _ in range(4):
        master.device("d1", reboot=True)
        master.loses("d1")
        master.advance(1_000)

    assert master.task(task_id).deaths == 0
    assert master.state(task_id) is S.PENDING
