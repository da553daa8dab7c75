"""Looking at processes from outside."""

from __future__ import annotations

import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # ships no types


def is_alive(pid: int) -> bool:
    """Running, that is: a zombie that somebody else has to bury is dead enough."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_gone(pids: list[int], within_s: float) -> None:
    """Returns when none of these is alive; AssertionError after within_s."""
    deadline = time.monotonic() + within_s
    while left := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"still alive after {within_s} s: {left}"
        time.sleep(0.01)


def wait_pid_in(path: Path, within_s: float = 15.0) -> int:
    """The number that a process writes into this file."""
    deadline = time.monotonic() + within_s
    while not path.exists():
        assert time.monotonic() < deadline, f"nobody wrote {path}"
        time.sleep(0.01)
    return int(path.read_text())


def below(pid: int) -> list[int]:
    """All processes below this one."""
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]
