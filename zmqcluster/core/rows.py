"""The shapes in which the core and the storage exchange what is kept.

A row is the whole truth about its thing after a turn, never a delta: the last one wins, so a batch
of turns shrinks to one row a thing, and a restart rebuilds the core from rows alone. Columns of the
database have the names of these fields (storage/schema.py). `*_wall` are wall-clock ms for people
and user schedules; `*_ms` instants are cluster time, which wall-clock steps do not move.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from msgspec import Struct

from zmqcluster.model import DeviceId, JobId, JobState, TaskId, TaskState

# A task's cost in memory beside its data: the row, its strings and its place in a queue.
_ROW_BYTES: Final = 600


class Row(Struct, gc=False):
    """Mutable inside the core, and frozen by copying when it leaves."""


class GivenUp(IntEnum):
    """Did the last attempt end without a word from its holder? Only then may one still come."""

    NO = 0
    LOST = 1
    # ... and the loss was counted as a death, which a later word takes back.
    DIED = 2


class TaskRow(Row):
    """One task. labels: sorted, joined by commas. Wall instants: 0 is "not yet"/"at once".

    device_id: the holder of the current (or last) attempt. retry_at_ms: cluster time before which
    it must not run again; not_before_wall: the user's own schedule.
    """

    task_id: TaskId
    job_id: JobId
    parent_id: TaskId
    task_type: str
    labels: str
    rate_key: str
    unique_key: str
    priority: int
    max_retry_count: int
    timeout_ms: int
    created_wall: int
    task_data: bytes
    # Everything below changes in a task's life.
    state: TaskState = TaskState.PENDING
    attempt: int = 0
    failures: int = 0
    deaths: int = 0
    cancel_requested: bool = False
    not_before_wall: int = 0
    retry_at_ms: int = 0
    device_id: DeviceId = DeviceId("")
    assigned_wall: int = 0
    started_wall: int = 0
    finished_wall: int = 0
    result: bytes = b""
    error: str = ""
    given_up: int = GivenUp.NO

    @property
    def memory_bytes(self) -> int:
        """What it costs to keep it waiting in memory."""
        return _ROW_BYTES + len(self.task_data)


class AssignmentRow(Row):
    """One attempt of one task: who held it, and how it ended ("" while it has not)."""

    task_id: TaskId
    attempt: int
    device_id: DeviceId
    epoch: int
    assigned_wall: int
    started_wall: int = 0
    ended_wall: int = 0
    outcome: str = ""
    run_us: int = 0
    error: str = ""


class JobRow(Row):
    """A group of tasks with exact counts by state, kept in the same transaction as the tasks."""

    job_id: JobId
    name: str
    state: JobState
    created_wall: int
    finished_wall: int = 0
    pending: int = 0
    running: int = 0  # assigned or running
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    dead: int = 0


class DeviceRow(Row):
    """A device as last seen. The three texts are JSON arrays/objects for people and REST."""

    device_id: DeviceId
    name: str
    state: str
    host: str
    platform: str
    cpu_count: int
    memory_bytes: int
    addresses: str
    task_types: str
    labels: str
    slots: int
    boot_id: str
    drained: bool
    registered_wall: int
    last_seen_wall: int
    completed: int = 0
    failed: int = 0
    lost: int = 0


class HeartbeatRow(Row):
    """A sample of a device's heartbeats."""

    device_id: DeviceId
    at_wall: int
    cpu_pct: float
    memory_pct: float
    memory_bytes: int
    disk_pct: float
    net_sent_bps: int
    net_received_bps: int
    running: int
    assigned: int


class RateKeyRow(Row):
    """The limits of one rate key. next_at_ms, closed_until_ms: cluster time.

    job_id: whose submission set limits; 0 if only devices did. epoch, changed_wall: of the master
    that wrote it, and when.
    """

    rate_key: str
    delay_ms: int = 0
    concurrency: int = 0
    next_at_ms: int = 0
    closed_until_ms: int = 0
    job_id: JobId = JobId(0)
    epoch: int = 0
    changed_wall: int = 0


class KeyRow(Row):
    """An enrolled public key. revoked_wall: 0 while it is good."""

    public_key: bytes
    role: str
    device_id: DeviceId
    token_id: str
    created_wall: int
    revoked_wall: int = 0


class TokenRow(Row):
    """A join token: only the public half of its bootstrap key is kept."""

    token_id: str
    public_key: bytes
    role: str
    created_wall: int
    expires_wall: int
    uses_left: int
    revoked_wall: int = 0


class UniqueKeyRow(Row):
    """key_hash: 16 bytes of BLAKE2b over the unique key; it outlives its task's row."""

    job_id: JobId
    key_hash: bytes
    task_id: TaskId


class SubmissionRow(Row):
    """The answer given to a request_id, for a client that asks again. existing: positions."""

    request_id: bytes
    job_id: JobId
    task_ids: tuple[TaskId, ...]
    existing: tuple[int, ...]
    at_wall: int


class EventRow(Row):
    """Something a person should be able to find out later. Zero and "" mean "none"."""

    at_wall: int
    kind: str
    task_id: int = 0
    attempt: int = 0
    job_id: int = 0
    device_id: str = ""
    detail: str = ""


class RecordRow(Row):
    """A catalogue row that came with an accepted result: upserted by (table_name, key)."""

    table_name: str
    key: str
    job_id: JobId
    task_id: TaskId
    attempt: int
    at_wall: int
    body: bytes
