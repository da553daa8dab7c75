"""The master as its REST API sees it."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from storage.queries import Queries
from zmqcluster.config import ClusterConfig
from zmqcluster.messages import ClientMessage, CreateToken, ToClient
from zmqcluster.model import Role
from zmqcluster.rest.backend import IssuedToken, Reader
from zmqcluster.runtime.clock import Clock
from zmqcluster.runtime.master import MasterRuntime
from zmqcluster.security.tokens import encode_join_token, new_join_token

T = TypeVar("T")

ANSWER_S: Final = 10.0
READ_S: Final = 10.0
# The loop begins several turns a second; one of 10,000 tasks takes 0.1 s.
SILENT_MS_MAX: Final = 5_000


class MasterBackend:
    """Requests go to the loop's mailbox, reads to a read-only connection on one thread."""

    def __init__(
        self,
        config: ClusterConfig,
        runtime: MasterRuntime,
        queries: Queries,
        server_public: bytes,
        clock: Clock,
    ) -> None:
        self._config = config
        self._runtime = runtime
        self._queries = queries
        self._server_public = server_public
        self._clock = clock
        self._readers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rest-read")
        self.problem = "the master is starting"

    async def request(self, message: ClientMessage) -> ToClient:
        """Ask the core; see rest.backend.Backend."""
        async with asyncio.timeout(ANSWER_S):
            return await asyncio.wrap_future(self._runtime.post(message))

    def check(self, task_type: str, data: bytes) -> None:
        """Refuse what no device could run."""
        self._runtime.check(task_type, data)

    async def read(self, question: Callable[[Reader], T]) -> T:
        """Ask the database, off the event loop."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(READ_S):
            return await loop.run_in_executor(self._readers, question, self._queries)

    async def create_token(self, role: Role, uses: int, ttl_s: float, host: str) -> IssuedToken:
        """Make a join token; only its public half is kept."""
        expires_wall = self._clock.wall_ms() + int(ttl_s * 1000)
        config = self._config
        token = new_join_token(
            host=host,
            dispatch_port=config.dispatch_port,
            control_port=config.control_port,
            server_public=self._server_public,
            expires_wall_ms=expires_wall,
            role=role,
        )
        await self.request(
            CreateToken(
                request_id=secrets.token_bytes(16),
                token_id=token.token_id,
                public_key=token.bootstrap_keys.public,
                role=role,
                expires_wall_ms=expires_wall,
                uses=uses,
            )
        )
        return IssuedToken(token.token_id, encode_join_token(token), role, uses, expires_wall)

    def ready(self) -> tuple[bool, str]:
        """Whether this master serves, and if not, why."""
        silent_ms = self._runtime.silent_ms()
        if not self.problem and silent_ms > SILENT_MS_MAX:
            return False, f"the master's loop has stood still for {silent_ms // 1000} s"
        return not self.problem, self.problem

    def counters(self) -> dict[str, float]:
        """Everything counted since the start."""
        return self._runtime.counters()

    def close(self) -> None:
        self._readers.shutdown(wait=True)
