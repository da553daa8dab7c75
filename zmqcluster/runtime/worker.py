"""WorkerRuntime: the agent's loop. Frames and host reports go into WorkerCore, its effects out.

One plain thread, which nothing blocks but the poll: task code runs in the executor hosts, which
have processes of their own. Every turn: take what is there (bounded), decide, carry out.
"""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final, Protocol, assert_never

import zmq
from msgspec import Struct, structs

from executors.context import ExecutorSettings
from zmqcluster.codec import decode_hint, decode_to_worker, encode
from zmqcluster.config import ClusterConfig
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
    WorkerSettings,
)
from zmqcluster.errors import ConfigError, RemoteProtocolError
from zmqcluster.messages import AttemptRef, Hint, PoolOffer, TaskOrder, ToWorker, TypeOffer
from zmqcluster.model import SLOTS_MAX, TASK_TYPES_MAX, DeviceId, Outcome, Pool, SchedulerMode
from zmqcluster.runtime.clock import Clock, SystemClock
from zmqcluster.runtime.device_manager import VERSION, DeviceManager
from zmqcluster.runtime.doorbell import Doorbell
from zmqcluster.runtime.hosts import HostPool
from zmqcluster.runtime.hosts_settings import HostSettings
from zmqcluster.runtime.spool import Spool
from zmqcluster.runtime.transport import Link, PeerSockets
from zmqcluster.security.datadir import DataDir, WorkerFolder, make_device_id
from zmqcluster.security.join import Identity, ensure_enrolled, words_for_refused_key

FRAMES_A_TURN: Final = 64
HINTS_A_TURN: Final = 16
# A poll never sleeps longer, so that a clock that jumped (suspend) is noticed soon.
POLL_MS_MAX: Final = 5_000
# A Goodbye may still leave for this long.
GOODBYE_MS: Final = 300
HOSTS_GRACE_MS: Final = 2_000
SYNC_SLOTS_MAX: Final = 64

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


