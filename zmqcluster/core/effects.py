"""What the master must do: the only outputs of MasterCore.handle().

The runtime commits `changes` in one transaction, and only then sends `sends` and grants `keys`.
"""

from __future__ import annotations

from msgspec import Struct, field

from zmqcluster.core.events import LaneKey, Peer, Principal
from zmqcluster.core.rows import (
    AssignmentRow,
    DeviceRow,
    EventRow,
    HeartbeatRow,
    JobRow,
    KeyRow,
    RateKeyRow,
    RecordRow,
    SubmissionRow,
    TaskRow,
    TokenRow,
    UniqueKeyRow,
)
from zmqcluster.messages import Hint, Outbound
from zmqcluster.model import DeviceId, JobId, TaskId


class Send(Struct, frozen=True):
    """Hand this message to this peer, without waiting; report PeerLost when nobody is there."""

    peer: Peer
    message: Outbound


class Publish(Struct, frozen=True):
    """Broadcast a hint."""

    hint: Hint


class AllowKey(Struct, frozen=True):
    """From now on this public key may connect, as this principal."""

    public_key: bytes
    principal: Principal


class DenyKey(Struct, frozen=True):
    """From now on nothing of this public key passes, connected or not."""

    public_key: bytes


class LoadBacklog(Struct, frozen=True):
    """Read ready tasks of this lane with an id above after_id, in id order, at most limit."""

    lane: LaneKey
    after_id: int
    limit: int


class ListLanes(Struct, frozen=True):
    """Read the distinct lanes of ready tasks after this one (None: from the first), in order."""

    after: LaneKey | None
    limit: int


class LoadDelayed(Struct, frozen=True):
    """Read pending tasks with retry_at_ms or not_before_wall, soonest first, at most limit."""

    limit: int


class LoadOpenTasks(Struct, frozen=True):
    """Read pending tasks of this job with an id above after_id, in id order, at most limit."""

    job_id: JobId
    after_id: int
    limit: int


class Log(Struct, frozen=True):
    """A line for the operator. level: "info", "warning" or "error"."""

    level: str
    text: str


Action = (
    Send
    | Publish
    | AllowKey
    | DenyKey
    | LoadBacklog
    | ListLanes
    | LoadDelayed
    | LoadOpenTasks
    | Log
)


class Changes(Struct):
    """What one or several turns changed, the last row of each thing winning.

    Applied in one transaction, in the order of the fields. Mappings are keyed by what makes a row
    unique; plain lists are only ever appended to.
    """

    new_tasks: dict[TaskId, TaskRow] = field(default_factory=dict)
    unique_keys: list[UniqueKeyRow] = field(default_factory=list)
    tasks: dict[TaskId, TaskRow] = field(default_factory=dict)
    assignments: dict[tuple[TaskId, int], AssignmentRow] = field(default_factory=dict)
    jobs: dict[JobId, JobRow] = field(default_factory=dict)
    devices: dict[DeviceId, DeviceRow] = field(default_factory=dict)
    heartbeats: list[HeartbeatRow] = field(default_factory=list)
    rate_keys: dict[str, RateKeyRow] = field(default_factory=dict)
    keys: dict[bytes, KeyRow] = field(default_factory=dict)
    tokens: dict[str, TokenRow] = field(default_factory=dict)
    submissions: list[SubmissionRow] = field(default_factory=list)
    records: dict[tuple[str, str], RecordRow] = field(default_factory=dict)
    events: list[EventRow] = field(default_factory=list)
    # Cluster and wall time at the end of the turn; 0: saved a moment ago.
    clock_ms: int = 0
    wall_ms: int = 0
    # Delete terminal tasks finished before this wall instant, a small step at a time; 0: none.
    prune_before_wall: int = 0

    def add(self, later: Changes) -> None:
        """Take over a later turn's changes, whose rows win."""
        self.new_tasks.update(later.new_tasks)
        self.unique_keys += later.unique_keys
        self.tasks.update(later.tasks)
        self.assignments.update(later.assignments)
        self.jobs.update(later.jobs)
        self.devices.update(later.devices)
        self.heartbeats += later.heartbeats
        self.rate_keys.update(later.rate_keys)
        self.keys.update(later.keys)
        self.tokens.update(later.tokens)
        self.submissions += later.submissions
        self.records.update(later.records)
        self.events += later.events
        self.clock_ms = later.clock_ms or self.clock_ms
        self.wall_ms = later.wall_ms or self.wall_ms
        self.prune_before_wall = later.prune_before_wall or self.prune_before_wall

    @property
    def size(self) -> int:
        """How many task rows there are to write: what a commit takes time for."""
        return len(self.new_tasks) + len(self.tasks) + len(self.unique_keys)


class Turn(Struct):
    """All that came of one batch of events.

    number: counts the turns of this master from 1. writes: there is something to commit.
    """

    number: int
    changes: Changes
    actions: list[Action]
    writes: bool
