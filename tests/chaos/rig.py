"""A cluster under load, everything that is seen of it, and the judgement at the end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random
from typing import Any, Final, Self, TypeVar

import msgspec
from msgspec import Struct

from tests.support.cluster import Cluster, trace_lines, wait_until
from tests.support.history import (
    Answer,
    Cancel,
    End,
    FinalAttempt,
    FinalJob,
    FinalTask,
    History,
    Start,
    Submission,
    problems,
)
from tests.support.history import (
    Final as FinalState,
)
from zmqcluster.client import DistributionClient, task
from zmqcluster.errors import MasterUnreachable, RequestRefused
from zmqcluster.messages import TaskSpec

K = TypeVar("K")

# A load that keeps everything busy and leaves the machine room for the fault.
BATCH: Final = 5
PAUSE_S: Final = 0.05
REST_S: Final = 60.0


class Load:
    """A program that submits, and now and then cancels, until it is told to stop.

    Everything it asks is noted with what became of it, before and after each answer.
    """

    def __init__(self, cluster: Cluster, trace: Path, seed: int, pause_s: float = PAUSE_S) -> None:
        self.pause_s = pause_s
        self.submissions: list[Submission] = []
        self.cancels: list[Cancel] = []
        self._cluster = cluster
        self._trace = trace
        self._rng = Random(seed)
        self._seed, self._made = seed, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load")
        self._thread.start()

    @property
    def acknowledged(self) -> int:
        return sum(len(one.task_ids) for one in self.submissions)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        self._cluster.ask(self._submit)

    async def _submit(self, client: DistributionClient) -> None:
        while not self._stop.is_set():
            specs = [self._spec() for _ in range(BATCH)]
            keys = tuple(one.unique_key for one in specs)
            marks = tuple(one.data for one in specs)
            try:
                answer = await client.submit_many(specs, watch=False)
            except RequestRefused:
                self.submissions.append(Submission(Answer.FAIL, keys, marks=marks))
            except MasterUnreachable:
                self.submissions.append(Submission(Answer.UNKNOWN, keys, marks=marks))
            else:
                self.submissions.append(
                    Submission(Answer.OK, keys, answer.task_ids, answer.job_id, marks)
                )
                await self._cancel_one(client, answer.task_ids)
            await asyncio.sleep(self.pause_s)

    async def _cancel_one(self, client: DistributionClient, task_ids: tuple[int, ...]) -> None:
        if self._rng.random() < 0.1:
            chosen = self._rng.choice(task_ids)
            try:
                changed = await client.cancel([chosen])
            except (MasterUnreachable, RequestRefused):
                self.cancels.append(Cancel(Answer.UNKNOWN, (chosen,)))
            else:
                self.cancels.append(Cancel(Answer.OK, changed.task_ids))

    def _spec(self) -> TaskSpec:
        rng = self._rng
        kind = rng.choices(["trace", "trace_sync"], [8, 2])[0]
        seconds = rng.choice([0.0, 0.0, 0.01, 0.1, 0.5])
        # No two alike, so that a task that is made twice shows.
        self._made += 1
        return task(
            kind,
            {"path": str(self._trace), "seconds": seconds, "note": f"{self._seed} {self._made}"},
            max_retry_count=20,
            unique_key=f"k{rng.randrange(500)}" if rng.random() < 0.2 else "",
        )


class Verdict(Struct, frozen=True):
    """What was judged in the end. unknown: requests that nobody answered."""

    tasks: int = 0
    attempts: int = 0
    starts: int = 0
    unknown: int = 0
    problems: int = 0


class Running(Struct, frozen=True):
    """A task and the process that runs it."""

    task_id: int
    pid: int


class Rig:
    """Make one with `rig(folder)`; a fault starts what it wants, breaks it, and leaves the rest.

    config: of master and workers alike; short beats, so that silence is noticed in seconds.
    """

    def __init__(self, folder: Path, seed: int = 1, **config: object) -> None:
        self.folder = folder
        self.trace = folder / "trace"
        self.cluster = Cluster(
            folder, **{"heartbeat_interval": 1.0, "device_timeout": 3.0, **config}
        )
        self.seed = seed
        self.loads: list[Load] = []
        self.extra = History()
        self.rng = Random(seed)
        # What is being done, for who watches; the last one is now.
        self.steps: list[str] = []
        self.verdict = Verdict()
        self._kept = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._kept:
            for load in self.loads:
                load.stop()
            self.cluster.close()

    def keep(self, thing: AbstractContextManager[K]) -> K:
        """Have it closed after the cluster."""
        return self._kept.enter_context(thing)

    def step(self, words: str) -> None:
        """Say what comes now."""
        self.steps.append(words)

    def pause(self, low_s: float, high_s: float) -> None:
        """Let the load run for a while; when exactly the fault comes must not matter."""
        time.sleep(self.rng.uniform(low_s, high_s))

    @contextlib.contextmanager
    def load(self, pause_s: float = PAUSE_S) -> Iterator[Load]:
        """A load that runs while the block does. pause_s: between two batches."""
        load = Load(self.cluster, self.trace, self.seed + len(self.loads), pause_s)
        self.loads.append(load)
        try:
            yield load
        finally:
            load.stop()

    def flows(self, load: Load, tasks: int = 50) -> None:
        """Until so many more tasks are acknowledged."""
        wanted = load.acknowledged + tasks
        wait_until(lambda: load.acknowledged >= wanted, f"{tasks} more tasks acknowledged", REST_S)

    def rests(self) -> None:
        """Until nothing is open any more. Fails when it does not become less for REST_S."""
        is_open = "SELECT count(*) FROM tasks WHERE state IN ('pending', 'assigned', 'running')"
        left = self.cluster.rows(is_open)[0][0]
        while left:
            before = left

            def is_less(before: int = before) -> bool:
                return bool(self.cluster.rows(is_open)[0][0] < before)

            wait_until(is_less, f"less than {before} open tasks", REST_S)
            left = self.cluster.rows(is_open)[0][0]

    def events(self, kind: str) -> int:
        """How many of these are on record."""
        return int(self.cluster.rows("SELECT count(*) FROM events WHERE kind = ?", kind)[0][0])

    def running(self, task_type: str, count: int = 1, **fields: Any) -> list[Running]:
        """Submit tasks of one of the tracing types, and wait until all of them run."""
        data = {"path": str(self.trace), **fields}
        ids = [self.submit(task_type, data) for _ in range(count)]
        wanted = set(ids)

        def begun() -> list[Running]:
            lines = trace_lines(self.trace, "start")
            runs = [Running(int(one[1]), int(one[3])) for one in lines if int(one[1]) in wanted]
            return runs if len(runs) >= count else []

        return wait_until(begun, f"{count} {task_type} run")

    def starts_of(self, task_id: int) -> list[float]:
        """When its attempts began, monotonic s."""
        lines = trace_lines(self.trace, "start")
        return [float(one[4]) for one in lines if int(one[1]) == task_id]

    def submit(self, task_type: str, data: dict[str, Any]) -> int:
        """A task beside the load; the judge knows of it."""
        task_id = self.cluster.submit(task_type, data, max_retry_count=20)
        self.extra.submissions.append(Submission(Answer.OK, ("",), (task_id,)))
        return task_id

    def cancel(self, task_id: int) -> None:
        """Want it to end; the judge knows of it."""
        changed = self.cluster.ask(lambda client: client.cancel([task_id]))
        self.extra.cancels.append(Cancel(Answer.OK, changed.task_ids))

    def history(self) -> History:
        """All that was seen from outside."""
        return History(
            submissions=[
                *self.extra.submissions, *(one for load in self.loads for one in load.submissions)
            ],
            cancels=[*self.extra.cancels, *(one for load in self.loads for one in load.cancels)],
            starts=[
                Start(int(words[1]), int(words[2])) for words in trace_lines(self.trace, "start")
            ],
            # What a tracing task returns is the number of its attempt.
            ends=[
                End(int(words[1]), int(words[2]), msgspec.msgpack.encode(int(words[2])))
                for words in trace_lines(self.trace, "end")
            ],
            told=self.extra.told,
            arrivals=self.extra.arrivals,
        )  # fmt: skip

    def final(self) -> FinalState:
        """What is on disk."""
        rows = self.cluster.rows
        return FinalState(
            tasks={
                row[0]: FinalTask(*row[1:])
                for row in rows(
                    "SELECT task_id, state, attempt, job_id, parent_id, unique_key, device_id, "
                    "coalesce(tasks.task_data, task_bodies.task_data), result "
                    "FROM tasks LEFT JOIN task_bodies USING (task_id)"
                )
            },
            attempts={
                (task_id, attempt): FinalAttempt(*more)
                for task_id, attempt, *more in rows(
                    "SELECT task_id, attempt, outcome, device_id FROM task_assignments"
                )
            },
            jobs={
                job_id: FinalJob(*more)
                for job_id, *more in rows(
                    "SELECT job_id, state, pending, running, completed, failed, cancelled, dead "
                    "FROM jobs"
                )
            },
            keys={
                (job_id, key_hash): task_id
                for job_id, key_hash, task_id in rows(
                    "SELECT job_id, key_hash, task_id FROM unique_keys"
                )
            },
            events=set(rows("SELECT task_id, attempt FROM events WHERE kind GLOB 'task_*'")),
        )

    def judge(self, delays_ms: dict[str, float] | None = None) -> None:
        """Wait for rest, and hold what was seen against what is kept."""
        self.step("waiting for rest")
        self.rests()
        history, final = self.history(), self.final()
        found = problems(history, final, delays_ms=delays_ms)
        self.verdict = Verdict(
            tasks=len(final.tasks),
            attempts=len(final.attempts),
            starts=len(history.starts),
            unknown=sum(one.answer is Answer.UNKNOWN for one in history.submissions),
            problems=len(found),
        )
        assert not found, "\n".join(map(str, found[:20]))
