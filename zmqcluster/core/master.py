"""MasterCore: one batch of events in, one turn of rows and actions out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from random import Random
from typing import Final, assert_never

from msgspec import Struct

from zmqcluster.core import admin, backlog, intake, results, sessions, watching
from zmqcluster.core.dispatcher import TaskDispatcher, reopen
from zmqcluster.core.effects import Turn
from zmqcluster.core.events import (
    BacklogLoaded,
    Committed,
    DelayedLoaded,
    Event,
    Facts,
    FramesDropped,
    LaneKey,
    LanesListed,
    MessageReceived,
    Noticed,
    OpenTasksLoaded,
    Peer,
    PeerLost,
    Principal,
    Tick,
    TurnedAway,
)
from zmqcluster.core.fleet import Device
from zmqcluster.core.intake import unique_hash
from zmqcluster.core.rows import TaskRow
from zmqcluster.core.settings import Settings
from zmqcluster.core.state import MasterState, Past
from zmqcluster.messages import (
    AskDevices,
    AskExplain,
    AskOverview,
    CancelTasks,
    ClientMessage,
    CreateToken,
    DrainDevice,
    Enrol,
    Goodbye,
    Heartbeat,
    Hello,
    Inbound,
    Progress,
    RateReport,
    RateRule,
    Results,
    RetryTasks,
    Returned,
    RevokeDevice,
    RevokeToken,
    SetStrategy,
    Started,
    Submit,
    TaskSpec,
    Watch,
    WorkerMessage,
)
from zmqcluster.model import DeviceId, JobId, TaskId

# What has a rate key.
_Named = TaskRow | TaskSpec | RateRule | LaneKey

_PRUNE_EVERY_MS: Final = 10_000
_PRUNE_AGAIN_MS: Final = 25
_PRUNE_BUSY_MS: Final = 100
_STALL_BEATS: Final = 1
_WALL_STEP_MS: Final = 1_000


class Wants(Struct):
    """What the core would like to know from the database before it handles a message."""

    request_id: bytes = b""
    keys: tuple[tuple[JobId, bytes], ...] = ()
    tasks: tuple[TaskId, ...] = ()
    jobs: tuple[JobId, ...] = ()
    rates: tuple[str, ...] = ()

    @property
    def nothing(self) -> bool:
        return not (self.request_id or self.keys or self.tasks or self.jobs or self.rates)

    def plus(self, other: Wants) -> Wants:
        """Both, for the request of this one."""
        return Wants(
            self.request_id,
            keys=self.keys + other.keys,
            tasks=self.tasks + other.tasks,
            jobs=self.jobs + other.jobs,
            rates=self.rates + other.rates,
        )


_NOTHING: Final = Wants()


class MasterCore:
    """The master's decisions. Not thread-safe: one loop owns it.

    Facts for a message are read after the last Committed was handled, and what was read is handled
    before the next one; see `wants`.
    """

    def __init__(self, settings: Settings, past: Past, rng: Random) -> None:
        self._state = MasterState(settings, past, rng)
        self._dispatcher = TaskDispatcher(self._state)
        self._ticked_ms = past.clock_ms
        self._pruned_ms = past.clock_ms
        self._first_offset_ms: int | None = None
        self._scheduled_offset_ms = 0
        backlog.recover(self._state, past)

    @property
    def state(self) -> MasterState:
        """For tests, invariants and the simulator; nobody else looks inside."""
        return self._state

    def handle(self, now_ms: int, events: Iterable[Event]) -> Turn:
        """Take in a batch of events, then hand out what can be handed out.

        now_ms: cluster time; never less than in the turn before.
        """
        state = self._state
        state.now_ms = max(now_ms, state.now_ms)
        state.turn += 1
        for event in events:
            self._on_event(event)
        self._fire_timers()
        backlog.release_due(state)
        self._dispatcher.dispatch()
        state.queue.sweep()
        backlog.ask_for_more(state)
        if state.ends:
            watching.tell_watchers(state)
        is_busy = bool(state.changes.assignments)
        if is_busy and state.now_ms - self._pruned_ms >= _PRUNE_BUSY_MS:
            self._prune()
        return state.end_turn()

    def next_wake_ms(self) -> int | None:
        """Cluster time at which something falls due without any event, or None."""
        state = self._state
        if state.delays.is_due(state.now_ms) and state.queue.has_room:
            return state.now_ms
        timer_ms, delay_ms = state.timers.next_ms(), state.delays.next_ms(state.now_ms)
        if timer_ms is None or delay_ms is None:
            return delay_ms if timer_ms is None else timer_ms
        return min(timer_ms, delay_ms)

    def wants(self, message: Inbound) -> Wants:
        """What to look up for this message; most need nothing."""
        match message:
            case Results():
                return self._wants_of_results(message)
            case Submit():
                job_id = JobId(message.job_id)
                keys = () if message.job_name else self._unknown_keys(job_id, message.tasks)
                return Wants(
                    message.request_id,
                    keys,
                    jobs=self._unknown_jobs(job_id),
                    rates=self._unknown_rates((*message.tasks, *message.rates)),
                )
            case RateReport():
                return Wants(rates=self._unknown_rates(message.rates))
            case CancelTasks():
                return Wants(
                    message.request_id,
                    tasks=self._unknown_tasks(message.task_ids),
                    jobs=self._unknown_jobs(JobId(message.job_id)),
                )
            case RetryTasks():
                return Wants(
                    message.request_id,
                    tasks=self._unknown_tasks(message.task_ids),
                    rates=self._unknown_rates(self._known_tasks(message.task_ids)),
                )
            case Watch():
                return Wants(
                    tasks=self._unknown_tasks(message.task_ids),
                    jobs=self._unknown_jobs(JobId(message.job_id)),
                )
            case AskExplain():
                task_ids = (message.task_id,)
                return Wants(
                    tasks=self._unknown_tasks(task_ids),
                    rates=self._unknown_rates(self._known_tasks(task_ids)),
                )
            case _:
                return _NOTHING

    def wants_of(self, message: Inbound, found: Mapping[TaskId, TaskRow]) -> Wants:
        """What to look up next, once the tasks that this message named were found on disk."""
        named: list[_Named] = list(found.values())
        keys: list[tuple[JobId, bytes]] = []
        for result in message.results if isinstance(message, Results) else ():
            task = found.get(TaskId(result.task_id))
            if task is not None:
                named += result.children
                keys += self._unknown_keys(task.job_id, result.children)
        jobs = {task.job_id: None for task in found.values()}
        return Wants(
            keys=tuple(keys),
            jobs=tuple(job_id for job_id in jobs if job_id not in self._state.jobs),
            rates=self._unknown_rates(named),
        )

    def rates_of(self, found: Iterable[TaskRow | LaneKey]) -> tuple[str, ...]:
        """Rate keys of what was read that are not in memory."""
        return self._unknown_rates(found)

    # --- events -------------------------------------------------------------------------------

    def _on_event(self, event: Event) -> None:
        match event:
            case MessageReceived():
                self._on_message(event.peer, event.principal, event.message, event.facts)
            case Tick():
                self._on_tick(event)
            case Committed():
                self._state.committed(event.turn)
                if event.prune_more:
                    state = self._state
                    state.timers.set("prune", state.now_ms + _PRUNE_AGAIN_MS)
            case PeerLost():
                sessions.on_peer_lost(self._state, event.peer)
                watching.forget_watcher(self._state, event.peer)
            case TurnedAway(kind, device_id, detail):
                self._state.event_of_peer(kind, device_id=device_id, detail=detail)
            case Noticed(kind, level, detail):
                self._state.event(kind, detail=detail)
                self._state.log(level, detail)
            case FramesDropped():
                slow = self._state.fleet.by_peer.get(event.peer)
                self._state.event(
                    "frames_dropped",
                    device_id=slow.device_id if slow else "",
                    detail="it does not read what it is sent",
                )
            case BacklogLoaded():
                backlog.on_loaded(self._state, event)
            case LanesListed():
                backlog.on_lanes(self._state, event)
            case DelayedLoaded():
                backlog.on_delayed(self._state, event)
            case OpenTasksLoaded():
                intake.on_open_tasks(self._state, event)
            case _:
                assert_never(event)

    def _on_message(self, peer: Peer, principal: Principal, message: Inbound, facts: Facts) -> None:
        self._state.recall(facts.rates.values())
        match message:
            case Enrol():
                admin.on_enrol(self._state, peer, principal, message)
            case Hello():
                sessions.on_hello(self._state, self._dispatcher, peer, principal, message)
            case (
                Heartbeat() | Started() | Results() | Returned() | Progress() | RateReport()
                | Goodbye()
            ):  # fmt: skip
                device = self._state.fleet.by_peer.get(peer)
                if device is None or device.device_id != principal.device_id:
                    sessions.on_unknown_session(self._state, peer)
                else:
                    self._on_device(device, message, facts)
            case _:
                self._on_client(peer, message, facts)

    def _on_device(self, device: Device, message: WorkerMessage, facts: Facts) -> None:
        state, dispatcher = self._state, self._dispatcher
        device.heard_ms = state.now_ms
        match message:
            case Results():
                results.on_results(state, dispatcher, device, message, facts)
            case Started():
                results.on_started(state, device, message)
            case Heartbeat():
                sessions.on_heartbeat(state, dispatcher, device, message)
            case Returned():
                results.on_returned(state, dispatcher, device, message)
            case Progress():
                results.on_progress(state, device, message)
            case RateReport():
                results.on_rate_report(state, device, message)
            case Goodbye():
                sessions.on_goodbye(state, dispatcher, device, message)
            case Hello():
                raise AssertionError("a Hello opens a session and never belongs to one")
            case _:
                assert_never(message)

    def _on_client(self, peer: Peer, message: ClientMessage, facts: Facts) -> None:
        state, dispatcher = self._state, self._dispatcher
        match message:
            case Submit():
                intake.on_submit(state, peer, message, facts)
            case Watch():
                watching.on_watch(state, peer, message, facts)
            case CancelTasks():
                intake.on_cancel(state, peer, message, facts)
            case RetryTasks():
                intake.on_retry(state, peer, message, facts)
            case DrainDevice():
                admin.on_drain(state, peer, message)
            case SetStrategy():
                admin.on_strategy(state, peer, message)
            case CreateToken():
                admin.on_create_token(state, peer, message)
            case RevokeToken():
                admin.on_revoke_token(state, peer, message)
            case RevokeDevice():
                admin.on_revoke_device(state, dispatcher, peer, message)
            case AskOverview():
                admin.on_ask_overview(state, peer, message)
            case AskDevices():
                admin.on_ask_devices(state, peer, message)
            case AskExplain():
                admin.on_ask_explain(state, peer, message, facts)
            case _:
                assert_never(message)

    def _on_tick(self, event: Tick) -> None:
        state = self._state
        gap_ms = state.now_ms - self._ticked_ms
        self._ticked_ms = state.now_ms
        state.wall_offset_ms = event.wall_ms - state.now_ms
        if self._first_offset_ms is None:
            self._first_offset_ms = state.wall_offset_ms
        # Measured from the last step, so that a slow drift adds up to one.
        if abs(state.wall_offset_ms - self._scheduled_offset_ms) > _WALL_STEP_MS:
            self._scheduled_offset_ms = state.wall_offset_ms
            backlog.on_wall_step(state)
        if gap_ms > _STALL_BEATS * state.settings.heartbeat_interval_ms:
            sessions.forgive_silence(state)
        if state.now_ms - self._pruned_ms >= _PRUNE_EVERY_MS:
            self._prune()

    def _prune(self) -> None:
        """One small step; a busy master takes many, an idle one is left asleep for a while."""
        state = self._state
        self._pruned_ms = state.now_ms
        # The wall clock as it was when we began, moved on by steady time: setting the clock
        # forward must not make yesterday's results old. Set back, it keeps things longer.
        steady_wall_ms = state.now_ms + min(self._first_offset_ms or 0, state.wall_offset_ms)
        state.changes.prune_before_wall = max(0, steady_wall_ms - state.settings.retention_ms)

    def _fire_timers(self) -> None:
        state = self._state
        while (name := state.timers.pop_due(state.now_ms)) is not None:
            kind, _, rest = name.partition(" ")
            match kind:
                case "prune":
                    self._prune()
                case "key":
                    reopen(state, rest)
                case "lease":
                    sessions.on_lease_over(state, self._dispatcher, DeviceId(rest))
                case "gone":
                    sessions.on_reconnect_over(state, self._dispatcher, DeviceId(rest))
                case _:
                    raise AssertionError(f"nobody set a timer of kind {kind!r}")

    # --- wants --------------------------------------------------------------------------------

    def _wants_of_results(self, message: Results) -> Wants:
        state = self._state
        keys: list[tuple[JobId, bytes]] = []
        unknown: list[TaskId] = []
        named: list[_Named] = []
        for result in message.results:
            task = state.row_of(TaskId(result.task_id))
            named += result.rates
            if task is None:
                unknown.append(TaskId(result.task_id))
                continue
            named.append(task)
            if result.children:
                named += result.children
                keys.extend(self._unknown_keys(task.job_id, result.children))
        return Wants(
            keys=tuple(keys),
            tasks=self._unknown_tasks(unknown),
            rates=self._unknown_rates(named),
        )

    def _unknown_keys(
        self, job_id: JobId, specs: Iterable[TaskSpec]
    ) -> tuple[tuple[JobId, bytes], ...]:
        state = self._state
        hashed = ((job_id, unique_hash(one.unique_key)) for one in specs if one.unique_key)
        return tuple(key for key in hashed if state.holder_of(key) is None)

    def _unknown_tasks(self, task_ids: Iterable[int]) -> tuple[TaskId, ...]:
        state = self._state
        return tuple(
            TaskId(one) for one in task_ids if one not in state.tasks and one not in state.departed
        )

    def _known_tasks(self, task_ids: Iterable[int]) -> list[TaskRow]:
        rows = (self._state.row_of(TaskId(one)) for one in task_ids)
        return [row for row in rows if row is not None]

    def _unknown_rates(self, named: Iterable[_Named]) -> tuple[str, ...]:
        """Their rate keys that are not in memory; those that are stay until the turn is over."""
        known = self._state.rates
        names = {one.rate_key: None for one in named if one.rate_key}
        return tuple(name for name in names if name not in known)

    def _unknown_jobs(self, job_id: JobId) -> tuple[JobId, ...]:
        return () if not job_id or job_id in self._state.jobs else (job_id,)
