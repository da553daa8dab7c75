"""Which of the devices that could take a task gets it: four strategies behind one seam.

A Ring orders devices by its own idea; a Balancer keeps two of them, one of devices with a free
slot and one of busy devices that may still be handed short tasks ahead. Every step is O(log n).
Unlike devices lie in different rings, whose ranks are comparable: the strategy holds for them all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from itertools import count, islice
from random import Random
from typing import TYPE_CHECKING, Final, Protocol

from zmqcluster.model import DeviceId, Pool, Strategy

if TYPE_CHECKING:
    from zmqcluster.core.fleet import Device

# How many devices a ring offers before the dispatcher takes "no" for an answer: devices that
# cannot take this very task (too much handed ahead) must not make dispatch linear in the fleet.
_OFFERS: Final = 8


class Course:
    """What the rings of a fleet share, so that they can be compared.

    serial: counts entries and turns. passed: how far the weighted strategy has come.
    """

    def __init__(self) -> None:
        self.serial = count(1)
        self.passed = 0.0


Rank = tuple[float, int]


class Ring(Protocol):
    """An order over devices. offer() yields the best few without changing the order.

    rank(): the place of its best device among those of all rings, lowest first; None: it is empty.
    """

    def rank(self) -> Rank | None: ...

    def add(self, device: Device) -> None: ...
    def discard(self, device: Device) -> None: ...
    def changed(self, device: Device) -> None: ...
    def offer(self) -> Iterator[Device]: ...
    def chosen(self, device: Device) -> None: ...


class LoadRing:
    """least_tasks: fewest tasks in hand for its slots first; ties go to who waited longest."""

    def __init__(self, pool: Pool, rng: Random, course: Course) -> None:
        self._pool = pool
        self._course = course
        self._heap: list[tuple[float, int, Device]] = []
        self._current: dict[DeviceId, int] = {}

    def add(self, device: Device) -> None:
        serial = next(self._course.serial)
        self._current[device.device_id] = serial
        heappush(self._heap, (device.load(self._pool), serial, device))
        if len(self._heap) > 64 + 4 * len(self._current):
            self._heap = [entry for entry in self._heap if self._is_current(entry)]
            heapify(self._heap)

    def discard(self, device: Device) -> None:
        self._current.pop(device.device_id, None)

    def changed(self, device: Device) -> None:
        self.add(device)

    def offer(self) -> Iterator[Device]:
        if self.rank() is not None:
            yield self._heap[0][2]

    def rank(self) -> Rank | None:
        heap = self._heap
        while heap and not self._is_current(heap[0]):
            heappop(heap)
        return heap[0][:2] if heap else None

    def chosen(self, device: Device) -> None:
        """Its load changes, and with it its place: changed() follows."""

    def _is_current(self, entry: tuple[float, int, Device]) -> bool:
        return self._current.get(entry[2].device_id) == entry[1]


class TurnRing:
    """round_robin: whoever was served longest ago first."""

    def __init__(self, pool: Pool, rng: Random, course: Course) -> None:
        self._course = course
        # Not a dict: finding the first key walks over all that were deleted before it.
        self._turns: OrderedDict[DeviceId, tuple[int, Device]] = OrderedDict()

    def add(self, device: Device) -> None:
        if device.device_id not in self._turns:
            self._turns[device.device_id] = (next(self._course.serial), device)

    def discard(self, device: Device) -> None:
        self._turns.pop(device.device_id, None)

    def changed(self, device: Device) -> None:
        """Load does not matter here."""

    def offer(self) -> Iterator[Device]:
        for _, device in islice(self._turns.values(), _OFFERS):
            yield device

    def rank(self) -> Rank | None:
        for serial, _ in self._turns.values():
            return 0.0, serial
        return None

    def chosen(self, device: Device) -> None:
        if self._turns.pop(device.device_id, None) is not None:
            self.add(device)


class StrideRing:
    """weighted: in proportion to slots (stride scheduling: each turn costs 1/slots)."""

    def __init__(self, pool: Pool, rng: Random, course: Course) -> None:
        self._pool = pool
        self._course = course
        self._heap: list[tuple[float, int, Device]] = []
        self._current: dict[DeviceId, int] = {}
        self._passes: dict[DeviceId, float] = {}

    def add(self, device: Device) -> None:
        if device.device_id in self._current:
            return
        # A newcomer starts level with the others, not with a claim to all it has missed.
        passed = self._course.passed
        self._enter(device, max(passed, self._passes.get(device.device_id, 0.0)))

    def discard(self, device: Device) -> None:
        self._current.pop(device.device_id, None)

    def changed(self, device: Device) -> None:
        """Only being served moves a device."""

    def offer(self) -> Iterator[Device]:
        best: list[tuple[float, int, Device]] = []
        while len(best) < _OFFERS and self.rank() is not None:
            best.append(heappop(self._heap))
        for entry in best:
            heappush(self._heap, entry)
        for entry in best:
            yield entry[2]

    def rank(self) -> Rank | None:
        heap = self._heap
        while heap and self._current.get(heap[0][2].device_id) != heap[0][1]:
            heappop(heap)
        return heap[0][:2] if heap else None

    def chosen(self, device: Device) -> None:
        if device.device_id in self._current:
            at = self._passes[device.device_id]
            self._course.passed = max(self._course.passed, at)
            self._enter(device, at + 1.0 / max(1, device.slots(self._pool)))

    def _enter(self, device: Device, at: float) -> None:
        serial = next(self._course.serial)
        self._current[device.device_id] = serial
        self._passes[device.device_id] = at
        heappush(self._heap, (at, serial, device))


class RandomRing:
    """random: anybody, with equal chances."""

    def __init__(self, pool: Pool, rng: Random, course: Course) -> None:
        self._rng = rng
        self._devices: list[Device] = []
        self._index: dict[DeviceId, int] = {}

    def add(self, device: Device) -> None:
        if device.device_id not in self._index:
            self._index[device.device_id] = len(self._devices)
            self._devices.append(device)

    def discard(self, device: Device) -> None:
        index = self._index.pop(device.device_id, None)
        if index is None:
            return
        last = self._devices.pop()
        if last is not device:
            self._devices[index] = last
            self._index[last.device_id] = index

    def changed(self, device: Device) -> None:
        """Load does not matter here."""

    def offer(self) -> Iterator[Device]:
        for _ in range(min(_OFFERS, len(self._devices))):
            yield self._devices[self._rng.randrange(len(self._devices))]

    def rank(self) -> Rank | None:
        """Drawn so that each ring comes first as often as its number of devices deserves."""
        if not self._devices:
            return None
        return -(self._rng.random() ** (1 / len(self._devices))), 0

    def chosen(self, device: Device) -> None:
        """Chance has no memory."""


RINGS: Final[dict[Strategy, type[LoadRing | TurnRing | StrideRing | RandomRing]]] = {
    Strategy.LEAST_TASKS: LoadRing,
    Strategy.ROUND_ROBIN: TurnRing,
    Strategy.WEIGHTED: StrideRing,
    Strategy.RANDOM: RandomRing,
}


class Balancer:
    """Devices of one profile that can take more tasks of one pool, in the strategy's order."""

    def __init__(self, strategy: Strategy, pool: Pool, rng: Random, course: Course) -> None:
        self.pool = pool
        self._free: Ring = RINGS[strategy](pool, rng, course)
        self._busy: Ring = RINGS[strategy](pool, rng, course)
        self._place: dict[DeviceId, Ring] = {}

    def __len__(self) -> int:
        return len(self._place)

    def refresh(self, device: Device) -> None:
        """Put device where its load, credit and state say: free, busy, or nowhere."""
        ring = self._ring_of(device)
        former = self._place.get(device.device_id)
        if former is ring:
            if ring is not None:
                ring.changed(device)
            return
        if former is not None:
            former.discard(device)
            del self._place[device.device_id]
        if ring is not None:
            ring.add(device)
            self._place[device.device_id] = ring

    def remove(self, device: Device) -> None:
        """Forget device; unknown is fine."""
        ring = self._place.pop(device.device_id, None)
        if ring is not None:
            ring.discard(device)

    def rank(self, *, is_free: bool) -> Rank | None:
        """Of its best device with a free slot, or of its best busy one."""
        return (self._free if is_free else self._busy).rank()

    def best_free(self) -> Device | None:
        """The next device with a free slot, or None."""
        return next(self._free.offer(), None)

    def best_busy(self, can_take: Callable[[Device], bool]) -> Device | None:
        """The next busy device that may be handed a task ahead, or None."""
        return next((one for one in self._busy.offer() if can_take(one)), None)

    def chosen(self, device: Device) -> None:
        """Device gets a task, by this balancer's advice or another's; refresh() follows."""
        ring = self._place.get(device.device_id)
        if ring is not None:
            ring.chosen(device)

    def _ring_of(self, device: Device) -> Ring | None:
        if not device.can_take_more or device.is_capped:
            return None
        return self._free if device.has_free_slot(self.pool) else self._busy
