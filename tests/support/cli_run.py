"""Runs the command line in this process against a fake REST server."""

from __future__ import annotations

import io
from typing import Any

import msgspec
from msgspec import Struct

from tests.support.fake_rest import FakeRest
from zmqcluster.cli.app import DistributionCLI
from zmqcluster.cli.arguments import parse
from zmqcluster.rest.schemas import JobView, TaskDetailView, TaskView
from zmqcluster.views import DeviceView, ExplainView, OverviewView, TaskCounts


class Ran(Struct):
    """What a command left behind."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return msgspec.json.decode(self.out)


def run(*argv: str, master: FakeRest | None = None, env: dict[str, str] | None = None) -> Ran:
    """`python main.py ARGV` with an environment of its own."""
    words = list(argv)
    if master is not None:
        words += ["--master-host", "127.0.0.1", "--master-port", str(master.port)]
    stdout, stderr = io.StringIO(), io.StringIO()
    code = DistributionCLI(parse(words), env=env or {}, stdout=stdout, stderr=stderr).run()
    return Ran(code, stdout.getvalue(), stderr.getvalue())


def task_view(task_id: int, **changes: Any) -> TaskView:
    """A task as lists show it."""
    return msgspec.structs.replace(_TASK, task_id=task_id, **changes)


def task_detail(task_id: int, **changes: Any) -> TaskDetailView:
    """A task, whole."""
    return TaskDetailView(**{**msgspec.structs.asdict(_TASK), "task_id": task_id, **changes})


def job_view(job_id: int, state: str = "active", **counts: int) -> JobView:
    """A job with these counts by task state."""
    finished = 1_700_000_002_000 if state != "active" else 0
    return JobView(job_id, "a job", state, 1_700_000_000_000, finished, TaskCounts(**counts))


OVERVIEW = OverviewView(
    epoch=3,
    uptime_s=3725.0,
    durability="full",
    strategy="least_tasks",
    device_id="master-1",
    devices_online=2,
    devices_total=3,
    slots=108,
    tasks=TaskCounts(pending=5, running=2, completed=40, failed=1),
    jobs_active=1,
    window_tasks=5,
    expiry_held=False,
)
DEVICE = DeviceView(device_id="w-1", name="left", state="online", running=2, slots=8)
EXPLAIN = ExplainView(task_id=7, state="pending", reasons=["No device is online."])

_TASK = TaskView(
    task_id=0,
    job_id=3,
    parent_id=0,
    task_type="crawl",
    state="completed",
    priority=5,
    max_retry_count=3,
    timeout_s=900.0,
    labels=[],
    unique_key="http://127.0.0.1/a",
    rate_key="http://127.0.0.1",
    attempt=1,
    failures=0,
    deaths=0,
    cancel_requested=False,
    device_id="w-1",
    not_before_wall=0,
    created_wall=1_700_000_000_000,
    assigned_wall=1_700_000_000_100,
    started_wall=1_700_000_000_200,
    finished_wall=1_700_000_001_000,
    error="",
)
