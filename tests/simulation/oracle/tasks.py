"""What becomes of tasks: no end that nothing led to, neither too few tries nor too many."""

from __future__ import annotations

from collections import Counter
from typing import Final

from tests.simulation.disk import Disk
from tests.simulation.oracle.attempts import Attempts
from tests.simulation.oracle.room import TERMINAL, Room, story, tells
from tests.simulation.oracle.wishes import Wishes
from tests.simulation.world import World
from zmqcluster.core.effects import Changes
from zmqcluster.core.intake import unique_hash
from zmqcluster.core.rows import RecordRow, TaskRow
from zmqcluster.model import JobId, Outcome, TaskId, TaskState

IN_FLIGHT: Final = (TaskState.ASSIGNED, TaskState.RUNNING)
DEATHS_MAX: Final = 3
_FAILING: Final = ("failed", "retry", "timed_out", "rejected")
_LAST_WORDS: Final = tuple(f"task_{one}" for one in Outcome)


class Tasks(Room):
    """Held against what was wished for and how their attempts ended."""

    def __init__(self, world: World, disk: Disk, wishes: Wishes, attempts: Attempts) -> None:
        super().__init__(world, disk)
        self._wishes = wishes
        self._attempts = attempts
        # How often it happened.
        self._cancels: Counter[TaskId] = Counter()
        self._revivals: Counter[TaskId] = Counter()

    def check_new(self, batch: Changes, task: TaskRow) -> None:
        if task.task_id in self.disk.tasks:
            self.fail(f"task id {task.task_id} is given twice")
        if task.parent_id:
            parent = self.task_row(batch, task.parent_id)
            if parent.state is not TaskState.COMPLETED:
                self.fail(f"{story(task)} is a child of {story(parent)}")
        if task.state is TaskState.COMPLETED:
            self._check_completed(batch, task)

    def check_change(self, batch: Changes, former: TaskRow, task: TaskRow) -> None:
        if task.attempt < former.attempt:
            self.fail(f"the attempt number fell: {story(former)}, then {story(task)}")
        if former.state in TERMINAL:
            self._check_revival(former, task)
        is_wanted_to_end = task.cancel_requested and not former.cancel_requested
        wanted = ("cancel_requested", "task_cancelled")
        if is_wanted_to_end and not tells(batch, *wanted, task_id=task.task_id):
            self.fail(f"somebody wants {story(task)} to end, and no event says so")
        if task.state is TaskState.COMPLETED and former.state is not TaskState.COMPLETED:
            self._check_completed(batch, task)
        elif task.state is TaskState.DEAD and former.state is not TaskState.DEAD:
            deaths = self._attempts.deaths(batch, task)
            if deaths < DEATHS_MAX:
                self.fail(f"{story(task)} after {deaths} deaths")
            self._check_error(batch, task)
        elif task.state is TaskState.CANCELLED and former.state is not TaskState.CANCELLED:
            self._cancels[task.task_id] += 1
            is_asked = self._cancels[task.task_id] <= self._wishes.cancels[task.task_id]
            if task.job_id in self._wishes.jobs_cancelled:
                return
            if not is_asked:
                self.fail(f"{story(task)}, and nobody asked for that (again)")
            # However its last attempt ended.
            if not tells(batch, *_LAST_WORDS, task_id=task.task_id, attempt=task.attempt):
                self.fail(f"{story(task)}, and no event says so")
        elif task.state is TaskState.FAILED and former.state is not TaskState.FAILED:
            self._check_failed(batch, task)
        elif task.state in IN_FLIGHT:
            self._check_in_flight(batch, task)
        elif task.state is TaskState.PENDING and former.state in IN_FLIGHT:
            self._check_another_try(batch, task)

    def check_record(self, batch: Changes, record: RecordRow) -> None:
        holder = self.task_row(batch, record.task_id)
        if holder.state is not TaskState.COMPLETED or holder.attempt != record.attempt:
            self.fail(f"a record of attempt {record.attempt} of {story(holder)} was kept")

    def _check_revival(self, former: TaskRow, task: TaskRow) -> None:
        if former.state is TaskState.COMPLETED:
            self.fail(f"{story(former)} became {story(task)}")
        if (task.state, task.attempt) != (former.state, former.attempt):
            self._revivals[task.task_id] += 1
            if self._revivals[task.task_id] > self._wishes.revivals[task.task_id]:
                self.fail(f"nobody asked for it (again), and {story(former)} became {story(task)}")
            self._attempts.revived(task.task_id, former.attempt)
            self._wishes.live_again(task)

    def _check_completed(self, batch: Changes, task: TaskRow) -> None:
        key = (task.task_id, task.attempt)
        end = self._attempts.ends.get(key)
        if end is None or end.outcome is not Outcome.COMPLETED:
            self.fail(f"{story(task)}, and no run of that attempt completed")
        if task.task_id in self._wishes.cancelled or task.job_id in self._wishes.cancelled_jobs:
            self.fail(f"{story(task)} after its cancel was acknowledged")
        for child in end.children:
            child_id = self._holder(batch, task.job_id, child.unique_key)
            if child_id is None:
                self.fail(f"{story(task)} without its child {child.unique_key}")
            row = self.task_row(batch, child_id)
            if row.parent_id == task.task_id:
                self._wishes.check_spec(row, child, task.job_id)

    def _check_failed(self, batch: Changes, task: TaskRow) -> None:
        self._check_error(batch, task)
        if self._attempts.outcomes(batch, task, ("rejected",)):
            return
        failures = self._attempts.outcomes(batch, task, _FAILING)
        if failures <= task.max_retry_count:
            self.fail(f"{story(task)} after {failures} failures of {task.max_retry_count} + 1")

    def _check_error(self, batch: Changes, task: TaskRow) -> None:
        """What went wrong last is what people read first."""
        row = self.attempt_row(batch, task.task_id, task.attempt)
        if row is not None and row.error != task.error:
            self.fail(f"{story(task)} tells {task.error!r}, its last attempt {row.error!r}")

    def _check_another_try(self, batch: Changes, task: TaskRow) -> None:
        if task.attempt <= min(task.max_retry_count, DEATHS_MAX - 1):
            return
        failures = self._attempts.outcomes(batch, task, _FAILING)
        if failures > task.max_retry_count:
            self.fail(f"{story(task)} after {failures} failures: it is tried once too often")
        deaths = self._attempts.deaths(batch, task)
        if deaths >= DEATHS_MAX:
            self.fail(f"{story(task)} after {deaths} deaths: it is tried once too often")

    def _check_in_flight(self, batch: Changes, task: TaskRow) -> None:
        attempt = self.attempt_row(batch, task.task_id, task.attempt)
        if attempt is None or attempt.outcome:
            self.fail(f"{story(task)} is out, and its attempt is {attempt}")

    def _holder(self, batch: Changes, job_id: JobId, unique_key: str) -> TaskId | None:
        key = (job_id, unique_hash(unique_key))
        if key in self.disk.unique_keys:
            return self.disk.unique_keys[key]
        return next(
            (one.task_id for one in batch.unique_keys if (one.job_id, one.key_hash) == key), None
        )
