"""The judge: sees every commit, start, answer and request at an origin, and knows the promises.

It is told of things by the nodes, keeps books of its own, and shares no code with the core it
judges. While a run goes on it checks what only somebody inside can see, and when: what it checks at
a commit costs as much as the commit. What can be seen from outside it writes down, for the checker
of histories that judges real clusters, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final, NoReturn

import msgpack  # type: ignore[import-untyped]  # ships no types
from msgspec import Struct

from tests.simulation.options import Options
from tests.simulation.waiting import Waiting
from tests.simulation.workload import (
    RETRIES_DEFAULT,
    TIMEOUT_MS_DEFAULT,
    is_limited,
    links_of,
    url_of,
)
from tests.simulation.world import WALL_AT_ZERO, Violation, World
from tests.support.core_audit import audit_live, audit_recovery, audit_store, final_of
from tests.support.history import (
    Answer,
    Arrival,
    Cancel,
    End,
    History,
    Retry,
    Start,
    Submission,
    Told,
    problems,
)
from tests.support.naive_store import NaiveStore
from zmqcluster.core.effects import Action, Changes, Send, Turn
from zmqcluster.core.events import Peer
from zmqcluster.core.invariants import check
from zmqcluster.core.master import MasterCore
from zmqcluster.core.rows import AssignmentRow, JobRow, KeyRow, TaskRow
from zmqcluster.core.state import MasterState
from zmqcluster.errors import InvariantError
from zmqcluster.messages import (
    CancelTasks,
    ClientMessage,
    Heartbeat,
    HeartbeatAck,
    Held,
    Hello,
    Inbound,
    ResultAck,
    RetryTasks,
    Submit,
    Submitted,
    TaskEnd,
    TaskOrder,
    TaskResult,
    TaskSpec,
    Welcome,
)
from zmqcluster.model import DeviceId, JobId, JobState, Outcome, TaskId, TaskState

Key = tuple[int, int]

IN_FLIGHT: Final = (TaskState.ASSIGNED, TaskState.RUNNING)
TERMINAL: Final = (TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED, TaskState.DEAD)
_FAILING: Final = ("failed", "retry", "timed_out", "rejected")
_LAST_WORDS: Final = tuple(f"task_{one}" for one in Outcome)
_GIVEN_UP: Final = ("device_lost", "dispatch_lost")
DEATHS_MAX: Final = 3
# The phase of an inventory line whose run has ended.
DONE: Final = 2
# Nothing that went wrong is tried again sooner.
BACKOFF_MS: Final = 500
_BACKED_OFF: Final = (Outcome.FAILED, Outcome.RETRY, Outcome.TIMED_OUT, Outcome.DIED)

# Audits that cost as much as everything there is.
AUDIT_COMMITS: Final = 500
CHECK_TURNS: Final = 200
# A look at the lanes.
URGENT_TURNS: Final = 8


# A loss is on disk this long after a lease is over: two slow commits, the next look.
NOTICED_MS: Final = 7_000
# From so many devices on, a mass loss is doubted for a while.
BRAKE_DEVICES: Final = 4
# A request is repeated for 30 s, and a frame under way for 30 s more.
FORGOTTEN_MS: Final = 70_000
# After the faults end, the last downtime and the last stalled frame are over within this time.
ANSWERED_MS: Final = 25_000


class Leases(Struct):
    """Who was heard when. heard, closed: by connection. sessions: the connection of each device.

    holders, opened_ms: attempts that are out, on disk. forgiven_ms: the master was deaf until then.
    """

    heard: dict[Peer, int] = {}
    closed: set[Peer] = set()
    sessions: dict[DeviceId, Peer] = {}
    holders: dict[Key, DeviceId] = {}
    opened_ms: dict[Key, int] = {}
    # When a session ended, as the master decided it: what it held is taken back from then on.
    closed_ms: dict[DeviceId, int] = {}
    forgiven_ms: int = 0
    braked_ms: int = -(10**9)

    def close(self, device_id: DeviceId, now_ms: int) -> None:
        self.sessions.pop(device_id, None)
        self.closed_ms[device_id] = now_ms

    def heard_ms(self, device_id: DeviceId) -> int:
        peer = self.sessions.get(device_id)
        heard_ms = self.closed_ms.get(device_id, 0) if peer is None else self.heard.get(peer, 0)
        return max(self.forgiven_ms, heard_ms)

    def is_mass_loss(self, now_ms: int, options: Options) -> bool:
        """Are more than half of at least BRAKE_DEVICES silent?"""
        margin_ms = options.timeout_ms - options.beat_ms
        silent = sum(now_ms - self.heard_ms(one) >= margin_ms for one in self.sessions)
        return len(self.sessions) >= BRAKE_DEVICES and 2 * silent > len(self.sessions)


class Closures(Struct):
    """Sites that said "not now", and from which turn on the master knew (and kept) it.

    A closure counts once it is on disk, for what was handed out in its turn or later.
    """

    # (turn, rate key, until): decided, being written, on disk.
    learned: list[tuple[int, str, int]] = []
    writing: list[tuple[int, str, int]] = []
    kept: dict[str, list[tuple[int, int]]] = {}
    decided: dict[tuple[int, int], int] = {}
    # How often the wall clock had been set when the master last looked at it, and when it did for
    # the clocks that are decided on, being written, on disk.
    steps_seen: int = 0
    steps_read: int = 0
    steps_writing: int = 0
    wall_steps: int = 0

    def begin(self) -> None:
        self.writing, self.learned = self.learned, []
        self.steps_writing = self.steps_read

    def committed(self) -> None:
        for turn, name, until_ms in self.writing:
            self.kept.setdefault(name, []).append((turn, until_ms))
        self.writing = []
        self.wall_steps = self.steps_writing

    def forget_undone(self, wall_steps: int) -> None:
        """A master starts: it knows what is on disk."""
        self.learned, self.writing = [], []
        if wall_steps != self.wall_steps:
            # How long it was away is read off the wall clock, which was set meanwhile.
            self.kept.clear()
        self.steps_seen = self.steps_read = self.steps_writing = self.wall_steps = wall_steps

    def closed_until_ms(self, name: str, key: tuple[int, int]) -> int:
        """Until when the master knew of it when it handed this attempt out."""
        turn = self.decided.get(key, 0)
        closed = [until_ms for at, until_ms in self.kept.get(name, ()) if at <= turn]
        return max(closed, default=0)


class Origin(Struct):
    """What a rate key's site saw. open: attempts whose request may be there."""

    last_ms: int = -(10**9)
    last_by: str = ""
    open: dict[Key, str] = {}


