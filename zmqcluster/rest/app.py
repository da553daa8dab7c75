"""The REST API as one ASGI application: routes inside, the door around them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any, Final

import msgspec
from litestar import Litestar, Response, Router, get
from litestar.di import Provide
from litestar.exceptions import HTTPException
from litestar.routes import BaseRoute

from zmqcluster.errors import RequestRefused, StartError, StorageError
from zmqcluster.rest import devices, jobs, system, tasks
from zmqcluster.rest.asking import Asked, refuse_extras
from zmqcluster.rest.backend import Backend
from zmqcluster.rest.door import Door
from zmqcluster.rest.openapi import describe
from zmqcluster.rest.page import PAGE_POLICY, page
from zmqcluster.rest.problems import PROBLEM_JSON, Problem, from_refusal, unavailable

PREFIX: Final = "/api/distribution"
_LOG: Final = logging.getLogger(__name__)

_ROUTES: Final = (
    tasks.list_tasks,
    tasks.submit_tasks,
    tasks.task_stats,
    tasks.get_task,
    tasks.task_events,
    tasks.explain_task,
    tasks.cancel_task,
    tasks.retry_task,
    jobs.list_jobs,
    jobs.get_job,
    jobs.cancel_job,
    devices.list_devices,
    devices.get_device,
    devices.device_heartbeats,
    devices.device_stats,
    devices.drain_device,
    devices.resume_device,
    devices.revoke_device,
    system.overview,
    system.get_strategy,
    system.put_strategy,
    system.create_token,
    system.list_tokens,
    system.revoke_token,
)


def create_app(
    backend: Backend, *, api_token: str, hosts: Iterable[str] = (), version: str = "0"
) -> Door:
    """The application of one master, with the door around it.

    hosts: names beside localhost that clients may call this master by.
    """
    answered: Counter[int] = Counter()
    api = Router(PREFIX, route_handlers=_ROUTES, before_request=_before)
    app = Litestar(
        [api, system.healthz, system.readyz, system.metrics, *_description(lambda: app, version)],
        dependencies={
            "backend": Provide(lambda: backend, sync_to_thread=False),
            "answered": Provide(lambda: answered, sync_to_thread=False),
        },
        exception_handlers=_HANDLERS,
        logging_config=None,
        openapi_config=None,
        # The door counts bodies; one place is enough.
        request_max_body_size=None,
        debug=False,
    )
    return Door(app, api_token, hosts, answered)


async def _before(request: Asked) -> Response[None] | None:
    """OPTIONS is answered here: the framework's own answer knows one handler of a path only."""
    if request.method != "OPTIONS":
        await refuse_extras(request)
        return None
    path = request.scope["path_template"]
    methods = next(route.methods for route in request.app.routes if route.path_format == path)
    return Response(None, status_code=204, headers={"Allow": _allowed(methods)})


def _allowed(methods: Iterable[str]) -> str:
    """The header Allow: in one order, and HEAD wherever there is GET (the door makes it one)."""
    named = set(methods)
    return ", ".join(sorted(named | ({"HEAD"} if "GET" in named else set())))


def http_routes(door: Door) -> list[BaseRoute]:
    """Every route behind this door."""
    app = door.inner
    assert isinstance(app, Litestar)
    return list(app.routes)


def _description(app: Callable[[], Litestar], version: str) -> list[Any]:
    """The routes that describe all routes, themselves included; made once, when first asked."""
    made: dict[str, Any] = {}

    def document() -> dict[str, Any]:
        if not made:
            made.update(describe(app().routes, version))
        return made

    @get("/openapi.json", media_type="application/json", sync_to_thread=False)
    def openapi_json() -> Response[bytes]:
        """This API for programs, as OpenAPI 3.1."""
        return Response(msgspec.json.encode(document()))

    @get("/docs", media_type="text/html", sync_to_thread=False)
    def docs_page() -> Response[str]:
        """This API for people."""
        headers = {"Content-Security-Policy": PAGE_POLICY}
        html = page(document())
        return Response(html, headers=headers)

    return [openapi_json, docs_page]


# --- errors to problems -------------------------------------------------------------------------


def _answer(problem: Problem) -> Response[bytes]:
    return Response(
        problem.body(),
        status_code=problem.status,
        media_type=PROBLEM_JSON,
        headers=problem.headers,
    )


def _on_problem(_: Asked, error: Problem) -> Response[bytes]:
    return _answer(error)


def _on_refused(_: Asked, error: RequestRefused) -> Response[bytes]:
    return _answer(from_refusal(error))


def _on_timeout(_: Asked, __: TimeoutError) -> Response[bytes]:
    return _answer(
        unavailable(
            "The master did not answer in time; what was asked may or may not have happened. "
            "Ask again, with the same Idempotency-Key if there was one.",
            "timeout",
        )
    )


def _on_stopping(_: Asked, error: StartError) -> Response[bytes]:
    """The loop has ended while this request waited for it, or before."""
    return _answer(unavailable(f"{error}.", "stopping"))


def _on_storage(request: Asked, error: StorageError) -> Response[bytes]:
    _LOG.error("%s %s: %s", request.method, request.url.path, error)
    return _answer(unavailable("The master cannot read its database now.", "storage"))


def _on_http(request: Asked, error: HTTPException) -> Response[bytes]:
    """What the framework refuses: no such path, no such method, and the like."""
    status = HTTPStatus(error.status_code)
    if status is HTTPStatus.NOT_FOUND:
        detail = f"There is nothing at {request.url.path[:200]}; /docs lists what there is."
    elif status is HTTPStatus.METHOD_NOT_ALLOWED:
        detail = f"{request.method} is not allowed at {request.url.path[:200]}; see /docs."
    else:
        detail = str(error.detail)
    code = status.name.lower()
    headers = dict(error.headers or {})
    if "allow" in headers:
        headers["allow"] = _allowed(headers["allow"].split(", "))
    return _answer(Problem(status, code, detail, headers))


def _on_error(request: Asked, error: Exception) -> Response[bytes]:
    """The door of HTTP requests: an error of ours is logged once, and never shown."""
    _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
    detail = "Something went wrong inside the master; its log says what."
    return _answer(Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "internal", detail))


_HANDLERS: Final[dict[int | type[Exception], Any]] = {
    Problem: _on_problem,
    RequestRefused: _on_refused,
    TimeoutError: _on_timeout,
    StartError: _on_stopping,
    StorageError: _on_storage,
    HTTPException: _on_http,
    Exception: _on_error,
}
