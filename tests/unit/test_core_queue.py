"""The window over the backlog: bounded, fair, and nothing in the database is forgotten."""

from __future__ import annotations

from collections import Counter
from itertools import count, pairwise

import pytest

from tests.support.master_bench import WALL_AT_ZERO, MasterBench, spec
from zmqcluster.core.events import LaneKey
from zmqcluster.core.queue import ReadyQueue
from zmqcluster.core.rates import RateKey
from zmqcluster.core.rows import TaskRow
from zmqcluster.core.settings import Settings
from zmqcluster.messages import CancelTasks, Held, RateRule, RetryTasks, Submit, TaskOrder, TaskSpec
from zmqcluster.model import JobId, Outcome, TaskId, TaskState

DAY_MS = 86_400_000
HOUR_MS = 3_600_000


def run_all(master: MasterBench, name: str = "d1", *, steps: int = 20_000) -> list[TaskOrder]:
    """End whatever the device is given until it is given nothing; in order."""
    done: list[TaskOrder] = []
    for _ in range(steps):
        orders = master.orders(name)
        if not orders:
            return done
        for order in orders:
            master.ends(name, order)
        done += orders
    raise AssertionError("it never ends")


def in_memory(master: MasterBench) -> int:
    return len(master.core.state.tasks)


# --- bounds -------------------------------------------------------------------------------------


def test_the_window_is_bounded_in_tasks_whatever_is_submitted() -> None:
    master = MasterBench(Settings(window_tasks=100, lane_tasks=50))
    master.audited_tasks_max = 0
    for index in range(10):
        master.submit(*[spec(rate_key=f"k{n % 9}", priority=index) for n in range(100)])
        assert in_memory(master) <= 100

    master.device("d1", slots=50)
    done = run_all(master)

    assert len({one.task_id for one in done}) == len(done) == 1_000
    master.forget()
    master.audit()


def test_the_window_is_bounded_however_many_are_retried_at_once() -> None:
    master = MasterBench(Settings(window_tasks=20, lane_tasks=20))
    task_ids = master.submit(*[spec() for _ in range(200)]).task_ids
    master.changes(CancelTasks(b"cancel", task_ids))

    changed = master.changes(RetryTasks(b"retry", task_ids))

    assert changed.task_ids == task_ids
    assert in_memory(master) <= 20
    master.device("d1", slots=50)
    assert sorted(one.task_id for one in run_all(master)) == list(task_ids)
    master.audit()


def test_the_window_is_bounded_however_many_lost_attempts_are_given_back_late() -> None:
    master = MasterBench(Settings(window_tasks=5, lane_tasks=5))
    master.device("d1", slots=40)
    task_ids = master.submit(*[spec() for _ in range(40)]).task_ids
    orders = master.orders("d1")
    assert len(orders) == 40
    master.restart()
    master.advance(master.settings.device_timeout_ms)
    # What was given up is on disk alone now.
    master.restart()
    assert in_memory(master) <= 5

    master.device("d1", slots=40, credit=0)
    for order in orders:
        master.ends("d1", order, Outcome.RETURNED)

    assert in_memory(master) <= 5
    master.device("d2", slots=50)
    assert sorted(one.task_id for one in run_all(master, "d2")) == list(task_ids)
    master.audit()


def test_the_window_is_bounded_in_bytes() -> None:
    master = MasterBench(Settings(window_bytes=200_000))
    master.submit(*[spec(data=bytes(10_000), rate_key=f"k{n % 4}") for n in range(100)])
    assert in_memory(master) <= 20

    master.device("d1", slots=4)

    assert len(run_all(master)) == 100


def test_more_lanes_than_allowed_all_get_their_turn() -> None:
    master = MasterBench(Settings(lanes=8))
    master.submit(*[spec(rate_key=f"k{n}") for n in range(200)])
    assert len(master.core.state.queue.lanes) <= 8

    master.device("d1", slots=3)

    assert len(run_all(master)) == 200
    master.audit()


