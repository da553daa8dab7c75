"""What people are told: that an end is the one on disk, and that what happened has its event."""

from __future__ import annotations

from tests.simulation.disk import Disk
from tests.simulation.oracle.room import Key, Room, story, tells
from tests.simulation.oracle.seen import Seen
from tests.simulation.world import World
from tests.support.history import Told
from zmqcluster.core.effects import Changes
from zmqcluster.core.rows import JobRow, KeyRow
from zmqcluster.messages import TaskEnd
from zmqcluster.model import JobState, TaskId


class News(Room):
    """Of ends, revoked keys and cancelled jobs."""

    def __init__(self, world: World, disk: Disk, seen: Seen) -> None:
        super().__init__(world, disk)
        self._seen = seen
        self._pruned = disk.pruned
        # How tasks ended, as was on disk once: state, result and error (None: of no interest).
        self._ended: dict[Key, list[tuple[str, bytes | None, str]]] = {}

    def note_end(self, key: Key, state: str, result: bytes | None, error: str) -> None:
        self._ended.setdefault(key, []).append((state, result, error))

    def check_key(self, batch: Changes, key: KeyRow) -> None:
        former = self.disk.keys.get(key.public_key)
        is_news = key.revoked_wall and not (former is not None and former.revoked_wall)
        if is_news and not tells(batch, "key_revoked", device_id=key.device_id):
            self.fail(f"a key of {key.device_id} is revoked, and no event says so")

    def check_cancelled_job(self, batch: Changes, job: JobRow) -> None:
        former = self.disk.jobs.get(job.job_id)
        is_news = former is None or former.state is not JobState.CANCELLED
        if is_news and not tells(batch, "job_cancelled", job_id=job.job_id):
            self.fail(f"job {job.job_id} is cancelled, and no event says so")

    def heard_end(self, end: TaskEnd) -> None:
        """A client was told of an end."""
        is_gone = end.error == "there is no such task" and not end.attempt
        if is_gone and TaskId(end.task_id) in self._pruned:
            return
        self._seen.told.append(Told(end.task_id, end.state, end.attempt, self.world.now_ms))
        row = self.disk.tasks.get(TaskId(end.task_id))
        if row is None:
            self.fail(f"a client was told of the end of task {end.task_id}, which is on no disk")
        told = (end.state, end.result, end.error)
        ended = self._ended.get((end.task_id, end.attempt), ())
        if told in ended or (end.state, None, "") in ended:
            return
        self.fail(
            f"a client was told that attempt {end.attempt} of task {end.task_id} is {end.state}, "
            f"{end.error!r}, with {len(end.result)} B: {story(row)}"
        )
