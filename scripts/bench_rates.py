"""Rate keys by the hundred thousand: the start, the dispatch, and a device that invents them.

The real core, lookups and database, without sockets: what is measured is the master's own part.
Each part runs in a process of its own, so that its memory is only its own.

    python scripts/bench_rates.py [start|dispatch|reports]...
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Final

import psutil  # type: ignore[import-untyped]  # ships no types

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from storage import database, recovery, writer
from storage.queries import Queries
from zmqcluster.core.effects import Changes, Send
from zmqcluster.core.events import Committed, Event, MessageReceived, Principal, Tick
from zmqcluster.core.master import MasterCore
from zmqcluster.core.pipeline import Pipeline
from zmqcluster.core.rows import RateKeyRow
from zmqcluster.core.settings import Settings
from zmqcluster.core.state import Past
from zmqcluster.messages import (
    Assign,
    AttemptRef,
    Capabilities,
    Hello,
    Inbound,
    PoolOffer,
    RateReport,
    RateRule,
    Results,
    Started,
    Submit,
    TaskOrder,
    TaskResult,
    TaskSpec,
    TypeOffer,
)
from zmqcluster.model import PROTOCOL_VERSION, DeviceId, Durability, Outcome, Pool, Role
from zmqcluster.runtime.lookups import Lookups

START_KEYS: Final = 300_000
DISPATCH_TASKS: Final = 100_000
REPORTED_KEYS: Final = 500_000
BATCH: Final = 500
DEVICE: Final = b"device"
CLIENT: Final = b"client"
PRINCIPALS: Final = {
    DEVICE: Principal(Role.WORKER, DeviceId("d")),
    CLIENT: Principal(Role.CLIENT),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    names = parser.parse_args().parts or list(PARTS)
    for name in names:
        if name not in PARTS:
            parser.error(f"there is no part {name!r}; there are: {', '.join(PARTS)}")
    context = multiprocessing.get_context("spawn")
    for name in names:
        for part in PARTS[name]:
            process = context.Process(target=_in_a_folder, args=(part,))
            process.start()
            process.join()
    return 0


def measure_start(folder: Path) -> None:
    """A database full of keys with a delay; what a start costs."""
    base = database.open_writer(folder / "cluster.db", Durability.NORMAL)
    rows = [RateKeyRow(_origin(n), 1_000, 0, 0, 0) for n in range(START_KEYS)]
    writer.apply(base, Changes(rate_keys={row.rate_key: row for row in rows}, clock_ms=1))
    del rows
    before_mb, began = _rss_mb(), time.perf_counter()
    master = Master(folder)
    master.turn()
    _say(f"start with {START_KEYS:,} delayed keys", began, before_mb)
    master.close()
    base.close()


def measure_dispatch_of_one_key(folder: Path) -> None:
    """The comparison: as many tasks that share one key without a delay."""
    _dispatch(folder, lambda _: "https://one.example", "one key")


def measure_dispatch_of_many_keys(folder: Path) -> None:
    """Each task has a key of its own, as on the first pages of a wide crawl."""
    _dispatch(folder, _origin, f"{DISPATCH_TASKS:,} keys")


def measure_reports(folder: Path) -> None:
    """A device invents keys as fast as it is listened to; then the master starts again."""
    master = Master(folder)
    master.connect()
    before_mb, began = _rss_mb(), time.perf_counter()
    for first in range(0, REPORTED_KEYS, 250):
        rules = tuple(RateRule(_origin(first + n), delay_ms=60_000) for n in range(250))
        master.hears(DEVICE, RateReport(rules))
    _say(f"{REPORTED_KEYS:,} keys reported by one device", began, before_mb)
    base = master.base
    (rows,) = base.conn.execute("SELECT count(*) FROM rate_keys").fetchone()
    print(f"  rows on disk: {rows:,}; keys in memory: {len(master.core.state.rates):,}")
    master.close()
    began = time.perf_counter()
    master = Master(folder)
    master.turn()
    _say("  start after that", began, before_mb)
    master.close()


PARTS: Final[dict[str, tuple[Callable[[Path], None], ...]]] = {
    "start": (measure_start,),
    "dispatch": (measure_dispatch_of_one_key, measure_dispatch_of_many_keys),
    "reports": (measure_reports,),
}


class Master:
    """The master's loop without sockets: one message and one ms a turn, committed at once."""

    def __init__(self, folder: Path) -> None:
        path = folder / "cluster.db"
        self.base = database.open_writer(path, Durability.NORMAL)
        self.queries = Queries(path)
        epoch, old = recovery.begin_epoch(self.base), recovery.load(self.base)
        past = Past(
            epoch=epoch,
            clock_ms=old.clock_ms + 1,
            next_task_id=old.next_task_id,
            next_job_id=old.next_job_id,
            in_flight=old.held,
            jobs=old.jobs,
            devices=old.devices,
            rate_keys=old.rate_keys,
        )
        self.core = MasterCore(Settings(), past, Random(1))
        self.lookups = Lookups(self.queries, self.core)
        self.pipeline = Pipeline()
        self.now_ms = past.clock_ms
        self.orders: list[TaskOrder] = []

    def close(self) -> None:
        self.queries.close()
        self.base.close()

    def connect(self) -> None:
        self.hears(
            DEVICE,
            Hello(
                version=PROTOCOL_VERSION,
                device_id="d",
                boot_id=b"b" * 16,
                name="d",
                capabilities=Capabilities(),
                task_types=(TypeOffer("noop", Pool.ASYNC),),
                pools=(PoolOffer(Pool.ASYNC, 1_000),),
                labels=(),
                credit=1_000,
            ),
        )

    def hears(self, peer: bytes, message: Inbound) -> None:
        facts = self.lookups.facts_for(message)
        self.turn(MessageReceived(peer, PRINCIPALS[peer], message, facts))

    def turn(self, *events: Event) -> None:
        """One turn, its commit, and the turns of what that brings."""
        self.now_ms += 1
        now_ms = self.now_ms
        more: list[Event] = [Tick(now_ms), *events]
        while more:
            self.pipeline.add(self.core.handle(now_ms, more))
            more = []
            batch = self.pipeline.begin()
            if batch is not None:
                writer.apply(self.base, batch)
                more.append(Committed(self.pipeline.done()))
            answers: list[Event] = []
            for action in self.pipeline.take():
                answer = self.lookups.answer(action)
                if answer is not None:
                    answers.append(answer)
                elif isinstance(action, Send) and isinstance(action.message, Assign):
                    self.orders += action.message.orders
            more = answers + more


