"""One HTTP(S) request at a time, with a deadline on every phase and a cap on every size.

Redirects are answers here, not detours: the caller decides about each hop. Bodies are read as a
stream and unpacked by us, so a bomb costs its cap and nothing more. What may be connected to is
decided in egress.py, on the address itself.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final

import aiohttp
from aiohttp.abc import AbstractResolver
from aiohttp.http_exceptions import HttpProcessingError
from msgspec import Struct
from yarl import URL

from executors.body import read_body
from executors.connector import Connector
from executors.context import ExecutorSettings
from executors.egress import Egress, EgressRefused, GuardedResolver, guarded_socket
from executors.pacing import Pacer
from executors.urls import BadUrl, Target, canonical, for_request, join
from zmqcluster.errors import TaskRejected, TaskRetryable

REDIRECTS_MAX: Final = 10
REDIRECT_STATUSES: Final = frozenset({301, 302, 303, 307, 308})
RETRY_AFTER_MAX_S: Final = 3600.0
# Real sites send policy headers well past the client's own 8 KiB.
HEADER_BYTES_MAX: Final = 32 * 1024
CONNECTIONS_MAX: Final = 256
# A net below the fleet-wide limits of the dispatcher, for sites nobody gave a limit.
CONNECTIONS_PER_SITE_MAX: Final = 64
KEEP_ALIVE_S: Final = 15.0
DNS_CACHE_S: Final = 60


class Limits(Struct, frozen=True):
    """What one request may take.

    headers_s: from the start (connect included) to the end of the headers. bytes_max: of the body,
    before and after unpacking. media_bytes_max: the same for types nobody reads links from.
    keep_cut: a body that is too big keeps its first bytes_max, instead of nothing.
    """

    connect_s: float = 10.0
    headers_s: float = 30.0
    body_s: float = 60.0
    bytes_max: int = 8 * 1024 * 1024
    media_bytes_max: int = 256 * 1024
    keep_cut: bool = False


DEFAULT_LIMITS: Final = Limits()


class Response(Struct, frozen=True):
    """An answer. body: unpacked. wire_bytes: of the body as sent (announced, where not read).

    content_type: lower case, without parameters. charset: its parameter, or "".
    cut: why the body is not whole: "", "too_big" or "undecodable".
    """

    target: Target
    status: int
    headers: Mapping[str, str]
    content_type: str
    charset: str
    body: bytes
    wire_bytes: int
    cut: str
    fetched_wall_ms: int
    elapsed_ms: int

    @property
    def redirect(self) -> str | None:
        """Where it sends us, as written, if it does."""
        return self.headers.get("Location") if self.status in REDIRECT_STATUSES else None


class FetchFailed(Exception):
    """No answer. lasting: the same request later would fail the same way."""

    def __init__(self, reason: str, *, lasting: bool = False) -> None:
        super().__init__(reason)
        self.lasting = lasting


class RedirectRefused(FetchFailed):
    """A redirect nobody should follow: one too many, or to something that is not http(s)."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, lasting=True)


