"""A master at work on a real database: all that its core decides goes through the real writer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from random import Random
from typing import Final

from sqlite_utils import Database

from storage import recovery, writer
from storage.database import open_writer
from storage.meta_dao import DATABASE_ID
from tests.support.master_bench import WALL_AT_ZERO, MasterBench, held, spec
from tests.support.naive_store import NaiveStore
from zmqcluster.core.effects import Changes
from zmqcluster.core.rows import TaskRow
from zmqcluster.core.settings import Settings
from zmqcluster.core.state import Past
from zmqcluster.messages import CancelTasks, RateRule, Record, RetryTasks, TaskOrder, TaskSpec
from zmqcluster.model import Durability, Outcome, TaskId

# Small, so that a short run passes many checkpoints and prunes what it did itself.
CHECKPOINT_PAGES: Final = 48
RETENTION_MS: Final = 20_000
CREDIT: Final = 8
_DEVICES: Final = ("d1", "d2", "d3")
_OUTCOMES: Final = {
    Outcome.COMPLETED: 12, Outcome.FAILED: 2, Outcome.RETRY: 2, Outcome.DIED: 1,
    Outcome.TIMED_OUT: 1, Outcome.REJECTED: 1,
}  # fmt: skip


class DurableStore(NaiveStore):
    """Every Changes goes into a database, and only then into the dicts.

    on_open, on_commit: called with the database when either is over. durability None: no syncs at
    all, which the program itself does not offer.
    """

    def __init__(
        self,
        path: Path,
        durability: Durability | None = Durability.FULL,
        *,
        on_commit: Callable[[Database], None] = lambda _: None,
    ) -> None:
        super().__init__()
        self._path = path
        self._durability = durability
        self._on_commit = on_commit
        self.database = self._open()
        self.commits = 0

    def apply(self, changes: Changes) -> None:
        if changes == Changes():
            return
        writer.apply(self.database, changes)
        super().apply(changes)
        self._committed()

    def past(self) -> Past:
        """A new master opens the file anew, and checks that it says what the dicts say."""
        self.close()
        self.database = self._open()
        recovery.begin_epoch(self.database)
        self._committed()
        past, found = super().past(), recovery.load(self.database)
        assert found.epoch == past.epoch
        assert found.next_task_id == past.next_task_id
        assert sorted(found.held, key=_by_id) == sorted(past.in_flight, key=_by_id)
        return past

    def close(self) -> None:
        self.database.close()

    def _committed(self) -> None:
        self.commits += 1
        self._on_commit(self.database)

    def _open(self) -> Database:
        database = open_writer(self._path, self._durability or Durability.NORMAL)
        if self._durability is None:
            database.conn.execute("PRAGMA synchronous = OFF")
        database.conn.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        return database


class Workload:
    """Submissions, dispatches, results with children and records, cancels, retries, restarts."""

    def __init__(self, store: DurableStore, rng: Random) -> None:
        self._store = store
        self._rng = rng
        self._bench = MasterBench(Settings(retention_ms=RETENTION_MS))
        self._bench.audited_tasks_max = 0
        self._bench.store = store
        self._bench.restart()
        self._requests = count(1)
        self._held: list[tuple[str, TaskOrder]] = []

    def run(self, commits: int) -> None:
        """Until the store has so many commits."""
        steps = {
            self._submit: 6, self._work: 14, self._connect: 1, self._lose: 0.3, self._cancel: 1,
            self._retry: 1, self._wait: 2, self._restart: 0.2,
        }  # fmt: skip
        while self._store.commits < commits:
            [step] = self._rng.choices(list(steps), list(steps.values()))
            step()
            self._take_orders()

    def _submit(self) -> None:
        specs = [self._spec() for _ in range(self._rng.randint(1, 6))]
        job = f"job {self._rng.randrange(4)}" if self._rng.random() < 0.5 else ""
        rates = (RateRule("http://o1", delay_ms=700, concurrency=2),)
        self._bench.submit(*specs, job=job, rates=rates if self._rng.random() < 0.2 else ())

    def _spec(self) -> TaskSpec:
        rng = self._rng
        soon = WALL_AT_ZERO + self._bench.now_ms + rng.randrange(4_000)
        return spec(
            data=rng.randbytes(rng.choice([1, 40, 400, 3_000, 9_000])),
            priority=rng.randrange(10),
            unique_key=f"k{rng.randrange(10_000)}" if rng.random() < 0.4 else "",
            rate_key=f"http://o{rng.randrange(3)}" if rng.random() < 0.3 else "",
            not_before_ms=soon if rng.random() < 0.1 else 0,
            max_retry_count=rng.randrange(4),
        )

    def _connect(self) -> None:
        away = [one for one in _DEVICES if one not in self._bench.peers]
        if away:
            self._bench.device(self._rng.choice(away), slots=4, credit=CREDIT, reboot=True)

    def _lose(self) -> None:
        if self._bench.peers:
            self._bench.loses(name := self._rng.choice(list(self._bench.peers)))
            self._gone(name)
            self._bench.advance(2_000)

    def _work(self) -> None:
        if not self._held:
            return self._connect()
        name, order = self._held.pop(self._rng.randrange(len(self._held)))
        self._bench.starts(name, order)
        [outcome] = self._rng.choices(list(_OUTCOMES), list(_OUTCOMES.values()))
        if outcome is Outcome.COMPLETED:
            children = tuple(self._spec() for _ in range(self._rng.choice([0, 0, 0, 2])))
            records = tuple(
                Record("pages", f"p{self._rng.randrange(60)}", self._rng.randbytes(300))
                for _ in range(self._rng.randrange(3))
            )
            self._bench.ends(name, order, outcome, children=children, records=records)
        else:
            self._bench.ends(name, order, outcome, error="no", retry_after_ms=400)

    def _cancel(self) -> None:
        self._bench.hears("client", CancelTasks(self._request(), tuple(self._some_tasks())))

    def _retry(self) -> None:
        self._bench.hears("client", RetryTasks(self._request(), tuple(self._some_tasks())))

    def _wait(self) -> None:
        for name in self._bench.peers:
            self._bench.beat(
                name,
                *(held(order) for device, order in self._held if device == name),
                credit=CREDIT,
            )
        self._bench.advance(self._rng.randrange(200, 3_000))

    def _restart(self) -> None:
        for name in list(self._bench.peers):
            self._gone(name)
        self._bench.restart(downtime_ms=1_000)

    def _gone(self, name: str) -> None:
        self._held = [one for one in self._held if one[0] != name]
        self._bench.peers.pop(name, None)

    def _take_orders(self) -> None:
        for name in self._bench.peers:
            self._held += [(name, order) for order in self._bench.orders(name)]
        self._bench.forget()

    def _some_tasks(self) -> list[TaskId]:
        known = list(self._store.tasks)
        return self._rng.sample(known, min(3, len(known)))

    def _request(self) -> bytes:
        return b"change %d" % next(self._requests)


def _by_id(row: TaskRow) -> int:
    return row.task_id


def content(database: Database) -> int:
    """All rows of all tables, as one number: equal contents have equal ones in one process.

    But for the one random row, of which each database has another.
    """
    connection = database.conn
    tables = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY 1")
    return hash(
        tuple(
            (
                name,
                tuple(
                    row
                    for row in connection.execute(f"SELECT * FROM {name}").fetchall()
                    if row[0] != DATABASE_ID
                ),
            )
            for (name,) in tables.fetchall()
        )
    )
