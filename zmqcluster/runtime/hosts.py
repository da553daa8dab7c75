"""The executor hosts of an agent: orders go in, reports come out, task code stays out of the agent.

One thread, no blocking, no clock of its own: the agent's loop calls poll(now_ms) whenever fileno()
is readable or next_deadline_ms() has come. Tasks of `async` executors share one asyncio host, plain
functions get a process each; a warden (executors/warden.py) starts and kills them all.

Promises: every order comes back as exactly one TaskResult, whatever the task does, unless it is
the agent that dies; nothing a task does blocks poll(); an ended task's processes are gone before
its end is reported, and so are all hosts within 2 s of the agent's own death.
"""

from __future__ import annotations

from collections import Counter, deque
from contextlib import suppress
from typing import Any, Final

import psutil  # type: ignore[import-untyped]  # ships no types

from executors.hostwire import Began, Finished, Notes
from executors.outcome import returned
from zmqcluster.errors import ClusterError
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
from zmqcluster.runtime.hosts_fate import Suspects, after_death, as_ended
from zmqcluster.runtime.hosts_fleet import Fleet
from zmqcluster.runtime.hosts_link import Entry, HostLink, Kind, Ref
from zmqcluster.runtime.hosts_settings import HostSettings

HostReport = Started | TaskResult | ProgressNote | RateRule

# A cancelled async task has this long to finish; then its whole host is killed.
CANCEL_GRACE_MS: Final = 2_000
PING_MS: Final = 1_000
# Counted in pings sent, not in time: a laptop that slept has not been silent.
UNANSWERED_MAX: Final = 10
ALONE_HOSTS_MAX: Final = 4

_NEVER: Final = 2**62