class Fetcher:
    """An HTTP client for one event loop: one connection pool, no cookies, no proxies.

    Between open() and close(), which both belong into that loop.
    """

    def __init__(
        self, settings: ExecutorSettings, resolver: AbstractResolver | None = None
    ) -> None:
        """resolver: stands in for the system's DNS. Raises ConfigError for a bad egress_allow."""
        self.egress = Egress(settings.egress_allow, settings.contact)
        self._user_agent = settings.user_agent
        self._resolver = GuardedResolver(self.egress, resolver)
        self._session: aiohttp.ClientSession | None = None
        # The same client with an eye on the moment a request leaves, for those who have to know.
        self._watched: aiohttp.ClientSession | None = None
        self.pacer = Pacer()

    async def open(self) -> None:
        """Make the connection pool; connects to nobody yet."""
        connector = Connector(
            limit=CONNECTIONS_MAX,
            limit_per_host=CONNECTIONS_PER_SITE_MAX,
            ttl_dns_cache=DNS_CACHE_S,
            keepalive_timeout=KEEP_ALIVE_S,
            resolver=self._resolver,
            socket_factory=functools.partial(guarded_socket, self.egress),
        )
        self._session = self._new_session(connector)
        watch = aiohttp.TraceConfig()
        watch.on_request_headers_sent.append(_on_request_leaving)
        self._watched = self._new_session(connector, [watch])

    def _new_session(
        self, connector: aiohttp.BaseConnector, watches: list[aiohttp.TraceConfig] | None = None
    ) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={
                "User-Agent": self._user_agent,
                "Accept": "text/html,application/xhtml+xml,*/*;q=0.8",
                "Accept-Encoding": "gzip, deflate",
            },
            timeout=aiohttp.ClientTimeout(total=None),
            trust_env=False,
            auto_decompress=False,
            max_line_size=HEADER_BYTES_MAX,
            max_field_size=HEADER_BYTES_MAX,
            trace_configs=watches,
        )

    async def close(self) -> None:
        """Close every connection."""
        session, self._session = self._session, None
        watched, self._watched = self._watched, None
        if watched is not None:
            watched.detach()
        if session is not None:
            await session.close()

    def is_opened(self, target: Target) -> bool:
        """Does it live in a network the operator opened? Names count once they were looked up."""
        host = target.host.strip("[]")
        return self.egress.is_opened(host) or self._resolver.is_opened(host)

    async def get(
        self,
        target: Target,
        limits: Limits = DEFAULT_LIMITS,
        headers: Mapping[str, str] | None = None,
        *,
        delay_s: float | None = None,
        on_leaving: Callable[[], None] | None = None,
    ) -> Response:
        """One GET, redirects not followed.

        delay_s: least time since this process's last request to this origin that had one, if only
        0; None takes no part in that. The wait does not count as time of the request.
        on_leaving: called when, connected, the request is about to be written.

        Raises FetchFailed, and EgressRefused when the address is not one we connect to.
        """
        assert self._session is not None, "open() first"
        assert self._watched is not None, "open() first"
        if delay_s is None:
            session = self._session if on_leaving is None else self._watched
            return await self._try(session, target, limits, headers, on_leaving)
        async with self.pacer.turn(target.origin, delay_s) as turn:

            def leave() -> None:
                turn.left()
                if on_leaving is not None:
                    on_leaving()

            return await self._try(self._watched, target, limits, headers, leave)

    async def _try(
        self,
        session: aiohttp.ClientSession,
        target: Target,
        limits: Limits,
        headers: Mapping[str, str] | None,
        on_leaving: Callable[[], None] | None,
    ) -> Response:
        try:
            return await self._get(session, target, limits, headers, on_leaving)
        except (aiohttp.ClientError, HttpProcessingError, OSError, ValueError) as error:
            raise _classified(error) from None

    async def follow(
        self,
        url: str,
        limits: Limits = DEFAULT_LIMITS,
        headers: Mapping[str, str] | None = None,
        hops_max: int = REDIRECTS_MAX,
        *,
        delay_s: float | None = None,
        on_leaving: Callable[[], None] | None = None,
    ) -> Response:
        """A GET that goes along with up to hops_max redirects, each as carefully as the first.

        delay_s, on_leaving: as for get(), for each hop. headers go to the first origin only: a
        secret for one site is none of another's business.
        Raises FetchFailed, EgressRefused.
        """
        target = _fetchable(url)
        first = target.origin
        for _ in range(hops_max + 1):
            own = headers if target.origin == first else None
            response = await self.get(target, limits, own, delay_s=delay_s, on_leaving=on_leaving)
            location = response.redirect
            if location is None:
                return response
            try:
                target = join(target.url, location)
            except BadUrl as error:
                raise RedirectRefused(f"redirected to {location!r:.200}: {error}") from None
        raise RedirectRefused(f"more than {hops_max} redirects")

    async def fetch(
        self,
        url: str,
        limits: Limits = DEFAULT_LIMITS,
        headers: Mapping[str, str] | None = None,
        *,
        delay_s: float | None = None,
        on_leaving: Callable[[], None] | None = None,
    ) -> Response:
        """follow() for a task that wants a good answer or none.

        Raises TaskRetryable for what may pass (network, 429, 5xx), TaskRejected for what will not.
        """
        try:
            response = await self.follow(
                url, limits, headers, delay_s=delay_s, on_leaving=on_leaving
            )
        except (FetchFailed, EgressRefused) as error:
            raise as_task_error(url, error) from None
        if response.status == 429 or response.status >= 500:
            after_s = retry_after_s(response) or 0.0
            raise TaskRetryable(f"{url}: HTTP {response.status}", int(after_s * 1000))
        if response.status >= 300:
            raise TaskRejected(f"{url}: HTTP {response.status}")
        if response.cut:
            raise TaskRejected(f"{url}: body is {response.cut.replace('_', ' ')}")
        return response

    async def _get(
        self,
        session: aiohttp.ClientSession,
        target: Target,
        limits: Limits,
        headers: Mapping[str, str] | None,
        on_leaving: Callable[[], None] | None,
    ) -> Response:
        began = time.monotonic()
        wall_ms = int(time.time() * 1000)
        waiting_for = f"no headers within {limits.headers_s:g} s"
        answer: aiohttp.ClientResponse | None = None
        try:
            async with asyncio.timeout(limits.headers_s) as deadline:
                answer = await session.get(
                    URL(for_request(target.url), encoded=True),
                    headers=headers,
                    allow_redirects=False,
                    timeout=_client_timeout(limits.connect_s),
                    trace_request_ctx=on_leaving,
                )
                waiting_for = f"body not complete within {limits.body_s:g} s"
                deadline.reschedule(asyncio.get_running_loop().time() + limits.body_s)
                content_type, charset = _content_type(answer.headers.get("Content-Type", ""))
                cap = limits.bytes_max if _is_text(content_type) else limits.media_bytes_max
                body, wire_bytes, cut = await read_body(answer, cap, limits.keep_cut)
                if not cut:
                    answer.release()
        except aiohttp.ClientError:
            raise  # The client's own connect timeout is a TimeoutError too, and says more.
        except TimeoutError:
            raise FetchFailed(waiting_for) from None
        finally:
            # What is left of a body that was cut is not worth reading; the connection goes with
            # it. After a release this does nothing.
            if answer is not None:
                answer.close()
        return Response(
            target=target,
            status=answer.status,
            headers=answer.headers,
            content_type=content_type,
            charset=charset,
            body=body,
            wire_bytes=wire_bytes,
            cut=cut,
            fetched_wall_ms=wall_ms,
            elapsed_ms=int((time.monotonic() - began) * 1000),
        )