class WorkerRuntime:
    """A whole worker: identity, hosts, sockets and loop, from start to end.

    run() blocks; terminate() may be called from any thread or signal handler.
    """

    def __init__(
        self, config: ClusterConfig, clock: Clock | None = None, rng: random.Random | None = None
    ) -> None:
        self.core: WorkerCore | None = None
        self.loop: WorkerLoop | None = None
        self.device: DeviceManager | None = None
        self._config = config
        self._clock = clock or SystemClock()
        self._rng = rng or random.Random()
        self._bell = Doorbell()
        self._stop = threading.Event()
        self._terminations = 0
        self._terminations_seen = 0

    @property
    def is_registered(self) -> bool:
        """Does the master count this worker among its devices right now?"""
        return self.core is not None and self.core.is_registered

    def terminate(self) -> None:
        """Drain and end; the second time at once."""
        self._terminations += 1
        self._stop.set()
        self._bell.ring()

    def run(self, on_registered: Callable[[DeviceId, str], None] | None = None) -> int:
        """Work until told to stop; the exit code.

        on_registered: told the device id and "host:port" of the master after the first Welcome.

        Raises ConfigError or StartError before anything runs, when waiting would not help.
        """
        with ExitStack() as stack:
            stack.callback(self._bell.close)
            data_dir = DataDir(self._config.data_dir)
            folder = stack.enter_context(data_dir.take_worker_folder(self._config.device_id))
            device_id = self._settle_device_id(folder)
            # Before anything waits for the master: a wrong module is the operator's to know now.
            hosts = HostPool(host_settings(self._config, folder, device_id))
            stack.callback(hosts.close, 0)
            hosts.start()
            identity = self._enrol(data_dir, folder)
            if identity is None:
                return 0
            stop = self._work(stack, folder, identity, hosts, on_registered)
            log.log(logging.ERROR if stop.code == 1 else logging.INFO, "Worker ends: %s", stop.text)
            return stop.code

    def _work(
        self,
        stack: ExitStack,
        folder: WorkerFolder,
        identity: Identity,
        hosts: HostPool,
        on_registered: Callable[[DeviceId, str], None] | None,
    ) -> StopWorker:
        config = self._config
        self.device = DeviceManager(
            identity.device_id, config.device_name, disk_path=str(folder.path)
        )
        self.device.start(self._clock.monotonic_ms())
        spool = Spool(folder.spool, 2 * config.spool_bytes_max)
        stack.callback(spool.close)
        advice = words_for_refused_key(folder)
        settings = worker_settings(config, identity, self.device, hosts, advice)
        self.core = WorkerCore(settings, self._rng, spool.load())
        sockets = PeerSockets(
            identity.master_host,
            identity.dispatch_port,
            identity.control_port,
            identity.server_public,
            identity.keys,
        )
        stack.callback(sockets.close)
        interval_ms = settings.heartbeat_interval_ms
        self.loop = WorkerLoop(
            self.core, sockets, hosts, spool, self.device,
            self._clock, self._bell, self._take_signals, interval_ms,
        )  # fmt: skip
        stop = self.loop.run(until_registered=True)
        if stop is None:
            if on_registered is not None:
                on_registered(identity.device_id, _address(identity))
            stop = self.loop.run()
        assert stop is not None, "it runs until the end"
        sockets.close(GOODBYE_MS)
        hosts.close(HOSTS_GRACE_MS if stop.code == 0 else 0)
        return stop

    def _take_signals(self) -> int:
        """How many terminate() calls are new."""
        count = self._terminations - self._terminations_seen
        self._terminations_seen += count
        return count

    def _settle_device_id(self, folder: WorkerFolder) -> DeviceId:
        known = folder.device_id()
        if self._config.device_id:
            return DeviceId(self._config.device_id)
        if known is None:
            known = make_device_id(SchedulerMode.WORKER, self._clock.wall_ms(), self._rng)
            folder.remember(known)
        return known

    def _enrol(self, data_dir: DataDir, folder: WorkerFolder) -> Identity | None:
        return ensure_enrolled(
            self._config,
            data_dir,
            folder,
            connect=PeerSockets,
            clock=self._clock,
            rng=self._rng,
            say=lambda text: log.warning("%s", text),
            stop=self._stop,
        )


def host_settings(config: ClusterConfig, folder: WorkerFolder, device_id: DeviceId) -> HostSettings:
    """How many hosts, with which executors, told what."""
    count = min(config.concurrent_tasks, SLOTS_MAX)
    chosen = HostSettings(
        modules=config.executors,
        executor=ExecutorSettings(
            egress_allow=config.egress_allow,
            contact=config.contact,
            data_dir=str(folder.path),
            device_id=device_id,
            version=VERSION,
        ),
        sync_slots=min(count, SYNC_SLOTS_MAX),
    )
    return structs.replace(chosen, async_slots=count) if count else chosen


def worker_settings(
    config: ClusterConfig,
    identity: Identity,
    device: DeviceManager,
    hosts: Hosts,
    refused_key_advice: str,
) -> WorkerSettings:
    """What the core has to know of all this. Raises ConfigError(executors) for too many types."""
    if len(hosts.offers()) > TASK_TYPES_MAX:
        problem = f"{len(hosts.offers())} task types, at most {TASK_TYPES_MAX} on one device"
        raise ConfigError("executors", problem)
    caps = [cap for cap in (config.concurrent_tasks, config.max_tasks_per_device) if cap]
    return WorkerSettings(
        device_id=identity.device_id,
        boot_id=os.urandom(16),
        name=device.name,
        capabilities=device.capabilities(),
        task_types=hosts.offers(),
        pools=tuple(PoolOffer(pool, slots) for pool, slots in hosts.slots().items()),
        labels=config.labels,
        master=_address(identity),
        running_max=min(caps, default=0),
        heartbeat_interval_ms=round(config.heartbeat_interval * 1000),
        device_timeout_ms=round(config.device_timeout * 1000),
        kept_bytes_max=config.spool_bytes_max,
        refused_key_advice=refused_key_advice,
    )


def _address(identity: Identity) -> str:
    return f"{identity.master_host}:{identity.dispatch_port}"
