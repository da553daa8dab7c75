"""Routes of the cluster as a whole: overview, strategy, join tokens, health, metrics."""

from __future__ import annotations

import secrets
from collections import Counter
from http import HTTPStatus
from typing import Final, TypeAlias

import msgspec
from litestar import Response, delete, get, post, put
from litestar.di import NamedDependency
from litestar.params import SkipValidation

from zmqcluster.messages import AskOverview, RevokeToken, SetStrategy
from zmqcluster.model import NAME_CHARS_MAX, Role
from zmqcluster.rest.asking import (
    ALSO_503,
    BODY,
    QUERY,
    Asked,
    Master,
    PathText,
    Shapes,
    ask,
    order,
    query_of,
)
from zmqcluster.rest.backend import Backend
from zmqcluster.rest.bodies import decode_body
from zmqcluster.rest.metrics import METRICS_TYPE, metrics_text
from zmqcluster.rest.problems import not_found, unavailable
from zmqcluster.rest.rendering import token_view
from zmqcluster.rest.schemas import (
    DoneView,
    IssuedTokenView,
    LimitQuery,
    ReadyView,
    StrategyBody,
    StrategyView,
    TokenBody,
    TokenList,
)
from zmqcluster.views import OverviewView

Answered: TypeAlias = NamedDependency[SkipValidation[Counter[int]]]

_STRATEGY: Final = msgspec.json.Decoder(StrategyBody)
_TOKEN: Final = msgspec.json.Decoder(TokenBody)


@get("/system/overview")
async def overview(backend: Master) -> OverviewView:
    """The cluster at a glance. tasks: since the database began."""
    return await _overview(backend)


@get("/strategy")
async def get_strategy(backend: Master) -> StrategyView:
    """How the dispatcher picks among devices that could take a task."""
    view = await ask(backend, AskOverview(secrets.token_bytes(16)), OverviewView)
    return StrategyView(strategy=view.strategy)


@put("/strategy", opt={BODY: Shapes((StrategyBody,))})
async def put_strategy(request: Asked, backend: Master) -> StrategyView:
    """Change the strategy, until the master is started again."""
    strategy = decode_body(_STRATEGY, await request.body()).strategy
    await order(backend, SetStrategy(secrets.token_bytes(16), strategy))
    return StrategyView(strategy=strategy)


@post("/tokens", opt={BODY: Shapes((TokenBody,))})
async def create_token(request: Asked, backend: Master) -> IssuedTokenView:
    """Make a join token. It is shown this once."""
    body = decode_body(_TOKEN, await request.body() or b"{}")
    issued = await backend.create_token(Role(body.role), body.uses, body.ttl_s, body.host)
    return IssuedTokenView(
        token_id=issued.token_id,
        token=issued.token,
        role=issued.role,
        uses=issued.uses,
        expires_wall=issued.expires_wall,
    )


@get("/tokens", opt={QUERY: LimitQuery})
async def list_tokens(request: Asked, backend: Master) -> TokenList:
    """Join tokens, newest first, without their secrets."""
    limit = query_of(request, LimitQuery).limit
    rows = await backend.read(lambda reader: reader.tokens())
    newest = sorted(rows, key=lambda row: (-row.created_wall, row.token_id))
    return TokenList(tokens=[token_view(row) for row in newest[:limit]])


@delete("/tokens/{token_id:str}", status_code=200)
async def revoke_token(token_id: PathText, backend: Master) -> DoneView:
    """Nobody joins with this token from now on; who has joined stays."""
    if len(token_id) > NAME_CHARS_MAX:
        raise not_found(f"There is no token {token_id[:NAME_CHARS_MAX]!r}.")
    await order(backend, RevokeToken(secrets.token_bytes(16), token_id))
    return DoneView()


@get("/healthz", media_type="text/plain")
async def healthz() -> str:
    """This process answers. Open to everybody, and says nothing else."""
    return "ok\n"


@get("/readyz", opt={ALSO_503: True})
async def readyz(backend: Master) -> Response[ReadyView]:
    """Whether this master serves: 200, or 503 with the reason."""
    is_ready, reason = backend.ready()
    if is_ready:
        return Response(ReadyView(ready=True))
    view = ReadyView(ready=False, reason=reason)
    return Response(
        view, status_code=HTTPStatus.SERVICE_UNAVAILABLE, headers=unavailable("").headers
    )


@get("/metrics", media_type=METRICS_TYPE)
async def metrics(backend: Master, answered: Answered) -> Response[str]:
    """Figures for Prometheus."""
    text = metrics_text(await _overview(backend), backend.counters(), answered)
    return Response(text)


async def _overview(backend: Backend) -> OverviewView:
    view = await ask(backend, AskOverview(secrets.token_bytes(16)), OverviewView)
    # The core counts ended tasks from its own start on; the database knows them all.
    view.tasks = await backend.read(lambda reader: reader.counts())
    return view