async def _on_request_leaving(
    _session: aiohttp.ClientSession, context: Any, _params: aiohttp.TraceRequestHeadersSentParams
) -> None:
    """Called on a connection that stands, right before the request is written to it."""
    context.trace_request_ctx()


def as_task_error(url: str, error: FetchFailed | EgressRefused) -> TaskRetryable | TaskRejected:
    """What a failed request means for the task that made it."""
    if isinstance(error, EgressRefused):
        return TaskRejected(f"{url}: {error.sentence}")
    kind = TaskRejected if error.lasting else TaskRetryable
    return kind(f"{url}: {error}")


def retry_after_s(response: Response) -> float | None:
    """How long the server wants to be left alone: seconds or a date, at most RETRY_AFTER_MAX_S.

    None when it says nothing that can be understood.
    """
    text = response.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text[:10]), RETRY_AFTER_MAX_S)
    try:
        until = parsedate_to_datetime(text)
    except (TypeError, ValueError, OverflowError):
        return None
    wait_s = until.timestamp() - response.fetched_wall_ms / 1000
    return min(max(wait_s, 0.0), RETRY_AFTER_MAX_S)


@functools.lru_cache(maxsize=64)
def _client_timeout(connect_s: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=None, sock_connect=connect_s)


def _fetchable(url: str) -> Target:
    try:
        return canonical(url)
    except BadUrl as error:
        raise FetchFailed(str(error), lasting=True) from None


@functools.lru_cache(maxsize=256)
def _content_type(header: str) -> tuple[str, str]:
    """Type and charset of a Content-Type header, both possibly empty."""
    kind, _, parameters = header.partition(";")
    charset = ""
    for parameter in parameters.split(";"):
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            charset = value.strip().strip("\"'")
            break
    return kind.strip().lower(), charset


def _is_text(content_type: str) -> bool:
    return (
        not content_type
        or content_type.startswith("text/")
        or content_type.endswith(("xml", "json", "javascript"))
    )


def _classified(error: Exception) -> FetchFailed | EgressRefused:
    """The client's many errors, as ours."""
    cause = getattr(error, "os_error", None) or error
    match cause:
        case EgressRefused():
            return cause
        case aiohttp.ClientConnectorCertificateError():
            return FetchFailed(f"bad certificate: {cause.certificate_error}", lasting=True)
        case aiohttp.InvalidURL():
            return FetchFailed(f"not a URL: {cause}", lasting=True)
        case aiohttp.ServerTimeoutError() | TimeoutError():
            return FetchFailed("no connection in time")
        case aiohttp.ClientResponseError() | HttpProcessingError():
            # From the second line on it quotes what the server sent.
            problem = cause.message.partition("\n")[0].rstrip(":")
            return FetchFailed(f"not HTTP as we know it: {problem:.200}")
        case UnicodeError():
            return FetchFailed("a host name that DNS cannot carry", lasting=True)
        case ValueError() if not isinstance(cause, OSError | aiohttp.ClientError):
            return FetchFailed(f"not a URL: {cause}", lasting=True)
    return FetchFailed(_one_line(cause))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300]
