"""What can happen to the master: the only inputs of MasterCore.handle()."""

from __future__ import annotations

from msgspec import Struct, field

from zmqcluster.core.rows import JobRow, RateKeyRow, TaskRow
from zmqcluster.messages import Inbound
from zmqcluster.model import DeviceId, JobId, Role, TaskId

# A peer is whatever the runtime needs to answer: a ROUTER routing id, or a ticket of a caller in
# this process. The core only compares it.
Peer = bytes


class Principal(Struct, frozen=True):
    """Who the transport proved a peer to be.

    device_id: the device a worker's key is bound to; empty for clients.
    token_id: the join token whose bootstrap key an enrolling peer holds.
    """

    role: Role
    device_id: DeviceId = DeviceId("")
    token_id: str = ""


class Facts(Struct, frozen=True):
    """What the database knew when a request came in; the core overlays what it did since.

    submitted: (job_id, task_ids, existing) of an earlier request with the same request_id.
    keys: (job_id, key hash) of a unique key -> its task. tasks, jobs: rows the request names.
    rates: all rate keys that were asked for, those without a row too.
    """

    submitted: tuple[JobId, tuple[TaskId, ...], tuple[int, ...]] | None = None
    keys: dict[tuple[JobId, bytes], TaskId] = field(default_factory=dict)
    tasks: dict[TaskId, TaskRow] = field(default_factory=dict)
    jobs: dict[JobId, JobRow] = field(default_factory=dict)
    rates: dict[str, RateKeyRow] = field(default_factory=dict)


class MessageReceived(Struct, frozen=True):
    """A decoded message from an authenticated peer."""

    peer: Peer
    principal: Principal
    message: Inbound
    facts: Facts = Facts()


class PeerLost(Struct, frozen=True):
    """The connection of this peer is closed, or a send to it found nobody."""

    peer: Peer


class TurnedAway(Struct, frozen=True):
    """The loop refused or dropped something before it was a message for the core.

    kind: the event and counter to be. device_id: whose it was; "" for a client, or a stranger.
    """

    kind: str
    device_id: str
    detail: str


class FramesDropped(Struct, frozen=True):
    """A peer does not read, and what waited for it grew too long: the rest was dropped.

    Told once while this lasts. Inventories (devices) and repeated questions (clients) repair it.
    """

    peer: Peer


class Noticed(Struct, frozen=True):
    """The loop noticed something about its own process that an operator has to know.

    kind: the event and counter to be. level, detail: of the line in the log.
    """

    kind: str
    level: str
    detail: str


class BacklogLoaded(Struct, frozen=True):
    """Answer to LoadBacklog. rows: ready tasks of that lane in order; more: the lane has others."""

    lane: LaneKey
    rows: tuple[TaskRow, ...]
    more: bool


class LanesListed(Struct, frozen=True):
    """Answer to ListLanes. more: there are lanes after the last one listed.

    rates: the rate keys of all of them, those without a row too.
    """

    lanes: tuple[LaneKey, ...]
    more: bool
    rates: dict[str, RateKeyRow] = field(default_factory=dict)


class DelayedLoaded(Struct, frozen=True):
    """Answer to LoadDelayed: waiting tasks, soonest first. more: there are later ones.

    rates: the rate keys of all of them, those without a row too.
    """

    rows: tuple[TaskRow, ...]
    more: bool
    rates: dict[str, RateKeyRow] = field(default_factory=dict)


class OpenTasksLoaded(Struct, frozen=True):
    """Answer to LoadOpenTasks: pending tasks of a cancelled job.

    next_id: ask again with this after_id, even when there were no rows; 0: that was all.
    """

    job_id: JobId
    rows: tuple[TaskRow, ...]
    next_id: int


class Committed(Struct, frozen=True):
    """Everything decided in turns up to this one is on disk.

    prune_more: the step of pruning among it found more than it may delete at once.
    """

    turn: int
    prune_more: bool = False


class Tick(Struct, frozen=True):
    """Time passed. wall_ms: the wall clock, for rows, people and user schedules only."""

    wall_ms: int


class LaneKey(Struct, frozen=True, order=True):
    """Names one queue of ready tasks: same type, labels, rate key and priority.

    labels: as stored in a row: sorted, joined by commas.
    """

    task_type: str
    labels: str
    rate_key: str
    priority: int


Event = (
    MessageReceived
    | PeerLost
    | TurnedAway
    | FramesDropped
    | Noticed
    | BacklogLoaded
    | LanesListed
    | DelayedLoaded
    | OpenTasksLoaded
    | Committed
    | Tick
)
