"""Web sites that drip, bomb, loop and lie; the crawler lives on, politely, and knows its bounds."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]  # ships no types
import psutil  # type: ignore[import-untyped]  # ships no types

from tests.chaos.catalogue import CAN, Tier, fault
from tests.chaos.own_tasks import End, end_of, events, submit, vouch
from tests.chaos.rig import Rig
from tests.chaos.storage import preloaded
from tests.support.cluster import Node, wait_until
from tests.support.history import Arrival
from tests.support.hostile_site import HostileSite, Pieces, moved, page, status
from zmqcluster.messages import RateRule

MIB: Final = 1024 * 1024
HOSTS_GROW_BYTES_MAX: Final = 150 * MIB
# Between a request's leaving and its noted arrival lie the loops of host and site.
JITTER_S: Final = 0.02

CAN["openssl"] = lambda: shutil.which("openssl") is not None


@contextlib.contextmanager
def at_work(rig: Rig, **config: object) -> Iterator[Node]:
    """A worker that may crawl this machine, under load; it is the same one afterwards."""
    cluster = rig.cluster
    cluster.config |= {"egress_allow": ["127.0.0.0/8"], "task_timeout": 8.0, **config}
    cluster.start_master()
    worker = cluster.start_worker()
    with rig.load() as load:
        rig.flows(load, 10)
        yield worker
        rig.flows(load, 10)
    judge(rig)
    assert worker.process.poll() is None, "the agent ended"
    assert events(rig, "device_lost") == 0, "the agent fell silent"


def judge(
    rig: Rig,
    delays_ms: dict[str, float] | None = None,
    concurrency: dict[str, int] | None = None,
) -> None:
    """The rig's judgement; a crawl cannot write the trace, so its attempts are vouched for."""
    rig.rests()
    done = "SELECT a.task_id, a.attempt FROM task_assignments a JOIN tasks USING (task_id)"
    done += " WHERE task_type = 'crawl' AND a.outcome = 'completed'"
    for task_id, attempt in rig.cluster.rows(done):
        vouch(rig, task_id, attempt)
    rig.judge(delays_ms, concurrency)


def crawl(rig: Rig, url: str, **parameters: Any) -> int:
    """One page and no retry, unless parameters say otherwise."""
    data = {"url": url, "scope": "page", "depth": 1, **parameters}
    [task_id] = submit(rig, "crawl", data=data, max_retry_count=0)
    return task_id


def skipped(rig: Rig, task_id: int) -> str:
    """Why no links were read; the task must have completed."""
    end = end_of(rig, task_id)
    assert end.state == "completed", end
    [(result,)] = rig.cluster.rows("SELECT result FROM tasks WHERE task_id = ?", task_id)
    return str(msgpack.unpackb(result)["skipped"])


def fails_with(rig: Rig, task_id: int, *words: str) -> End:
    """It failed, and says one of these."""
    end = end_of(rig, task_id)
    assert end.state == "failed", end
    assert any(one in end.error for one in words), (words, end)
    return end


@fault(88, "bodies that drip, headers and answers that never end")
def endless_answers(rig: Rig) -> None:
    with HostileSite() as site, at_work(rig, task_timeout=4.0):
        began = time.monotonic()
        too_long = ("not complete", "no headers within", "ran longer than")
        # One byte a chunk is slow work as well: it may meet its deadline before its cap.
        slow = [crawl(rig, f"{site.url}/{name}") for name in ("drip", "silent", "chunks")]
        assert skipped(rig, crawl(rig, f"{site.url}/endless")) == "too_big"
        fails_with(rig, crawl(rig, f"{site.url}/headers"), "Too many headers")
        fails_with(rig, crawl(rig, f"{site.url}/hints"), "too many interim answers")
        for task_id in slow:
            fails_with(rig, task_id, *too_long)
        assert time.monotonic() - began < 15, "their own deadline ended them"
    died = "SELECT count(*) FROM task_assignments WHERE error LIKE '%host died%'"
    assert rig.cluster.rows(died) == [(0,)], "nobody held up the others"


@fault(89, "a body that unpacks to a thousand times its size", tier=Tier.QUICK)
def bombs(rig: Rig) -> None:
    with HostileSite() as site, at_work(rig) as worker:
        before = _memory(worker)
        ids = [crawl(rig, f"{site.url}/bomb/{number}") for number in range(8)]
        stacked = crawl(rig, f"{site.url}/bombs")
        assert {skipped(rig, task_id) for task_id in ids} == {"too_big"}
        assert skipped(rig, stacked) == "undecodable"
        assert _memory(worker) - before < HOSTS_GROW_BYTES_MAX


