"""The description of the API (OpenAPI 3.1), made from the routes and their structs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, cast, get_args, get_origin, get_type_hints

import msgspec
from litestar import Response
from litestar.handlers import HTTPRouteHandler
from litestar.routes import BaseRoute, HTTPRoute

from zmqcluster.rest.asking import ALSO_503, BODY, HEADER, QUERY
from zmqcluster.rest.door import OPEN_PATHS, READ_METHODS
from zmqcluster.rest.problems import PROBLEM_JSON
from zmqcluster.rest.schemas import ProblemView

_REFS: Final = "#/components/schemas/{name}"
_SLOT: Final = re.compile(r"\{(?P<name>\w+)(:(?P<kind>\w+))?\}")
# What routes give that is no struct: text, or a whole JSON document.
_TEXTS: Final[dict[Any, dict[str, Any]]] = {str: {"type": "string"}, bytes: {"type": "object"}}
_KINDS: Final = {"int": {"type": "integer", "minimum": 1}, "str": {"type": "string"}}


def describe(routes: Iterable[BaseRoute], version: str) -> dict[str, Any]:
    """The whole document, ready for JSON."""
    return cast("dict[str, Any]", _portable(_document(routes, version)))


def _document(routes: Iterable[BaseRoute], version: str) -> dict[str, Any]:
    paths: dict[str, Any] = {}
    for path, method, handler in operations(routes):
        paths.setdefault(_plain(path), {})[method.lower()] = _operation(path, method, handler)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "zmqcluster",
            "version": version,
            "description": "Reads from the master's own machine need no token; all else does.",
        },
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": _schemas(handler for _, _, handler in operations(routes)),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def operations(routes: Iterable[BaseRoute]) -> Iterator[tuple[str, str, HTTPRouteHandler]]:
    """Every (path as declared, method, handler) of ours; OPTIONS is the framework's own."""
    for route in routes:
        if isinstance(route, HTTPRoute):
            for handler in route.route_handlers:
                for method in sorted(handler.http_methods - {"OPTIONS"}):
                    yield route.path, method, handler


def _operation(path: str, method: str, handler: HTTPRouteHandler) -> dict[str, Any]:
    summary, _, rest = (inspect.getdoc(handler.fn) or "").partition("\n")
    about: dict[str, Any] = {
        "operationId": getattr(handler.fn, "__name__", ""),
        "summary": summary,
        "parameters": [
            *_path_parameters(path),
            *_query_parameters(handler),
            *_header_parameters(handler),
        ],
        "responses": _responses(handler),
    }
    if rest.strip():
        about["description"] = " ".join(rest.split())
    if bodies := handler.opt.get(BODY):
        kinds = [_schema_of(each) for each in bodies]
        schema = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
        about["requestBody"] = {
            "required": any(map(_has_required, bodies)),
            "content": {"application/json": {"schema": schema}},
        }
    if path not in OPEN_PATHS:
        # An empty requirement beside the token: it is optional, for readers on this machine.
        about["security"] = [{"token": []}, {}] if method in READ_METHODS else [{"token": []}]
    return about


def _plain(path: str) -> str:
    """The path with its slots as OpenAPI writes them."""
    return _SLOT.sub(r"{\g<name>}", path)


def _path_parameters(path: str) -> list[dict[str, Any]]:
    return [
        {
            "name": slot["name"],
            "in": "path",
            "required": True,
            "schema": _KINDS[slot["kind"] or "str"],
        }
        for slot in _SLOT.finditer(path)
    ]


def _query_parameters(handler: HTTPRouteHandler) -> list[dict[str, Any]]:
    shape = handler.opt.get(QUERY)
    if shape is None:
        return []
    _, components = msgspec.json.schema_components([shape], ref_template=_REFS)
    properties: dict[str, Any] = components[shape.__name__]["properties"]
    return [
        {"name": name, "in": "query", "required": False, "schema": schema}
        for name, schema in properties.items()
    ]


def _header_parameters(handler: HTTPRouteHandler) -> list[dict[str, Any]]:
    headers: Mapping[str, dict[str, Any]] = handler.opt.get(HEADER, {})
    return [
        {"name": name, "in": "header", "required": False, "schema": schema}
        for name, schema in headers.items()
    ]


def _has_required(kind: Any) -> bool:
    """Whether there is no leaving out a body of this kind."""
    is_struct = isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    return not is_struct or any(field.required for field in msgspec.structs.fields(kind))


def _portable(schema: Any) -> Any:
    """A schema whose patterns mean the same outside Python: JSON Schema knows no \\Z."""
    match schema:
        case dict():
            return {
                name: value.replace(r"\Z", "$") if name == "pattern" else _portable(value)
                for name, value in schema.items()
            }
        case list():
            return [_portable(each) for each in schema]
        case _:
            return schema


def _responses(handler: HTTPRouteHandler) -> dict[str, Any]:
    answer = answer_of(handler)
    if isinstance(answer, type) and issubclass(answer, msgspec.Struct):
        content = {"application/json": {"schema": _schema_of(answer)}}
    else:
        media_type = str(handler.media_type).partition(";")[0]
        content = {media_type: {"schema": _TEXTS[answer]}}
    problem = {PROBLEM_JSON: {"schema": _schema_of(ProblemView)}}
    busy = {**content, **problem} if handler.opt.get(ALSO_503) else problem
    return {
        str(handler.status_code): {"description": "Done.", "content": content},
        "4XX": {"description": "Refused, and why.", "content": problem},
        "503": {"description": "Not now: ask again after Retry-After seconds.", "content": busy},
    }


def answer_of(handler: HTTPRouteHandler) -> Any:
    """What a route answers with, out of its Response if it makes one."""
    answer = get_type_hints(handler.fn)["return"]
    return get_args(answer)[0] if get_origin(answer) is Response else answer


def _schema_of(kind: Any) -> dict[str, Any]:
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=_REFS)
    return schema


def _schemas(handlers: Iterable[HTTPRouteHandler]) -> dict[str, Any]:
    """All structs that any route takes or gives, by name."""
    kinds: list[Any] = [ProblemView]
    for handler in handlers:
        kinds += handler.opt.get(BODY, ())
        kinds += [handler.opt[QUERY]] if QUERY in handler.opt else []
        answer = answer_of(handler)
        if isinstance(answer, type) and issubclass(answer, msgspec.Struct):
            kinds.append(answer)
    _, components = msgspec.json.schema_components(kinds, ref_template=_REFS)
    return dict(sorted(components.items()))
