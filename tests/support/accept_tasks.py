"""Task types of the acceptance tests: each leaves a trace in a file, or misbehaves."""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from typing import Annotated

from msgspec import Meta

from executors.base import TaskContext, task

Path = Annotated[str, Meta(max_length=4096)]


def note_start(path: str, context: TaskContext) -> None:
    """The line that says: this attempt really began."""
    _trace(path, "start", context.task_id, context.attempt, os.getpid(), time.monotonic())


def _trace(path: str, *words: object) -> None:
    """One line, appended in one write: readable from outside at any moment."""
    line = " ".join(map(str, words)) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, line.encode())
    os.close(descriptor)


@task("trace")
async def trace(context: TaskContext, path: Path, seconds: float = 0.0, note: str = "") -> int:
    """Say "start", wait, say "end"; lines are: word, task, attempt, pid, monotonic time.

    note: only takes room, or tells tasks apart.
    """
    note_start(path, context)
    await asyncio.sleep(seconds)
    _trace(path, "end", context.task_id, context.attempt, os.getpid(), time.monotonic())
    return context.attempt


@task("trace_sync")
def trace_sync(context: TaskContext, path: Path, seconds: float = 0.0, note: str = "") -> int:
    """The same in a host process of its own."""
    note_start(path, context)
    time.sleep(seconds)
    _trace(path, "end", context.task_id, context.attempt, os.getpid(), time.monotonic())
    return context.attempt


@task("segfault")
def segfault(context: TaskContext) -> None:
    """Read at address 0."""
    ctypes.string_at(0)


@task("vanish")
def vanish(context: TaskContext) -> None:
    """Leave with exit code 0, as if all were well."""
    os._exit(0)


@task("hold_gil")
def hold_gil(context: TaskContext, path: Path) -> None:
    """Sleep in C without letting any Python thread run."""
    note_start(path, context)
    ctypes.PyDLL(None).sleep(600)


@task("hold_loop")
async def hold_loop(context: TaskContext, path: Path) -> None:
    """Block the asyncio host."""
    note_start(path, context)
    time.sleep(600)  # noqa: ASYNC251  # that is the point


@task("babble")
def babble(context: TaskContext, megabytes: int = 64) -> int:
    """Print more than anybody wants to read."""
    for _ in range(megabytes):
        os.write(1, b"x" * 1024 * 1024)
    return megabytes
