"""Process trees: how nothing a task started outlives it.

On Linux each host and the warden are child subreapers: a grandchild whose parent died, whatever
sessions and double forks it went through, becomes a child of its host, and once the host is dead, a
child of the warden. So a child of the warden that is no host is a leftover of a dead one. Elsewhere
(macOS) the tree is listed before its root is killed, and the root's whole process group with it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress
from typing import Final

import psutil  # type: ignore[import-untyped]  # ships no types

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_PR_SET_CHILD_SUBREAPER: Final = 36
IS_LINUX: Final = sys.platform == "linux"
_LIBC: Final = ctypes.CDLL(None, use_errno=True) if IS_LINUX else None


def become_subreaper() -> None:
    """Orphans below this process become its children from now on (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent(parent_pid: int) -> None:
    """SIGKILL comes with the parent's death, even if it was killed itself (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # It may have died before the line above.
    if os.getppid() != parent_pid:
        os._exit(1)


def name_process(name: str) -> None:
    """What `top` and `ps -o comm` show; at most 15 characters count (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def kill_tree(pid: int) -> None:
    """SIGKILL a session leader, its process group, and all processes below it."""
    below: list[psutil.Process] = []
    if not IS_LINUX:  # there the subreaper finds them, sooner and without a list that may be stale
        with suppress(psutil.Error):
            below = psutil.Process(pid).children(recursive=True)
    for send in (os.kill, os.killpg):
        with suppress(ProcessLookupError, PermissionError):
            send(pid, signal.SIGKILL)
    for process in below:
        with suppress(psutil.Error, OSError):
            process.kill()


def child_pids() -> list[int]:
    """The children of this process, zombies too."""
    pid = os.getpid()
    if IS_LINUX:
        with suppress(OSError), open(f"/proc/{pid}/task/{pid}/children") as listing:
            return [int(word) for word in listing.read().split()]
    with suppress(psutil.Error, OSError):
        return [child.pid for child in psutil.Process(pid).children()]
    return []


def kill_children_but(spared: set[int]) -> int:
    """SIGKILL each child of this process that is not spared; how many there were.

    A killed child's own children come to this process next: call again until it is 0.
    """
    killed = 0
    for pid in child_pids():
        if pid not in spared:
            killed += 1
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
    return killed
