"""Task type `crawl`: fetch one page, keep what it is, queue the in-scope links as tasks.

One task is one request (robots.txt aside, once a day and origin). A redirect is a result of its
own, and its target a child like any link: so every hop passes the scope, the egress guard,
robots.txt and the fleet-wide limit of its own origin, and no URL is fetched twice in a job.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from executors.base import ExecutorSettings, TaskContext, TaskExecutor
from executors.context import OUTPUT_BYTES_MAX
from executors.egress import EgressRefused
from executors.fetch import (
    DEFAULT_LIMITS,
    REDIRECTS_MAX,
    Fetcher,
    FetchFailed,
    Limits,
    Response,
    as_task_error,
    retry_after_s,
)
from executors.html import Page
from executors.parser import PageParser, Unparseable
from executors.robots import RobotsCache, RobotsClosed, Rules
from executors.urls import (
    URL_CHARS_MAX,
    BadUrl,
    LinkJoiner,
    ScopeKind,
    Target,
    canonical,
    join,
    scope_of,
)
from executors.visited import Visited
from zmqcluster.errors import TaskRetryable
from zmqcluster.messages import TaskSpec

TASK_TYPE: Final = "crawl"
PAGES_TABLE: Final = "pages"

# What a public site gets when neither the job nor its robots.txt says anything.
POLITE_DELAY_S: Final = 1.0
POLITE_CONCURRENCY: Final = 4
# A 429 that does not say for how long.
TOO_MANY_REQUESTS_S: Final = 10.0
# Tasks handed out before the master knew of a delay wait for each other so long at most.
UNPACED_WAIT_S: Final = 30.0
# A limit is told to the fleet this often while pages of the origin are fetched here.
LIMIT_REPEAT_S: Final = 60.0
# Between links of one page the loop turns, so that a page full of them holds up nobody.
LINKS_AT_ONCE: Final = 1_000
TURN_S: Final = 0.02
# Other origins on one page (scope domain) whose limits travel with its links.
ORIGINS_PER_PAGE_MAX: Final = 32
_encoder: Final = msgspec.msgpack.Encoder()
_URL_KEY: Final = _encoder.encode("url")

ORIGINS_TOLD_MAX: Final = 10_000
# Children travel with the result in one frame; what does not fit is counted, not queued.
CHILDREN_BYTES_MAX: Final = OUTPUT_BYTES_MAX - 256 * 1024
# What a child takes on the wire beside its URLs, at most.
CHILD_BYTES: Final = 256
HTML_TYPES: Final = frozenset({"text/html", "application/xhtml+xml"})
# Answers that say "later": the rest of the 4xx are facts about the page.
RETRYABLE_STATUSES: Final = frozenset({408, 425, 429})


class CrawlParams(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of `crawl`.

    scope: page (this URL only), prefix (below its folder), host, domain (host and all below it).
    scope_base: the URL the scope hangs on; empty means url. depth: links from here still to go.
    delay_s, concurrency: the limit of every origin met, fleet-wide; None means 1 s and 4 for
    public sites and no limit for what egress_allow opens. robots.txt can only make it slower.
    hops: redirects that led here.
    """

    url: Annotated[str, Meta(min_length=1, max_length=URL_CHARS_MAX)]
    scope: ScopeKind = ScopeKind.PREFIX
    scope_base: Annotated[str, Meta(max_length=URL_CHARS_MAX)] = ""
    depth: Annotated[int, Meta(ge=0, le=1000)] = 20
    delay_s: Annotated[float, Meta(ge=0, le=3600)] | None = None
    concurrency: Annotated[int, Meta(ge=0, le=10_000)] | None = None
    bytes_max: Annotated[int, Meta(ge=1024, le=64 * 1024 * 1024)] = DEFAULT_LIMITS.bytes_max
    follow_nofollow: bool = False
    hops: Annotated[int, Meta(ge=0, le=REDIRECTS_MAX)] = 0

    def __post_init__(self) -> None:
        """Refuses what is not an http(s) URL when the task is submitted, not when it runs."""
        for name, url in (("url", self.url), ("scope_base", self.scope_base)):
            try:
                if url or name == "url":
                    canonical(url)
            except BadUrl as error:
                raise ValueError(f"{name}: {url!r:.200} given; {error}") from None


