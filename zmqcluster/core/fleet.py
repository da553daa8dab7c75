"""The devices: who is there, what each can run, how much it has in hand."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter
from random import Random
from typing import Final

from msgspec import Struct

from zmqcluster.core.balance import Balancer, Course
from zmqcluster.core.lanes import Shape
from zmqcluster.core.rows import DeviceRow, TaskRow
from zmqcluster.messages import Control, Resources
from zmqcluster.model import DeviceId, DeviceState, Pool, Strategy, TaskId

# Handing out ahead: only tasks of a type known to be short, and never more than this much expected
# work for each slot. A device then bridges a commit and a round trip without idling.
SHORT_US_MAX: Final = 50_000
AHEAD_US_PER_SLOT: Final = 150_000
# Weight of the newest run in a type's expected run time.
_NEWEST_WEIGHT: Final = 0.1
# Sets of labels that tasks have asked for and that are remembered; beyond, the oldest is forgotten.
_SECTIONS_MAX: Final = 10_000
# Shapes that wait for labels nobody has; beyond, all are tried anew: most are gone by then.
_ABSENT_MAX: Final = 100_000

Labels = tuple[str, ...]
Types = tuple[tuple[str, Pool], ...]


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


# A device may tell of this many rate keys that no task in memory has (a redirect led there), and
# of one more each second: each is a row that the disk keeps for the retention.
FORESIGHT: Final = 1_000
FORESIGHT_EVERY_MS: Final = 1_000


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
        # Holds attempts that we never gave out: of a past that a restored backup has forgotten.
        self.is_astray = False
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
        # Rules about rate keys nobody here has tasks of: how many it may still send, and since when
        # that many.
        self._foresight = FORESIGHT
        self._foresight_ms = 0

    @property
    def is_online(self) -> bool:
        return bool(self.peer)

    def may_foretell(self, now_ms: int) -> bool:
        """May it set the limits of one more rate key that no task in memory has?"""
        gained = (now_ms - self._foresight_ms) // FORESIGHT_EVERY_MS
        if gained:
            self._foresight = min(FORESIGHT, self._foresight + gained)
            self._foresight_ms = now_ms
        if not self._foresight:
            return False
        self._foresight -= 1
        return True

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
            and not self.is_astray
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


class Group:
    """Devices of one section that run the same types: what one can run, all can."""

    __slots__ = ("balancers", "members", "section", "types")

    def __init__(self, section: Section, types: Types, balancers: dict[Pool, Balancer]) -> None:
        self.section = section
        self.types = types
        self.balancers = balancers
        self.members = 0


class Section:
    """The devices that have all the labels of one set, in groups."""

    __slots__ = ("_suitable", "asleep", "groups", "stranded")

    def __init__(self) -> None:
        # Keys of shapes that wait for a change of one of these devices, or for another group.
        self.asleep: dict[tuple[str, str], None] = {}
        self.stranded: dict[tuple[str, str], None] = {}
        self.groups: dict[Types, Group] = {}
        self._suitable: dict[str, list[Balancer]] = {}

    def suitable_for(self, task_type: str) -> list[Balancer]:
        """The groups whose devices run this type; that there are none is not remembered."""
        found = self._suitable.get(task_type)
        if found is None:
            found = [
                group.balancers[pool]
                for types, group in self.groups.items()
                for name, pool in types
                if name == task_type
            ]
            if found:
                self._suitable[task_type] = found
        return found

    def has_changed(self) -> None:
        """A group came or went."""
        self._suitable.clear()


class Seats:
    """Where a device sits that has joined, and under which labels it is found there."""

    __slots__ = ("balancers", "device", "groups", "labels")

    def __init__(self, device: Device) -> None:
        self.device = device
        self.labels = device.labels
        self.groups: list[Group] = []
        self.balancers: list[Balancer] = []

    def take(self, group: Group) -> None:
        self.groups.append(group)
        self.balancers += self._balancers_of(group)

    def leave(self, section: Section) -> None:
        """The section is no more."""
        self.groups = [one for one in self.groups if one.section is not section]
        self.balancers = [one for group in self.groups for one in self._balancers_of(group)]

    def _balancers_of(self, group: Group) -> list[Balancer]:
        return [one for pool, one in group.balancers.items() if pool in self.device.pools]


class Fleet:
    """All known devices, in sections and groups so that a pick never scans the fleet.

    There is a section for each set of labels that tasks have asked for, and none for labels that
    nobody asks for: a host's own name is a label of its own. A device has a seat in each section
    whose labels it has; most fleets have one section only, that of no labels.
    """

    def __init__(self, strategy: Strategy, rng: Random) -> None:
        self.strategy = strategy
        self.devices: dict[DeviceId, Device] = {}
        self.by_peer: dict[bytes, Device] = {}
        self.durations = Durations()
        self._rng = rng
        self._course = Course()
        self.sections: dict[Labels, Section] = {(): Section()}
        # Sections by their first label, and joined devices by each of theirs.
        self._sections_at: dict[str, dict[Labels, Section]] = {}
        self._labelled: dict[str, dict[DeviceId, Seats]] = {}
        self._joined: dict[DeviceId, Seats] = {}
        self._woken: dict[tuple[str, str], None] = {}
        # Keys of shapes by one of their labels, where nobody has them all.
        self._absent: dict[str, dict[tuple[str, str], None]] = {}
        self._absent_count = 0

    def online(self) -> Iterable[Device]:
        return self.by_peer.values()

    def set_strategy(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self._course = Course()
        joined = [self.devices[device_id] for device_id in self._joined]
        for device in joined:
            self.leave(device)
        for device in joined:
            self.join(device)

    def join(self, device: Device) -> None:
        """Device has a session, or offers other types, labels or slots than before."""
        self.leave(device)
        seats = self._joined[device.device_id] = Seats(device)
        self._seat(seats, self.sections[()])
        for label in seats.labels:
            self._appear(label)
            self._labelled.setdefault(label, {})[device.device_id] = seats
            for labels, section in self._sections_at.get(label, {}).items():
                if set(labels) <= set(seats.labels):
                    self._seat(seats, section)
        self.refresh(device)

    def leave(self, device: Device) -> None:
        """Device has no session any more."""
        seats = self._joined.pop(device.device_id, None)
        if seats is None:
            return
        for label in seats.labels:
            del self._labelled[label][device.device_id]
            if not self._labelled[label]:
                del self._labelled[label]
        for group in seats.groups:
            _vacate(device, group)
            if not group.members:
                # What waited for one of these has nobody to wait for.
                self._wake(group.section)

    def refresh(self, device: Device) -> None:
        """Device's load, credit or state changed, perhaps so that it can take more."""
        seats = self._joined.get(device.device_id)
        if seats is None:
            return
        for balancer in seats.balancers:
            balancer.refresh(device)
        for group in seats.groups:
            if group.section.asleep:
                self._wake(group.section)

    def took(self, device: Device) -> None:
        """Device has one task more: its place changes, and nobody who waits can be helped by it."""
        for balancer in self._joined[device.device_id].balancers:
            balancer.refresh(device)

    def runs(self, shape: Shape) -> bool:
        """Is there a device, however busy, that may be given this shape?"""
        return bool(self._suitable_for(shape))

    def may_take(self, shape: Shape) -> bool:
        """Is there one that seems to have a slot or, for a short task, time?"""
        balancers = self._suitable_for(shape)
        if any(one.rank(is_free=True) for one in balancers):
            return True
        expected_us = self.durations.expected_us(shape.task_type)
        is_short = expected_us is not None and expected_us <= SHORT_US_MAX
        return is_short and any(one.rank(is_free=False) for one in balancers)

    def will_wake(self, shape: Shape) -> bool:
        """Name shape in take_woken() once a device that may be given it has changed.

        False: its section was forgotten meanwhile.
        """
        section = self.sections.get(shape.labels)
        if section is None:
            return self._is_absent(shape)
        runs = section.suitable_for(shape.task_type)
        (section.asleep if runs else section.stranded)[shape.key] = None
        return True

    def take_woken(self) -> list[tuple[str, str]]:
        """Keys of shapes that need not sleep any longer, since the last call."""
        woken = list(self._woken)
        self._woken.clear()
        return woken

    def knows_type(self, task_type: str) -> bool:
        """Does any device that is online run this type?"""
        return bool(self.sections[()].suitable_for(task_type))

    def pick(self, shape: Shape, *, free_only: bool) -> Device | None:
        """A device for one more task of this shape, by the strategy, or None.

        free_only: nothing may be handed out ahead (rate keys with a delay).
        """
        balancers = self._suitable_for(shape)
        for balancer in _in_order(balancers, is_free=True):
            device = balancer.best_free()
            if device is not None:
                return self._chosen(device, balancer.pool)
        expected_us = self.durations.expected_us(shape.task_type)
        if free_only or expected_us is None or expected_us > SHORT_US_MAX:
            return None

        def can_take(device: Device) -> bool:
            return device.has_time_for(device.types[shape.task_type], expected_us)

        for balancer in _in_order(balancers, is_free=False):
            device = balancer.best_busy(can_take)
            if device is not None:
                return self._chosen(device, balancer.pool)
        return None

    def _chosen(self, device: Device, pool: Pool) -> Device:
        """It is its turn no more, wherever it has a seat."""
        for balancer in self._joined[device.device_id].balancers:
            if balancer.pool is pool:
                balancer.chosen(device)
        return device

    def _wake(self, section: Section) -> None:
        self._woken.update(section.asleep)
        section.asleep.clear()

    def _wake_stranded(self, section: Section) -> None:
        self._woken.update(section.stranded)
        section.stranded.clear()

    def _is_absent(self, shape: Shape) -> bool:
        """Has nobody its labels? Then it is named when a device comes that may have them."""
        if self._having(shape.labels):
            return False
        if self._absent_count >= _ABSENT_MAX:
            for label in list(self._absent):
                self._appear(label)
        waiting = self._absent.setdefault(self._rarest(shape.labels), {})
        self._absent_count += shape.key not in waiting
        waiting[shape.key] = None
        return True

    def _appear(self, label: str) -> None:
        waiting = self._absent.pop(label, {})
        self._absent_count -= len(waiting)
        self._woken.update(waiting)

    def _suitable_for(self, shape: Shape) -> list[Balancer]:
        section = self.sections.get(shape.labels)
        if section is None and self._having(shape.labels):
            section = self._open_section(shape.labels)
        return section.suitable_for(shape.task_type) if section is not None else []

    def _open_section(self, labels: Labels) -> Section:
        """Tasks ask for these labels: from now on the devices that have them all lie together."""
        if len(self.sections) > _SECTIONS_MAX:
            self._close_oldest_section()
        section = self.sections[labels] = Section()
        self._sections_at.setdefault(labels[0], {})[labels] = section
        for seats in self._having(labels):
            self._seat(seats, section)
            self.refresh(seats.device)
        return section

    def _close_oldest_section(self) -> None:
        labels = next(one for one in self.sections if one)
        section = self.sections.pop(labels)
        del self._sections_at[labels[0]][labels]
        if not self._sections_at[labels[0]]:
            del self._sections_at[labels[0]]
        for seats in self._having(labels):
            seats.leave(section)
        self._wake(section)
        self._wake_stranded(section)

    def _having(self, labels: Labels) -> list[Seats]:
        rarest = self._labelled.get(self._rarest(labels), {})
        return [seats for seats in rarest.values() if set(labels) <= set(seats.labels)]

    def _rarest(self, labels: Labels) -> str:
        return min(labels, key=lambda label: len(self._labelled.get(label, ())))

    def _seat(self, seats: Seats, section: Section) -> None:
        types: Types = tuple(sorted(seats.device.types.items()))
        group = section.groups.get(types)
        if group is None:
            balancers = {
                pool: Balancer(self.strategy, pool, self._rng, self._course) for pool in Pool
            }
            group = section.groups[types] = Group(section, types, balancers)
            section.has_changed()
            self._wake_stranded(section)
        group.members += 1
        seats.take(group)


def _vacate(device: Device, group: Group) -> None:
    for balancer in group.balancers.values():
        balancer.remove(device)
    group.members -= 1
    if not group.members:
        del group.section.groups[group.types]
        group.section.has_changed()


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
