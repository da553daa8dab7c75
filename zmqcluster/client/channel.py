"""A peer's sockets on an asyncio loop: frames and links arrive as calls, nothing blocks."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import zmq

from zmqcluster.runtime.transport import Link, PeerSockets

FRAMES_PER_TURN = 256


class Channel:
    """Made anywhere, opened and used on one event loop."""

    def __init__(
        self,
        connect: Callable[[], PeerSockets],
        on_frame: Callable[[bytes], None],
        on_link: Callable[[Link], None],
    ) -> None:
        self._connect = connect
        self._on_frame = on_frame
        self._on_link = on_link
        self._sockets: PeerSockets | None = None
        self._unsent: deque[bytes] = deque()

    @property
    def is_open(self) -> bool:
        return self._sockets is not None

    def open(self) -> None:
        """Connect; the other side need not be there yet. Again: nothing happens."""
        if self._sockets is not None:
            return
        self._sockets = self._connect()
        loop = asyncio.get_running_loop()
        for socket in self._sockets.sockets:
            loop.add_reader(socket.fileno(), self._on_readable)

    def close(self) -> None:
        """What was sent may still leave for a moment. Again: nothing happens."""
        sockets, self._sockets = self._sockets, None
        if sockets is None:
            return
        loop = asyncio.get_running_loop()
        for socket in sockets.sockets:
            loop.remove_reader(socket.fileno())
        sockets.close(linger_ms=200)

    def send(self, frame: bytes) -> None:
        """Queue a frame; one that finds the queue full waits here."""
        if self._sockets is None:
            return
        if not self._unsent and self._sockets.send(frame):
            # Sending may have eaten the edge that says "readable".
            self._on_readable()
        else:
            self._unsent.append(frame)

    def _on_readable(self) -> None:
        """The descriptors are edge-triggered: read until nothing is left."""
        sockets = self._sockets
        if sockets is None:
            return
        for link in sockets.poll_monitor():
            self._on_link(link)
        while self._sockets is sockets and (frames := sockets.receive(FRAMES_PER_TURN)):
            for frame in frames:
                self._on_frame(frame)
        if self._sockets is not sockets:
            return
        while self._unsent and sockets.send(self._unsent[0]):
            self._unsent.popleft()
        pending = sockets.dealer.getsockopt(zmq.EVENTS)
        if isinstance(pending, int) and pending & zmq.POLLIN:
            asyncio.get_running_loop().call_soon(self._on_readable)
