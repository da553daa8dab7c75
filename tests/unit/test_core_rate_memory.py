"""A rate key is in memory while something depends on it, and as strict when it comes back."""

from __future__ import annotations

import msgspec
import pytest

from tests.support.master_bench import WALL_AT_ZERO, MasterBench, held, spec
from zmqcluster.core.fleet import FORESIGHT
from zmqcluster.core.settings import Settings
from zmqcluster.core.state import PEER_EVENTS_A_SECOND
from zmqcluster.core.timers import Timers
from zmqcluster.messages import (
    Answer,
    AskExplain,
    AskOverview,
    CancelTasks,
    RateReport,
    RateRule,
    Results,
    RetryTasks,
    TaskResult,
)
from zmqcluster.model import Outcome
from zmqcluster.views import ExplainView, OverviewView

DELAY_MS = 10_000
SLOW = RateRule("k", delay_ms=DELAY_MS)


@pytest.fixture
def master() -> MasterBench:
    return MasterBench()


def run_one(master: MasterBench) -> int:
    """The one task handed to d1 begins and ends now; when that was."""
    [order] = master.orders("d1")
    master.starts("d1", order)
    master.ends("d1", order)
    return master.now_ms


def wait_for_order(master: MasterBench) -> int:
    """Until d1 has an order; when that was."""
    for _ in range(1_000):
        if master.orders("d1"):
            return master.now_ms
        master.advance(100, step_ms=100)
        if master.now_ms % 1_000 < 100:
            master.beat("d1")
    raise AssertionError("nothing is handed out")


def in_memory(master: MasterBench) -> list[str]:
    return sorted(master.core.state.rates)


def forgotten_and_shut(master: MasterBench) -> int:
    """A key with a delay whose only task has just run; when that was."""
    master.device("d1", slots=4)
    master.submit(spec(rate_key="k"), rates=(SLOW,))
    ran_ms = run_one(master)
    assert in_memory(master) == []
    return ran_ms


def test_a_key_that_comes_back_is_shut_for_exactly_as_long_as_if_it_had_stayed(
    master: MasterBench,
) -> None:
    master.advance(2 * DELAY_MS)
    ran_ms = forgotten_and_shut(master)

    master.submit(spec(rate_key="k"))

    assert in_memory(master) == ["k"]
    assert wait_for_order(master) - ran_ms in range(DELAY_MS, DELAY_MS + 101)


def test_the_rest_of_a_delay_outlives_the_master_and_its_time_away(master: MasterBench) -> None:
    forgotten_and_shut(master)
    master.restart(downtime_ms=DELAY_MS - 1_000)
    started_ms = master.now_ms
    assert in_memory(master) == []

    master.device("d1", slots=4)
    master.submit(spec(rate_key="k"))

    # What was handed out just before the end may have begun just before the start.
    assert wait_for_order(master) - started_ms in range(DELAY_MS, DELAY_MS + 101)


def test_a_rule_that_was_learned_before_its_first_task_does_not_hold_that_one_up(
    master: MasterBench,
) -> None:
    master.device("d1")
    master.hears("d1", RateReport((SLOW,)))
    assert in_memory(master) == []

    master.submit(spec(rate_key="k"))

    assert len(master.orders("d1")) == 1


def test_a_key_read_long_after_the_start_is_open(master: MasterBench) -> None:
    forgotten_and_shut(master)
    master.restart()
    master.device("d1", slots=4)
    for _ in range(4):
        master.advance(3_000)
        master.beat("d1")

    master.submit(spec(rate_key="k"))

    assert len(master.orders("d1")) == 1


def test_children_bring_the_keys_they_name(master: MasterBench) -> None:
    ran_ms = forgotten_and_shut(master)
    master.submit(spec())
    [parent] = master.orders("d1")

    master.ends("d1", parent, children=(spec(rate_key="k"),))

    assert wait_for_order(master) - ran_ms >= DELAY_MS


def test_a_retry_brings_the_key_of_its_task(master: MasterBench) -> None:
    master.device("d1", slots=4)
    answer = master.submit(spec(rate_key="k"), rates=(SLOW,))
    [order] = master.orders("d1")
    master.ends("d1", order, Outcome.REJECTED)
    ran_ms = master.now_ms
    assert in_memory(master) == []

    assert master.changes(RetryTasks(b"r", answer.task_ids)).task_ids == answer.task_ids

    assert wait_for_order(master) - ran_ms >= DELAY_MS


