"""A cluster under load, everything that is seen of it, and the judgement at the end."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random
from typing import Any, Final, Self, TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import replace

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
    Told,
    problems,
)
from tests.support.history import (
    Final as FinalState,
)
from zmqcluster.client import DistributionClient, task
from zmqcluster.errors import MasterUnreachable, RequestRefused
from zmqcluster.messages import TaskSpec

K = TypeVar("K")
T = TypeVar("T")

# A load that keeps everything busy and leaves the machine room for the fault.
BATCH: Final = 5
PAUSE_S: Final = 0.05
RETRIES: Final = 20
REST_S: Final = 60.0
# How long a program waits for an answer: less than a master takes to start, so that a kill leaves
# requests without one; twice as long after each of them, so that a slow master gets on.
PATIENCE_S: Final = 0.5


class Load:
    """A program that submits, and now and then cancels or waits, until it is told to stop.

    Everything it asks is noted with what became of it, before and after each answer. It gives up
    soon and asks for something else: what it asked for may be carried out or not.
    """

    def __init__(self, cluster: Cluster, trace: Path, seed: int, pause_s: float = PAUSE_S) -> None:
        self.pause_s = pause_s
        self.submissions: list[Submission] = []
        self.cancels: list[Cancel] = []
        self.told: list[Told] = []
        self._cluster = cluster
        self._trace = trace
        self._rng = Random(seed)
        self._seed, self._made = seed, 0
        self._patience_s = PATIENCE_S
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
        waiting: set[asyncio.Task[None]] = set()
        try:
            while not self._stop.is_set():
                task_ids = await self._submit_batch(client)
                if task_ids and self._rng.random() < 0.1:
                    await self._cancel_one(client, task_ids)
                if task_ids and self._rng.random() < 0.1:
                    waiting.add(asyncio.create_task(self._hear(client, task_ids)))
                await asyncio.sleep(self.pause_s)
        finally:
            for one in waiting:
                one.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _submit_batch(self, client: DistributionClient) -> tuple[int, ...]:
        """The new tasks; empty when nobody said so."""
        specs = [self._spec() for _ in range(BATCH)]
        asked = Submission(
            Answer.UNKNOWN,
            tuple(one.unique_key for one in specs),
            marks=tuple(one.data for one in specs),
            retries=(RETRIES,) * BATCH,
            # Whatever a fault does to them, none of them says that it failed.
            can_fail=False,
        )
        try:
            answer = await self._within_patience(client.submit_many(specs, watch=False))
        except RequestRefused:
            asked = replace(asked, answer=Answer.FAIL)
        except MasterUnreachable:
            pass
        else:
            asked = replace(asked, answer=Answer.OK, task_ids=answer.task_ids, job_id=answer.job_id)
        self.submissions.append(asked)
        return asked.task_ids

    async def _cancel_one(self, client: DistributionClient, task_ids: tuple[int, ...]) -> None:
        chosen, asked_ms = self._rng.choice(task_ids), now_ms()
        try:
            changed = await self._within_patience(client.cancel([chosen]))
        except RequestRefused:
            self.cancels.append(Cancel(Answer.FAIL, (chosen,)))
        except MasterUnreachable:
            self.cancels.append(Cancel(Answer.UNKNOWN, (chosen,)))
        else:
            note_cancel(self, self._cluster, changed.task_ids, asked_ms)

    async def _hear(self, client: DistributionClient, task_ids: tuple[int, ...]) -> None:
        """Note how these ended, as this program was told."""
        with contextlib.suppress(MasterUnreachable):
            for end in await client.wait(task_ids):
                self.told.append(Told(end.task_id, end.state, end.attempt, now_ms()))

    async def _within_patience(self, request: Coroutine[Any, Any, T]) -> T:
        """Its answer. Raises MasterUnreachable as if this program had died, and another began."""
        try:
            async with asyncio.timeout(self._patience_s):
                answer = await request
        except TimeoutError:
            self._patience_s *= 2
            raise MasterUnreachable(f"no answer within {self._patience_s / 2} s") from None
        self._patience_s = PATIENCE_S
        return answer

    def _spec(self) -> TaskSpec:
        rng = self._rng
        kind = rng.choices(["trace", "trace_sync"], [8, 2])[0]
        seconds = rng.choice([0.0, 0.0, 0.01, 0.1, 0.5])
        # No two alike, so that a task that is made twice shows.
        self._made += 1
        return task(
            kind,
            {"path": str(self._trace), "seconds": seconds, "note": f"{self._seed} {self._made}"},
            max_retry_count=RETRIES,
            unique_key=f"k{rng.randrange(500)}" if rng.random() < 0.2 else "",
        )


class Verdict(Struct, frozen=True):
    """What was judged in the end. unknown: batches that nobody answered for.

    carried_out: those of them that are there all the same.
    """

    tasks: int = 0
    attempts: int = 0
    starts: int = 0
    unknown: int = 0
    carried_out: int = 0
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
        task_id = self.cluster.submit(task_type, data, max_retry_count=RETRIES)
        marks = (task(task_type, data).data,)
        self.extra.submissions.append(
            Submission(Answer.OK, ("",), (task_id,), marks=marks, retries=(RETRIES,))
        )
        return task_id

    def cancel(self, task_id: int) -> None:
        """Want it to end; the judge knows of it."""
        asked_ms = now_ms()
        changed = self.cluster.ask(lambda client: client.cancel([task_id]))
        self.note_cancel(changed.task_ids, asked_ms)

    def note_cancel(self, task_ids: Sequence[int], asked_ms: float) -> None:
        """These are cancelled, it was just said."""
        note_cancel(self.extra, self.cluster, task_ids, asked_ms)

    def history(self) -> History:
        """All that was seen from outside."""
        seen: list[History | Load] = [self.extra, *self.loads]
        return History(
            submissions=[one for each in seen for one in each.submissions],
            cancels=[one for each in seen for one in each.cancels],
            starts=[
                Start(int(words[1]), int(words[2]), at_ms=float(words[4]) * 1000)
                for words in trace_lines(self.trace, "start")
            ],
            # What a tracing task returns is the number of its attempt.
            ends=[
                End(
                    int(words[1]),
                    int(words[2]),
                    msgspec.msgpack.encode(int(words[2])),
                    float(words[4]) * 1000,
                )
                for words in trace_lines(self.trace, "end")
            ],
            told=[one for each in seen for one in each.told],
            arrivals=self.extra.arrivals,
        )

    def final(self) -> FinalState:
        """What is on disk, all of it at one moment."""
        with self.cluster.snapshot() as rows:
            return FinalState(
                tasks={
                    row[0]: FinalTask(*row[1:])
                    for row in rows(
                        "SELECT task_id, state, attempt, job_id, parent_id, unique_key, device_id, "
                        "coalesce(tasks.task_data, task_bodies.task_data), result, max_retry_count "
                        "FROM tasks LEFT JOIN task_bodies USING (task_id)"
                    )
                },
                attempts={
                    (task_id, attempt): FinalAttempt(*more)
                    for task_id, attempt, *more in rows(
                        "SELECT task_id, attempt, outcome, device_id, started_wall > 0 "
                        "FROM task_assignments"
                    )
                },
                jobs={
                    job_id: FinalJob(*more)
                    for job_id, *more in rows(
                        "SELECT job_id, state, pending, running, completed, failed, cancelled, "
                        "dead FROM jobs"
                    )
                },
                keys={
                    (job_id, key_hash): task_id
                    for job_id, key_hash, task_id in rows(
                        "SELECT job_id, key_hash, task_id FROM unique_keys"
                    )
                },
                events=set(rows("SELECT kind, task_id, attempt FROM events WHERE task_id > 0")),
                job_events=set(rows("SELECT kind, job_id FROM events WHERE task_id = 0")),
            )

    def judge(
        self,
        delays_ms: dict[str, float] | None = None,
        concurrency: dict[str, int] | None = None,
    ) -> None:
        """Wait for rest, and hold what was seen against what is kept."""
        self.step("waiting for rest")
        self.rests()
        history, final = self.history(), self.final()
        found = problems(history, final, delays_ms=delays_ms, concurrency=concurrency)
        kept = {one.mark for one in final.tasks.values()}
        unknown = [one for one in history.submissions if one.answer is Answer.UNKNOWN]
        self.verdict = Verdict(
            tasks=len(final.tasks),
            attempts=len(final.attempts),
            starts=len(history.starts),
            unknown=len(unknown),
            carried_out=sum(kept.issuperset(one.marks) for one in unknown),
            problems=len(found),
        )
        assert not found, "\n".join(map(str, found[:20]))


def now_ms() -> float:
    """By the clock of the traces, which no fault sets."""
    return time.monotonic() * 1000


def note_cancel(
    seen: History | Load, cluster: Cluster, task_ids: Sequence[int], asked_ms: float
) -> None:
    """A cancel was acknowledged for these just now: note it, and what is on record since."""
    answered_ms = now_ms()
    attempts: dict[int, int] = {}
    # A disk that is full, away or locked tells nothing.
    with contextlib.suppress(sqlite3.Error):
        for task_id in task_ids:
            sql = "SELECT state, attempt FROM tasks WHERE task_id = ?"
            [(state, attempts[task_id])] = cluster.rows(sql, task_id)
            if state == "cancelled":
                seen.told.append(Told(task_id, state, attempts[task_id], now_ms()))
    seen.cancels.append(
        Cancel(
            Answer.OK,
            tuple(task_ids),
            asked_ms=asked_ms,
            answered_ms=answered_ms,
            attempts=attempts,
        )
    )
