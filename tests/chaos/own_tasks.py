"""Tasks a fault submits itself, beside the load: noted for the checker, and what came of them."""

from __future__ import annotations

import asyncio
import re
from typing import Any, Final
from urllib.request import urlopen

from msgspec import Struct

from tests.chaos.rig import Rig
from tests.support.cluster import trace_lines, wait_until
from tests.support.history import Answer, Submission
from zmqcluster.client import DistributionClient, task
from zmqcluster.messages import RateRule

# A master that is alive answers in this time, also on a busy machine.
ANSWER_S: Final = 8.0
TERMINAL: Final = frozenset({"completed", "failed", "cancelled", "dead"})


class End(Struct, frozen=True):
    """How a task ended. outcomes: of its attempts, in order."""

    state: str
    error: str
    outcomes: tuple[str, ...]


def submit(rig: Rig, task_type: str, count: int = 1, **fields: Any) -> list[int]:
    """So many tasks of this type; fields beside `data` are those of a task.

    Raises TimeoutError when the master does not answer.
    """
    data = fields.pop("data", {})
    rates: list[RateRule] = fields.pop("rates", [])
    specs = [task(task_type, data, **fields) for _ in range(count)]

    async def work(client: DistributionClient) -> tuple[int, ...]:
        async with asyncio.timeout(ANSWER_S):
            answer = await client.submit_many(specs, rates=rates, watch=False)
        return answer.task_ids

    keys = tuple(one.unique_key for one in specs)
    marks = tuple(one.data for one in specs)
    try:
        ids = rig.cluster.ask(work)
    except TimeoutError:
        rig.extra.submissions.append(Submission(Answer.UNKNOWN, keys, marks=marks))
        raise
    rig.extra.submissions.append(Submission(Answer.OK, keys, ids, marks=marks))
    return list(ids)


def submit_wild(rig: Rig, name: str, timeout_s: float = 30.0, retries: int = 0, **data: Any) -> int:
    """A task of tests/support/wild_tasks.py."""
    data["path"] = str(rig.trace)
    [task_id] = submit(rig, f"w.{name}", data=data, timeout_s=timeout_s, max_retry_count=retries)
    return task_id


def end_of(rig: Rig, task_id: int, within_s: float = 45.0) -> End:
    """How it ended, waited for."""
    wait_until(lambda: rig.cluster.state(task_id) in TERMINAL, f"task {task_id} ends", within_s)
    [(state, error)] = rig.cluster.rows("SELECT state, error FROM tasks WHERE task_id = ?", task_id)
    outcomes = rig.cluster.rows(
        "SELECT outcome FROM task_assignments WHERE task_id = ? ORDER BY attempt", task_id
    )
    return End(state, error, tuple(row[0] for row in outcomes))


def has_begun(rig: Rig, task_id: int, attempt: int = 1) -> int:
    """The process of an attempt, once it began."""

    def found() -> int:
        lines = trace_lines(rig.trace, "start")
        return next(
            (int(line[3]) for line in lines if line[1:3] == [str(task_id), str(attempt)]), 0
        )

    return wait_until(found, f"attempt {attempt} of task {task_id} begins")


def vouch(rig: Rig, task_id: int, attempt: int) -> None:
    """Say that an attempt began, for a run that cannot write the trace itself."""
    with rig.trace.open("a") as file:
        file.write(f"start {task_id} {attempt} 0 0\n")


def events(rig: Rig, kind: str) -> int:
    """How many events of this kind are on record."""
    return int(rig.cluster.rows("SELECT count(*) FROM events WHERE kind = ?", kind)[0][0])


def counted(rig: Rig, name: str) -> float:
    """A counter of the running master; 0 before it counted anything."""
    return measured(rig.cluster.port, f"zmqcluster_{name}_total")


def measured(port: int, name: str, timeout_s: float = 10.0) -> float:
    """A figure without labels of the master at this port, as /metrics shows it; 0 if not there."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=timeout_s) as answer:
        text = answer.read().decode()
    found = re.search(rf"^{name} ([\d.]+)$", text, re.M)
    return float(found[1]) if found else 0.0