def test_a_retry_of_a_task_whose_end_is_not_on_disk_brings_its_key(master: MasterBench) -> None:
    master.device("d1", slots=4)
    answer = master.submit(spec(rate_key="k"), rates=(RateRule("k", concurrency=1),))
    [order] = master.orders("d1")
    master.commits = False
    master.ends("d1", order, Outcome.REJECTED)
    master.hears("client", RetryTasks(b"r", answer.task_ids))
    master.commits = True
    master.commit()

    assert len(master.orders("d1")) == 1
    master.forget()


def test_a_salvaged_end_brings_the_key_of_its_task() -> None:
    master = MasterBench(Settings(delayed_tasks=2))
    master.device("d1")
    answer = master.submit(spec(rate_key="k", max_retry_count=9), rates=(SLOW,))
    [order] = master.orders("d1")
    master.starts("d1", order)
    master.loses("d1")
    master.advance(1_000)
    master.device("d2", types=("other",))
    # So many that fall due sooner that the lost one is left to the database.
    master.submit(*[spec("other", not_before_ms=WALL_AT_ZERO + 60_000) for _ in range(9)])
    master.submit(*[spec("noop", rate_key=f"other{n}") for n in range(9)])
    master.device("d1", slots=1, inventory=(held(order, 2),))

    late = TaskResult(order.task_id, order.attempt, Outcome.RETRY, retry_after_ms=1_000)
    master.hears("d1", Results((late,)))

    assert master.task(answer.task_ids[0]).failures == 1
    master.forget()
    master.audit()


def test_a_task_that_waits_for_its_moment_keeps_its_key(master: MasterBench) -> None:
    later = spec(rate_key="k", not_before_ms=WALL_AT_ZERO + 60_000)
    answer = master.submit(later, rates=(SLOW,))
    assert in_memory(master) == ["k"]

    master.changes(CancelTasks(b"c", answer.task_ids))

    assert in_memory(master) == []


def test_tasks_that_were_scheduled_before_the_start_come_with_their_keys(
    master: MasterBench,
) -> None:
    later = [spec(rate_key="k", not_before_ms=WALL_AT_ZERO + 20_000) for _ in range(3)]
    master.submit(*later, rates=(RateRule("k", concurrency=1),))
    master.restart()

    master.advance(25_000)
    master.device("d1", slots=4)

    assert len(master.orders("d1")) == 1


def test_lanes_that_find_room_later_come_with_their_keys() -> None:
    master = MasterBench(Settings(lanes=4))
    rules = tuple(RateRule(f"k{n}", concurrency=1) for n in range(20))
    master.submit(*[spec(rate_key=f"k{n % 20}") for n in range(60)], rates=rules)
    assert len(in_memory(master)) <= 4
    master.device("d1", slots=60)

    ran = 0
    for _ in range(200):
        held_now = master.orders("d1")
        running = [one.task.rate_key for one in master.core.state.flights.values()]
        assert len(running) == len(set(running)), "one at a time of each"
        for order in held_now:
            master.ends("d1", order)
            ran += 1
        master.advance(500)

    assert ran == 60
    assert in_memory(master) == []


def test_a_start_reads_only_the_keys_of_what_is_in_flight(master: MasterBench) -> None:
    rules = tuple(RateRule(f"k{n}", delay_ms=DELAY_MS) for n in range(100))
    master.device("d1")
    master.submit(spec(rate_key="k7"), rates=rules)
    assert len(master.orders("d1")) == 1

    master.restart()

    assert in_memory(master) == ["k7"]
    assert len(master.store.rate_keys) == 100


def test_what_was_decided_since_a_row_was_read_wins(master: MasterBench) -> None:
    master.device("d1", slots=4)
    master.commits = False
    master.hears("d1", RateReport((RateRule("k", closed_for_ms=DELAY_MS),)))

    # Its facts know nothing of that: it is not on disk.
    master.hears("d1", RateReport((RateRule("k", concurrency=1),)))

    assert in_memory(master) == ["k"]
    master.commits = True
    master.commit()
    assert in_memory(master) == []
    row = master.store.rate_keys["k"]
    assert (row.concurrency, row.closed_until_ms) == (1, master.now_ms + DELAY_MS)


def test_an_attempt_lost_just_before_a_restart_may_still_begin_after_it(
    master: MasterBench,
) -> None:
    settings = master.settings
    master.device("d1")
    master.submit(spec(rate_key="k"), rates=(RateRule("k", concurrency=1),))
    assert len(master.orders("d1")) == 1
    master.loses("d1")
    master.advance(settings.reconnect_grace_ms, step_ms=50)
    lost_ms = master.now_ms
    assert not master.core.state.flights
    master.restart()

    master.device("d1", slots=4)

    assert wait_for_order(master) - lost_ms >= settings.start_within_ms


