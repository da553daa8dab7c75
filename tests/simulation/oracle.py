"""The judge: sees every commit, start, answer and request at an origin, and knows the promises.

It is told of things by the nodes, keeps books of its own, and shares no code with the core it
judges. What it checks at a commit costs as much as the commit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final, NoReturn

import msgpack  # type: ignore[import-untyped]  # ships no types
from msgspec import Struct

from tests.simulation.workload import fingerprint, links_of, url_of
from tests.simulation.world import Violation, World
from tests.support.core_audit import audit_store
from tests.support.naive_store import NaiveStore
from zmqcluster.core.effects import Changes
from zmqcluster.core.invariants import check
from zmqcluster.core.rows import AssignmentRow, TaskRow
from zmqcluster.core.state import MasterState
from zmqcluster.errors import InvariantError
from zmqcluster.messages import Submit, Submitted, TaskEnd, TaskOrder, TaskResult
from zmqcluster.model import JobId, Outcome, TaskId, TaskState

Key = tuple[int, int]

IN_FLIGHT: Final = (TaskState.ASSIGNED, TaskState.RUNNING)
TERMINAL: Final = (TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED, TaskState.DEAD)
_FAILING: Final = ("failed", "retry", "timed_out", "rejected")
_DEADLY: Final = ("died", "device_lost")
DEATHS_MAX: Final = 3

# Audits that cost as much as everything there is.
AUDIT_COMMITS: Final = 500
CHECK_TURNS: Final = 200


class Origin(Struct):
    """What a rate key's site saw. open: attempts whose request may be there."""

    last_ms: int = -(10**9)
    last_by: str = ""
    open: dict[Key, str] = {}


