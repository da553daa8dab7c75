"""Wake a poller from another thread."""

from __future__ import annotations

import contextlib
import socket


class Doorbell:
    """A socket pair: ring() from any thread, poll fileno(), hush() before looking."""

    def __init__(self) -> None:
        self._inside, self._outside = socket.socketpair()
        self._inside.setblocking(False)
        self._outside.setblocking(False)

    def fileno(self) -> int:
        return self._inside.fileno()

    def ring(self) -> None:
        """Wake whoever polls. A full pipe means that it is ringing already."""
        with contextlib.suppress(BlockingIOError, OSError):
            self._outside.send(b"!")

    def hush(self) -> None:
        """Forget all rings so far."""
        with contextlib.suppress(BlockingIOError):
            self._inside.recv(4096)

    def close(self) -> None:
        self._inside.close()
        self._outside.close()
