"""What waits in the master's memory: no more than it may hold, and the urgent before others."""

from __future__ import annotations

from msgspec import Struct

from zmqcluster.core.effects import Changes
from zmqcluster.core.state import MasterState
from zmqcluster.model import TaskId, TaskState


class Waiting(Struct):
    """Of one master. in_flight_max: so many it had given out at once at most.

    urgent: by type and labels, the most urgent task that had no rate key, with its priority, when
    the turn before was over.
    """

    in_flight_max: int = 0
    urgent: dict[tuple[str, str], tuple[int, TaskId]] = {}

    def too_many(self, state: MasterState) -> int:
        """How many more there are than there is room for.

        What was given out comes back however full it is; a window that is full takes in no more.
        """
        self.in_flight_max = max(self.in_flight_max, len(state.flights))
        return len(state.queue) - state.settings.window_tasks - self.in_flight_max

    def look(self, state: MasterState) -> None:
        """Remember what is urgent now; after a turn."""
        for key, lane in state.queue.lanes.items():
            if key.rate_key or not lane.count:
                continue
            known = self.urgent.get((key.task_type, key.labels))
            if known is None or known[0] < key.priority:
                # Its first entries may be stale.
                first = next(one.task_id for one in lane.tasks if one.task_id in state.queue)
                self.urgent[key.task_type, key.labels] = (key.priority, first)

    def passed_over(self, state: MasterState, changes: Changes) -> str:
        """Who was given out in this turn before somebody more urgent that waited all the time."""
        for (task_id, _), row in changes.assignments.items():
            task = state.tasks.get(task_id)
            if row.outcome or task is None or task.state is not TaskState.ASSIGNED:
                continue
            priority, waiting = self.urgent.get((task.task_type, task.labels), (-1, TaskId(0)))
            if priority > task.priority and waiting in state.queue:
                return (
                    f"task {task_id} of priority {task.priority} is given out before task "
                    f"{waiting} of priority {priority}, which any device can run that runs it"
                )
        return ""
