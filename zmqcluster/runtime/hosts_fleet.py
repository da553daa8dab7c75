"""The processes behind a HostPool: the warden and the hosts, from birth to burial."""

from __future__ import annotations

import logging
import os
import signal
from collections import Counter
from contextlib import suppress
from typing import Any, Final, Protocol

from executors.hostwire import Begin, Exited, Loaded, LoadFailed, Ready, Spawned, pack_settings
from zmqcluster.errors import ConfigError, StartError
from zmqcluster.messages import TypeOffer
from zmqcluster.model import Pool
from zmqcluster.runtime.hosts_fate import describe_exit
from zmqcluster.runtime.hosts_link import HostLink, Kind
from zmqcluster.runtime.hosts_poller import HostPoller
from zmqcluster.runtime.hosts_settings import HostSettings
from zmqcluster.runtime.hosts_warden import LOAD_S, WardenLink, WardenLost

BACKOFF_MS: Final = (0, 100, 500, 2_000, 5_000)
# What an executor's close() may take; then the host is killed.
RETIRE_MS: Final = 10_000
# While hosts are to be killed, their warden has to answer; counted in pings, see hosts.py.
WARDEN_PING_MS: Final = 1_000
WARDEN_UNANSWERED_MAX: Final = 10

log = logging.getLogger("zmqcluster.hosts")


class FleetOwner(Protocol):
    """Who is told what happens to the hosts."""

    def on_messages(self, link: HostLink, messages: list[Any], now_ms: int) -> None:
        """A host said these."""

    def on_gone(self, link: HostLink, status: int, problem: str, now_ms: int) -> bool:
        """Nothing is left of a host but its output. Returns whether that was a surprise."""

    def on_room(self, now_ms: int) -> None:
        """A host may be started where none could be a moment ago."""


