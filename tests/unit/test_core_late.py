"""Words that come late or from the wrong mouth, and reads older than what is decided."""

from __future__ import annotations

import pytest

from tests.support.master_bench import WALL_AT_ZERO, MasterBench, held, spec
from zmqcluster.core.events import LaneKey
from zmqcluster.core.queue import ReadyQueue
from zmqcluster.core.rows import TaskRow
from zmqcluster.core.settings import Settings
from zmqcluster.core.state import PEER_EVENTS_A_SECOND
from zmqcluster.messages import (
    AttemptRef,
    CancelTasks,
    Capabilities,
    Changed,
    HeartbeatAck,
    Hello,
    Results,
    RetryTasks,
    Submit,
    TaskOrder,
    TaskResult,
    TaskSpec,
    Welcome,
)
from zmqcluster.model import PROTOCOL_VERSION, JobId, JobState, Outcome, TaskId, TaskState


@pytest.fixture
def master() -> MasterBench:
    return MasterBench()


def one(master: MasterBench, name: str) -> TaskOrder:
    [order] = master.orders(name)
    return order


def lost_twice(master: MasterBench) -> tuple[TaskOrder, TaskOrder]:
    """A task that d1 had twice, lost twice, and that waits for a third attempt."""
    master.device("d1")
    master.submit()
    first = one(master, "d1")
    master.loses("d1")
    master.advance(1_000)
    master.device("d1")
    second = one(master, "d1")
    master.loses("d1")
    master.advance(1_000)
    assert master.state(second.task_id) is TaskState.PENDING
    return first, second


# --- attempts nobody holds any more -------------------------------------------------------------


def test_the_end_of_an_attempt_before_the_last_is_fenced(master: MasterBench) -> None:
    first, second = lost_twice(master)
    master.device("d1", types=("other",))

    master.ends("d1", first, result=b"\x01")
    assert master.state(first.task_id) is TaskState.PENDING
    assert "result_fenced" in master.event_kinds()
    master.ends("d1", second, result=b"\x02")

    assert master.task(second.task_id).result == b"\x02"


def test_the_end_of_the_last_attempt_counts_from_its_holder_alone(master: MasterBench) -> None:
    _, second = lost_twice(master)
    master.device("d2", types=("other",))

    master.ends("d2", second)

    assert master.state(second.task_id) is TaskState.PENDING
    assert "result_fenced" in master.event_kinds()


def test_the_end_of_a_task_that_waits_on_disk_alone_counts_with_its_children() -> None:
    master = MasterBench(Settings(window_tasks=5, lane_tasks=5))
    master.device("d1", slots=40)
    accepted = master.submit(*[spec(unique_key=f"/{n}") for n in range(40)], job="j")
    orders = master.orders("d1")
    master.restart()
    master.advance(master.settings.device_timeout_ms)
    master.restart()
    master.device("d1", slots=40, credit=0)
    late = orders[-1]
    assert late.task_id not in master.core.state.tasks

    master.ends("d1", late, children=(spec(unique_key="/7"), spec(unique_key="/new")))

    assert master.task(late.task_id).state is TaskState.COMPLETED
    assert len(master.store.tasks) == len(accepted.task_ids) + 1
    assert "result_fenced" not in master.event_kinds()
    master.audit()


def test_a_run_before_the_last_is_not_adopted(master: MasterBench) -> None:
    first, second = lost_twice(master)

    [welcome] = master.device("d1", types=("noop", "other"), inventory=(held(first),))

    assert isinstance(welcome, Welcome)
    assert welcome.abort == (AttemptRef(first.task_id, first.attempt),)
    assert one(master, "d1").attempt == second.attempt + 1


def test_a_run_is_adopted_from_its_holder_alone(master: MasterBench) -> None:
    _, second = lost_twice(master)

    # It could run it, if it were asked to; here it says that it does already.
    [welcome] = master.device("d2", inventory=(held(second),))

    assert isinstance(welcome, Welcome)
    assert welcome.abort == (AttemptRef(second.task_id, second.attempt),)
    assert one(master, "d2").attempt == second.attempt + 1


