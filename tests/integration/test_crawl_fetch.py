"""The HTTP client against servers that mean harm, or are merely slow."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import time
import zlib
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult

from executors.context import ExecutorSettings
from executors.egress import EgressRefused
from executors.fetch import (
    RETRY_AFTER_MAX_S,
    Fetcher,
    FetchFailed,
    Limits,
    RedirectRefused,
    Response,
    retry_after_s,
)
from executors.urls import canonical
from tests.support.web_site import Site, raw_site, reply, run, web_site
from zmqcluster.errors import TaskRejected, TaskRetryable

LOOPBACK = ExecutorSettings(egress_allow=("127.0.0.0/8",), contact="crawler@example.com")


@contextlib.asynccontextmanager
async def fetcher(
    settings: ExecutorSettings = LOOPBACK, resolver: AbstractResolver | None = None
) -> AsyncIterator[Fetcher]:
    client = Fetcher(settings, resolver)
    await client.open()
    try:
        yield client
    finally:
        await client.close()


async def get(site: Site, path: str = "/", limits: Limits | None = None) -> Response:
    async with fetcher() as client:
        return await client.get(canonical(site.url(path)), limits or Limits())


def test_a_page_comes_with_what_was_said_about_it() -> None:
    async def scenario() -> None:
        page = reply("grün".encode("latin-1"), Content_Type='Text/HTML; charset="ISO-8859-1"')
        async with web_site({"/": page}) as site:
            response = await get(site)

            assert (response.status, response.content_type) == (200, "text/html")
            assert (response.charset, response.body) == ("ISO-8859-1", b"gr\xfcn")
            assert (response.wire_bytes, response.cut) == (4, "")
            assert site.agents == ["zmqcluster/0.1 (+crawler@example.com)"]

    run(scenario())


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("gzip", gzip.compress(b"hello " * 1000)),
        ("x-gzip", gzip.compress(b"hello " * 1000)),
        ("GZIP", gzip.compress(b"hello " * 500) + gzip.compress(b"hello " * 500)),
        ("gzip", gzip.compress(b"hello " * 1000) + b"\0" * 100),
        ("deflate", zlib.compress(b"hello " * 1000)),
        ("deflate", zlib.compress(b"hello " * 1000)[2:-4]),
        ("identity", b"hello " * 1000),
    ],
)
def test_packed_bodies_are_unpacked(encoding: str, packed: bytes) -> None:
    async def scenario() -> None:
        async with web_site({"/": reply(packed, Content_Encoding=encoding)}) as site:
            response = await get(site)

            assert response.body == b"hello " * 1000
            assert response.wire_bytes == len(packed)

    run(scenario())


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "gzip,deflate", "gzip"])
def test_what_cannot_be_unpacked_says_so(encoding: str) -> None:
    async def scenario() -> None:
        async with web_site({"/": reply(b"\x1f\x8bnonsense", Content_Encoding=encoding)}) as site:
            response = await get(site)

            assert (response.status, response.body, response.cut) == (200, b"", "undecodable")

    run(scenario())


def test_a_gzip_bomb_stops_at_its_cap() -> None:
    bomb = gzip.compress(b"\0" * (64 * 1024 * 1024))  # 64 kB on the wire, 64 MiB unpacked.

    async def scenario() -> None:
        async with web_site({"/": reply(bomb, Content_Encoding="gzip")}) as site:
            began = time.process_time()
            response = await get(site, limits=Limits(bytes_max=1024 * 1024))

            assert (response.body, response.cut) == (b"", "too_big")
            assert time.process_time() - began < 1.0

    run(scenario())


def test_a_body_announced_too_big_is_not_read() -> None:
    async def scenario() -> None:
        async with web_site({"/": reply(b"x" * 3000)}) as site:
            response = await get(site, limits=Limits(bytes_max=2048))

            assert (response.body, response.wire_bytes, response.cut) == (b"", 3000, "too_big")

    run(scenario())


def test_pictures_have_a_cap_of_their_own() -> None:
    async def scenario() -> None:
        picture = reply(b"x" * 3000, Content_Type="image/png")
        async with web_site({"/": picture}) as site:
            limits = Limits(media_bytes_max=2000)
            assert (await get(site, limits=limits)).cut == "too_big"
            assert len((await get(site)).body) == 3000

    run(scenario())


def test_an_endless_body_stops_at_its_cap() -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked\r\n\r\n"
        while True:
            yield b"1000\r\n" + b"x" * 4096 + b"\r\n"

    async def scenario() -> None:
        async with raw_site(endless) as site:
            response = await get(site, limits=Limits(bytes_max=100_000))
            assert (response.body, response.cut) == (b"", "too_big")
            assert response.wire_bytes > 100_000
            kept = await get(site, limits=Limits(bytes_max=100_000, keep_cut=True))
            assert kept.body == b"x" * 100_000

    run(scenario())


def test_an_endless_packed_body_stops_at_its_cap_too() -> None:
    async def endless() -> AsyncIterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"
        packer = zlib.compressobj(wbits=31)
        while True:
            part = packer.compress(b"\0" * 100_000) + packer.flush(zlib.Z_SYNC_FLUSH)
            yield b"%x\r\n%b\r\n" % (len(part), part)
            await asyncio.sleep(0)  # Let the reader stop us: the socket takes many of these.

    async def scenario() -> None:
        async with raw_site(endless) as site:
            response = await get(site, limits=Limits(bytes_max=1_000_000, body_s=5))
            assert (response.body, response.cut) == (b"", "too_big")
            assert response.wire_bytes < 100_000

    run(scenario())


def test_a_body_that_drips_meets_its_deadline() -> None:
    async def dripping() -> AsyncIterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
        while True:
            yield b"x"
            await asyncio.sleep(0.02)

    async def scenario() -> None:
        async with raw_site(dripping) as site:
            with pytest.raises(FetchFailed, match=r"body not complete within 0\.2 s") as failed:
                await get(site, limits=Limits(body_s=0.2))
            assert not failed.value.lasting

    run(scenario())


def test_a_site_that_only_announces_answers_is_left_at_once() -> None:
    async def announcing() -> AsyncIterator[bytes]:
        while True:
            yield b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000

    async def scenario() -> None:
        async with raw_site(announcing) as site:
            with pytest.raises(FetchFailed, match="too many interim answers"):
                await get(site)

    run(scenario())


def test_a_few_announcements_before_the_answer_are_passed_over() -> None:
    async def announced() -> AsyncIterator[bytes]:
        yield b"HTTP/1.1 100 Continue\r\n\r\n" + b"HTTP/1.1 103 Early Hints\r\n\r\n" * 5
        yield b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

    async def scenario() -> None:
        async with raw_site(announced) as site:
            assert (await get(site)).body == b"ok"

    run(scenario())


def test_headers_that_never_end_meet_their_deadline() -> None:
    async def dripping() -> AsyncIterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\n"
        while True:
            yield b"X-A: b\r\n"
            await asyncio.sleep(0.02)

    async def scenario() -> None:
        async with raw_site(dripping) as site:
            with pytest.raises(FetchFailed, match=r"no headers within 0\.2 s"):
                await get(site, limits=Limits(headers_s=0.2))

    run(scenario())


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"hello\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    ],
)
def test_broken_http_is_a_failure_that_may_pass(answer: bytes) -> None:
    async def once() -> AsyncIterator[bytes]:
        yield answer

    async def scenario() -> None:
        async with raw_site(once) as site:
            with pytest.raises(FetchFailed) as failed:
                await get(site)
            assert not failed.value.lasting
            assert "\n" not in str(failed.value)
            assert len(str(failed.value)) < 400

    run(scenario())


def test_nobody_listening_is_a_failure_that_may_pass() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]

        async def scenario() -> None:
            async with fetcher() as client:
                with pytest.raises(FetchFailed) as failed:
                    await client.get(canonical(f"http://127.0.0.1:{port}/"))
                assert not failed.value.lasting

        run(scenario())


class StubResolver(AbstractResolver):
    """Sends every name to these addresses, one list a look-up."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        self.asked.append(host)
        found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=socket.AF_INET, proto=0, flags=0
            )
            for address in found
        ]

    async def close(self) -> None:
        pass


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "0.0.0.0", "[::1]"]
)
def test_without_permission_loopback_is_refused_in_every_spelling(host: str) -> None:
    async def scenario() -> None:
        async with web_site({"/": "secret"}) as site, fetcher(ExecutorSettings()) as client:
            port = site.origin.rpartition(":")[2]
            with pytest.raises(EgressRefused, match="not a public address"):
                await client.get(canonical(f"http://{host}:{port}/"))
            assert site.hits == []

    run(scenario())


