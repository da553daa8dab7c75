"""The devices: who is there, what each can run, how much it has in hand."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter
from random import Random
from typing import Final

from msgspec import Struct

from zmqcluster.core.balance import Balancer, Course
from zmqcluster.core.queue import Shape
from zmqcluster.core.rows import DeviceRow, TaskRow
from zmqcluster.messages import Control, Resources
from zmqcluster.model import DeviceId, DeviceState, Pool, Strategy, TaskId

# Handing out ahead: only tasks of a type known to be short, and never more than this much expected
# work for each slot. A device then bridges a commit and a round trip without idling.
SHORT_US_MAX: Final = 50_000
AHEAD_US_PER_SLOT: Final = 150_000
# Weight of the newest run in a type's expected run time.
_NEWEST_WEIGHT: Final = 0.1
# Labels that tasks have asked for, and shapes whose devices were looked up: beyond, begin anew.
_LABELS_NAMED: Final = 256
_SHAPES_REMEMBERED: Final = 10_000


class Flight(Struct):
    """An attempt in a device's hands. begun: it is known to run. sent_ms, seq: its Assign."""

    task: TaskRow
    device_id: DeviceId
    pool: Pool
    expected_us: int
    seq: int
    sent_ms: int
    begun: bool = False
    # Its delayed rate key stays closed until it is known to have begun.
    is_starting: bool = False
    progress: float = 0.0
    note: str = ""
    # Seen in the database at start, and not yet claimed by its device.
    is_orphan: bool = False


class PoolLoad(Struct):
    """What a device has in hand in one pool."""

    slots: int
    in_hand: int = 0
    expected_us: int = 0


class Device:
    """One device and its session, if it has one (peer is not empty)."""

    def __init__(self, row: DeviceRow) -> None:
        self.row = row
        self.device_id = row.device_id
        self.peer = b""
        self.boot_id = bytes.fromhex(row.boot_id)
        self.session = 0
        self.assign_seq = 0
        self.beat_seq = 0
        self.credit = 0
        self.running_max = 0
        self.heard_ms = 0
        self.lost_at_ms: int | None = None
        self.draining = False
        self.stopping = False
        self.control_version = 0
        self.flights: dict[TaskId, Flight] = {}
        self.pools: dict[Pool, PoolLoad] = {}
        self.types: dict[str, Pool] = {}
        self.labels: tuple[str, ...] = ()
        self.resources = Resources()
        self.running = 0
        self.sampled_ms = 0

    @property
    def is_online(self) -> bool:
        return bool(self.peer)

    @property
    def state(self) -> DeviceState:
        if not self.is_online:
            return DeviceState.OFFLINE
        is_draining = self.row.drained or self.draining
        return DeviceState.DRAINING if is_draining else DeviceState.ONLINE

    @property
    def can_take_more(self) -> bool:
        # As state, but asked for at each hand-out and each end.
        return (
            len(self.flights) < self.credit
            and bool(self.peer)
            and self.lost_at_ms is None
            and not (self.row.drained or self.draining)
        )

    @property
    def control(self) -> Control:
        return Control(version=self.control_version, drain=self.row.drained, stop=self.stopping)

    def slots(self, pool: Pool) -> int:
        return self.pools[pool].slots

    @property
    def slots_in_all(self) -> int:
        return sum(at.slots for at in self.pools.values())

    def load(self, pool: Pool) -> float:
        at = self.pools[pool]
        return at.in_hand / at.slots if at.slots else float("inf")

    def has_free_slot(self, pool: Pool) -> bool:
        at = self.pools[pool]
        return at.in_hand < at.slots

    @property
    def is_capped(self) -> bool:
        """May it have no more in hand, lest it runs more at once than the operator allows?

        Where its slots alone keep it below the cap, more may wait for them.
        """
        cap = self.running_max
        return bool(cap) and len(self.flights) >= cap and self.slots_in_all > cap

    def has_time_for(self, pool: Pool, expected_us: int) -> bool:
        """May a short task be handed out ahead, though every slot is taken?"""
        at = self.pools[pool]
        return at.slots > 0 and at.expected_us + expected_us <= AHEAD_US_PER_SLOT * at.slots


class Durations:
    """Expected run time by task type: a moving average of what results report."""

    def __init__(self) -> None:
        self._mean_us: dict[str, float] = {}

    def observe(self, task_type: str, run_us: int) -> None:
        former = self._mean_us.get(task_type)
        if former is None:
            self._mean_us[task_type] = float(run_us)
        else:
            # One long run weighs at once, so that long tasks are never hoarded; many short ones
            # are needed to trust the type again.
            weight = _NEWEST_WEIGHT if run_us <= former else 0.5
            self._mean_us[task_type] = former + weight * (run_us - former)

    def expected_us(self, task_type: str) -> int | None:
        """None: never seen one end, so nothing is handed out ahead."""
        mean = self._mean_us.get(task_type)
        return None if mean is None else int(mean)


_Profile = tuple[tuple[tuple[str, Pool], ...], tuple[str, ...]]


