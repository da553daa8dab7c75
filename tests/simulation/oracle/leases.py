"""Who was heard when: nobody is given up too early or too late, nor half the fleet at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tests.simulation.disk import Disk
from tests.simulation.oracle.room import Key, Room, device_of
from tests.simulation.world import World
from zmqcluster.core.effects import Action, Send
from zmqcluster.core.events import Peer
from zmqcluster.core.rows import AssignmentRow
from zmqcluster.core.settings import Settings
from zmqcluster.messages import Welcome
from zmqcluster.model import DeviceId

# A loss is on disk this long after a lease is over: two slow commits, the next look.
NOTICED_MS: Final = 7_000
# Whoever lost its connection has so long to come back with another one.
GRACE_MS: Final = Settings().reconnect_grace_ms
# From so many devices on, a mass loss is doubted for a while.
BRAKE_DEVICES: Final = 4


class Leases(Room):
    """holders: who has which attempt, as the disk says."""

    def __init__(self, world: World, disk: Disk) -> None:
        super().__init__(world, disk)
        self.holders: dict[Key, DeviceId] = {}
        self._opened_ms: dict[Key, int] = {}
        # By connection; and the connection of each device.
        self._heard: dict[Peer, int] = {}
        self._closed: dict[Peer, int] = {}
        self._sessions: dict[DeviceId, Peer] = {}
        # When a session ended, as the master decided it: what it held is taken back from then on.
        self._closed_ms: dict[DeviceId, int] = {}
        # The master was deaf until then.
        self._forgiven_ms = 0
        self._braked_ms = -(10**9)

    def master_started(self) -> None:
        self.forgive()
        self._sessions.clear()

    def forgive(self) -> None:
        """Every lease begins anew."""
        self._forgiven_ms = self.world.now_ms

    def heard(self, peer: Peer) -> None:
        self._heard[peer] = self.world.now_ms

    def lost(self, peer: Peer) -> None:
        self._closed[peer] = self.world.now_ms

    def braked(self) -> None:
        """The master says that it doubts a mass loss."""
        self._braked_ms = self.world.now_ms

    def open_sessions(self, welcomed: Iterator[Peer], up_to: DeviceId | None = None) -> None:
        """Whoever was welcomed; not each of them gets an event, when there are too many."""
        for peer in welcomed:
            device_id = device_of(peer)
            self._open_session(device_id, peer)
            if device_id == up_to:
                return

    def close_session(self, device_id: DeviceId) -> None:
        self._sessions.pop(device_id, None)
        self._closed_ms[device_id] = self.world.now_ms

    def check_loss(self, device_id: DeviceId, why: str) -> None:
        """Nobody is given up before a lease is over, and half the fleet not at once."""
        options, now_ms = self.world.options, self.world.now_ms
        if why.startswith("silent") and device_id in self._sessions:
            silent_ms = now_ms - self._heard_ms(device_id)
            if silent_ms < options.timeout_ms:
                self.fail(f"{device_id} was given up after {silent_ms} ms of silence: {why}")
            if self._is_mass_loss() and now_ms - self._braked_ms > 8 * options.timeout_ms:
                self.fail(f"more than half of the devices are silent, and {device_id} is given up")
        if why.startswith("its connection closed") and device_id in self._sessions:
            closed_ms = self._closed.get(self._sessions[device_id], now_ms)
            waited_ms = now_ms - max(closed_ms, self._forgiven_ms)
            if waited_ms < GRACE_MS:
                self.fail(f"{device_id} had {waited_ms} ms to connect again: {why}")
        self.close_session(device_id)

    def check_leases(self) -> None:
        """What a silent device held is taken back in time."""
        now_ms, options = self.world.now_ms, self.world.options
        patience_ms = options.timeout_ms + NOTICED_MS
        if len(self._sessions) >= BRAKE_DEVICES:
            patience_ms += 8 * options.timeout_ms
        for device_id, peer in self._sessions.items():
            silent_ms = now_ms - max(self._heard.get(peer, 0), self._forgiven_ms)
            if silent_ms > patience_ms:
                self.fail(f"{device_id} is still counted alive, silent for {silent_ms} ms")
        for key, device_id in self.holders.items():
            since_ms = max(self._heard_ms(device_id), self._opened_ms[key])
            if now_ms - since_ms > patience_ms:
                self.fail(
                    f"attempt {key} is still with {device_id}, silent for {now_ms - since_ms} ms"
                )

    def kept(self, key: Key, attempt: AssignmentRow) -> None:
        """This row is about to be on disk."""
        if attempt.outcome:
            self.holders.pop(key, None)
        else:
            self.holders[key] = attempt.device_id
            self._opened_ms[key] = self.world.now_ms

    def _open_session(self, device_id: DeviceId, peer: Peer) -> None:
        former = self._sessions.get(device_id)
        if former is not None and former.partition(b"#")[0] != peer.partition(b"#")[0]:
            age_ms = self.world.now_ms - self._heard.get(former, 0)
            # What came in this very turn may have come after the greeting.
            is_alive = former not in self._closed and 0 < age_ms < self.world.options.beat_ms
            if is_alive:
                self.fail(f"{peer!r} takes the place of {former!r}, heard {age_ms} ms ago")
        self._sessions[device_id] = peer

    def _heard_ms(self, device_id: DeviceId) -> int:
        peer = self._sessions.get(device_id)
        heard_ms = self._closed_ms.get(device_id, 0) if peer is None else self._heard.get(peer, 0)
        return max(self._forgiven_ms, heard_ms)

    def _is_mass_loss(self) -> bool:
        """Are more than half of at least BRAKE_DEVICES silent?"""
        margin_ms = self.world.options.timeout_ms - self.world.options.beat_ms
        silent = sum(self.world.now_ms - self._heard_ms(one) >= margin_ms for one in self._sessions)
        return len(self._sessions) >= BRAKE_DEVICES and 2 * silent > len(self._sessions)


def welcomed_by(actions: list[Action]) -> Iterator[Peer]:
    """The connections that are told Welcome, in the order in which their devices greeted."""
    for one in actions:
        if isinstance(one, Send) and isinstance(one.message, Welcome):
            yield one.peer
