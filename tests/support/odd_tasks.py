"""Task types of the chaos tests that do what is allowed, and rare."""

from __future__ import annotations

import os

from executors.base import TaskContext, task
from tests.support.accept_tasks import Path, note_start


@task("fork")
def fork(context: TaskContext, path: Path, times: int = 1) -> int:
    """Fork, let the child end at once, wait for it; so many times."""
    note_start(path, context)
    for _ in range(times):
        child = os.fork()
        if not child:
            os._exit(0)
        os.waitpid(child, 0)
    return times


@task("bulky")
async def bulky(context: TaskContext, path: Path, size: int = 1) -> bytes:
    """A result of so many bytes that nothing makes shorter."""
    note_start(path, context)
    return os.urandom(size)
