"""What the simulated cluster is given to do, and how each run of it ends."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Final

import msgpack  # type: ignore[import-untyped]  # ships no types
import msgspec
from msgspec import Struct

from tests.simulation.options import Options
from zmqcluster.messages import RateRule, Record, TaskOrder, TaskResult, TaskSpec
from zmqcluster.model import TIMEOUT_MS_MAX, Outcome, Pool

# Task types and their pools. A page has links; the others stand alone.
POOL_OF: Final = {
    "page": Pool.ASYNC,
    "quick": Pool.ASYNC,
    "slow": Pool.SYNC,
    "poison": Pool.SYNC,
    "endless": Pool.SYNC,
}
LABEL: Final = "gpu"
# As the master has it for tasks that leave it open.
TIMEOUT_MS_DEFAULT: Final = 20_000
RETRIES_DEFAULT: Final = 3
_RETRIES: Final = 50
_LINKS: Final = 4
# Of some tasks a few results fill a frame, and a few frames all that may be under way.
_LARGE_EVERY: Final = 8
_LARGE_BYTES: Final = 20_000


class Run(Struct, frozen=True):
    """How one attempt goes. begins_ms: until the host really begins; runs_ms: from there.

    result: None when it hangs until it is killed.
    """

    begins_ms: int
    runs_ms: int
    result: TaskResult | None


def origin_of(page: int, options: Options) -> str:
    return f"http://o{page % options.origins}"


def is_limited(rate_key: str) -> bool:
    """Is it an origin's, with the rules below? Others only make lanes."""
    return rate_key.startswith("http://o")


def url_of(page: int, options: Options) -> str:
    return f"{origin_of(page, options)}/{page}"


def links_of(page: int, options: Options) -> list[int]:
    """The pages this one links to: the same for everybody, and all can be reached from 0."""
    rng = Random(f"links {options.seed} {page}")
    links = [rng.randrange(options.pages) for _ in range(rng.randrange(_LINKS))]
    return sorted({*links, *(one for one in (2 * page + 1, 2 * page + 2) if one < options.pages)})


def page_spec(page: int, options: Options) -> TaskSpec:
    return TaskSpec(
        "page",
        pack({"page": page}),
        unique_key=url_of(page, options),
        rate_key=origin_of(page, options),
        max_retry_count=_RETRIES,
        priority=5 + page % 2,
    )


def rules(options: Options) -> tuple[RateRule, ...]:
    return tuple(
        RateRule(f"http://o{index}", delay_ms=options.delay_ms, concurrency=options.concurrency)
        for index in range(options.origins)
    )


def plain_specs(rng: Random, marks: Iterable[str], wall_ms: int) -> list[TaskSpec]:
    """A mixed batch: priorities, labels, schedules, unique keys that repeat. marks: no two alike,
    so that a task that is made twice shows."""
    return [_plain_spec(rng, wall_ms, mark) for mark in marks]


def endless_spec(mark: str) -> TaskSpec:
    """Ends only when it is cancelled, or with its worker."""
    return TaskSpec("endless", pack({"mark": mark}), timeout_ms=TIMEOUT_MS_MAX)


def _plain_spec(rng: Random, wall_ms: int, mark: str) -> TaskSpec:
    task_type = rng.choices(["quick", "slow", "poison"], [60, 30, 2])[0]
    priority = rng.randrange(10)
    has_label = rng.random() < 0.1
    return TaskSpec(
        "quick" if has_label else task_type,
        pack({"mark": mark}),
        priority=priority,
        max_retry_count=rng.choice([0, 1, 2, _RETRIES]),
        timeout_ms=rng.choice([500, 3_000, 20_000, 20_000]),
        not_before_ms=wall_ms + rng.randrange(5_000) if rng.random() < 0.1 else 0,
        unique_key=f"k{rng.randrange(20)}" if rng.random() < 0.2 else "",
        # A lane each: when nobody is left who has the label, they must not fill the window.
        rate_key=f"lane {mark}" if has_label else "",
        labels=(LABEL,) if has_label else (),
    )


def run_of(order: TaskOrder, options: Options, rng: Random, *, is_faulty: bool) -> Run:
    """How this attempt goes. Its result names the attempt, so that nobody mistakes it."""
    key = (order.task_id, order.attempt)
    runs_ms = rng.choice([0, 0, 1, 5, 60, 400] if order.task_type == "slow" else [0, 1, 20])
    begins_ms = rng.choice([0, 0, 1, 10])
    roll = rng.random()
    if order.task_type == "endless":
        return Run(begins_ms, order.timeout_ms, None)
    if order.task_type == "poison":
        return Run(begins_ms, runs_ms, TaskResult(*key, Outcome.DIED, error="segfault"))
    if is_faulty:
        if roll < options.task_hangs:
            return Run(begins_ms, order.timeout_ms, TaskResult(*key, Outcome.TIMED_OUT))
        roll -= options.task_hangs
        if roll < options.task_deaths:
            return Run(begins_ms, runs_ms, TaskResult(*key, Outcome.DIED, error="killed"))
        roll -= options.task_deaths
        if roll < options.task_failures:
            return Run(begins_ms, runs_ms, _failure(order, options, runs_ms, rng))
    return Run(begins_ms, runs_ms, _success(order, options, runs_ms))


def _failure(order: TaskOrder, options: Options, runs_ms: int, rng: Random) -> TaskResult:
    """It goes wrong in the end: what it had found by then must not count."""
    outcome = rng.choices([Outcome.FAILED, Outcome.RETRY, Outcome.REJECTED], [6, 3, 1])[0]
    retry_after_ms = rng.randrange(2_000) if outcome is Outcome.RETRY else 0
    return msgspec.structs.replace(
        _success(order, options, runs_ms),
        outcome=outcome,
        result=b"",
        error="it went wrong",
        retry_after_ms=retry_after_ms,
    )


def _success(order: TaskOrder, options: Options, runs_ms: int) -> TaskResult:
    key = (order.task_id, order.attempt)
    body = pack(list(key))
    if order.task_id % _LARGE_EVERY == 0:
        body = body.ljust(_LARGE_BYTES, b".")
    if order.task_type != "page":
        return TaskResult(*key, Outcome.COMPLETED, body, run_us=1 + 1_000 * runs_ms)
    page = msgpack.unpackb(order.data)["page"]
    return TaskResult(
        *key,
        Outcome.COMPLETED,
        body,
        run_us=1 + 1_000 * runs_ms,
        children=tuple(page_spec(one, options) for one in links_of(page, options)),
        records=(Record("pages", f"{order.job_id} {page}", pack(list(key))),),
    )


def pack(value: object) -> bytes:
    return bytes(msgpack.packb(value))