class Fleet:
    """Starts hosts, writes to them, kills them, and survives the death of any of them."""

    def __init__(self, settings: HostSettings, owner: FleetOwner) -> None:
        self.poller = HostPoller()
        self.links: dict[int, HostLink] = {}
        # Everything that went wrong and was put right, for metrics.
        self.counters: Counter[str] = Counter()
        self._settings = settings
        self._begin_settings = pack_settings(settings.executor)
        self._owner = owner
        self._warden: WardenLink | None = None
        self._usable: dict[Kind, list[HostLink]] = {kind: [] for kind in Kind}
        self._dirty: dict[int, HostLink] = {}
        self._retiring: dict[int, int] = {}
        # Hosts the warden was told to kill and has not buried yet.
        self._dying: set[int] = set()
        self._ping_ms = 0
        self._next_id = 1
        self._failed_starts = 0
        self._spawn_after_ms = 0

    # --- for the pool ---------------------------------------------------------------------------

    def start(self) -> tuple[TypeOffer, ...]:
        """Start the warden and wait for its modules; see HostPool.start()."""
        warden = self._launch_warden()
        try:
            said = warden.wait(LOAD_S)
        except WardenLost:
            warden.output.drain(0)
            last = warden.output.last_line()
            raise StartError(f"the executor modules ended their process: {last}") from None
        match said:
            case [Loaded(offers=offers)]:
                return offers
            case [LoadFailed(key=key, problem=problem)]:
                raise ConfigError(key, problem)
            case _:
                raise StartError(f"the executor modules were not imported within {LOAD_S:.0f} s")

    def free(self, kind: Kind, tasks_max: int) -> HostLink | None:
        """The host used last that has room: the others may stay cold."""
        for link in reversed(self._usable[kind]):
            if len(link.running) < tasks_max:
                return link
        return None

    def add(self, kind: Kind, hosts_max: int, now_ms: int) -> HostLink | None:
        """One more host; None: there are hosts_max, or starting keeps failing for now."""
        if len(self._usable[kind]) >= hosts_max or now_ms < self._spawn_after_ms:
            return None
        warden = self._warden or self._relaunch_warden(now_ms)
        if warden is None:
            return None
        pool = Pool.SYNC if kind is Kind.SYNC else Pool.ASYNC
        # A host forked from the warden has its modules; one started from scratch loads them.
        modules = self._settings.built_in + self._settings.modules
        link = HostLink(self._next_id, kind, Begin(pool, self._begin_settings, modules))
        self._next_id += 1
        try:
            warden.spawn(link.host_id, link.child_fds)
        except WardenLost:
            link.close()
            self._on_warden_lost(now_ms)
            return None
        finally:
            link.close_child_fds()
        self.links[link.host_id] = link
        self._usable[kind].append(link)
        self.touch(link)
        self.poller.add(link.sock, lambda now: self._read_link(link, now))
        self.poller.add_output(link.output)
        return link

    def touch(self, link: HostLink) -> None:
        """Something is to be written to this host."""
        self._dirty[link.host_id] = link

    def flush(self) -> None:
        """Write what is to be written, as far as the sockets take it."""
        while self._dirty:
            _, link = self._dirty.popitem()
            link.flush()
            self.poller.watch_writes(link.sock, link.wants_to_write)

    def retire(self, link: HostLink, now_ms: int) -> None:
        """No more work for this host; it closes in good order, or is killed after RETIRE_MS."""
        if not link.is_retiring and not link.is_dying:
            link.is_retiring = True
            self._retiring[link.host_id] = now_ms + RETIRE_MS
            self._withdraw(link)
            link.say_close()
            self.touch(link)

    def replace(self, link: HostLink, now_ms: int) -> None:
        """A fresh host takes its place; it finishes what it has, and retires then."""
        if link.is_retiring or link.is_replaced:
            return
        self.counters["hosts_replaced"] += 1
        link.is_replaced = True
        self._withdraw(link)
        if not link.running:
            self.retire(link, now_ms)

    def kill(self, link: HostLink, why: str, now_ms: int) -> None:
        """Take this host down; what becomes of its tasks is decided when it is gone."""
        if not link.is_dying:
            link.why_killed = link.why_killed or why
            self.counters["hosts_killed"] += 1
            self._take_down(link, now_ms)

    def show_stack(self, link: HostLink, now_ms: int) -> None:
        """Have a silent host print where it is, once: it may soon be killed for it."""
        if self._warden is None or link.is_shown or not link.is_ready:
            return
        link.is_shown = True
        try:
            self._warden.show_stack(link.host_id)
        except WardenLost:
            self._on_warden_lost(now_ms)

    def due_ms(self) -> int | None:
        """When run_timers() or the poller has something to do; None: nothing is planned."""
        times = [*self._retiring.values()]
        if self._spawn_after_ms:
            times.append(self._spawn_after_ms)
        if self._dying:
            times.append(self._ping_ms)
        paused_ms = self.poller.due_ms()
        if paused_ms is not None:
            times.append(paused_ms)
        return min(times, default=None)

    def run_timers(self, now_ms: int) -> None:
        if self._retiring:
            for host_id in [one for one, at_ms in self._retiring.items() if at_ms <= now_ms]:
                del self._retiring[host_id]
                self.kill(self.links[host_id], "it did not close when told to", now_ms)
        if self._spawn_after_ms and self._spawn_after_ms <= now_ms:
            self._spawn_after_ms = 0
            self._owner.on_room(now_ms)
        if self._dying and self._ping_ms <= now_ms:
            self._ask_warden(now_ms)

    def close(self) -> None:
        """End everything by force."""
        if self._warden is not None:
            self._forget_warden()
        for link in list(self.links.values()):
            self._drop(link)
        self.poller.close()

    # --- hosts ----------------------------------------------------------------------------------

    def _read_link(self, link: HostLink, now_ms: int) -> None:
        if link.wants_to_write:
            self.touch(link)
        self._hear(link, link.read(), now_ms)
        if link.is_broken:
            # The end of its channel is the end of a host, told sooner than by the warden; see to
            # it that the process is gone too. Exited will follow.
            self.poller.remove(link.sock)
            if not link.is_dying:
                self._take_down(link, now_ms)

    def _hear(self, link: HostLink, messages: list[Any], now_ms: int) -> None:
        if not link.is_ready and any(isinstance(message, Ready) for message in messages):
            link.is_ready = True
            self._failed_starts = 0
        if messages:
            self._owner.on_messages(link, messages, now_ms)

    def _take_down(self, link: HostLink, now_ms: int) -> None:
        link.is_dying = True
        self._withdraw(link)
        if self._warden is None:
            return
        if not self._dying:
            self._ping_ms = now_ms + WARDEN_PING_MS
        self._dying.add(link.host_id)
        try:
            self._warden.kill(link.host_id)
        except WardenLost:
            self._on_warden_lost(now_ms)

    def _withdraw(self, link: HostLink) -> None:
        if link in self._usable[link.kind]:
            self._usable[link.kind].remove(link)

    def _bury(self, link: HostLink, status: int, problem: str, now_ms: int) -> None:
        """Nothing of this host is left: take its last words, and settle what it ran."""
        self._withdraw(link)
        self._hear(link, link.read(reads_max=1 << 20), now_ms)
        link.output.drain(now_ms)
        is_surprise = self._owner.on_gone(link, status, problem, now_ms)
        why = problem or link.why_killed or f"it {describe_exit(status)}"
        if not link.is_ready:
            self._on_failed_start(link, why, now_ms)
        elif is_surprise:
            self.counters["hosts_died"] += 1
            log.warning("%s host %d died: %s", link.kind, link.host_id, why)
        self._drop(link)
        self._owner.on_room(now_ms)

    def _on_failed_start(self, link: HostLink, why: str, now_ms: int) -> None:
        if link.why_killed or link.is_retiring:
            return
        self._failed_starts += 1
        self.counters["hosts_not_started"] += 1
        self._spawn_after_ms = now_ms + BACKOFF_MS[min(self._failed_starts, len(BACKOFF_MS) - 1)]
        last = link.output.last_line() or why
        log.warning("%s host %d did not start: %s", link.kind, link.host_id, last)

    def _drop(self, link: HostLink) -> None:
        """Forget a host that is gone."""
        self._withdraw(link)
        del self.links[link.host_id]
        self._dirty.pop(link.host_id, None)
        self._retiring.pop(link.host_id, None)
        self._dying.discard(link.host_id)
        self.poller.remove(link.sock)
        self.poller.remove_output(link.output)
        link.close()

    # --- the warden -----------------------------------------------------------------------------

    def _launch_warden(self) -> WardenLink:
        warden = WardenLink(self._settings)
        self._warden = warden
        self.poller.add(warden.sock, self._read_warden)
        self.poller.add_output(warden.output)
        return warden

    def _relaunch_warden(self, now_ms: int) -> WardenLink | None:
        # What it is asked to do queues up behind its loading of the modules.
        try:
            return self._launch_warden()
        except (StartError, WardenLost) as error:
            log.error("%s", error)
            self._spawn_after_ms = now_ms + BACKOFF_MS[-1]
            return None

    def _read_warden(self, now_ms: int) -> None:
        if self._warden is None:
            return
        try:
            messages = self._warden.receive()
        except WardenLost:
            self._on_warden_lost(now_ms)
            return
        for message in messages:
            match message:
                case Spawned(host_id=host_id, pid=pid):
                    if host_id in self.links:
                        self.links[host_id].pid = pid
                case Exited(host_id=host_id, status=status, orphans=orphans, problem=problem):
                    self.counters["orphans_killed"] += orphans
                    if host_id in self.links:
                        self._bury(self.links[host_id], status, problem, now_ms)
                case LoadFailed(problem=problem):
                    log.error("executors: %s", problem)
                    self._spawn_after_ms = now_ms + BACKOFF_MS[-1]
                case _:
                    pass

    def _ask_warden(self, now_ms: int) -> None:
        """A warden that a task stopped buries nobody, and its tasks would never end."""
        warden = self._warden
        if warden is None:
            return
        self._ping_ms = now_ms + WARDEN_PING_MS
        # One that was started a moment ago is busy importing.
        patience = WARDEN_UNANSWERED_MAX if warden.has_spoken else LOAD_S
        try:
            if warden.unanswered >= patience:
                raise WardenLost("it does not answer")
            warden.ping()
        except WardenLost:
            self._on_warden_lost(now_ms)

    def _on_warden_lost(self, now_ms: int) -> None:
        """Dead or stuck. Its hosts die with it (PDEATHSIG); make sure of that, and begin anew."""
        self.counters["wardens_lost"] += 1
        log.warning("the warden of the executor hosts died or stands still; starting another one")
        self._forget_warden(is_lost=True)
        self._spawn_after_ms = now_ms + BACKOFF_MS[1]
        running = sum(len(link.running) for link in self.links.values())
        for link in list(self.links.values()):
            if link.pid:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(link.pid, signal.SIGKILL)
            link.was_silent = True
            link.has_company = len(link.running) < running
            link.why_killed = "the warden of all hosts died"
            self._bury(link, -signal.SIGKILL, "", now_ms)

    def _forget_warden(self, is_lost: bool = False) -> None:
        assert self._warden is not None
        warden, self._warden = self._warden, None
        self.poller.remove(warden.sock)
        self.poller.remove_output(warden.output)
        warden.close(is_lost)
