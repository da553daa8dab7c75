"""The nouns of the ready queue: shapes, and the lanes they consist of."""

from __future__ import annotations

from collections import OrderedDict, deque

from zmqcluster.core.events import LaneKey
from zmqcluster.core.rates import RateKey
from zmqcluster.core.rows import TaskRow


class Shape:
    """All ready tasks of one type and label set, and the lanes that may give one now.

    is_asleep: no device can take any; fleet.py knows when that may have changed. is_stranded: nor
    will any that is online. rotations, starving: by priority, lanes that may give a task now, and
    those that have to be read first (core/hunger.py).
    """

    __slots__ = (
        "gone",
        "is_asleep",
        "is_stranded",
        "key",
        "labels",
        "lanes",
        "rotations",
        "starving",
        "task_type",
    )

    def __init__(self, task_type: str, labels: str) -> None:
        self.key = (task_type, labels)
        self.task_type = task_type
        self.labels = tuple(labels.split(",")) if labels else ()
        self.rotations: dict[int, deque[Lane]] = {}
        self.starving: dict[int, OrderedDict[Lane, None]] = {}
        self.lanes = 0
        self.is_asleep = self.is_stranded = False
        # Lanes that were dropped and may still be in a rotation.
        self.gone = 0

    def first_starving(self, priority: int) -> Lane:
        return next(iter(self.starving[priority]))


class Lane:
    """Ready tasks alike in type, labels, rate key and priority, oldest first.

    count: live entries of `tasks`, which may also hold stale ones. more: the database has others.
    cursor: it has been read up to this id. loading: how many tasks the read under way may bring.
    is_hungry, is_starving: it waits for its turn to be read, in the queue of that name.
    spilled_id: the first of the tasks that went to the database only since that read was asked for;
    0: none.
    gave_ms: when it last gave a task, or was made.
    """

    __slots__ = (
        "count",
        "cursor",
        "gave_ms",
        "is_hungry",
        "is_starving",
        "key",
        "loading",
        "more",
        "rate",
        "rotated",
        "shape",
        "spilled_id",
        "tasks",
    )

    def __init__(self, key: LaneKey, shape: Shape, rate: RateKey | None, now_ms: int) -> None:
        self.key = key
        self.gave_ms = now_ms
        self.shape = shape
        self.rate = rate
        self.tasks: deque[TaskRow] = deque()
        self.count = 0
        self.rotated = False
        self.more = False
        self.is_hungry = self.is_starving = False
        self.cursor = 0
        self.loading = 0
        self.spilled_id = 0

    def spill(self, task: TaskRow) -> None:
        """This one is on disk only; a read under way may not know of it."""
        self.spilled_id = min(self.spilled_id or task.task_id, task.task_id)
