"""What an agent decides about its executor hosts."""

from __future__ import annotations

import os
import sys
from typing import Final

from msgspec import Struct

from executors.context import ExecutorSettings
from executors.registry import BUILT_IN

MIB: Final = 1024 * 1024


def default_start_method() -> str:
    """Forking from the warden takes a few ms; macOS's system libraries do not survive it."""
    return "fork" if sys.platform == "linux" else "spawn"


class HostSettings(Struct, frozen=True):
    """modules: those of `--executors`. built_in: only tests change it.

    async_slots: tasks at once in the asyncio host. sync_slots: hosts of plain functions; 0: one a
    core, at least 2. sync_tasks_max: tasks after which such a host is replaced.
    grown_bytes_max: resident memory at which a host is replaced as soon as it is free; 0: never.
    rss_bytes_max: resident memory at which a host is killed; 0: never.
    """

    modules: tuple[str, ...] = ()
    built_in: tuple[str, ...] = BUILT_IN
    executor: ExecutorSettings = ExecutorSettings()
    async_slots: int = 100
    sync_slots: int = 0
    sync_tasks_max: int = 10_000
    grown_bytes_max: int = 512 * MIB
    rss_bytes_max: int = 0
    start_method: str = default_start_method()

    @property
    def sync_hosts(self) -> int:
        """How many hosts of plain functions there may be."""
        return self.sync_slots or max(2, os.cpu_count() or 2)
