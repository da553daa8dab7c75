"""Why a request is refused, in one shape: application/problem+json (RFC 9457)."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

import msgspec

from zmqcluster.errors import ClusterError, RequestRefused
from zmqcluster.model import RefusalCode
from zmqcluster.rest.schemas import ProblemView

PROBLEM_JSON: Final = "application/problem+json"
DETAIL_CHARS_MAX: Final = 2000
RETRY_AFTER_S: Final = 1

STATUS_BY_REFUSAL: Final[dict[str, HTTPStatus]] = {
    RefusalCode.BAD_REQUEST: HTTPStatus.BAD_REQUEST,
    RefusalCode.UNKNOWN_TASK_TYPE: HTTPStatus.UNPROCESSABLE_ENTITY,
    RefusalCode.BAD_PARAMETERS: HTTPStatus.UNPROCESSABLE_ENTITY,
    RefusalCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
    RefusalCode.CONFLICT: HTTPStatus.CONFLICT,
    RefusalCode.FORBIDDEN: HTTPStatus.FORBIDDEN,
    RefusalCode.DEVICE_LIVE: HTTPStatus.CONFLICT,
    RefusalCode.VERSION: HTTPStatus.BAD_REQUEST,
    RefusalCode.BUSY: HTTPStatus.SERVICE_UNAVAILABLE,
    RefusalCode.STOPPING: HTTPStatus.SERVICE_UNAVAILABLE,
}


class Problem(ClusterError):
    """A request refused by the REST layer itself. detail: one sentence for people."""

    def __init__(
        self,
        status: HTTPStatus,
        code: str,
        detail: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = _sentence(detail)[:DETAIL_CHARS_MAX]
        self.headers: dict[str, str] = dict(headers or {})
        if status in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS):
            self.headers.setdefault("Retry-After", str(RETRY_AFTER_S))

    def body(self) -> bytes:
        """The problem as JSON."""
        return msgspec.json.encode(
            ProblemView(
                title=self.status.phrase,
                status=self.status.value,
                detail=self.detail,
                code=self.code,
            )
        )


def _sentence(text: str) -> str:
    """The core speaks in clauses; people read sentences. A field's name stays as it is."""
    if not text.split(" ", 1)[0].endswith(":"):
        text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "?", "!")) else text + "."


def bad_request(detail: str) -> Problem:
    """400: the request makes no sense."""
    return Problem(HTTPStatus.BAD_REQUEST, "bad_request", detail)


def unprocessable(detail: str) -> Problem:
    """422: well-formed, but a field is not what it must be."""
    return Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "bad_parameters", detail)


def not_found(detail: str) -> Problem:
    """404: no such thing."""
    return Problem(HTTPStatus.NOT_FOUND, "not_found", detail)


def conflict(detail: str) -> Problem:
    """409: the thing is not in a state that allows this."""
    return Problem(HTTPStatus.CONFLICT, "conflict", detail)


def too_large(detail: str) -> Problem:
    """413: more than we read."""
    return Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "too_large", detail)


def unavailable(detail: str, code: str = "busy") -> Problem:
    """503: ask again a little later."""
    return Problem(HTTPStatus.SERVICE_UNAVAILABLE, code, detail)


def from_refusal(refusal: RequestRefused) -> Problem:
    """The core's "no" as HTTP."""
    return Problem(STATUS_BY_REFUSAL[refusal.code], refusal.code, refusal.problem)
