"""What the REST API needs of a master: written here as protocols, kept by the master's runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from msgspec import Struct

from zmqcluster.core.rows import (
    AssignmentRow,
    EventRow,
    HeartbeatRow,
    JobRow,
    TaskRow,
    TokenRow,
)
from zmqcluster.messages import ClientMessage, ToClient
from zmqcluster.model import DeviceId, JobId, Role, TaskId, TaskState

T = TypeVar("T")


class TaskFilter(Struct, frozen=True):
    """Which tasks to list; None is "any". All that are given must hold."""

    state: TaskState | None = None
    task_type: str | None = None
    job_id: JobId | None = None
    device_id: DeviceId | None = None
    rate_key: str | None = None


class IssuedToken(Struct, frozen=True):
    """A join token just made. token: the only copy of its secret; it is never shown again."""

    token_id: str
    token: str
    role: Role
    uses: int
    expires_wall: int


class Reader(Protocol):
    """Read-only questions to the database, each bounded by its limit.

    Used by one thread at a time. `after` is the id of the last row already seen, 0 for none.
    Rows come newest first (ids falling) or oldest first (ids rising).
    """

    def list_tasks(
        self, which: TaskFilter, *, after: int, limit: int, newest_first: bool
    ) -> Sequence[TaskRow]:
        """Tasks in id order. task_data and result may be left empty: a list does not show them."""

    def task(self, task_id: TaskId) -> TaskRow | None:
        """One task, whole."""

    def assignments(self, task_id: TaskId, limit: int) -> Sequence[AssignmentRow]:
        """The latest attempts of a task, in the order of their numbers."""

    def task_events(self, task_id: TaskId, limit: int) -> Sequence[EventRow]:
        """The latest events of a task, oldest first."""

    def list_jobs(self, *, after: int, limit: int, newest_first: bool) -> Sequence[JobRow]:
        """Jobs in id order, without the nameless one."""

    def job(self, job_id: JobId) -> JobRow | None:
        """One job."""

    def heartbeats(self, device_id: DeviceId, limit: int) -> Sequence[HeartbeatRow]:
        """The latest kept samples of a device, newest first."""

    def tokens(self, limit: int) -> Sequence[TokenRow]:
        """Join tokens, newest first, revoked and expired ones too."""


class Backend(Protocol):
    """A master as REST sees it. Coroutines run on the loop of the REST server."""

    async def request(self, message: ClientMessage) -> ToClient:
        """Ask the core; the answer is returned only when what it says is on disk.

        Raises RequestRefused when the core says no, and TimeoutError when it does not answer in
        time: what was asked may or may not have happened.
        """

    def check(self, task_type: str, data: bytes) -> None:
        """Refuse parameters this task type cannot run with. data: one MessagePack map.

        Called for each submitted task, from any thread: pure and quick. Raises RequestRefused.
        """

    async def read(self, question: Callable[[Reader], T]) -> T:
        """Put a question to a read-only connection, in a thread that is not the loop's.

        Raises TimeoutError when no connection was free in time, StorageError when the disk fails.
        """

    async def create_token(self, role: Role, uses: int, ttl_s: float, host: str) -> IssuedToken:
        """Make a join token; only its public half is kept.

        host: what workers connect to; empty lets the master say. Raises as request().
        """

    def ready(self) -> tuple[bool, str]:
        """Whether this master serves, and if not, why. Any thread."""

    def counters(self) -> dict[str, float]:
        """Everything counted since the start, by snake_case name with its unit last. Any thread."""