@fault(90, "redirects in a circle, without end, and to places nobody should go")
def redirects(rig: Rig) -> None:
    places = ("file:///etc/passwd", "data:text/html,x", "ftp://127.0.0.1/", "//", "http://[")
    inside = ("169.254.169.254", "10.0.0.1", "[::1]:7989", "0.0.0.0")
    with HostileSite() as site, at_work(rig):
        bad = [crawl(rig, f"{site.url}/to?{place}") for place in places]
        assert {skipped(rig, one) for one in bad} == {"bad_redirect"}
        assert skipped(rig, crawl(rig, f"{site.url}/self")) == "redirect_loop"
        for place in inside:
            crawl(rig, f"{site.url}/to?http://{place}/", scope="page")
        crawl(rig, f"{site.url}/step/0", scope="host")
        wait_until(lambda: len(_steps(site)) > 10, "ten hops were made")
        refused = "SELECT error FROM tasks WHERE parent_id > 0 AND state = 'failed'"
        wait_until(lambda: len(rig.cluster.rows(refused)) == len(inside), "the insides are refused")
        assert all("will not connect" in row[0] for row in rig.cluster.rows(refused))
    assert _steps(site) == [f"/step/{number}" for number in range(11)], "ten hops, and no more"


@fault(91, "names that lead elsewhere at the next look, and to several places", needs=("gcc",))
def rebound_names(rig: Rig) -> None:
    allowed = ["127.0.0.1/32"]
    with (
        HostileSite() as site,
        HostileSite(address=("127.0.0.2", site.port)) as inside,
        preloaded(rig, "slow_dns"),
        at_work(rig, egress_allow=allowed),
    ):
        turning = [
            end_of(rig, crawl(rig, f"http://{number}.turning.test:{site.port}/good"))
            for number in range(12)
        ]
        mixed = crawl(rig, f"http://mixed.test:{site.port}/good")
        refused = [
            crawl(rig, f"http://inside.test:{site.port}/good"),
            crawl(rig, f"{site.url}/to?http://inside.test:{site.port}/good", scope="host"),
        ]
        assert skipped(rig, mixed) == "", "one of its addresses is fine"
        assert fails_with(rig, refused[0], "will not connect")
        assert end_of(rig, refused[1]).state == "completed", "it is the redirect that is refused"
        for end in turning:
            assert end.state == "completed" or "will not connect" in end.error, end
        assert {end.state for end in turning} == {"completed", "failed"}, "they turned"
        assert inside.arrivals == [], "nothing got there"


@fault(92, "this machine's own address in every spelling there is")
def spellings(rig: Rig) -> None:
    hosts = (
        "127.0.0.1", "localhost", "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "0.0.0.0",
        "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]",
        "[::]", "224.0.0.1", "[ff02::1]", "127.0.0.1.",
    )  # fmt: skip
    with HostileSite() as site, at_work(rig, egress_allow=[], contact="a@example.com"):
        ids = [crawl(rig, f"http://{host}:{site.port}/good") for host in hosts]
        for host, task_id in zip(hosts, ids, strict=True):
            end = end_of(rig, task_id)
            assert end.state == "failed", (host, end)
            assert "will not connect" in end.error, (host, end)
        assert site.arrivals == [], "nothing got there"


@fault(93, "robots.txt in every kind of trouble")
def robots_in_trouble(rig: Rig) -> None:
    def rules(text: bytes) -> Callable[[str], Pieces]:
        return lambda _: iter([page(text)])

    long = b"User-agent: *\n" + b"Disallow: /q\n" * 80_000
    open_sites = {
        "is not there": lambda _: iter([status(404)]),
        "is forbidden": lambda _: iter([status(403)]),
        "is a page": rules(b"<html><body>Disallow: /</body></html>"),
        "is noise": rules(bytes(range(256)) * 400),
        "is 1 MB": rules(long),
        "has a mark": rules(b"\xef\xbb\xbfUser-agent: *\nDisallow: /private"),
        "goes in circles": lambda url: iter([moved(f"{url}/robots.txt")]),
        "leads on and on": lambda url: iter([moved(f"{url}/step/0")]),
        "has a costly pattern": rules(b"User-agent: *\nDisallow: " + b"/*a" * 500 + b"$\n"),
    }
    closed_sites: dict[str, Callable[[str], Pieces]] = {
        "is 500": lambda _: iter([status(500)]),
        "is 503": lambda _: iter([status(503, b"Retry-After: 5\r\n")]),
        "hangs up": lambda _: iter([]),
        "says nothing": lambda _: itertools.repeat(None, 1000),
    }
    shut = {
        "says no": rules(b"User-agent: *\nDisallow: /"),
        "says no after a mark": rules(b"\xef\xbb\xbfUser-agent: *\nDisallow: /"),
        "says no at 400 KB": rules(b"User-agent: *\n" + b"#\n" * 200_000 + b"Disallow: /\n"),
    }
    with contextlib.ExitStack() as stack, at_work(rig):
        asked: dict[str, tuple[HostileSite, int]] = {}
        for name, robots in (open_sites | closed_sites | shut).items():
            site = stack.enter_context(HostileSite(robots))
            asked[name] = site, crawl(rig, f"{site.url}/good/{'a' * 500}b")
        for name in open_sites:
            assert skipped(rig, asked[name][1]) == "", name
        for name in shut:
            assert skipped(rig, asked[name][1]) == "robots", name
        for name in closed_sites:
            fails_with(rig, asked[name][1], "robots.txt", "ran longer than")
        for name in closed_sites | shut:
            assert set(asked[name][0].paths) == {"/robots.txt"}, f"{name}: a page was asked for"


