"""Drives a HostPool as the agent's loop does."""

from __future__ import annotations

import select
import time
from typing import Any

import msgpack  # type: ignore[import-untyped]  # ships no types

from zmqcluster.messages import AttemptRef, Started, TaskOrder, TaskResult
from zmqcluster.model import Outcome
from zmqcluster.runtime.hosts import HostPool, HostReport
from zmqcluster.runtime.hosts_settings import HostSettings

MODULES = ("tests.support.hostile_tasks",)


class HostBench:
    """A started pool. Waiting is always for something, and at most so long."""

    def __init__(self, **settings: Any) -> None:
        wanted: dict[str, Any] = {"modules": MODULES, "built_in": ("executors.builtin",)}
        self.pool = HostPool(HostSettings(**(wanted | settings)))
        self.pool.start()
        self.seen: list[HostReport] = []
        self.results: dict[tuple[int, int], TaskResult] = {}
        self.longest_poll_s = 0.0

    def submit(
        self, task_id: int, task_type: str, attempt: int = 1, timeout_ms: int = 60_000, **data: Any
    ) -> None:
        body: bytes = msgpack.packb(data)
        self.pool.run(TaskOrder(task_id, attempt, task_type, body, timeout_ms))

    def kill(self, task_id: int, outcome: Outcome = Outcome.CANCELLED) -> None:
        self.pool.kill(AttemptRef(task_id, 1), outcome)

    def turn(self, wait_s: float) -> None:
        """One turn of an agent's loop, which waits no longer than the pool allows."""
        due_ms = self.pool.next_deadline_ms()
        if due_ms is not None:
            wait_s = min(wait_s, max(0.0, due_ms / 1000 - time.monotonic()))
        select.select([self.pool.fileno()], [], [], wait_s)
        started = time.perf_counter()
        reports = self.pool.poll(time.monotonic_ns() // 1_000_000)
        self.longest_poll_s = max(self.longest_poll_s, time.perf_counter() - started)
        for report in reports:
            self.seen.append(report)
            if isinstance(report, TaskResult):
                ref = (report.task_id, report.attempt)
                assert ref not in self.results, "one order, one result"
                self.results[ref] = report

    def result(self, task_id: int, attempt: int = 1, within_s: float = 20.0) -> TaskResult:
        """The result of this attempt, waited for."""
        deadline = time.monotonic() + within_s
        while (task_id, attempt) not in self.results:
            left = deadline - time.monotonic()
            assert left > 0, f"no result of {task_id}/{attempt} within {within_s} s"
            self.turn(left)
        return self.results[task_id, attempt]

    def value(self, task_id: int, within_s: float = 20.0) -> Any:
        """What a task returned; it must have completed."""
        result = self.result(task_id, within_s=within_s)
        assert result.outcome is Outcome.COMPLETED, result
        return msgpack.unpackb(result.result)

    def until_started(self, task_id: int, within_s: float = 10.0) -> None:
        deadline = time.monotonic() + within_s
        while not any(
            isinstance(report, Started) and any(ref.task_id == task_id for ref in report.refs)
            for report in self.seen
        ):
            assert time.monotonic() < deadline
            self.turn(deadline - time.monotonic())

    def until_counted(self, name: str, within_s: float = 10.0) -> None:
        """Until the pool has counted this at least once."""
        deadline = time.monotonic() + within_s
        while not self.pool.counters[name]:
            assert time.monotonic() < deadline, f"{name} never happened"
            self.turn(0.05)

    def close(self) -> None:
        self.pool.close(grace_ms=500)


def evidence(result: TaskResult) -> dict[str, Any]:
    found: dict[str, Any] = msgpack.unpackb(result.result)
    return found