def test_an_assign_that_arrived_and_is_not_listed_is_made_up_for_at_once(
    master: MasterBench,
) -> None:
    master.device("d1")
    master.submit()
    assert one(master, "d1").attempt == 1

    master.beat("d1", assign_seq=1)

    assert one(master, "d1").attempt == 2
    assert master.take("d1", HeartbeatAck).abort == ()


def test_a_late_failure_makes_the_task_wait_as_any_failure_does(master: MasterBench) -> None:
    master.device("d1")
    [task_id] = master.submit().task_ids
    order = one(master, "d1")
    master.loses("d1")
    master.advance(1_000)
    master.device("d1", types=("other",))

    master.ends("d1", order, Outcome.RETRY, retry_after_ms=20_000)
    master.device("d2")
    master.advance(10_000)
    assert master.orders("d2") == []
    master.beat("d2")
    master.advance(10_500)

    assert one(master, "d2").attempt == 2
    assert master.task(task_id).failures == 1


def test_a_late_completion_in_the_batch_of_its_jobs_cancel_is_discarded(
    master: MasterBench,
) -> None:
    master.device("d1")
    job = master.submit(job="j")
    order = one(master, "d1")
    master.loses("d1")
    master.advance(1_000)
    master.device("d1", types=("other",))
    cancel = master.received("client", CancelTasks(b"c", job_id=job.job_id))
    end = TaskResult(order.task_id, order.attempt, Outcome.COMPLETED, b"\x01")

    master.turn(cancel, master.received("d1", Results((end,))))

    assert isinstance(master.take("client", Changed), Changed)
    assert master.state(order.task_id) is TaskState.CANCELLED
    assert master.task(order.task_id).result == b""
    assert "result_discarded" in master.event_kinds()


def test_a_sweep_alone_closes_a_large_job_page_by_page() -> None:
    master = MasterBench(Settings(window_tasks=16, lane_tasks=16))
    master.audited_tasks_max = 0
    job = master.submit(*[spec() for _ in range(3_500)], job="j")

    master.changes(CancelTasks(b"c", job_id=job.job_id))

    row = master.store.jobs[JobId(job.job_id)]
    assert (row.state, row.pending, row.cancelled) == (JobState.CANCELLED, 0, 3_500)
    assert master.core.state.tasks == {}
    master.audit()


# --- reads older than decisions -----------------------------------------------------------------


def test_a_refill_under_way_does_not_hide_what_was_spilled_meanwhile() -> None:
    queue = ReadyQueue(window_tasks=4, window_bytes=10**9, lane_tasks=4, lanes=4)
    lane = queue.lane(LaneKey("noop", "", "", 5), None, 0)
    assert lane is not None
    taken = [queue.admit(row(task_id), lane) for task_id in range(1, 6)]
    assert taken == [True, True, False, False, False]
    while queue.pop(lane.shape, 5, 0) is not None:
        pass
    [(hungry, _)] = queue.refills(0)
    assert hungry is lane

    assert not queue.admit(row(6), lane)
    # The answer knows of tasks up to 5.
    queue.loaded(lane, 5, more=False)

    assert lane.more
    assert [one for one, _ in queue.refills(0)] == [lane]


def test_a_refill_under_way_does_not_hide_what_was_retried_meanwhile() -> None:
    queue = ReadyQueue(window_tasks=2, window_bytes=10**9, lane_tasks=4, lanes=4)
    lane = queue.lane(LaneKey("noop", "", "", 5), None, 0)
    assert lane is not None
    for task_id in range(2, 12):
        queue.admit(row(task_id), lane)
    while queue.pop(lane.shape, 5, 0) is not None:
        pass
    assert [limit for _, limit in queue.refills(0)] == [1]

    assert [queue.readmit(row(one), lane) for one in (12, 1)] == [True, False]
    # The answer does not know of the first task.
    queue.loaded(lane, 11, more=False)

    assert (lane.more, lane.cursor) == (True, 0)