@fault(94, "Retry-After that is huge, in the past, negative, or no time at all")
def odd_pauses(rig: Rig) -> None:
    names = ("busy-huge", "busy-junk", "busy-past", "busy-negative")
    with contextlib.ExitStack() as stack, at_work(rig):
        for name in names:
            site = stack.enter_context(HostileSite())
            fails_with(rig, crawl(rig, f"{site.url}/{name}"), "HTTP 503", "HTTP 429")
            assert site.paths.count(f"/{name}") == 1
        closed = "SELECT closed_until_ms FROM rate_keys"
        # Written down with each commit, so it is behind by a little.
        clock = rig.cluster.rows("SELECT value FROM meta WHERE key = 'clock_ms'")[0][0] + 60_000
        [huge] = [until for (until,) in rig.cluster.rows(closed) if until > clock]
        assert 3_000_000 < huge - clock <= 3_600_000, "an hour at most, whatever they say"


@fault(
    95,
    "certificates that are expired, for another host or of nobody, and a handshake that hangs",
    needs=("openssl",),
)
def bad_tls(rig: Rig) -> None:
    authority = Authority(rig.folder)
    # What is signed by it is trusted, if there is nothing else to say against it.
    rig.cluster.environment["SSL_CERT_FILE"] = str(authority.certificate)
    bad = {
        "expired": authority.signs("IP:127.0.0.1", days=-1),
        "mismatch": authority.signs("DNS:evil.example"),
        "self-signed": authority.itself(),
    }
    with contextlib.ExitStack() as stack, at_work(rig, task_timeout=4.0):
        good = stack.enter_context(HostileSite(tls=authority.signs("IP:127.0.0.1")))
        assert skipped(rig, crawl(rig, f"https://127.0.0.1:{good.port}/good")) == ""
        for words, tls in bad.items():
            site = stack.enter_context(HostileSite(tls=tls))
            end = fails_with(rig, crawl(rig, f"https://127.0.0.1:{site.port}/good"), "certificate")
            assert words in end.error, (words, end)
            assert site.arrivals == [], "nothing was asked for"
        with socket.create_server(("127.0.0.1", 0)) as mute:
            url = f"https://127.0.0.1:{mute.getsockname()[1]}/"
            fails_with(rig, crawl(rig, url), "no connection in time", "ran longer than")


@fault(96, "names that nobody knows, after six seconds each", needs=("gcc",))
def slow_names(rig: Rig) -> None:
    with HostileSite() as site, preloaded(rig, "slow_dns"), at_work(rig, task_timeout=20.0):
        slow = [crawl(rig, f"http://{number}.slow.test/") for number in range(20)]
        began = time.monotonic()
        quick = [crawl(rig, f"http://quick.test:{site.port}/good")]
        assert [skipped(rig, task_id) for task_id in quick] == [""]
        assert time.monotonic() - began < 4, "it waited for the others"
        for task_id in slow:
            fails_with(rig, task_id, "Name or service not known", "name")


@fault(97, "answers that are not HTTP, or only half of it")
def broken_http(rig: Rig) -> None:
    names = ("short", "both", "length", "chunk", "long-header", "status", "noise", "reset")
    with HostileSite() as site, at_work(rig):
        ids = {name: crawl(rig, f"{site.url}/{name}") for name in names}
        for name, task_id in ids.items():
            end = end_of(rig, task_id)
            # A server may send a length and chunks; what it is taken for must be one of them.
            assert end.state == "failed" or name == "both", (name, end)
            assert site.url in end.error or name == "both", (name, end)
        assert skipped(rig, crawl(rig, f"{site.url}/good")) == ""