def test_a_closed_key_with_nothing_waiting_wakes_nobody(master: MasterBench) -> None:
    master.device("d1", slots=4)
    master.hears("d1", RateReport((RateRule("k", closed_for_ms=3_000),)))
    lease_ms = master.core.next_wake_ms()
    assert lease_ms is not None
    assert lease_ms > master.now_ms + 3_000

    master.submit(spec(rate_key="k"))
    assert master.core.next_wake_ms() == master.now_ms + 3_000
    master.advance(3_000)

    assert len(master.orders("d1")) == 1


def test_moments_that_were_cancelled_do_not_pile_up() -> None:
    timers = Timers()
    timers.set("stays", 5)

    for _ in range(1_000):
        timers.set("key", 86_400_000)
        timers.cancel("key")

    assert len(timers._heap) <= 64 + 2 * 2
    assert timers.pop_due(5) == "stays"


def test_why_a_task_in_the_database_waits_is_known(master: MasterBench) -> None:
    master = MasterBench(Settings(window_tasks=2, lane_tasks=2))
    rules = (RateRule("k", closed_for_ms=DELAY_MS),)
    answer = master.submit(*[spec(rate_key="k") for _ in range(9)], rates=rules)
    master.device("d1")

    told = master.asks(AskExplain(b"e", answer.task_ids[-1]))

    assert isinstance(told, Answer)
    view = msgspec.msgpack.decode(told.body, type=ExplainView)
    assert any("rate key k is closed" in why for why in view.reasons)


def test_a_device_that_invents_keys_fills_neither_memory_nor_disk(master: MasterBench) -> None:
    master.device("d1")

    for first in range(0, 10_000, 250):
        rules = tuple(RateRule(f"k{first + n}", delay_ms=1) for n in range(250))
        master.hears("d1", RateReport(rules))

    assert in_memory(master) == []
    assert len(master.store.rate_keys) == FORESIGHT
    assert master.core.state.counters["rate_rule_refused"] == 10_000 - FORESIGHT
    assert master.event_kinds().count("rate_rule_refused") == PEER_EVENTS_A_SECOND
    master.advance(3_000)
    more = tuple(RateRule(f"more{n}", delay_ms=1) for n in range(250))
    master.hears("d1", RateReport(more))
    assert len(master.store.rate_keys) == FORESIGHT + 3


def test_what_a_device_learns_of_its_own_tasks_is_never_refused(master: MasterBench) -> None:
    master.device("d1", slots=4)
    rules = tuple(RateRule(f"k{n}", delay_ms=1) for n in range(250))
    for _ in range(FORESIGHT // 250 + 1):
        master.hears("d1", RateReport(rules))
    master.submit(spec(rate_key="mine"), spec(rate_key="waits"), spec(rate_key="waits"))
    first, *_ = master.orders("d1")

    master.hears("d1", RateReport((RateRule("waits", delay_ms=5), RateRule("no", delay_ms=5))))
    master.ends("d1", first, rates=(RateRule("mine", delay_ms=7),))

    known = master.store.rate_keys
    assert (known["mine"].delay_ms, known["waits"].delay_ms, "no" in known) == (7, 5, False)


def test_limits_know_the_job_that_asked_for_them(master: MasterBench) -> None:
    master.device("d1")
    answer = master.submit(job="j", rates=(SLOW,))

    master.hears("d1", RateReport((RateRule("k", concurrency=3), RateRule("found", delay_ms=1))))

    row = master.store.rate_keys["k"]
    assert (row.delay_ms, row.concurrency, row.epoch) == (DELAY_MS, 3, master.core.state.epoch)
    assert row.changed_wall == WALL_AT_ZERO + master.now_ms
    assert row.job_id == answer.job_id
    assert master.store.rate_keys["found"].job_id == 0


def test_the_overview_shows_the_busiest_keys(master: MasterBench) -> None:
    master.submit(*[spec(rate_key=f"k{n}") for n in range(150)])
    master.submit(*[spec(rate_key="busy") for _ in range(3)])

    answer = master.asks(AskOverview(b"o"))

    assert isinstance(answer, Answer)
    shown = msgspec.msgpack.decode(answer.body, type=OverviewView).rate_keys
    assert len(shown) == 100
    assert (shown[0].rate_key, shown[0].waiting) == ("busy", 3)