class Seen(Struct):
    """What a history is made of. Requests by their ids; answers when there were any."""

    submits: dict[bytes, Submit] = {}
    receipts: dict[bytes, Submitted] = {}
    cancels: dict[bytes, tuple[CancelTasks, int]] = {}
    cancelled: dict[bytes, Cancel] = {}
    retries: dict[bytes, tuple[RetryTasks, int]] = {}
    # What was answered when, and which of them it changed.
    retried: dict[bytes, tuple[int, tuple[int, ...]]] = {}
    refused: set[bytes] = set()
    starts: list[Start] = []
    told: list[Told] = []
    arrivals: list[Arrival] = []

    def history(self, ends: Iterable[TaskResult]) -> History:
        return History(
            submissions=[self._submission(one) for one in self.submits.values()],
            cancels=[self._cancel(*one) for one in self.cancels.values()],
            retries=[self._retry(*one) for one in self.retries.values()],
            starts=self.starts,
            ends=[
                End(one.task_id, one.attempt, one.result)
                for one in ends
                if one.outcome is Outcome.COMPLETED
            ],
            told=self.told,
            arrivals=self.arrivals,
        )

    def _submission(self, asked: Submit) -> Submission:
        keys = tuple(one.unique_key for one in asked.tasks)
        marks = tuple(one.data for one in asked.tasks)
        answer = self.receipts.get(asked.request_id)
        if answer is None:
            return Submission(self._unanswered(asked.request_id), keys, marks=marks)
        return Submission(Answer.OK, keys, answer.task_ids, answer.job_id, marks)

    def _cancel(self, asked: CancelTasks, asked_ms: int) -> Cancel:
        answer = self._unanswered(asked.request_id)
        former = Cancel(answer, asked.task_ids, asked.job_id, asked_ms)
        return self.cancelled.get(asked.request_id, former)

    def _retry(self, asked: RetryTasks, asked_ms: int) -> Retry:
        if asked.request_id not in self.retried:
            return Retry(self._unanswered(asked.request_id), asked.task_ids, asked_ms)
        answered_ms, changed = self.retried[asked.request_id]
        return Retry(Answer.OK, changed, asked_ms, answered_ms)

    def _unanswered(self, request_id: bytes) -> Answer:
        return Answer.FAIL if request_id in self.refused else Answer.UNKNOWN


