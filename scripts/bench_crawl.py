"""Pages a second of the crawl executor alone, beside a bare loop with the same client and parser.

    python scripts/bench_crawl.py [--folder DIR] [--rounds 3] [--at-once 32]

Both crawl the same site, served from memory by another process; without --folder the site is made
up: small pages (12 kB, 30 links) and then heavy ones (110 kB, 300 links). No cluster is involved.
CPU is that of the crawling process (and its parser helper), not of the server.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import aiohttp
import uvloop
from selectolax.lexbor import LexborHTMLParser
from yarl import URL

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from executors.context import ExecutorSettings, TaskContext
from executors.crawl import Crawl, CrawlParams
from executors.registry import Registry
from executors.urls import LinkJoiner, ScopeKind, canonical

SETTINGS: Final = ExecutorSettings(egress_allow=("127.0.0.0/8",))
Crawler = Callable[[str, int], Awaitable[int]]


def make_site(folder: Path, pages: int, links: int, paragraphs: int) -> None:
    """A made-up documentation site: every page links others, in a fixed pattern."""
    for number in range(pages):
        near = [(number + step * step + 1) % pages for step in range(links)]
        items = "".join(
            f'<li class="toctree-l1"><a class="reference internal" href="page{to}.html#s{at}">'
            f"Section {at} of page {to}</a> and <code>some.code({at})</code></li>\n"
            for at, to in enumerate(near)
        )
        prose = f"<p>Page {number} has <em>words</em> in it, and more of them follow.</p>\n" * (
            paragraphs
        )
        text = (
            f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Page {number}'
            f"</title><style>p {{}}</style></head><body>{prose}<ul>{items}</ul></body></html>"
        )
        name = "index.html" if number == 0 else f"page{number}.html"
        (folder / name).write_text(text)


async def bare(seed: str, at_once: int) -> int:
    """Sixty lines of anybody's crawler: no limits, no guard, no robots.txt, nothing kept."""
    joiner = LinkJoiner()
    origin = canonical(seed).origin
    known = {seed}
    waiting: asyncio.Queue[str] = asyncio.Queue()
    waiting.put_nowait(seed)
    connector = aiohttp.TCPConnector(limit=at_once)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def work() -> None:
            while True:
                url = await waiting.get()
                async with session.get(URL(url, encoded=True)) as response:
                    body = await response.read()
                if response.content_type == "text/html":
                    tree = LexborHTMLParser(body)
                    title = tree.css_first("title")
                    assert title is None or title.text() is not None
                    references = [a.attributes.get("href") or "" for a in tree.css("a[href]")]
                    for link in joiner.join_all(url, references):
                        if link.origin == origin and link.url not in known:
                            known.add(link.url)
                            waiting.put_nowait(link.url)
                waiting.task_done()

        workers = [asyncio.create_task(work()) for _ in range(at_once)]
        await waiting.join()
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return len(known)


async def executor(seed: str, at_once: int) -> int:
    """The executor as a host runs it: typed parameters in, children and record packed."""
    crawl = Crawl()
    registry = Registry([crawl])
    await crawl.setup(SETTINGS)
    known = {seed}
    waiting: asyncio.Queue[CrawlParams] = asyncio.Queue()
    waiting.put_nowait(CrawlParams(url=seed, scope=ScopeKind.HOST))

    async def work() -> None:
        while True:
            params = await waiting.get()
            context = TaskContext(1, job_id=1, settings=SETTINGS, check=registry.check)
            await crawl.run(context, params)
            for child in context.children:
                if child.unique_key not in known:
                    known.add(child.unique_key)
                    waiting.put_nowait(registry.decode("crawl", child.data))
            waiting.task_done()

    workers = [asyncio.create_task(work()) for _ in range(at_once)]
    joined = asyncio.create_task(waiting.join())
    done, _ = await asyncio.wait([joined, *workers], return_when=asyncio.FIRST_COMPLETED)
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    await crawl.close()
    for task in done:
        task.result()
    return len(known)


def cpu_s() -> float:
    """CPU time of this process and of its children that ended."""
    own, children = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def measure(crawler: Crawler, seed: str, at_once: int) -> tuple[int, float, float]:
    """Pages, pages/s and CPU ms a page of one crawl from scratch."""
    began, cpu = time.perf_counter(), cpu_s()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:

        async def bounded() -> int:
            async with asyncio.timeout(300):
                return await crawler(seed, at_once)

        pages = runner.run(bounded())
    took = time.perf_counter() - began
    return pages, pages / took, (cpu_s() - cpu) / pages * 1000


def bench(name: str, folder: Path, rounds: int, at_once: int) -> None:
    """Crawl a folder in turns, and print medians with their spread."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("serve_folder.py")), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
    )
    with server:
        try:
            assert server.stdout is not None
            seed = server.stdout.readline().split()[-1]
            rates: dict[str, list[float]] = {"bare loop": [], "executor": []}
            for _ in range(rounds):
                for what, crawler in (("bare loop", bare), ("executor", executor)):
                    pages, rate, cpu_ms = measure(crawler, seed, at_once)
                    rates[what].append(rate)
                    print(f"{name:8} {what:10} {pages:6} URLs {rate:8.0f}/s {cpu_ms:6.2f} ms CPU")
            medians = {what: statistics.median(found) for what, found in rates.items()}
            for what, found in rates.items():
                print(
                    f"{name:8} {what:10} median {medians[what]:.0f}/s "
                    f"(spread {min(found):.0f}-{max(found):.0f})"
                )
            share = medians["executor"] / medians["bare loop"]
            print(f"{name:8} executor is at {share:.0%} of the bare loop")
        finally:
            server.terminate()


def main() -> int:
    """Parse the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="crawl this folder of files instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=32)
    arguments = parser.parse_args()
    if arguments.folder:
        bench("folder", arguments.folder, arguments.rounds, arguments.at_once)
        return 0
    for name, pages, links, paragraphs in (("small", 1200, 30, 100), ("heavy", 500, 300, 900)):
        with tempfile.TemporaryDirectory() as folder:
            make_site(Path(folder), pages, links, paragraphs)
            bench(name, Path(folder), arguments.rounds, arguments.at_once)
    return 0


if __name__ == "__main__":
    sys.exit(main())
