"""What the REST API needs of a master: written here as protocols, kept by the master's runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from msgspec import Struct

from storage.queries import TaskDetail
from storage.task_listing import TaskFilter, TaskPage
from zmqcluster.core.rows import HeartbeatRow, JobRow, TaskRow, TokenRow
from zmqcluster.messages import ClientMessage, ToClient
from zmqcluster.model import Role, TaskId
from zmqcluster.views import TaskCounts

T = TypeVar("T")


class IssuedToken(Struct, frozen=True):
    """A join token just made. token: the only copy of its secret; it is never shown again."""

    token_id: str
    token: str
    role: Role
    uses: int
    expires_wall: int


class Reader(Protocol):
    """Read-only questions to the database, each bounded; storage.queries.Queries is one.

    Used by one thread at a time. All raise StorageError when the disk fails.
    """

    def list_tasks(
        self,
        wanted: TaskFilter,
        *,
        cursor: int | None = None,
        limit: int = 100,
        newest_first: bool = True,
    ) -> TaskPage:
        """Tasks in the order of their ids, from behind cursor on; a page may be short."""

    def tasks_by_id(self, task_ids: Sequence[int]) -> dict[TaskId, TaskRow]:
        """Those that exist."""

    def task_detail(self, task_id: int) -> TaskDetail | None:
        """A task with its attempts and events, as of one moment."""

    def list_jobs(self, before_id: int | None = None, limit: int = 100) -> list[JobRow]:
        """Jobs below before_id, newest first."""

    def job(self, job_id: int) -> JobRow | None:
        """One job."""

    def heartbeats(self, device_id: str, limit: int = 100) -> list[HeartbeatRow]:
        """The newest samples of a device, newest first."""

    def counts(self) -> TaskCounts:
        """Tasks by state since the database began."""

    def tokens(self) -> list[TokenRow]:
        """All join tokens, used up and revoked ones too."""


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
