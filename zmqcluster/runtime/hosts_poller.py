"""The descriptors of all hosts behind one: who is called when something can be read."""

from __future__ import annotations

import selectors
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from zmqcluster.runtime.hosts_output import PAUSE_MS, OutputTail

Handler = Callable[[int], None]


class HostPoller:
    """Handlers by descriptor. A handler gets now_ms and may register and unregister anything."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._handlers: dict[int, Handler] = {}
        self._writers: set[int] = set()
        self._paused: dict[OutputTail, int] = {}

    def fileno(self) -> int:
        """One descriptor that is readable when any of them is."""
        return self._selector.fileno()

    def dispatch(self, now_ms: int) -> None:
        """Call the handlers of what is ready now; never waits."""
        if self._paused:
            self._resume(now_ms)
        for key, _ in self._selector.select(0):
            handler = self._handlers.get(key.fd)
            # What an earlier handler of this round closed has nothing to say any more.
            if handler is not None and handler is key.data:
                handler(now_ms)

    def wait(self, timeout_s: float) -> None:
        self._selector.select(timeout_s)

    def due_ms(self) -> int | None:
        """When a paused output has to be read again; None: none is."""
        return min(self._paused.values(), default=None)

    def add(self, fileobj: Any, handler: Handler) -> None:
        key = self._selector.register(fileobj, selectors.EVENT_READ, handler)
        self._handlers[key.fd] = handler

    def remove(self, fileobj: Any) -> None:
        """Forget it, if it is known; to be called before it is closed."""
        with suppress(KeyError, ValueError):
            key = self._selector.unregister(fileobj)
            self._handlers.pop(key.fd, None)
            self._writers.discard(key.fd)

    def watch_writes(self, fileobj: Any, wants: bool) -> None:
        """Also call the handler when a full socket has room again, or stop that."""
        fd = fileobj.fileno()
        if fd in self._handlers and wants != (fd in self._writers):
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wants else 0)
            self._selector.modify(fileobj, events, self._handlers[fd])
            (self._writers.add if wants else self._writers.discard)(fd)

    def add_output(self, output: OutputTail) -> None:
        """Keep reading what a process prints, with pauses when it is too much."""
        self.add(output.fd, lambda now_ms: self._read_output(output, now_ms))

    def remove_output(self, output: OutputTail) -> None:
        self._paused.pop(output, None)
        self.remove(output.fd)

    def close(self) -> None:
        self._selector.close()

    def _read_output(self, output: OutputTail, now_ms: int) -> None:
        is_flooded = output.read(now_ms)
        if is_flooded or not output.is_open:
            self.remove(output.fd)
        if is_flooded:
            self._paused[output] = now_ms + PAUSE_MS

    def _resume(self, now_ms: int) -> None:
        for output in [one for one, at_ms in self._paused.items() if at_ms <= now_ms]:
            del self._paused[output]
            self.add_output(output)
