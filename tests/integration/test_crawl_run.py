"""The crawl executor against real servers: what it keeps, queues, reports and refuses."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import signal
import subprocess
import sys

import pytest
from aiohttp import web

from executors.context import ExecutorSettings
from executors.crawl import POLITE_CONCURRENCY, POLITE_DELAY_S, CrawlParams
from executors.fetch import REDIRECTS_MAX
from executors.urls import ScopeKind
from tests.support.crawl_bench import LOOPBACK, crawl_bench
from tests.support.web_site import Handler, Route, reply, run, web_site
from zmqcluster.errors import TaskRejected, TaskRetryable
from zmqcluster.messages import RateRule


def test_a_page_is_kept_and_its_links_are_queued() -> None:
    body = (
        "<html lang=en><title>Home</title><body>Hello <a href=a#x>a</a><a href='a'>a</a>"
        "<a href=/docs/b?c=d>b</a><a href=http://elsewhere.example/>e</a><a href=#>self</a>"
    )

    async def scenario() -> None:
        async with web_site({"/docs/": body}) as site, crawl_bench() as bench:
            url = site.url("/docs/")
            result = await bench.crawl(CrawlParams(url=url, depth=3))

            assert bench.children == [site.url("/docs/a"), site.url("/docs/b?c=d")]
            child = bench.context.children[0]
            assert child.rate_key == site.origin
            assert bench.params_of(child) == CrawlParams(
                url=site.url("/docs/a"), scope_base=url, depth=2
            )
            assert result["status"] == 200
            assert (result["title"], result["language"]) == ("Home", "en")
            assert result["text_length"] == len("Hello aabeself")
            assert (result["links"], result["links_queued"]) == (3, 2)
            assert result["links_out_of_scope"] == 1
            assert result["content_hash"] == hashlib.sha256(body.encode()).hexdigest()
            assert result["bytes"] == len(body)
            assert result["skipped"] == ""
            assert bench.record == result
            assert bench.rules == []

    run(scenario())


def test_at_depth_zero_links_are_counted_and_not_queued() -> None:
    async def scenario() -> None:
        async with web_site({"/": "<a href=a>a</a>"}) as site, crawl_bench() as bench:
            result = await bench.crawl(CrawlParams(url=site.url(), depth=0))

            assert (result["links"], bench.children) == (1, [])

    run(scenario())


def test_base_href_and_robots_meta_are_honoured() -> None:
    routes = {
        "/based": "<base href=/there/><a href=a>a</a>",
        "/shut": "<meta name=robots content=nofollow><a href=a>a</a>",
    }

    async def scenario() -> None:
        async with web_site(routes) as site, crawl_bench() as bench:
            await bench.crawl(CrawlParams(url=site.url("/based")))
            assert bench.children == [site.url("/there/a")]
            result = await bench.crawl(CrawlParams(url=site.url("/shut")))
            assert (result["nofollow"], result["links"], bench.children) == (True, 1, [])

    run(scenario())


def test_links_to_pages_this_process_was_handed_are_not_queued_again() -> None:
    async def scenario() -> None:
        routes = {"/": "<a href=a>a</a><a href=b>b</a>", "/a": "<a href=/>home</a><a href=b>b</a>"}
        async with web_site(routes) as site, crawl_bench() as bench:
            await bench.crawl(CrawlParams(url=site.url()), job_id=1)
            result = await bench.crawl(CrawlParams(url=site.url("/a")), job_id=1)
            # "b" was only queued by us: whether that result was accepted, nobody told us.
            assert bench.children == [site.url("/b")]
            assert result["links_known"] == 1
            await bench.crawl(CrawlParams(url=site.url("/a")), job_id=2)
            assert bench.children == [site.url("/"), site.url("/b")]

    run(scenario())


@pytest.mark.parametrize(
    ("scope", "queued"),
    [
        (ScopeKind.PAGE, []),
        (ScopeKind.PREFIX, ["/d/x"]),
        (ScopeKind.HOST, ["/d/x", "/y"]),
    ],
)
def test_scope_decides_which_links_are_queued(scope: ScopeKind, queued: list[str]) -> None:
    async def scenario() -> None:
        page = "<a href=x>x</a><a href=/y>y</a><a href=http://127.0.0.2/z>z</a>"
        async with web_site({"/d/": page}) as site, crawl_bench() as bench:
            result = await bench.crawl(CrawlParams(url=site.url("/d/"), scope=scope))

            assert bench.children == [site.url(path) for path in queued]
            assert result["links_out_of_scope"] == 3 - len(queued)

    run(scenario())


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451])
def test_a_page_that_is_not_there_is_a_result(status: int) -> None:
    async def scenario() -> None:
        gone = reply("<a href=x>x</a>", status=status)
        async with web_site({"/a": gone}) as site, crawl_bench() as bench:
            result = await bench.crawl(CrawlParams(url=site.url("/a")))

            assert (result["status"], result["skipped"]) == (status, "status")
            assert bench.children == []
            assert bench.record["status"] == status

    run(scenario())


@pytest.mark.parametrize("status", [408, 500, 502, 503, 504])
def test_a_server_in_trouble_means_try_again(status: int) -> None:
    async def scenario() -> None:
        async with web_site({"/": reply(status=status)}) as site, crawl_bench() as bench:
            with pytest.raises(TaskRetryable, match=f"HTTP {status}") as raised:
                await bench.crawl(CrawlParams(url=site.url()))
            assert raised.value.after_ms == 0
            assert bench.rules == []

    run(scenario())


@pytest.mark.parametrize(
    ("status", "header", "closed_ms"),
    [(429, "7", 7000), (503, "7", 7000), (429, "", 10_000), (429, "1e9", 10_000)],
)
def test_retry_after_closes_the_origin_for_the_whole_fleet(
    status: int, header: str, closed_ms: int
) -> None:
    async def scenario() -> None:
        answer = reply(status=status, Retry_After=header)
        async with web_site({"/": answer}) as site, crawl_bench() as bench:
            with pytest.raises(TaskRetryable, match=f"HTTP {status}") as raised:
                await bench.crawl(CrawlParams(url=site.url()))

            assert raised.value.after_ms == closed_ms
            assert bench.rules == [RateRule(site.origin, closed_for_ms=closed_ms)]

    run(scenario())


def test_a_redirect_is_a_result_and_its_target_a_child() -> None:
    async def scenario() -> None:
        moved = reply(status=301, Location="/d/new#x")
        async with web_site({"/d/old": moved}) as site, crawl_bench() as bench:
            params = CrawlParams(url=site.url("/d/old"), scope_base=site.url("/d/"), depth=4)
            result = await bench.crawl(params)

            assert (result["status"], result["skipped"]) == (301, "redirect")
            assert result["final_url"] == site.url("/d/new")
            (child,) = bench.context.children
            assert child.rate_key == site.origin
            assert bench.params_of(child) == CrawlParams(
                url=site.url("/d/new"), scope_base=site.url("/d/"), depth=4, hops=1
            )
            assert site.pages_hit == ["/d/old"]

    run(scenario())


def test_a_redirect_out_of_scope_is_not_followed() -> None:
    async def scenario() -> None:
        moved = reply(status=302, Location="http://127.0.0.2/x")
        async with web_site({"/a": moved}) as site, crawl_bench() as bench:
            params = CrawlParams(url=site.url("/a"), scope_base=site.url("/"))
            result = await bench.crawl(params)

            assert (result["links_out_of_scope"], bench.children) == (1, [])
            assert result["final_url"] == "http://127.0.0.2/x"

    run(scenario())


def test_a_seed_that_moved_takes_its_scope_along() -> None:
    async def scenario() -> None:
        async with web_site({"/n/": "<a href=x>x</a>"}) as new:
            moved = reply(status=301, Location=new.url("/n/"))
            async with web_site({"/": moved}) as old, crawl_bench() as bench:
                results = await bench.crawl_all(CrawlParams(url=old.url("/"), scope=ScopeKind.HOST))

                assert [(result["url"], result["status"]) for result in results] == [
                    (old.url("/"), 301),
                    (new.url("/n/"), 200),
                    (new.url("/n/x"), 404),
                ]

    run(scenario())


def test_redirects_end() -> None:
    async def scenario() -> None:
        routes: dict[str, Route] = {
            "/self": reply(status=302, Location="/self"),
            "/ping": reply(status=302, Location="/pong"),
            "/pong": reply(status=302, Location="/ping"),
            **{f"/{n}": reply(status=302, Location=f"/{n + 1}") for n in range(30)},
        }
        async with web_site(routes) as site, crawl_bench() as bench:
            result = await bench.crawl(CrawlParams(url=site.url("/self")))
            assert (result["skipped"], bench.children) == ("redirect_loop", [])
            assert len(await bench.crawl_all(CrawlParams(url=site.url("/ping")), 2)) == 2
            chain = await bench.crawl_all(CrawlParams(url=site.url("/0")), 3)
            assert len(chain) == REDIRECTS_MAX + 1
            assert chain[-1]["skipped"] == "redirect_loop"

    run(scenario())


@pytest.mark.parametrize("where", ["file:///etc/passwd", "ftp://h.example/", "http://[bad", ""])
def test_a_redirect_to_something_else_than_http_is_kept_as_such(where: str) -> None:
    async def scenario() -> None:
        moved = reply(status=302, Location=where)
        async with web_site({"/": moved}) as site, crawl_bench() as bench:
            result = await bench.crawl(CrawlParams(url=site.url("/"), scope_base=site.url("/b")))

            assert result["skipped"] in ("bad_redirect", "redirect_loop")
            assert bench.children == []

    run(scenario())


def test_a_redirect_into_the_machine_room_is_refused_at_the_address() -> None:
    async def scenario() -> None:
        moved = reply(status=302, Location="http://169.254.169.254/latest/meta-data/")
        async with web_site({"/": moved}) as site, crawl_bench() as bench:
            await bench.crawl(CrawlParams(url=site.url("/")))
            child = bench.params_of(bench.context.children[0])
            with pytest.raises(TaskRejected, match=r"169\.254\.169\.254.*egress_allow"):
                await bench.crawl(child)

    run(scenario())


def test_loopback_is_refused_unless_opened() -> None:
    async def scenario() -> None:
        settings = ExecutorSettings(contact="c@example.com")
        async with web_site({"/": "secret"}) as site, crawl_bench(settings) as bench:
            with pytest.raises(TaskRejected, match=r"127\.0\.0\.1 \(loopback\).*--egress-allow"):
                await bench.crawl(CrawlParams(url=site.url()))
            assert site.hits == []

    run(scenario())


def test_public_sites_need_a_contact() -> None:
    async def scenario() -> None:
        async with crawl_bench() as bench:
            with pytest.raises(TaskRejected, match="contact"):
                await bench.crawl(CrawlParams(url="http://8.8.8.8/"))

    run(scenario())


def test_robots_disallow_is_a_result_and_costs_no_request() -> None:
    async def scenario() -> None:
        routes: dict[str, Route] = {
            "/robots.txt": reply("User-agent: *\nDisallow: /p", Content_Type="text/plain"),
            "/": "<a href=/p/y>p</a><a href=/q>q</a>",
        }
        async with web_site(routes) as site, crawl_bench() as bench:
            result = await bench.crawl(CrawlParams(url=site.url("/p/x")))
            assert (result["status"], result["skipped"]) == (0, "robots")
            result = await bench.crawl(CrawlParams(url=site.url("/")))
            assert (result["links_disallowed"], bench.children) == (1, [site.url("/q")])
            assert site.hits == ["/robots.txt", "/"]

    run(scenario())


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_robots_txt_that_is_not_there_allows_everything(status: int) -> None:
    async def scenario() -> None:
        routes: dict[str, Route] = {
            "/robots.txt": reply("User-agent: *\nDisallow: /", status=status),
            "/": "hello",
        }
        async with web_site(routes) as site, crawl_bench() as bench:
            assert (await bench.crawl(CrawlParams(url=site.url())))["status"] == 200

    run(scenario())


@pytest.mark.parametrize(
    ("status", "header", "closed_ms"), [(500, "", 10_000), (429, "60", 60_000)]
)
def test_a_robots_txt_that_fails_closes_the_site_for_now(
    status: int, header: str, closed_ms: int
) -> None:
    async def scenario() -> None:
        routes: dict[str, Route] = {
            "/robots.txt": reply(status=status, Retry_After=header),
            "/": "hello",
        }
        async with web_site(routes) as site, crawl_bench() as bench:
            for _ in range(2):  # Asked once; the second task is told what the first found.
                with pytest.raises(TaskRetryable, match=f"robots.txt: HTTP {status}") as raised:
                    await bench.crawl(CrawlParams(url=site.url()))
                assert closed_ms - 1000 < raised.value.after_ms <= closed_ms
                (rule,) = bench.context.rates
                assert rule.rate_key == site.origin
                assert rule.closed_for_ms is not None
                assert closed_ms - 1000 < rule.closed_for_ms <= closed_ms
            assert site.hits == ["/robots.txt"]

    run(scenario())


def test_many_tasks_at_once_ask_for_robots_txt_once() -> None:
    async def slow(request: web.BaseRequest) -> web.StreamResponse:
        await asyncio.sleep(0.05)
        return web.Response(text="User-agent: *\nDisallow: /p")

    async def scenario() -> None:
        async with web_site({"/robots.txt": slow}) as site, crawl_bench() as bench:
            tasks = [
                asyncio.create_task(bench.crawl(CrawlParams(url=site.url(f"/{n}"))))
                for n in range(20)
            ]
            await asyncio.sleep(0)
            tasks[0].cancel()  # Whoever asked first may go away.
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(results[0], asyncio.CancelledError)
            assert [type(result) for result in results[1:]] == [dict] * 19
            assert site.hits.count("/robots.txt") == 1

    run(scenario())


def test_crawl_delay_is_told_to_the_fleet_once_in_a_while() -> None:
    async def scenario() -> None:
        robots = reply("User-agent: *\nCrawl-delay: 0.2", Content_Type="text/plain")
        async with web_site({"/robots.txt": robots, "/": "x"}) as site, crawl_bench() as bench:
            await bench.crawl(CrawlParams(url=site.url()))
            assert bench.rules == [RateRule(site.origin, delay_ms=200, concurrency=0)]
            await bench.crawl(CrawlParams(url=site.url()))
            assert len(bench.rules) == 1
            # A job may be slower than the site asks for, never faster.
            await bench.crawl(CrawlParams(url=site.url(), delay_s=0.1, concurrency=2))
            assert bench.rules[1:] == [RateRule(site.origin, delay_ms=200, concurrency=2)]

    run(scenario())


def test_robots_txt_and_pages_of_one_origin_keep_their_distance() -> None:
    async def scenario() -> None:
        arrivals: list[float] = []

        async def note(request: web.BaseRequest) -> web.StreamResponse:
            arrivals.append(asyncio.get_running_loop().time())
            if request.path == "/robots.txt":
                raise web.HTTPFound("/moved.txt")
            body = "User-agent: *\nCrawl-delay: 0.3" if request.path == "/moved.txt" else "x"
            return web.Response(text=body)

        routes = dict.fromkeys(["/robots.txt", "/moved.txt", "/", "/2", "/3"], note)
        async with web_site(routes) as site, crawl_bench() as bench:
            pages = [CrawlParams(url=site.url(path), delay_s=0.2) for path in ("/", "/2", "/3")]
            await asyncio.gather(*(bench.crawl(page) for page in pages))

            gaps = [later - former for former, later in itertools.pairwise(arrivals)]
            assert site.hits[:2] == ["/robots.txt", "/moved.txt"]
            assert gaps[0] >= 0.19, "the delay of the task, before there are rules"
            assert min(gaps[1:]) >= 0.29, "the site's own, as it is longer"

    run(scenario())


def test_task_begins_when_its_page_is_asked_for() -> None:
    async def scenario() -> None:
        begun: dict[str, int] = {}

        async def note(request: web.BaseRequest) -> web.StreamResponse:
            begun[request.path] = bench.begun
            return web.Response(text="", headers={"Content-Type": "text/html"})

        async with (
            web_site({"/robots.txt": note, "/": note}) as site,
            crawl_bench() as bench,
        ):
            await bench.crawl(CrawlParams(url=site.url(), delay_s=0.05))
            assert begun == {"/robots.txt": 0, "/": 1}
            # Without a delay, too: the master may only count.
            await bench.crawl(CrawlParams(url=site.url()))
            assert begun["/"] == bench.begun == 2

    run(scenario())


def test_start_that_nobody_paces_closes_the_origin_for_its_delay() -> None:
    async def scenario() -> None:
        async with web_site({"/": "x"}) as site, crawl_bench() as bench:
            bench.is_paced = False
            await bench.crawl(CrawlParams(url=site.url(), delay_s=0.1))

            limit = RateRule(site.origin, delay_ms=100, concurrency=0, closed_for_ms=100)
            closed = RateRule(site.origin, closed_for_ms=100)
            assert bench.rules == [limit, limit, closed]

    run(scenario())


def test_task_whose_turn_is_far_off_comes_back_instead_of_waiting() -> None:
    async def scenario() -> None:
        async with web_site({"/": "x"}) as site, crawl_bench() as bench:
            with pytest.raises(TaskRetryable, match="asked slowly") as raised:
                await bench.crawl(CrawlParams(url=site.url(), delay_s=60))
            assert 59_000 < raised.value.after_ms <= 60_000
            assert site.hits == ["/robots.txt"]

    run(scenario())


def test_public_sites_get_a_polite_limit_by_default() -> None:
    async def scenario() -> None:
        async with crawl_bench() as bench:
            bench.executor._tell_limit(
                bench.context, CrawlParams(url="http://8.8.8.8/"), "http://8.8.8.8"
            )
            assert bench.rules == [
                RateRule(
                    "http://8.8.8.8",
                    delay_ms=int(POLITE_DELAY_S * 1000),
                    concurrency=POLITE_CONCURRENCY,
                )
            ]

    run(scenario())


@pytest.mark.parametrize(
    ("route", "skipped"),
    [
        (reply(b"GIF89a", Content_Type="image/gif"), "not_html"),
        (reply("<html><a href=x>", Content_Type="text/plain"), "not_html"),
        (reply(b"x" * 5000), "too_big"),
        (reply(b"x", Content_Encoding="br"), "undecodable"),
        (reply("<!doctype HTML><a href=x>", Content_Type=""), ""),
    ],
)
def test_what_is_no_page_is_kept_without_links(route: Handler, skipped: str) -> None:
    async def scenario() -> None:
        async with web_site({"/": route}) as site, crawl_bench() as bench:
            result = await bench.crawl(CrawlParams(url=site.url(), bytes_max=4096))

            assert (result["status"], result["skipped"]) == (200, skipped)
            assert len(bench.children) == (0 if skipped else 1)

    run(scenario())


def test_a_page_with_more_links_than_a_result_may_carry_is_truncated_and_says_so() -> None:
    async def scenario() -> None:
        page = "".join(f"<a href='/{'x' * 700}{n}'>x</a>" for n in range(4000))
        async with web_site({"/": page}) as site, crawl_bench() as bench:
            result = await bench.crawl(CrawlParams(url=site.url()))

            assert result["links"] == 4000
            assert result["links_truncated"] > 0
            assert result["links_queued"] == len(bench.children) > 1000
            assert result["links_queued"] + result["links_truncated"] == 4000
            assert bench.record["links"] == 4000

    run(scenario())


def test_a_page_full_of_links_lets_other_tasks_run_meanwhile() -> None:
    turns = 0

    async def company() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def scenario() -> None:
        async with crawl_bench() as bench:
            other = asyncio.create_task(company())
            references = [f"{number % 4500}" for number in range(5000)]
            found = await bench.executor._joined("http://h.example/", references)
            other.cancel()

            assert [target.path for target in found] == [f"/{number}" for number in range(4500)]
            assert turns >= 4

    run(scenario())


def test_the_task_deadline_bounds_the_request() -> None:
    async def never(request: web.BaseRequest) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()

    async def scenario() -> None:
        async with web_site({"/": never}) as site, crawl_bench() as bench:
            await bench.crawl(CrawlParams(url=site.url("/x")))  # robots.txt is known now.
            context = bench.new_context(timeout_ms=200)
            with pytest.raises(TaskRetryable, match="no headers within 0"):
                await bench.executor.run(context, CrawlParams(url=site.url("/")))

    run(scenario())


def test_the_demo_site_is_crawled_exactly() -> None:
    process = subprocess.Popen(
        [sys.executable, "scripts/demo_site.py"], stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            origin = process.stdout.readline().split()[-1].rstrip("/")

            async def scenario() -> list[tuple[str, int]]:
                async with crawl_bench(LOOPBACK) as bench:
                    params = CrawlParams(url=f"{origin}/", scope=ScopeKind.HOST)
                    found = await bench.crawl_all(params)
                    return [
                        (result["url"].removeprefix(origin), result["status"]) for result in found
                    ]

            found = run(scenario())
        finally:
            process.send_signal(signal.SIGTERM)
    assert process.returncode == 0
    topics = ["queues", "clocks", "sockets", "files", "locks", "robots", "maps", "tides"]
    assert sorted(found) == sorted(
        [("/", 200), ("/about/", 200), ("/big.html", 200), ("/picture.gif", 200)]
        + [("/old.html", 301), ("/gone.html", 404)]
        + [(f"/topics/{topic}.html", 200) for topic in topics]
        + [(f"/articles/{number}.html", 200) for number in range(64)]
    )
