"""How fast is it, part by part and end to end? Medians and spread, beside a bare floor.

    python scripts/bench.py                 everything, about a minute
    python scripts/bench.py core commit     some parts
    python scripts/bench.py --rounds 9 --json bench-results/today.json

All of it runs on loopback, stops by itself and cleans up; docs/performance.md explains the parts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import zmq  # noqa: E402  # the project is found beside this folder
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from scripts import bench_floor  # noqa: E402
from storage import database, writer  # noqa: E402
from zmqcluster import codec  # noqa: E402
from zmqcluster.client import DistributionClient, task  # noqa: E402
from zmqcluster.core.effects import Changes, Send, Turn  # noqa: E402
from zmqcluster.core.events import (  # noqa: E402
    Committed,
    DelayedLoaded,
    Event,
    LanesListed,
    MessageReceived,
    Principal,
    Tick,
)
from zmqcluster.core.master import MasterCore  # noqa: E402
from zmqcluster.core.settings import Settings  # noqa: E402
from zmqcluster.core.state import Past  # noqa: E402
from zmqcluster.messages import (  # noqa: E402
    Assign,
    Capabilities,
    Hello,
    PoolOffer,
    Results,
    Submit,
    TaskOrder,
    TaskResult,
    TaskSpec,
    TypeOffer,
)
from zmqcluster.model import PROTOCOL_VERSION, DeviceId, Outcome, Pool, Role  # noqa: E402

BATCH: Final = 500
CORE_TASKS: Final = 20_000
E2E_TASKS: Final = 20_000
E2E_BATCH: Final = 1_000
ROUND_TRIPS: Final = 300
START_S: Final = 20.0

# name -> (unit, one value a round); more is better for */s, less for the others.
Figures = dict[str, tuple[str, list[float]]]


def main() -> int:
    """Run the chosen parts and print one table."""
    args = _parse_args()
    figures: Figures = {}
    console = Console()
    for name in args.parts or PARTS:
        with console.status(f"{name} …"):
            PARTS[name](figures, args.rounds)
    _print(console, figures)
    if args.json:
        _save(args.json, figures)
    return 0


def bench_codec(figures: Figures, rounds: int) -> None:
    """One frame of 500 tasks, encoded and decoded with validation."""
    specs = tuple(TaskSpec("noop", b"\x80") for _ in range(BATCH))
    orders = tuple(TaskOrder(n, 1, "noop", b"\x80", 60_000) for n in range(1, BATCH + 1))
    results = tuple(TaskResult(n, 1, Outcome.COMPLETED, b"\xc0") for n in range(1, BATCH + 1))
    cases: dict[str, tuple[Submit | Assign | Results, Callable[[bytes], object]]] = {
        "submit": (Submit(b"r", specs), lambda f: codec.decode_inbound(Role.CLIENT, f)),
        "assign": (Assign(1, 1, orders), codec.decode_to_worker),
        "results": (Results(results), lambda f: codec.decode_inbound(Role.WORKER, f)),
    }
    for name, (message, decode) in cases.items():
        frame = codec.encode(message)
        encode_us = [_us_per_task(lambda: codec.encode(message), BATCH) for _ in range(rounds)]  # noqa: B023
        decode_us = [_us_per_task(lambda: decode(frame), BATCH) for _ in range(rounds)]  # noqa: B023
        figures[f"codec: {name}, encode"] = ("µs/task", encode_us)
        figures[f"codec: {name}, decode"] = ("µs/task", decode_us)


def bench_core(figures: Figures, rounds: int) -> None:
    """Submit, dispatch and result of no-ops through MasterCore alone."""
    values = []
    for _ in range(rounds):
        began = time.perf_counter()
        done = sum(turn.changes.size > 0 for turn in _core_turns(CORE_TASKS))
        values.append((time.perf_counter() - began) / CORE_TASKS * 1e6)
        assert done
    figures["core: submit + dispatch + result"] = ("µs/task", values)


def bench_commit(figures: Figures, rounds: int) -> None:
    """The rows of the same turns, written durably: natural batches of 500 and of one task."""
    for batch, count in ((BATCH, 10_000), (1, 300)):
        values = []
        for _ in range(rounds):
            turns = [turn.changes for turn in _core_turns(count, batch) if turn.writes]
            values.append(_commit_us(turns, count))
        figures[f"commit: full, batches of {batch}"] = ("µs/task", values)


def bench_floor_loop(figures: Figures, rounds: int) -> None:
    """A bare ROUTER and SQLite group commit: no security, no fences, no hosts."""
    values = [bench_floor.tasks_per_second(E2E_TASKS) for _ in range(rounds)]
    figures["floor: bare ZeroMQ + SQLite (full)"] = ("tasks/s", values)


def bench_e2e(figures: Figures, rounds: int) -> None:
    """A master, a worker with its executor hosts, and a client: three processes and more."""
    with _cluster() as (data_dir, port):
        asyncio.run(_end_to_end(figures, rounds, data_dir, port))


PARTS: Final[dict[str, Callable[[Figures, int], None]]] = {
    "codec": bench_codec,
    "core": bench_core,
    "commit": bench_commit,
    "floor": bench_floor_loop,
    "e2e": bench_e2e,
}


async def _end_to_end(figures: Figures, rounds: int, data_dir: str, port: int) -> None:
    async with DistributionClient.of_data_dir(data_dir, "localhost", port + 1) as client:
        await _run(client, 2_000)
        rates, submits = [], []
        for _ in range(rounds):
            submit_s, whole_s = await _run(client, E2E_TASKS)
            rates.append(E2E_TASKS / whole_s)
            submits.append(E2E_TASKS / submit_s)
        trips = [await _round_trips(client) for _ in range(rounds)]
    figures["end to end: no-op tasks"] = ("tasks/s", rates)
    figures["end to end: batch submit"] = ("tasks/s", submits)
    figures["round trip, idle: p50"] = ("ms", [trip[len(trip) // 2] for trip in trips])
    figures["round trip, idle: p99"] = ("ms", [trip[len(trip) * 99 // 100] for trip in trips])


async def _run(client: DistributionClient, count: int) -> tuple[float, float]:
    """Seconds until all is submitted, and until every end is here."""
    began = time.perf_counter()
    batches = range(0, count, E2E_BATCH)
    answers = await asyncio.gather(
        *(client.submit_many([task("noop")] * E2E_BATCH) for _ in batches)
    )
    submitted = time.perf_counter() - began
    ids = [task_id for answer in answers for task_id in answer.task_ids]
    ends = await client.wait(ids, timeout_s=120)
    whole = time.perf_counter() - began
    assert all(end.state == "completed" for end in ends)
    client.forget(ids)
    return submitted, whole


async def _round_trips(client: DistributionClient) -> list[float]:
    """Sorted durations of submit → result, one at a time, in ms."""
    took = []
    for _ in range(ROUND_TRIPS):
        began = time.perf_counter()
        task_id = await client.submit("noop")
        await client.wait([task_id], timeout_s=10)
        took.append((time.perf_counter() - began) * 1000)
        client.forget([task_id])
    return sorted(took)


def _core_turns(count: int, batch: int = BATCH) -> Iterator[Turn]:
    """The turns in which `count` no-ops are submitted, dispatched and completed."""
    settings = Settings(lane_tasks=count, window_tasks=count * 2)
    core = MasterCore(settings, Past(epoch=1), Random(1))
    worker, client = Principal(Role.WORKER, DeviceId("w")), Principal(Role.CLIENT)
    now_ms = 0

    def turn(*events: Event) -> Turn:
        nonlocal now_ms
        now_ms += 1
        return core.handle(now_ms, events)

    turn(Tick(1), LanesListed((), False), DelayedLoaded((), False))
    hello = Hello(
        PROTOCOL_VERSION, "w", b"b" * 16, "w", Capabilities(),
        (TypeOffer("noop", Pool.ASYNC),), (PoolOffer(Pool.ASYNC, 100),), (), 1024,
    )  # fmt: skip
    turn(MessageReceived(b"w", worker, hello))
    for start in range(0, count, batch):
        specs = tuple(TaskSpec("noop", b"\x80") for _ in range(batch))
        submitted = turn(MessageReceived(b"c", client, Submit(b"%d" % start, specs)))
        yield submitted
        yield turn(Committed(submitted.number))
        orders = _orders(submitted)
        while orders:
            ends = tuple(TaskResult(one.task_id, 1, Outcome.COMPLETED, b"\xc0") for one in orders)
            ended = turn(MessageReceived(b"w", worker, Results(ends)))
            yield ended
            yield turn(Committed(ended.number))
            orders = _orders(ended)


def _orders(turn: Turn) -> list[TaskOrder]:
    sent = [one.message for one in turn.actions if isinstance(one, Send)]
    return [order for one in sent if isinstance(one, Assign) for order in one.orders]


def _commit_us(turns: list[Changes], count: int) -> float:
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        base = database.open_writer(Path(folder) / "bench.db")
        try:
            began = time.perf_counter()
            for changes in turns:
                writer.apply(base, changes)
            return (time.perf_counter() - began) / count * 1e6
        finally:
            base.close()


@contextmanager
def _cluster() -> Iterator[tuple[str, int]]:
    """A master and a worker of their own, on disk beside the project: (data_dir, master_port)."""
    port = bench_floor.free_ports(3)
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        nodes = []
        try:
            for verb, words in (("master", "Master node started"), ("worker", "registered")):
                log = Path(folder) / f"{verb}.log"
                nodes.append(_node(verb, folder, port, log))
                _wait_for(log, words)
            yield f"{folder}/data", port
        finally:
            for node in reversed(nodes):
                node.terminate()
                node.wait(20)


def _node(verb: str, folder: str, port: int, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "main.py"), "distribute", verb]
    flags = ["--data-dir", f"{folder}/data", "--master-port", str(port)]
    with log.open("wb") as stream:
        return subprocess.Popen(
            [*command, *flags], stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, cwd=ROOT
        )


def _wait_for(log: Path, words: str) -> None:
    deadline = time.monotonic() + START_S
    while words not in log.read_text():
        if time.monotonic() > deadline:
            raise SystemExit(f"bench: {words!r} not within {START_S:.0f} s:\n{log.read_text()}")
        time.sleep(0.02)


def _us_per_task(work: Callable[[], object], tasks: int) -> float:
    """Median of enough repetitions to fill some milliseconds."""
    took = []
    for _ in range(30):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return statistics.median(took) / tasks * 1e6


def _print(console: Console, figures: Figures) -> None:
    table = Table(title=_machine())
    for heading in ("part", "unit", "min", "median", "max"):
        table.add_column(heading, justify="left" if heading in ("part", "unit") else "right")
    for name, (unit, values) in figures.items():
        row = (min(values), statistics.median(values), max(values))
        table.add_row(name, unit, *(_number(value) for value in row))
    console.print(table)
    floor, ours = (
        figures.get("floor: bare ZeroMQ + SQLite (full)"),
        figures.get("end to end: no-op tasks"),
    )
    if floor and ours:
        ratio = statistics.median(ours[1]) / statistics.median(floor[1])
        console.print(f"end to end is {ratio:.0%} of the bare floor of this run")


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _machine() -> str:
    return (
        f"{os.cpu_count()} cores, Python {platform.python_version()}, SQLite "
        f"{sqlite3.sqlite_version}, libzmq {zmq.zmq_version()}, {platform.system()}"
    )


def _save(path: Path, figures: Figures) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": _machine(),
        "figures": {name: {"unit": unit, "values": vals} for name, (unit, vals) in figures.items()},
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure the cluster part by part and end to end.",
        epilog="example: python scripts/bench.py core e2e --rounds 5",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all)")
    parser.add_argument("--rounds", type=int, default=5, help="values a figure (5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures here")
    args = parser.parse_args()
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"{part} given, {', '.join(PARTS)} allowed")
    if not 1 <= args.rounds <= 100:
        parser.error(f"--rounds: {args.rounds} given, 1 to 100 allowed")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
