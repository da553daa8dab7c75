"""Who gets a task: four strategies, labels, caps, and how far ahead short tasks are handed out."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest

from tests.support.master_bench import MasterBench, spec
from zmqcluster.core import balance
from zmqcluster.core.balance import Balancer, Course
from zmqcluster.core.fleet import AHEAD_US_PER_SLOT, SHORT_US_MAX, Device, Fleet, PoolLoad
from zmqcluster.core.lanes import Shape
from zmqcluster.core.rows import DeviceRow
from zmqcluster.core.settings import Settings
from zmqcluster.messages import (
    Capabilities,
    DrainDevice,
    Hello,
    PoolOffer,
    RateRule,
    ResultAck,
    SetStrategy,
    TaskOrder,
    TypeOffer,
)
from zmqcluster.model import DeviceId, Outcome, Pool, Strategy

ALL = list(Strategy)


def with_strategy(strategy: Strategy, **settings: Any) -> MasterBench:
    return MasterBench(Settings(strategy=strategy, **settings))


def abilities(name: str, *, is_mixed: bool) -> tuple[str, ...]:
    return ("noop", f"only_{name}") if is_mixed else ("noop",)


def shares(master: MasterBench, names: list[str], tasks: int) -> Counter[str]:
    """How many of so many one-second tasks each device gets, all ending in turn."""
    master.submit(*[spec() for _ in range(tasks)])
    counts: Counter[str] = Counter()
    held: list[tuple[str, TaskOrder]] = []
    while True:
        for name in names:
            orders = master.orders(name)
            counts[name] += len(orders)
            held += [(name, one) for one in orders]
        if not held:
            return counts
        name, order = held.pop(0)
        master.ends(name, order, run_us=1_000_000)
        master.forget(ResultAck)


@pytest.mark.parametrize("strategy", ALL)
@pytest.mark.parametrize("is_mixed", [False, True])
def test_equal_devices_get_equal_shares(strategy: Strategy, is_mixed: bool) -> None:
    master = with_strategy(strategy)
    names = [f"d{index}" for index in range(8)]
    for index, name in enumerate(names):
        # Unlike abilities put devices into different groups; that must not change their share.
        master.device(name, slots=2, types=abilities(name, is_mixed=is_mixed and index < 2))

    counts = shares(master, names, 400)

    assert sum(counts.values()) == 400
    assert min(counts.values()) >= 30, counts
    assert max(counts.values()) <= 75, counts


@pytest.mark.parametrize("is_mixed", [False, True])
def test_weighted_gives_in_proportion_to_slots(is_mixed: bool) -> None:
    master = with_strategy(Strategy.WEIGHTED)
    for name, slots in (("d1", 100), ("d2", 300), ("d3", 400)):
        master.device(name, slots=slots, types=abilities(name, is_mixed=is_mixed))

    master.submit(*[spec() for _ in range(80)])

    counts = {name: len(master.orders(name)) for name in ("d1", "d2", "d3")}
    assert counts == {"d1": 10, "d2": 30, "d3": 40}


@pytest.mark.parametrize("is_mixed", [False, True])
def test_least_tasks_fills_the_emptiest_first(is_mixed: bool) -> None:
    master = with_strategy(Strategy.LEAST_TASKS)
    master.device("d1", slots=4)
    master.submit(*[spec() for _ in range(3)])
    master.orders("d1")
    master.device("d2", slots=4, types=abilities("d2", is_mixed=is_mixed))

    master.submit(*[spec() for _ in range(3)])

    assert len(master.orders("d2")) == 3


@pytest.mark.parametrize("is_mixed", [False, True])
def test_round_robin_goes_around(is_mixed: bool) -> None:
    master = with_strategy(Strategy.ROUND_ROBIN)
    names = ["d1", "d2", "d3"]
    for name in names:
        master.device(name, slots=9, types=abilities(name, is_mixed=is_mixed))
    seen = []

    for _ in range(9):
        master.submit()
        seen += [name for name in names if master.orders(name)]

    assert seen[:3] * 3 == seen
    assert sorted(seen[:3]) == names


def test_random_is_random_and_repeatable() -> None:
    def drawn(seed: int) -> list[str]:
        master = MasterBench(Settings(strategy=Strategy.RANDOM), seed=seed)
        names = ["d1", "d2", "d3"]
        for name in names:
            master.device(name, slots=99)
        seen = []
        for _ in range(30):
            master.submit()
            seen += [name for name in names if master.orders(name)]
        return seen

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_strategy_is_changed_in_full_flight() -> None:
    master = with_strategy(Strategy.LEAST_TASKS)
    master.device("d1", slots=10)
    master.device("d2", slots=30)

    for strategy in (*ALL, *ALL):
        master.changes(SetStrategy(b"s", strategy))
        master.submit(*[spec() for _ in range(4)])

    assert len(master.orders("d1")) + len(master.orders("d2")) == 32


@pytest.mark.parametrize("strategy", ALL)
def test_a_pick_costs_the_same_in_a_large_fleet(
    strategy: Strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(count: int) -> int:
        """Calls into the code of the rings for 200 picks."""
        balancer = Balancer(strategy, Pool.SYNC, Random(1), Course())
        devices = [idle_device(f"d{index}") for index in range(count)]
        for device in devices:
            balancer.refresh(device)
        looks = 0

        def counted(device: Device) -> bool:
            nonlocal looks
            looks += 1
            return at.in_hand < at.slots

        monkeypatch.setattr(Device, "has_free_slot", lambda self, pool: counted(self))
        for _ in range(200):
            picked = balancer.best_free()
            assert picked is not None
            balancer.chosen(picked)
            at = picked.pools[Pool.SYNC]
            at.in_hand += 1
            balancer.refresh(picked)
        monkeypatch.undo()
        return looks

    assert work(5_000) == work(100)


def idle_device(name: str) -> Device:
    device = Device(
        DeviceRow(
            device_id=DeviceId(name), name="", state="online", host="", platform="", cpu_count=0,
            memory_bytes=0, addresses="[]", task_types="[]", labels="[]", slots=4, boot_id="",
            drained=False, registered_wall=0, last_seen_wall=0,
        )
    )  # fmt: skip
    device.peer = name.encode()
    device.credit = 100
    device.pools = {Pool.SYNC: PoolLoad(slots=4)}
    return device


def test_the_heap_of_loads_stays_in_proportion_to_the_fleet() -> None:
    ring = balance.LoadRing(Pool.SYNC, Random(1), Course())
    devices = [idle_device(f"d{index}") for index in range(10)]
    for device in devices:
        ring.add(device)

    for index in range(5_000):
        ring.changed(devices[index % 10])

    assert len(ring._heap) <= 64 + 4 * 10 + 1


# --- who may have it at all ---------------------------------------------------------------------


def test_labels_must_all_be_there() -> None:
    master = MasterBench()
    master.device("d1", slots=9, labels=("eu", "gpu"))
    master.device("d2", slots=9, labels=("eu",))
    gpu = master.submit(spec(labels=("gpu", "eu"))).task_ids
    nowhere = master.submit(spec(labels=("gpu", "us"))).task_ids

    assert [one.task_id for one in master.orders("d1")] == [*gpu]
    assert master.orders("d2") == []
    assert master.state(nowhere[0]) == "pending"
    master.device("d3", labels=("us", "gpu", "x"))
    assert [one.task_id for one in master.orders("d3")] == [*nowhere]


@pytest.mark.parametrize("strategy", [Strategy.ROUND_ROBIN, Strategy.WEIGHTED])
def test_turns_count_whatever_labels_were_asked_for(strategy: Strategy) -> None:
    master = with_strategy(strategy)
    for name in ("d1", "d2", "d3"):
        master.device(name, slots=9, labels=("gpu",) if name == "d1" else ())

    master.submit(spec(labels=("gpu",)))
    master.submit(spec(), spec())

    assert [len(master.orders(name)) for name in ("d1", "d2", "d3")] == [1, 1, 1]


def test_each_device_with_a_label_of_its_own_costs_no_more_than_one_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(count: int) -> tuple[int, int]:
        """Places looked up for 10 tasks pinned to a device each, and for those nobody can take."""
        master = MasterBench()
        master.audited_tasks_max = 0
        for index in range(count):
            master.device(f"d{index}", labels=("linux", f"host={index}"))
        looks = 0
        real = Balancer.refresh

        def counted(self: Balancer, device: Device) -> None:
            nonlocal looks
            looks += 1
            real(self, device)

        monkeypatch.setattr(Balancer, "refresh", counted)
        for index in range(10):
            master.submit(spec(labels=("linux", f"host={index}")))
        for_hosts = looks
        for index in range(10):
            master.submit(spec(labels=("linux", f"nobody={index}")))
        monkeypatch.undo()
        return for_hosts, looks - for_hosts

    assert work(200) == work(20)


def test_tasks_nobody_can_take_cost_nothing_until_somebody_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    master = MasterBench()
    master.device("d1", slots=3)
    rate = RateRule("slow", delay_ms=1_000)
    master.submit(
        *[spec(labels=(f"host={index}",), rate_key="slow" * (index % 2)) for index in range(50)],
        rates=(rate,),
    )
    picks = 0
    real = Fleet.pick

    def counted(self: Fleet, shape: Shape, *, free_only: bool) -> Device | None:
        nonlocal picks
        picks += 1
        return real(self, shape, free_only=free_only)

    monkeypatch.setattr(Fleet, "pick", counted)
    master.submit()
    assert len(master.orders("d1")) == 1
    assert picks == 1

    master.device("d2", slots=3, labels=("host=48", "host=30"))
    assert len(master.orders("d2")) == 2
    assert picks <= 5


def test_what_waits_for_a_busy_device_goes_on_when_it_can_take_more() -> None:
    master = MasterBench()
    master.device("d1", credit=0)
    master.device("d2", credit=1)
    [there] = master.submit(spec()).task_ids
    [first, second] = master.submit(spec(), spec()).task_ids
    [order] = master.orders("d2")
    assert order.task_id == there

    master.changes(DrainDevice(b"on", "d1", on=True))
    master.beat("d1", credit=1)
    assert master.orders("d1") == []
    master.changes(DrainDevice(b"off", "d1", on=False))
    assert [one.task_id for one in master.orders("d1")] == [first]
    master.changes(SetStrategy(b"s", Strategy.RANDOM))
    master.ends("d2", order, run_us=1_000_000)

    assert [one.task_id for one in master.orders("d2")] == [second]


def test_types_of_equal_priority_take_turns_at_a_scarce_fleet() -> None:
    master = MasterBench()
    master.device("d1", types=("many", "few"))
    master.submit(*[spec("many") for _ in range(20)])
    master.submit(spec("few"), spec("few"))

    seen = []
    for _ in range(6):
        [order] = master.orders("d1")
        seen.append(order.task_type)
        master.ends("d1", order, run_us=1_000_000)

    assert seen.count("few") == 2


def test_a_device_that_comes_back_with_other_abilities_is_taken_at_its_word() -> None:
    master = MasterBench()
    master.device("d1", slots=9)
    master.device("d1", slots=9, types=("other",), labels=("x",))

    master.submit(spec(), spec("other", labels=("x",)))

    assert [one.task_type for one in master.orders("d1")] == ["other"]


def test_fleets_of_changing_abilities_leave_nothing_behind() -> None:
    master = MasterBench()

    for index in range(50):
        master.device("d1", types=(f"type{index}",), labels=(f"run{index}",))

    fleet = master.core.state.fleet
    assert [len(one.groups) for one in fleet.sections.values()] == [1]
    assert list(fleet._labelled) == ["run49"]


def test_pools_have_slots_of_their_own() -> None:
    master = MasterBench()
    master.peers["d1"] = b"d1"
    master.hears(
        "d1",
        Hello(
            1,
            "d1",
            b"x" * 16,
            "",
            Capabilities(),
            (TypeOffer("slow", Pool.SYNC), TypeOffer("quick", Pool.ASYNC)),
            (PoolOffer(Pool.SYNC, 1), PoolOffer(Pool.ASYNC, 3)),
            (),
            100,
        ),
    )
    master.submit(*[spec(one) for one in ("slow", "quick") for _ in range(5)])

    counts = Counter(one.task_type for one in master.orders("d1"))

    assert counts == {"slow": 1, "quick": 3}


# --- how many -----------------------------------------------------------------------------------


def teach(master: MasterBench, name: str, run_us: int) -> None:
    """Let the master see how long a no-op takes."""
    master.submit()
    [order] = master.orders(name)
    master.ends(name, order, run_us=run_us)
    master.takes(name)


def test_unknown_tasks_are_never_handed_out_ahead() -> None:
    master = MasterBench()
    master.device("d1", slots=2)

    master.submit(*[spec() for _ in range(10)])

    assert len(master.orders("d1")) == 2


def test_short_tasks_are_handed_out_ahead_within_a_time() -> None:
    master = MasterBench()
    master.device("d1", slots=2)
    teach(master, "d1", 10_000)

    master.submit(*[spec() for _ in range(100)])

    assert len(master.orders("d1")) == 2 * AHEAD_US_PER_SLOT // 10_000


def test_very_short_tasks_are_bounded_by_the_credit() -> None:
    master = MasterBench()
    master.device("d1", slots=2, credit=50)
    teach(master, "d1", 1)

    master.submit(*[spec() for _ in range(100)])

    assert len(master.orders("d1")) == 50


def test_long_tasks_are_never_hoarded() -> None:
    master = MasterBench()
    master.device("d1", slots=2)
    teach(master, "d1", SHORT_US_MAX + 1)

    master.submit(*[spec() for _ in range(10)])

    assert len(master.orders("d1")) == 2


def test_one_long_run_ends_the_trust_at_once_and_short_ones_earn_it_back_slowly() -> None:
    master = MasterBench()
    master.device("d1", slots=1)
    for _ in range(5):
        teach(master, "d1", 100)
    teach(master, "d1", 10_000_000)
    master.submit(*[spec() for _ in range(10)])
    assert len(master.orders("d1")) == 1

    durations = master.core.state.fleet.durations
    runs = 0
    while (durations.expected_us("noop") or 0) > SHORT_US_MAX:
        durations.observe("noop", 100)
        runs += 1

    assert runs > 20


def test_free_slots_elsewhere_come_before_a_place_in_a_queue() -> None:
    master = MasterBench()
    master.device("d1", slots=1)
    teach(master, "d1", 100)
    master.submit(*[spec() for _ in range(3)])
    assert len(master.orders("d1")) == 3
    master.device("d2", slots=2)

    master.submit(*[spec() for _ in range(2)])

    assert len(master.orders("d2")) == 2


@pytest.mark.parametrize("run_us", [100, 10_000_000])
def test_no_more_in_hand_than_max_tasks_per_device(run_us: int) -> None:
    master = MasterBench(Settings(max_tasks_per_device=3))
    master.device("d1", slots=8)
    teach(master, "d1", run_us)

    master.submit(*[spec() for _ in range(10)])
    first = master.orders("d1")
    master.ends("d1", first[0], run_us=run_us)

    assert len(first) == 3
    assert len(master.orders("d1")) == 1


def test_a_cap_that_slots_keep_anyway_does_not_forbid_going_ahead() -> None:
    master = MasterBench(Settings(max_tasks_per_device=3))
    master.device("d1", slots=2)
    teach(master, "d1", 1_000)

    master.submit(*[spec() for _ in range(10)])

    assert len(master.orders("d1")) == 10


def test_what_failed_is_not_what_the_next_one_will_take() -> None:
    master = MasterBench()
    master.device("d1")
    master.submit(spec(max_retry_count=0))
    [order] = master.orders("d1")

    master.ends("d1", order, Outcome.FAILED, run_us=1)

    assert master.core.state.fleet.durations.expected_us("noop") is None


def test_labels_without_end_are_looked_up_anew_and_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zmqcluster.core.fleet._SECTIONS_MAX", 4)
    master = MasterBench()
    labels = tuple(f"l{index}" for index in range(16))
    master.device("d1", slots=99, labels=labels)
    master.device("d2", slots=99)

    for pair in zip(labels, labels[1:] + labels[:1], strict=True):
        master.submit(spec(labels=pair), spec(labels=(pair[0], "nowhere")))

    fleet = master.core.state.fleet
    assert len(master.orders("d1")) == 16
    assert master.orders("d2") == []
    assert len(fleet.sections) == 5
    assert len(fleet._sections_at) <= 4
    assert len(fleet._joined[DeviceId("d1")].groups) <= 5
    # What waits for labels that were forgotten is found again when they come.
    master.device("d3", slots=99, labels=("l0", "nowhere"))
    assert len(master.orders("d3")) == 1
