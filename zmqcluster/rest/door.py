"""Who may come in: Host, Origin, token and size are checked here, before any route is looked for.

Everything is shut unless it is named open below, so a route cannot forget to ask for the token.
"""

from __future__ import annotations

import asyncio
import hmac
from collections import Counter
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from ipaddress import IPv6Address, ip_address
from typing import TYPE_CHECKING, Any, Final, cast

from litestar.enums import ScopeType

from zmqcluster.rest.problems import PROBLEM_JSON, Problem, bad_request, too_large, unavailable

if TYPE_CHECKING:
    from litestar.types import ASGIApp, Message, Receive, Scope, Send

BODY_BYTES_MAX: Final = 8 * 1024 * 1024
# All bodies being read at one time; each becomes about three times as much while it is decoded.
BODIES_BYTES_MAX: Final = 64 * 1024 * 1024
BODY_SECONDS_MAX: Final = 30.0

# Answers to anybody, from anywhere, with no data.
OPEN_PATHS: Final = frozenset({"/healthz"})
READ_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
LOCAL_HOSTS: Final = frozenset({"localhost", "127.0.0.1", "::1"})
# A proxy on this machine makes strangers look local; then the token is asked of everybody.
PROXY_HEADERS: Final = (b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip", b"via")

SECURITY_HEADERS: Final[Mapping[bytes, bytes]] = {
    b"x-content-type-options": b"nosniff",
    b"content-security-policy": b"default-src 'none'; frame-ancestors 'none'",
    b"cross-origin-resource-policy": b"same-origin",
    b"referrer-policy": b"no-referrer",
    b"cache-control": b"no-store",
}


class Door:
    """The outermost ASGI application. answered: counts how many requests got each status.

    hosts: names clients may call this master by, beside localhost and the address they reached.
    """

    def __init__(
        self, inner: ASGIApp, api_token: str, hosts: Iterable[str], answered: Counter[int]
    ) -> None:
        if not api_token:
            raise ValueError("an empty API token would open every door")
        self.inner = inner
        self._token = api_token.encode()
        self._hosts = LOCAL_HOSTS | {host.lower().strip("[]") for host in hosts}
        self._bodies_bytes = 0
        self._answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            return
        is_head = scope["method"] == "HEAD"
        answer = _Answer(send, self._answered, with_body=not is_head)
        body = _BodyReader(self, receive)
        try:
            self._admit(cast("Mapping[str, Any]", scope))
        except Problem as problem:
            await answer.refuse(problem)
            return
        try:
            # HEAD is GET without the body; no route has to know.
            inner_scope = cast("Scope", {**scope, "method": "GET"}) if is_head else scope
            await self.inner(inner_scope, body, answer)
        finally:
            self._bodies_bytes -= body.bytes_read

    def _admit(self, scope: Mapping[str, Any]) -> None:
        """Raises Problem unless this request may go on to the routes."""
        if scope["path"] in OPEN_PATHS:
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        self._check_host(headers, scope)
        _check_origin(headers, scope["scheme"])
        is_read = scope["method"] in READ_METHODS
        self._check_token(headers, is_open=is_read and _is_local(headers, scope))
        if not is_read:
            _check_body_headers(headers)

    def _check_host(self, headers: Mapping[bytes, bytes], scope: Mapping[str, Any]) -> None:
        """Refuse names that are not ours: a web page can point any name of its own at us."""
        given = headers.get(b"host", b"").decode("latin-1")
        server = scope.get("server")
        name = _host_name(given)
        if name not in self._hosts and not (server and name == server[0]):
            raise Problem(
                HTTPStatus.MISDIRECTED_REQUEST,
                "wrong_host",
                f"Host: given {given[:100]!r}; this master answers to localhost, to its own "
                "address, and to the names in allowed_hosts of its configuration.",
            )

    def _check_token(self, headers: Mapping[bytes, bytes], *, is_open: bool) -> None:
        given = headers.get(b"authorization")
        if given is None:
            if is_open:
                return
            raise _unauthorized(
                "This needs the API token: send `Authorization: Bearer TOKEN` with what is in "
                "the file api-token of the master's data directory.",
                "Bearer",
            )
        scheme, _, token = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token):
            raise _unauthorized(
                "The token given is not this master's; it is in the file api-token of the "
                "master's data directory.",
                'Bearer error="invalid_token"',
            )

    def take(self, count: int) -> None:
        """Count bytes of a body in memory; raises Problem when there are too many of them."""
        if self._bodies_bytes + count > BODIES_BYTES_MAX:
            raise unavailable("Too many large requests at once; ask again in a moment.")
        self._bodies_bytes += count


