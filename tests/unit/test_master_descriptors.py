"""An operator hears of descriptors that run out while there is time, and once."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # ships no types

from zmqcluster.core.events import Noticed
from zmqcluster.runtime.descriptors import LOOK_MS, Descriptors


class Process:
    """Of 100 descriptors so many are in use; out of them, it cannot even count."""

    def __init__(self) -> None:
        self.used = 50
        self.descriptors = Descriptors(self._count, lambda: 100)
        self._now_ms = 0

    def look(self) -> list[str]:
        self._now_ms += LOOK_MS
        return [one.kind for one in self.descriptors.look(self._now_ms)]

    def _count(self) -> int:
        if self.used >= 100:
            raise OSError(errno.EMFILE, "Too many open files")
        return self.used


def test_each_change_is_told_once() -> None:
    process = Process()
    told = []

    for process.used in (50, 79, 80, 81, 100, 100, 90, 79, 71, 80, 70, 75, 100, 20):
        told.append(process.look())

    assert told == [
        [], [], ["descriptors_scarce"], [], ["descriptors_gone"], [], ["descriptors_scarce"],
        [], [], [], ["descriptors_enough"], [], ["descriptors_gone"], ["descriptors_enough"],
    ]  # fmt: skip


def test_they_are_counted_now_and_then_only() -> None:
    process = Process()
    process.look()
    process.used = 90

    assert process.descriptors.look(LOOK_MS + 1) == []
    assert process.look() == ["descriptors_scarce"]


def test_the_operator_is_told_how_many_and_what_to_do() -> None:
    [told] = Descriptors(lambda: 85, lambda: 100).look(0)

    assert isinstance(told, Noticed)
    assert told.level == "warning"
    assert told.detail.startswith("85 of 100 descriptors are in use")
    assert "raise the limit" in told.detail


def test_what_this_process_has_open_is_counted(tmp_path: Path) -> None:
    now = psutil.Process().num_fds() - 1  # Less the one it takes to look.
    with contextlib.ExitStack() as stack:
        for number in range(10):
            stack.enter_context((tmp_path / str(number)).open("w"))

        [told] = Descriptors(limit=lambda: now + 12).look(0)

    assert told.detail.startswith(f"{now + 10} of {now + 12} descriptors")


def test_a_process_with_few_files_has_nothing_to_tell() -> None:
    assert Descriptors().look(0) == []
