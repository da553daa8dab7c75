"""A master that was stopped, and goes on after its successor has begun: two masters at once.

Whatever it decides from then on it cannot write: the disk is its successor's. But what was on disk
before it was stopped it still sends, and so it does with whatever takes no writing. It reaches its
peers over the connections they have now, as through a box in between that kept the old ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from tests.simulation.links import Link
from zmqcluster import codec
from zmqcluster.core.effects import Publish, Send
from zmqcluster.core.events import Committed, Event, MessageReceived, Tick
from zmqcluster.core.master import MasterCore
from zmqcluster.core.pipeline import Pipeline
from zmqcluster.errors import RemoteProtocolError

if TYPE_CHECKING:
    from tests.simulation.disk import Disk
    from tests.simulation.world import World

_TICK_MS: Final = 500
_TURNS_MAX: Final = 20


class StaleMaster:
    """What is left of one. heard: frames that came while it was stopped, with their links.

    is_landed: the commit that was under way is on disk, and it has not heard of that yet.
    """

    def __init__(
        self,
        world: World,
        disk: Disk,
        core: MasterCore,
        pipeline: Pipeline,
        links: Iterable[Link],
        *,
        heard: Iterable[tuple[Link, bytes]],
        offset_ms: int,
        is_landed: bool,
    ) -> None:
        self._world, self._disk = world, disk
        self._core, self._pipeline = core, pipeline
        self._links = {one.name: one for one in links}
        self._heard = list(heard)
        self._offset_ms = offset_ms
        self._is_landed = is_landed
        self._turns = 0

    def go_on(self) -> None:
        """One turn more, and others, until it has something to write."""
        self._turns += 1
        events: list[Event] = [Tick(self._world.wall_ms)]
        if self._is_landed:
            self._is_landed = False
            done = Committed(self._pipeline.done())
            self._release()
            events.append(done)
        events += filter(None, (self._read(*one) for one in self._heard))
        self._heard = []
        self._pipeline.add(self._core.handle(self._world.now_ms + self._offset_ms, events))
        if self._pipeline.is_busy or self._pipeline.begin() is not None:
            self._world.note("a stale master has to write, and ends")
            return
        self._release()
        if self._turns < _TURNS_MAX:
            self._world.at(_TICK_MS, self.go_on)

    def _read(self, link: Link, frame: bytes) -> Event | None:
        principal = link.peer.principal
        try:
            message = codec.decode_inbound(principal.role, frame)
        except RemoteProtocolError:
            return None
        facts = self._disk.facts(self._core, message)
        return MessageReceived(link.name, principal, message, facts)

    def _release(self) -> None:
        for action in self._pipeline.take():
            match action:
                case Send(peer, message) if peer in self._links:
                    link = self._links[peer].peer.link
                    if link is not None:
                        link.send_down(codec.encode(message))
                case Publish(hint):
                    frame = codec.encode(hint)
                    for one in self._links.values():
                        one.peer.hear_hint(frame)
                case _:
                    # Of what it orders to be read nothing is told.
                    pass