class _BodyReader:
    """receive() of one request: bounded in bytes and in time."""

    def __init__(self, door: Door, receive: Receive) -> None:
        self._door = door
        self._receive = receive
        self._deadline: float | None = None
        self._is_whole = False
        self.bytes_read = 0

    async def __call__(self) -> Any:
        if self._is_whole:
            return await self._receive()
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + BODY_SECONDS_MAX
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise Problem(
                HTTPStatus.REQUEST_TIMEOUT,
                "too_slow",
                f"The body did not arrive within {BODY_SECONDS_MAX:.0f} s.",
            ) from None
        self._is_whole = message["type"] != "http.request" or not message.get("more_body")
        self._count(len(cast("bytes", message.get("body", b""))))
        return message

    def _count(self, count: int) -> None:
        if self.bytes_read + count > BODY_BYTES_MAX:
            raise _body_too_large()
        self._door.take(count)
        self.bytes_read += count


class _Answer:
    """send() of one request: adds the headers every answer has, counts the status."""

    def __init__(self, send: Send, answered: Counter[int], *, with_body: bool) -> None:
        self._send = send
        self._with_body = with_body
        self._answered = answered

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._answered[message["status"]] += 1
            headers = list(message["headers"])
            present = {name.lower() for name, _ in headers}
            headers += [pair for pair in SECURITY_HEADERS.items() if pair[0] not in present]
            message["headers"] = headers
        elif message["type"] == "http.response.body" and not self._with_body:
            message["body"] = b""
        await self._send(message)

    async def refuse(self, problem: Problem) -> None:
        """The whole answer, as problem+json."""
        body = problem.body()
        headers = [
            (b"content-type", PROBLEM_JSON.encode()),
            (b"content-length", str(len(body)).encode()),
            *((name.lower().encode(), text.encode()) for name, text in problem.headers.items()),
        ]
        status = problem.status.value
        await self({"type": "http.response.start", "status": status, "headers": headers})
        await self({"type": "http.response.body", "body": body, "more_body": False})


def _host_name(host: str) -> str:
    """The name in a Host header, without port and brackets, in lower case."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _check_origin(headers: Mapping[bytes, bytes], scheme: str) -> None:
    """Refuse requests that a web page of somebody else makes a browser send."""
    origin = headers.get(b"origin")
    own = scheme.encode() + b"://" + headers.get(b"host", b"")
    if origin is not None and origin.lower() != own.lower():
        raise Problem(
            HTTPStatus.FORBIDDEN,
            "wrong_origin",
            f"Origin: given {origin[:100].decode('latin-1')!r}; other web sites may not use "
            "this API.",
        )


def _check_body_headers(headers: Mapping[bytes, bytes]) -> None:
    """Writes carry JSON or nothing, and say how much of it when they know."""
    length = headers.get(b"content-length", b"0")
    if not length.isdigit():
        raise bad_request("Content-Length: a whole number is needed.")
    if int(length) > BODY_BYTES_MAX:
        raise _body_too_large(int(length))
    if int(length) == 0 and b"transfer-encoding" not in headers:
        return
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        given = kind.decode("latin-1")[:100] or "none"
        raise Problem(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "wrong_content_type",
            f"Content-Type: given {given}; allowed is application/json.",
        )
    if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        raise Problem(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "wrong_content_encoding",
            "Content-Encoding: bodies are read as they are; compressed ones are not allowed.",
        )


def _is_local(headers: Mapping[bytes, bytes], scope: Mapping[str, Any]) -> bool:
    """Whether the peer is on this machine, and not a proxy that speaks for somebody else."""
    client = scope.get("client")
    if not client or any(name in headers for name in PROXY_HEADERS):
        return False
    try:
        address = ip_address(client[0])
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address.is_loopback


def _unauthorized(detail: str, challenge: str) -> Problem:
    headers = {"WWW-Authenticate": challenge}
    return Problem(HTTPStatus.UNAUTHORIZED, "unauthorized", detail, headers)


def _body_too_large(given: int | None = None) -> Problem:
    said = "" if given is None else f"given {given} bytes; "
    return too_large(f"body: {said}allowed are at most {BODY_BYTES_MAX} bytes.")
