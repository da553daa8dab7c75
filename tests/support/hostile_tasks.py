"""Task types that do everything a task should not."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from msgspec import Struct

from executors.base import ExecutorSettings, TaskContext, TaskExecutor, task
from zmqcluster.errors import TaskRetryable


def _segfault() -> None:
    ctypes.string_at(0)


def _hold_gil(seconds: float) -> None:
    """Backtracking in C, never letting go of the GIL; each letter doubles it."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        re.match(r"(a+)+$", "a" * 26 + "b")


def _leave_grandchild(path: str, ignore_term: bool = True) -> int:
    """A double fork with a session of its own; its pid goes into path."""
    script = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if os.fork(): os._exit(0)\n"
        "os.setsid()\n"
        "if os.fork(): os._exit(0)\n"
        "with open(sys.argv[1] + '.new', 'w') as file: file.write(str(os.getpid()))\n"
        "os.rename(sys.argv[1] + '.new', sys.argv[1])\n"
        "time.sleep(300)\n"
    )
    subprocess.run([sys.executable, "-c", script, path], check=True)
    while not Path(path).exists():
        time.sleep(0.005)
    return int(Path(path).read_text())


class LateBeginParams(Struct, frozen=True):
    seconds: float = 0.0


class LateBegin(TaskExecutor):
    """Reports a rule, waits, and says only then that it begins."""

    task_type = "h.late_begin"
    params = LateBeginParams
    tells_begin = True

    async def run(self, context: TaskContext, params: LateBeginParams) -> None:
        context.report_rate("site", delay_s=1)
        await asyncio.sleep(params.seconds)
        context.tell_begun()
        context.tell_begun()


@task("h.segfault")
async def segfault(context: TaskContext) -> None:
    _segfault()


@task("h.segfault_sync")
def segfault_sync(context: TaskContext) -> None:
    print("about to crash")  # noqa: T201  # the evidence
    _segfault()


@task("h.exit")
async def exit_now(context: TaskContext, code: int = 0) -> None:
    os._exit(code)


@task("h.exit_sync")
def exit_now_sync(context: TaskContext, code: int = 0) -> None:
    os._exit(code)


@task("h.system_exit")
async def system_exit(context: TaskContext) -> None:
    raise SystemExit(3)


@task("h.system_exit_sync")
def system_exit_sync(context: TaskContext) -> None:
    raise SystemExit(3)


@task("h.background_exit")
async def background_exit(context: TaskContext) -> str:
    async def leave() -> None:
        sys.exit(4)

    background = asyncio.ensure_future(leave())
    await asyncio.sleep(0.05)
    return f"survived {background.done()}"


@task("h.hold_gil")
async def hold_gil(context: TaskContext, seconds: float = 300.0) -> None:
    _hold_gil(seconds)


@task("h.hold_gil_sync")
def hold_gil_sync(context: TaskContext, seconds: float = 300.0) -> None:
    _hold_gil(seconds)


@task("h.stubborn")
async def stubborn(context: TaskContext) -> None:
    """Ignores cancellation for ever."""
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            continue


@task("h.endless_sync")
def endless_sync(context: TaskContext) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        pass


@task("h.grandchild_sync")
def grandchild_sync(context: TaskContext, path: str, then: str = "hang") -> int:
    pid = _leave_grandchild(path)
    while then == "hang":
        time.sleep(1)
    return pid


@task("h.grandchild")
async def grandchild(context: TaskContext, path: str) -> None:
    _leave_grandchild(path)
    _hold_gil(300)


@task("h.thread_sync")
def thread_sync(context: TaskContext) -> int:
    threading.Thread(target=time.sleep, args=(300,), daemon=True).start()
    return os.getpid()


@task("h.pid")
async def pid_of(context: TaskContext) -> int:
    return os.getpid()


@task("h.pid_sync")
def pid_of_sync(context: TaskContext) -> int:
    return os.getpid()


@task("h.print")
async def print_much(context: TaskContext, megabytes: int = 200) -> int:
    block = "x" * (1024 * 1024 - 1) + "\n"
    for _ in range(megabytes):
        sys.stdout.write(block)
    sys.stdout.write("the very last line\n")
    return megabytes


@task("h.object")
async def unpackable(context: TaskContext) -> object:
    return {"thing": object()}


@task("h.huge")
async def huge(context: TaskContext, size: int = 2_000_000) -> bytes:
    return b"x" * size


@task("h.grow_sync")
def grow(context: TaskContext, megabytes: int) -> int:
    hoard = bytearray(megabytes * 1024 * 1024)
    time.sleep(300)
    return len(hoard)


@task("h.junk")
async def junk(context: TaskContext) -> None:
    """Write nonsense into every socket this process has."""
    for fd in range(3, 64):
        try:
            os.write(fd, b"\xff" * 64)
        except OSError:
            continue
    await asyncio.sleep(300)


@task("h.fork")
async def fork(context: TaskContext) -> int:
    """Come back twice, in two processes."""
    os.fork()
    return os.getpid()


@task("h.kill_parent")
async def kill_parent(context: TaskContext) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    await asyncio.sleep(300)


@task("h.stop_parent")
def stop_parent(context: TaskContext) -> None:
    os.kill(os.getppid(), signal.SIGSTOP)
    time.sleep(300)


@task("h.note")
async def note(context: TaskContext) -> None:
    context.progress(0.5, "half way")
    context.report_rate("https://example.com", closed_for_s=30)
    await asyncio.sleep(0.3)
    raise TaskRetryable("try later", 5_000)


@task("h.env")
async def environment(context: TaskContext) -> dict[str, str]:
    return dict(os.environ)


class Shared(TaskExecutor):
    """Opens something once a host."""

    task_type = "h.shared"

    def __init__(self) -> None:
        self.opened = 0
        self.user_agent = ""

    async def setup(self, settings: ExecutorSettings) -> None:
        await asyncio.sleep(0.01)
        self.opened += 1
        self.user_agent = settings.user_agent

    async def run(self, context: TaskContext, params: object) -> tuple[int, str]:
        return self.opened, self.user_agent


class BrokenSetup(TaskExecutor):
    """Cannot be opened."""

    task_type = "h.broken_setup"

    def setup(self, settings: ExecutorSettings) -> None:
        raise OSError("no such device")

    async def run(self, context: TaskContext, params: object) -> None:
        return None


class BadLoser(TaskExecutor):
    """Cannot be closed."""

    task_type = "h.bad_loser_sync"

    def run(self, context: TaskContext, params: object) -> int:
        return os.getpid()

    def close(self) -> None:
        time.sleep(300)


@task("h.victim_score_sync")
def victim_score(context: TaskContext) -> int:
    return int(Path("/proc/self/oom_score_adj").read_text())
