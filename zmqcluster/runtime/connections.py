"""Which peer is behind which descriptor: told what libzmq reports, it draws the conclusions."""

from __future__ import annotations


class Connections:
    """Which peer speaks through which descriptor, so that a closed one names its peer.

    libzmq reports ACCEPTED and DISCONNECTED by descriptor, in order, and DISCONNECTED before the
    descriptor is closed; each message tells the descriptor it came through. Descriptors are
    reused at once, so a message of a new peer may be read before the end of the old one is, and
    an old peer's last message after that.

    A peer may be named lost twice (it spoke, went, and was read late), never while it is there.
    """

    def __init__(self) -> None:
        # Connections that closed before anything was heard through them.
        self.unheard = 0
        self._open: set[int] = set()
        self._peer_at: dict[int, bytes] = {}
        self._lost: list[bytes] = []

    def __len__(self) -> int:
        return len(self._open)

    def knows(self, peer: bytes, descriptor: int) -> bool:
        return self._peer_at.get(descriptor) == peer

    def accepted(self, descriptor: int) -> None:
        self._open.add(descriptor)

    def disconnected(self, descriptor: int) -> None:
        self.unheard += descriptor in self._open and descriptor not in self._peer_at
        self._open.discard(descriptor)
        self._forget(descriptor)

    def heard(self, peer: bytes, descriptor: int) -> None:
        """A message of a peer not known at this descriptor; the monitor was drained before."""
        current = self._peer_at.get(descriptor)
        if current is not None and _came_before(peer, current):
            # The last words of one that is gone, read after the first ones of its successor.
            self._lost.append(peer)
            return
        self._forget(descriptor)
        if descriptor in self._open:
            self._peer_at[descriptor] = peer
        else:
            # It spoke and went before we listened.
            self._lost.append(peer)

    def take_lost(self) -> list[bytes]:
        lost, self._lost = self._lost, []
        return lost

    def _forget(self, descriptor: int) -> None:
        peer = self._peer_at.pop(descriptor, None)
        if peer is not None:
            self._lost.append(peer)


def _came_before(peer: bytes, other: bytes) -> bool:
    """libzmq numbers connections upwards, in 32 bits that wrap around."""
    return 0 < (int.from_bytes(other[1:]) - int.from_bytes(peer[1:])) % 2**32 < 2**31
