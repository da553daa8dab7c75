"""A real web server for tests of the crawler, with a log of what arrived."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import uvloop
from aiohttp import web

T = TypeVar("T")
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
Route = str | bytes | Handler

TEST_SECONDS_MAX = 20.0


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run one async test, with a deadline that ends in a traceback instead of a hang."""

    async def bounded() -> T:
        async with asyncio.timeout(TEST_SECONDS_MAX):
            return await coroutine

    # The loop that executor hosts run on.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(bounded())


@dataclass
class Site:
    """origin: without a trailing slash. hits: request paths in order of arrival."""

    origin: str
    hits: list[str] = field(default_factory=list)
    agents: list[str] = field(default_factory=list)

    def url(self, path: str = "/") -> str:
        return self.origin + path

    @property
    def pages_hit(self) -> list[str]:
        return [path for path in self.hits if path != "/robots.txt"]


def reply(body: str | bytes = "", status: int = 200, **headers: str) -> Handler:
    """A fixed answer; Content_Type="..." and the like become headers."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    data = body.encode() if isinstance(body, str) else body

    async def handle(_: web.BaseRequest) -> web.StreamResponse:
        return web.Response(
            body=data, status=status, headers={"Content-Type": "text/html", **names}
        )

    return handle


@contextlib.asynccontextmanager
async def web_site(routes: Mapping[str, Route]) -> AsyncIterator[Site]:
    """Serve routes by exact path (with query); anything else is a 404. A text is an HTML page."""
    site = Site("")

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        site.hits.append(request.path_qs)
        site.agents.append(request.headers.get("User-Agent", ""))
        route = routes.get(request.path_qs)
        if route is None:
            return web.Response(status=404, text="not here")
        if isinstance(route, str | bytes):
            route = reply(route)
        return await route(request)

    runner = web.ServerRunner(web.Server(handle, access_log=None), shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        site.origin = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield site
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def raw_site(chunks: Callable[[], AsyncIterator[bytes]]) -> AsyncIterator[Site]:
    """A server that answers every connection with these bytes, whatever was asked."""
    site = Site("")
    busy: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        busy.add(task)
        try:
            await reader.readuntil(b"\r\n\r\n")
            site.hits.append("?")
            async for chunk in chunks():
                writer.write(chunk)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            busy.discard(task)
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    site.origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield site
    finally:
        server.close()
        for task in list(busy):
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
        await server.wait_closed()
