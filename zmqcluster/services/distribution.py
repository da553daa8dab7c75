"""The services of one process: a master, a worker, or both."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import queue
import signal
import sys
import threading
from types import FrameType
from typing import Final

from msgspec import structs

from zmqcluster.config import ClusterConfig
from zmqcluster.errors import ClusterError, ConfigError, StartError, StorageError
from zmqcluster.model import DeviceId, SchedulerMode
from zmqcluster.runtime.clock import Clock, SystemClock
from zmqcluster.runtime.device_manager import DeviceManager
from zmqcluster.runtime.worker import WorkerRuntime
from zmqcluster.scheduler import TaskScheduler
from zmqcluster.services.master_node import MasterNode

log = logging.getLogger(__name__)

# The interpreter's default of 5 ms makes the writer thread wait that long for each statement while
# the loop computes; see docs/adr/0003.
SWITCH_INTERVAL_S: Final = 0.0005
# Rows are short-lived and hold no cycles: look for garbage seldom.
GC_THRESHOLDS: Final = (50_000, 20, 100)
JOIN_S: Final = 15.0
EXIT_INTERRUPTED: Final = 130
# `timeout` and terminals signal a process and its group: one wish, told twice.
SIGNAL_ECHO_MS: Final = 300
# A signal is noticed this late at the latest.
SIGNAL_S: Final = 0.5


class DistributionServices:
    """start() brings up what the mode needs, wait() blocks, stop() ends it. Each is safe twice."""

    def __init__(self, config: ClusterConfig, clock: Clock | None = None) -> None:
        self.config = config
        self.mode = config.mode
        self._clock = clock or SystemClock()
        self._master: MasterNode | None = None
        self._worker: _WorkerService | None = None
        self._scheduler: TaskScheduler | None = None
        # What wait() waits for: the number of a signal, or None when a loop ended. SimpleQueue,
        # because a signal handler may interrupt a put and put again; a lock would hang there.
        self._news: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._problem: ClusterError | None = None
        self._is_ending = False
        self._lock = threading.Lock()

    def open(self) -> None:
        """Claim files and ports. Raises ConfigError, StartError or StorageError; nothing is held.

        The master node's own part; a worker claims its folder when it starts.
        """
        if self._scheduler is not None:
            return
        config = self.config
        runtime = None
        if self.mode is not SchedulerMode.WORKER:
            master = MasterNode(config, self._clock)
            runtime = master.open()
            self._master = master
        if self.mode is not SchedulerMode.MASTER:
            self._worker = _WorkerService(config, self._clock)
        self._scheduler = TaskScheduler(
            self.mode, master=runtime, worker=self._worker, on_end=self._on_end
        )
        log.info("Distribution services initialized in %s mode", self.mode)

    def start(self) -> None:
        """Run the loops and serve. Raises as open()."""
        self.open()
        assert self._scheduler is not None
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        gc.set_threshold(*GC_THRESHOLDS)
        try:
            self._scheduler.start()
            if self._master is not None:
                device_id = self._master.device_id
                DeviceManager(device_id, self.config.device_name).start(self._clock.monotonic_ms())
                self._master.start()
                host, port = self.config.master_host, self._master.rest_port
                log.info("Master node started on %s:%s", host, port)
                log.info("Data: %s", self._master.data_dir.path)
        except BaseException:
            self.stop()
            raise

    def wait(self) -> int:
        """Until a loop ends, a signal ends it, or stop() is called. The process's exit code.

        Raises what ended a loop that was not asked to end.
        """
        interrupted = False
        last_ms = -SIGNAL_ECHO_MS
        while (number := self._next_news()) is not None:
            now_ms = self._clock.monotonic_ms()
            is_echo, last_ms = now_ms - last_ms < SIGNAL_ECHO_MS, now_ms
            if is_echo:
                continue
            log.info("Stopping (%s)", signal.Signals(number).name)
            interrupted = interrupted or number == signal.SIGINT
            if self._worker is None:
                break
            # Its loop ends when it has drained (the second time: at once), and this with it.
            self._worker.stop()
        if self._problem is not None:
            raise self._problem
        code = self._worker.code if self._worker is not None else 0
        return EXIT_INTERRUPTED if interrupted and not code else code

    def _next_news(self) -> int | None:
        """In portions: a signal that comes while the main thread falls asleep, or that another
        thread takes, wakes nobody; its handler runs when this one wakes by itself."""
        while True:
            with contextlib.suppress(queue.Empty):
                return self._news.get(timeout=SIGNAL_S)

    @property
    def problem(self) -> ClusterError | None:
        """What went wrong so far."""
        return self._problem

    def on_signal(self, number: int) -> None:
        """Safe inside a signal handler: it only leaves word for wait().

        Once the end has begun nobody reads it any more, and the next signal ends the process at
        once: nothing is lost by that, as by any kill.
        """
        if self._is_ending:
            os._exit(EXIT_INTERRUPTED)
        self._news.put(number)

    def stop(self) -> None:
        """End everything, the worker first: its last results still find the master."""
        self._is_ending = True
        with self._lock:
            if self._master is not None:
                self._master.stop_serving()
            if self._scheduler is not None and not self._scheduler.stop(JOIN_S):
                # Its sockets and files are in use: only the end of the process may take them.
                self._problem = StartError(f"a loop did not end within {JOIN_S:.0f} s")
            elif self._master is not None:
                self._master.close()
            self._master = self._scheduler = None
            self._news.put(None)

    def _on_end(self, error: ClusterError | None) -> None:
        if error is not None and self._problem is None:
            self._problem = error
        self._news.put(None)


class _WorkerService:
    """A WorkerRuntime as a loop of the scheduler."""

    def __init__(self, config: ClusterConfig, clock: Clock) -> None:
        self.code = 0
        self._config = config
        self._runtime = WorkerRuntime(config, clock)

    def run(self) -> None:
        self.code = self._runtime.run(self._say_who)

    def stop(self) -> None:
        self._runtime.terminate()

    @staticmethod
    def _say_who(device_id: DeviceId, master: str) -> None:
        log.info("Worker node started")
        log.info("Device ID: %s", device_id)
        log.info("Master: %s", master)


_current: DistributionServices | None = None


def init_distribution_services(
    mode: SchedulerMode, device_id: str = "", config: ClusterConfig | None = None
) -> DistributionServices:
    """Make the services of this process; the same ones again while they are not stopped."""
    global _current
    if _current is None:
        config = structs.replace(config or ClusterConfig(), mode=mode)
        if device_id:
            config = structs.replace(config, device_id=device_id)
        services = DistributionServices(config)
        services.open()
        _current = services
    return _current


def start_distribution_services() -> None:
    """Start what init_distribution_services() made. Raises ConfigError when there is nothing."""
    if _current is None:
        raise ConfigError("mode", "call init_distribution_services() first")
    _current.start()


def stop_distribution_services() -> None:
    """Stop and forget; without services nothing happens."""
    global _current
    services, _current = _current, None
    if services is not None:
        services.stop()


def run(config: ClusterConfig) -> int:
    """Be one process of the cluster until a signal ends it. The exit code.

    Raises ConfigError before anything started; other troubles are said in one line: exit code 1.
    """
    node = "master" if config.mode is SchedulerMode.MASTER else config.mode.value
    log.info("Starting %s node...", node)
    services = DistributionServices(config)
    _take_signals(services)
    try:
        services.start()
        code = services.wait()
    except (StartError, StorageError) as error:
        log.error("%s", error)
        code = 1
    finally:
        services.stop()
    if services.problem is not None:
        code = 1
    log.info("%s node stopped", node.capitalize())
    return code


def _take_signals(services: DistributionServices) -> None:
    """SIGTERM, SIGINT and the end of the terminal drain; the second one stops at once.

    A handler runs between any two bytecodes of the main thread, perhaps inside the logger's lock:
    so it logs nothing and takes no lock.
    """

    def leave_word(number: int, _: FrameType | None) -> None:
        services.on_signal(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, leave_word)
