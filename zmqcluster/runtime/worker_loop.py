"""WorkerLoop: the agent's turns. Frames and host reports go into WorkerCore, its effects out.

One plain thread, which nothing blocks but the poll: task code runs in the executor hosts, which
have processes of their own. Every turn: take what is there (bounded), decide, carry out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, Protocol, assert_never

import zmq
from msgspec import Struct

from zmqcluster.codec import decode_hint, decode_to_worker, encode
from zmqcluster.core.worker import WorkerCore
from zmqcluster.core.worker_events import (
    Connected,
    Disconnected,
    ForgetResults,
    FromMaster,
    HandshakeFailed,
    HostReport,
    HostsReported,
    KeyRefused,
    KillTask,
    Reconnect,
    RunTasks,
    Sampled,
    Say,
    SendToMaster,
    SpoolResults,
    StopWorker,
    Terminated,
    WorkerEffect,
    WorkerEvent,
)
from zmqcluster.errors import RemoteProtocolError
from zmqcluster.messages import AttemptRef, Hint, TaskOrder, ToWorker, TypeOffer
from zmqcluster.model import Outcome, Pool
from zmqcluster.runtime.clock import Clock
from zmqcluster.runtime.device_manager import DeviceManager
from zmqcluster.runtime.doorbell import Doorbell
from zmqcluster.runtime.spool import Spool
from zmqcluster.runtime.transport import Link, PeerSockets

FRAMES_A_TURN: Final = 64
HINTS_A_TURN: Final = 16
# A poll never sleeps longer, so that a clock that jumped (suspend) is noticed soon.
POLL_MS_MAX: Final = 5_000

_LINK_EVENTS: Final[dict[Link, WorkerEvent]] = {
    Link.CONNECTED: Connected(),
    Link.DISCONNECTED: Disconnected(),
    Link.REFUSED: KeyRefused(),
    Link.FAILED: HandshakeFailed(),
    Link.BROKEN: HandshakeFailed(),
}

log = logging.getLogger(__name__)


class Hosts(Protocol):
    """What the loop needs of a HostPool."""

    def fileno(self) -> int: ...
    def offers(self) -> tuple[TypeOffer, ...]: ...
    def slots(self) -> dict[Pool, int]: ...
    def run(self, order: TaskOrder) -> None: ...
    def kill(self, ref: AttemptRef, outcome: Outcome) -> None: ...
    def poll(self, now_ms: int) -> list[HostReport]: ...
    def flush(self, now_ms: int) -> None: ...
    def next_deadline_ms(self) -> int | None: ...
    def close(self, grace_ms: int) -> list[HostReport]: ...


class LoopCounters(Struct):
    """What the loop saw; the core counts for itself."""

    turns: int = 0
    frames: int = 0
    frames_refused: int = 0
    sends_refused: int = 0
    reconnects: int = 0


class WorkerLoop:
    """Turns of one agent, until its core says stop. Owns nothing it was given."""

    def __init__(
        self,
        core: WorkerCore,
        sockets: PeerSockets,
        hosts: Hosts,
        spool: Spool,
        device: DeviceManager,
        clock: Clock,
        bell: Doorbell,
        take_signals: Callable[[], int],
        sample_interval_ms: int,
    ) -> None:
        self.counters = LoopCounters()
        self._core = core
        self._sockets = sockets
        self._hosts = hosts
        self._spool = spool
        self._device = device
        self._clock = clock
        self._bell = bell
        self._take_signals = take_signals
        self._sample_interval_ms = sample_interval_ms
        self._sample_due_ms = 0
        self._poller = self._new_poller()

    def run(self, *, until_registered: bool = False) -> StopWorker | None:
        """Turn until the end, and say which one it was.

        until_registered: return None as soon as the master counts this device in.
        """
        while True:
            self._wait()
            stop = self.turn()
            if stop is not None:
                return stop
            if until_registered and self._core.is_registered:
                return None

    def turn(self) -> StopWorker | None:
        """Take in what is there, decide, carry out."""
        self.counters.turns += 1
        now_ms = self._clock.monotonic_ms()
        effects = self._core.handle(now_ms, *self._collect(now_ms))
        stop = None
        for effect in effects:
            if isinstance(effect, StopWorker):
                stop = effect
            else:
                self._carry_out(effect)
        self._hosts.flush(now_ms)
        return stop

    def _wait(self) -> None:
        now_ms = self._clock.monotonic_ms()
        due_ms = min(self._core.next_ms(now_ms), self._sample_due_ms, now_ms + POLL_MS_MAX)
        hosts_due_ms = self._hosts.next_deadline_ms()
        if hosts_due_ms is not None:
            due_ms = min(due_ms, hosts_due_ms)
        self._poller.poll(max(0, due_ms - now_ms))
        self._bell.hush()

    def _collect(self, now_ms: int) -> list[WorkerEvent]:
        events: list[WorkerEvent] = [Terminated() for _ in range(self._take_signals())]
        # What became of the connection first: frames of a lost one then count as what they are.
        for link in self._sockets.poll_monitor():
            if link in _LINK_EVENTS:
                events.append(_LINK_EVENTS[link])
        frames = self._sockets.receive(FRAMES_A_TURN)
        hints = self._sockets.receive_hints(HINTS_A_TURN)
        self.counters.frames += len(frames) + len(hints)
        self._decode(frames, decode_to_worker, events)
        self._decode(hints, decode_hint, events)
        reports = self._hosts.poll(now_ms)
        if reports:
            events.append(HostsReported(reports))
        if now_ms >= self._sample_due_ms:
            self._sample_due_ms = now_ms + self._sample_interval_ms
            events.append(Sampled(self._device.sample(now_ms)))
        return events

    def _decode(
        self,
        frames: list[bytes],
        decode: Callable[[bytes], ToWorker | Hint],
        events: list[WorkerEvent],
    ) -> None:
        for frame in frames:
            try:
                events.append(FromMaster(decode(frame)))
            except RemoteProtocolError as error:
                self.counters.frames_refused += 1
                log.debug("frame of the master dropped: %s", error)

    def _carry_out(self, effect: WorkerEffect) -> None:
        match effect:
            case SendToMaster():
                # A full queue is as good as a lost frame: what matters is repeated.
                if not self._sockets.send(encode(effect.message)):
                    self.counters.sends_refused += 1
            case RunTasks():
                for order in effect.orders:
                    self._hosts.run(order)
            case KillTask():
                self._hosts.kill(effect.ref, effect.outcome)
            case SpoolResults():
                self._spool.keep(effect.results)
            case ForgetResults():
                self._spool.forget(effect.refs)
            case Reconnect():
                self.counters.reconnects += 1
                self._sockets.recreate()
                self._poller = self._new_poller()
            case Say():
                log.log(logging.getLevelName(effect.level.upper()), "%s", effect.text)
            case StopWorker():
                raise AssertionError("the turn takes it out")
            case _:
                assert_never(effect)

    def _new_poller(self) -> zmq.Poller:
        poller = zmq.Poller()
        for readable in (*self._sockets.sockets, self._hosts.fileno(), self._bell.fileno()):
            poller.register(readable, zmq.POLLIN)
        return poller
