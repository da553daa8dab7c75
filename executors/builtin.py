"""Small task types for trying, testing and measuring a cluster."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from executors.base import NoParams, TaskContext, TaskExecutor, task
from zmqcluster.errors import TaskRejected, TaskRetryable
from zmqcluster.model import DELAY_MS_MAX, NAME_CHARS_MAX, TIMEOUT_MS_MAX

Seconds = Annotated[float, Meta(ge=0, le=TIMEOUT_MS_MAX / 1000)]
Text = Annotated[str, Meta(max_length=NAME_CHARS_MAX)]


class Noop(TaskExecutor):
    """Nothing, as fast as the cluster can."""

    task_type = "noop"

    async def run(self, context: TaskContext, params: NoParams) -> None:
        return None


class NoopSync(TaskExecutor):
    """Nothing, in a host process of its own."""

    task_type = "noop_sync"

    def run(self, context: TaskContext, params: NoParams) -> None:
        return None


@task("echo")
async def echo(context: TaskContext, value: Any = None) -> Any:
    """Give back what came in."""
    return value


@task("sleep")
async def sleep(context: TaskContext, seconds: Seconds = 1.0) -> float:
    """Wait without using anything."""
    await asyncio.sleep(seconds)
    return seconds


@task("sleep_sync")
def sleep_sync(context: TaskContext, seconds: Seconds = 1.0) -> float:
    """Wait, holding a host process."""
    time.sleep(seconds)
    return seconds


@task("fail")
async def fail(
    context: TaskContext,
    how: Literal["error", "retry", "reject"] = "error",
    reason: Text = "asked to fail",
    after_ms: Annotated[int, Meta(ge=0, le=DELAY_MS_MAX)] = 0,
) -> None:
    """End badly, in the way asked for."""
    match how:
        case "retry":
            raise TaskRetryable(reason, after_ms)
        case "reject":
            raise TaskRejected(reason)
        case "error":
            raise RuntimeError(reason)


class FanOutParams(Struct, frozen=True, forbid_unknown_fields=True):
    """breadth: children of each task. depth: generations below this one."""

    breadth: Annotated[int, Meta(ge=0, le=1000)] = 2
    depth: Annotated[int, Meta(ge=0, le=20)] = 1
    name: Text = "root"


class FanOut(TaskExecutor):
    """Grow a tree of tasks with unique keys: a crawl without the web."""

    task_type = "fan_out"
    params = FanOutParams

    async def run(self, context: TaskContext, params: FanOutParams) -> int:
        if params.depth == 0:
            return 0
        for number in range(params.breadth):
            name = f"{params.name}.{number}"[:NAME_CHARS_MAX]
            child = FanOutParams(params.breadth, params.depth - 1, name)
            context.add_child(self.task_type, child, unique_key=name)
        return params.breadth
