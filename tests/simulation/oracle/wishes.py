"""What clients asked for, and what they were promised."""

from __future__ import annotations

from collections import Counter
from typing import Final

from tests.simulation.disk import Disk
from tests.simulation.oracle.room import Room, story
from tests.simulation.oracle.seen import Seen
from tests.simulation.workload import RETRIES_DEFAULT, TIMEOUT_MS_DEFAULT
from tests.simulation.world import World
from tests.support.history import Answer, Cancel
from zmqcluster.core.rows import JobRow, TaskRow
from zmqcluster.messages import (
    CancelTasks,
    ClientMessage,
    RetryTasks,
    Submit,
    Submitted,
    TaskSpec,
)
from zmqcluster.model import DeviceId, JobId, TaskId

# A request is repeated for 30 s, and a frame under way for 30 s more.
FORGOTTEN_MS: Final = 70_000
# After the faults end, the last downtime and the last stalled frame are over within this time.
ANSWERED_MS: Final = 25_000


class Wishes(Room):
    """What holds because somebody was told so: cancelled, cancelled_jobs, drained, revoked."""

    def __init__(self, world: World, disk: Disk, seen: Seen) -> None:
        super().__init__(world, disk)
        self._seen = seen
        # Attempt number at the moment a cancel was acknowledged.
        self.cancelled: dict[TaskId, int] = {}
        self.cancelled_jobs: set[JobId] = set()
        self.drained: set[DeviceId] = set()
        self.revoked: set[DeviceId] = set()
        # How often it was asked for.
        self.cancels: Counter[TaskId] = Counter()
        self.revivals: Counter[TaskId] = Counter()
        # Jobs of which somebody asked that they end.
        self.jobs_cancelled: set[JobId] = set()
        # Before when a task must not run, as its client said (wall clock), by its data.
        self.not_before: dict[bytes, int] = {}
        self._job_names: dict[str, JobId] = {}
        self._retried_ms: dict[TaskId, int] = {}
        self._retries_open: Counter[TaskId] = Counter()
        self._resumed_ms: dict[DeviceId, int] = {}

    def submit_asked(self, asked: Submit) -> None:
        """A client wants these to be carried out, some of them not at once."""
        self._seen.submits[asked.request_id] = asked
        for spec in asked.tasks:
            if spec.not_before_ms:
                self.not_before[spec.data] = spec.not_before_ms

    def submitted(self, asked: Submit, answer: Submitted) -> None:
        """A client holds this receipt."""
        former = self._seen.receipts.setdefault(asked.request_id, answer)
        if former != answer:
            self.fail(f"one request, two answers: {former}, then {answer}")
        for index, (spec, number) in enumerate(zip(asked.tasks, answer.task_ids, strict=True)):
            task = self.disk.tasks.get(TaskId(number))
            if task is None:
                self.fail(f"task {number} was acknowledged and is on no disk")
            if index not in answer.existing:
                self.check_spec(task, spec, JobId(answer.job_id))

    def refused(self, asked: ClientMessage) -> None:
        """A client was told that nothing comes of this."""
        self._seen.refused.add(asked.request_id)

    def unanswered(self, asked: ClientMessage) -> None:
        """A client asked for 30 s and got no answer."""
        healed_ms = self.world.healed_ms
        if healed_ms is not None and self.world.now_ms - healed_ms > ANSWERED_MS:
            self.fail(f"nobody answered {type(asked).__name__} though nothing was wrong any more")

    def cancel_asked(self, asked: CancelTasks) -> None:
        """A client wants these, or this job, to end."""
        self._seen.cancels[asked.request_id] = (asked, self.world.now_ms)
        self.cancels.update(map(TaskId, asked.task_ids))
        if asked.job_id:
            self.jobs_cancelled.add(JobId(asked.job_id))

    def cancel_acked(self, asked: CancelTasks, task_ids: tuple[int, ...]) -> None:
        """A client was told that no new attempt of these starts any more."""
        _, asked_ms = self._seen.cancels[asked.request_id]
        self._seen.cancelled[asked.request_id] = Cancel(
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

    def retry_asked(self, asked: RetryTasks) -> None:
        """A client wants these to have another life."""
        self._seen.retries[asked.request_id] = (asked, self.world.now_ms)
        for task_id in map(TaskId, asked.task_ids):
            if task_id not in self.disk.tasks:
                continue
            self.revivals[task_id] += 1
            self._retried_ms[task_id] = self.world.now_ms
            self._retries_open[task_id] += 1
            self.live_again(self.disk.tasks[task_id])

    def retry_answered(self, asked: RetryTasks, task_ids: tuple[int, ...]) -> None:
        """task_ids: those that have another life."""
        self._seen.retried[asked.request_id] = (self.world.now_ms, task_ids)
        for task_id in map(TaskId, asked.task_ids):
            self._retries_open[task_id] -= 1
            # Until now it may have been carried out.
            self._retried_ms[task_id] = self.world.now_ms

    def live_again(self, task: TaskRow) -> None:
        """Of this task, and of its job as a whole, no cancel holds any more."""
        self.cancelled.pop(task.task_id, None)
        self.cancelled_jobs.discard(task.job_id)

    def drain_acked(self, device_id: DeviceId) -> None:
        """A client was told that this device is given no new tasks."""
        # An older order to resume, or a copy of it, may still be under way.
        if self.world.now_ms - self._resumed_ms.get(device_id, -FORGOTTEN_MS) > FORGOTTEN_MS:
            self.drained.add(device_id)

    def resume_asked(self, device_id: DeviceId) -> None:
        self._resumed_ms[device_id] = self.world.now_ms
        self.drained.discard(device_id)

    def revoke_acked(self, device_id: DeviceId) -> None:
        self.revoked.add(device_id)

    def check_job(self, job: JobRow) -> None:
        if job.name and self._job_names.setdefault(job.name, job.job_id) != job.job_id:
            self.fail(f"one request made two jobs of the name {job.name!r}")

    def check_spec(self, task: TaskRow, spec: TaskSpec, job_id: JobId) -> None:
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
            self.fail(f"{story(task)} is {kept}, and what was asked for is {asked}")