def test_lanes_that_ran_empty_make_room_though_nothing_is_left_in_memory() -> None:
    # Found by the state machine: nobody looked at the lanes of an empty queue again.
    master = MasterBench(Settings(lanes=4))
    master.submit(*[spec(rate_key=f"k{n}") for n in range(9)])
    in_lanes = [one for one in master.store.tasks if one in master.core.state.tasks]

    master.changes(CancelTasks(b"c", tuple(in_lanes)))
    master.device("d1", slots=9)
    master.advance(1_000)

    assert len(run_all(master)) == 9 - len(in_lanes)


def test_stale_entries_of_cancelled_tasks_do_not_pile_up() -> None:
    master = MasterBench()
    master.audited_tasks_max = 0
    master.submit()
    for number in range(40):
        answer = master.submit(*[spec() for _ in range(50)])
        master.changes(CancelTasks(b"c%d" % number, answer.task_ids))
        later = WALL_AT_ZERO + HOUR_MS
        answer = master.submit(*[spec(not_before_ms=later) for _ in range(50)])
        master.changes(CancelTasks(b"d%d" % number, answer.task_ids))

    [lane] = master.core.state.queue.lanes.values()
    assert len(lane.tasks) <= 64 + 2 * 50
    assert len(master.core.state.delays._heap) <= 64 + 2 * 50
    assert master.core.state.departed == {}


def test_empty_lanes_do_not_pile_up_in_the_rotations() -> None:
    queue = ReadyQueue(1_000, 10**9, 100, 1_000)
    keep = queue.lane(LaneKey("noop", "", "keep", 5), None, 0)
    assert keep is not None
    queue.push(row(1), keep)

    for index in range(2, 2_000):
        lane = queue.lane(LaneKey("noop", "", f"k{index}", 5), None, 0)
        assert lane is not None
        queue.push(row(index), lane)
        queue.remove(lane.tasks[0])
        queue.sweep()

    assert len(queue.lanes) == 1
    assert len(keep.shape.rotations[5]) < 100
    popped = queue.pop(keep.shape, 5, 0)
    assert popped is not None
    assert popped.task_id == 1


def test_a_lane_that_ran_dry_and_then_empty_is_not_read_before_its_key_opens() -> None:
    queue = ReadyQueue(8, 10**9, 4, 1_000)
    rate = RateKey("k")
    other = queue.lane(LaneKey("noop", "", "", 5), None, 0)
    lane = queue.lane(LaneKey("noop", "", "k", 9), rate, 0)
    assert lane is not None
    assert other is not None
    for task_id in range(1, 7):
        queue.push(row(task_id), other)
    for task_id in (7, 8, 9):
        queue.push(row(task_id), lane)
    lane.more = True
    for _ in range(3):
        assert queue.pop(lane.shape, 9, 0) is not None
    rate.closed_until_ms = 10_000

    assert list(queue.refills(1)) == []
    queue.reopen(rate)
    assert [one for one, _ in queue.refills(10_000)] == [lane]
    queue.loaded(lane, 9, more=False)

    assert list(queue.lanes.values()) == [other]
    assert queue.starving == 0


def row(task_id: int) -> TaskRow:
    return TaskRow(
        task_id=TaskId(task_id), job_id=JobId(0), parent_id=TaskId(0), task_type="noop",
        labels="", rate_key="", unique_key="", priority=5, max_retry_count=0, timeout_ms=1,
        created_wall=0, task_data=b"",
    )  # fmt: skip


# --- fairness -----------------------------------------------------------------------------------


def test_a_thousand_keys_get_equal_shares_whatever_their_backlogs() -> None:
    master = MasterBench(Settings(window_tasks=3_000, lane_tasks=500))
    master.audited_tasks_max = 0
    # One key is there first, with more than all others together.
    master.submit(*[spec(rate_key="flood") for _ in range(6_000)])
    master.submit(*[spec(rate_key=f"k{n % 999}") for n in range(1_998)])
    master.device("d1", slots=1_000)

    first = Counter(master.task(one.task_id).rate_key for one in master.orders("d1"))

    assert len(first) == 1_000
    assert set(first.values()) == {1}


