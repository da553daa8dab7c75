"""What becomes of attempts: in order, on disk before they run, run once, and kept as they ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tests.simulation.disk import Disk
from tests.simulation.oracle.room import GIVEN_UP, Key, Room, story, tells
from tests.simulation.oracle.wishes import Wishes
from tests.simulation.world import World
from zmqcluster.core.effects import Changes
from zmqcluster.core.rows import AssignmentRow, TaskRow
from zmqcluster.messages import TaskOrder, TaskResult
from zmqcluster.model import DeviceId, Outcome, TaskId

# Nothing that went wrong is tried again sooner.
BACKOFF_MS: Final = 500
_BACKED_OFF: Final = (Outcome.FAILED, Outcome.RETRY, Outcome.TIMED_OUT, Outcome.DIED)


class Attempts(Room):
    """ends: of runs, as their workers know them."""

    def __init__(self, world: World, disk: Disk, wishes: Wishes) -> None:
        super().__init__(world, disk)
        self._wishes = wishes
        self.ends: dict[Key, TaskResult] = {}
        # Of tasks that have another life.
        self._first_attempt: dict[TaskId, int] = {}
        self._ordered: dict[Key, str] = {}
        # Before when not again, as the last run said.
        self._not_again: dict[Key, int] = {}

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

    def ended(self, order: TaskOrder, result: TaskResult) -> None:
        """A run ended, and its worker knows."""
        key = (order.task_id, order.attempt)
        if key in self.ends:
            self.fail(f"attempt {key} ended twice")
        self.ends[key] = result
        if result.outcome in _BACKED_OFF:
            self._not_again[key] = self.world.now_ms + max(result.retry_after_ms, BACKOFF_MS)

    def assume_ended(self, worker: str, result: TaskResult) -> None:
        """As ended, for who has only its word."""
        key = (result.task_id, result.attempt)
        self._ordered.setdefault(key, worker)
        self.ends.setdefault(key, result)

    def settled(self, worker: str, device_id: DeviceId, key: Key) -> None:
        """A worker was told that the master has this end on disk."""
        row = self.disk.assignments.get((TaskId(key[0]), key[1]))
        if row is not None and row.device_id == device_id and not row.outcome:
            self.fail(f"{worker} forgets its end of {key}, which no disk has")

    def check_attempt(
        self, batch: Changes, key: tuple[TaskId, int], attempt: AssignmentRow
    ) -> None:
        task_id, number = key
        former = self.disk.assignments.get(key)
        task = self.task_row(batch, task_id)
        end = self.ends.get(key)
        if end is not None and attempt.outcome == end.outcome and attempt.error != end.error:
            self.fail(f"attempt {number} of {story(task)} said {end.error!r}: {attempt.error!r}")
        if former is None:
            if number > 1 and self.attempt_row(batch, task_id, number - 1) is None:
                self.fail(f"attempt {number} of {story(task)} follows no attempt {number - 1}")
            if attempt.device_id in self._wishes.drained:
                self.fail(f"attempt {number} of {story(task)} began after its device was drained")
            if attempt.device_id in self._wishes.revoked:
                self.fail(f"attempt {number} of {story(task)} began after its device lost its key")
            self._check_moment(batch, task, number)
            acked = self._wishes.cancelled.get(task_id)
            if acked is not None and number > acked:
                self.fail(f"attempt {number} of {story(task)} began after its cancel was acked")
            if task.job_id in self._wishes.cancelled_jobs:
                self.fail(f"attempt {number} of {story(task)} began in a job cancelled before")
        elif former.device_id != attempt.device_id:
            self.fail(f"attempt {number} of {story(task)} changed hands")
        elif former.outcome in GIVEN_UP and attempt.outcome not in GIVEN_UP:
            back = ("result_salvaged", "attempt_adopted")
            if not tells(batch, *back, task_id=task_id, attempt=number):
                self.fail(f"attempt {number} of {story(task)} is back, and no event says so")
        elif former.outcome == "completed" and attempt.outcome != "completed":
            self.fail(f"attempt {number} of {story(task)} had completed, now {attempt.outcome!r}")

    def outcomes(self, batch: Changes, task: TaskRow, wanted: tuple[str, ...]) -> int:
        """How many attempts of this life of the task ended so."""
        return sum(row.outcome in wanted for row in self._of_life(batch, task))

    def deaths(self, batch: Changes, task: TaskRow) -> int:
        """How many attempts of this life died, alone or (as far as was known) with their device."""
        return sum(
            row.outcome == "died" or (row.outcome == "device_lost" and row.started_wall > 0)
            for row in self._of_life(batch, task)
        )

    def revived(self, task_id: TaskId, attempt: int) -> None:
        """It begins another life after this attempt."""
        self._first_attempt[task_id] = attempt + 1

    def _of_life(self, batch: Changes, task: TaskRow) -> Iterator[AssignmentRow]:
        for number in range(self._first_attempt.get(task.task_id, 1), task.attempt + 1):
            row = self.attempt_row(batch, task.task_id, number)
            if row is not None:
                yield row

    def _check_moment(self, batch: Changes, task: TaskRow, number: int) -> None:
        """Nothing is handed out before its time."""
        world = self.world
        if world.options.wall_steps_every_ms:
            # Schedules follow the wall clock; so does the master's own while it is down.
            return
        early_ms = self._wishes.not_before.get(task.task_data, 0) - world.wall_ms
        # Who wants it again wants it now.
        if early_ms > 0 and task.task_id not in self._first_attempt:
            self.fail(f"attempt {number} of {story(task)} is out {early_ms} ms before its moment")
        before = (task.task_id, number - 1)
        former = self.attempt_row(batch, *before)
        early_ms = self._not_again.get(before, 0) - world.now_ms
        is_own_word = former is not None and former.outcome in _BACKED_OFF
        if is_own_word and early_ms > 0 and self._first_attempt.get(task.task_id, 1) < number:
            self.fail(f"attempt {number} of {story(task)} is out {early_ms} ms before its retry")
