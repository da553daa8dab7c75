"""What an origin sees while the cluster that crawls it loses workers and its master."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from aiohttp import web

from tests.support.arrived import arrived_s
from tests.support.cluster import Cluster, wait_until
from zmqcluster.client import DistributionClient, task
from zmqcluster.messages import RateRule

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

PAGES = 25
LINKS = 4
DELAY_S = 0.3
# Longer than a restart takes.
LONG_S = 3.0
LONG_MS = 3_000
# Between a request's leaving and its arrival lies the loop of its host; the kernel tells a few ms.
JITTER_S = 0.02


class Origin:
    """A site of PAGES pages in a thread of its own; notes each arrival with its time.

    slow_s: what each page takes. robots: its robots.txt; robots_moved: behind a redirect.
    busy_once: this path answers 503 with Retry-After: 2 the first time.
    """

    def __init__(self) -> None:
        self.url = ""
        self.slow_s = 0.0
        self.robots = ""
        self.robots_moved = False
        self.busy_once = ""
        self.arrivals: list[tuple[float, str]] = []
        self.open = 0
        self.open_max = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="origin")
        self._thread.start()
        assert self._ready.wait(10)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    @property
    def gaps(self) -> list[tuple[float, str, str]]:
        """Seconds between each arrival and the one before, and which they were."""
        return [
            (later - former, before, after)
            for (former, before), (later, after) in itertools.pairwise(sorted(self.arrivals))
        ]

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        # A request whose client died is over: without its cancellation it would count as open.
        server = web.Server(self._handle, access_log=None, handler_cancellation=True)
        runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        assert request.transport is not None
        line = request.transport.get_extra_info("socket")
        self.arrivals.append((arrived_s(line), request.path))
        self.open += 1
        self.open_max = max(self.open_max, self.open)
        try:
            await asyncio.sleep(self.slow_s)
            return self._answer(request.path)
        finally:
            self.open -= 1

    def _answer(self, path: str) -> web.StreamResponse:
        if path == "/robots.txt" and self.robots_moved:
            return web.Response(status=302, headers={"Location": "/moved.txt"})
        if path in ("/robots.txt", "/moved.txt"):
            return web.Response(text=self.robots)
        if path == self.busy_once:
            self.busy_once = ""
            return web.Response(status=503, headers={"Retry-After": "2"})
        number = int(path.removeprefix("/p"))
        others = [(number + step) % PAGES for step in range(1, LINKS + 1)]
        links = " ".join(f'<a href="/p{other}">{other}</a>' for other in others)
        return web.Response(text=f"<title>{number}</title>{links}", content_type="text/html")


@pytest.fixture
def origin() -> Iterator[Origin]:
    site = Origin()
    yield site
    site.close()


@pytest.fixture
def cluster(make_cluster: Callable[..., Cluster]) -> Iterator[Cluster]:
    cluster = make_cluster(egress_allow=["127.0.0.0/8"])
    yield cluster
    # In good order, each would wait for its delays first.
    for node in cluster.nodes:
        node.kill()


def crawl(
    cluster: Cluster,
    origin: Origin,
    rule: RateRule | None,
    path: str = "/p0",
    **parameters: float,
) -> None:
    """Submit one page to begin with, and what is known of the origin so far."""
    url = origin.url + path

    async def work(client: DistributionClient) -> None:
        seed = task("crawl", {"url": url, **parameters}, unique_key=url, rate_key=origin.url)
        await client.submit_many([seed], rates=[rule] if rule else [])

    cluster.ask(work)


def crawl_under_kills(cluster: Cluster) -> None:
    """Wait for the end of the crawl; on the way a worker and then the master are killed."""
    [master, first] = cluster.nodes[:2]
    wait_for_pages(cluster, 5)
    first.kill()
    wait_for_pages(cluster, 10)
    cluster.start_worker()
    wait_for_pages(cluster, 15)
    master.kill()
    cluster.start_master()
    wait_until_done(cluster)


def wait_for_pages(cluster: Cluster, count: int) -> None:
    wait_until(lambda: cluster.counts().get("completed", 0) >= count, f"{count} pages are there")


def wait_until_done(cluster: Cluster) -> None:
    wait_until(lambda: cluster.counts() == {"completed": PAGES}, "all pages are there", 60)


@pytest.mark.parametrize("whose", ["job", "site"])
def test_requests_keep_their_distance_though_a_worker_and_the_master_are_killed(
    cluster: Cluster, origin: Origin, whose: str
) -> None:
    cluster.start_master()
    cluster.start_worker()
    cluster.start_worker()

    if whose == "job":
        delay_ms = round(DELAY_S * 1000)
        crawl(cluster, origin, RateRule(origin.url, delay_ms=delay_ms), delay_s=DELAY_S)
    else:
        # Nobody knows of the delay before the first task reads it.
        origin.robots = f"User-agent: *\nCrawl-delay: {DELAY_S}"
        crawl(cluster, origin, None)
    crawl_under_kills(cluster)

    pages = Counter(path for _, path in origin.arrivals)
    assert pages.pop("/robots.txt") >= 3, "each worker asked"
    assert len(pages) == PAGES
    assert [gap for gap in origin.gaps if gap[0] < DELAY_S - JITTER_S] == []


def test_delay_outlives_everybody_who_knew_of_the_last_request(
    cluster: Cluster, origin: Origin
) -> None:
    master = cluster.start_master()
    worker = cluster.start_worker()
    crawl(cluster, origin, RateRule(origin.url, delay_ms=LONG_MS), delay_s=LONG_S)
    wait_for_pages(cluster, 1)

    worker.kill()
    master.kill()
    cluster.start_master()
    cluster.start_worker()

    wait_until(lambda: len(origin.arrivals) == 3, "the new worker asks for robots.txt")
    assert [path for _, path in origin.arrivals] == ["/robots.txt", "/p0", "/robots.txt"]
    assert min(gap for gap, _, _ in origin.gaps) >= LONG_S - JITTER_S


def test_task_on_its_way_to_its_page_keeps_others_away_across_a_restart(
    cluster: Cluster, origin: Origin
) -> None:
    # Two delays before the page: one alone is what a new master waits anyway.
    origin.robots_moved = True
    master = cluster.start_master()
    cluster.start_worker()
    cluster.start_worker()
    for path in ("/p0", "/p9"):
        rule = RateRule(origin.url, delay_ms=LONG_MS)
        crawl(cluster, origin, rule, path, delay_s=LONG_S)
    wait_until(lambda: origin.arrivals, "robots.txt is asked for")

    master.kill()
    cluster.start_master()

    wait_until(lambda: len(origin.arrivals) == 3, "the first page is asked for")
    assert [path for _, path in origin.arrivals] == ["/robots.txt", "/moved.txt", "/p0"]
    assert min(gap for gap, _, _ in origin.gaps) >= LONG_S - JITTER_S


def test_worker_killed_before_its_page_leaves_the_origin_alone_for_a_delay(
    cluster: Cluster, origin: Origin
) -> None:
    cluster.start_master()
    worker = cluster.start_worker()
    crawl(cluster, origin, RateRule(origin.url, delay_ms=LONG_MS), delay_s=LONG_S)
    wait_until(lambda: origin.arrivals, "robots.txt is asked for")

    worker.kill()
    cluster.start_worker()

    wait_until(lambda: len(origin.arrivals) == 2, "the other worker asks for robots.txt")
    assert [path for _, path in origin.arrivals] == ["/robots.txt", "/robots.txt"]
    assert origin.gaps[0][0] >= LONG_S - JITTER_S


def test_place_of_a_killed_worker_is_free_again(cluster: Cluster, origin: Origin) -> None:
    origin.slow_s = 0.5
    cluster.start_master()
    worker = cluster.start_worker()
    crawl(cluster, origin, RateRule(origin.url, concurrency=1), concurrency=1)
    wait_until(lambda: len(origin.arrivals) == 2, "the first page is asked for")

    worker.kill()
    cluster.start_worker()

    wait_for_pages(cluster, 2)
    assert origin.open_max == 1


def test_requests_at_once_stay_below_the_limit_though_processes_are_killed(
    cluster: Cluster, origin: Origin
) -> None:
    origin.slow_s = 0.25
    cluster.start_master()
    cluster.start_worker()
    cluster.start_worker()

    crawl(cluster, origin, RateRule(origin.url, concurrency=2), concurrency=2)
    crawl_under_kills(cluster)

    assert origin.open_max == 2


def test_site_that_asks_for_a_pause_gets_it(cluster: Cluster, origin: Origin) -> None:
    origin.busy_once = "/p7"
    cluster.start_master()
    cluster.start_worker()
    cluster.start_worker()

    crawl(cluster, origin, RateRule(origin.url, delay_ms=50), delay_s=0.05)
    wait_until_done(cluster)

    [pause, *_] = [gap for gap, before, _ in origin.gaps if before == "/p7"]
    assert pause >= 2.0 - JITTER_S
