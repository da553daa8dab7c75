"""The nouns of the cluster: ids, states, limits. Imported by every layer, imports none."""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import Final, NewType

TaskId = NewType("TaskId", int)
JobId = NewType("JobId", int)
DeviceId = NewType("DeviceId", str)

# Tasks submitted without a job share this one; it is never listed and never finishes.
NO_JOB: Final = JobId(0)

PROTOCOL_VERSION: Final = 1


class SchedulerMode(StrEnum):
    """What one process is."""

    MASTER = "master"
    WORKER = "worker"
    STANDALONE = "standalone"


class TaskState(StrEnum):
    """Where a task is in its life; the last four absorb."""

    PENDING = "pending"
    ASSIGNED = "assigned"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    DEAD = "dead"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL_STATES


TERMINAL_STATES: Final = (
    TaskState.COMPLETED,
    TaskState.FAILED,
    TaskState.CANCELLED,
    TaskState.DEAD,
)


class JobState(StrEnum):
    """A job is active while any task of it is not terminal."""

    ACTIVE = "active"
    FINISHED = "finished"
    CANCELLED = "cancelled"


class DeviceState(StrEnum):
    """What the master knows of a device."""

    ONLINE = "online"
    DRAINING = "draining"
    OFFLINE = "offline"


class Outcome(StrEnum):
    """How one attempt ended, in a worker's words (wire) or the master's (the lower block)."""

    COMPLETED = "completed"
    FAILED = "failed"
    RETRY = "retry"
    REJECTED = "rejected"
    TIMED_OUT = "timed_out"
    DIED = "died"
    CANCELLED = "cancelled"
    RETURNED = "returned"

    DEVICE_LOST = "device_lost"
    DISPATCH_LOST = "dispatch_lost"


class Pool(StrEnum):
    """Which executor hosts run a task type: one asyncio host, or a pool of one-task hosts."""

    ASYNC = "async"
    SYNC = "sync"


class Strategy(StrEnum):
    """How the dispatcher picks among devices that could take a task."""

    LEAST_TASKS = "least_tasks"
    ROUND_ROBIN = "round_robin"
    WEIGHTED = "weighted"
    RANDOM = "random"


class Durability(StrEnum):
    """full: an acknowledged write survives power loss. normal: it survives any process death."""

    FULL = "full"
    NORMAL = "normal"


class Role(StrEnum):
    """What an authenticated key may do; a key has exactly one."""

    ENROL = "enrol"
    WORKER = "worker"
    CLIENT = "client"


class RefusalCode(StrEnum):
    """Why a request was refused; REST maps each to one HTTP status."""

    BAD_REQUEST = "bad_request"
    UNKNOWN_TASK_TYPE = "unknown_task_type"
    BAD_PARAMETERS = "bad_parameters"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    FORBIDDEN = "forbidden"
    DEVICE_LIVE = "device_live"
    VERSION = "version"
    BUSY = "busy"
    STOPPING = "stopping"


class Unset(Enum):
    """Marks "not given" where None means something else."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET

# --- limits: everything a peer, a user or the network can make large has one -------------------

# \Z, because $ would let a line end through.
DEVICE_ID_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"
TASK_TYPE_PATTERN: Final = r"^[a-z][a-z0-9_.-]{0,63}\Z"
LABEL_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._=-]{0,63}\Z"

FRAME_BYTES_MAX: Final = 4 * 1024 * 1024
TASK_DATA_BYTES_MAX: Final = 256 * 1024
RESULT_BYTES_MAX: Final = 1024 * 1024
RECORDS_BYTES_MAX: Final = 1024 * 1024
ERROR_CHARS_MAX: Final = 4096
UNIQUE_KEY_CHARS_MAX: Final = 2048
RATE_KEY_CHARS_MAX: Final = 320
NAME_CHARS_MAX: Final = 128
LABELS_MAX: Final = 16
PRIORITY_MAX: Final = 9
PRIORITY_DEFAULT: Final = 5
RETRIES_MAX: Final = 100
TIMEOUT_MS_MAX: Final = 7 * 24 * 3_600_000
SUBMIT_TASKS_MAX: Final = 10_000
CHILDREN_MAX: Final = 10_000
RESULTS_PER_FRAME_MAX: Final = 4096
INVENTORY_MAX: Final = 16_384
CREDIT_MAX: Final = 4096
SLOTS_MAX: Final = 4096
TASK_TYPES_MAX: Final = 256
DELAY_MS_MAX: Final = 24 * 3_600_000
CONCURRENCY_MAX: Final = 10_000
# A wall-clock instant in ms; the bound keeps every sum inside 64 bits.
WALL_MS_MAX: Final = 2**53 - 1

# Three executor deaths under one task: it is the task (the poison rule of Dask and Sidekiq).
DEATHS_MAX: Final = 3
