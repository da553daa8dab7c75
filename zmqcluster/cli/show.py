"""Verbs that look: status, tasks, task, explain, devices."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from typing import Any, Final

from zmqcluster.cli.call import DONE, Call, Verb
from zmqcluster.cli.times import bytes_text, duration_text, wall_text
from zmqcluster.cli.values import device_id, key, task_id, task_type, whole
from zmqcluster.model import RATE_KEY_CHARS_MAX, TaskId, TaskState
from zmqcluster.rest.schemas import (
    LIST_MAX,
    DeviceList,
    EventList,
    JobPage,
    JobView,
    TaskDetailView,
    TaskPage,
    TaskView,
)
from zmqcluster.views import DeviceView, ExplainView, OverviewView

TASKS_MAX: Final = 1_000_000
TASK_COLUMNS: Final = (
    "id",
    "type",
    "state",
    "job",
    "attempt",
    "created",
    "device",
    "what",
    "error",
)
DEVICE_COLUMNS: Final = (
    "device",
    "name",
    "state",
    "busy",
    "held",
    "done",
    "failed",
    "lost",
    "cpu%",
    "mem%",
    "beat",
    "labels",
)


def status(call: Call) -> int:
    """How is the cluster?"""
    view = call.api.get("/system/overview", OverviewView)
    if call.out.as_json:
        call.out.data(view)
        return DONE
    tasks = view.tasks
    call.out.fields(
        (
            ("master", f"{call.api.url} ({view.device_id})"),
            ("up for", duration_text(view.uptime_s)),
            ("devices", f"{view.devices_online} online of {view.devices_total}"),
            ("slots", view.slots),
            ("pending", tasks.pending),
            ("running", tasks.running),
            ("completed", tasks.completed),
            ("failed", f"{tasks.failed} failed, {tasks.dead} dead, {tasks.cancelled} cancelled"),
            ("jobs", f"{view.jobs_active} active"),
            ("strategy", view.strategy),
            ("durability", view.durability),
        )
    )
    if view.expiry_held:
        call.out.line("Too many devices fell silent at once: the master waits before it gives up.")
    if view.rate_keys:
        call.out.line()
        call.out.table(
            ("rate key", "delay", "at once", "running", "waiting", "opens in"),
            (
                (
                    each.rate_key,
                    duration_text(each.delay_ms / 1000),
                    each.concurrency or "any",
                    each.running,
                    each.waiting,
                    duration_text(each.open_in_ms / 1000),
                )
                for each in view.rate_keys
            ),
        )
    return DONE


def tasks(call: Call) -> int:
    """List tasks, newest first."""
    args = call.args
    found = list_tasks(
        call,
        limit=args.limit,
        state=args.status,
        job_id=args.job,
        task_type=args.type,
        device_id=args.device,
        rate_key=args.rate_key,
    )
    if call.out.as_json:
        call.out.data(found)
        return DONE
    call.out.table(TASK_COLUMNS, (_task_cells(each) for each in found))
    if not found:
        call.out.note("No task fits.")
    if len(found) == args.limit:
        call.out.note(f"The newest {args.limit}; more with --limit.")
    return DONE


def list_tasks(call: Call, *, limit: int, **filters: Any) -> list[TaskView]:
    """Up to limit tasks, newest first, over as many pages as it takes.

    Raises RequestRefused when none fit because the job they should be of does not exist.
    """
    found: list[TaskView] = []
    cursor: int | None = None
    while len(found) < limit:
        query = {**filters, "limit": min(limit - len(found), LIST_MAX), "cursor": cursor}
        page = call.api.get("/tasks", TaskPage, query)
        found += page.tasks
        cursor = page.next_cursor
        if cursor is None or not page.tasks:
            break
    if not found and filters.get("job_id") is not None:
        call.api.get(f"/jobs/{filters['job_id']}", JobView)
    return found


def task(call: Call) -> int:
    """Everything about one task."""
    number: TaskId = call.args.id
    detail = call.api.get(f"/tasks/{number}", TaskDetailView)
    if call.out.as_json:
        call.out.data(detail)
        return DONE
    events = call.api.get(f"/tasks/{number}/events", EventList)
    call.out.fields((name, value) for name, value in _task_fields(detail) if value != "")
    if detail.attempts:
        call.out.line()
        call.out.table(
            ("attempt", "device", "assigned", "started", "ended", "outcome", "run", "error"),
            (
                (
                    each.attempt,
                    each.device_id,
                    wall_text(each.assigned_wall),
                    wall_text(each.started_wall)[-len("08:00:00") :],
                    wall_text(each.ended_wall)[-len("08:00:00") :],
                    each.outcome,
                    duration_text(each.run_us / 1e6) if each.ended_wall else "",
                    each.error,
                )
                for each in detail.attempts
            ),
        )
    if events.events:
        call.out.line()
        call.out.table(
            ("when", "event", "attempt", "device", "detail"),
            (
                (
                    wall_text(each.at_wall),
                    each.kind,
                    each.attempt or "",
                    each.device_id,
                    each.detail,
                )
                for each in events.events
            ),
        )
    return DONE


def explain(call: Call) -> int:
    """Why is a task not running yet?"""
    view = call.api.get(f"/tasks/{call.args.id}/explain", ExplainView)
    if call.out.as_json:
        call.out.data(view)
        return DONE
    call.out.line(f"Task {view.task_id} is {view.state}.")
    for reason in view.reasons:
        call.out.line(f"- {reason}")
    return DONE


def devices(call: Call) -> int:
    """List devices, or one of them."""
    if call.args.id is not None:
        found = [call.api.get(f"/devices/{call.args.id}", DeviceView)]
    else:
        found = call.api.get("/devices", DeviceList).devices
    if call.out.as_json:
        call.out.data(found[0] if call.args.id is not None else found)
        return DONE
    call.out.table(DEVICE_COLUMNS, (_device_cells(each) for each in found))
    if call.args.id is not None:
        call.out.line()
        call.out.fields(_device_fields(found[0]))
    elif not found:
        call.out.note("No device yet: start one with `python main.py distribute worker`.")
    return DONE


def jobs(call: Call) -> int:
    """List jobs, newest first."""
    page = call.api.get("/jobs", JobPage, {"limit": call.args.limit})
    if call.out.as_json:
        call.out.data(page.jobs)
        return DONE
    call.out.table(
        (
            "job",
            "name",
            "state",
            "pending",
            "running",
            "done",
            "failed",
            "dead",
            "cancelled",
            "created",
        ),
        (
            (
                each.job_id,
                each.name,
                each.state,
                each.tasks.pending,
                each.tasks.running,
                each.tasks.completed,
                each.tasks.failed,
                each.tasks.dead,
                each.tasks.cancelled,
                wall_text(each.created_wall),
            )
            for each in page.jobs
        ),
    )
    if not page.jobs:
        call.out.note("No job yet: `crawl URL` and `submit … --job NAME` start one.")
    return DONE


def _task_cells(view: TaskView) -> tuple[object, ...]:
    return (
        view.task_id,
        view.task_type,
        view.state,
        view.job_id or "",
        view.attempt,
        wall_text(view.created_wall),
        view.device_id,
        view.unique_key,
        view.error,
    )


def _task_fields(view: TaskDetailView) -> Iterable[tuple[str, object]]:
    yield "task", view.task_id
    yield "type", view.task_type
    yield "state", view.state + (" (cancel requested)" if view.cancel_requested else "")
    yield "job", view.job_id or ""
    yield "parent", view.parent_id or ""
    yield "priority", view.priority
    yield "attempts", view.attempt
    yield "failures", f"{view.failures} of {view.max_retry_count + 1} allowed"
    yield "deaths", view.deaths or ""
    yield "timeout", duration_text(view.timeout_s)
    yield "labels", ", ".join(view.labels)
    yield "unique key", view.unique_key
    yield "rate key", view.rate_key
    yield "device", view.device_id
    yield "not before", wall_text(view.not_before_wall)
    yield "created", wall_text(view.created_wall)
    yield "started", wall_text(view.started_wall)
    yield "finished", wall_text(view.finished_wall)
    yield "data", _compact(view.task_data)
    yield "result", _compact(view.result)
    yield "error", view.error


def _device_cells(view: DeviceView) -> tuple[object, ...]:
    age = "" if view.beat_age_ms is None else duration_text(view.beat_age_ms / 1000)
    return (
        view.device_id,
        view.name,
        view.state,
        f"{view.running}/{view.slots}",
        view.assigned,
        view.completed,
        view.failed,
        view.lost,
        f"{view.cpu_pct:.0f}",
        f"{view.memory_pct:.0f}",
        age,
        ",".join(view.labels),
    )


def _device_fields(view: DeviceView) -> Iterable[tuple[str, object]]:
    yield "host", view.host
    yield "platform", view.platform
    yield "cores", view.cpu_count
    yield "memory", bytes_text(view.memory_bytes)
    yield "addresses", ", ".join(view.addresses)
    yield "task types", ", ".join(view.task_types)
    yield "registered", wall_text(view.registered_wall)
    yield "last seen", wall_text(view.last_seen_wall)


def _compact(value: Any) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--status", choices=[str(state) for state in TaskState], help="only these")
    parser.add_argument("--job", type=task_id, metavar="JOB", help="only of this job")
    parser.add_argument("--type", type=task_type, help="only of this task type")
    parser.add_argument("--device", type=device_id, help="only what this device holds or held")
    parser.add_argument(
        "--rate-key", type=key(RATE_KEY_CHARS_MAX), metavar="KEY", help="only of this rate key"
    )
    parser.add_argument(
        "--limit", type=whole(1, TASKS_MAX), default=50, metavar="N", help="at most so many (50)"
    )


def _one_task(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", type=task_id, metavar="ID", help="number of the task")


def _perhaps_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", type=device_id, nargs="?", metavar="ID", help="only this device")


def _job_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--limit", type=whole(1, LIST_MAX), default=20, metavar="N", help="at most so many (20)"
    )


VERBS: Final = (
    Verb("status", "how the cluster is", "status", status),
    Verb(
        "tasks", "list tasks, newest first", "tasks --status failed --job 3", tasks, _list_arguments
    ),
    Verb("task", "everything about one task", "task 17", task, _one_task),
    Verb("explain", "why a task is not running yet", "explain 17", explain, _one_task),
    Verb("jobs", "list jobs, newest first", "jobs --limit 5", jobs, _job_list),
    Verb("devices", "list devices, or show one", "devices --json", devices, _perhaps_device),
)