def row(task_id: int) -> TaskRow:
    return TaskRow(
        task_id=TaskId(task_id), job_id=JobId(0), parent_id=TaskId(0), task_type="noop",
        labels="", rate_key="", unique_key="", priority=5, max_retry_count=0, timeout_ms=1,
        created_wall=0, task_data=b"",
    )  # fmt: skip


def test_a_listing_under_way_does_not_hide_a_lane_that_found_no_room_meanwhile() -> None:
    master = MasterBench(Settings(lanes=1))
    first, second = master.submit(spec(rate_key="a"), spec(rate_key="b")).task_ids
    master.commits = False
    # The one lane gets free, so the others are asked for: there will be none ...
    master.hears("client", CancelTasks(b"1", (first, second)))
    asked = master.pending_turns
    # ... and before the answer comes, it is taken, and another task finds no room.
    master.hears("client", Submit(b"2", (spec(rate_key="c"), spec(rate_key="d"))))
    master.commit_some(asked)
    master.commits = True
    master.commit()
    master.forget()

    master.device("d1", slots=9)
    done: list[int] = []
    for _ in range(5):
        for order in master.orders("d1"):
            master.ends("d1", order)
            done.append(order.task_id)
        master.advance(500)

    assert sorted(done) == [second + 1, second + 2]
    master.audit()


def test_a_delayed_read_under_way_does_not_hide_what_was_left_out_meanwhile() -> None:
    master = MasterBench(Settings(delayed_tasks=4))
    master.device("d1", slots=99)
    answer = master.submit(*[delayed(5_000 + n) for n in range(5)])
    # Two of five are in memory; of the three others one is left.
    master.changes(CancelTasks(b"1", answer.task_ids[3:]))
    master.advance(4_900)
    master.commits = False
    master.now_ms = 5_050
    master.turn()
    asked = master.pending_turns
    # The answer brings the one and says that it is the last; it does not know of these.
    master.hears("client", Submit(b"2", tuple(delayed(5_100 + n) for n in range(3))))
    master.commit_some(asked)
    master.commits = True
    master.commit()

    done = 0
    for _ in range(4):
        for order in master.orders("d1"):
            master.ends("d1", order)
            done += 1
        master.advance(500)

    assert done == 6


def delayed(after_ms: int) -> TaskSpec:
    return spec(not_before_ms=WALL_AT_ZERO + after_ms)


def test_a_schedule_in_the_past_gets_no_room_that_others_do_not_get() -> None:
    master = MasterBench(Settings(window_tasks=10, lane_tasks=10))

    master.submit(*[spec(not_before_ms=WALL_AT_ZERO - 1_000) for _ in range(100)])

    assert len(master.core.state.tasks) <= 10


def test_a_key_whose_tasks_were_cancelled_is_forgotten(master: MasterBench) -> None:
    answer = master.submit(*[spec(rate_key=f"site{n}") for n in range(20)])
    assert len(master.core.state.rates) == 20

    master.changes(CancelTasks(b"c", answer.task_ids))

    assert len(master.core.state.rates) == 0


def test_a_slow_drift_counts_from_the_last_step(master: MasterBench) -> None:
    for _ in range(30):
        master.wall_step_ms += 40
        master.advance(500)

    assert master.event_kinds().count("wall_clock_stepped") == 2


def test_one_devices_mistakes_cost_a_bounded_number_of_rows(master: MasterBench) -> None:
    master.device("d1")

    for attempt in range(1, 200):
        stale = TaskResult(task_id=999, attempt=attempt, outcome=Outcome.COMPLETED)
        master.hears("d1", Results((stale,)))

    assert master.event_kinds().count("result_fenced") == PEER_EVENTS_A_SECOND
    assert master.core.state.counters["result_fenced"] == 199