class HostPool:
    """Runs orders in child processes. start() first, close() last."""

    def __init__(self, settings: HostSettings) -> None:
        self._settings = settings
        self._fleet = Fleet(settings, self)
        self._offers: tuple[TypeOffer, ...] = ()
        self._pools: dict[str, Pool] = {}
        self._entries: dict[Ref, Entry] = {}
        self._queued: list[Entry] = []
        self._kills: list[tuple[Ref, Outcome]] = []
        self._reports: list[HostReport] = []
        self._started: dict[Ref, None] = {}
        # Orders that wait for a host, and how many hosts with how many tasks each there may be.
        self._waiting: dict[Kind, deque[Entry]] = {kind: deque() for kind in Kind}
        self._limits = {
            Kind.ASYNC: (1, max(1, settings.async_slots)),
            Kind.SYNC: (settings.sync_hosts, 1),
            Kind.ALONE: (ALONE_HOSTS_MAX, 1),
        }
        self._suspects = Suspects()
        self._due_ms = _NEVER
        self._tick_ms = 0
        self._is_closed = False

    # --- for the agent --------------------------------------------------------------------------

    def start(self) -> None:
        """Start the warden and wait until all executor modules are in.

        Raises ConfigError for a module that cannot be used, StartError when no process can be
        started or the modules take longer than LOAD_S.
        """
        try:
            self._offers = self._fleet.start()
        except ClusterError:
            self.close(0)
            raise
        self._pools = {offer.task_type: offer.pool for offer in self._offers}

    @property
    def counters(self) -> Counter[str]:
        """Everything that went wrong and was put right, for metrics."""
        return self._fleet.counters

    def fileno(self) -> int:
        """Readable whenever poll() has something to do; to be put into the agent's poller."""
        return self._fleet.poller.fileno()

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

        Returns at most one Started, first, for attempts handed to a host since the last call and
        still running; then as it happened: one TaskResult for each order, ProgressNote and RateRule
        as tasks make them, and a Started for each attempt with a start window, when it really
        began; it comes before the result, also when a host died and nobody knows. Outcome RETURNED:
        not this attempt's fault, run it again.
        """
        self.flush(now_ms)
        self._fleet.poller.dispatch(now_ms)
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
            if len(queued) == len(self._entries):
                self._tick_ms = now_ms + PING_MS  # nothing ran, so nothing can be overdue
            for entry in queued:
                self._place(entry, now_ms)
        if self._kills:
            kills, self._kills = self._kills, []
            for ref, outcome in kills:
                if ref in self._entries:
                    self._end(self._entries[ref], outcome, now_ms)
        self._fleet.flush()

    def next_deadline_ms(self) -> int | None:
        """When poll() has to be called even if fileno() stays quiet; 0: at once; None: never."""
        if self._queued or self._kills or self._reports:
            return 0
        due_ms = self._fleet.due_ms()
        if self._entries:
            soonest_ms = min(self._due_ms, self._tick_ms)
            due_ms = soonest_ms if due_ms is None else min(due_ms, soonest_ms)
        return due_ms

    def close(self, grace_ms: int = 2_000) -> list[HostReport]:
        """End all hosts: those that can within grace_ms in good order, the others by force.

        The only call that blocks, for grace_ms and up to some seconds more for what will not die.
        What still ran comes back as returned. Safe to call twice.
        """
        if self._is_closed:
            return []
        self._is_closed = True
        reports = self._close_kindly(grace_ms) if grace_ms else []
        self._fleet.close()
        for entry in list(self._entries.values()):
            self._settle(returned(entry.order, "the worker stopped"))
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
        self._due(entry, now_ms + order.timeout_ms)
        self._waiting[kind].append(entry)
        self._serve(kind, now_ms)

    def _serve(self, kind: Kind, now_ms: int) -> None:
        """Give waiting orders to hosts that have room, starting hosts as needed."""
        waiting = self._waiting[kind]
        hosts_max, tasks_max = self._limits[kind]
        while waiting and not self._is_closed:
            link = self._fleet.free(kind, tasks_max) or self._fleet.add(kind, hosts_max, now_ms)
            if link is None:
                return
            entry = waiting.popleft()
            self._due(entry, now_ms + entry.order.timeout_ms)
            link.hand_over(entry)
            if not entry.order.start_within_ms:
                self._started[entry.ref] = None
            self._fleet.touch(link)

    def _due(self, entry: Entry, due_ms: int) -> None:
        entry.due_ms = due_ms
        self._due_ms = min(self._due_ms, due_ms)

    # --- what the fleet tells (FleetOwner) ------------------------------------------------------

    def on_messages(self, link: HostLink, messages: list[Any], now_ms: int) -> None:
        for message in messages:
            match message:
                case Began(refs=refs):
                    self._on_began(link, refs)
                case Finished(results=results, last=is_last):
                    for result in results:
                        self._on_result(link, result)
                    self._after_results(link, is_last, now_ms)
                case Notes(progress=progress, rates=rates):
                    self._reports += [
                        note for note in progress if (note.task_id, note.attempt) in link.running
                    ]
                    self._reports += rates
                case _:
                    pass  # a Pong: that the host answers is noted where it is read

    def on_gone(self, link: HostLink, status: int, problem: str, now_ms: int) -> bool:
        results, is_surprise = after_death(link, status, problem, self._suspects)
        for result in results:
            self._settle(result)
        return is_surprise

    def on_room(self, now_ms: int) -> None:
        for kind in Kind:
            self._serve(kind, now_ms)

    def _on_began(self, link: HostLink, refs: tuple[AttemptRef, ...]) -> None:
        for ref in refs:
            entry = link.running.get((ref.task_id, ref.attempt))
            if entry is not None and entry.order.start_within_ms and not entry.has_begun:
                entry.has_begun = True
                self._reports.append(Started((ref,)))

    def _on_result(self, link: HostLink, result: TaskResult) -> None:
        ref = (result.task_id, result.attempt)
        entry = link.running.pop(ref, None)
        if entry is None:
            self.counters["results_unknown"] += 1
            return
        link.tasks_done += 1
        has_missed = entry.ending is None and result.outcome is Outcome.RETURNED
        if entry.ending is not None:
            result = as_ended(entry, result)
        elif result.outcome is Outcome.CANCELLED:
            result = returned(entry.order, "its host was closed")
        if link.kind is Kind.ALONE:
            self._suspects.clear(result.task_id)
        self._settle(result, has_missed=has_missed)

    def _after_results(self, link: HostLink, is_last: bool, now_ms: int) -> None:
        is_worn = link.kind is Kind.SYNC and link.tasks_done >= self._settings.sync_tasks_max
        if is_last or is_worn or (link.is_replaced and not link.running):
            self._fleet.retire(link, now_ms)
        if self._waiting[link.kind]:
            self._serve(link.kind, now_ms)

    def _settle(self, result: TaskResult, *, has_missed: bool = False) -> None:
        """The one end of an attempt. has_missed: its host says that it never began."""
        ref = (result.task_id, result.attempt)
        entry = self._entries.pop(ref)
        self._started.pop(ref, None)
        if result.outcome is Outcome.RETURNED and entry.may_have_begun and not has_missed:
            # Counted as a start, for the sake of whoever its rate key protects.
            self._reports.append(Started((AttemptRef(*ref),)))
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
            self._fleet.kill(link, f"task {entry.ref[0]} had to end", now_ms)
            return
        self._due(entry, now_ms + CANCEL_GRACE_MS)
        link.cancel(entry.ref)
        link.ping()  # tells a task that ignores us from a loop that does not run
        self._fleet.touch(link)

    def _end_waiting(self, entry: Entry, outcome: Outcome) -> None:
        for waiting in self._waiting.values():
            if entry in waiting:
                waiting.remove(entry)
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
            self._fleet.kill(link, f"task {entry.ref[0]} did not end when told to", now_ms)

    # --- time -----------------------------------------------------------------------------------

    def _run_timers(self, now_ms: int) -> None:
        self._fleet.run_timers(now_ms)
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
            self._check_loops(now_ms)
            self._check_memory(now_ms)

    def _check_loops(self, now_ms: int) -> None:
        """Once a second while something runs: does each loop turn?"""
        for link in list(self._fleet.links.values()):
            if link.kind is Kind.SYNC or link.is_dying or not link.running:
                continue
            if link.unanswered > UNANSWERED_MAX:
                link.was_silent = True
                self._fleet.kill(link, f"its loop did not turn for {UNANSWERED_MAX} s", now_ms)
                continue
            if link.unanswered:
                self._fleet.show_stack(link, now_ms)
            link.ping()
            self._fleet.touch(link)

    def _check_memory(self, now_ms: int) -> None:
        most, grown = self._settings.rss_bytes_max, self._settings.grown_bytes_max
        if not most and not grown:
            return
        for link in [one for one in self._fleet.links.values() if one.pid and not one.is_dying]:
            rss = 0
            with suppress(psutil.Error):
                rss = psutil.Process(link.pid).memory_info().rss
            if most and rss > most:
                link.was_silent = True  # whoever it was, the others may be it
                self._fleet.kill(link, f"it used {rss:,} bytes of memory", now_ms)
            elif grown and rss > grown:
                self._fleet.replace(link, now_ms)

    def _close_kindly(self, grace_ms: int) -> list[HostReport]:
        clock = SystemClock()
        until_ms = clock.monotonic_ms() + grace_ms
        reports: list[HostReport] = []
        for link in list(self._fleet.links.values()):
            self._fleet.retire(link, clock.monotonic_ms())
        while self._fleet.links and (now_ms := clock.monotonic_ms()) < until_ms:
            reports += self.poll(now_ms)
            self._fleet.poller.wait(min(50, until_ms - now_ms) / 1000)
        reports += self.poll(clock.monotonic_ms())
        return reports
