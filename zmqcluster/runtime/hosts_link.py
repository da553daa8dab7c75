"""One executor host as the agent sees it: its channel, its output, what it runs."""

from __future__ import annotations

import os
import socket
from enum import StrEnum
from typing import Any, Final

from msgspec import Struct

from executors.hostwire import (
    FROM_HOST,
    READ_BYTES,
    Begin,
    Cancel,
    Close,
    Framer,
    Ping,
    Run,
    frame,
    host_clock_ms,
)
from zmqcluster.errors import RemoteProtocolError
from zmqcluster.messages import AttemptRef, TaskOrder
from zmqcluster.model import Outcome
from zmqcluster.runtime.hosts_output import OutputTail

Ref = tuple[int, int]

# Reads of one host in one turn: a host that floods its channel must not starve the others.
READS_MAX: Final = 8
# An idle agent's sockets hold this much; a batch of results is one write of the host.
SOCKET_BYTES: Final = 1024 * 1024


class Kind(StrEnum):
    """ALONE: a host like the asyncio one, but for a single task that may have killed others."""

    ASYNC = "async"
    SYNC = "sync"
    ALONE = "alone"


class Entry(Struct, gc=False, eq=False):
    """One attempt in the pool's hands. due_ms: when the pool has to act on it.

    ending: what it is being ended as, once it is. has_begun: its host said so (asked of orders with
    a start window only).
    """

    order: TaskOrder
    ref: Ref
    due_ms: int = 0
    ending: Outcome | None = None
    link: HostLink | None = None
    has_begun: bool = False

    @property
    def may_have_begun(self) -> bool:
        """It has a start window, and nobody knows whether its host began it."""
        is_known = self.has_begun or not self.order.start_within_ms
        return not is_known and self.link is not None and self.link.is_ready


class HostLink:
    """Talks to one host. Never blocks; whatever happens to the host, nothing here raises."""

    def __init__(self, host_id: int, kind: Kind, begin: Begin) -> None:
        self.host_id = host_id
        self.kind = kind
        self.pid = 0
        self.running: dict[Ref, Entry] = {}
        self.is_ready = False
        self.is_broken = False
        self.is_retiring = False
        self.is_replaced = False
        self.is_dying = False
        # Why the agent killed it; empty while it did not.
        self.why_killed = ""
        # Whether its loop still answered when it was killed: then the others in it are innocent.
        self.was_silent = False
        # Whether what killed it may have been a task of another host.
        self.has_company = False
        self.tasks_done = 0
        self.unanswered = 0
        # Whether it was asked, in this silence, to show where it is.
        self.is_shown = False
        self.sock, self.child_sock = socket.socketpair()
        self.sock.setblocking(False)
        for end in (self.sock, self.child_sock):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        self.output = OutputTail(f"{kind} host {host_id}")
        self._framer = Framer(FROM_HOST)
        self._orders: list[TaskOrder] = []
        self._out = bytearray(frame(begin))

    @property
    def wants_to_write(self) -> bool:
        return bool(self._out) and not self.is_broken

    def hand_over(self, entry: Entry) -> None:
        """Put an order into the next batch."""
        entry.link = self
        self.running[entry.ref] = entry
        self._orders.append(entry.order)

    def cancel(self, ref: Ref) -> None:
        self._pack_orders()
        self._out += frame(Cancel((AttemptRef(*ref),)))

    def ping(self) -> None:
        self.unanswered += 1
        self._out += frame(Ping(self.unanswered))

    def say_close(self) -> None:
        self._pack_orders()
        self._out += frame(Close())

    def flush(self) -> None:
        """Write what the socket takes; the rest stays."""
        self._pack_orders()
        if not self._out or self.is_broken:
            return
        try:
            sent = self.sock.send(self._out)
        except BlockingIOError:
            return
        except OSError:
            self.is_broken = True
            return
        del self._out[:sent]

    def read(self, reads_max: int = READS_MAX) -> list[Any]:
        """What it said, in order. A closed channel or nonsense on it sets is_broken."""
        messages: list[Any] = []
        try:
            for _ in range(reads_max):
                data = self.sock.recv(READ_BYTES)
                if not data:
                    self.is_broken = True
                    break
                messages += self._framer.feed(data)
                self._framer.check()
                if len(data) < READ_BYTES:
                    break
        except BlockingIOError:
            pass
        except (OSError, RemoteProtocolError) as error:
            self.is_broken = True
            self.why_killed = self.why_killed or f"it broke its channel: {error}"
        if messages:
            self.unanswered = 0
            self.is_shown = False
        return messages

    @property
    def child_fds(self) -> tuple[int, int]:
        """Its ends of channel and output, to be given away."""
        return self.child_sock.fileno(), self.output.child_fd

    def close_child_fds(self) -> None:
        """Once they are given away: only then does the host's death close the channel."""
        self.child_sock.close()
        os.close(self.output.child_fd)

    def close(self) -> None:
        self.sock.close()
        self.output.close()

    def _pack_orders(self) -> None:
        if self._orders:
            self._out += frame(Run(tuple(self._orders), host_clock_ms()))
            self._orders.clear()
