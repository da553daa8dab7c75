"""A small web site for demos and tests: the same pages every time, on loopback only.

    python scripts/demo_site.py --port 0

prints "Demo site at http://127.0.0.1:PORT/" and serves until SIGTERM or SIGINT. It holds what
crawlers meet: articles that link each other, an index by topic, a redirect, a page that is gone,
one big page, a picture, a folder closed by robots.txt, a site next door that is out of scope.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Final

from aiohttp import web

ARTICLES: Final = 64
TOPICS: Final = ("queues", "clocks", "sockets", "files", "locks", "robots", "maps", "tides")
BIG_PAGE_PARAGRAPHS: Final = 1500
_WORDS: Final = (
    *("worker", "master", "queue", "task", "attempt", "lease", "credit", "page", "link", "crawl"),
    *("polite", "origin", "clock", "disk", "commit", "send", "late", "result", "kept", "twice"),
    *("once", "never", "always", "exactly", "small", "steady", "quiet", "plain"),
)
# One transparent pixel, a whole GIF.
_PICTURE: Final = bytes.fromhex(
    "47494638396101000100800000000000ffffff21f90401000000002c00000000010001000002024401003b"
)


Handler = Callable[[web.Request], Awaitable[web.Response]]


def pages() -> dict[str, str]:
    """Every HTML page by path."""
    site = {"/": _home()}
    for topic in TOPICS:
        site[f"/topics/{topic}.html"] = _topic(topic)
    for number in range(ARTICLES):
        site[f"/articles/{number}.html"] = _article(number)
    site["/about/"] = _page(
        "About", "<p>Made for demos.</p>" + _links(["/", "../topics/maps.html"])
    )
    site["/big.html"] = _big()
    site["/private/diary.html"] = _page("Diary", "<p>Not for robots.</p>" + _links(["/"]))
    return site


def make_app() -> web.Application:
    """The site as an aiohttp application."""
    app = web.Application()
    for path, text in pages().items():
        app.router.add_get(path, _answer(text, "text/html"))
    app.router.add_get("/robots.txt", _answer("User-agent: *\nDisallow: /private/\n", "text/plain"))
    app.router.add_get("/picture.gif", _answer(_PICTURE, "image/gif"))
    app.router.add_get("/old.html", _redirect)
    return app


def _answer(content: str | bytes, content_type: str) -> Handler:
    body = content.encode() if isinstance(content, str) else content

    async def handle(request: web.Request) -> web.Response:
        charset = "utf-8" if content_type.startswith("text/") else None
        return web.Response(body=body, content_type=content_type, charset=charset)

    return handle


async def _redirect(request: web.Request) -> web.Response:
    raise web.HTTPMovedPermanently("/articles/0.html")


def _page(title: str, body: str) -> str:
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"</head>\n<body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def _links(paths: list[str]) -> str:
    items = "".join(f'<li><a href="{path}">{path}</a></li>' for path in paths)
    return f"<ul>{items}</ul>"


def _home() -> str:
    paths = [f"/topics/{topic}.html" for topic in TOPICS]
    paths += [
        "about/",
        "/old.html",
        "/gone.html",
        "/big.html",
        "/picture.gif",
        "/private/diary.html",
    ]
    paths += ["http://127.0.0.1:9/next-door", "mailto:nobody@example.com", "#top"]
    return _page("Demo site", "<p>A small site to crawl.</p>" + _links(paths))


def _topic(topic: str) -> str:
    at = TOPICS.index(topic)
    paths = [f"../articles/{number}.html" for number in range(at, ARTICLES, len(TOPICS))]
    return _page(f"Topic: {topic}", _prose(topic, 2) + _links(["/", *paths]))


def _article(number: int) -> str:
    near = [f"{(number + step) % ARTICLES}.html#notes" for step in (1, 7, 19)]
    topic = TOPICS[number % len(TOPICS)]
    return _page(
        f"Article {number}", _prose(str(number), 6) + _links([f"../topics/{topic}.html", *near])
    )


def _big() -> str:
    return _page("Big page", _prose("big", BIG_PAGE_PARAGRAPHS) + _links(["/"]))


def _prose(seed: str, paragraphs: int) -> str:
    """The same words for the same seed, everywhere."""
    text = []
    for number in range(paragraphs):
        digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
        words = " ".join(_WORDS[byte % len(_WORDS)] for byte in digest)
        text.append(f"<p>{words.capitalize()}.</p>")
    return "\n".join(text)


async def serve(port: int) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    runner = web.AppRunner(make_app(), access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        bound = runner.addresses[0][1]
        print(f"Demo site at http://127.0.0.1:{bound}/", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()


def main() -> int:
    """Parse the arguments and serve."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; 0 takes a free one")
    port: int = parser.parse_args().port
    try:
        asyncio.run(serve(port))
    except (OSError, OverflowError) as error:
        print(f"Cannot listen on 127.0.0.1:{port}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
