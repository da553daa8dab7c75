"""The REST API over a real core and a real database, in one thread and virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct, field
from sqlite_utils import Database

from storage import writer
from storage.database import open_writer
from storage.queries import Queries
from tests.support.master_bench import MasterBench
from tests.support.naive_store import NaiveStore
from zmqcluster.core.effects import Changes
from zmqcluster.core.settings import Settings
from zmqcluster.errors import RequestRefused
from zmqcluster.messages import ClientMessage, CreateToken, Refused, ToClient
from zmqcluster.model import Durability, RefusalCode, Role
from zmqcluster.rest.app import PREFIX, create_app
from zmqcluster.rest.backend import IssuedToken, Reader
from zmqcluster.rest.door import Door

T = TypeVar("T")

TOKEN = "the-api-token"
# As a chunk of a body: nothing comes any more.
STALL = b"never comes"
KNOWN_TYPES = {"noop", "echo", "crawl"}


class MirrorStore(NaiveStore):
    """Writes everything to a real database too."""

    def __init__(self, database: Database) -> None:
        super().__init__()
        self._database = database

    def apply(self, changes: Changes) -> None:
        super().apply(changes)
        writer.apply(self._database, changes)


class BenchBackend:
    """A zmqcluster.rest.backend.Backend. trouble: raised by the next questions, until cleared."""

    def __init__(self, master: MasterBench, queries: Queries) -> None:
        self.master = master
        self.queries = queries
        self.messages: list[ClientMessage] = []
        self.readiness = (True, "")
        self.trouble: Exception | None = None

    async def request(self, message: ClientMessage) -> ToClient:
        self._maybe_fail()
        self.messages.append(message)
        answer = self.master.asks(message)
        if isinstance(answer, Refused):
            raise RequestRefused(answer.code, answer.problem)
        return answer  # type: ignore[return-value]  # a client is sent nothing else

    def check(self, task_type: str, data: bytes) -> None:
        if task_type not in KNOWN_TYPES:
            problem = f"task_type: given {task_type!r}; known are crawl, echo, noop"
            raise RequestRefused(RefusalCode.UNKNOWN_TASK_TYPE, problem)
        if b"refuse me" in data:
            raise RequestRefused(RefusalCode.BAD_PARAMETERS, "task_data.text: given 'refuse me'")

    async def read(self, question: Callable[[Reader], T]) -> T:
        self._maybe_fail()
        return await asyncio.to_thread(question, self.queries)

    async def create_token(self, role: Role, uses: int, ttl_s: float, host: str) -> IssuedToken:
        expires_wall = 1_700_000_000_000 + round(ttl_s * 1000)
        key = host.encode().ljust(32, b"k")
        token = CreateToken(b"r", f"token-{host}", key, role, expires_wall, uses)
        await self.request(token)
        return IssuedToken(token.token_id, "ck1.secret", role, uses, expires_wall)

    def ready(self) -> tuple[bool, str]:
        return self.readiness

    def counters(self) -> dict[str, float]:
        return {"commits": 17, "Odd name!": 1}

    def _maybe_fail(self) -> None:
        if self.trouble is not None:
            raise self.trouble


class Reply(Struct):
    """One answer. headers: names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    def problem(self) -> str:
        """The one sentence of a refusal, in the shape it must have."""
        assert self.headers["content-type"] == "application/problem+json", self
        problem = self.json()
        assert problem["status"] == self.status
        assert set(problem) == {"type", "title", "status", "detail", "code"}
        return str(problem["detail"])


class RestBench(Struct):
    """The door of a master, and the master behind it."""

    app: Door
    backend: BenchBackend
    runner: asyncio.Runner

    @property
    def master(self) -> MasterBench:
        return self.backend.master

    def get(self, path: str, **how: Any) -> Reply:
        return self.call("GET", path, **how)

    def post(self, path: str, body: Any = None, **how: Any) -> Reply:
        return self.call("POST", path, body, token=how.pop("token", TOKEN), **how)

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        peer: str = "127.0.0.1",
        host: str | None = "localhost:7989",
        chunks: list[bytes] | None = None,
    ) -> Reply:
        """One request. path: below the prefix, or from the root with two slashes. body: bytes, or
        anything that becomes JSON. chunks: the body in pieces, of no announced length."""
        sent: dict[str, str] = {} if host is None else {"host": host}
        if token is not None:
            sent["authorization"] = f"Bearer {token}"
        payload = b"" if body is None else body
        payload = payload if isinstance(payload, bytes) else msgspec.json.encode(payload)
        if chunks is not None:
            sent["transfer-encoding"] = "chunked"
        elif payload:
            sent["content-length"] = str(len(payload))
        if payload or chunks is not None:
            sent["content-type"] = "application/json"
        sent.update(headers or {})
        full = path.removeprefix("/") if path.startswith("//") else PREFIX + path
        return self.runner.run(self._call(method, full, sent, chunks or [payload], peer))

    async def _call(
        self, method: str, path: str, headers: dict[str, str], chunks: list[bytes], peer: str
    ) -> Reply:
        target, _, query = path.partition("?")
        scope: Any = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": target,
            "raw_path": target.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(name.encode(), text.encode("latin-1")) for name, text in headers.items()],
            "client": (peer, 50_000),
            "server": ("127.0.0.1", 7989),
            "state": {},
        }
        wire = _Wire(chunks)
        await self.app(scope, wire.receive, wire.send)
        return Reply(wire.status, wire.headers, b"".join(wire.answer))


class _Wire(Struct):
    """The two ends ASGI wants."""

    chunks: list[bytes]
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    answer: list[bytes] = field(default_factory=list)
    is_over: bool = False

    async def receive(self) -> Any:
        if self.is_over:
            return {"type": "http.disconnect"}
        chunk = self.chunks.pop(0) if self.chunks else b""
        if chunk is STALL:
            await asyncio.Event().wait()
        self.is_over = not self.chunks
        return {"type": "http.request", "body": chunk, "more_body": bool(self.chunks)}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            assert self.status == 0, "one answer a request"
            self.status = message["status"]
            self.headers = {name.decode(): text.decode() for name, text in message["headers"]}
        else:
            self.answer.append(message["body"])


@contextmanager
def rest_bench(folder: Path, settings: Settings | None = None) -> Iterator[RestBench]:
    """A master with an empty database in this folder."""
    path = folder / "cluster.db"
    database = open_writer(path, Durability.NORMAL)
    master = MasterBench(settings)
    master.store = MirrorStore(database)
    master.restart()
    queries = Queries(path)
    backend = BenchBackend(master, queries)
    try:
        app = create_app(backend, api_token=TOKEN, hosts=("crawler.example",))
        with asyncio.Runner() as runner:
            yield RestBench(app, backend, runner)
    finally:
        queries.close()
        database.close()