@fault(98, "pages made to keep a parser busy")
def parser_bombs(rig: Rig) -> None:
    with HostileSite() as site, at_work(rig, task_timeout=20.0) as worker:
        before = _memory(worker)
        names = ("nested", "attribute", "entities")
        ids = {name: crawl(rig, f"{site.url}/{name}") for name in names}
        for name, task_id in ids.items():
            assert skipped(rig, task_id) in ("", "unparseable"), name
        assert "/good" not in site.paths, "no entity is fetched"
        assert _memory(worker) - before < HOSTS_GROW_BYTES_MAX


@fault(99, "worker and master are killed while a site with a delay is crawled")
def politeness(rig: Rig) -> None:
    delay_s = 0.25
    cluster = rig.cluster
    cluster.config |= {"egress_allow": ["127.0.0.0/8"]}
    master = cluster.start_master()
    workers = [cluster.start_worker() for _ in range(2)]
    with HostileSite() as site:
        url = f"{site.url}/calendar/0"
        submit(
            rig,
            "crawl",
            data={
                **{"url": url, "scope": "host", "depth": 14},
                **{"delay_s": delay_s, "concurrency": 1},
            },
            unique_key=url,
            rate_key=site.url,
            rates=[RateRule(site.url, delay_ms=round(delay_s * 1000), concurrency=1)],
        )
        with rig.load() as load:
            _until_pages(site, 4)
            workers[0].kill()
            _until_pages(site, 7)
            master.kill()
            cluster.start_master()
            cluster.start_worker()
            _until_pages(site, 10)
            rig.flows(load, 10)
        _until_pages(site, 15)
        rig.extra.arrivals += [
            Arrival(site.url, came_s * 1000, left_s * 1000) for came_s, left_s in site.stays
        ]
        judge(rig, {site.url: (delay_s - JITTER_S) * 1000}, {site.url: 1})
        pages = [path for path in site.paths if path.startswith("/calendar")]
        assert sorted(set(pages)) == sorted(f"/calendar/{number}" for number in range(15))
        for node in cluster.nodes:
            node.kill()


@fault(100, "a site without end: each page has a next one")
def endless_site(rig: Rig) -> None:
    with HostileSite() as site, at_work(rig):
        crawl(rig, f"{site.url}/calendar/0", scope="host", depth=60)
        _until_pages(site, 61)
    pages = [path for path in site.paths if path.startswith("/calendar")]
    assert len(pages) == len(set(pages)) == 61, "depth is a bound, and no page comes twice"


class Authority:
    """Signs certificates. certificate: its own, for who trusts it."""

    def __init__(self, folder: Path) -> None:
        self.certificate = folder / "authority.pem"
        self._key = folder / "authority.key"
        self._folder = folder
        self._signed = itertools.count()
        self._request("/CN=authority", self._key, self.certificate, "-x509", "-days", "1")

    def signs(self, name: str, days: int = 1) -> ssl.SSLContext:
        """For a server of this name, such as DNS:example.org, until so many days from now."""
        number = next(self._signed)
        key, request, certificate, extensions = (
            self._folder / f"server{number}.{end}" for end in ("key", "csr", "pem", "ext")
        )
        self._request("/CN=server", key, request)
        extensions.write_text(f"subjectAltName={name}\n")
        _openssl(
            "x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self._key,
            "-CAcreateserial", "-days", days, "-extfile", extensions, "-out", certificate,
        )  # fmt: skip
        return _server_context(certificate, key)

    def itself(self) -> ssl.SSLContext:
        """A server that signed for itself."""
        key, certificate = self._folder / "own.key", self._folder / "own.pem"
        name = ("-addext", "subjectAltName=IP:127.0.0.1")
        self._request("/CN=own", key, certificate, "-x509", "-days", "1", *name)
        return _server_context(certificate, key)

    def _request(self, subject: str, key: Path, out: Path, *more: str) -> None:
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        _openssl("req", *curve, "-subj", subject, "-keyout", key, "-out", out, *more)


def _openssl(*words: object) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


def _server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


def _steps(site: HostileSite) -> list[str]:
    return [path for path in site.paths if path.startswith("/step")]


def _until_pages(site: HostileSite, count: int) -> None:
    def found() -> bool:
        return len({path for path in site.paths if path.startswith("/calendar")}) >= count

    wait_until(found, f"{count} pages were asked for", 60)


def _memory(worker: Node) -> int:
    """Of the agent and everything below it, in bytes."""
    agent = psutil.Process(worker.pid)
    total = 0
    for one in (agent, *agent.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += int(one.memory_info().rss)
    return total