class Oracle:
    """keeps_tape: nodes record what their cores were given, to make a failing run small."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.keeps_tape = False
        # With what was pruned; and which tasks were.
        self.disk: NaiveStore
        self.pruned: set[TaskId]
        self.seen = Seen()
        # Attempt number at the moment a cancel was acknowledged.
        self.cancelled: dict[TaskId, int] = {}
        self.cancelled_jobs: set[JobId] = set()
        # How often it was asked for, and how often it happened.
        self._revivals_asked: Counter[TaskId] = Counter()
        self._revivals: Counter[TaskId] = Counter()
        self._cancels_asked: Counter[TaskId] = Counter()
        self._cancels: Counter[TaskId] = Counter()
        self._retried_ms: dict[TaskId, int] = {}
        self._jobs_cancelled: set[JobId] = set()
        self._retries_open: Counter[TaskId] = Counter()
        self.open_tasks = 0
        self.commits = 0
        self._turns = 0
        self._epoch = 0
        self._ordered: dict[Key, str] = {}
        self._ends: dict[Key, TaskResult] = {}
        self._first_attempt: dict[TaskId, int] = {}
        self._origins: dict[str, Origin] = {}
        self._job_names: dict[str, JobId] = {}
        self.revoked: set[DeviceId] = set()
        self._drained: set[DeviceId] = set()
        self._resumed_ms: dict[DeviceId, int] = {}
        self._leases = Leases()
        self._closures = Closures()
        # Before when a task must not run, as its client said (wall clock), by its data; and before
        # when not again, as its last run said.
        self._not_before: dict[bytes, int] = {}
        self._not_again: dict[Key, int] = {}
        # Attempts that were given up and came back, and the turn in which they did.
        self._adopted: dict[Key, int] = {}
        # Of this turn: who greeted, and what they listed of what they hold.
        self._greeted: set[DeviceId] = set()
        self._listed: set[Key] = set()
        # By connection and number of the beat (0: a Hello): what is listed there and has to end.
        self._unwanted: dict[tuple[Peer, int], set[Key]] = {}
        # Of this turn: did somebody tell of ends, was the master away before it. Of this master:
        # the ends it said not to count.
        self._has_ends = self._is_stalled = False
        self._fenced = self._boot_step_ms = 0
        self._waiting = Waiting()
        # How tasks ended, as was on disk once: state, result and error (None: of no interest).
        self._ended: dict[Key, list[tuple[str, bytes | None, str]]] = {}

    def fail(self, text: str) -> NoReturn:
        raise Violation(f"at {self.world.now_ms} ms: {text}")

    # --- the master -----------------------------------------------------------------------------

    def master_started(self, epoch: int) -> None:
        if epoch <= self._epoch:
            self.fail(f"epoch {epoch} begins after epoch {self._epoch}")
        self._epoch = epoch
        self._leases.forgiven_ms = self.world.now_ms
        self._leases.sessions.clear()
        self._waiting = Waiting()
        self._fenced = 0
        self._is_stalled = self._has_ends = False
        self._boot_step_ms = self.world.wall_step_ms
        self._closures.forget_undone(self.world.wall_steps)

    def master_heard(self, peer: Peer, message: Inbound) -> None:
        """This came over this connection, and is decided upon in this turn."""
        self._leases.heard[peer] = self.world.now_ms
        if isinstance(message, Heartbeat | Hello):
            key = (peer, message.seq if isinstance(message, Heartbeat) else 0)
            unwanted = {
                (held.task_id, held.attempt)
                for held in message.inventory
                if held.phase != DONE and self._is_unwanted(held)
            }
            # Said twice in a turn, it is answered twice.
            self._unwanted[key] = unwanted & self._unwanted.get(key, unwanted)

    def master_lost(self, peer: Peer) -> None:
        """The master was told that this connection is gone."""
        self._leases.closed.add(peer)

    def master_stalled(self) -> None:
        """The master was stopped for a while; every lease begins anew, and it says so."""
        self._is_stalled = True
        self._leases.forgiven_ms = self.world.now_ms

    def clock_read(self) -> None:
        """The master is told the wall time."""
        self._closures.steps_seen = self.world.wall_steps

    def decided(self, changes: Changes, actions: list[Action]) -> None:
        """What a turn came to, before it is on disk."""
        now_ms, welcomed = self.world.now_ms, _welcomed(actions)
        self._check_pruning(changes)
        if changes.clock_ms:
            self._closures.steps_read = self._closures.steps_seen
        for key, row in changes.assignments.items():
            if not row.outcome:
                self._closures.decided.setdefault(key, self._turns)
            elif self.world.options.reorder:
                # A beat from before a Hello may come after it, and lists less. No connection of
                # ours does that (CURVE numbers its frames), and all it costs is another attempt.
                continue
            elif key in self._listed and row.outcome in ("dispatch_lost", "device_lost"):
                self._check_listed(changes, row)
        for event in changes.events:
            if event.kind == "rate_key_closed":
                name, _, told = event.detail.partition(" for ")
                until_ms = now_ms + int(told.split()[0])
                self._closures.learned.append((self._turns, name, until_ms))
            elif event.kind == "attempt_adopted":
                self._adopted[event.task_id, event.attempt] = self._turns
            elif event.kind == "device_online":
                self._open_sessions(welcomed, DeviceId(event.device_id))
            elif event.kind == "loop_stalled":
                if not self._is_stalled:
                    self.fail("a stall is told of, and the master was never away")
                self._is_stalled = False
            elif event.kind == "mass_loss_brake":
                self._leases.braked_ms = now_ms
            elif event.kind == "device_lost":
                self._check_loss(DeviceId(event.device_id), event.detail)
            elif event.kind == "device_offline":
                self._leases.close(DeviceId(event.device_id), now_ms)
        self._open_sessions(welcomed)

    def _check_pruning(self, changes: Changes) -> None:
        """By the clock on the wall when this master began: whoever sets it later prunes nothing."""
        if changes.prune_before_wall:
            steady_wall = WALL_AT_ZERO + self.world.now_ms + self._boot_step_ms
            early_ms = changes.prune_before_wall - steady_wall + self.world.options.retention_ms
            if early_ms > 0:
                self.fail(f"what ended is pruned {early_ms} ms before its time")

    def _check_listed(self, changes: Changes, row: AssignmentRow) -> None:
        """A device said in its Hello of this turn that it has this attempt, which ends as lost."""
        # Lost by an older word of this turn, and wanted by nobody any more: that is fine.
        task = changes.tasks[row.task_id]
        is_wanted = task.state is not TaskState.CANCELLED
        is_wanted = is_wanted and task.job_id not in self._jobs_cancelled
        is_revoked = any(
            event.kind == "key_revoked" and event.device_id == row.device_id
            for event in changes.events
        )
        if is_wanted and not is_revoked:
            key = (row.task_id, row.attempt)
            self.fail(f"attempt {key} is listed in a Hello and is taken for {row.outcome}")

    def _is_unwanted(self, held: Held) -> bool:
        row = self.disk.tasks.get(TaskId(held.task_id))
        return row is not None and (
            row.cancel_requested or row.state in TERMINAL or row.attempt > held.attempt
        )

    def answered(self, actions: list[Action]) -> None:
        """Whoever lists what nobody wants any more is told so, each time."""
        for one in actions if any(self._unwanted.values()) else ():
            match one:
                case Send(peer, Welcome(abort=refs)):
                    seq = 0
                # Without a number it answers no beat.
                case Send(peer, HeartbeatAck(seq=seq, abort=refs)) if seq:
                    pass
                case _:
                    continue
            told = {(ref.task_id, ref.attempt) for ref in refs}
            untold = self._unwanted.get((peer, seq), set()) - told
            if untold:
                self.fail(f"{peer!r} is not told to give up {sorted(untold)}")

    def turn_over(self, turn: Turn, state: MasterState) -> None:
        """The next turn has other messages."""
        self._unwanted.clear()
        waiting = self._waiting
        if waiting.urgent:
            problem = waiting.passed_over(state, turn.changes)
            if problem:
                self.fail(problem)
            waiting.urgent.clear()
        if self._turns % URGENT_TURNS == 0:
            waiting.look(state)
        if self._has_ends:
            self._has_ends = False
            self._check_fences(turn, state.counters.get("result_fenced", 0))
        if self._greeted:
            self._greeted.clear()
            self._listed.clear()
        if self._is_stalled:
            self.fail("the master was away, and no event says so")

    def ends_heard(self) -> None:
        """A device told of ends, and is answered in this turn."""
        self._has_ends = True

    def _check_fences(self, turn: Turn, fenced: int) -> None:
        """Ends that are settled and count for nothing are told of, however many they are."""
        settled, counted = 0, set()
        for one in turn.actions:
            if not isinstance(one, Send) or not isinstance(one.message, ResultAck):
                continue
            settled += len(one.message.refs)
            for ref in one.message.refs:
                row = turn.changes.assignments.get((TaskId(ref.task_id), ref.attempt))
                is_of_it = row is not None and row.device_id == _device_of(one.peer)
                if row is not None and is_of_it and row.outcome not in ("", *_GIVEN_UP):
                    counted.add((ref.task_id, ref.attempt))
        told, self._fenced = fenced - self._fenced, fenced
        if told < settled - len(counted):
            self.fail(
                f"{settled} ends are settled, {len(counted)} of them count, {told} are said not to"
            )

    def greeted(self, device_id: DeviceId, inventory: Iterable[Held]) -> None:
        """A device said what it holds, and is answered in this turn."""
        if device_id in self._greeted:
            # Two processes under one name: only one of them can be believed.
            self._listed.clear()
            return
        self._greeted.add(device_id)
        for held in inventory:
            key = (held.task_id, held.attempt)
            if self._leases.holders.get(key) == device_id:
                self._listed.add(key)

    def _open_sessions(self, welcomed: Iterator[Peer], up_to: DeviceId | None = None) -> None:
        """Whoever was welcomed; not each of them gets an event, when there are too many."""
        for peer in welcomed:
            device_id = _device_of(peer)
            self._open_session(device_id, peer)
            if device_id == up_to:
                return

    def _open_session(self, device_id: DeviceId, peer: Peer) -> None:
        leases = self._leases
        former = leases.sessions.get(device_id)
        if former is not None and former.partition(b"#")[0] != peer.partition(b"#")[0]:
            age_ms = self.world.now_ms - leases.heard.get(former, 0)
            # What came in this very turn may have come after the greeting.
            is_alive = former not in leases.closed and 0 < age_ms < self.world.options.beat_ms
            if is_alive:
                self.fail(f"{peer!r} takes the place of {former!r}, heard {age_ms} ms ago")
        leases.sessions[device_id] = peer

    def commit_begun(self) -> None:
        self._closures.begin()

    def _check_loss(self, device_id: DeviceId, why: str) -> None:
        """Nobody is given up before a lease is over, and half the fleet not at once."""
        options, now_ms, leases = self.world.options, self.world.now_ms, self._leases
        if why.startswith("silent") and device_id in leases.sessions:
            silent_ms = now_ms - leases.heard_ms(device_id)
            if silent_ms < options.timeout_ms:
                self.fail(f"{device_id} was given up after {silent_ms} ms of silence: {why}")
            since_ms = now_ms - leases.braked_ms
            if leases.is_mass_loss(now_ms, options) and since_ms > 8 * options.timeout_ms:
                self.fail(f"more than half of the devices are silent, and {device_id} is given up")
        leases.close(device_id, now_ms)

    def check_leases(self) -> None:
        """What a silent device held is taken back in time."""
        now_ms, options, leases = self.world.now_ms, self.world.options, self._leases
        patience_ms = options.timeout_ms + NOTICED_MS
        if len(leases.sessions) >= BRAKE_DEVICES:
            patience_ms += 8 * options.timeout_ms
        for device_id, peer in leases.sessions.items():
            silent_ms = now_ms - max(leases.heard.get(peer, 0), leases.forgiven_ms)
            if silent_ms > patience_ms:
                self.fail(f"{device_id} is still counted alive, silent for {silent_ms} ms")
        for key, device_id in leases.holders.items():
            since_ms = max(leases.heard_ms(device_id), leases.opened_ms[key])
            if now_ms - since_ms > patience_ms:
                self.fail(
                    f"attempt {key} is still with {device_id}, silent for {now_ms - since_ms} ms"
                )

    def master_turned(self, state: MasterState, *, is_due: bool = False) -> None:
        """is_due: look at all of it now, and not only once in a while."""
        self._turns += 1
        over = self._waiting.too_many(state)
        if over > 0:
            self.fail(f"{over} more tasks are in memory than there is room for")
        if is_due or self._turns % CHECK_TURNS == 0:
            try:
                check(state)
            except InvariantError as error:
                self.fail(str(error))

    def committing(self, disk: NaiveStore, batch: Changes) -> None:
        """These rows are about to be on disk."""
        self.commits += 1
        self._closures.committed()
        for event in batch.events:
            if event.kind == "task_revived":
                # Its end and its new life may be in one batch.
                self._first_attempt[TaskId(event.task_id)] = event.attempt + 1
                former_state = event.detail.removeprefix("was ")
                self._note_end((event.task_id, event.attempt), former_state, None, "")
        for key_row in batch.keys.values():
            self._check_key(disk, batch, key_row)
        for job in batch.jobs.values():
            if job.name and self._job_names.setdefault(job.name, job.job_id) != job.job_id:
                self.fail(f"one request made two jobs of the name {job.name!r}")
            if job.state is JobState.CANCELLED:
                self._check_cancelled_job(disk, batch, job)
        for key, attempt in batch.assignments.items():
            self._check_attempt(disk, batch, key, attempt)
            if attempt.outcome:
                self._leases.holders.pop(key, None)
            else:
                self._leases.holders[key] = attempt.device_id
                self._leases.opened_ms[key] = self.world.now_ms
        for task_id, task in batch.new_tasks.items():
            # Made and changed again while a commit was under way: the later row is the truth.
            task = batch.tasks.get(task_id, task)
            self._check_new(disk, batch, task)
            if task.state in TERMINAL:
                self._note_end((task_id, task.attempt), task.state, task.result, task.error)
            else:
                self.open_tasks += 1
        for task_id, task in batch.tasks.items():
            if task_id in batch.new_tasks:
                continue
            former = disk.tasks.get(task_id)
            if former is None:
                self.fail(f"task {task_id} changes and was never there")
            self.open_tasks += (former.state in TERMINAL) - (task.state in TERMINAL)
            if task.state in TERMINAL:
                self._note_end((task_id, task.attempt), task.state, task.result, task.error)
            self._check_change(disk, batch, former, task)
        for record in batch.records.values():
            holder = _row(disk, batch, record.task_id)
            if holder.state is not TaskState.COMPLETED or holder.attempt != record.attempt:
                self.fail(f"a record of attempt {record.attempt} of {_story(holder)} was kept")
        if self.commits % AUDIT_COMMITS == 0:
            self.audit()

    def _note_end(self, key: Key, state: str, result: bytes | None, error: str) -> None:
        self._ended.setdefault(key, []).append((state, result, error))

    def _check_key(self, disk: NaiveStore, batch: Changes, key: KeyRow) -> None:
        former = disk.keys.get(key.public_key)
        is_news = key.revoked_wall and not (former is not None and former.revoked_wall)
        if is_news and not _tells(batch, "key_revoked", device_id=key.device_id):
            self.fail(f"a key of {key.device_id} is revoked, and no event says so")

    def _check_cancelled_job(self, disk: NaiveStore, batch: Changes, job: JobRow) -> None:
        former = disk.jobs.get(job.job_id)
        is_news = former is None or former.state is not JobState.CANCELLED
        if is_news and not _tells(batch, "job_cancelled", job_id=job.job_id):
            self.fail(f"job {job.job_id} is cancelled, and no event says so")

    def audit(self) -> None:
        """Everything on the disk, together."""
        try:
            audit_store(self.disk)
        except AssertionError as error:
            self.fail(f"audit: {error}")

    def _check_new(self, disk: NaiveStore, batch: Changes, task: TaskRow) -> None:
        if task.task_id in disk.tasks:
            self.fail(f"task id {task.task_id} is given twice")
        if task.parent_id:
            parent = _row(disk, batch, task.parent_id)
            if parent.state is not TaskState.COMPLETED:
                self.fail(f"{_story(task)} is a child of {_story(parent)}")
        if task.state is TaskState.COMPLETED:
            self._check_completed(disk, batch, task)

    def _check_change(
        self, disk: NaiveStore, batch: Changes, former: TaskRow, task: TaskRow
    ) -> None:
        if task.attempt < former.attempt:
            self.fail(f"the attempt number fell: {_story(former)}, then {_story(task)}")
        if former.state in TERMINAL:
            self._check_revival(former, task)
        is_wanted_to_end = task.cancel_requested and not former.cancel_requested
        wanted = ("cancel_requested", "task_cancelled")
        if is_wanted_to_end and not _tells(batch, *wanted, task_id=task.task_id):
            self.fail(f"somebody wants {_story(task)} to end, and no event says so")
        if task.state is TaskState.COMPLETED and former.state is not TaskState.COMPLETED:
            self._check_completed(disk, batch, task)
        elif task.state is TaskState.DEAD and former.state is not TaskState.DEAD:
            deaths = self._deaths(disk, batch, task)
            if deaths < DEATHS_MAX:
                self.fail(f"{_story(task)} after {deaths} deaths")
            self._check_error(disk, batch, task)
        elif task.state is TaskState.CANCELLED and former.state is not TaskState.CANCELLED:
            self._cancels[task.task_id] += 1
            is_asked = self._cancels[task.task_id] <= self._cancels_asked[task.task_id]
            if task.job_id in self._jobs_cancelled:
                return
            if not is_asked:
                self.fail(f"{_story(task)}, and nobody asked for that (again)")
            # However its last attempt ended.
            if not _tells(batch, *_LAST_WORDS, task_id=task.task_id, attempt=task.attempt):
                self.fail(f"{_story(task)}, and no event says so")
        elif task.state is TaskState.FAILED and former.state is not TaskState.FAILED:
            self._check_failed(disk, batch, task)
        elif task.state in IN_FLIGHT:
            self._check_in_flight(disk, batch, task)
        elif task.state is TaskState.PENDING and former.state in IN_FLIGHT:
            self._check_another_try(disk, batch, task)

    def _check_revival(self, former: TaskRow, task: TaskRow) -> None:
        if former.state is TaskState.COMPLETED:
            self.fail(f"{_story(former)} became {_story(task)}")
        if (task.state, task.attempt) != (former.state, former.attempt):
            self._revivals[task.task_id] += 1
            if self._revivals[task.task_id] > self._revivals_asked[task.task_id]:
                self.fail(
                    f"nobody asked for it (again), and {_story(former)} became {_story(task)}"
                )
            self._first_attempt[task.task_id] = former.attempt + 1
            self.cancelled.pop(task.task_id, None)
            self.cancelled_jobs.discard(task.job_id)

    def _check_completed(self, disk: NaiveStore, batch: Changes, task: TaskRow) -> None:
        key = (task.task_id, task.attempt)
        end = self._ends.get(key)
        if end is None or end.outcome is not Outcome.COMPLETED:
            self.fail(f"{_story(task)}, and no run of that attempt completed")
        if task.task_id in self.cancelled or task.job_id in self.cancelled_jobs:
            self.fail(f"{_story(task)} after its cancel was acknowledged")
        for child in end.children:
            child_id = _holder(disk, batch, task.job_id, child.unique_key)
            if child_id is None:
                self.fail(f"{_story(task)} without its child {child.unique_key}")
            row = _row(disk, batch, child_id)
            if row.parent_id == task.task_id:
                self._check_spec(row, child, task.job_id)

    def _check_failed(self, disk: NaiveStore, batch: Changes, task: TaskRow) -> None:
        self._check_error(disk, batch, task)
        if self._outcomes(disk, batch, task, ("rejected",)):
            return
        failures = self._outcomes(disk, batch, task, _FAILING)
        if failures <= task.max_retry_count:
            self.fail(f"{_story(task)} after {failures} failures of {task.max_retry_count} + 1")

    def _check_error(self, disk: NaiveStore, batch: Changes, task: TaskRow) -> None:
        """What went wrong last is what people read first."""
        key = (task.task_id, task.attempt)
        row = batch.assignments.get(key) or disk.assignments.get(key)
        if row is not None and row.error != task.error:
            self.fail(f"{_story(task)} tells {task.error!r}, its last attempt {row.error!r}")

    def _check_another_try(self, disk: NaiveStore, batch: Changes, task: TaskRow) -> None:
        if task.attempt <= min(task.max_retry_count, DEATHS_MAX - 1):
            return
        failures = self._outcomes(disk, batch, task, _FAILING)
        if failures > task.max_retry_count:
            self.fail(f"{_story(task)} after {failures} failures: it is tried once too often")
        deaths = self._deaths(disk, batch, task)
        if deaths >= DEATHS_MAX:
            self.fail(f"{_story(task)} after {deaths} deaths: it is tried once too often")

    def _check_in_flight(self, disk: NaiveStore, batch: Changes, task: TaskRow) -> None:
        key = (task.task_id, task.attempt)
        attempt = batch.assignments.get(key) or disk.assignments.get(key)
        if attempt is None or attempt.outcome:
            self.fail(f"{_story(task)} is out, and its attempt is {attempt}")

    def _check_attempt(
        self, disk: NaiveStore, batch: Changes, key: tuple[TaskId, int], attempt: AssignmentRow
    ) -> None:
        task_id, number = key
        former = disk.assignments.get(key)
        task = _row(disk, batch, task_id)
        end = self._ends.get(key)
        if end is not None and attempt.outcome == end.outcome and attempt.error != end.error:
            self.fail(f"attempt {number} of {_story(task)} said {end.error!r}: {attempt.error!r}")
        if former is None:
            before = (task_id, number - 1)
            if number > 1 and before not in disk.assignments and before not in batch.assignments:
                self.fail(f"attempt {number} of {_story(task)} follows no attempt {number - 1}")
            if attempt.device_id in self._drained:
                self.fail(f"attempt {number} of {_story(task)} began after its device was drained")
            if attempt.device_id in self.revoked:
                self.fail(f"attempt {number} of {_story(task)} began after its device lost its key")
            self._check_moment(disk, batch, task, number)
            acked = self.cancelled.get(task_id)
            if acked is not None and number > acked:
                self.fail(f"attempt {number} of {_story(task)} began after its cancel was acked")
            if task.job_id in self.cancelled_jobs:
                self.fail(f"attempt {number} of {_story(task)} began in a job cancelled before")
        elif former.device_id != attempt.device_id:
            self.fail(f"attempt {number} of {_story(task)} changed hands")
        elif former.outcome in _GIVEN_UP and attempt.outcome not in _GIVEN_UP:
            back = ("result_salvaged", "attempt_adopted")
            if not _tells(batch, *back, task_id=task_id, attempt=number):
                self.fail(f"attempt {number} of {_story(task)} is back, and no event says so")
        elif former.outcome == "completed" and attempt.outcome != "completed":
            self.fail(f"attempt {number} of {_story(task)} had completed, now {attempt.outcome!r}")

    def _check_moment(self, disk: NaiveStore, batch: Changes, task: TaskRow, number: int) -> None:
        """Nothing is handed out before its time."""
        world = self.world
        if world.options.wall_steps_every_ms:
            # Schedules follow the wall clock; so does the master's own while it is down.
            return
        early_ms = self._not_before.get(task.task_data, 0) - world.wall_ms
        # Who wants it again wants it now.
        if early_ms > 0 and task.task_id not in self._first_attempt:
            self.fail(f"attempt {number} of {_story(task)} is out {early_ms} ms before its moment")
        before = (task.task_id, number - 1)
        former = batch.assignments.get(before) or disk.assignments.get(before)
        early_ms = self._not_again.get(before, 0) - world.now_ms
        is_own_word = former is not None and former.outcome in _BACKED_OFF
        if is_own_word and early_ms > 0 and self._first_attempt.get(task.task_id, 1) < number:
            self.fail(f"attempt {number} of {_story(task)} is out {early_ms} ms before its retry")

    def _outcomes(
        self, disk: NaiveStore, batch: Changes, task: TaskRow, wanted: tuple[str, ...]
    ) -> int:
        """How many attempts of this life of the task ended so."""
        return sum(row.outcome in wanted for row in self._attempts(disk, batch, task))

    def _deaths(self, disk: NaiveStore, batch: Changes, task: TaskRow) -> int:
        """How many attempts of this life died, alone or (as far as was known) with their device."""
        return sum(
            row.outcome == "died" or (row.outcome == "device_lost" and row.started_wall > 0)
            for row in self._attempts(disk, batch, task)
        )

    def _attempts(self, disk: NaiveStore, batch: Changes, task: TaskRow) -> Iterator[AssignmentRow]:
        for number in range(self._first_attempt.get(task.task_id, 1), task.attempt + 1):
            key = (task.task_id, number)
            row = batch.assignments.get(key) or disk.assignments.get(key)
            if row is not None:
                yield row

    # --- workers --------------------------------------------------------------------------------

    def ordered(self, worker: str, order: TaskOrder, *, has_label: bool) -> None:
        """A worker gave this to its hosts."""
        key = (order.task_id, order.attempt)
        if key in self._ordered:
            self.fail(f"attempt {key} runs on {worker} and ran on {self._ordered[key]}")
        self._ordered[key] = worker
        row = self.disk.assignments.get((TaskId(order.task_id), order.attempt))
        if row is None:
            self.fail(f"attempt {key} runs on {worker}, and no disk knows of it")
        labels = self.disk.tasks[TaskId(order.task_id)].labels
        if labels and not has_label:
            self.fail(f"attempt {key} wants a device with {labels}, and runs on {worker}")
        self.world.note("runs", worker, key)

    def began(self, worker: str, device_id: DeviceId, order: TaskOrder) -> None:
        """Its first request leaves now."""
        now_ms = self.world.now_ms
        self.seen.starts.append(Start(order.task_id, order.attempt, device_id, now_ms))
        row = self.disk.tasks[TaskId(order.task_id)]
        if not is_limited(row.rate_key):
            return
        origin = self._origins.setdefault(row.rate_key, Origin())
        key = (order.task_id, order.attempt)
        options = self.world.options
        closed_ms = self._closures.closed_until_ms(row.rate_key, key)
        if now_ms < closed_ms:
            self.fail(
                f"{row.rate_key} said that it is closed for {closed_ms - now_ms} ms more, and "
                f"{worker} begins {key}, which was handed out since"
            )
        gap_ms = now_ms - origin.last_ms
        if gap_ms < options.delay_ms:
            self.fail(
                f"{row.rate_key} was hit by {worker} (attempt {key}) {gap_ms} ms after "
                f"{origin.last_by}: its delay is {options.delay_ms} ms"
            )
        # Of a worker that was given up, nobody knows whether its requests are still open; if it
        # comes back with them, that was not known of what was handed out before.
        decided = self._closures.decided.get(key, 0)
        still_open = [
            one
            for one in origin.open
            if self._is_believed(one) and self._adopted.get(one, 0) <= decided
        ]
        if options.concurrency and len(still_open) >= options.concurrency:
            self.fail(
                f"{row.rate_key} has {still_open} open, and {worker} begins {key}: "
                f"at most {options.concurrency} at once"
            )
        origin.last_ms, origin.last_by = now_ms, f"{worker} (attempt {key})"
        origin.open[key] = worker
        self.seen.arrivals.append(Arrival(row.rate_key, now_ms))

    def ended(self, worker: str, order: TaskOrder, result: TaskResult, *, began: bool) -> None:
        """A run ended, and its worker knows."""
        key = (order.task_id, order.attempt)
        if key in self._ends:
            self.fail(f"attempt {key} ended twice")
        self._ends[key] = result
        if result.outcome in _BACKED_OFF:
            self._not_again[key] = self.world.now_ms + max(result.retry_after_ms, BACKOFF_MS)
        self._leave(order)

    def assume_ended(self, worker: str, result: TaskResult) -> None:
        """As ended, for who has only its word."""
        key = (result.task_id, result.attempt)
        self._ordered.setdefault(key, worker)
        self._ends.setdefault(key, result)

    def settled(self, worker: str, device_id: DeviceId, key: Key) -> None:
        """A worker was told that the master has this end on disk."""
        row = self.disk.assignments.get((TaskId(key[0]), key[1]))
        if row is not None and row.device_id == device_id and not row.outcome:
            self.fail(f"{worker} forgets its end of {key}, which no disk has")

    def vanished(self, worker: str, order: TaskOrder) -> None:
        """A run died with its worker."""
        self._leave(order)

    def _leave(self, order: TaskOrder) -> None:
        row = self.disk.tasks[TaskId(order.task_id)]
        if row.rate_key in self._origins:
            self._origins[row.rate_key].open.pop((order.task_id, order.attempt), None)

    def _is_believed(self, key: Key) -> bool:
        """Does the master believe that this attempt is still out?"""
        row = self.disk.assignments[TaskId(key[0]), key[1]]
        return not row.outcome

    # --- clients --------------------------------------------------------------------------------

    def submit_asked(self, asked: Submit) -> None:
        """A client wants these to be carried out, some of them not at once."""
        self.seen.submits[asked.request_id] = asked
        for spec in asked.tasks:
            if spec.not_before_ms:
                self._not_before[spec.data] = spec.not_before_ms

    def refused(self, asked: ClientMessage) -> None:
        """A client was told that nothing comes of this."""
        self.seen.refused.add(asked.request_id)

    def submitted(self, asked: Submit, answer: Submitted) -> None:
        """A client holds this receipt."""
        former = self.seen.receipts.setdefault(asked.request_id, answer)
        if former != answer:
            self.fail(f"one request, two answers: {former}, then {answer}")
        for index, (spec, number) in enumerate(zip(asked.tasks, answer.task_ids, strict=True)):
            task = self.disk.tasks.get(TaskId(number))
            if task is None:
                self.fail(f"task {number} was acknowledged and is on no disk")
            if index not in answer.existing:
                self._check_spec(task, spec, JobId(answer.job_id))

    def _check_spec(self, task: TaskRow, spec: TaskSpec, job_id: JobId) -> None:
        """A task is what was asked for; what was left open is as in workload.py."""
        kept = (
            task.job_id, task.task_type, task.task_data, task.labels, task.rate_key,
            task.unique_key, task.priority, task.max_retry_count, task.timeout_ms,
        )  # fmt: skip
        asked = (
            job_id, spec.task_type, spec.data, ",".join(sorted(spec.labels)), spec.rate_key,
            spec.unique_key, spec.priority,
            RETRIES_DEFAULT if spec.max_retry_count is None else spec.max_retry_count,
            TIMEOUT_MS_DEFAULT if spec.timeout_ms is None else spec.timeout_ms,
        )  # fmt: skip
        if kept != asked:
            self.fail(f"{_story(task)} is {kept}, and what was asked for is {asked}")

    def cancel_acked(self, asked: CancelTasks, task_ids: tuple[int, ...]) -> None:
        """A client was told that no new attempt of these starts any more."""
        _, asked_ms = self.seen.cancels[asked.request_id]
        self.seen.cancelled[asked.request_id] = Cancel(
            Answer.OK,
            task_ids,
            asked.job_id,
            asked_ms,
            self.world.now_ms,
            {one: self.disk.tasks[TaskId(one)].attempt for one in task_ids},
        )
        for task_id in map(TaskId, task_ids):
            # A retry that is on its way may arrive after the cancel; and one that was asked for
            # since may have come before this answer.
            is_last = self._retried_ms.get(task_id, -1) < asked_ms
            if is_last and not self._retries_open[task_id]:
                self.cancelled[task_id] = self.disk.tasks[task_id].attempt
        is_last = max(self._retried_ms.values(), default=-1) < asked_ms
        if asked.job_id and is_last and not any(self._retries_open.values()):
            self.cancelled_jobs.add(JobId(asked.job_id))

    def cancel_asked(self, asked: CancelTasks) -> None:
        """A client wants these, or this job, to end."""
        self.seen.cancels[asked.request_id] = (asked, self.world.now_ms)
        self._cancels_asked.update(map(TaskId, asked.task_ids))
        if asked.job_id:
            self._jobs_cancelled.add(JobId(asked.job_id))

    def drain_acked(self, device_id: DeviceId) -> None:
        """A client was told that this device is given no new tasks."""
        # An older order to resume, or a copy of it, may still be under way.
        if self.world.now_ms - self._resumed_ms.get(device_id, -FORGOTTEN_MS) > FORGOTTEN_MS:
            self._drained.add(device_id)

    def resume_asked(self, device_id: DeviceId) -> None:
        self._resumed_ms[device_id] = self.world.now_ms
        self._drained.discard(device_id)

    def revoke_acked(self, device_id: DeviceId) -> None:
        self.revoked.add(device_id)

    def unanswered(self, asked: ClientMessage) -> None:
        """A client asked for 30 s and got no answer."""
        healed_ms = self.world.healed_ms
        if healed_ms is not None and self.world.now_ms - healed_ms > ANSWERED_MS:
            self.fail(f"nobody answered {type(asked).__name__} though nothing was wrong any more")

    def retry_asked(self, asked: RetryTasks) -> None:
        """A client wants these to have another life."""
        self.seen.retries[asked.request_id] = (asked, self.world.now_ms)
        for task_id in map(TaskId, asked.task_ids):
            if task_id not in self.disk.tasks:
                continue
            self._revivals_asked[task_id] += 1
            self._retried_ms[task_id] = self.world.now_ms
            self._retries_open[task_id] += 1
            self.cancelled.pop(task_id, None)
            self.cancelled_jobs.discard(self.disk.tasks[task_id].job_id)

    def retry_answered(self, asked: RetryTasks, task_ids: tuple[int, ...]) -> None:
        """task_ids: those that have another life."""
        self.seen.retried[asked.request_id] = (self.world.now_ms, task_ids)
        for task_id in map(TaskId, asked.task_ids):
            self._retries_open[task_id] -= 1

    def heard_end(self, end: TaskEnd) -> None:
        """A client was told of an end."""
        is_gone = end.error == "there is no such task" and not end.attempt
        if is_gone and TaskId(end.task_id) in self.pruned:
            return
        self.seen.told.append(Told(end.task_id, end.state, end.attempt, self.world.now_ms))
        row = self.disk.tasks.get(TaskId(end.task_id))
        if row is None:
            self.fail(f"a client was told of the end of task {end.task_id}, which is on no disk")
        told = (end.state, end.result, end.error)
        ended = self._ended.get((end.task_id, end.attempt), ())
        if told in ended or (end.state, None, "") in ended:
            return
        self.fail(
            f"a client was told that attempt {end.attempt} of task {end.task_id} is {end.state}, "
            f"{end.error!r}, with {len(end.result)} B: {_story(row)}"
        )

    # --- at the end -----------------------------------------------------------------------------

    def judge(self, core: MasterCore, disk: NaiveStore) -> None:
        """All is quiet: nothing is open that can be run, nothing is missing, nothing is twice; and
        the master remembers what the disk says, and all that its successor would know."""
        self.judge_history()
        self._judge_sites()
        try:
            audit_store(self.disk)
            audit_live(core.state, disk)
            audit_recovery(core, disk)
        except AssertionError as error:
            self.fail(f"audit: {error}")

    def judge_history(self) -> None:
        """What was seen from outside so far, held against what is on the disk now.

        Without the rule that everything ends: what nobody is left to run does not.
        """
        history = self.seen.history(self._ends.values())
        options = self.world.options
        delays_ms = {one.origin: float(options.delay_ms) for one in history.arrivals}
        found = problems(history, final_of(self.disk), is_at_rest=False, delays_ms=delays_ms)
        if found:
            raise Violation(f"in the end: {found[0].text}", found[0].promise)

    def _judge_sites(self) -> None:
        """In each crawl: what completed pages link to, once each, and nothing else."""
        options = self.world.options
        crawls: dict[JobId, dict[int, TaskRow]] = {}
        for row in self.disk.tasks.values():
            if row.task_type == "page":
                page = msgpack.unpackb(row.task_data)["page"]
                if crawls.setdefault(row.job_id, {}).setdefault(page, row) is not row:
                    self.fail(f"page {page} is twice in job {row.job_id}")
        for job_id, rows in crawls.items():
            reached = {0}
            for page, row in rows.items():
                if row.state is TaskState.COMPLETED:
                    reached.update(links_of(page, options))
            if reached != set(rows):
                self.fail(f"job {job_id} has pages {sorted(rows)}, linked are {sorted(reached)}")
            for page, row in rows.items():
                has_record = ("pages", f"{job_id} {page}") in self.disk.records
                if has_record != (row.state is TaskState.COMPLETED):
                    self.fail(f"{_story(row)}: {url_of(page, options)} has a record: {has_record}")


def _welcomed(actions: list[Action]) -> Iterator[Peer]:
    """The connections that are told Welcome, in the order in which their devices greeted."""
    for one in actions:
        if isinstance(one, Send) and isinstance(one.message, Welcome):
            yield one.peer


def _device_of(peer: Peer) -> DeviceId:
    """Whose connection it is; a clone's name has a tick."""
    return DeviceId(peer.partition(b"#")[0].rstrip(b"'").decode())


def _tells(batch: Changes, *kinds: str, **about: object) -> bool:
    """Is there an event of these kinds about this?"""
    return any(
        one.kind in kinds and all(getattr(one, name) == value for name, value in about.items())
        for one in batch.events
    )


def _row(disk: NaiveStore, batch: Changes, task_id: TaskId) -> TaskRow:
    row = batch.tasks.get(task_id) or batch.new_tasks.get(task_id) or disk.tasks.get(task_id)
    if row is None:
        raise Violation(f"task {task_id} is named and was never there")
    return row


def _holder(disk: NaiveStore, batch: Changes, job_id: JobId, unique_key: str) -> TaskId | None:
    from zmqcluster.core.intake import unique_hash

    key = (job_id, unique_hash(unique_key))
    if key in disk.unique_keys:
        return disk.unique_keys[key]
    return next(
        (one.task_id for one in batch.unique_keys if (one.job_id, one.key_hash) == key), None
    )


def _story(task: TaskRow) -> str:
    return (
        f"task {task.task_id} ({task.task_type}, {task.state}, attempt {task.attempt}, "
        f"{task.failures} failures, {task.deaths} deaths, last held by {task.device_id!r})"
    )
