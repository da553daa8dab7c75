"""The loops of a process: which of them a mode has, and how they begin and end together."""

from __future__ import annotations

import threading

import pytest

from zmqcluster.errors import ClusterError, ConfigError, StorageError
from zmqcluster.model import SchedulerMode
from zmqcluster.scheduler import TaskScheduler

DEADLINE_S = 10.0


class FakeLoop:
    """Runs until stopped, or raises at once."""

    def __init__(self, name: str, story: list[str], error: Exception | None = None) -> None:
        self._name = name
        self._story = story
        self._error = error
        self._end = threading.Event()

    def run(self) -> None:
        if self._error is not None:
            raise self._error
        assert self._end.wait(DEADLINE_S)
        self._story.append(f"{self._name} ended")

    def stop(self) -> None:
        self._end.set()


@pytest.mark.parametrize(
    ("mode", "has_master", "has_worker"),
    [
        (SchedulerMode.MASTER, False, False),
        (SchedulerMode.MASTER, True, True),
        (SchedulerMode.WORKER, True, True),
        (SchedulerMode.STANDALONE, True, False),
    ],
)
def test_a_mode_has_its_own_loops_and_no_others(
    mode: SchedulerMode, has_master: bool, has_worker: bool
) -> None:
    loop = FakeLoop("any", [])

    with pytest.raises(ConfigError, match=rf"mode: mode {mode} (needs|has no) \w+ loop"):
        TaskScheduler(
            mode, master=loop if has_master else None, worker=loop if has_worker else None
        )


def test_the_worker_ends_before_the_master_so_its_last_results_arrive() -> None:
    story: list[str] = []
    master, worker = FakeLoop("master", story), FakeLoop("worker", story)
    scheduler = TaskScheduler(SchedulerMode.STANDALONE, master=master, worker=worker)
    assert scheduler.stop()

    scheduler.start()
    scheduler.start()

    assert scheduler.stop(DEADLINE_S)
    assert scheduler.stop(DEADLINE_S)
    assert story == ["worker ended", "master ended"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (StorageError("the disk is full"), "the disk is full"),
        (ZeroDivisionError("ours"), "internal error: ZeroDivisionError: ours"),
    ],
)
def test_a_loop_that_fails_tells_why(error: Exception, told: str) -> None:
    heard: list[ClusterError | None] = []
    loop = FakeLoop("master", [], error)
    scheduler = TaskScheduler(SchedulerMode.MASTER, master=loop, on_end=heard.append)

    scheduler.start()

    assert scheduler.stop(DEADLINE_S)
    assert [str(one) for one in heard] == [told]
