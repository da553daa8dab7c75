"""Tasks of the chaos runs: each notes its start in a trace, then does what no task should.

All of them are bounded: the machine they run on is shared. A task named `w.NAME` is the function
called NAME; `path` is the trace.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import mmap
import os
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Generator
from typing import Any

from executors.base import TaskContext, task
from tests.support.accept_tasks import Path, note_start

# Whatever goes wrong, a bomb ends by itself.
FORKS_MAX = 100
DISK_BYTES_MAX = 256 * 1024 * 1024
HOARD_BYTES_MAX = 1024 * 1024 * 1024
BLOCK = b"x" * 1024 * 1024


@task("w.signal")
def signal_self(context: TaskContext, path: Path, number: int) -> None:
    """Die of this signal."""
    note_start(path, context)
    signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
    os.kill(os.getpid(), number)
    time.sleep(60)


@task("w.read_nothing")
async def read_nothing(context: TaskContext, path: Path) -> None:
    """A segmentation fault in the asyncio host."""
    note_start(path, context)
    ctypes.string_at(0)


@task("w.hold_gil")
def hold_gil(context: TaskContext, path: Path) -> None:
    """Search in C, for longer than anybody lives, and never let go of the GIL."""
    note_start(path, context)
    re.match(r"(a+)+$", "a" * 60 + "b")


@task("w.hold_loop")
async def hold_loop(context: TaskContext, path: Path) -> None:
    """The same in the process that many tasks share."""
    note_start(path, context)
    re.match(r"(a+)+$", "a" * 60 + "b")


@task("w.deaf")
def deaf(context: TaskContext, path: Path) -> None:
    """Ignore what can be ignored, and never end."""
    note_start(path, context)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass


@task("w.stubborn")
async def stubborn(context: TaskContext, path: Path) -> None:
    """Swallow every cancellation."""
    note_start(path, context)
    while True:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)


@task("w.hoard")
def hoard(context: TaskContext, path: Path) -> int:
    """Take 64 MiB after another and keep it."""
    note_start(path, context)
    kept: list[mmap.mmap] = []
    while len(kept) * 64 * 1024 * 1024 < HOARD_BYTES_MAX:
        room = mmap.mmap(-1, 64 * 1024 * 1024)
        for _ in range(64):
            room.write(BLOCK)
        kept.append(room)
        time.sleep(0.1)
    time.sleep(60)
    return len(kept)


@task("w.fork_bomb")
def fork_bomb(context: TaskContext, path: Path, pids: Path) -> None:
    """Children that have children, in sessions of their own; FORKS_MAX in all, whoever forks."""
    note_start(path, context)
    resource.setrlimit(resource.RLIMIT_NPROC, (FORKS_MAX * 20, FORKS_MAX * 20))
    # A fork costs a byte of this pipe, and nobody puts any in again.
    allowance, fill = os.pipe()
    os.write(fill, b"f" * FORKS_MAX)
    os.set_blocking(allowance, False)
    with contextlib.suppress(BlockingIOError):
        while os.read(allowance, 1):
            if os.fork() == 0:
                os.setsid()
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                note(pids, os.getpid())
    time.sleep(60)


@task("w.daemon")
def leave_daemon(context: TaskContext, path: Path, pids: Path) -> None:
    """Return, and leave a grandchild in a session of its own."""
    note_start(path, context)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            note(pids, os.getpid())
            time.sleep(300)
        os._exit(0)
    os.wait()
    while not os.path.exists(pids):  # no imports after a fork
        time.sleep(0.01)


@task("w.babble")
def babble(context: TaskContext, path: Path, megabytes: int) -> int:
    """Print so much that no disk and no memory should have to hold it."""
    note_start(path, context)
    for _ in range(megabytes):
        os.write(1, BLOCK)
    return megabytes


@task("w.return")
async def return_odd(context: TaskContext, path: Path, what: str) -> object:
    """A result that cannot travel."""
    note_start(path, context)
    return _ODD_RESULTS[what]()


@task("w.return_sync")
def return_odd_sync(context: TaskContext, path: Path, what: str) -> object:
    note_start(path, context)
    return _ODD_RESULTS[what]()


@task("w.raise")
async def raise_odd(context: TaskContext, path: Path, what: str) -> None:
    """An error that is hard to tell about."""
    note_start(path, context)
    _ODD_ERRORS[what]()


@task("w.raise_sync")
def raise_odd_sync(context: TaskContext, path: Path, what: str) -> None:
    note_start(path, context)
    _ODD_ERRORS[what]()


@task("w.close_fds")
def close_fds(context: TaskContext, path: Path) -> None:
    """Close all that was inherited, the channel to the agent included."""
    note_start(path, context)
    os.closerange(0, 256)
    time.sleep(60)


@task("w.close_fds_async")
async def close_fds_async(context: TaskContext, path: Path) -> None:
    note_start(path, context)
    os.closerange(0, 256)
    await asyncio.sleep(60)


@task("w.patch")
async def patch(context: TaskContext, path: Path) -> str:
    """Replace what everybody uses."""
    note_start(path, context)
    json.dumps = lambda *_, **__: "no"
    socket.socket.connect = _refuse  # type: ignore[method-assign]
    time.monotonic = lambda: -1.0
    os.getpid = lambda: 1
    return "patched"


@task("w.leak_fd")
def leak_fd(context: TaskContext, path: Path) -> int:
    """Open files and forget them; says how many this process has now."""
    note_start(path, context)
    for _ in range(5):
        os.open("/dev/null", os.O_RDONLY)
    return len(os.listdir("/proc/self/fd"))


@task("w.fill_disk")
def fill_disk(context: TaskContext, path: Path, folder: Path) -> int:
    """Write until the disk is full, or DISK_BYTES_MAX; says how much fitted."""
    note_start(path, context)
    size = 0
    with open(f"{folder}/filler", "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while size < DISK_BYTES_MAX:
                size += file.write(BLOCK)
        with contextlib.suppress(OSError):
            while True:
                size += file.write(b"x")
    return size


@task("w.kill_warden")
def kill_warden(context: TaskContext, path: Path) -> None:
    """Kill the parent, and everything else that lives below the agent with it."""
    note_start(path, context)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def note(path: str, *words: object) -> None:
    """One line, in one write, without anything that a forked child may not do."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, (" ".join(map(str, words)) + "\n").encode())
    os.close(descriptor)