def _dispatch(folder: Path, key_of: Callable[[int], str], what: str) -> None:
    master = Master(folder)
    master.connect()
    before_mb, began = _rss_mb(), time.perf_counter()
    for first in range(0, DISPATCH_TASKS, BATCH):
        specs = tuple(TaskSpec("noop", b"\x80", rate_key=key_of(first + n)) for n in range(BATCH))
        master.hears(CLIENT, Submit(b"%d" % first, specs))
    done = 0
    while orders := master.orders:
        master.orders = []
        for first in range(0, len(orders), BATCH):
            some = orders[first : first + BATCH]
            refs = tuple(AttemptRef(one.task_id, one.attempt) for one in some)
            master.hears(DEVICE, Started(refs))
            ends = tuple(TaskResult(one.task_id, one.attempt, Outcome.COMPLETED) for one in some)
            master.hears(DEVICE, Results(ends))
            done += len(some)
    assert done == DISPATCH_TASKS, done
    per_s = done / (time.perf_counter() - began)
    _say(f"{what}, a task each: {per_s:,.0f} tasks/s", began, before_mb)
    print(f"  keys in memory: {len(master.core.state.rates):,}")
    master.close()


def _in_a_folder(part: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        part(Path(folder))


def _origin(number: int) -> str:
    return f"https://site-{number * 7919 % 1_000_003}.example"


def _rss_mb() -> float:
    return float(psutil.Process().memory_info().rss) / 2**20


def _say(what: str, began: float, before_mb: float) -> None:
    took_s = time.perf_counter() - began
    print(f"{what}: {took_s:.2f} s, {_rss_mb() - before_mb:+.0f} MiB")


if __name__ == "__main__":
    raise SystemExit(main())
