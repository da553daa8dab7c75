"""Wall clocks that jump, and clocks that disagree."""

from __future__ import annotations

from typing import Final

from tests.chaos.catalogue import fault
from tests.chaos.rig import Rig
from tests.support.cluster import wait_until
from tests.support.wall_clock import WallClock

DAY_S: Final = 86_400
# Past 2038, where 32 bits of seconds end.
LONG_S: Final = 20 * 365 * DAY_S


@fault(13, "wall clocks jump a day ahead, a day back and past 2038", needs=("wall clock",))
def wall_clock_jumps(rig: Rig) -> None:
    clock = WallClock(rig.folder / "clock")
    rig.cluster.start_master(prefix=clock.prefix)
    rig.cluster.start_worker(prefix=clock.prefix)
    runs = rig.running("trace", 2, seconds=6.0)
    with rig.load() as load:
        for when, offset_s in (
            ("tomorrow", DAY_S),
            ("yesterday", -DAY_S),
            ("in 20 years", LONG_S),
            ("right", 0),
        ):
            rig.step(f"the wall clock is {when}")
            clock.step(offset_s)
            rig.flows(load, 60)
    rig.judge()
    assert rig.events("device_lost") == 0, "nothing expires"
    assert all(len(rig.starts_of(one.task_id)) == 1 for one in runs)
    assert _days_seen(rig) > LONG_S / DAY_S, "they did see it jump, ahead and back"


@fault(14, "a worker whose wall clock is an hour off", needs=("wall clock",))
def clock_skew(rig: Rig) -> None:
    rig.cluster.start_master()
    for number, offset_s in enumerate((3600, -3600)):
        clock = WallClock(rig.folder / f"clock{number}", offset_s)
        rig.cluster.start_worker(prefix=clock.prefix)
    with rig.load() as load:
        rig.running("trace", 2, seconds=4.0)
        rig.flows(load, 100)
    # A device's id holds the second in which it was made.
    made = sorted(int(one.device_id.split("-")[1]) for one in rig.cluster.devices())
    rig.judge()
    assert made[1] - made[0] > 7_000, "two hours lie between them"
    assert rig.events("device_lost") == 0
    assert rig.events("task_timed_out") == 0


def _days_seen(rig: Rig) -> int:
    """Between the earliest and the latest event on record."""
    sql = "SELECT (max(at_wall) - min(at_wall)) / 1000 FROM events"
    return int(wait_until(lambda: rig.cluster.rows(sql)[0][0], "there are events") / DAY_S)