def _refuse(*_: object) -> None:
    raise OSError("patched")


def _cycle() -> list[Any]:
    cycle: list[Any] = []
    cycle.append(cycle)
    return cycle


def _generator() -> Generator[int, None, None]:
    yield 1


def _deep() -> list[Any]:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    return deep


class _Liar(dict[str, int]):
    def items(self) -> Any:
        raise SystemExit(7)


class _Mute(Exception):
    def __str__(self) -> str:
        raise KeyboardInterrupt

    __repr__ = __str__


_ODD_RESULTS: dict[str, Callable[[], object]] = {
    "object": object,
    "cycle": _cycle,
    "deep": _deep,
    "generator": _generator,
    "100 MB": lambda: b"x" * 100_000_000,
    "2^64": lambda: 2**64,
    "lone surrogate": lambda: "\ud800",
    "liar": lambda: _Liar(a=1),
}


def _raise(error: BaseException) -> None:
    raise error


def _recursive() -> None:
    error = ValueError("a")
    other = KeyError("b")
    error.__cause__, other.__cause__ = other, error
    raise error


_ODD_ERRORS: dict[str, Callable[[], None]] = {
    "SystemExit": lambda: sys.exit(3),
    "BaseException": lambda: _raise(BaseException("all of them")),
    "KeyboardInterrupt": lambda: _raise(KeyboardInterrupt()),
    "GeneratorExit": lambda: _raise(GeneratorExit()),
    "50 MB": lambda: _raise(ValueError("é\x1b[31m" * 8_000_000)),
    "surrogates": lambda: _raise(ValueError("\ud800\x00\u2028" * 100)),
    "mute": lambda: _raise(_Mute()),
    "recursive cause": _recursive,
    "os._exit(0)": lambda: os._exit(0),
}