class Fleet:
    """All known devices, grouped by what they can run so that a pick never scans the fleet."""

    def __init__(self, strategy: Strategy, rng: Random) -> None:
        self.strategy = strategy
        self.devices: dict[DeviceId, Device] = {}
        self.by_peer: dict[bytes, Device] = {}
        self.durations = Durations()
        self._rng = rng
        self.groups: dict[_Profile, dict[Pool, Balancer]] = {}
        self._profiles: dict[DeviceId, _Profile] = {}
        self._members: dict[_Profile, int] = {}
        self._course = Course()
        self._named: dict[str, None] = {}
        self._suitable: dict[tuple[str, str], list[Balancer]] = {}

    def online(self) -> Iterable[Device]:
        return self.by_peer.values()

    def set_strategy(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self._regroup()

    def _name(self, labels: tuple[str, ...]) -> None:
        """Tasks ask for these labels: from now on they tell groups of devices apart.

        Labels nobody asks for (a host's own name, say) must not: each device would be a group.
        """
        new = [one for one in labels if one not in self._named]
        if new:
            if len(self._named) >= _LABELS_NAMED:
                self._named.clear()
            self._named.update(dict.fromkeys(labels))
            self._regroup()

    def _regroup(self) -> None:
        self.groups.clear()
        self._members.clear()
        self._suitable.clear()
        self._course = Course()
        joined, self._profiles = list(self._profiles), {}
        for device_id in joined:
            self.join(self.devices[device_id])

    def join(self, device: Device) -> None:
        """Device has a session, or offers other types, labels or slots than before."""
        self.leave(device)
        named = tuple(one for one in device.labels if one in self._named)
        profile: _Profile = (tuple(sorted(device.types.items())), named)
        self._profiles[device.device_id] = profile
        self._members[profile] = self._members.get(profile, 0) + 1
        if profile not in self.groups:
            self.groups[profile] = {
                pool: Balancer(self.strategy, pool, self._rng, self._course) for pool in Pool
            }
            self._suitable.clear()
        self.refresh(device)

    def leave(self, device: Device) -> None:
        """Device has no session any more."""
        profile = self._profiles.get(device.device_id)
        if profile is None:
            return
        for balancer in self.groups[profile].values():
            balancer.remove(device)
        del self._profiles[device.device_id]
        self._members[profile] -= 1
        if not self._members[profile]:
            del self._members[profile], self.groups[profile]
            self._suitable.clear()

    def refresh(self, device: Device) -> None:
        """Device's load, credit or state changed."""
        profile = self._profiles.get(device.device_id)
        if profile is None:
            return
        for pool, balancer in self.groups[profile].items():
            if pool in device.pools:
                balancer.refresh(device)

    def pick(self, shape: Shape, *, free_only: bool) -> Device | None:
        """A device for one more task of this shape, by the strategy, or None.

        free_only: nothing may be handed out ahead (rate keys with a delay).
        """
        balancers = self._suitable_for(shape)
        for balancer in _in_order(balancers, is_free=True):
            device = balancer.pick_free()
            if device is not None:
                return device
        expected_us = self.durations.expected_us(shape.task_type)
        if free_only or expected_us is None or expected_us > SHORT_US_MAX:
            return None

        def can_take(device: Device) -> bool:
            return device.has_time_for(device.types[shape.task_type], expected_us)

        for balancer in _in_order(balancers, is_free=False):
            device = balancer.pick_busy(can_take)
            if device is not None:
                return device
        return None

    def could_run(self, shape: Shape) -> bool:
        """Is there any device, however busy, that may be given this shape?"""
        return any(
            shape.task_type in device.types and set(shape.labels) <= set(device.labels)
            for device in self.online()
        )

    def _suitable_for(self, shape: Shape) -> list[Balancer]:
        found = self._suitable.get(shape.key)
        if found is None:
            self._name(shape.labels)
            if len(self._suitable) >= _SHAPES_REMEMBERED:
                self._suitable.clear()
            found = self._suitable[shape.key] = [
                balancers[dict(types)[shape.task_type]]
                for (types, labels), balancers in self.groups.items()
                if shape.task_type in dict(types) and all(one in labels for one in shape.labels)
            ]
        return found


def _in_order(balancers: list[Balancer], *, is_free: bool) -> list[Balancer]:
    """The groups that have somebody to offer, the best first. Nearly always there is one group."""
    if len(balancers) < 2:
        return balancers
    ranked = [(one.rank(is_free=is_free), one) for one in balancers]
    found = [(rank, one) for rank, one in ranked if rank is not None]
    return [one for _, one in sorted(found, key=itemgetter(0))]


def take(device: Device, flight: Flight) -> None:
    """Device holds flight from now on; Fleet.refresh() follows."""
    device.flights[flight.task.task_id] = flight
    at = device.pools.get(flight.pool)
    if at is not None:
        at.in_hand += 1
        at.expected_us += flight.expected_us


def give_back(device: Device, flight: Flight) -> None:
    """Device does not hold flight any more; Fleet.refresh() follows."""
    del device.flights[flight.task.task_id]
    at = device.pools.get(flight.pool)
    if at is not None:
        at.in_hand -= 1
        at.expected_us -= flight.expected_us