def test_a_name_that_resolves_to_a_private_address_is_refused() -> None:
    async def scenario() -> None:
        resolver = StubResolver(["127.0.0.1"])
        settings = ExecutorSettings(contact="c@example.com")
        async with web_site({"/": "secret"}) as site, fetcher(settings, resolver) as client:
            port = site.origin.rpartition(":")[2]
            with pytest.raises(EgressRefused, match=r"public\.example: .*127\.0\.0\.1 \(loopback"):
                await client.get(canonical(f"http://public.example:{port}/"))
            assert (resolver.asked, site.hits) == (["public.example"], [])

    run(scenario())


def test_an_allowed_name_is_reached_by_its_name() -> None:
    hosts: list[str] = []

    async def page(request: web.BaseRequest) -> web.StreamResponse:
        hosts.append(request.host)
        return web.Response(text="hello")

    async def scenario() -> None:
        async with (
            web_site({"/": page}) as site,
            fetcher(resolver=StubResolver(["127.0.0.1"])) as client,
        ):
            port = site.origin.rpartition(":")[2]
            target = canonical(f"http://inside.example:{port}/")
            assert not client.is_opened(target)
            response = await client.get(target)
            assert response.body == b"hello"
            assert hosts == [f"inside.example:{port}"]
            assert client.is_opened(target)

    run(scenario())


