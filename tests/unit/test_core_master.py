"""The master's promises, decided in virtual time."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.support.master_bench import MasterBench, held, spec
from zmqcluster.core.settings import Settings
from zmqcluster.messages import (
    Abort,
    CancelTasks,
    HeartbeatAck,
    RateRule,
    ResultAck,
    RetryTasks,
    Submit,
    TaskOrder,
    Welcome,
)
from zmqcluster.model import Outcome, TaskState

LEASE_MS = Settings().device_timeout_ms
BEAT_MS = Settings().heartbeat_interval_ms


@pytest.fixture
def master() -> MasterBench:
    return MasterBench()


def one_order(master: MasterBench, name: str) -> TaskOrder:
    [order] = master.orders(name)
    return order


def test_a_task_goes_to_a_device_and_its_result_counts(master: MasterBench) -> None:
    master.device("d1")
    [task_id] = master.submit().task_ids

    order = one_order(master, "d1")
    master.ends("d1", order, result=b"\x2a")

    assert order.task_id == task_id
    assert order.attempt == 1
    assert master.state(task_id) is TaskState.COMPLETED
    assert master.task(task_id).result == b"\x2a"
    assert [type(one) for one in master.takes("d1")] == [ResultAck]


def test_nothing_leaves_before_the_commit(master: MasterBench) -> None:
    master.device("d1")
    master.commits = False

    master.hears("client", Submit(b"r", (spec(),)))

    assert master.sends == []
    master.commit()
    assert len(master.sends) == 2


def test_busy_device_that_falls_silent_gives_its_task_back(master: MasterBench) -> None:
    master.device("d1")
    master.device("d2", types=("other",))
    [task_id] = master.submit().task_ids
    first = one_order(master, "d1")
    master.starts("d1", first)

    for _ in range(4):
        master.advance(BEAT_MS)
        master.beat("d2")
    master.device("d3")

    assert one_order(master, "d3").attempt == 2
    assert master.state(task_id) is TaskState.ASSIGNED
    assert "device_lost" in master.event_kinds()


def test_stale_attempt_is_fenced(master: MasterBench) -> None:
    master.device("d1")
    [task_id] = master.submit().task_ids
    first = one_order(master, "d1")
    master.loses("d1")
    master.advance(1_000)
    master.device("d2")
    second = one_order(master, "d2")
    master.device("d1")

    master.ends("d1", first, result=b"\x01")

    assert master.state(task_id) is TaskState.ASSIGNED
    assert "result_fenced" in master.event_kinds()
    master.ends("d2", second, result=b"\x02")
    assert master.task(task_id).result == b"\x02"


def test_late_result_that_nobody_superseded_is_salvaged(master: MasterBench) -> None:
    master.device("d1")
    [task_id] = master.submit().task_ids
    order = one_order(master, "d1")
    master.loses("d1")
    master.advance(1_000)
    assert master.state(task_id) is TaskState.PENDING
    master.device("d1", types=("other",), inventory=(held(order, phase=2),))

    master.ends("d1", order, result=b"\x07")

    assert master.state(task_id) is TaskState.COMPLETED
    assert master.task(task_id).result == b"\x07"


def test_restarted_master_adopts_what_still_runs(master: MasterBench) -> None:
    master.device("d1")
    [task_id] = master.submit().task_ids
    order = one_order(master, "d1")
    master.starts("d1", order)

    master.restart()
    [welcome] = master.device("d1", inventory=(held(order),))

    assert isinstance(welcome, Welcome)
    assert welcome.epoch == 2
    assert welcome.abort == ()
    assert master.orders("d1") == []
    master.ends("d1", order)
    assert master.state(task_id) is TaskState.COMPLETED
    assert master.task(task_id).attempt == 1


def test_running_work_nobody_claims_after_a_restart_runs_again(master: MasterBench) -> None:
    master.device("d1")
    [task_id] = master.submit().task_ids
    master.orders("d1")
    master.restart()
    master.device("d2")

    for _ in range(4):
        master.advance(BEAT_MS)
        master.beat("d2")

    assert one_order(master, "d2").attempt == 2
    assert master.state(task_id) is TaskState.ASSIGNED


def test_dispatch_that_never_arrived_is_found(master: MasterBench) -> None:
    master.device("d1")
    master.submit()
    assert one_order(master, "d1").attempt == 1

    master.advance(BEAT_MS)
    master.beat("d1", assign_seq=0)
    assert master.orders("d1") == []
    master.advance(BEAT_MS)
    master.beat("d1", assign_seq=0)

    assert one_order(master, "d1").attempt == 2
    assert "task_dispatch_lost" in master.event_kinds()


def test_unique_key_is_queued_once_across_a_restart(master: MasterBench) -> None:
    first = master.submit(spec(unique_key="u"), job="crawl")
    again = master.submit(spec(unique_key="u"), job_id=first.job_id)
    master.restart()
    third = master.submit(spec(unique_key="u"), spec(unique_key="v"), job_id=first.job_id)

    assert again.task_ids == first.task_ids
    assert again.existing == (0,)
    assert third.task_ids[0] == first.task_ids[0]
    assert third.existing == (0,)
    assert len(master.store.tasks) == 2


def test_same_request_gets_the_same_answer_after_a_restart(master: MasterBench) -> None:
    first = master.submit(request_id=b"once")
    master.restart()

    again = master.submit(request_id=b"once")

    assert again == first
    assert len(master.store.tasks) == 1


def test_cancelled_running_task_is_cancelled_when_its_process_is_gone(master: MasterBench) -> None:
    master.device("d1")
    [task_id] = master.submit().task_ids
    order = one_order(master, "d1")
    master.starts("d1", order)

    changed = master.changes(CancelTasks(b"c", (task_id,)))

    assert changed.task_ids == (task_id,)
    assert master.take("d1", Abort).refs[0].task_id == task_id
    assert master.state(task_id) is TaskState.RUNNING
    master.beat("d1", held(order))
    assert master.take("d1", HeartbeatAck).abort != ()
    master.ends("d1", order, Outcome.CANCELLED)
    assert master.state(task_id) is TaskState.CANCELLED


def test_completion_after_an_acknowledged_cancel_is_not_completed(master: MasterBench) -> None:
    master.device("d1")
    [task_id] = master.submit().task_ids
    order = one_order(master, "d1")
    master.changes(CancelTasks(b"c", (task_id,)))

    master.ends("d1", order, result=b"\x01")

    assert master.state(task_id) is TaskState.CANCELLED
    assert master.task(task_id).result == b""


@pytest.mark.parametrize("outcome", [one for one in Outcome if one is not Outcome.COMPLETED])
def test_however_a_cancelled_attempt_ends_no_other_one_starts(
    master: MasterBench, outcome: Outcome
) -> None:
    master.device("d1")
    master.device("d2", types=("other",))
    [task_id] = master.submit().task_ids
    order = one_order(master, "d1")
    master.changes(CancelTasks(b"c", (task_id,)))

    match outcome:
        case Outcome.DEVICE_LOST:
            master.loses("d1")
        case Outcome.DISPATCH_LOST:
            master.device("d1")
        case _:
            master.ends("d1", order, outcome, error="boom", retry_after_ms=1)
    master.device("d2")
    master.advance(60_000)

    assert master.state(task_id) is TaskState.CANCELLED
    assert master.orders("d2") == []


def test_cancel_survives_a_restart(master: MasterBench) -> None:
    master.device("d1")
    [task_id] = master.submit().task_ids
    order = one_order(master, "d1")
    master.changes(CancelTasks(b"c", (task_id,)))
    master.restart()

    [welcome] = master.device("d1", inventory=(held(order),))

    assert isinstance(welcome, Welcome)
    assert [one.task_id for one in welcome.abort] == [task_id]


def test_failed_task_waits_longer_each_time_and_then_fails(master: MasterBench) -> None:
    master.device("d1")
    [task_id] = master.submit(spec(max_retry_count=1)).task_ids
    master.ends("d1", one_order(master, "d1"), Outcome.FAILED, error="boom")
    assert master.orders("d1") == []

    master.advance(1_100)
    master.ends("d1", one_order(master, "d1"), Outcome.FAILED, error="boom")

    assert master.state(task_id) is TaskState.FAILED
    assert master.task(task_id).error == "boom"


def test_retry_after_is_honoured(master: MasterBench) -> None:
    master.device("d1")
    master.submit()
    master.ends("d1", one_order(master, "d1"), Outcome.RETRY, retry_after_ms=10_000)

    master.advance(9_000)
    master.beat("d1")
    assert master.orders("d1") == []
    master.advance(1_500)

    assert one_order(master, "d1").attempt == 2


def test_three_deaths_make_a_task_dead(master: MasterBench) -> None:
    master.device("d1")
    [task_id] = master.submit(spec(max_retry_count=0)).task_ids
    for _ in range(3):
        master.beat("d1")
        master.ends("d1", one_order(master, "d1"), Outcome.DIED, error="signal 11")
        master.advance(5_000)

    assert master.state(task_id) is TaskState.DEAD
    assert "signal 11" in master.task(task_id).error


def test_revived_task_runs_with_a_higher_attempt(master: MasterBench) -> None:
    master.device("d1")
    [task_id] = master.submit(spec(max_retry_count=0)).task_ids
    master.ends("d1", one_order(master, "d1"), Outcome.FAILED, error="boom")

    changed = master.changes(RetryTasks(b"r", (task_id,)))

    assert changed.task_ids == (task_id,)
    assert one_order(master, "d1").attempt == 2


def test_children_are_accepted_with_their_result_and_once(master: MasterBench) -> None:
    master.device("d1", slots=1)
    job = master.submit(spec(unique_key="/"), job="crawl")
    root = one_order(master, "d1")

    master.ends(
        "d1", root, children=(spec(unique_key="/a"), spec(unique_key="/"), spec(unique_key="/a"))
    )

    assert sorted(one.unique_key for one in master.store.tasks.values()) == ["/", "/a"]
    child = one_order(master, "d1")
    master.ends("d1", child)
    assert master.store.jobs[job.job_id].state == "finished"  # type: ignore[index]
    assert master.store.jobs[job.job_id].completed == 2  # type: ignore[index]


def test_backlog_beyond_the_window_is_run_completely() -> None:
    master = MasterBench(Settings(window_tasks=64, lane_tasks=32))
    specs = [spec(rate_key=f"k{index % 7}", priority=index % 3) for index in range(500)]
    master.submit(*specs)
    master.device("d1", slots=8, credit=16)

    done = 0
    while orders := master.orders("d1"):
        assert len(master.core.state.tasks) <= 64 + 32
        for order in orders:
            master.ends("d1", order)
            done += 1

    assert done == 500
    assert {one.state for one in master.store.tasks.values()} == {TaskState.COMPLETED}


def test_priority_goes_first_and_closed_key_blocks_nobody(master: MasterBench) -> None:
    master.submit(
        spec(priority=9, rate_key="slow"),
        spec(priority=9, rate_key="slow"),
        spec(priority=1),
        spec(priority=5),
        rates=(RateRule("slow", delay_ms=60_000),),
    )
    master.device("d1", slots=1)

    seen = []
    while orders := master.orders("d1"):
        for order in orders:
            seen.append(master.task(order.task_id).priority)
            master.ends("d1", order)

    assert seen == [9, 5, 1]


def test_two_starts_of_a_delayed_key_are_never_closer_than_its_delay(master: MasterBench) -> None:
    master.submit(*[spec(rate_key="k") for _ in range(3)], rates=(RateRule("k", delay_ms=1_000),))
    master.device("d1", slots=4)
    master.device("d2", slots=4)
    starts = []

    for _ in range(60):
        for name in ("d1", "d2"):
            for order in master.orders(name):
                master.now_ms += 30
                starts.append(master.now_ms)
                master.starts(name, order)
                master.ends(name, order)
        master.advance(100, step_ms=100)

    assert len(starts) == 3
    assert min(b - a for a, b in pairwise(starts)) >= 1_000


def test_delayed_key_starts_closed_after_a_restart(master: MasterBench) -> None:
    master.device("d1")
    master.submit(spec(rate_key="k"), spec(rate_key="k"), rates=(RateRule("k", delay_ms=2_000),))
    master.ends("d1", one_order(master, "d1"))
    master.restart()
    master.device("d1")

    master.advance(1_500)
    assert master.orders("d1") == []
    master.advance(1_000)

    assert len(master.orders("d1")) == 1


def test_mass_silence_engages_the_brake() -> None:
    master = MasterBench()
    for index in range(6):
        master.device(f"d{index}")
    master.submit(*[spec() for _ in range(6)])

    master.advance(LEASE_MS + 2_000)

    assert "mass_loss_brake" in master.event_kinds()
    assert "device_lost" not in master.event_kinds()
    master.forget()


def test_our_own_pause_kills_nobody(master: MasterBench) -> None:
    master.device("d1")
    master.submit()
    master.orders("d1")

    master.jump(60_000)

    assert "device_lost" not in master.event_kinds()


def test_what_was_sent_before_our_own_pause_is_not_taken_for_lost(master: MasterBench) -> None:
    master.device("d1")
    master.submit()
    assert one_order(master, "d1").attempt == 1

    # The beat waited in our queue, and the order in our socket.
    master.jump(2 * BEAT_MS)
    master.beat("d1", assign_seq=0)
    assert "task_dispatch_lost" not in master.event_kinds()
    for _ in range(2):
        master.advance(BEAT_MS)
        master.beat("d1", assign_seq=0)

    assert one_order(master, "d1").attempt == 2