def test_a_closed_key_blocks_nobody_however_much_of_it_fills_the_window() -> None:
    master = MasterBench(Settings(window_tasks=60, lane_tasks=60))
    rules = tuple(RateRule(f"slow{n}", closed_for_ms=DAY_MS) for n in range(5))
    master.submit(*[spec(rate_key=f"slow{n % 5}") for n in range(500)], rates=rules)
    master.device("d1", slots=2)
    assert master.orders("d1") == []

    fast = master.submit(*[spec(rate_key="fast") for _ in range(30)])
    master.advance(2_000)

    assert {one.task_id for one in run_all(master)} == set(fast.task_ids)


def test_closed_keys_with_large_tasks_block_nobody_either() -> None:
    master = MasterBench(Settings(window_bytes=100_000))
    rules = tuple(RateRule(f"slow{n}", closed_for_ms=DAY_MS) for n in range(3))
    large = [spec(data=bytes(10_000), rate_key=f"slow{n % 3}") for n in range(60)]
    master.submit(*large, rates=rules)
    master.device("d1")

    fast = master.submit(*[spec(data=bytes(5_000), rate_key="fast") for _ in range(5)])
    done: list[TaskOrder] = []
    for _ in range(20):
        master.advance(500)
        done += run_all(master)

    assert {one.task_id for one in done} == set(fast.task_ids)


def served_within(master: MasterBench, ms: int) -> list[int]:
    """Tasks d1 is given and ends in that time, in order."""
    end_ms, seen = master.now_ms + ms, []
    while master.now_ms < end_ms:
        seen += [one.task_id for one in run_all(master)]
        master.advance(500)
        master.beat("d1", seq=1)
    return seen


@pytest.mark.parametrize("data", [b"\x80", bytes(30_000)])
@pytest.mark.parametrize("is_restarted", [False, True])
def test_more_closed_keys_than_there_are_lanes_block_nobody(
    is_restarted: bool, data: bytes
) -> None:
    master = MasterBench(Settings(lanes=8, window_bytes=100_000))
    closed = tuple(RateRule(f"closed{n}", closed_for_ms=HOUR_MS) for n in range(20))
    master.submit(*[spec(data=data, rate_key=one.rate_key) for one in closed], rates=closed)
    wanted = master.submit(*[spec(rate_key=f"open{n}") for n in range(3)]).task_ids
    if is_restarted:
        master.restart()
    master.device("d1", slots=9)

    assert {*served_within(master, 60_000)} == {*wanted}
    assert len(master.core.state.queue.lanes) <= 8
    master.advance(HOUR_MS, step_ms=4_000)
    master.device("d1", slots=9, reboot=True)
    assert len(served_within(master, 60_000)) == 20
    master.forget()
    master.audit()


def test_more_labels_nobody_has_than_there_are_lanes_block_nobody() -> None:
    master = MasterBench(Settings(lanes=8))
    master.submit(*[spec(labels=(f"nobody{n}",), priority=9) for n in range(40)])
    wanted = master.submit(*[spec(priority=n) for n in (2, 4)]).task_ids
    master.device("d1", slots=9)

    assert {*served_within(master, 60_000)} == {*wanted}


def test_more_lanes_of_a_low_priority_than_allowed_keep_no_high_one_waiting() -> None:
    master = MasterBench(Settings(lanes=8))
    master.submit(*[spec(rate_key=f"k{n}", priority=4) for n in range(40)])
    master.advance(1_000)
    [wanted] = master.submit(spec(priority=5)).task_ids

    master.device("d1")

    assert master.orders("d1")[0].task_id == wanted
    assert len(master.core.state.queue.lanes) <= 8


def test_a_delayed_task_that_falls_due_is_not_kept_out_by_a_full_window() -> None:
    master = MasterBench(Settings(window_tasks=20, lane_tasks=20))
    rule = RateRule("slow", closed_for_ms=DAY_MS)
    master.submit(*[spec(rate_key="slow") for _ in range(200)], rates=(rule,))
    due = master.submit(spec(not_before_ms=WALL_AT_ZERO + 3_000))
    master.device("d1")

    master.advance(5_000)

    assert [one.task_id for one in master.orders("d1")] == [*due.task_ids]


