"""What a site's robots.txt asks of us (RFC 9309), fetched once per origin and kept a day."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from protego import Protego

from executors.charset import as_utf8
from executors.egress import EgressRefused
from executors.fetch import Fetcher, FetchFailed, Limits, RedirectRefused, retry_after_s
from executors.urls import Target

# The name site owners write after "User-agent:".
PRODUCT_TOKEN: Final = "zmqcluster"

KEEP_S: Final = 24 * 3600.0
# RFC 9309, 2.3.1.2 and 2.5: at least five redirects, at least 500 KiB.
_REDIRECTS_MAX: Final = 5
_LIMITS: Final = Limits(
    headers_s=15, body_s=15, bytes_max=512 * 1024, media_bytes_max=512 * 1024, keep_cut=True
)
# An unreachable robots.txt closes the site; we ask again after this long, doubled each time.
CLOSED_FIRST_S: Final = 10.0
CLOSED_MAX_S: Final = 600.0
CRAWL_DELAY_MAX_S: Final = 300.0
_ORIGINS_MAX: Final = 10_000
_ANSWERS_MAX: Final = 50_000


class RobotsClosed(Exception):
    """The site's rules cannot be had, so nothing may be fetched for now (RFC 9309, 2.3.1.4)."""

    def __init__(self, reason: str, for_s: float) -> None:
        super().__init__(reason)
        self.for_s = for_s


class Rules:
    """One origin's rules for us. text: of robots.txt, "" when there is none."""

    def __init__(self, text: str = "") -> None:
        self._file = Protego.parse(text) if text else None
        self.allow_all = self._file is None
        self._answers: dict[str, bool] = {}
        delay_s = self._file.crawl_delay(PRODUCT_TOKEN) if self._file else None
        # A site that asks for an hour between pages means "go away"; five minutes it gets.
        self.crawl_delay_s = min(delay_s or 0.0, CRAWL_DELAY_MAX_S)

    def allow(self, target: Target) -> bool:
        """May we fetch this target of the origin?"""
        if self._file is None:
            return True
        answer = self._answers.get(target.url)
        if answer is None:
            if len(self._answers) >= _ANSWERS_MAX:
                self._answers.clear()
            answer = self._file.can_fetch(target.url, PRODUCT_TOKEN)
            self._answers[target.url] = answer
        return answer


Verdict = Rules | RobotsClosed | EgressRefused


class _Entry:
    """What is known of one origin. verdict: the last good rules, or why there are none."""

    def __init__(self) -> None:
        self.verdict: Verdict | None = None
        self.good_until = 0.0
        self.failures = 0
        self.fetching: asyncio.Task[Verdict] | None = None


class RobotsCache:
    """Rules of many origins, for one event loop. clock: seconds, monotonic."""

    def __init__(self, fetcher: Fetcher, clock: Callable[[], float] = time.monotonic) -> None:
        self._fetcher = fetcher
        self._clock = clock
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    async def rules_of(self, origin: str, delay_s: float = 0.0) -> Rules:
        """The origin's rules; many who ask at once cause one request.

        delay_s: a request made for this keeps that distance to others of this process, and those
        with a delay keep theirs to it.

        Raises RobotsClosed, and EgressRefused when the origin's address is none of ours.
        """
        entry = self._entry(origin)
        verdict = entry.verdict
        if verdict is None or self._clock() >= entry.good_until:
            if entry.fetching is None:
                entry.fetching = asyncio.create_task(self._refresh(origin, entry, delay_s))
            # One asker's cancellation must not take the answer from the others.
            verdict = await asyncio.shield(entry.fetching)
        match verdict:
            case Rules():
                return verdict
            case RobotsClosed():
                raise RobotsClosed(str(verdict), max(0.0, entry.good_until - self._clock()))
            case EgressRefused():
                raise EgressRefused(verdict.sentence)

    async def close(self) -> None:
        """Stop what is still being fetched."""
        fetching = [entry.fetching for entry in self._entries.values() if entry.fetching]
        for each in fetching:
            each.cancel()
        await asyncio.gather(*fetching, return_exceptions=True)
        self._entries.clear()

    def _entry(self, origin: str) -> _Entry:
        entry = self._entries.get(origin)
        if entry is None:
            entry = self._entries[origin] = _Entry()
            if len(self._entries) > _ORIGINS_MAX:
                self._entries.popitem(last=False)
        else:
            self._entries.move_to_end(origin)
        return entry

    async def _refresh(self, origin: str, entry: _Entry, delay_s: float) -> Verdict:
        try:
            verdict = await self._fetch(f"{origin}/robots.txt", delay_s)
        finally:
            entry.fetching = None
        keep_s = KEEP_S
        match verdict:
            case Rules():
                entry.failures = 0
            case RobotsClosed():
                keep_s = max(verdict.for_s, min(CLOSED_FIRST_S * 2**entry.failures, CLOSED_MAX_S))
                entry.failures = min(entry.failures + 1, 16)
                # Rules we once had hold on while the site is in trouble.
                if isinstance(entry.verdict, Rules):
                    verdict = entry.verdict
            case EgressRefused():
                keep_s = CLOSED_FIRST_S
        entry.verdict = verdict
        entry.good_until = self._clock() + keep_s
        return verdict

    async def _fetch(self, url: str, delay_s: float) -> Verdict:
        try:
            response = await self._fetcher.follow(
                url, _LIMITS, hops_max=_REDIRECTS_MAX, delay_s=delay_s
            )
        except EgressRefused as refused:
            return refused
        except RedirectRefused:
            return Rules()  # RFC 9309, 2.3.1.2: as good as none.
        except FetchFailed as error:
            return RobotsClosed(f"{url} cannot be had: {error}", 0.0)
        status = response.status
        if status == 429 or status >= 500:
            return RobotsClosed(f"{url}: HTTP {status}", retry_after_s(response) or 0.0)
        if status >= 300 or response.cut == "undecodable":
            return Rules()
        return Rules(as_utf8(response.body, "utf-8").decode("utf-8", "replace"))
