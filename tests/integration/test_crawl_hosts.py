"""`crawl` in a real executor host, under a real pool."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import msgpack  # type: ignore[import-untyped]  # ships no types
import psutil  # type: ignore[import-untyped]  # ships no types
import pytest

from executors.context import ExecutorSettings
from tests.support.host_bench import HostBench
from tests.support.web_site import Route, Site, reply, web_site
from zmqcluster.messages import RateRule
from zmqcluster.model import Outcome

ROUTES: dict[str, Route] = {
    "/robots.txt": reply("User-agent: *\nCrawl-delay: 0.2", Content_Type="text/plain"),
    "/": "<title>Home</title><a href=/big>big</a>",
    "/big": "<title>Big</title>" + "<p>x</p>" * 20_000 + "<a href=/>home</a>",
    "/bomb": "<div>" * 200_000,
    "/busy": reply(status=503, Retry_After="9"),
}


@pytest.fixture
def site() -> Iterator[Site]:
    """A web server in a thread, as the pool is driven by the test's own."""
    ready, stop = threading.Event(), asyncio.Event()
    sites: list[Site] = []
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        async with web_site(ROUTES) as served:
            sites.append(served)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="web site")
    thread.start()
    assert ready.wait(10)
    yield sites[0]
    loops[0].call_soon_threadsafe(stop.set)
    thread.join(10)


def test_crawl_works_in_a_host_and_leaves_no_process_behind(site: Site) -> None:
    bench = HostBench(
        modules=(),
        built_in=("executors.crawl",),
        executor=ExecutorSettings(egress_allow=("127.0.0.0/8",)),
    )
    try:
        bench.submit(1, "crawl", url=site.url("/"))
        bench.submit(2, "crawl", url=site.url("/big"), depth=1)
        bench.submit(3, "crawl", url=site.url("/busy"))
        bench.submit(4, "crawl", url="http://169.254.169.254/")

        home, big, busy, inside = (bench.result(number) for number in (1, 2, 3, 4))

        assert (home.outcome, big.outcome) == (Outcome.COMPLETED, Outcome.COMPLETED)
        assert msgpack.unpackb(big.result)["title"] == "Big"
        assert [child.unique_key for child in home.children] == [site.url("/big")]
        assert [record.key for record in home.records] == [site.url("/")]
        assert RateRule(site.origin, delay_ms=200, concurrency=0, closed_for_ms=200) in bench.seen
        assert (busy.outcome, busy.retry_after_ms) == (Outcome.RETRY, 9000)
        assert inside.outcome is Outcome.REJECTED
        assert "egress_allow" in inside.error
        assert parsers()  # The helper that read the big page.

        # Killed in the middle of a page: what a helper does then is end, too.
        bench.submit(5, "crawl", url=site.url("/bomb"), timeout_ms=1500)
        assert bench.result(5).outcome is Outcome.TIMED_OUT
    finally:
        bench.close()
    assert not parsers()


def parsers() -> list[int]:
    """Parser helpers below this process."""
    below = psutil.Process().children(recursive=True)
    found = []
    for process in below:
        try:
            if "executors.parser" in process.cmdline():
                found.append(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found