def test_a_full_window_of_due_tasks_does_not_keep_the_loop_awake() -> None:
    master = MasterBench(Settings(window_tasks=20, lane_tasks=20, delayed_tasks=10))
    master.submit(*[spec(not_before_ms=WALL_AT_ZERO + 3_000) for _ in range(100)])
    for _ in range(20):
        master.advance(500)

    turn = master.turn()

    wake_ms = master.core.next_wake_ms()
    assert turn.actions == []
    assert wake_ms is None or wake_ms > master.now_ms


def test_priorities_come_before_fairness_and_survive_the_window() -> None:
    master = MasterBench(Settings(window_tasks=150, lane_tasks=50))
    master.submit(*[spec(priority=n % 10, rate_key=f"k{n % 3}") for n in range(600)])
    master.device("d1", slots=1)

    done = [master.task(one.task_id).priority for one in run_all(master)]

    assert len(done) == 600
    misplaced = sum(a < b for a, b in pairwise(done))
    assert misplaced <= 30, "now and then the best is still being read"


# --- moments ------------------------------------------------------------------------------------


def delayed(after_ms: int) -> TaskSpec:
    return spec(not_before_ms=WALL_AT_ZERO + after_ms)


@pytest.mark.parametrize("is_restarted", [False, True])
def test_schedules_beyond_memory_run_on_time_and_in_order(is_restarted: bool) -> None:
    master = MasterBench(Settings(delayed_tasks=10))
    moments: dict[int, int] = {}
    for after_ms in (60_000, 20_000, 40_000, 10_000, 50_000, 30_000):
        answer = master.submit(*[delayed(after_ms) for _ in range(9)])
        moments |= dict.fromkeys(answer.task_ids, after_ms)
    if is_restarted:
        master.restart()
    assert in_memory(master) <= 10
    master.device("d1", slots=100)
    seen: dict[int, int] = {}

    while master.now_ms < 62_000:
        master.advance(500)
        for order in run_all(master):
            seen[order.task_id] = master.now_ms
        master.beat("d1")

    assert seen.keys() == moments.keys()
    assert all(moments[one] <= at_ms <= moments[one] + 1_000 for one, at_ms in seen.items())


def test_a_schedule_in_the_past_is_at_once_beyond_the_window_too() -> None:
    master = MasterBench(Settings(window_tasks=10, lane_tasks=10))
    master.submit(*[delayed(-1_000) for _ in range(100)])

    master.device("d1", slots=3)

    assert len(run_all(master)) == 100


def test_many_tasks_of_the_same_moment_all_run() -> None:
    master = MasterBench(Settings(delayed_tasks=8, window_tasks=20, lane_tasks=20, lanes=2))
    master.audited_tasks_max = 0
    master.submit(*[spec(rate_key=f"k{n % 5}", not_before_ms=WALL_AT_ZERO + 5_000)
                    for n in range(300)])  # fmt: skip
    master.advance(6_000)
    master.device("d1", slots=7)

    done = run_all(master)
    for _ in range(40):
        master.advance(500)
        done += run_all(master)
        master.beat("d1")

    assert len(done) == 300
    master.audit()


def test_large_tasks_that_wait_for_their_moment_are_bounded_by_bytes() -> None:
    settings = Settings(delayed_bytes=20_000, window_bytes=20_000)
    master = MasterBench(settings)
    master.audited_tasks_max = 0
    large = spec(data=b"\xc4" + b"x" * 4_000, not_before_ms=WALL_AT_ZERO + 5_000)
    for _ in range(10):
        master.submit(*[large] * 10)
        assert bytes_in_memory(master) <= settings.delayed_bytes
    # All are due at once, and nobody takes them.
    for _ in range(20):
        master.advance(500)
        assert bytes_in_memory(master) <= settings.delayed_bytes + settings.window_bytes + 4_601

    master.device("d1", slots=7)
    done = run_all(master)
    for _ in range(40):
        master.advance(500)
        done += run_all(master)
        master.beat("d1")

    assert len(done) == 100
    master.audit()


def bytes_in_memory(master: MasterBench) -> int:
    return sum(one.memory_bytes for one in master.core.state.tasks.values())