def test_names_dns_cannot_carry_fail_for_good() -> None:
    async def scenario() -> None:
        async with fetcher() as client:
            with pytest.raises(FetchFailed) as failed:
                await client.get(canonical("http://" + "a" * 64 + ".example/"))
            assert failed.value.lasting

    run(scenario())


def test_redirects_are_answers_of_their_own() -> None:
    async def scenario() -> None:
        async with web_site({"/": reply(status=302, Location="/b")}) as site:
            response = await get(site)
            assert (response.status, response.redirect) == (302, "/b")
            assert site.hits == ["/"]

    run(scenario())


def test_follow_goes_along_but_not_for_ever() -> None:
    routes = {f"/{n}": reply(status=302, Location=f"{n + 1}") for n in range(3)}

    async def scenario() -> None:
        async with web_site({**routes, "/3": "there"}) as site, fetcher() as client:
            response = await client.follow(site.url("/0"), hops_max=3)
            assert (response.body, response.target.path) == (b"there", "/3")
            with pytest.raises(RedirectRefused, match="more than 2 redirects"):
                await client.follow(site.url("/0"), hops_max=2)

    run(scenario())


@pytest.mark.parametrize("where", ["file:///etc/passwd", "ftp://h.example/", "data:text/html,x"])
def test_follow_leaves_http_never(where: str) -> None:
    async def scenario() -> None:
        async with web_site({"/": reply(status=302, Location=where)}) as site, fetcher() as client:
            with pytest.raises(RedirectRefused, match="only http and https"):
                await client.follow(site.url("/"))

    run(scenario())


def test_follow_checks_the_address_of_each_hop() -> None:
    async def scenario() -> None:
        away = reply(status=302, Location="http://169.254.169.254/latest/meta-data/")
        async with web_site({"/": away}) as site, fetcher() as client:
            with pytest.raises(EgressRefused, match=r"169\.254\.169\.254 \(link-local"):
                await client.follow(site.url("/"))

    run(scenario())


def test_secrets_stay_with_the_origin_they_are_for() -> None:
    seen: list[str | None] = []

    async def page(request: web.BaseRequest) -> web.StreamResponse:
        seen.append(request.headers.get("Authorization"))
        return web.Response(text="hello")

    async def scenario() -> None:
        async with web_site({"/there": page}) as other:
            routes = {
                "/": reply(status=302, Location=other.url("/there")),
                "/own": reply(status=302, Location="/here"),
                "/here": page,
            }
            async with web_site(routes) as site, fetcher() as client:
                secret = {"Authorization": "Bearer x"}
                await client.follow(site.url("/own"), headers=secret)
                await client.follow(site.url("/"), headers=secret)
        assert seen == ["Bearer x", None]

    run(scenario())


@pytest.mark.parametrize(
    ("status", "error"),
    [(429, TaskRetryable), (500, TaskRetryable), (503, TaskRetryable), (404, TaskRejected)],
)
def test_fetch_turns_bad_answers_into_task_errors(status: int, error: type[Exception]) -> None:
    async def scenario() -> None:
        answer = reply(status=status, Retry_After="7")
        async with web_site({"/": answer}) as site, fetcher() as client:
            with pytest.raises(error, match=f"HTTP {status}") as raised:
                await client.fetch(site.url("/"))
        if isinstance(raised.value, TaskRetryable):
            assert raised.value.after_ms == 7000

    run(scenario())


@pytest.mark.parametrize(
    ("header", "wait_s"),
    [
        ("5", 5.0),
        ("0", 0.0),
        ("99999999999999999999", RETRY_AFTER_MAX_S),
        ("Mon, 23 Nov 2026 10:01:40 GMT", 100.0),
        ("Monday, 23-Nov-26 10:01:40 GMT", 100.0),
        ("Mon, 23 Nov 2020 10:00:00 GMT", 0.0),
        ("Mon, 23 Nov 2099 10:00:00 GMT", RETRY_AFTER_MAX_S),
        ("soon", None),
        ("-5", None),
        ("\u0665", None),
        ("Mon, 99 Nov 2026 10:00:00 GMT", None),
        ("", None),
    ],
)
def test_retry_after_is_understood_and_capped(header: str, wait_s: float | None) -> None:
    response = Response(
        target=canonical("http://h.example/"),
        status=429,
        headers={"Retry-After": header},
        content_type="",
        charset="",
        body=b"",
        wire_bytes=0,
        cut="",
        fetched_wall_ms=1_795_428_000_000,  # 2026-11-23 10:00:00 UTC
        elapsed_ms=1,
    )

    assert retry_after_s(response) == wait_s