class Crawl(TaskExecutor):
    """Runs crawl tasks: one HTTP client, one robots cache and one link memo per host process."""

    task_type = TASK_TYPE
    params = CrawlParams
    # A task begins, for its origin, with the request for its page: robots.txt comes before that,
    # while no other task of the origin can start anywhere.
    tells_begin = True

    async def setup(self, settings: ExecutorSettings) -> None:
        """Open the connection pool. Raises ConfigError for a bad egress_allow."""
        self._fetcher = Fetcher(settings)
        await self._fetcher.open()
        self._robots = RobotsCache(self._fetcher)
        self._parser = PageParser()
        self._joiner = LinkJoiner()
        self._visited = Visited()
        self._told: dict[str, tuple[float, int, float]] = {}

    async def close(self) -> None:
        """Close connections and the parser's helper."""
        await self._robots.close()
        await self._parser.close()
        await self._fetcher.close()

    async def run(self, context: TaskContext, params: CrawlParams) -> dict[str, Any]:
        """Fetch the page and return what docs/crawl.md calls its result."""
        target = canonical(params.url)
        self._visited.add(context.job_id, target.url)
        delay_s, _ = self._limit_of(params)
        if not context.is_paced:
            # The master knows of no limit yet, so it should before the first request.
            self._tell_limit(context, params, target.origin)
        self._raise_if_far(context, target, delay_s)
        rules = await self._rules(context, target, delay_s)
        self._tell_limit(context, params, target.origin, rules.crawl_delay_s)
        if not rules.allow(target):
            return self._kept(context, target, page_row(target, params, None, "robots"))
        delay_s = max(delay_s, rules.crawl_delay_s)
        self._raise_if_far(context, target, delay_s)
        response = await self._get(context, params, target, delay_s)
        _raise_if_later(context, response)
        if response.redirect is not None:
            return self._redirected(context, params, response, response.redirect)
        why = _why_unread(response)
        page = None
        if not why:
            try:
                page = await self._parser.parse(
                    response.body, response.charset, params.follow_nofollow
                )
            except Unparseable:
                why = "unparseable"
        row = page_row(target, params, response, why, page)
        if page is None:
            return self._kept(context, target, row)
        return await self._read(context, params, target, row, page, rules)

    def _raise_if_far(self, context: TaskContext, target: Target, delay_s: float) -> None:
        """Raises TaskRetryable rather than hold a slot until the deadline for its turn."""
        wait_s = self._fetcher.pacer.wait_s(target.origin, delay_s)
        patience_s = context.remaining_ms() / 2000
        if not context.is_paced:
            patience_s = min(patience_s, UNPACED_WAIT_S)
        if wait_s > patience_s:
            raise TaskRetryable(f"{target.origin} is asked slowly", int(wait_s * 1000))

    async def _rules(self, context: TaskContext, target: Target, delay_s: float) -> Rules:
        try:
            return await self._robots.rules_of(target.origin, delay_s)
        except RobotsClosed as closed:
            context.report_rate(target.origin, closed_for_s=closed.for_s)
            raise TaskRetryable(str(closed), int(closed.for_s * 1000)) from None
        except EgressRefused as refused:
            raise as_task_error(target.url, refused) from None

    async def _get(
        self, context: TaskContext, params: CrawlParams, target: Target, delay_s: float
    ) -> Response:
        def on_leaving() -> None:
            if context.is_paced:
                context.tell_begun()
            elif delay_s:
                # Nobody counts this start; the next one has to keep its distance all the same.
                context.report_rate(target.origin, closed_for_s=delay_s)

        watch = on_leaving if context.is_paced or delay_s else None
        left_s = context.remaining_ms() / 1000
        limits = Limits(
            headers_s=min(DEFAULT_LIMITS.headers_s, left_s),
            body_s=min(DEFAULT_LIMITS.body_s, left_s),
            bytes_max=params.bytes_max,
            media_bytes_max=min(params.bytes_max, DEFAULT_LIMITS.media_bytes_max),
        )
        try:
            return await self._fetcher.get(
                target, limits, delay_s=delay_s or None, on_leaving=watch
            )
        except (FetchFailed, EgressRefused) as error:
            raise as_task_error(target.url, error) from None

    def _redirected(
        self, context: TaskContext, params: CrawlParams, response: Response, location: str
    ) -> dict[str, Any]:
        """Keep the redirect as this page's result, and queue where it goes."""
        target = response.target
        base = canonical(scope_base(params))
        # A seed that moved takes the scope along: example.com to www.example.com.
        is_seed = base == target
        try:
            goal = join(target.url, location)
        except BadUrl:
            row = page_row(target, params, response, "bad_redirect")
            return self._kept(context, target, row)
        looped = goal == target or params.hops >= REDIRECTS_MAX
        row = page_row(target, params, response, "redirect_loop" if looped else "redirect")
        row["final_url"] = goal.url
        row["links"] = 1
        if looped:
            return self._kept(context, target, row)
        if not is_seed and not scope_of(params.scope, base.url).admits(goal):
            row["links_out_of_scope"] = 1
            return self._kept(context, target, row)
        row["links_queued"] = 1
        self._kept(context, target, row)
        if goal.origin != target.origin:
            self._tell_limit(context, params, goal.origin)
        data = child_data(params, goal.url if is_seed else base.url, params.depth)
        queue(context, [goal], data | {"hops": params.hops + 1})
        return row

    async def _read(
        self,
        context: TaskContext,
        params: CrawlParams,
        target: Target,
        row: dict[str, Any],
        page: Page,
        rules: Rules,
    ) -> dict[str, Any]:
        """Keep a page that was parsed, and queue those of its links that belong to the crawl."""
        children = await self._chosen(context, params, target, row, page, rules)
        # The record first: children are cut to what fits beside it.
        self._kept(context, target, row)
        for origin in {child.origin for child in children} - {target.origin}:
            self._tell_limit(context, params, origin)
        queue(context, children, child_data(params, scope_base(params), params.depth - 1))
        return row

    async def _chosen(
        self,
        context: TaskContext,
        params: CrawlParams,
        target: Target,
        row: dict[str, Any],
        page: Page,
        rules: Rules,
    ) -> list[Target]:
        """The links to queue; what became of the others is counted in row."""
        found = await self._joined(_base_of(target, page), page.links)
        row["links"] = len(found) + page.links_cut
        if page.nofollow or params.depth == 0:
            return []
        scope = scope_of(params.scope, scope_base(params))
        admits, seen = scope.admits, self._visited.of(context.job_id)
        item_bytes = len(scope.seed.url) + CHILD_BYTES
        room = CHILDREN_BYTES_MAX
        origins = {target.origin}
        chosen: list[Target] = []
        known = outside = disallowed = 0
        turn_at = time.monotonic() + TURN_S
        for number, link in enumerate(found):
            # A large robots.txt takes ms for each of them.
            if number % 16 == 15 and time.monotonic() > turn_at:
                await asyncio.sleep(0)
                turn_at = time.monotonic() + TURN_S
            url, origin, _ = link
            if url in seen:
                known += 1
            elif not admits(link):
                outside += 1
            elif not rules.allow_all and origin == target.origin and not rules.allow(link):
                disallowed += 1
            else:
                origins.add(origin)
                room -= 2 * len(url) + len(origin) + item_bytes
                if room >= 0 and len(origins) <= ORIGINS_PER_PAGE_MAX:
                    chosen.append(link)
        row["links_known"] = known
        row["links_out_of_scope"] = outside
        row["links_disallowed"] = disallowed
        row["links_queued"] = len(chosen)
        row["links_truncated"] = row["links"] - known - outside - disallowed - len(chosen)
        return chosen

    async def _joined(self, base: str, references: list[str]) -> list[Target]:
        """The distinct targets of a page, in order; the loop turns between many."""
        if len(references) <= LINKS_AT_ONCE:
            return self._joiner.join_all(base, references)
        found: dict[str, Target] = {}
        for start in range(0, len(references), LINKS_AT_ONCE):
            some = self._joiner.join_all(base, references[start : start + LINKS_AT_ONCE])
            found.update((target.url, target) for target in some)
            await asyncio.sleep(0)
        return list(found.values())

    def _kept(self, context: TaskContext, target: Target, row: dict[str, Any]) -> dict[str, Any]:
        context.add_record(PAGES_TABLE, target.url, row)
        return row

    def _limit_of(self, params: CrawlParams) -> tuple[float, int]:
        """(delay in s, concurrency) for any origin this task meets; 0 is no limit."""
        is_open = self._fetcher.is_opened(canonical(params.url))
        delay_s, concurrency = params.delay_s, params.concurrency
        if delay_s is None:
            delay_s = 0.0 if is_open else POLITE_DELAY_S
        if concurrency is None:
            concurrency = 0 if is_open else POLITE_CONCURRENCY
        return delay_s, concurrency

    def _tell_limit(
        self, context: TaskContext, params: CrawlParams, origin: str, crawl_delay_s: float = 0.0
    ) -> None:
        """Report the origin's limit to the fleet, if it has one and was not told lately."""
        delay_s, concurrency = self._limit_of(params)
        delay_s = max(delay_s, crawl_delay_s)
        if not delay_s and not concurrency:
            return
        now = time.monotonic()
        told = self._told.get(origin)
        is_told = told is not None and told[:2] == (delay_s, concurrency) and now < told[2]
        if is_told and context.is_paced:
            return
        if len(self._told) > ORIGINS_TOLD_MAX:
            self._told.clear()
        self._told[origin] = (delay_s, concurrency, now + LIMIT_REPEAT_S)
        # Nobody keeps other tasks away while one runs that the master did not pace.
        is_own = origin == canonical(params.url).origin
        closed_for_s = delay_s if delay_s and is_own and not context.is_paced else None
        context.report_rate(origin, delay_s, concurrency, closed_for_s)


