"""WorkerCore: what a worker does about everything that happens to it. Pure: no clock, no I/O."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Final, assert_never

import msgspec

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
from zmqcluster.core.worker_identity import Memory, WorkerCounters, hello
from zmqcluster.core.worker_news import News
from zmqcluster.core.worker_outbox import Outbox
from zmqcluster.core.worker_queue import DONE, OVERDUE_GRACE_MS, QUEUED, Work, WorkQueue
from zmqcluster.core.worker_session import Session
from zmqcluster.messages import (
    Abort,
    Assign,
    AttemptRef,
    Enrolled,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Held,
    Hello,
    HelloAgain,
    Hint,
    ProgressNote,
    RateRule,
    Refused,
    Resources,
    ResultAck,
    Started,
    TaskOrder,
    TaskResult,
    ToWorker,
    Welcome,
)
from zmqcluster.model import (
    CREDIT_MAX,
    INVENTORY_MAX,
    Outcome,
)

# Attempts in hand beyond the slots bridge the commit and the round trip between a result and the
# next order: 1,024 are 50 ms of the fastest no-ops. How many of them make sense for tasks that
# take their time is the master's business, which knows how long each type takes.
AHEAD_MAX: Final = 1_024
# Ordinary masters stay far below; beyond it orders are given back at once.
HELD_MAX: Final = 2 * CREDIT_MAX
# Unacknowledged results that still fit an inventory beside everything else.
KEPT_MAX: Final = INVENTORY_MAX - HELD_MAX
# A hostile master may name attempts that never were; this many are answered.
UNKNOWN_ABORTS_MAX: Final = INVENTORY_MAX
CARE_MS: Final = 1_000
CARE_MS_MAX: Final = 32_000
# A change of credit is told early, but not more often than this.
TELL_MS_MIN: Final = 250
# A drained worker waits this long for the last acknowledgements.
FLUSH_MS: Final = 10_000
IDLE_MS: Final = 60_000


class WorkerCore:
    """A worker as a machine: events in, effects out, in one turn at a time.

    It promises: no attempt starts twice; every ended attempt is kept until acknowledged; nothing
    starts that the master may have given to somebody else; no order waits here for nothing.

    kept: unacknowledged results of a former process, found in the spool.
    """

    def __init__(
        self, settings: WorkerSettings, rng: Random, kept: Iterable[TaskResult] = ()
    ) -> None:
        self.counters = WorkerCounters()
        self._settings = settings
        self._pool_of = {offer.task_type: offer.pool for offer in settings.task_types}
        self._queue = WorkQueue(
            {offer.pool: offer.slots for offer in settings.pools}, settings.running_max
        )
        self._outbox = Outbox()
        self._outbox.restore(0, kept)
        self._session = Session(settings, rng)
        self._news = News()
        self._resources = Resources()
        self._memory = Memory()
        self._told: tuple[int, bool] = (0, False)
        self._told_ms = 0
        self._care_ms = CARE_MS
        self._care_due_ms: int | None = None
        self._is_stopping = False
        self._leave_by_ms: int | None = None
        self.is_stopped = False

    # --- what others may ask ---------------------------------------------------------------------

    @property
    def is_registered(self) -> bool:
        """Is there a session with the master right now?"""
        return self._session.is_open

    @property
    def running(self) -> int:
        return self._queue.running

    @property
    def waiting(self) -> int:
        return self._queue.waiting

    @property
    def kept(self) -> int:
        """Results that ended here and are not acknowledged."""
        return len(self._outbox)

    @property
    def is_draining(self) -> bool:
        control = self._session.control
        return self._is_stopping or control.drain or control.stop

    # --- the one door ----------------------------------------------------------------------------

    def handle(self, now_ms: int, *events: WorkerEvent) -> list[WorkerEffect]:
        """One turn: take in what happened, in order, then decide what is to be done now.

        Without events only time has passed. now_ms: cluster time, above 0, never stepping back.
        """
        effects: list[WorkerEffect] = []
        if self.is_stopped:
            return effects
        for event in events:
            self._on_event(now_ms, event, effects)
        self._close_turn(now_ms, effects)
        return effects

    def next_ms(self, now_ms: int) -> int:
        """When handle() wants to be called again though nothing happens."""
        if self.is_stopped:
            return now_ms + IDLE_MS
        session, queue, outbox = self._session, self._queue, self._outbox
        dues = [
            session.due_ms(),
            queue.window_due_ms(),
            outbox.spool_due_ms(),
            self._care_due_ms,
            self._leave_by_ms,
        ]
        if queue.has_starting and session.holds_lease(now_ms):
            dues.append(session.lease_until_ms + 1)
        if session.is_open:
            dues += (queue.announce_due_ms(), outbox.resend_due_ms(), self._news.due_ms())
            if self._offer() != self._told:
                dues.append(self._told_ms + TELL_MS_MIN)
        soonest_ms = now_ms + IDLE_MS
        for due_ms in dues:
            if due_ms is not None and due_ms < soonest_ms:
                soonest_ms = due_ms
        return soonest_ms

    # --- taking in -------------------------------------------------------------------------------

    def _on_event(self, now_ms: int, event: WorkerEvent, effects: list[WorkerEffect]) -> None:
        match event:
            case FromMaster():
                self._on_message(now_ms, event.message, effects)
            case HostsReported():
                for report in event.reports:
                    self._on_report(now_ms, report)
            case Sampled():
                self._resources = event.resources
            case Connected():
                self._session.on_connected(now_ms)
            case Disconnected():
                self._session.on_disconnected(now_ms, effects)
            case KeyRefused():
                self._session.on_key_refused(now_ms, effects)
            case HandshakeFailed():
                self._session.on_handshake_failed(now_ms)
            case Terminated():
                self._on_terminated(now_ms, effects)
            case _:
                assert_never(event)

    def _on_message(
        self, now_ms: int, message: ToWorker | Hint, effects: list[WorkerEffect]
    ) -> None:
        session = self._session
        match message:
            case Assign():
                self._on_assign(now_ms, message, effects)
            case ResultAck():
                self._on_ack(now_ms, message, effects)
            case HeartbeatAck():
                if session.on_beat_ack(now_ms, message):
                    self._abort(now_ms, message.abort, effects)
            case Abort():
                if session.is_open:
                    self._abort(now_ms, message.refs, effects)
            case Hint():
                if session.on_hint(now_ms, message.epoch, message.control_version):
                    # A hint speaks to all devices: what is not held here is somebody else's.
                    self._abort(now_ms, message.abort, effects, answer_unknown=False)
            case Welcome():
                if session.on_welcome(now_ms, message, effects):
                    self._outbox.rewind()
                    self._abort(now_ms, message.abort, effects)
            case HelloAgain():
                session.on_hello_again(now_ms, message.epoch)
            case Refused():
                session.on_refused(now_ms, message, effects)
            case Enrolled():
                # Joining is over before this machine starts: a late repeat.
                pass
            case _:
                assert_never(message)

    def _on_assign(self, now_ms: int, message: Assign, effects: list[WorkerEffect]) -> None:
        session = self._session
        if session.is_open and message.epoch > session.epoch:
            session.greet(now_ms)
        is_past = message.epoch < session.epoch or message.seq <= session.assign_seq
        if not session.is_open or is_past:
            # Of a session that is over, or overtaken by a later one: the master has given these up
            # or will, because they are not in the next inventory.
            self.counters.stale_assigns += 1
            return
        session.assign_seq = message.seq
        self.counters.received += len(message.orders)
        for order in message.orders:
            self._take_in(now_ms, order, effects)

    def _take_in(self, now_ms: int, order: TaskOrder, effects: list[WorkerEffect]) -> None:
        task_id, attempt = order.task_id, order.attempt
        newest = max(self._queue.attempt_of(task_id), self._memory.newest(task_id))
        if attempt <= newest or (task_id, attempt) in self._outbox:
            self.counters.repeated_orders += 1
            return
        pool = self._pool_of.get(order.task_type)
        if pool is None:
            error = f"this device does not run {order.task_type!r}"
            self._end(now_ms, TaskResult(task_id, attempt, Outcome.FAILED, error=error))
        elif len(self._queue) >= HELD_MAX:
            self._give_back([AttemptRef(task_id, attempt)], "more than this device holds")
        else:
            superseded = self._queue.add(now_ms, order, pool)
            if superseded is not None:
                self._kill(now_ms, superseded, effects)

    def _on_ack(self, now_ms: int, message: ResultAck, effects: list[WorkerEffect]) -> None:
        before = len(self._outbox)
        spooled = self._outbox.ack(now_ms, message.refs)
        self.counters.acknowledged += before - len(self._outbox)
        if spooled:
            effects.append(ForgetResults(tuple(spooled)))

    def _on_report(self, now_ms: int, report: HostReport) -> None:
        match report:
            case TaskResult():
                self._on_result(now_ms, report)
            case Started():
                # Counts for runs with a start window; others begin when their slot is taken.
                for ref in report.refs:
                    self._queue.begin(ref.task_id, ref.attempt)
            case ProgressNote():
                if self._queue.find(report.task_id, report.attempt) is not None:
                    self._news.note(report)
            case RateRule():
                self._news.rule(now_ms, report)
            case _:
                assert_never(report)

    def _on_result(self, now_ms: int, result: TaskResult) -> None:
        work = self._queue.finish(now_ms, result.task_id, result.attempt)
        if work is None:
            self.counters.stray_reports += 1
            return
        if work.kill is Outcome.CANCELLED and result.outcome is not Outcome.COMPLETED:
            # However the end came about, it was wanted, and the process is gone.
            result = msgspec.structs.replace(result, outcome=Outcome.CANCELLED, error="")
        self._news.forget(result.task_id)
        self.counters.finished += 1
        self._end(now_ms, result)

    def _abort(
        self,
        now_ms: int,
        refs: tuple[AttemptRef, ...],
        effects: list[WorkerEffect],
        *,
        answer_unknown: bool = True,
    ) -> None:
        for ref in refs:
            work = self._queue.find(ref.task_id, ref.attempt)
            if work is None and not answer_unknown:
                continue
            if work is None or work.phase == QUEUED:
                self._end_unstarted(now_ms, ref, work)
            elif work.kill is None:
                self._kill(now_ms, work, effects)

    def _end_unstarted(self, now_ms: int, ref: AttemptRef, work: Work | None) -> None:
        """What has not begun, or was never here, can be called cancelled at once."""
        if work is not None:
            self._queue.drop(work)
            self.counters.aborted += 1
        else:
            self.counters.unknown_aborts += 1
            is_told = ref.attempt <= self._memory.newest(ref.task_id)
            if is_told or (ref.task_id, ref.attempt) in self._outbox:
                return
            if self.kept >= UNKNOWN_ABORTS_MAX:
                return
        self._end(now_ms, TaskResult(ref.task_id, ref.attempt, Outcome.CANCELLED))

    def _kill(
        self,
        now_ms: int,
        work: Work,
        effects: list[WorkerEffect],
        outcome: Outcome = Outcome.CANCELLED,
    ) -> None:
        self.counters.aborted += 1
        work.kill = outcome
        work.nudge_ms = now_ms + OVERDUE_GRACE_MS
        effects.append(KillTask(work.ref, outcome))

    def _kill_starting(self, now_ms: int, effects: list[WorkerEffect]) -> None:
        """The lease is over: what has not reached its rate key yet must not do so any more."""
        for work in self._queue.starting:
            if work.kill is None:
                self._kill(now_ms, work, effects, Outcome.RETURNED)

    def _on_terminated(self, now_ms: int, effects: list[WorkerEffect]) -> None:
        if self._is_stopping:
            self._stop(now_ms, effects, 130, "stopped at once")
            return
        self._is_stopping = True
        if self.running:
            text = f"Draining: {self.running} running tasks finish first; stop again to stop now"
            effects.append(Say("info", text))

    # --- deciding --------------------------------------------------------------------------------

    def _close_turn(self, now_ms: int, effects: list[WorkerEffect]) -> None:
        if self.is_stopped:
            return
        session, queue = self._session, self._queue
        session.on_turn(now_ms, effects)
        if session.fatal:
            self._stop(now_ms, effects, 1, session.fatal)
            return
        if session.control.stop and not self._is_stopping:
            self._on_terminated(now_ms, effects)
        if self.is_draining:
            self._give_back(queue.take_queued(), "draining")
        has_lease = session.holds_lease(now_ms)
        late = queue.take_late(now_ms, all_windows=not (has_lease and session.is_open))
        self._give_back(late, "start window missed")
        if not has_lease:
            self._kill_starting(now_ms, effects)
        self._care(now_ms, effects)
        # Without a lease the master may have given what waits here to somebody else.
        if has_lease and not self._is_full():
            orders = queue.start(now_ms)
            if orders:
                self.counters.started += len(orders)
                effects.append(RunTasks(tuple(orders)))
        self._spool(now_ms, effects, at_once=not session.is_open)
        if session.take_hello(now_ms):
            effects.append(SendToMaster(self._hello(now_ms)))
        self._tell(now_ms, effects)
        if self._is_stopping:
            self._leave_when_done(now_ms, effects)

    def _tell(self, now_ms: int, effects: list[WorkerEffect]) -> None:
        """Everything the master should know by now; without a session the inventory will tell."""
        begun = self._queue.take_announced(now_ms, is_open=self._session.is_open)
        if not self._session.is_open:
            self._news.drop_returned()
            return
        messages = self._news.take(now_ms, begun)
        messages.extend(self._outbox.take_messages(now_ms))
        offer = self._offer()
        is_news = offer != self._told and now_ms >= self._told_ms + TELL_MS_MIN
        seq = self._session.take_beat(now_ms, at_once=is_news)
        if seq is not None:
            messages.append(self._beat(now_ms, seq, offer))
        effects.extend(map(SendToMaster, messages))

    def _care(self, now_ms: int, effects: list[WorkerEffect]) -> None:
        """Once a second or so: who is overdue, and who waits here for nothing?"""
        if not len(self._queue):
            self._care_due_ms, self._care_ms = None, CARE_MS
            return
        if self._care_due_ms is None:
            self._care_due_ms = now_ms + self._care_ms
        if now_ms < self._care_due_ms:
            return
        for work in self._queue.overdue(now_ms):
            self.counters.overdue += 1
            outcome = work.kill or Outcome.TIMED_OUT
            text = f"Task {work.ref.task_id} outlives its end; killing it again"
            effects.extend((Say("warning", text), KillTask(work.ref, outcome)))
        stuck = self._queue.take_stuck(now_ms)
        self._give_back(stuck, "waited too long")
        # A master that misjudges a type does so until one of its tasks ends: do not play ball.
        self._care_ms = min(CARE_MS_MAX, 2 * self._care_ms) if stuck else CARE_MS
        self._care_due_ms = now_ms + self._care_ms

    def _spool(self, now_ms: int, effects: list[WorkerEffect], *, at_once: bool) -> None:
        results = self._outbox.take_unspooled(now_ms, at_once=at_once)
        if results:
            effects.append(SpoolResults(tuple(results)))

    def _leave_when_done(self, now_ms: int, effects: list[WorkerEffect]) -> None:
        if len(self._queue):
            self._leave_by_ms = None
            return
        if self._leave_by_ms is None:
            self._leave_by_ms = now_ms + FLUSH_MS
        if not self.kept or now_ms >= self._leave_by_ms:
            self._stop(now_ms, effects, 0, "drained")

    def _stop(self, now_ms: int, effects: list[WorkerEffect], code: int, text: str) -> None:
        self._spool(now_ms, effects, at_once=True)
        if self.kept:
            line = f"{self.kept} unacknowledged results are kept on disk for the next start"
            effects.append(Say("warning", line))
        starting = self._queue.starting
        effects.extend(KillTask(work.ref, Outcome.RETURNED) for work in starting)
        if self._session.is_open:
            if starting:
                # Nobody will know whether they began before they were gone.
                effects.append(SendToMaster(Started(tuple(work.ref for work in starting))))
            effects.append(SendToMaster(Goodbye(text)))
        effects.append(StopWorker(code, text))
        self.is_stopped = True

    # --- helpers ---------------------------------------------------------------------------------

    def _end(self, now_ms: int, result: TaskResult) -> None:
        self._outbox.keep(now_ms, result)
        self._memory.ended(result.task_id, result.attempt)

    def _give_back(self, refs: list[AttemptRef], reason: str) -> None:
        if refs:
            self.counters.given_back += len(refs)
            self._news.give_back(refs, reason)

    def _is_full(self) -> bool:
        """Results pile up: no more work until the master takes some."""
        limit = self._settings.kept_bytes_max
        return self._outbox.bytes_kept >= limit or self.kept >= KEPT_MAX

    def _offer(self) -> tuple[int, bool]:
        """(credit, draining) as of now."""
        if self.is_draining or self._is_full():
            return 0, self.is_draining
        ahead = AHEAD_MAX if self._care_ms == CARE_MS else 0
        return min(CREDIT_MAX, self._queue.slots + ahead), False

    def _hello(self, now_ms: int) -> Hello:
        self._told, self._told_ms = self._offer(), now_ms
        return hello(self._settings, self._queue.slots, *self._told, self._inventory(now_ms))

    def _beat(self, now_ms: int, seq: int, offer: tuple[int, bool]) -> Heartbeat:
        self._told, self._told_ms = offer, now_ms
        credit, draining = offer
        return Heartbeat(
            seq=seq,
            sent_ms=now_ms,
            resources=self._resources,
            running=self.running,
            credit=credit,
            assign_seq=self._session.assign_seq,
            inventory=self._inventory(now_ms),
            draining=draining,
        )

    def _inventory(self, now_ms: int) -> tuple[Held, ...]:
        lines = list(self._queue.inventory(now_ms))
        lines.extend(Held(task_id, attempt, DONE) for task_id, attempt in self._outbox)
        return tuple(lines[:INVENTORY_MAX])
