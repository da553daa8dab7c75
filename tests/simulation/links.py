"""Connections between the master and its peers, and all that can happen to them."""

from __future__ import annotations

from typing import Final, Protocol

from tests.simulation.world import World
from zmqcluster.core.events import Principal

# A silent TCP connection is probed by the kernel: see runtime/socket_options.py.
PROBED_MS: Final = 19_000


class MasterEnd(Protocol):
    """Where a connection leads."""

    is_up: bool

    def opened(self, link: Link) -> None: ...
    def closed(self, link: Link) -> None: ...
    def frame(self, link: Link, frame: bytes) -> None: ...


class PeerEnd(Protocol):
    """Who made the connection."""

    name: str
    principal: Principal
    link: Link | None

    def linked(self, link: Link) -> None: ...
    def unlinked(self, link: Link) -> None: ...
    def hear(self, link: Link, frame: bytes) -> None: ...
    def hear_hint(self, frame: bytes) -> None: ...


class Link:
    """One connection. A frame sent through it arrives later, changed in no way, or never."""

    def __init__(self, world: World, master: MasterEnd, peer: PeerEnd, number: int) -> None:
        self.world = world
        self.master = master
        self.peer = peer
        self.name = b"%s#%d" % (peer.name.encode(), number)
        self.is_open = True
        # Until then nothing arrives in this direction; what was sent arrives after it.
        self.up_stalled_ms = 0
        self.down_stalled_ms = 0
        self._up_last_ms = 0
        self._down_last_ms = 0

    def send_up(self, frame: bytes) -> None:
        """From the peer to the master."""
        now_ms = self.world.now_ms
        for delay_ms in self._fates():
            due_ms = self._ordered(max(now_ms + delay_ms, self.up_stalled_ms), self._up_last_ms)
            self._up_last_ms = max(due_ms, self._up_last_ms)
            self.world.at(due_ms - now_ms, self._arrive_up, frame)

    def send_down(self, frame: bytes) -> None:
        """From the master to the peer."""
        now_ms = self.world.now_ms
        for delay_ms in self._fates():
            due_ms = self._ordered(max(now_ms + delay_ms, self.down_stalled_ms), self._down_last_ms)
            self._down_last_ms = max(due_ms, self._down_last_ms)
            self.world.at(due_ms - now_ms, self._arrive_down, frame)

    def publish(self, frame: bytes) -> None:
        """A hint, over a connection of its own: now and then it gets lost."""
        if self.is_open and self.world.rng.random() < 0.9:
            self.world.at(1, self.peer.hear_hint, frame)

    def cut(self, *, master_notices: bool = True, peer_notices: bool = True) -> None:
        """The connection is gone, with all that was under way; each side may learn it or not."""
        if not self.is_open:
            return
        self.is_open = False
        # Whoever is not told finds out by the transport's own probes.
        self.world.at(1 if master_notices else PROBED_MS, self.master.closed, self)
        self.world.at(1 if peer_notices else PROBED_MS, self.peer.unlinked, self)

    def _fates(self) -> tuple[int, ...]:
        """The delays of each copy that arrives."""
        world, options = self.world, self.world.options
        if options.loss and world.roll("loss", options.loss):
            return ()
        delay_ms = 1 + int(world.rng.random() * 2 * options.latency_ms)
        if options.slow_links and world.roll("slow_links", options.slow_links):
            delay_ms += int(world.chance.expovariate(1 / 1_000))
        if options.duplicates and world.roll("duplicates", options.duplicates):
            return (delay_ms, delay_ms + world.chance.randrange(500))
        return (delay_ms,)

    def _ordered(self, due_ms: int, last_ms: int) -> int:
        """Frames keep their order, unless chance has it otherwise."""
        if due_ms < last_ms and not self.world.roll("reorder", self.world.options.reorder):
            return last_ms
        return due_ms

    def _arrive_up(self, frame: bytes) -> None:
        if self.is_open:
            self.master.frame(self, frame)

    def _arrive_down(self, frame: bytes) -> None:
        if self.is_open:
            self.peer.hear(self, frame)
