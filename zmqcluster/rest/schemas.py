"""The JSON of the REST API: bodies and queries it takes, views it gives. rendering.py fills them.

Field names are the JSON names. `*_wall` are wall-clock ms, 0 for "not yet"; other units come last.
Bodies carry the bounds of the wire, because what passes here reaches the core undecoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Raw, Struct, field

from zmqcluster.messages import DeviceName, Labels, ShortText, TaskTypeName
from zmqcluster.model import (
    CONCURRENCY_MAX,
    DELAY_MS_MAX,
    PRIORITY_DEFAULT,
    PRIORITY_MAX,
    RATE_KEY_CHARS_MAX,
    RETRIES_MAX,
    SUBMIT_TASKS_MAX,
    TIMEOUT_MS_MAX,
    UNIQUE_KEY_CHARS_MAX,
    WALL_MS_MAX,
    Strategy,
    TaskState,
)
from zmqcluster.views import DeviceView, TaskCounts, View

LIST_MAX: Final = 1000
LIST_DEFAULT: Final = 100
TOKEN_TTL_S_MAX: Final = 365 * 24 * 3600
TOKEN_USES_MAX: Final = 1_000_000
# A name or an address; what it must not hold is what breaks the line it is pasted into.
HOST_PATTERN: Final = r"^[A-Za-z0-9_.:-]*\Z"

# One below 2**63: a row id, and what SQLite can hold.
# Checked when it is packed; what clients read is what it must be.
JsonObject = Annotated[Raw, Meta(extra_json_schema={"type": "object"})]
Id = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Limit = Annotated[int, Meta(ge=1, le=LIST_MAX)]
EpochSeconds = Annotated[float, Meta(ge=0, le=WALL_MS_MAX / 1000)]
IsoInstant = Annotated[datetime, Meta(tz=True)]
RateKeyText = Annotated[str, Meta(max_length=RATE_KEY_CHARS_MAX)]
Seconds = Annotated[float, Meta(ge=0, le=DELAY_MS_MAX / 1000)]


class Body(Struct, frozen=True, forbid_unknown_fields=True):
    """Shared shape of what clients send: maps, nothing beyond their fields."""


class Nothing(Body, frozen=True):
    """What a request carries that takes no query, or no body."""


# --- what clients send --------------------------------------------------------------------------


class TaskBody(Body, frozen=True):
    """A task somebody wants done.

    task_data: a JSON object, at most 256 KiB as MessagePack and 32 levels deep. max_retry_count
    and timeout_s: null takes the master's default. not_before: ISO 8601 with a zone, or seconds
    since 1970. unique_key: one task of that key within its job, ever. rate_key: shares the limits
    of that key. labels: what a device must have. job_id: an existing job, the same for all tasks
    of one request.
    """

    task_type: TaskTypeName
    # A factory, not a value: msgspec cannot put a Raw default into a JSON schema.
    task_data: JsonObject = field(default_factory=lambda: Raw(b"{}"))
    priority: Annotated[int, Meta(ge=0, le=PRIORITY_MAX)] = PRIORITY_DEFAULT
    max_retry_count: Annotated[int, Meta(ge=0, le=RETRIES_MAX)] | None = None
    timeout_s: Annotated[float, Meta(gt=0, le=TIMEOUT_MS_MAX / 1000)] | None = None
    not_before: IsoInstant | EpochSeconds | None = None
    unique_key: Annotated[str, Meta(max_length=UNIQUE_KEY_CHARS_MAX)] = ""
    rate_key: RateKeyText = ""
    labels: Labels = ()
    job_id: Id = 0


class RateBody(Body, frozen=True):
    """The limits of a rate key. Null leaves that part as it is.

    delay_s: least time between two starts. concurrency: most at once, 0 is unbounded.
    closed_for_s: nothing starts for this long.
    """

    rate_key: Annotated[str, Meta(min_length=1, max_length=RATE_KEY_CHARS_MAX)]
    delay_s: Seconds | None = None
    concurrency: Annotated[int, Meta(ge=0, le=CONCURRENCY_MAX)] | None = None
    closed_for_s: Seconds | None = None


TaskList = Annotated[list[TaskBody], Meta(min_length=1, max_length=SUBMIT_TASKS_MAX)]


class BatchBody(Body, frozen=True):
    """Tasks to queue together, all or none. job_name: not empty starts a new job of this name.

    job_id: an existing job instead. rates: limits set together with the tasks.
    """

    tasks: TaskList
    job_id: Id = 0
    job_name: ShortText = ""
    rates: Annotated[list[RateBody], Meta(max_length=256)] = field(default_factory=list)


class StrategyBody(Body, frozen=True):
    """How the dispatcher picks among devices that could take a task."""

    strategy: Strategy


class TokenBody(Body, frozen=True):
    """A join token to make. uses: how many keys may enrol with it. host: what workers connect
    to; empty lets the master say."""

    role: Literal["worker", "client"] = "worker"
    uses: Annotated[int, Meta(ge=1, le=TOKEN_USES_MAX)] = 1
    ttl_s: Annotated[float, Meta(gt=0, le=TOKEN_TTL_S_MAX)] = 24 * 3600
    host: Annotated[str, Meta(max_length=253, pattern=HOST_PATTERN)] = ""


class PageQuery(Body, frozen=True):
    """One page of a list. cursor: the `next_cursor` of the page before."""

    limit: Limit = LIST_DEFAULT
    cursor: Id | None = None


class TaskQuery(PageQuery, frozen=True):
    """Which tasks to list; all that is given must hold."""

    state: TaskState | None = None
    task_type: TaskTypeName | None = None
    job_id: Id | None = None
    device_id: DeviceName | None = None
    rate_key: RateKeyText | None = None
    order: Literal["newest", "oldest"] = "newest"


class LimitQuery(Body, frozen=True):
    """How many to list at most."""

    limit: Limit = LIST_DEFAULT


# --- what clients get ---------------------------------------------------------------------------


class SubmittedView(View):
    """What was queued, and is on disk. task_ids: one for each task, in order. existing: positions
    (from 0) not queued again, because a task with that unique key was there already."""

    job_id: int
    task_ids: Sequence[int]
    existing: Sequence[int]


class UntouchedView(View):
    """A task a request did not change, and why."""

    task_id: int
    why: str


class ChangedView(View):
    """What a request changed, and is on disk."""

    task_ids: Sequence[int]
    untouched: Sequence[UntouchedView]


class DoneView(View):
    """A request on a device, a token or the strategy is done, and is on disk."""

    done: bool = True


class TaskView(View):
    """One task in a list. attempt: the number of the current or last hand-out, 0 before the
    first. failures: attempts that ended in an error. deaths: attempts that took their executor
    along."""

    task_id: int
    job_id: int
    parent_id: int
    task_type: str
    state: str
    priority: int
    max_retry_count: int
    timeout_s: float
    labels: list[str]
    unique_key: str
    rate_key: str
    attempt: int
    failures: int
    deaths: int
    cancel_requested: bool
    device_id: str
    not_before_wall: int
    created_wall: int
    assigned_wall: int
    started_wall: int
    finished_wall: int
    error: str


class AttemptView(View):
    """One hand-out of a task. outcome: empty while it has not ended."""

    attempt: int
    device_id: str
    assigned_wall: int
    started_wall: int
    ended_wall: int
    outcome: str
    run_us: int
    error: str


class TaskDetailView(TaskView):
    """One task, whole. Bytes inside task_data and result show as {"base64": "…"}."""

    task_data: Any = None
    result: Any = None
    attempts: list[AttemptView] = field(default_factory=list)


class TaskPage(View):
    """next_cursor: ask with it for the next page; null at the end. A page can be short before."""

    tasks: list[TaskView]
    next_cursor: int | None = None


class EventView(View):
    """Something that happened. Zero and "" mean "none"; ids only grow."""

    event_id: int
    at_wall: int
    kind: str
    task_id: int
    attempt: int
    job_id: int
    device_id: str
    detail: str


class EventList(View):
    """Oldest first."""

    events: list[EventView]


class JobView(View):
    """A group of tasks, with how many of them are in each state."""

    job_id: int
    name: str
    state: str
    created_wall: int
    finished_wall: int
    tasks: TaskCounts


class JobPage(View):
    """next_cursor: ask with it for the next page; null at the end."""

    jobs: list[JobView]
    next_cursor: int | None = None


class DeviceList(View):
    """All devices the master knows."""

    devices: list[DeviceView]


class HeartbeatView(View):
    """A sample of a device's heartbeats. net_*_bps: bytes a second."""

    at_wall: int
    cpu_pct: float
    memory_pct: float
    memory_bytes: int
    disk_pct: float
    net_sent_bps: int
    net_received_bps: int
    running: int
    assigned: int


