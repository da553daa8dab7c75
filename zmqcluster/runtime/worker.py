"""WorkerRuntime: a whole worker, from taking its folder to closing its hosts."""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from msgspec import structs

from executors.context import ExecutorSettings
from zmqcluster import __version__
from zmqcluster.config import ClusterConfig
from zmqcluster.core.worker import WorkerCore
from zmqcluster.core.worker_events import StopWorker, WorkerSettings
from zmqcluster.errors import ConfigError
from zmqcluster.messages import PoolOffer
from zmqcluster.model import SLOTS_MAX, TASK_TYPES_MAX, DeviceId, SchedulerMode
from zmqcluster.runtime.clock import Clock, SystemClock
from zmqcluster.runtime.device_manager import DeviceManager
from zmqcluster.runtime.doorbell import Doorbell
from zmqcluster.runtime.hosts import HostPool
from zmqcluster.runtime.hosts_settings import MIB, HostSettings
from zmqcluster.runtime.spool import Spool
from zmqcluster.runtime.transport import PeerSockets
from zmqcluster.runtime.worker_loop import Hosts, WorkerLoop
from zmqcluster.security.datadir import DataDir, WorkerFolder, make_device_id
from zmqcluster.security.join import Identity, ensure_enrolled, words_for_refused_key

# A Goodbye may still leave for this long.
GOODBYE_MS: Final = 300
HOSTS_GRACE_MS: Final = 2_000
SYNC_SLOTS_MAX: Final = 64

log = logging.getLogger(__name__)


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
        # Task numbers mean nothing to another master: each finds only its own results.
        spool_folder = folder.spool / identity.server_public.hex()[:16]
        spool = Spool(spool_folder, 2 * config.spool_bytes_max)
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
            sources_dir=str(Path(config.data_dir).absolute() / "sources"),
            device_id=device_id,
            version=__version__,
        ),
        sync_slots=min(count, SYNC_SLOTS_MAX),
        rss_bytes_max=config.task_memory_max * MIB,
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
