"""Control groups of version 1 or 2: freeze a family of processes, starve it, run it out of memory.

A group is made below the root of its hierarchy and removed in the end; who may not do that has no
groups, and the faults that need them are skipped.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from functools import cache
from pathlib import Path
from typing import Final, Self

from tests.support.cluster import wait_until

ROOT: Final = Path("/sys/fs/cgroup")
PERIOD_US: Final = 100_000
_NUMBERS: Final = itertools.count()


class Group:
    """One group of one controller: `freezer`, `cpu` or `memory`. Empty it before close()."""

    def __init__(self, controller: str) -> None:
        name = f"zmqcluster-chaos-{os.getpid()}-{next(_NUMBERS)}"
        self._is_v1 = (ROOT / controller / "tasks").exists()
        self.path = (ROOT / controller if self._is_v1 else ROOT) / name
        self.path.mkdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def prefix(self) -> tuple[str, ...]:
        """Before a command: it joins the group, and then becomes the command."""
        return ("sh", "-c", f'echo $$ > {self.path / "cgroup.procs"} && exec "$@"', "sh")

    def take_thread(self, thread_id: int) -> None:
        """This one thread joins. Only version 1 can part the threads of a process."""
        self._write("tasks", str(thread_id))

    def close(self) -> None:
        def removed() -> bool:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            return not self.path.exists()

        # The dead leave their group a moment after they are gone.
        wait_until(removed, f"{self.path} is empty", 10)

    def freeze(self) -> None:
        """All of it, at once, until thaw()."""
        if self._is_v1:
            self._write("freezer.state", "FROZEN")
            wait_until(lambda: self._read("freezer.state") == "FROZEN", "it is frozen", 5)
        else:
            self._write("cgroup.freeze", "1")
            wait_until(lambda: "frozen 1" in self._read("cgroup.events"), "it is frozen", 5)

    def thaw(self) -> None:
        if self._is_v1:
            self._write("freezer.state", "THAWED")
        else:
            self._write("cgroup.freeze", "0")

    def starve(self, percent: int) -> None:
        """No more than this share of one core, all together."""
        quota_us = PERIOD_US * percent // 100
        if self._is_v1:
            self._write("cpu.cfs_period_us", str(PERIOD_US))
            self._write("cpu.cfs_quota_us", str(quota_us))
        else:
            self._write("cpu.max", f"{quota_us} {PERIOD_US}")

    def feed(self) -> None:
        if self._is_v1:
            self._write("cpu.cfs_quota_us", "-1")
        else:
            self._write("cpu.max", f"max {PERIOD_US}")

    @property
    def throttled(self) -> int:
        """In how many periods of 100 ms it wanted more than its share."""
        figures = dict(line.split() for line in self._read("cpu.stat").splitlines())
        return int(figures["nr_throttled"])

    @property
    def memory_bytes(self) -> int:
        name = "memory.usage_in_bytes" if self._is_v1 else "memory.current"
        return int(self._read(name))

    def limit_memory(self, size: int) -> None:
        self._write("memory.limit_in_bytes" if self._is_v1 else "memory.max", str(size))

    def _write(self, name: str, words: str) -> None:
        (self.path / name).write_text(words)

    def _read(self, name: str) -> str:
        return (self.path / name).read_text().strip()


_KNOBS: Final = {
    "freezer": ("freezer.state", "cgroup.freeze"),
    "cpu": ("cpu.cfs_quota_us", "cpu.max"),
    "memory": ("memory.limit_in_bytes", "memory.max"),
}


@cache
def can_part_threads() -> bool:
    """Can one thread of a process be frozen, and the others go on?"""
    return can_group("freezer") and (ROOT / "freezer" / "tasks").exists()


@cache
def can_group(controller: str) -> bool:
    """Tried: a group of it can be made, and has the file that matters."""
    try:
        with Group(controller) as group:
            return any((group.path / knob).exists() for knob in _KNOBS[controller])
    except OSError:
        return False
