"""What all routes share: their annotations, typed answers of the core, ids from the path."""

from __future__ import annotations

import re
from typing import Any, Final, TypeAlias, TypeVar

import msgspec
from litestar import Request
from litestar.datastructures import State
from litestar.di import NamedDependency
from litestar.params import FromPath, SkipValidation

from zmqcluster.errors import LocalProtocolError
from zmqcluster.messages import Answer, Changed, ClientMessage
from zmqcluster.model import DEVICE_ID_PATTERN
from zmqcluster.rest.backend import Backend
from zmqcluster.rest.bodies import decode_body, decode_query
from zmqcluster.rest.problems import not_found
from zmqcluster.rest.schemas import Nothing

M = TypeVar("M")
S = TypeVar("S", bound=msgspec.Struct)

Asked: TypeAlias = Request[Any, Any, State]
Master: TypeAlias = NamedDependency[SkipValidation[Backend]]
PathInt: TypeAlias = FromPath[int]
PathText: TypeAlias = FromPath[str]

# Keys of a route's opt: the structs of its query string and of its body, the headers it reads by
# name with their JSON schemas, and whether it answers 503 in its usual shape; for us and for /docs.
QUERY: Final = "query"
BODY: Final = "body"
HEADER: Final = "header"
ALSO_503: Final = "also_503"


class Shapes(tuple[Any, ...]):
    """The kinds of body a route takes. Routes' opts are copied deeply, and msgspec's bounds, which
    are part of some kinds, refuse to be."""

    def __deepcopy__(self, _: object) -> Shapes:
        return self


_ID_MAX: Final = 2**63 - 1
_NOTHING: Final = msgspec.json.Decoder(Nothing)


def query_of(request: Asked, shape: type[S]) -> S:
    """The query string as this struct; Problem when it does not fit."""
    return decode_query(shape, request.query_params.multi_items())


async def refuse_extras(request: Asked) -> None:
    """Before a route: Problem for a query or a body that it does not take and would not see."""
    opt = request.route_handler.opt
    if QUERY not in opt:
        query_of(request, Nothing)
    if BODY not in opt and (body := await request.body()):
        decode_body(_NOTHING, body)


def known_id(number: int, noun: str) -> int:
    """An id that could exist; Problem (404) for one that cannot."""
    if not 1 <= number <= _ID_MAX:
        raise not_found(f"There is no {noun} {number}.")
    return number


def known_device(text: str) -> str:
    """A device id that could exist; Problem (404) for one that cannot."""
    if not re.fullmatch(DEVICE_ID_PATTERN, text):
        raise not_found(f"There is no device {text[:100]!r}.")
    return text


async def ask(backend: Backend, message: ClientMessage, answer: type[M]) -> M:
    """Ask the core something that is answered in this shape of views.py. Raises RequestRefused."""
    reply = await backend.request(message)
    if not isinstance(reply, Answer):
        raise _unexpected(message, reply)
    return msgspec.msgpack.decode(reply.body, type=answer)


async def order(backend: Backend, message: ClientMessage) -> Changed:
    """Have the core change something. Raises RequestRefused."""
    reply = await backend.request(message)
    if not isinstance(reply, Changed):
        raise _unexpected(message, reply)
    return reply


def _unexpected(message: object, reply: object) -> LocalProtocolError:
    return LocalProtocolError(f"{type(message).__name__} was answered by {type(reply).__name__}")
