"""What both kinds of host share: the socket to the agent, and small courtesies."""

from __future__ import annotations

import inspect
import socket
from collections.abc import Callable
from typing import Any, Final

from executors.base import TaskExecutor
from executors.context import ExecutorSettings
from executors.hostwire import READ_BYTES, TO_HOST, Framer
from zmqcluster.messages import ProgressNote, RateRule

# Of the notes of one task: this many at once, then so many a second. People read them.
NOTES_BURST: Final = 20
NOTES_PER_S: Final = 10


class Channel:
    """The socket to the agent, and what has arrived on it but is not handled yet."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.framer = Framer(TO_HOST)
        self.inbox: list[Any] = []

    def receive(self) -> Any:
        """The next message, waiting for it; None when the agent is gone."""
        while not self.inbox:
            data = self.sock.recv(READ_BYTES)
            if not data:
                return None
            self.inbox = self.framer.feed(data)
        return self.inbox.pop(0)


class NoteGate:
    """Thins out progress notes of one task: a burst, then NOTES_PER_S."""

    __slots__ = ("_emit", "_last", "_left")

    def __init__(self, emit: Callable[[ProgressNote | RateRule], None], now_s: float) -> None:
        self._emit = emit
        self._left = float(NOTES_BURST)
        self._last = now_s

    def __call__(self, note: ProgressNote | RateRule, now_s: float) -> None:
        if isinstance(note, ProgressNote):
            refill = (now_s - self._last) * NOTES_PER_S
            self._left = min(float(NOTES_BURST), self._left + refill)
            self._last = now_s
            if self._left < 1 and note.done < 1:
                return
            self._left -= 1
        self._emit(note)


def call_setup(executor: TaskExecutor, settings: ExecutorSettings) -> Any:
    """What setup gives back: None, or something to await."""
    result = executor.setup(settings)
    return result if inspect.isawaitable(result) else None