def test_one_key_under_many_names_costs_no_more_rows_than_under_one(master: MasterBench) -> None:
    master.device("d1")

    for index in range(200):
        name = f"other-{index}"
        hello = Hello(PROTOCOL_VERSION, name, bytes(16), name, Capabilities(), (), (), (), credit=1)
        master.hears("d1", hello)

    assert master.event_kinds().count("hello_refused") == PEER_EVENTS_A_SECOND
    assert master.core.state.counters["hello_refused"] == 200
    master.forget()


def test_completed_task_does_not_show_what_went_wrong_before(master: MasterBench) -> None:
    master.device("d1")
    [task_id] = master.submit().task_ids
    master.ends("d1", master.orders("d1")[0], Outcome.FAILED, error="boom")
    master.advance(2_000)

    master.ends("d1", master.orders("d1")[0])

    assert master.state(task_id) is TaskState.COMPLETED
    assert master.task(task_id).error == ""


def test_setting_the_clock_forward_prunes_nothing(master: MasterBench) -> None:
    master.advance(20_000)
    before = master.core.state.wall_ms
    master.wall_step_ms = 30 * 24 * 3_600_000

    master.commits = False
    cuts = []
    for _ in range(60):
        master.now_ms += 500
        cuts.append(master.turn(master._tick()).changes.prune_before_wall)

    retention_ms = master.settings.retention_ms
    assert any(cuts)
    assert max(cuts) <= before + 60_000 - retention_ms


# --- words that come twice ----------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.RETRY, Outcome.DIED])
def test_an_end_that_is_told_twice_counts_once(master: MasterBench, outcome: Outcome) -> None:
    master.device("d1")
    master.submit(spec(max_retry_count=3))
    order = one(master, "d1")
    master.ends("d1", order, outcome)
    once = (master.task(1).failures, master.task(1).deaths)

    master.ends("d1", order, outcome)

    assert (master.task(1).failures, master.task(1).deaths) == once
    assert master.state(1) is TaskState.PENDING
    assert master.event_kinds()[-1] == "result_fenced"


def test_a_death_that_was_none_is_taken_back(master: MasterBench) -> None:
    master.device("d1")
    master.submit(spec(max_retry_count=3))
    order = one(master, "d1")
    master.starts("d1", order)
    master.loses("d1")
    master.advance(1_000)
    assert master.task(1).deaths == 1

    master.device("d1", inventory=(held(order),))

    assert (master.state(1), master.task(1).deaths) == (TaskState.RUNNING, 0)


def test_a_late_failure_of_an_attempt_that_counted_as_dead_is_a_failure(
    master: MasterBench,
) -> None:
    master.device("d1")
    master.submit(spec(max_retry_count=3))
    order = one(master, "d1")
    master.starts("d1", order)
    master.loses("d1")
    master.advance(1_000)

    master.device("d1", types=("other",))
    master.ends("d1", order, Outcome.FAILED)

    assert (master.task(1).failures, master.task(1).deaths) == (1, 0)


def test_a_retry_that_is_asked_again_does_not_undo_a_later_cancel(master: MasterBench) -> None:
    master.submit()
    master.changes(CancelTasks(b"first", (1,)))
    answer = master.changes(RetryTasks(b"retry", (1,)))
    master.changes(CancelTasks(b"second", (1,)))

    again = master.changes(RetryTasks(b"retry", (1,)))

    assert again == answer
    assert master.state(1) is TaskState.CANCELLED


def test_a_cancel_that_is_asked_again_after_a_restart_spares_the_next_life(
    master: MasterBench,
) -> None:
    master.submit()
    answer = master.changes(CancelTasks(b"cancel", (1,)))
    master.changes(RetryTasks(b"retry", (1,)))
    master.restart()

    again = master.changes(CancelTasks(b"cancel", (1,)))

    assert again == answer
    assert master.state(1) is TaskState.PENDING