class Oracle:
    """keeps_tape: nodes record what their cores were given, to make a failing run small."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.keeps_tape = False
        self.disk: NaiveStore
        self.submissions: dict[bytes, Submitted] = {}
        self.promised: dict[TaskId, bytes] = {}
        # Attempt number at the moment a cancel was acknowledged.
        self.cancelled: dict[TaskId, int] = {}
        self.cancelled_jobs: set[JobId] = set()
        # Tasks whose retry was ever asked for, and those where one is still on its way.
        self.revivable: set[TaskId] = set()
        self._retries_open: Counter[TaskId] = Counter()
        self.told: dict[TaskId, TaskEnd] = {}
        self.open_tasks = 0
        self.commits = 0
        self.accepted = 0
        self._turns = 0
        self._epoch = 0
        self._ordered: dict[Key, str] = {}
        self._ends: dict[Key, TaskResult] = {}
        self._first_attempt: dict[TaskId, int] = {}
        self._origins: dict[str, Origin] = {}

    def fail(self, text: str) -> NoReturn:
        raise Violation(f"at {self.world.now_ms} ms: {text}")

    # --- the master -----------------------------------------------------------------------------

    def master_started(self, epoch: int) -> None:
        if epoch <= self._epoch:
            self.fail(f"epoch {epoch} begins after epoch {self._epoch}")
        self._epoch = epoch

    def master_turned(self, state: MasterState, *, is_due: bool = False) -> None:
        """is_due: look at all of it now, and not only once in a while."""
        self._turns += 1
        if is_due or self._turns % CHECK_TURNS == 0:
            try:
                check(state)
            except InvariantError as error:
                self.fail(str(error))

    def committing(self, disk: NaiveStore, batch: Changes) -> None:
        """These rows are about to be on disk."""
        self.commits += 1
        for key, attempt in batch.assignments.items():
            self._check_attempt(disk, batch, key, attempt)
        for task_id, task in batch.new_tasks.items():
            # Made and changed again while a commit was under way: the later row is the truth.
            task = batch.tasks.get(task_id, task)
            self._check_new(disk, batch, task)
            self.open_tasks += task.state not in TERMINAL
        for task_id, task in batch.tasks.items():
            if task_id in batch.new_tasks:
                continue
            former = disk.tasks.get(task_id)
            if former is None:
                self.fail(f"task {task_id} changes and was never there")
            self.open_tasks += (former.state in TERMINAL) - (task.state in TERMINAL)
            self._check_change(disk, batch, former, task)
        for record in batch.records.values():
            holder = _row(disk, batch, record.task_id)
            if holder.state is not TaskState.COMPLETED or holder.attempt != record.attempt:
                self.fail(f"a record of attempt {record.attempt} of {_story(holder)} was kept")
        if self.commits % AUDIT_COMMITS == 0:
            self.audit()

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
        if task.state is TaskState.COMPLETED and former.state is not TaskState.COMPLETED:
            self._check_completed(disk, batch, task)
        elif task.state is TaskState.DEAD and former.state is not TaskState.DEAD:
            deaths = self._outcomes(disk, batch, task, _DEADLY)
            if deaths < DEATHS_MAX:
                self.fail(f"{_story(task)} after {deaths} deaths")
        elif task.state is TaskState.FAILED and former.state is not TaskState.FAILED:
            self._check_failed(disk, batch, task)
        elif task.state in IN_FLIGHT:
            self._check_in_flight(disk, batch, task)

    def _check_revival(self, former: TaskRow, task: TaskRow) -> None:
        if former.state is TaskState.COMPLETED:
            self.fail(f"{_story(former)} became {_story(task)}")
        if (task.state, task.attempt) != (former.state, former.attempt):
            if task.task_id not in self.revivable:
                self.fail(f"nobody asked for it, and {_story(former)} became {_story(task)}")
            self._first_attempt[task.task_id] = former.attempt + 1
            self.cancelled.pop(task.task_id, None)
            self.cancelled_jobs.discard(task.job_id)

    def _check_completed(self, disk: NaiveStore, batch: Changes, task: TaskRow) -> None:
        key = (task.task_id, task.attempt)
        end = self._ends.get(key)
        if end is None or end.outcome is not Outcome.COMPLETED:
            self.fail(f"{_story(task)}, and no run of that attempt completed")
        if task.result != end.result:
            self.fail(f"{_story(task)} has a result of another run: {task.result!r}")
        if task.task_id in self.cancelled or task.job_id in self.cancelled_jobs:
            self.fail(f"{_story(task)} after its cancel was acknowledged")
        attempt = batch.assignments.get((task.task_id, task.attempt)) or disk.assignments.get(
            (task.task_id, task.attempt)
        )
        if attempt is None or attempt.outcome != "completed":
            self.fail(f"{_story(task)}, and its attempt is {attempt}")
        if attempt.device_id != task.device_id or attempt.device_id != self._device_of(key):
            self.fail(f"{_story(task)} by {attempt.device_id}, which did not run it")
        self.accepted += 1
        for child in end.children:
            if not _has_key(disk, batch, task.job_id, child.unique_key):
                self.fail(f"{_story(task)} without its child {child.unique_key}")

    def _check_failed(self, disk: NaiveStore, batch: Changes, task: TaskRow) -> None:
        if self._outcomes(disk, batch, task, ("rejected",)):
            return
        failures = self._outcomes(disk, batch, task, _FAILING)
        if failures <= task.max_retry_count:
            self.fail(f"{_story(task)} after {failures} failures of {task.max_retry_count} + 1")

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
        if former is None:
            before = (task_id, number - 1)
            if number > 1 and before not in disk.assignments and before not in batch.assignments:
                self.fail(f"attempt {number} of {_story(task)} follows no attempt {number - 1}")
            acked = self.cancelled.get(task_id)
            if acked is not None and number > acked:
                self.fail(f"attempt {number} of {_story(task)} began after its cancel was acked")
        elif former.device_id != attempt.device_id:
            self.fail(f"attempt {number} of {_story(task)} changed hands")
        elif former.outcome == "completed" and attempt.outcome != "completed":
            self.fail(f"attempt {number} of {_story(task)} had completed, now {attempt.outcome!r}")

    def _outcomes(
        self, disk: NaiveStore, batch: Changes, task: TaskRow, wanted: tuple[str, ...]
    ) -> int:
        """How many attempts of this life of the task ended so."""
        found = 0
        for number in range(self._first_attempt.get(task.task_id, 1), task.attempt + 1):
            key = (task.task_id, number)
            row = batch.assignments.get(key) or disk.assignments.get(key)
            found += row is not None and row.outcome in wanted
        return found

    # --- workers --------------------------------------------------------------------------------

    def ordered(self, worker: str, order: TaskOrder) -> None:
        """A worker gave this to its hosts."""
        key = (order.task_id, order.attempt)
        if key in self._ordered:
            self.fail(f"attempt {key} runs on {worker} and ran on {self._ordered[key]}")
        self._ordered[key] = worker
        row = self.disk.assignments.get((TaskId(order.task_id), order.attempt))
        if row is None:
            self.fail(f"attempt {key} runs on {worker}, and no disk knows of it")
        self.world.note("runs", worker, key)

    def began(self, worker: str, order: TaskOrder) -> None:
        """Its first request leaves now."""
        row = self.disk.tasks[TaskId(order.task_id)]
        if not row.rate_key:
            return
        origin = self._origins.setdefault(row.rate_key, Origin())
        key = (order.task_id, order.attempt)
        options, now_ms = self.world.options, self.world.now_ms
        gap_ms = now_ms - origin.last_ms
        if gap_ms < options.delay_ms:
            self.fail(
                f"{row.rate_key} was hit by {worker} (attempt {key}) {gap_ms} ms after "
                f"{origin.last_by}: its delay is {options.delay_ms} ms"
            )
        # Of a worker that was given up, nobody knows whether its requests are still open.
        still_open = [one for one in origin.open if self._is_believed(one)]
        if options.concurrency and len(still_open) >= options.concurrency:
            self.fail(
                f"{row.rate_key} has {still_open} open, and {worker} begins {key}: "
                f"at most {options.concurrency} at once"
            )
        origin.last_ms, origin.last_by = now_ms, f"{worker} (attempt {key})"
        origin.open[key] = worker

    def ended(self, worker: str, order: TaskOrder, result: TaskResult, *, began: bool) -> None:
        """A run ended, and its worker knows."""
        key = (order.task_id, order.attempt)
        if key in self._ends:
            self.fail(f"attempt {key} ended twice")
        self._ends[key] = result
        self._leave(order)

    def assume_ended(self, worker: str, result: TaskResult) -> None:
        """As ended, for who has only its word."""
        key = (result.task_id, result.attempt)
        self._ordered.setdefault(key, worker)
        self._ends.setdefault(key, result)

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

    def _device_of(self, key: Key) -> str:
        return self._ordered[key].partition("'")[0]

    # --- clients --------------------------------------------------------------------------------

    def submitted(self, asked: Submit, answer: Submitted) -> None:
        """A client holds this receipt."""
        former = self.submissions.setdefault(asked.request_id, answer)
        if former != answer:
            self.fail(f"one request, two answers: {former}, then {answer}")
        for spec, task_id in zip(asked.tasks, map(TaskId, answer.task_ids), strict=True):
            row = self.disk.tasks.get(task_id)
            if row is None:
                self.fail(f"task {task_id} was acknowledged and is on no disk")
            if spec.unique_key:
                if row.unique_key != spec.unique_key or row.job_id != answer.job_id:
                    self.fail(f"{spec.unique_key!r} was answered with {_story(row)}")
            else:
                mark = fingerprint(spec)
                if self.promised.setdefault(task_id, mark) != mark:
                    self.fail(f"task {task_id} was given to two submissions")

    def cancel_acked(self, task_ids: Iterable[int], job_id: int) -> None:
        """A client was told that no new attempt of these starts any more."""
        for task_id in map(TaskId, task_ids):
            # A retry that is on its way may arrive after the cancel.
            if not self._retries_open[task_id]:
                self.cancelled[task_id] = self.disk.tasks[task_id].attempt
        if job_id and not any(self._retries_open.values()):
            self.cancelled_jobs.add(JobId(job_id))

    def retry_asked(self, task_ids: Iterable[int]) -> None:
        """A client wants these to have another life."""
        for task_id in map(TaskId, task_ids):
            self.revivable.add(task_id)
            self._retries_open[task_id] += 1
            self.cancelled.pop(task_id, None)
            self.cancelled_jobs.discard(self.disk.tasks[task_id].job_id)

    def retry_answered(self, task_ids: Iterable[int]) -> None:
        for task_id in map(TaskId, task_ids):
            self._retries_open[task_id] -= 1

    def heard_end(self, end: TaskEnd) -> None:
        """A client was told of an end."""
        row = self.disk.tasks.get(TaskId(end.task_id))
        if row is None:
            self.fail(f"a client was told of the end of task {end.task_id}, which is on no disk")
        if end.state is TaskState.COMPLETED and row.state is not TaskState.COMPLETED:
            self.fail(f"a client was told that task {end.task_id} completed: {_story(row)}")

    # --- at the end -----------------------------------------------------------------------------

    def judge(self) -> None:
        """All is quiet: nothing is open, nothing is missing, nothing is twice."""
        self.audit()
        for task_id in self.promised:
            if task_id not in self.disk.tasks:
                self.fail(f"task {task_id} was acknowledged and is gone")
        for key, task_id in self.disk.unique_keys.items():
            if task_id not in self.disk.tasks:
                self.fail(f"unique key {key} leads to task {task_id}, which is gone")
        self._judge_events()
        self._judge_sites()

    def _judge_events(self) -> None:
        """Every end that was no completion can be found out later."""
        told = Counter(
            (one.task_id, one.attempt) for one in self.disk.events if one.kind.startswith("task_")
        )
        for (task_id, number), row in self.disk.assignments.items():
            if row.outcome not in ("", "completed") and not told[task_id, number]:
                self.fail(f"attempt {number} of task {task_id} is {row.outcome}, without an event")

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


def _row(disk: NaiveStore, batch: Changes, task_id: TaskId) -> TaskRow:
    row = batch.tasks.get(task_id) or batch.new_tasks.get(task_id) or disk.tasks.get(task_id)
    if row is None:
        raise Violation(f"task {task_id} is named and was never there")
    return row


def _has_key(disk: NaiveStore, batch: Changes, job_id: JobId, unique_key: str) -> bool:
    from zmqcluster.core.intake import unique_hash

    key = (job_id, unique_hash(unique_key))
    return key in disk.unique_keys or any(
        (one.job_id, one.key_hash) == key for one in batch.unique_keys
    )


def _story(task: TaskRow) -> str:
    return (
        f"task {task.task_id} ({task.task_type}, {task.state}, attempt {task.attempt}, "
        f"{task.failures} failures, {task.deaths} deaths, last held by {task.device_id!r})"
    )