class HeartbeatList(View):
    """Newest first."""

    device_id: str
    heartbeats: list[HeartbeatView]


class DeviceStatsView(View):
    """What a device did since it was registered, and how busy its latest samples were.

    samples: how many the means are made of, between since_wall and until_wall; 0: none yet.
    """

    device_id: str
    completed: int
    failed: int
    lost: int
    assigned: int
    running: int
    samples: int = 0
    since_wall: int = 0
    until_wall: int = 0
    cpu_pct_mean: float = 0.0
    cpu_pct_max: float = 0.0
    memory_pct_mean: float = 0.0
    running_mean: float = 0.0


class StrategyView(View):
    """The strategy in force."""

    strategy: str


class TokenView(View):
    """A join token, without its secret. revoked_wall: 0 while it is good."""

    token_id: str
    role: str
    created_wall: int
    expires_wall: int
    uses_left: int
    revoked_wall: int


class TokenList(View):
    """Newest first."""

    tokens: list[TokenView]


class IssuedTokenView(View):
    """A join token just made. token: shown this once, and kept nowhere."""

    token_id: str
    token: str
    role: str
    uses: int
    expires_wall: int


class ReadyView(View):
    """Whether this master serves."""

    ready: bool
    reason: str = ""


class ProblemView(View):
    """Why a request was refused (RFC 9457), as application/problem+json.

    detail: one sentence: which field, what was given, what is allowed. code: for programs.
    """

    title: str
    status: int
    detail: str
    code: str
    type: str = "about:blank"