def scope_base(params: CrawlParams) -> str:
    """The URL the scope hangs on; a seed's own unless it says otherwise."""
    return params.scope_base or params.url


def child_data(params: CrawlParams, base: str, depth: int) -> dict[str, Any]:
    """The parameters every child of a page shares; defaults are left out, as links are many."""
    data: dict[str, Any] = {"scope": str(params.scope), "scope_base": base, "depth": depth}
    if params.delay_s is not None:
        data["delay_s"] = params.delay_s
    if params.concurrency is not None:
        data["concurrency"] = params.concurrency
    if params.bytes_max != DEFAULT_LIMITS.bytes_max:
        data["bytes_max"] = params.bytes_max
    if params.follow_nofollow:
        data["follow_nofollow"] = True
    return data


def queue(context: TaskContext, targets: list[Target], shared: dict[str, Any]) -> None:
    """Queue a crawl task for each target: shared parameters and its URL.

    context.add_child packs and checks each child, 5 µs a link. Here they differ in one text of
    known bounds, which is put before the packed rest: 1 µs. The bytes were counted by the caller.
    """
    packed = _encoder.encode({"url": "", **shared})
    # A map of n pairs is one byte; then the key "url", then one byte for its empty text.
    head, tail = packed[: 1 + len(_URL_KEY)], packed[2 + len(_URL_KEY) :]
    encode = _encoder.encode
    context.children.extend(
        TaskSpec(
            TASK_TYPE,
            b"".join((head, encode(url), tail)),
            unique_key=url,
            rate_key=origin,
        )
        for url, origin, _ in targets
    )


