"""A window full of what cannot run keeps nothing out that can, and what yielded comes back."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.support.master_bench import MasterBench, spec
from zmqcluster.core import fleet
from zmqcluster.core.settings import Settings
from zmqcluster.messages import Held, RateRule, TaskOrder, TaskSpec
from zmqcluster.model import Pool

HOUR_MS = 3_600_000
TIGHT = Settings(window_tasks=8, lane_tasks=4)
WANTED = 30


def labelled(number: int, priority: int, task_type: str = "noop") -> TaskSpec:
    """A lane of its own; all of them are alike in type and label."""
    return spec(task_type, labels=("gpu",), rate_key=f"k{number}", priority=priority)


def served(master: MasterBench, *names: str, within_ms: int) -> list[int]:
    """Tasks these devices are given and end in that time, in order."""
    end_ms, seen = master.now_ms + within_ms, []
    while True:
        while orders := [(name, one) for name in names for one in master.orders(name)]:
            for name, order in orders:
                seen.append(order.task_id)
                master.ends(name, order)
        if master.now_ms >= end_ms:
            return seen
        master.advance(500)
        for name in names:
            master.beat(name)


def with_what_cannot_run(*stuck: TaskSpec, rates: tuple[RateRule, ...] = ()) -> MasterBench:
    """A master whose tight window is full of these; WANTED others wait behind them."""
    master = MasterBench(TIGHT)
    master.audited_tasks_max = 0
    master.submit(*stuck, rates=rates)
    master.submit(*[spec(priority=5) for _ in range(WANTED)])
    return master


def wanted(master: MasterBench) -> set[int]:
    ready = [one for one in master.store.tasks.values() if not (one.labels or one.rate_key)]
    assert len(ready) == WANTED
    return {one.task_id for one in ready}


# --- labels nobody has ----------------------------------------------------------------------------


@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize("priority", [1, 5, 9])
def test_lanes_of_a_label_nobody_has_yield_to_what_can_run(
    priority: int, is_restarted: bool
) -> None:
    master = with_what_cannot_run(*[labelled(n, priority) for n in range(40)])
    if is_restarted:
        master.restart()
    master.device("d1", slots=2)

    assert {*served(master, "d1", within_ms=2_000)} == wanted(master)


def test_lanes_that_yielded_are_run_when_the_label_comes_highest_priority_first() -> None:
    master = with_what_cannot_run(*[labelled(n, n % 10) for n in range(40)])
    master.device("d1", slots=2)
    assert {*served(master, "d1", within_ms=2_000)} == wanted(master)

    master.device("d2", labels=("gpu",))
    done = served(master, "d2", within_ms=2_000)

    assert len(done) == 40
    priorities = [master.task(one).priority for one in done]
    # Those that were in memory may be lower ones: there is room for so many.
    behind = priorities[TIGHT.window_tasks :]
    assert all(a >= b for a, b in pairwise(behind))
    assert priorities.index(9) <= TIGHT.window_tasks
    master.forget()
    master.audit()


@pytest.mark.parametrize("remembered", [10, 100_000])
@pytest.mark.parametrize("priority", [1, 5, 9])
def test_lanes_of_labels_of_their_own_yield_too(
    priority: int, remembered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "_ABSENT_MAX", remembered)
    stuck = [spec(labels=(f"host{n}",), priority=priority) for n in range(40)]
    master = with_what_cannot_run(*stuck)
    master.device("d1", slots=2)

    assert {*served(master, "d1", within_ms=2_000)} == wanted(master)
    assert len(master.core.state.fleet.sections) == 1, "none for labels nobody has"
    master.device("d2", labels=("host7", "host33", "other"))
    assert {*served(master, "d2", within_ms=2_000)} == {8, 34}
    master.forget()
    master.audit()


def test_lanes_of_a_type_nobody_runs_yield_though_devices_change_all_the_time() -> None:
    stuck = [spec("rare", rate_key=f"k{n}", priority=9) for n in range(40)]
    master = MasterBench(TIGHT)
    master.audited_tasks_max = 0
    master.device("d0", types=("rare",))
    master.loses("d0")
    master.advance(1_000)
    master.submit(*stuck)
    master.submit(*[spec(priority=5) for _ in range(WANTED)])
    master.device("d1", slots=2)

    assert {*served(master, "d1", within_ms=2_000)} == wanted(master)
    master.device("d0", types=("rare",))
    assert len(served(master, "d0", within_ms=2_000)) == 40


def test_lanes_whose_only_device_left_yield() -> None:
    master = MasterBench(TIGHT)
    master.audited_tasks_max = 0
    master.device("d2", labels=("gpu",))
    master.submit(*[labelled(n, 9) for n in range(40)])
    [running] = master.orders("d2")
    master.submit(*[spec(priority=5) for _ in range(WANTED)])
    master.device("d1", slots=2)
    master.leaves("d2")

    done = served(master, "d1", within_ms=2_000)

    assert {*done} == wanted(master)
    master.device("d2", labels=("gpu",))
    assert len(served(master, "d2", within_ms=2_000)) == 40
    assert master.task(running.task_id).attempt == 2


def test_lanes_whose_devices_are_busy_for_hours_yield() -> None:
    master = MasterBench(TIGHT)
    master.audited_tasks_max = 0
    master.device("d2", labels=("gpu",), types=("train",))
    master.submit(*[labelled(n, 9, "train") for n in range(40)])
    [running] = master.orders("d2")
    master.starts("d2", running)
    master.submit(*[spec(priority=5) for _ in range(WANTED)])
    master.device("d1", slots=2)

    assert {*idle_beside(master, running)} == wanted(master)
    master.ends("d2", running)
    assert len(served(master, "d2", within_ms=2_000)) == 39


@pytest.mark.parametrize(("run_us", "within_ms"), [(60_000_000, 2_000), (1_000, 60_000)])
def test_delayed_keys_that_wait_for_a_slot_yield(run_us: int, within_ms: int) -> None:
    # Short tasks without a delay would be handed out ahead, so those with one are tried again and
    # again, and only their long rest tells that they do not run.
    master = MasterBench(TIGHT)
    master.audited_tasks_max = 0
    rules = tuple(RateRule(f"k{n}", delay_ms=1) for n in range(41))
    master.device("d2", labels=("gpu",), types=("train",))
    master.submit(*[labelled(n, 9, "train") for n in range(41)], rates=rules)
    [first] = master.orders("d2")
    master.ends("d2", first, run_us=run_us)
    [running] = master.orders("d2")
    master.starts("d2", running)
    master.submit(*[spec(priority=5) for _ in range(WANTED)])
    master.device("d1", slots=2)

    assert {*idle_beside(master, running, within_ms=within_ms)} == wanted(master)


def idle_beside(master: MasterBench, running: TaskOrder, *, within_ms: int = 2_000) -> list[int]:
    """What d1 is given and ends while d2 runs one task for hours."""
    end_ms, seen = master.now_ms + within_ms, []
    while master.now_ms < end_ms:
        while orders := master.orders("d1"):
            for order in orders:
                seen.append(order.task_id)
                master.ends("d1", order)
        master.advance(500)
        master.beat("d1")
        master.beat("d2", Held(running.task_id, running.attempt, 1), assign_seq=2)
    return seen


# --- closed keys ----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize("priority", [1, 5, 9])
def test_closed_keys_of_one_task_each_yield_to_what_can_run(
    priority: int, is_restarted: bool
) -> None:
    rules = tuple(RateRule(f"k{n}", closed_for_ms=HOUR_MS) for n in range(40))
    closed = [spec(rate_key=one.rate_key, priority=priority) for one in rules]
    master = with_what_cannot_run(*closed, rates=rules)
    if is_restarted:
        master.restart()
    master.device("d1", slots=2)

    assert {*served(master, "d1", within_ms=2_000)} == wanted(master)
    master.advance(HOUR_MS, step_ms=4_000)
    master.device("d1", slots=2, reboot=True)
    assert len(served(master, "d1", within_ms=2_000)) == 40
    master.forget()
    master.audit()


def test_one_closed_origin_with_many_priorities_and_types_yields() -> None:
    rule = RateRule("site", closed_for_ms=HOUR_MS)
    types = ("a", "b", "c")
    closed = [spec(types[n % 3], rate_key="site", priority=n % 10) for n in range(60)]
    master = with_what_cannot_run(*closed, rates=(rule,))
    master.device("d1", slots=2, types=dict.fromkeys(("noop", *types), Pool.SYNC))

    assert {*served(master, "d1", within_ms=2_000)} == wanted(master)


def test_keys_that_open_are_in_line_by_priority_though_the_window_is_never_empty() -> None:
    rules = tuple(RateRule(f"k{n}", closed_for_ms=5_000) for n in range(10))
    master = MasterBench(TIGHT)
    master.audited_tasks_max = 0
    master.submit(*[spec(rate_key=one.rate_key, priority=9) for one in rules], rates=rules)
    master.submit(*[spec(rate_key=f"open{n % 12}", priority=5) for n in range(480)])
    master.device("d1")

    priorities = []
    for turn in range(60):
        [order] = master.orders("d1")
        priorities.append(master.task(order.task_id).priority)
        if turn % 2:
            master.advance(500)
        master.ends("d1", order, run_us=60_000_000)

    # Five seconds are over after twenty; then what is in memory already goes first.
    assert priorities[:20] == [5] * 20
    assert priorities[20 : 30 + TIGHT.window_tasks].count(9) == 10
    master.forget()


# --- more lanes than may be in memory -------------------------------------------------------------


@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize("own_labels", [False, True])
def test_a_lane_whose_device_is_busy_is_not_given_up_for_lanes_nobody_runs(
    own_labels: bool, is_restarted: bool
) -> None:
    master = MasterBench(Settings(window_tasks=8, lane_tasks=4, lanes=8))
    master.audited_tasks_max = 0
    labels = [(f"host{n}",) if own_labels else ("gpu",) for n in range(40)]
    master.submit(*[spec(labels=labels[n], rate_key=f"k{n}", priority=9) for n in range(40)])
    if is_restarted:
        master.restart()
    master.advance(12_000)
    master.device("d1")
    master.submit(*[spec() for _ in range(3)])
    for seq in range(1, 4):
        [running] = master.orders("d1")
        master.starts("d1", running)
        for _ in range(40):
            master.advance(500)
            master.beat("d1", Held(running.task_id, running.attempt, 1), assign_seq=seq)

        master.ends("d1", running, run_us=20_000_000)

    assert not master.orders("d1")


# --- many -----------------------------------------------------------------------------------------


def test_a_lane_that_can_run_is_read_before_a_thousand_that_cannot() -> None:
    master = MasterBench(Settings(window_tasks=100, lane_tasks=50))
    master.audited_tasks_max = 0
    master.submit(*[labelled(n, 9, "train") for n in range(500)])
    master.submit(*[spec(labels=(f"host{n}",), priority=9) for n in range(500)])
    master.submit(*[spec(priority=5) for _ in range(200)])

    master.device("d1", slots=100)
    done = []
    for _ in range(20):
        for order in master.orders("d1"):
            master.ends("d1", order)
            done.append(order.task_id)

    assert len(done) == 200, "not one read of the others is waited for, nor any moment"
