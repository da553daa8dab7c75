"""Rate keys: no two starts closer than the delay, never more at once, whoever is lost meanwhile."""

from __future__ import annotations

import pytest

from tests.support.master_bench import MasterBench, held, spec
from zmqcluster.core.settings import Settings
from zmqcluster.core.state import PEER_EVENTS_A_SECOND
from zmqcluster.messages import AttemptRef, RateReport, RateRule, Returned, TaskOrder
from zmqcluster.model import Outcome

DELAY_MS = 1_000
BEAT_MS = Settings().heartbeat_interval_ms


@pytest.fixture
def master() -> MasterBench:
    return MasterBench()


def delayed(master: MasterBench, count: int, **rule: int) -> None:
    """count tasks of one key."""
    rules = (RateRule("k", **({"delay_ms": DELAY_MS} | rule)),)
    master.submit(*[spec(rate_key="k", max_retry_count=9) for _ in range(count)], rates=rules)


def one(master: MasterBench, name: str) -> TaskOrder:
    [order] = master.orders(name)
    return order


def test_the_next_start_waits_until_the_former_is_known_to_have_begun(master: MasterBench) -> None:
    master.device("d1", slots=8)
    delayed(master, 2)
    order = one(master, "d1")

    master.advance(20 * DELAY_MS // 10)
    assert master.orders("d1") == []
    master.starts("d1", order)
    master.advance(DELAY_MS - 1)
    assert master.orders("d1") == []
    master.advance(1)

    assert len(master.orders("d1")) == 1


def test_an_older_run_that_ends_does_not_speak_for_the_one_that_starts(
    master: MasterBench,
) -> None:
    master.device("d1", slots=8)
    delayed(master, 3)
    first = one(master, "d1")
    master.starts("d1", first)
    master.advance(DELAY_MS)
    second = one(master, "d1")

    master.ends("d1", first)
    master.advance(3 * DELAY_MS)
    assert master.orders("d1") == [], "the second may not have begun yet"
    master.starts("d1", second)
    master.advance(DELAY_MS)

    assert len(master.orders("d1")) == 1


def test_an_older_run_that_is_lost_does_not_speak_for_the_one_that_starts(
    master: MasterBench,
) -> None:
    master.device("d1")
    delayed(master, 3)
    master.starts("d1", one(master, "d1"))
    master.device("d2")
    master.advance(DELAY_MS)
    second = one(master, "d2")

    master.loses("d1")
    master.device("d3")
    master.advance(5 * DELAY_MS)
    assert master.orders("d3") == [], "the second may not have begun yet"
    master.starts("d2", second)
    master.advance(DELAY_MS)

    assert len(master.orders("d3")) == 1


def test_a_lost_start_may_still_happen_within_its_window(master: MasterBench) -> None:
    master.device("d1")
    delayed(master, 1)
    order = one(master, "d1")
    assert order.start_within_ms == Settings().start_within_ms
    master.loses("d1")
    master.device("d2")
    lost_ms = master.now_ms + Settings().reconnect_grace_ms

    while not master.orders("d2"):
        master.advance(50, step_ms=50)

    assert master.now_ms >= lost_ms + order.start_within_ms + DELAY_MS


def test_a_start_still_on_its_way_may_happen_until_the_lease_is_over(master: MasterBench) -> None:
    master.device("d1")
    delayed(master, 1)
    one(master, "d1")
    master.device("d2")
    master.advance(BEAT_MS + 1_500)
    master.beat("d2")
    master.beat("d1")
    lost_ms = master.now_ms
    assert "task_dispatch_lost" in master.event_kinds()

    while not master.orders("d2"):
        master.advance(BEAT_MS)
        master.beat("d2")

    assert master.now_ms >= lost_ms + Settings().device_timeout_ms + DELAY_MS


def test_a_start_sent_before_a_repeated_hello_is_answered_may_still_happen(
    master: MasterBench,
) -> None:
    delayed(master, 1)
    master.device("d1")
    one(master, "d1")
    master.device("d2")
    lost_ms = master.now_ms

    master.hears("d1", master.hellos["d1"])
    while not master.orders("d2") + master.orders("d1"):
        master.advance(BEAT_MS)
        master.beat("d2")

    assert master.now_ms >= lost_ms + Settings().device_timeout_ms + DELAY_MS


def test_a_start_given_to_a_silent_copy_of_a_device_may_still_happen(master: MasterBench) -> None:
    delayed(master, 1)
    master.device("d1")
    one(master, "d1")
    master.device("d2")
    master.advance(2 * BEAT_MS)
    master.beat("d2")
    lost_ms = master.now_ms

    master.device("d1", reboot=True)
    while not master.orders("d2") + master.orders("d1"):
        master.advance(BEAT_MS)
        master.beat("d2")
        master.beat("d1")

    assert master.now_ms >= lost_ms + Settings().device_timeout_ms + DELAY_MS


@pytest.mark.parametrize("word", ["started", "ended"])
def test_a_lost_start_that_happens_beyond_its_window_counts_from_the_word_of_it(
    master: MasterBench, word: str
) -> None:
    # Seed 1212 of the simulation: the order arrived after it was given up for lost.
    master.device("d1")
    delayed(master, 2)
    order = one(master, "d1")
    master.loses("d1")
    master.advance(Settings().reconnect_grace_ms + Settings().start_within_ms + 600, step_ms=50)
    master.device("d1")

    if word == "started":
        master.starts("d1", order)
    else:
        master.ends("d1", order)
    heard_ms = master.now_ms
    while not master.orders("d1"):
        master.advance(50, step_ms=50)

    assert master.now_ms - heard_ms >= DELAY_MS


def test_what_was_returned_unstarted_costs_the_key_nothing(master: MasterBench) -> None:
    master.device("d1")
    delayed(master, 1)
    order = one(master, "d1")

    master.hears("d1", Returned((AttemptRef(order.task_id, order.attempt),), "late"))

    assert one(master, "d1").attempt == 2


def test_a_short_run_nobody_announced_counts_from_its_end(master: MasterBench) -> None:
    master.device("d1")
    delayed(master, 2)
    master.ends("d1", one(master, "d1"))

    master.advance(DELAY_MS - 1)
    assert master.orders("d1") == []
    master.advance(1)

    assert len(master.orders("d1")) == 1


def test_an_adopted_run_counts_as_begun_just_now(master: MasterBench) -> None:
    master.device("d1")
    delayed(master, 2)
    order = one(master, "d1")
    master.starts("d1", order)
    master.loses("d1")
    master.advance(600)
    master.advance(1_300)
    # It was on its way: the device comes back before anybody else had it.
    master.device("d1", slots=4, inventory=(held(order),))
    adopted_ms = master.now_ms

    while not master.orders("d1"):
        master.advance(50, step_ms=50)

    assert master.now_ms >= adopted_ms + DELAY_MS


def test_never_more_at_once_than_the_concurrency(master: MasterBench) -> None:
    master.device("d1", slots=8)
    master.device("d2", slots=8)
    delayed(master, 10, delay_ms=0, concurrency=3)
    held_now = {("d1", one): one for one in master.orders("d1")}
    held_now |= {("d2", one): one for one in master.orders("d2")}

    for _ in range(10):
        assert len(held_now) <= 3
        (name, order), *_ = held_now
        del held_now[name, order]
        master.ends(name, order)
        held_now |= {("d1", one): one for one in master.orders("d1")}
        held_now |= {("d2", one): one for one in master.orders("d2")}

    assert not held_now
    assert {one.state for one in master.store.tasks.values()} == {"completed"}


def test_concurrency_counts_what_is_still_out_after_a_restart(master: MasterBench) -> None:
    master.device("d1", slots=8)
    delayed(master, 3, delay_ms=0, concurrency=1)
    order = one(master, "d1")
    master.restart()

    master.device("d2", slots=8)
    master.advance(3_000)
    assert master.orders("d2") == [], "the one limit is taken by an orphan"
    master.device("d1", slots=8, inventory=(held(order),))
    master.ends("d1", order)

    assert len([*master.orders("d1"), *master.orders("d2")]) == 1


def test_a_start_unknown_at_a_restart_keeps_the_key_shut_until_it_is_known(
    master: MasterBench,
) -> None:
    master.device("d1")
    delayed(master, 2)
    order = one(master, "d1")
    master.restart()
    master.device("d2")

    master.advance(3 * DELAY_MS)
    assert master.orders("d2") == []
    master.device("d1", slots=2, inventory=(held(order),))
    master.advance(DELAY_MS)

    assert len([*master.orders("d1"), *master.orders("d2")]) == 1


def test_closed_key_opens_by_itself_and_the_longer_closure_wins(master: MasterBench) -> None:
    master.device("d1", slots=4)
    master.hears("d1", RateReport((RateRule("k", closed_for_ms=5_000),)))
    master.hears("d1", RateReport((RateRule("k", closed_for_ms=1_000),)))
    master.submit(spec(rate_key="k"))

    master.advance(4_900)
    assert master.orders("d1") == []
    master.advance(200)

    assert len(master.orders("d1")) == 1
    assert "rate_key_closed" in master.event_kinds()


def test_closure_survives_a_restart(master: MasterBench) -> None:
    master.device("d1")
    master.hears("d1", RateReport((RateRule("k", delay_ms=1, closed_for_ms=20_000),)))
    master.submit(spec(rate_key="k"))
    master.restart()

    master.device("d1")
    for _ in range(3):
        master.advance(BEAT_MS)
        master.beat("d1")
    assert master.orders("d1") == []
    master.advance(BEAT_MS + 500)

    assert len(master.orders("d1")) == 1


def test_a_rule_learned_in_mid_flight_does_not_take_old_starts_for_new_ones(
    master: MasterBench,
) -> None:
    master.device("d1", slots=4)
    master.submit(spec(rate_key="k"))
    old = one(master, "d1")
    delayed(master, 2)
    assert master.orders("d1") == [], "the old one may be at the origin this very moment"
    master.advance(DELAY_MS)
    new = one(master, "d1")

    master.starts("d1", old)
    master.advance(3 * DELAY_MS)
    assert master.orders("d1") == [], "the new one may not have begun yet"
    master.starts("d1", new)
    master.advance(DELAY_MS)

    assert len(master.orders("d1")) == 1


def test_delayed_tasks_are_never_handed_out_ahead(master: MasterBench) -> None:
    master.device("d1", slots=1)
    master.submit(*[spec() for _ in range(4)])
    for _ in range(4):
        for order in master.orders("d1"):
            master.ends("d1", order, run_us=10)
    master.submit(spec())
    assert len(master.orders("d1")) == 1

    delayed(master, 1)
    assert master.orders("d1") == []
    master.submit(spec())

    assert len(master.orders("d1")) == 1, "a short one without a key goes ahead"


def test_keys_without_limits_are_forgotten(master: MasterBench) -> None:
    master.device("d1", slots=64)
    master.submit(*[spec(rate_key=f"site{index}") for index in range(200)])
    while orders := master.orders("d1"):
        for order in orders:
            master.ends("d1", order, Outcome.COMPLETED)

    master.advance(10_500)

    assert len(master.core.state.rates) == 0
    assert len(master.core.state.queue.lanes) == 0


def test_delayed_keys_waiting_for_a_slot_do_not_stop_handing_out_ahead(
    master: MasterBench,
) -> None:
    master.device("d1", slots=2)
    master.submit(spec())
    master.ends("d1", one(master, "d1"), run_us=100)
    rules = tuple(RateRule(f"slow {number}", delay_ms=60_000) for number in range(10))
    slow = [spec(rate_key=f"slow {number}", priority=9) for number in range(10)]

    master.submit(*slow, *[spec(priority=9) for _ in range(100)], rates=rules)

    orders = master.orders("d1")
    assert sum(not master.task(order.task_id).rate_key for order in orders) == 100


def test_rules_without_end_leave_no_rows_without_end() -> None:
    master = MasterBench()
    master.device("d1")

    for number in range(10):
        rules = tuple(RateRule(f"k{number}-{n}", closed_for_ms=9_000) for n in range(10))
        master.hears("d1", RateReport(rules))

    assert master.event_kinds().count("rate_key_closed") == PEER_EVENTS_A_SECOND
    assert master.core.state.counters["rate_key_closed"] == 100