def page_row(
    target: Target,
    params: CrawlParams,
    response: Response | None,
    skipped: str,
    page: Page | None = None,
) -> dict[str, Any]:
    """A page's result and record, as docs/crawl.md describes it. response None: not fetched."""
    row: dict[str, Any] = {
        "url": target.url,
        "final_url": target.url,
        "skipped": skipped,
        "depth": params.depth,
        "redirects": params.hops,
        "status": 0,
        "fetched_wall": int(time.time() * 1000),
    }
    if response is not None:
        row["status"] = response.status
        row["content_type"] = response.content_type[:100]
        row["bytes"] = len(response.body) or response.wire_bytes
        row["wire_bytes"] = response.wire_bytes
        row["fetched_wall"] = response.fetched_wall_ms
        row["elapsed_ms"] = response.elapsed_ms
        row["content_hash"] = "" if response.cut else hashlib.sha256(response.body).hexdigest()
    if page is not None:
        row["title"] = page.title
        row["text_length"] = page.text_chars
        row["language"] = page.language
        row["canonical"] = page.canonical
        row["noindex"] = page.noindex
        row["nofollow"] = page.nofollow
        row["links_nofollow"] = page.links_nofollow
    row.update(_NO_LINKS)
    return row


_NO_LINKS: Final = {
    "links": 0,
    "links_queued": 0,
    "links_known": 0,
    "links_out_of_scope": 0,
    "links_disallowed": 0,
    "links_truncated": 0,
}


def _raise_if_later(context: TaskContext, response: Response) -> None:
    """Raises TaskRetryable for answers that mean "not now", and closes the origin if asked."""
    status = response.status
    if status < 500 and status not in RETRYABLE_STATUSES:
        return
    wait_s = 0.0
    if status in (429, 503):
        asked_s = retry_after_s(response)
        wait_s = (TOO_MANY_REQUESTS_S if status == 429 else 0.0) if asked_s is None else asked_s
        if wait_s:
            context.report_rate(response.target.origin, closed_for_s=wait_s)
    raise TaskRetryable(f"{response.target.url}: HTTP {status}", int(wait_s * 1000))


def _why_unread(response: Response) -> str:
    """Why this answer is kept without looking for links; "" for a page."""
    if response.cut:
        return response.cut
    if not 200 <= response.status < 300:
        return "status"
    kind = response.content_type
    if kind in HTML_TYPES:
        return ""
    # Nothing said: what begins like a page is one.
    start = response.body[:256].lstrip().lower() if not kind else b""
    return "" if start.startswith((b"<!doctype html", b"<html")) else "not_html"


def _base_of(target: Target, page: Page) -> str:
    if page.base:
        try:
            return join(target.url, page.base).url
        except BadUrl:
            return target.url
    return target.url
