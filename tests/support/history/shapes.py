"""What was seen of a cluster from outside, and what is on its disk in the end."""

from __future__ import annotations

from enum import StrEnum
from math import inf

from msgspec import Struct, field


class Answer(StrEnum):
    """What became of a request, as its client knows."""

    OK = "ok"
    FAIL = "fail"
    UNKNOWN = "unknown"


class Submission(Struct, frozen=True):
    """A batch somebody asked for. unique_keys: one a task, "" for none; task_ids: when OK.

    marks, retries: one a task, its task_data by which it is known again, and how often it may fail
    before it is given up; none: of no interest. can_fail: some of its functions may fail.
    """

    answer: Answer
    unique_keys: tuple[str, ...]
    task_ids: tuple[int, ...] = ()
    job_id: int = 0
    marks: tuple[bytes, ...] = ()
    retries: tuple[int, ...] = ()
    can_fail: bool = True


class Cancel(Struct, frozen=True):
    """A cancel. task_ids: those the master said it changed, when OK; all asked for otherwise.

    job_id: the whole job, when it is not 0. answered_ms: inf for no answer. attempts: the number
    of a task's last attempt, by task, as it was seen once the answer was there; of some tasks.
    """

    answer: Answer
    task_ids: tuple[int, ...]
    job_id: int = 0
    asked_ms: float = 0.0
    answered_ms: float = inf
    attempts: dict[int, int] = {}


class Retry(Struct, frozen=True):
    """Somebody wants ended tasks to have another life.

    task_ids: those the master said it changed, when OK; all asked for otherwise. answered_ms: inf
    for no answer.
    """

    answer: Answer
    task_ids: tuple[int, ...]
    asked_ms: float = 0.0
    answered_ms: float = inf


class Start(Struct, frozen=True):
    """A run really began, as its own process tells. device_id, at_ms: "" and 0 for not known."""

    task_id: int
    attempt: int
    device_id: str = ""
    at_ms: float = 0.0


class End(Struct, frozen=True):
    """A run came to its end and returned this, as its own process tells. at_ms: 0: not known."""

    task_id: int
    attempt: int
    result: bytes
    at_ms: float = 0.0


class Told(Struct, frozen=True):
    """A client was told, or saw on record, that a task ended so with this attempt, its last.

    at_ms: when the client had it, which may be long after it was so.
    """

    task_id: int
    state: str
    attempt: int
    at_ms: float


class Arrival(Struct, frozen=True):
    """A request reached an origin, and kept it busy until it left. By the origin's clock."""

    origin: str
    at_ms: float
    until_ms: float = 0.0


class History(Struct):
    """Everything that was seen from outside; all of it but the arrivals by one clock."""

    submissions: list[Submission] = field(default_factory=list)
    cancels: list[Cancel] = field(default_factory=list)
    retries: list[Retry] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    arrivals: list[Arrival] = field(default_factory=list)


class FinalTask(Struct, frozen=True):
    """A task as it is in the end. parent_id: 0 for one that a client submitted. mark: its data."""

    state: str
    attempt: int
    job_id: int = 0
    parent_id: int = 0
    unique_key: str = ""
    device_id: str = ""
    mark: bytes = b""
    result: bytes = b""
    max_retry_count: int = 0


class FinalAttempt(Struct, frozen=True):
    """outcome: "" while it is open. has_begun: as far as the master heard."""

    outcome: str
    device_id: str = ""
    has_begun: bool = False


class FinalJob(Struct, frozen=True):
    """What a job says of itself. Job 0, of the tasks without one, only counts."""

    state: str
    pending: int = 0
    running: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    dead: int = 0


class Final(Struct):
    """What is on disk in the end. attempts: by task and number.

    keys: the task of each unique key, by job and hash. events: kind, task and attempt of all that
    somebody can find out later; job_events: kind and job.
    """

    tasks: dict[int, FinalTask]
    attempts: dict[tuple[int, int], FinalAttempt]
    jobs: dict[int, FinalJob] = field(default_factory=dict)
    keys: dict[tuple[int, bytes], int] = field(default_factory=dict)
    events: set[tuple[str, int, int]] = field(default_factory=set)
    job_events: set[tuple[str, int]] = field(default_factory=set)
