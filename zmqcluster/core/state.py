"""The master's memory, and the few ways in which everything else may change it.

Whatever changes a task, a job or a device goes through here, so that what is in memory and what
the turn writes cannot drift apart: `save` marks, `end_turn` copies the marked rows out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from random import Random
from typing import Final

from msgspec import Struct, field
from msgspec.structs import replace

from zmqcluster.core.delays import Delays
from zmqcluster.core.effects import Action, Changes, Log, Send, Turn
from zmqcluster.core.events import Facts, LaneKey, Peer
from zmqcluster.core.fleet import Device, Fleet, Flight, give_back
from zmqcluster.core.lanes import Lane, Shape
from zmqcluster.core.lifecycle import TaskCause, advance
from zmqcluster.core.queue import ReadyQueue
from zmqcluster.core.rates import RateKey
from zmqcluster.core.rows import (
    AssignmentRow,
    DeviceRow,
    EventRow,
    JobRow,
    KeyRow,
    RateKeyRow,
    TaskRow,
    TokenRow,
)
from zmqcluster.core.settings import Settings
from zmqcluster.core.timers import Timers
from zmqcluster.messages import Outbound, TaskEnd
from zmqcluster.model import DELAY_MS_MAX, NO_JOB, DeviceId, JobId, JobState, TaskId, TaskState

# Known unique keys kept in memory to save look-ups: at least this many of the newest, at most twice
# as many. Two generations, because deleting the oldest of one dict took 20 us a key.
_RECENT_KEYS: Final = 25_000

# How often the clocks and the devices' tallies are saved; every statement of a commit is latency.
_SAVE_EVERY_MS: Final = 1_000

# Rows that one device's mistakes (or malice) of one kind may cost; the disk is finite.
PEER_EVENTS_A_SECOND: Final = 20

_COUNTED: Final[dict[TaskState, str]] = {
    TaskState.PENDING: "pending",
    TaskState.ASSIGNED: "running",
    TaskState.RUNNING: "running",
    TaskState.COMPLETED: "completed",
    TaskState.FAILED: "failed",
    TaskState.CANCELLED: "cancelled",
    TaskState.DEAD: "dead",
}


class Past(Struct):
    """What the database knew when this master started. in_flight: assigned and running tasks.

    rate_keys: the keys of those; others come with what names them.
    """

    epoch: int
    clock_ms: int = 0
    next_task_id: int = 1
    next_job_id: int = 1
    in_flight: list[TaskRow] = field(default_factory=list)
    jobs: list[JobRow] = field(default_factory=list)
    devices: list[DeviceRow] = field(default_factory=list)
    rate_keys: list[RateKeyRow] = field(default_factory=list)
    keys: list[KeyRow] = field(default_factory=list)
    tokens: list[TokenRow] = field(default_factory=list)
    # All tasks by state since the database began, pruned ones too; names as in JobRow.
    totals: dict[str, int] = field(default_factory=dict)


class Listing(Struct):
    """How far the database has been asked for its lanes. has_skipped: some found no room."""

    after: LaneKey | None = None
    is_asked: bool = False
    asked_ms: int = 0
    has_skipped: bool = False


class Brake(Struct):
    """Does the fleet look like a mass loss? As found in that turn."""

    turn: int = 0
    is_mass_loss: bool = False


class Watcher(Struct, frozen=True):
    """Who wants to hear of an end."""

    peer: Peer
    request_id: bytes


class MasterState:
    """Everything the master knows now. Rows in here are live; rows in Changes are copies."""

    def __init__(self, settings: Settings, past: Past, rng: Random) -> None:
        self.settings = settings
        self.rng = rng
        self.epoch = past.epoch
        self.now_ms = past.clock_ms
        self.started_ms = past.clock_ms
        self.wall_offset_ms = 0
        self.tasks: dict[TaskId, TaskRow] = {}
        self.flights: dict[TaskId, Flight] = {}
        self.queue = ReadyQueue(
            settings.window_tasks, settings.window_bytes, settings.lane_tasks, settings.lanes
        )
        self.listing = Listing()
        self.delays = Delays(settings.delayed_tasks, settings.delayed_bytes)
        self.fleet = Fleet(settings.strategy, rng)
        self.rates: dict[str, RateKey] = {}
        # Names of rate keys that nothing may depend on any more.
        self._resting: dict[str, None] = {}
        self.timers = Timers()
        self.jobs: dict[JobId, JobRow] = {}
        self.keys: dict[bytes, KeyRow] = {}
        self.tokens: dict[str, TokenRow] = {}
        self.totals = dict.fromkeys(_COUNTED.values(), 0) | past.totals
        self.next_task_id = past.next_task_id
        self.next_job_id = past.next_job_id
        self.sessions = 0
        self._types = frozenset(settings.task_types)
        self.turn = 0
        self.committed_turn = 0
        self.expiry_held_until_ms = 0
        self.brake = Brake()
        # Devices all of whose keys are revoked.
        self.revoked: set[DeviceId] = set()
        self.shed_ms = past.clock_ms
        self.counters: dict[str, int] = {}
        self.task_watchers: dict[TaskId, dict[Watcher, None]] = {}
        self.job_watchers: dict[JobId, dict[Watcher, None]] = {}
        # What each client watches, so that its leaving costs no more than that.
        self.watching: dict[Peer, dict[TaskId, None]] = {}
        self.ends: dict[Watcher, list[TaskEnd]] = {}
        # Tasks that left memory, with the turn in which they did: a read may show an older row.
        self.departed: dict[TaskId, tuple[int, TaskRow]] = {}
        self.submissions: dict[bytes, Outbound] = {}
        # Unique keys by (job, hash): those not yet on disk, and two generations of the others.
        self._fresh_keys: dict[tuple[JobId, bytes], TaskId] = {}
        self._recent_keys: dict[tuple[JobId, bytes], TaskId] = {}
        self._older_keys: dict[tuple[JobId, bytes], TaskId] = {}
        self._turn_keys: list[tuple[JobId, bytes]] = []
        self._departures: deque[tuple[int, TaskId]] = deque()
        # Jobs without open tasks, and the turn since which they are: forgotten once it is on disk.
        self._idle_jobs: dict[JobId, int] = {}
        self._settling: deque[tuple[int, Callable[[], object]]] = deque()
        self._changes = Changes()
        self._actions: list[Action] = []
        self._new: set[TaskId] = set()
        self._dirty: dict[TaskId, TaskRow] = {}
        self._dirty_jobs: dict[JobId, JobRow] = {}
        self._dirty_devices: dict[DeviceId, Device] = {}
        self._tallied: dict[DeviceId, Device] = {}
        self._clock_saved_ms = past.clock_ms - _SAVE_EVERY_MS
        # (second, rows written in it) by kind and source: as many as there are keys and tokens.
        self._peer_events: dict[tuple[str, str], tuple[int, int]] = {}
        self._is_clock_wrong = False

    # --- time ---------------------------------------------------------------------------------

    @property
    def wall_ms(self) -> int:
        """Now, for people and rows."""
        return self.now_ms + self.wall_offset_ms

    # --- what the turn does -------------------------------------------------------------------

    @property
    def changes(self) -> Changes:
        return self._changes

    def act(self, action: Action) -> None:
        """Do this once the turn is on disk."""
        self._actions.append(action)

    def send(self, peer: Peer, message: Outbound) -> None:
        self._actions.append(Send(peer, message))

    def log(self, level: str, text: str) -> None:
        self._actions.append(Log(level, text))

    def count(self, name: str, amount: int = 1) -> None:
        self.counters[name] = self.counters.get(name, 0) + amount

    def event(
        self,
        kind: str,
        *,
        task: TaskRow | None = None,
        device_id: str = "",
        job_id: int = 0,
        detail: str = "",
    ) -> None:
        """Something a person should be able to find out later: a row and a counter."""
        self.count(kind)
        self._changes.events.append(
            EventRow(
                at_wall=self.wall_ms,
                kind=kind,
                task_id=task.task_id if task else 0,
                attempt=task.attempt if task else 0,
                job_id=task.job_id if task else job_id,
                device_id=device_id or (task.device_id if task else ""),
                detail=detail[:1000],
            )
        )

    def event_of_peer(
        self,
        kind: str,
        *,
        device_id: str,
        by: str = "",
        task: TaskRow | None = None,
        detail: str = "",
    ) -> bool:
        """Like event, for what a peer can cause as often as it likes: all are counted, and so
        many a second get a row; the last of them says that there may be more.

        by: who caused it, as its key says, when the device it is about is only what it claims.
        Returns whether it got a row; what did not is not worth a log line either.
        """
        source = (kind, by or device_id)
        second = self.now_ms // 1000
        at, rows = self._peer_events.get(source, (second, 0))
        rows = rows + 1 if at == second else 1
        self._peer_events[source] = (second, rows)
        if rows > PEER_EVENTS_A_SECOND:
            self.count(kind)
            return False
        if rows == PEER_EVENTS_A_SECOND:
            detail = f"{detail} (further ones of this second are only counted)"
        self.event(kind, task=task, device_id=device_id, detail=detail)
        return True

    def end_turn(self) -> Turn:
        """Copy what changed out, and start the next turn."""
        self._forget_rates()
        changes = self._changes
        for task_id, task in self._dirty.items():
            rows = changes.new_tasks if task_id in self._new else changes.tasks
            rows[task_id] = replace(task)
        for job_id, job in self._dirty_jobs.items():
            changes.jobs[job_id] = replace(job)
        for device_id, device in self._dirty_devices.items():
            changes.devices[device_id] = replace(device.row)
        if self.now_ms - self._clock_saved_ms >= _SAVE_EVERY_MS:
            for device_id, device in self._tallied.items():
                changes.devices[device_id] = replace(device.row)
            self._tallied.clear()
        writes = self._is_clock_wrong or changes != _NOTHING
        if writes and (
            self._is_clock_wrong or self.now_ms - self._clock_saved_ms >= _SAVE_EVERY_MS
        ):
            # The pair tells a restart how long it was away; a second old, it tells the same.
            self._is_clock_wrong = False
            self._clock_saved_ms = self.now_ms
            changes.clock_ms = self.now_ms
            changes.wall_ms = self.wall_ms
        if self._turn_keys:
            self._age_keys()
        # Most turns change nothing, and what is empty serves for the next one.
        turn = Turn(self.turn, changes if writes else _NOTHING, self._actions, writes)
        if writes:
            self._changes = Changes()
        self._actions = []
        self._new.clear()
        self._dirty.clear()
        self._dirty_jobs.clear()
        self._dirty_devices.clear()
        return turn

    def committed(self, turn: int) -> None:
        """Forget what only stood in for rows that are on disk now."""
        self.committed_turn = turn
        departures, departed = self._departures, self.departed
        while departures and departures[0][0] <= turn:
            left_turn, task_id = departures.popleft()
            left = departed.get(task_id)
            if left is not None and left[0] == left_turn:
                del departed[task_id]
        settling = self._settling
        while settling and settling[0][0] <= turn:
            settling.popleft()[1]()

    def until_committed(self, forget: Callable[[], object]) -> None:
        """Something in memory stands in for a row of this turn; forget it once that is on disk."""
        self._settling.append((self.turn, forget))

    # --- tasks --------------------------------------------------------------------------------

    def save(self, task: TaskRow) -> None:
        self._dirty[task.task_id] = task

    def add(self, task: TaskRow) -> None:
        """A task that did not exist before this turn."""
        self._new.add(task.task_id)
        self._dirty[task.task_id] = task
        self._tally(task, None)

    def move(self, task: TaskRow, cause: TaskCause) -> None:
        """Advance a task, with its job's counts; a terminal one leaves memory."""
        former = task.state
        advance(task, cause)
        self.save(task)
        if _COUNTED[former] != _COUNTED[task.state]:
            self._tally(task, former)
        if task.state.is_terminal:
            self._retire(task)

    def row_of(self, task_id: TaskId) -> TaskRow | None:
        """The task as it is now, if memory knows better than the database."""
        task = self.tasks.get(task_id)
        if task is None:
            left = self.departed.get(task_id)
            return None if left is None else left[1]
        return task

    def leave(self, task: TaskRow) -> None:
        """The database has task from now on, or will once this turn is on disk."""
        task_id = task.task_id
        self.tasks.pop(task_id, None)
        self.departed[task_id] = (self.turn, task)
        self._departures.append((self.turn, task_id))

    def wait(self, task: TaskRow, *, first: bool = False) -> None:
        """Put a pending task where it waits: among the delayed, or in its lane.

        One that was on disk alone stays there when the window is full.
        """
        due_ms = self.due_ms(task)
        if due_ms > self.now_ms:
            self.delay(task, due_ms)
        elif task.task_id in self.tasks:
            self.ready(task, first=first)
        else:
            self._readmit(task)

    def delay(self, task: TaskRow, due_ms: int) -> None:
        """Keep a pending task until due_ms: the soonest in memory, the others in the database."""
        self.tasks[task.task_id] = task
        if not self.delays.add(task, due_ms):
            self.leave(task)
        for evicted in self.delays.take_evicted():
            if evicted.task_id in self.tasks:
                self.leave(evicted)

    def ready(self, task: TaskRow, *, first: bool = False) -> None:
        """A pending task waits for a device and nothing else from now on."""
        self._note_due(task)
        lane = self.lane_of(task)
        if lane is None:
            # Thousands of lanes are ahead of it; it is found when lanes are listed again.
            self.leave(task)
            return
        self.tasks[task.task_id] = task
        self.queue.push(task, lane, first=first)

    def due_ms(self, task: TaskRow) -> int:
        """Cluster time before which a pending task must not run."""
        due = task.retry_at_ms
        if task.not_before_wall:
            due = max(due, task.not_before_wall - self.wall_offset_ms)
        return due

    def _note_due(self, task: TaskRow) -> None:
        """The database keeps what waits for a moment apart from what is ready."""
        if task.retry_at_ms or task.not_before_wall:
            task.retry_at_ms = task.not_before_wall = 0
            self.save(task)

    def _readmit(self, task: TaskRow) -> None:
        self._note_due(task)
        lane = self.lane_of(task)
        if lane is not None and self.queue.readmit(task, lane):
            self.tasks[task.task_id] = task
        else:
            self.leave(task)

    def lane_of(self, task: TaskRow) -> Lane | None:
        return self.lane(LaneKey(task.task_type, task.labels, task.rate_key, task.priority))

    def lane(self, key: LaneKey) -> Lane | None:
        """The lane of this key, if there is room for it; another may go to the database for it."""
        lane = self.queue.lanes.get(key)
        if lane is not None:
            return lane
        rate = self.rate(key.rate_key)
        is_stranded = self.queue.has_lanes_max and self.is_stranded(key)
        lane = self.queue.lane(key, rate, self.now_ms, is_stranded=is_stranded)
        for task in self.queue.take_given_up():
            self.leave(task)
        if lane is not None and rate is not None and rate.opens_at_ms() > self.now_ms:
            self.timers.set_no_later(f"key {rate.name}", rate.opens_at_ms())
        return lane

    def is_stranded(self, key: LaneKey) -> bool:
        """Does nobody online run the tasks of this lane?"""
        return not self.fleet.runs(Shape(key.task_type, key.labels))

    # --- rate keys ----------------------------------------------------------------------------

    def rate(self, name: str) -> RateKey | None:
        """The limits of this key; None for the empty one, which has none.

        Whatever names a key brings its row with it. One that is missing is our mistake: to take it
        for one without limits would be hitting its site too fast.
        """
        return self.rates[name] if name else None

    def recall(self, rows: Iterable[RateKeyRow]) -> None:
        """Rate keys that were read. They stay while something depends on them; memory knows
        better, as a key is not forgotten before its row is on disk, nor in the middle of a turn."""
        unheard_ms = max(self.settings.start_within_ms, self.settings.device_timeout_ms)
        latest_ms = self.now_ms + DELAY_MS_MAX + unheard_ms
        for row in rows:
            if row.rate_key not in self.rates:
                rate = RateKey.of_row(row, self.epoch, self.started_ms, latest_ms)
                self.rates[rate.name] = rate
                self.rest(rate.name)

    def rest(self, name: str) -> None:
        """This turn may have ended the last thing that depends on this key."""
        self._resting[name] = None

    def needs_rate(self, rate: RateKey) -> bool:
        """Does any task in memory depend on it?"""
        return rate.is_used or self.delays.has_key(rate.name)

    def save_rate(self, rate: RateKey) -> None:
        """Write it with this turn; until that is on disk it stays in memory."""
        self._changes.rate_keys[rate.name] = rate.row(self.epoch, self.wall_ms)
        rate.recalled_ms = rate.next_at_ms
        if rate.saving_turn != self.turn:
            rate.saving_turn = self.turn
            self.until_committed(partial(self._rate_saved, rate, self.turn))

    def _rate_saved(self, rate: RateKey, turn: int) -> None:
        if rate.saving_turn == turn:
            rate.saving_turn = 0
            self.rest(rate.name)

    def _forget_rates(self) -> None:
        """Only when a turn ends: what its messages did not look up, they found in memory."""
        for name in (*self.queue.take_released(), *self.delays.take_released()):
            self.rest(name)
        if not self._resting:
            return
        resting, self._resting = self._resting, {}
        for name in resting:
            rate = self.rates.get(name)
            if rate is None or rate.saving_turn or self.needs_rate(rate):
                continue
            if rate.next_at_ms > max(self.now_ms, rate.recalled_ms):
                # It is forgotten once the disk knows how long it is shut.
                self.save_rate(rate)
            else:
                del self.rates[name]
                self.timers.cancel(f"key {name}")

    # --- attempts -----------------------------------------------------------------------------

    def land(self, flight: Flight) -> None:
        """An attempt is in nobody's hands any more."""
        task = flight.task
        del self.flights[task.task_id]
        device = self.fleet.devices.get(flight.device_id)
        if device is not None and task.task_id in device.flights:
            give_back(device, flight)
            self.fleet.refresh(device)

    def record_open(self, task: TaskRow) -> None:
        """The row of the task's current attempt, which is in a device's hands (again)."""
        self._changes.assignments[task.task_id, task.attempt] = AssignmentRow(
            task_id=task.task_id,
            attempt=task.attempt,
            device_id=task.device_id,
            epoch=self.epoch,
            assigned_wall=task.assigned_wall,
            started_wall=task.started_wall,
        )

    def record_end(self, task: TaskRow, outcome: str, run_us: int = 0, error: str = "") -> None:
        """Close the row of the task's current attempt."""
        self._changes.assignments[task.task_id, task.attempt] = AssignmentRow(
            task_id=task.task_id,
            attempt=task.attempt,
            device_id=task.device_id,
            epoch=self.epoch,
            assigned_wall=task.assigned_wall,
            started_wall=task.started_wall,
            ended_wall=self.wall_ms,
            outcome=outcome,
            run_us=run_us,
            error=error,
        )

    # --- jobs, devices, keys --------------------------------------------------------------------

    def job(self, job_id: JobId) -> JobRow:
        """The job of a task in memory; every job with open tasks is in memory."""
        if job_id == NO_JOB and NO_JOB not in self.jobs:
            self.jobs[NO_JOB] = JobRow(NO_JOB, "", JobState.ACTIVE, self.wall_ms)
        return self.jobs[job_id]

    def knows_type(self, task_type: str) -> bool:
        """Is there code for this type, here or on a device that is online?"""
        return task_type in self._types or self.fleet.knows_type(task_type)

    def known_job(self, job_id: JobId, facts: Facts) -> JobRow | None:
        """The job, brought into memory if only the database had it; None: there is none."""
        if job_id == NO_JOB:
            return self.job(NO_JOB)
        job = self.jobs.get(job_id)
        if job is None and job_id in facts.jobs:
            job = self.jobs[job_id] = facts.jobs[job_id]
            # It had nothing open, or it would be in memory: it stays only if that changes.
            self.forget_when_idle(job)
        return job

    def save_job(self, job: JobRow) -> None:
        self._dirty_jobs[job.job_id] = job

    def wall_stepped(self) -> None:
        """The saved pair of clocks is wrong from now on: save it with this turn."""
        self._is_clock_wrong = True

    def tally(self, device: Device) -> None:
        """A device's counts of ends changed: told to people at once, saved once in a while."""
        self._tallied[device.device_id] = device

    def save_device(self, device: Device) -> None:
        self._dirty_devices[device.device_id] = device

    def forget_when_idle(self, job: JobRow) -> None:
        """A job with nothing open leaves memory once all that was decided about it is on disk."""
        self._idle_jobs[job.job_id] = self.turn
        self.until_committed(partial(self._forget_job, job, self.turn))

    def is_idle_job(self, job_id: JobId) -> bool:
        """Is it in memory only until what was decided about it is on disk?"""
        return job_id in self._idle_jobs

    def take_key(self, key: tuple[JobId, bytes], task_id: TaskId) -> None:
        """A unique key is taken, and remembered until that is on disk, and for a while after."""
        self._fresh_keys[key] = self._recent_keys[key] = task_id
        self._turn_keys.append(key)

    def holder_of(self, key: tuple[JobId, bytes]) -> TaskId | None:
        """The task that has this unique key, if it is remembered."""
        return self._recent_keys.get(key) or self._fresh_keys.get(key) or self._older_keys.get(key)

    def _age_keys(self) -> None:
        """Only between turns: what a message of this turn did not look up, it must find here."""
        self.until_committed(partial(self._forget_fresh, self._turn_keys))
        self._turn_keys = []
        if len(self._recent_keys) > _RECENT_KEYS:
            self._older_keys, self._recent_keys = self._recent_keys, {}

    def _forget_fresh(self, keys: list[tuple[JobId, bytes]]) -> None:
        for key in keys:
            self._fresh_keys.pop(key, None)

    def _tally(self, task: TaskRow, former: TaskState | None) -> None:
        job = self.job(task.job_id)
        if former is not None:
            name = _COUNTED[former]
            setattr(job, name, getattr(job, name) - 1)
            self.totals[name] -= 1
        name = _COUNTED[task.state]
        setattr(job, name, getattr(job, name) + 1)
        self.totals[name] += 1
        self._dirty_jobs[job.job_id] = job
        if job.job_id == NO_JOB:
            return
        if not job.pending and not job.running:
            self._finish(job)
        elif job.state is JobState.FINISHED:
            job.state, job.finished_wall = JobState.ACTIVE, 0

    def _finish(self, job: JobRow) -> None:
        if job.state is JobState.ACTIVE:
            job.state = JobState.FINISHED
        job.finished_wall = self.wall_ms
        self.forget_when_idle(job)

    def _forget_job(self, job: JobRow, turn: int) -> None:
        if self._idle_jobs.get(job.job_id) != turn:
            return
        del self._idle_jobs[job.job_id]
        if not job.pending and not job.running:
            self.jobs.pop(job.job_id, None)
            self.job_watchers.pop(job.job_id, None)

    def _retire(self, task: TaskRow) -> None:
        task.finished_wall = self.wall_ms
        self.leave(task)
        self.count(f"tasks_{task.state}")
        watchers = self.task_watchers.pop(task.task_id, None)
        for watcher in watchers or ():
            self.watching[watcher.peer].pop(task.task_id, None)
        of_job = self.job_watchers.get(task.job_id) if self.job_watchers else None
        if watchers or of_job:
            end = TaskEnd(task.task_id, task.state, task.result, task.error, task.attempt)
            for watcher in (*(watchers or ()), *(of_job or ())):
                self.ends.setdefault(watcher, []).append(end)


_NOTHING: Final = Changes()
