"""The face of the oracle: what the nodes tell, and which room hears of it, in which order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tests.simulation.disk import Disk
from tests.simulation.oracle.attempts import Attempts
from tests.simulation.oracle.crawls import Crawls
from tests.simulation.oracle.leases import Leases, welcomed_by
from tests.simulation.oracle.news import News
from tests.simulation.oracle.replies import Replies
from tests.simulation.oracle.room import TERMINAL, Key, Room
from tests.simulation.oracle.seen import Seen
from tests.simulation.oracle.sites import Sites
from tests.simulation.oracle.tasks import Tasks
from tests.simulation.oracle.waiting import Waiting
from tests.simulation.oracle.wishes import Wishes
from tests.simulation.world import WALL_AT_ZERO, Violation, World
from tests.support.core_audit import audit_live, audit_recovery, audit_store, final_of
from tests.support.history import problems
from tests.support.naive_store import NaiveStore
from zmqcluster.core.effects import Action, Changes, Turn
from zmqcluster.core.events import Peer
from zmqcluster.core.invariants import check
from zmqcluster.core.master import MasterCore
from zmqcluster.core.state import MasterState
from zmqcluster.errors import InvariantError
from zmqcluster.messages import (
    CancelTasks,
    ClientMessage,
    Held,
    Inbound,
    RetryTasks,
    Submit,
    Submitted,
    TaskEnd,
    TaskOrder,
    TaskResult,
)
from zmqcluster.model import DeviceId, JobState, TaskId

# Audits that cost as much as everything there is.
AUDIT_COMMITS: Final = 500
CHECK_TURNS: Final = 200
# A look at the lanes.
URGENT_TURNS: Final = 8


class Oracle(Room):
    """While a run goes on it checks what only somebody inside can see, and when: what it checks at
    a commit costs as much as the commit. What can be seen from outside it writes down, for the
    checker of histories that judges real clusters, too.

    keeps_tape: nodes record what their cores were given, to make a failing run small.
    """

    def __init__(self, world: World, disk: Disk, *, keeps_tape: bool = False) -> None:
        super().__init__(world, disk)
        self.keeps_tape = keeps_tape
        self.open_tasks = 0
        self._seen = Seen()
        self._waiting = Waiting()
        self._wishes = Wishes(world, disk, self._seen)
        self._news = News(world, disk, self._seen)
        self._sites = Sites(world, disk, self._seen)
        self._leases = Leases(world, disk)
        self._replies = Replies(world, disk, self._wishes, self._leases)
        self._attempts = Attempts(world, disk, self._wishes)
        self._tasks = Tasks(world, disk, self._wishes, self._attempts)
        self._crawls = Crawls(world, disk)
        self._commits = self._turns = 0
        self._epoch = 0
        # How far the wall clock was set when this master first read it; None: it has not yet.
        self._boot_step_ms: int | None = None

    # --- the master: what it hears --------------------------------------------------------------

    def master_started(self, epoch: int) -> None:
        if epoch <= self._epoch:
            self.fail(f"epoch {epoch} begins after epoch {self._epoch}")
        self._epoch = epoch
        self._waiting = Waiting()
        self._boot_step_ms = None
        self._leases.master_started()
        self._replies.master_started()
        self._sites.closures.forget_undone(self.world.wall_steps)

    def master_heard(self, peer: Peer, message: Inbound) -> None:
        """This came over this connection, and is decided upon in this turn."""
        self._leases.heard(peer)
        self._replies.heard(peer, message)

    def greeted(self, device_id: DeviceId, inventory: Iterable[Held]) -> None:
        """A device said what it holds, and is answered in this turn."""
        self._replies.greeted(device_id, inventory)

    def ends_heard(self) -> None:
        """A device told of ends, and is answered in this turn."""
        self._replies.ends_heard()

    def master_lost(self, peer: Peer) -> None:
        """The master was told that this connection is gone."""
        self._leases.lost(peer)

    def master_stalled(self) -> None:
        """The master was stopped for a while; every lease begins anew, and it says so."""
        self._replies.stalled()
        self._leases.forgive()

    def clock_read(self) -> None:
        """The master is told the wall time."""
        self._sites.closures.steps_seen = self.world.wall_steps
        if self._boot_step_ms is None:
            self._boot_step_ms = self.world.wall_step_ms

    # --- the master: what it does ---------------------------------------------------------------

    def check_leases(self) -> None:
        """What a silent device held is taken back in time."""
        self._leases.check_leases()

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

    def answered(self, actions: list[Action]) -> None:
        """What a turn says, once its changes are on disk."""
        self._replies.answered(actions)

    def decided(self, changes: Changes, actions: list[Action]) -> None:
        """What a turn came to, before it is on disk."""
        welcomed = welcomed_by(actions)
        self._check_pruning(changes)
        closures = self._sites.closures
        if changes.clock_ms:
            closures.steps_read = closures.steps_seen
        for key, row in changes.assignments.items():
            if row.outcome:
                self._replies.check_listed(changes, key, row)
            else:
                closures.decided.setdefault(key, self._turns)
        for event in changes.events:
            match event.kind:
                case "rate_key_closed":
                    self._sites.closed(self._turns, event.detail)
                case "attempt_adopted":
                    self._sites.adopted(self._turns, (event.task_id, event.attempt))
                case "device_online":
                    self._leases.open_sessions(welcomed, DeviceId(event.device_id))
                case "loop_stalled":
                    self._replies.check_stall()
                case "mass_loss_brake":
                    self._leases.braked()
                case "device_lost":
                    self._leases.check_loss(DeviceId(event.device_id), event.detail)
                case "device_offline":
                    self._leases.close_session(DeviceId(event.device_id))
        self._leases.open_sessions(welcomed)

    def turn_over(self, turn: Turn, state: MasterState) -> None:
        """The next turn has other messages."""
        waiting = self._waiting
        if waiting.urgent:
            problem = waiting.passed_over(state, turn.changes)
            if problem:
                self.fail(problem)
            waiting.urgent.clear()
        if self._turns % URGENT_TURNS == 0:
            waiting.look(state)
        self._replies.turn_over(turn, state)

    def commit_begun(self) -> None:
        self._sites.closures.begin()

    def committing(self, batch: Changes) -> None:
        """These rows are about to be on disk."""
        self._commits += 1
        self._sites.closures.committed()
        for event in batch.events:
            if event.kind == "task_revived":
                # Its end and its new life may be in one batch.
                self._attempts.revived(TaskId(event.task_id), event.attempt)
                former_state = event.detail.removeprefix("was ")
                self._news.note_end((event.task_id, event.attempt), former_state, None, "")
        for key_row in batch.keys.values():
            self._news.check_key(batch, key_row)
        for job in batch.jobs.values():
            self._wishes.check_job(job)
            if job.state is JobState.CANCELLED:
                self._news.check_cancelled_job(batch, job)
        for key, attempt in batch.assignments.items():
            self._attempts.check_attempt(batch, key, attempt)
            self._leases.kept(key, attempt)
        self._check_tasks(batch)
        for record in batch.records.values():
            self._tasks.check_record(batch, record)
        if self._commits % AUDIT_COMMITS == 0:
            self._audit()

    def _check_pruning(self, changes: Changes) -> None:
        """By the clock on the wall when this master began: whoever sets it later prunes nothing."""
        if changes.prune_before_wall:
            if self._boot_step_ms is None:
                self.fail("something is pruned before the clock on the wall was read")
            steady_wall = WALL_AT_ZERO + self.world.now_ms + self._boot_step_ms
            early_ms = changes.prune_before_wall - steady_wall + self.world.options.retention_ms
            if early_ms > 0:
                self.fail(f"what ended is pruned {early_ms} ms before its time")

    def _check_tasks(self, batch: Changes) -> None:
        for task_id, task in batch.new_tasks.items():
            # Made and changed again while a commit was under way: the later row is the truth.
            task = batch.tasks.get(task_id, task)
            self._tasks.check_new(batch, task)
            if task.state in TERMINAL:
                self._news.note_end((task_id, task.attempt), task.state, task.result, task.error)
            else:
                self.open_tasks += 1
        for task_id, task in batch.tasks.items():
            if task_id in batch.new_tasks:
                continue
            former = self.disk.tasks.get(task_id)
            if former is None:
                self.fail(f"task {task_id} changes and was never there")
            self.open_tasks += (former.state in TERMINAL) - (task.state in TERMINAL)
            if task.state in TERMINAL:
                self._news.note_end((task_id, task.attempt), task.state, task.result, task.error)
            self._tasks.check_change(batch, former, task)

    def _audit(self) -> None:
        """Everything on the disk, together."""
        try:
            audit_store(self.disk)
        except AssertionError as error:
            self.fail(f"audit: {error}")

    # --- workers --------------------------------------------------------------------------------

    def ordered(self, worker: str, order: TaskOrder, *, has_label: bool) -> None:
        """A worker gave this to its hosts."""
        self._attempts.ordered(worker, order, has_label=has_label)

    def began(self, worker: str, device_id: DeviceId, order: TaskOrder) -> None:
        """Its first request leaves now."""
        self._sites.began(worker, device_id, order)

    def ended(self, order: TaskOrder, result: TaskResult) -> None:
        """A run ended, and its worker knows."""
        self._attempts.ended(order, result)
        self._sites.left(order)

    def assume_ended(self, worker: str, result: TaskResult) -> None:
        """As ended, for who has only its word."""
        self._attempts.assume_ended(worker, result)

    def settled(self, worker: str, device_id: DeviceId, key: Key) -> None:
        """A worker was told that the master has this end on disk."""
        self._attempts.settled(worker, device_id, key)

    def vanished(self, order: TaskOrder) -> None:
        """A run died with its worker."""
        self._sites.left(order)

    # --- clients --------------------------------------------------------------------------------

    def is_revoked(self, device_id: DeviceId) -> bool:
        """Was a client told that this device has no key any more?"""
        return device_id in self._wishes.revoked

    def submit_asked(self, asked: Submit) -> None:
        """A client wants these to be carried out, some of them not at once."""
        self._wishes.submit_asked(asked)

    def submitted(self, asked: Submit, answer: Submitted) -> None:
        """A client holds this receipt."""
        self._wishes.submitted(asked, answer)

    def refused(self, asked: ClientMessage) -> None:
        """A client was told that nothing comes of this."""
        self._wishes.refused(asked)

    def unanswered(self, asked: ClientMessage) -> None:
        """A client asked for 30 s and got no answer."""
        self._wishes.unanswered(asked)

    def cancel_asked(self, asked: CancelTasks) -> None:
        """A client wants these, or this job, to end."""
        self._wishes.cancel_asked(asked)

    def cancel_acked(self, asked: CancelTasks, task_ids: tuple[int, ...]) -> None:
        """A client was told that no new attempt of these starts any more."""
        self._wishes.cancel_acked(asked, task_ids)

    def retry_asked(self, asked: RetryTasks) -> None:
        """A client wants these to have another life."""
        self._wishes.retry_asked(asked)

    def retry_answered(self, asked: RetryTasks, task_ids: tuple[int, ...]) -> None:
        """task_ids: those that have another life."""
        self._wishes.retry_answered(asked, task_ids)

    def drain_acked(self, device_id: DeviceId) -> None:
        """A client was told that this device is given no new tasks."""
        self._wishes.drain_acked(device_id)

    def resume_asked(self, device_id: DeviceId) -> None:
        """A client wants this device to be given tasks again."""
        self._wishes.resume_asked(device_id)

    def revoke_acked(self, device_id: DeviceId) -> None:
        """A client was told that this device has no key any more."""
        self._wishes.revoke_acked(device_id)

    def heard_end(self, end: TaskEnd) -> None:
        """A client was told of an end."""
        self._news.heard_end(end)

    # --- at the end -----------------------------------------------------------------------------

    def judge(self, core: MasterCore, disk: NaiveStore) -> None:
        """All is quiet: nothing is open that can be run, nothing is missing, nothing is twice; and
        the master remembers what the disk says, and all that its successor would know."""
        self.judge_history()
        self._crawls.judge_sites()
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
        history = self._seen.history(self._attempts.ends.values())
        options = self.world.options
        delays_ms = {one.origin: float(options.delay_ms) for one in history.arrivals}
        found = problems(history, final_of(self.disk), is_at_rest=False, delays_ms=delays_ms)
        if found:
            raise Violation(f"in the end: {found[0].text}", found[0].promise)
