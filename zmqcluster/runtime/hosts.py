"""The executor hosts of an agent: orders go in, reports come out, task code stays out of the agent.

One thread, no blocking, no clock of its own: the agent's loop calls poll(now_ms) whenever fileno()
is readable or next_deadline_ms() has come. Tasks of `async` executors share one asyncio host, plain
functions get a process each; a warden (executors/warden.py) starts and kills them all.

Promises: every order comes back as exactly one TaskResult, whatever the task does, unless it is
the agent that dies; nothing a task does blocks poll(); an ended task's processes are gone before
its end is reported, and so are all hosts within 2 s of the agent's own death.
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import psutil  # type: ignore[import-untyped]  # ships no types

from executors.hostwire import (
    Begin,
    Exited,
    Finished,
    Loaded,
    LoadFailed,
    Notes,
    Ready,
    Spawned,
    pack_settings,
)
from executors.outcome import returned
from zmqcluster.errors import ConfigError, StartError
from zmqcluster.messages import (
    AttemptRef,
    ProgressNote,
    RateRule,
    Started,
    TaskOrder,
    TaskResult,
    TypeOffer,
)
from zmqcluster.model import Outcome, Pool
from zmqcluster.runtime.clock import SystemClock
from zmqcluster.runtime.hosts_fate import Suspects, after_death, describe_exit, timeout_text
from zmqcluster.runtime.hosts_link import Entry, HostLink, Kind, Ref
from zmqcluster.runtime.hosts_output import PAUSE_MS, OutputTail
from zmqcluster.runtime.hosts_settings import HostSettings
from zmqcluster.runtime.hosts_warden import LOAD_S, WardenLink, WardenLost

HostReport = Started | TaskResult | ProgressNote | RateRule

# A cancelled async task has this long to finish; then its whole host is killed.
CANCEL_GRACE_MS: Final = 2_000
PING_MS: Final = 1_000
# Counted in pings sent, not in time: a laptop that slept has not been silent.
UNANSWERED_MAX: Final = 10
MEMORY_EVERY_TICKS: Final = 5
ALONE_HOSTS_MAX: Final = 4
BACKOFF_MS: Final = (0, 100, 500, 2_000, 5_000)

log = logging.getLogger("zmqcluster.hosts")

Handler = Callable[[int], None]


class Group:
    """Hosts of one kind that may get work, and what waits for one."""

    def __init__(self, kind: Kind, hosts_max: int, tasks_max: int) -> None:
        self.kind = kind
        self.hosts_max = hosts_max
        self.tasks_max = tasks_max  # at once in one host
        self.links: list[HostLink] = []
        self.waiting: deque[Entry] = deque()

    def free_link(self) -> HostLink | None:
        """The host used last that has room: the others may stay cold."""
        for link in reversed(self.links):
            if len(link.running) < self.tasks_max:
                return link
        return None


class HostPool:
    """Runs orders in child processes. start() first, close() last."""

    def __init__(self, settings: HostSettings) -> None:
        self._settings = settings
        self._selector = selectors.DefaultSelector()
        self._handlers: dict[int, Handler] = {}
        self._warden: WardenLink | None = None
        self._offers: tuple[TypeOffer, ...] = ()
        self._pools: dict[str, Pool] = {}
        self._entries: dict[Ref, Entry] = {}
        self._queued: list[Entry] = []
        self._kills: list[tuple[Ref, Outcome]] = []
        self._reports: list[HostReport] = []
        self._started: dict[Ref, None] = {}
        self._links: dict[int, HostLink] = {}
        self._groups = {
            Kind.ASYNC: Group(Kind.ASYNC, 1, max(1, settings.async_slots)),
            Kind.SYNC: Group(Kind.SYNC, settings.sync_hosts, 1),
            Kind.ALONE: Group(Kind.ALONE, ALONE_HOSTS_MAX, 1),
        }
        self._dirty: dict[int, HostLink] = {}
        self._writers: set[int] = set()
        self._paused: dict[OutputTail, int] = {}
        self._suspects = Suspects()
        self._next_id = 1
        self._due_ms = _NEVER
        self._tick_ms = 0
        self._ticks = 0
        self._failed_starts = 0
        self._spawn_after_ms = 0
        self._is_closed = False
        # Everything that went wrong and was put right, for metrics.
        self.counters: Counter[str] = Counter()

    # --- for the agent --------------------------------------------------------------------------

    def start(self) -> None:
        """Start the warden and wait until all executor modules are in.

        Raises ConfigError for a module that cannot be used, StartError when no process can be
        started or the modules take longer than LOAD_S.
        """
        self._launch_warden()
        assert self._warden is not None
        try:
            said = self._warden.wait(LOAD_S)
        except WardenLost:
            self._warden.output.drain(0)
            last = self._warden.output.last_line()
            self.close(0)
            raise StartError(f"the executor modules ended their process: {last}") from None
        if not said:
            self.close(0)
            raise StartError(f"the executor modules were not imported within {LOAD_S:.0f} s")
        match said[0]:
            case Loaded(offers=offers):
                self._offers = offers
                self._pools = {offer.task_type: offer.pool for offer in offers}
            case LoadFailed(key=key, problem=problem):
                self.close(0)
                raise ConfigError(key, problem)

    def fileno(self) -> int:
        """Readable whenever poll() has something to do; to be put into the agent's poller."""
        return self._selector.fileno()

    def offers(self) -> tuple[TypeOffer, ...]:
        """The task types that can run here."""
        return self._offers

    def slots(self) -> dict[Pool, int]:
        """How many tasks of each pool run at once; 0 for a pool without task types."""
        pools = set(self._pools.values())
        wanted = {Pool.ASYNC: self._settings.async_slots, Pool.SYNC: self._settings.sync_hosts}
        return {pool: count if pool in pools else 0 for pool, count in wanted.items()}

    def run(self, order: TaskOrder) -> None:
        """Queue an attempt; it is handed to its host by the next poll() or flush().

        Its deadline counts from there, start_within_ms too. An attempt that is here already is not
        taken twice.
        """
        ref = (order.task_id, order.attempt)
        if ref not in self._entries:
            entry = Entry(order, ref)
            self._entries[ref] = entry
            self._queued.append(entry)

    def kill(self, ref: AttemptRef, outcome: Outcome) -> None:
        """End an attempt with everything it started; its TaskResult says outcome once it is gone.

        Takes effect with the next poll() or flush(). Unknown or ended already: nothing happens.
        """
        self._kills.append(((ref.task_id, ref.attempt), outcome))

    def poll(self, now_ms: int) -> list[HostReport]:
        """Hand over what is queued, take what the hosts say, enforce deadlines. Never blocks.

        Returns what happened, oldest first: at most one Started for attempts that are now running
        (left out for those whose TaskResult is in the same list), exactly one TaskResult for each
        order, ProgressNote and RateRule as tasks make them.
        """
        self.flush(now_ms)
        for key, _ in self._selector.select(0):
            # What an earlier handler of this round closed has nothing to say any more.
            handler = self._handlers.get(key.fd)
            if handler is not None and handler is key.data:
                handler(now_ms)
        self._run_timers(now_ms)
        self.flush(now_ms)
        reports, self._reports = self._reports, []
        if self._started:
            refs = tuple(AttemptRef(*ref) for ref in self._started)
            self._started.clear()
            reports.insert(0, Started(refs))
        return reports

    def flush(self, now_ms: int) -> None:
        """Hand over what is queued without looking at what came in."""
        if self._queued:
            queued, self._queued = self._queued, []
            for entry in queued:
                self._place(entry, now_ms)
        if self._kills:
            kills, self._kills = self._kills, []
            for ref, outcome in kills:
                if ref in self._entries:
                    self._end(self._entries[ref], outcome, now_ms)
        while self._dirty:
            _, link = self._dirty.popitem()
            link.flush()
            self._watch_writes(link)

    def next_deadline_ms(self) -> int | None:
        """When poll() has to be called even if fileno() stays quiet; 0: at once; None: never."""
        if self._queued or self._kills or self._reports or self._started:
            return 0
        times = [*self._paused.values()]
        if self._entries:
            times += [self._due_ms, self._tick_ms]
        if any(group.waiting for group in self._groups.values()):
            times.append(self._spawn_after_ms)
        return min(times, default=None)

    def close(self, grace_ms: int = 2_000) -> list[HostReport]:
        """End all hosts: those that can within grace_ms in good order, the others by force.

        The only call that blocks, for grace_ms and up to some seconds more for what will not die.
        What still ran comes back as returned. Safe to call twice.
        """
        if self._is_closed:
            return []
        clock = SystemClock()
        until_ms = clock.monotonic_ms() + grace_ms
        reports: list[HostReport] = []
        if grace_ms:
            for link in self._links.values():
                self._retire(link)
            while self._links and (now_ms := clock.monotonic_ms()) < until_ms:
                reports += self.poll(now_ms)
                self._selector.select(min(50, until_ms - now_ms) / 1000)
            reports += self.poll(clock.monotonic_ms())
        if self._warden is not None:
            self._forget_warden()
        for link in list(self._links.values()):
            self._drop_link(link)
        for entry in list(self._entries.values()):
            self._settle(returned(entry.order, "the worker stopped"))
        self._selector.close()
        self._is_closed = True
        reports += self._reports
        self._reports = []
        return reports

    # --- placing orders -------------------------------------------------------------------------

    def _place(self, entry: Entry, now_ms: int) -> None:
        order = entry.order
        pool = self._pools.get(order.task_type)
        if pool is None:
            self._settle(returned(order, f"no executor for {order.task_type} here"))
            return
        kind = Kind.SYNC if pool is Pool.SYNC else Kind.ASYNC
        if kind is Kind.ASYNC and order.task_id in self._suspects:
            kind = Kind.ALONE
        group = self._groups[kind]
        self._due(entry, now_ms + order.timeout_ms)
        group.waiting.append(entry)
        self._serve(group, now_ms)

    def _serve(self, group: Group, now_ms: int) -> None:
        """Give waiting orders to hosts that have room, starting hosts as needed."""
        while group.waiting:
            link = group.free_link() or self._new_link(group, now_ms)
            if link is None:
                return
            entry = group.waiting.popleft()
            self._due(entry, now_ms + entry.order.timeout_ms)
            link.hand_over(entry)
            self._started[entry.ref] = None
            self._dirty[link.host_id] = link

    def _due(self, entry: Entry, due_ms: int) -> None:
        entry.due_ms = due_ms
        self._due_ms = min(self._due_ms, due_ms)

    # --- hosts come and go ----------------------------------------------------------------------

    def _new_link(self, group: Group, now_ms: int) -> HostLink | None:
        """One more host for this group; None: it has all it may have, or starts keep failing."""
        if len(group.links) >= group.hosts_max or now_ms < self._spawn_after_ms:
            return None
        if self._warden is None and not self._relaunch_warden(now_ms):
            return None
        assert self._warden is not None
        settings = self._settings
        pool = Pool.SYNC if group.kind is Kind.SYNC else Pool.ASYNC
        # The warden names its modules itself; a host started from scratch loads them again.
        begin = Begin(pool, pack_settings(settings.executor), settings.built_in + settings.modules)
        link = HostLink(self._next_id, group.kind, begin, now_ms)
        self._next_id += 1
        try:
            self._warden.spawn(link.host_id, (link.child_sock.fileno(), link.output.child_fd))
        except WardenLost:
            link.child_sock.close()
            os.close(link.output.child_fd)
            link.close()
            self._on_warden_lost(now_ms)
            return None
        link.child_sock.close()
        os.close(link.output.child_fd)
        self._links[link.host_id] = link
        group.links.append(link)
        self._dirty[link.host_id] = link
        self._register(link.sock, lambda now: self._read_link(link, now))
        self._register_output(link.output)
        return link

    def _retire(self, link: HostLink) -> None:
        """No more work for this host; it closes when it is told to, and has nothing left to do."""
        if not link.is_retiring and not link.is_dying:
            link.is_retiring = True
            self._withdraw(link)
            link.say_close()
            self._dirty[link.host_id] = link

    def _kill_link(self, link: HostLink, why: str, now_ms: int) -> None:
        """Take this host down; what becomes of its tasks is decided when it is gone."""
        if link.is_dying:
            return
        link.is_dying = True
        link.why_killed = link.why_killed or why
        self.counters["hosts_killed"] += 1
        self._withdraw(link)
        if self._warden is not None:
            try:
                self._warden.kill(link.host_id)
            except WardenLost:
                self._on_warden_lost(now_ms)

    def _withdraw(self, link: HostLink) -> None:
        group = self._groups[link.kind]
        if link in group.links:
            group.links.remove(link)

    def _drop_link(self, link: HostLink) -> None:
        """Forget a host that is gone."""
        self._withdraw(link)
        del self._links[link.host_id]
        self._dirty.pop(link.host_id, None)
        self._writers.discard(link.host_id)
        self._paused.pop(link.output, None)
        self._unregister(link.sock)
        self._unregister(link.output.fd)
        link.close()

    def _bury(self, link: HostLink, status: int, problem: str, now_ms: int) -> None:
        """Nothing of this host is left: take its last words, and settle what it ran."""
        self._take(link, link.read(reads_max=1 << 20), now_ms)
        link.output.drain(now_ms)
        results, is_unprovoked = after_death(link, status, problem, self._suspects)
        for result in results:
            self._settle(result)
        self._drop_link(link)
        if not link.is_ready:
            self._on_failed_start(link, status, problem, now_ms)
        elif is_unprovoked:
            self.counters["hosts_died"] += 1
            ids = ", ".join(str(result.task_id) for result in results[:10]) or "none"
            log.warning(
                "%s host %d died (%s); tasks in it: %s",
                link.kind,
                link.host_id,
                problem or link.why_killed or describe_exit(status),
                ids,
            )
        self._serve(self._groups[link.kind], now_ms)

    def _on_failed_start(self, link: HostLink, status: int, problem: str, now_ms: int) -> None:
        if link.why_killed or link.is_retiring:
            return
        self._failed_starts += 1
        self.counters["hosts_not_started"] += 1
        wait_ms = BACKOFF_MS[min(self._failed_starts, len(BACKOFF_MS) - 1)]
        self._spawn_after_ms = now_ms + wait_ms
        why = problem or link.output.last_line() or f"exit {status}"
        log.warning("%s host %d did not start: %s", link.kind, link.host_id, why)

    # --- what hosts say -------------------------------------------------------------------------

    def _read_link(self, link: HostLink, now_ms: int) -> None:
        if link.wants_to_write:
            self._dirty[link.host_id] = link
        self._take(link, link.read(), now_ms)
        if link.is_broken:
            # The end of its channel is the end of a host, told sooner than by the warden.
            self._unregister(link.sock)
            self._writers.discard(link.host_id)
            self._break_off(link, now_ms)

    def _break_off(self, link: HostLink, now_ms: int) -> None:
        """The channel is closed: see to it that the process is gone too; Exited will follow."""
        self._withdraw(link)
        if not link.is_dying and self._warden is not None:
            link.is_dying = True
            try:
                self._warden.kill(link.host_id)
            except WardenLost:
                self._on_warden_lost(now_ms)

    def _take(self, link: HostLink, messages: list[Any], now_ms: int) -> None:
        for message in messages:
            match message:
                case Finished(results=results, last=is_last):
                    for result in results:
                        self._on_result(link, result)
                    if is_last:
                        self._retire(link)
                    self._after_results(link, now_ms)
                case Notes(progress=progress, rates=rates):
                    self._reports += [
                        note for note in progress if (note.task_id, note.attempt) in link.running
                    ]
                    self._reports += rates
                case Ready():
                    link.is_ready = True
                    self._failed_starts = 0
                case _:
                    pass  # a Pong: read() has noted that the host answers

    def _on_result(self, link: HostLink, result: TaskResult) -> None:
        ref = (result.task_id, result.attempt)
        entry = link.running.pop(ref, None)
        if entry is None:
            self.counters["results_unknown"] += 1
            return
        link.tasks_done += 1
        if entry.ending is not None:
            result = _as_ended(entry, result)
        elif result.outcome is Outcome.CANCELLED:
            result = returned(entry.order, "its host was closed")
        if link.kind is Kind.ALONE:
            self._suspects.clear(result.task_id)
        self._settle(result)

    def _after_results(self, link: HostLink, now_ms: int) -> None:
        is_worn = link.kind is Kind.SYNC and link.tasks_done >= self._settings.sync_tasks_max
        if is_worn or (link.is_replaced and not link.running):
            self._retire(link)
        group = self._groups[link.kind]
        if group.waiting:
            self._serve(group, now_ms)

    def _settle(self, result: TaskResult) -> None:
        """The one end of an attempt."""
        ref = (result.task_id, result.attempt)
        del self._entries[ref]
        self._started.pop(ref, None)
        self._reports.append(result)

    # --- ending tasks ---------------------------------------------------------------------------

    def _end(self, entry: Entry, outcome: Outcome, now_ms: int) -> None:
        """Begin to end an attempt; a second time changes nothing."""
        if entry.ending is not None:
            return
        link = entry.link
        if link is None:
            self._end_waiting(entry, outcome)
            return
        entry.ending = outcome
        if link.kind is Kind.SYNC:
            self._due(entry, _NEVER)
            self._kill_link(link, f"task {entry.ref[0]} had to end", now_ms)
            return
        self._due(entry, now_ms + CANCEL_GRACE_MS)
        link.cancel(entry.ref)
        link.ping()  # tells a task that ignores us from a loop that does not run
        self._dirty[link.host_id] = link

    def _end_waiting(self, entry: Entry, outcome: Outcome) -> None:
        for group in self._groups.values():
            if entry in group.waiting:
                group.waiting.remove(entry)
        order = entry.order
        if outcome is Outcome.TIMED_OUT:
            self._settle(returned(order, "no executor host got free for it in time"))
        else:
            self._settle(TaskResult(order.task_id, order.attempt, outcome))

    def _on_due(self, entry: Entry, now_ms: int) -> None:
        if entry.ending is None:
            self._end(entry, Outcome.TIMED_OUT, now_ms)
            return
        self._due(entry, _NEVER)
        link = entry.link
        if link is not None and not link.is_dying:
            # One unanswered ping may just be on its way; a loop that stands has two or three.
            link.was_silent = link.unanswered > 1
            self._kill_link(link, f"task {entry.ref[0]} did not end when told to", now_ms)

    # --- time -----------------------------------------------------------------------------------

    def _run_timers(self, now_ms: int) -> None:
        if self._paused:
            for output in [one for one, at_ms in self._paused.items() if at_ms <= now_ms]:
                del self._paused[output]
                self._register_output(output)
        if self._spawn_after_ms and self._spawn_after_ms <= now_ms:
            self._spawn_after_ms = 0
            for group in self._groups.values():
                self._serve(group, now_ms)
        if not self._entries:
            self._due_ms = _NEVER
            return
        if self._due_ms <= now_ms:
            # A bound, not the exact time: what ended meanwhile left it too early, never too late.
            self._due_ms = _NEVER
            for entry in list(self._entries.values()):
                if entry.due_ms <= now_ms:
                    self._on_due(entry, now_ms)
                self._due_ms = min(self._due_ms, entry.due_ms)
        if self._tick_ms <= now_ms:
            self._tick_ms = now_ms + PING_MS
            self._ticks += 1
            self._tick(now_ms)

    def _tick(self, now_ms: int) -> None:
        """Once a second while something runs: does each loop turn, does none grow too large?"""
        for link in list(self._links.values()):
            if link.kind is Kind.SYNC or link.is_dying or not link.running:
                continue
            if link.unanswered > UNANSWERED_MAX:
                link.was_silent = True
                self._kill_link(link, f"its loop did not turn for {UNANSWERED_MAX} s", now_ms)
                continue
            link.ping()
            self._dirty[link.host_id] = link
        if self._ticks % MEMORY_EVERY_TICKS == 0:
            self._check_memory(now_ms)

    def _check_memory(self, now_ms: int) -> None:
        most, grown = self._settings.rss_bytes_max, self._settings.grown_bytes_max
        if not most and not grown:
            return
        for link in [one for one in self._links.values() if one.pid and not one.is_dying]:
            rss = 0
            with suppress(psutil.Error):
                rss = psutil.Process(link.pid).memory_info().rss
            if most and rss > most:
                link.was_silent = True  # whoever it was, the others may be it
                self._kill_link(link, f"it used {rss:,} bytes of memory", now_ms)
            elif grown and rss > grown:
                self._replace(link)

    def _replace(self, link: HostLink) -> None:
        """A host that has grown: a fresh one takes its place, it finishes what it has."""
        if link.is_retiring or link.is_replaced:
            return
        self.counters["hosts_replaced"] += 1
        link.is_replaced = True
        self._withdraw(link)
        if not link.running:
            self._retire(link)

    # --- the warden -----------------------------------------------------------------------------

    def _launch_warden(self) -> None:
        warden = WardenLink(self._settings)
        self._warden = warden
        self._register(warden.sock, self._read_warden)
        self._register_output(warden.output)

    def _relaunch_warden(self, now_ms: int) -> bool:
        try:
            self._launch_warden()
        except (StartError, WardenLost) as error:
            log.error("%s", error)
            self._spawn_after_ms = now_ms + BACKOFF_MS[-1]
            return False
        return True

    def _read_warden(self, now_ms: int) -> None:
        assert self._warden is not None
        try:
            messages = self._warden.receive()
        except WardenLost:
            self._on_warden_lost(now_ms)
            return
        for message in messages:
            match message:
                case Spawned(host_id=host_id, pid=pid):
                    if host_id in self._links:
                        self._links[host_id].pid = pid
                case Exited(host_id=host_id, status=status, orphans=orphans, problem=problem):
                    self.counters["orphans_killed"] += orphans
                    if host_id in self._links:
                        self._bury(self._links[host_id], status, problem, now_ms)
                case LoadFailed(problem=problem):
                    log.error("executors: %s", problem)
                    self._spawn_after_ms = now_ms + BACKOFF_MS[-1]
                case _:
                    pass

    def _on_warden_lost(self, now_ms: int) -> None:
        """Its hosts die with it (PDEATHSIG); make sure of that, and begin anew."""
        self.counters["wardens_lost"] += 1
        log.warning("the warden of the executor hosts died; starting another one")
        self._forget_warden(is_lost=True)
        running = sum(len(link.running) for link in self._links.values())
        for link in list(self._links.values()):
            if link.pid:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(link.pid, signal.SIGKILL)
            link.was_silent = True
            link.has_company = len(link.running) < running
            link.why_killed = "the warden of all hosts died"
            self._bury(link, -signal.SIGKILL, "", now_ms)
        if not running:
            self._spawn_after_ms = now_ms + BACKOFF_MS[1]

    def _forget_warden(self, is_lost: bool = False) -> None:
        assert self._warden is not None
        warden, self._warden = self._warden, None
        self._unregister(warden.sock)
        self._unregister(warden.output.fd)
        self._paused.pop(warden.output, None)
        warden.close(is_lost)

    # --- descriptors ----------------------------------------------------------------------------

    def _register(self, fileobj: Any, handler: Handler) -> None:
        key = self._selector.register(fileobj, selectors.EVENT_READ, handler)
        self._handlers[key.fd] = handler

    def _register_output(self, output: OutputTail) -> None:
        self._register(output.fd, lambda now_ms: self._read_output(output, now_ms))

    def _unregister(self, fileobj: Any) -> None:
        with suppress(KeyError, ValueError):
            self._handlers.pop(self._selector.unregister(fileobj).fd, None)

    def _read_output(self, output: OutputTail, now_ms: int) -> None:
        is_flooded = output.read(now_ms)
        if is_flooded or not output.is_open:
            self._unregister(output.fd)
        if is_flooded and output.is_open:
            self._paused[output] = now_ms + PAUSE_MS

    def _watch_writes(self, link: HostLink) -> None:
        """Be woken when a full socket has room again, and only then."""
        wants = link.wants_to_write
        if wants == (link.host_id in self._writers):
            return
        try:
            key = self._selector.get_key(link.sock)
        except KeyError:
            return
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wants else 0)
        self._selector.modify(link.sock, events, key.data)
        (self._writers.add if wants else self._writers.discard)(link.host_id)


_NEVER: Final = 2**62


def _as_ended(entry: Entry, result: TaskResult) -> TaskResult:
    """What a result means that arrived after the task was told to end."""
    assert entry.ending is not None
    if entry.ending is Outcome.TIMED_OUT and result.outcome is Outcome.COMPLETED:
        return result  # it just made it
    error = ""
    if entry.ending is Outcome.TIMED_OUT:
        error = timeout_text(entry.order, "it was cancelled")
    return TaskResult(
        entry.ref[0],
        entry.ref[1],
        entry.ending,
        error=error,
        run_us=result.run_us,
        rates=result.rates,
    )
