"""What every room of the oracle has: the world, the disk, and a way to say what is wrong."""

from __future__ import annotations

from typing import Final, NoReturn

from tests.simulation.disk import Disk
from tests.simulation.world import Violation, World
from tests.support.naive_store import NaiveStore
from zmqcluster.core.effects import Changes
from zmqcluster.core.events import Peer
from zmqcluster.core.rows import AssignmentRow, TaskRow
from zmqcluster.model import DeviceId, TaskId, TaskState

# A task and the number of its attempt.
Key = tuple[int, int]

TERMINAL: Final = (TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED, TaskState.DEAD)
# How an attempt ends that the master no longer waits for.
GIVEN_UP: Final = ("device_lost", "dispatch_lost")


class Room:
    """disk: with what was pruned since, as it was before the commit that is being judged."""

    def __init__(self, world: World, disk: Disk) -> None:
        self.world = world
        self.disk: NaiveStore = disk.whole

    def fail(self, text: str) -> NoReturn:
        raise Violation(f"at {self.world.now_ms} ms: {text}")

    def task_row(self, batch: Changes, task_id: TaskId) -> TaskRow:
        """As it will be with this batch."""
        row = batch.tasks.get(task_id) or batch.new_tasks.get(task_id)
        row = row or self.disk.tasks.get(task_id)
        if row is None:
            raise Violation(f"task {task_id} is named and was never there")
        return row

    def attempt_row(self, batch: Changes, task_id: TaskId, number: int) -> AssignmentRow | None:
        """As it will be with this batch."""
        key = (task_id, number)
        return batch.assignments.get(key) or self.disk.assignments.get(key)


def device_of(peer: Peer) -> DeviceId:
    """Whose connection it is; a clone's name has a tick."""
    return DeviceId(peer.partition(b"#")[0].rstrip(b"'").decode())


def tells(batch: Changes, *kinds: str, **about: object) -> bool:
    """Is there an event of these kinds about this?"""
    return any(
        one.kind in kinds and all(getattr(one, name) == value for name, value in about.items())
        for one in batch.events
    )


def story(task: TaskRow) -> str:
    return (
        f"task {task.task_id} ({task.task_type}, {task.state}, attempt {task.attempt}, "
        f"{task.failures} failures, {task.deaths} deaths, last held by {task.device_id!r})"
    )
