"""Requests from other threads of the master's own process (REST) to its loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress

from zmqcluster.errors import RequestRefused
from zmqcluster.messages import ClientMessage, Outbound, Refused, ToClient
from zmqcluster.runtime.doorbell import Doorbell

# A caller in this process is a peer like any other; no ROUTER makes such an id.
_LOCAL = b"local:"


class Mailbox:
    """post() from any thread; take(), answer() and close() on the loop only."""

    def __init__(self, doorbell: Doorbell) -> None:
        self._doorbell = doorbell
        self._posted: deque[tuple[ClientMessage, Future[ToClient]]] = deque()
        self._waiting: dict[bytes, Future[ToClient]] = {}
        self._serial = 0
        self._end: Exception | None = None

    def post(self, message: ClientMessage) -> Future[ToClient]:
        """Ask the core. The answer comes when what it says is on disk.

        Its result raises RequestRefused when the core says no, and what close() was given when
        nobody will answer. Cancelling the future only means that nobody listens any more.
        """
        future: Future[ToClient] = Future()
        self._posted.append((message, future))
        if self._end is None:
            self._doorbell.ring()
        else:
            self._turn_away(self._end)
        return future

    def take(self) -> list[tuple[bytes, ClientMessage]]:
        """What was posted since the last call, with the peer to answer."""
        taken: list[tuple[bytes, ClientMessage]] = []
        for message, future in self._listened_to():
            self._serial += 1
            peer = _LOCAL + self._serial.to_bytes(8, "big")
            self._waiting[peer] = future
            taken.append((peer, message))
        return taken

    @staticmethod
    def is_local(peer: bytes) -> bool:
        return peer.startswith(_LOCAL)

    def answer(self, peer: bytes, message: Outbound) -> None:
        """Give a caller its answer; only the first counts."""
        future = self._waiting.pop(peer, None)
        if future is None:
            return
        if isinstance(message, Refused):
            future.set_exception(RequestRefused(message.code, message.problem))
        else:
            future.set_result(message)  # type: ignore[arg-type]  # the core answers clients so

    def close(self, error: Exception) -> None:
        """Nobody will answer any more: tell all who wait, and whoever asks from now on."""
        # In this order: a post() meanwhile sees the end, or its question is seen here.
        self._end = error
        self._turn_away(error)
        for future in self._waiting.values():
            future.set_exception(error)
        self._waiting.clear()

    def _turn_away(self, error: Exception) -> None:
        for _, future in self._listened_to():
            future.set_exception(error)

    def _listened_to(self) -> Iterator[tuple[ClientMessage, Future[ToClient]]]:
        """Take what was posted and somebody still waits for; from several threads, each once."""
        with suppress(IndexError):
            while True:
                message, future = self._posted.popleft()
                if future.set_running_or_notify_cancel():
                    yield message, future