def test_tasks_that_fall_due_again_and_again_do_not_fill_memory_beyond_the_window() -> None:
    master = MasterBench(Settings(window_tasks=20, lane_tasks=20, delayed_tasks=30))
    master.audited_tasks_max = 0

    for _ in range(20):
        wall_ms = WALL_AT_ZERO + master.now_ms
        master.submit(*[spec(not_before_ms=wall_ms + 300) for _ in range(25)])
        master.advance(500)
        assert in_memory(master) <= 20 + 30

    master.device("d1", slots=50)
    done = run_all(master)
    for _ in range(60):
        master.advance(500)
        done += run_all(master)
        master.beat("d1")
    assert len(done) == 500
    master.audit()


def test_retries_beyond_memory_are_not_forgotten() -> None:
    master = MasterBench(Settings(delayed_tasks=6))
    master.device("d1", slots=50)
    master.submit(*[spec(max_retry_count=3) for _ in range(50)])
    serial = count()
    for order in master.orders("d1"):
        wait_ms = 10_000 + 500 * (next(serial) % 7)
        master.ends("d1", order, Outcome.RETRY, retry_after_ms=wait_ms)
    assert in_memory(master) <= 6
    done = []

    for _ in range(40):
        master.advance(500)
        done += run_all(master)
        master.beat("d1")

    assert len(done) == 50


def test_what_went_to_the_database_while_it_was_read_is_found() -> None:
    master = MasterBench(Settings(delayed_tasks=4))
    master.submit(*[delayed(10_000 + n) for n in range(6)])
    master.device("d1", slots=50)
    # The read is decided; its answer will not know of what is decided before it comes.
    master.advance(9_900, step_ms=450)
    master.commits = False
    master.now_ms = 10_003
    master.turn()
    master.hears("client", Submit(b"late", tuple(delayed(10_100 + n) for n in range(6))))
    master.commits = True
    done = []

    for _ in range(10):
        master.advance(100)
        done += run_all(master)

    assert len(done) == 12


@pytest.mark.parametrize("step_ms", [DAY_MS, -DAY_MS])
def test_wall_clock_steps_move_user_schedules_and_nothing_else(step_ms: int) -> None:
    master = MasterBench(Settings(delayed_tasks=4))
    master.device("d1", slots=50)
    master.submit(*[delayed(HOUR_MS + n) for n in range(8)])
    master.submit(spec(unique_key="retry", max_retry_count=3), spec(unique_key="run"))
    retried, running = sorted(master.orders("d1"), key=lambda one: one.task_id)
    master.ends("d1", retried, Outcome.RETRY, retry_after_ms=20_000)

    master.wall_step_ms = step_ms
    scheduled: list[TaskOrder] = []
    for _ in range(38):
        master.advance(500)
        scheduled += master.orders("d1")
        master.beat("d1", *[_running(one) for one in (running, *scheduled)])
    master.advance(2_000)
    last = master.orders("d1")

    assert "device_lost" not in master.event_kinds()
    assert master.task(running.task_id).attempt == 1
    assert len(scheduled) == (8 if step_ms > 0 else 0)
    assert [one.task_id for one in last] == [retried.task_id]
    master.forget()


def _running(order: TaskOrder) -> Held:
    return Held(order.task_id, order.attempt, 1)


def test_a_slow_drift_of_the_wall_clock_adds_up() -> None:
    master = MasterBench()
    master.device("d1")
    master.submit(delayed(60_000))

    # The wall clock gains a tenth: it shows the minute after 54.5 s.
    while not master.orders("d1"):
        master.wall_step_ms += 50
        master.advance(500)
        master.beat("d1")

    assert 54_000 <= master.now_ms <= 56_000


def test_a_restart_with_everything_in_every_place_loses_nothing() -> None:
    master = MasterBench(Settings(window_tasks=12, lane_tasks=6, delayed_tasks=4, lanes=3))
    master.device("d1", slots=3)
    master.submit(*[spec(rate_key=f"k{n % 6}", priority=n % 3) for n in range(60)])
    master.submit(*[delayed(20_000 + n) for n in range(20)])
    master.orders("d1")

    for _ in range(3):
        master.restart()
        master.audit()
    master.device("d1", slots=3)
    done = 0
    for _ in range(50):
        done += len(run_all(master))
        master.advance(500)
        master.beat("d1")

    assert done == 80
    assert {one.state for one in master.store.tasks.values()} == {TaskState.COMPLETED}
