"""Rows to the views of schemas.py, and packed values to JSON."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from math import isfinite
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]  # it ships no types

from storage.event_dao import StoredEvent
from zmqcluster.core.rows import AssignmentRow, HeartbeatRow, JobRow, TaskRow, TokenRow
from zmqcluster.messages import Changed
from zmqcluster.rest.schemas import (
    AttemptView,
    ChangedView,
    DeviceStatsView,
    EventView,
    HeartbeatView,
    JobView,
    TaskDetailView,
    TaskView,
    TokenView,
    UntouchedView,
)
from zmqcluster.views import DeviceView, TaskCounts

LEVELS_MAX: Final = 64


def _task_fields(row: TaskRow) -> dict[str, Any]:
    return {
        "task_id": row.task_id,
        "job_id": row.job_id,
        "parent_id": row.parent_id,
        "task_type": row.task_type,
        "state": row.state,
        "priority": row.priority,
        "max_retry_count": row.max_retry_count,
        "timeout_s": row.timeout_ms / 1000,
        "labels": row.labels.split(",") if row.labels else [],
        "unique_key": row.unique_key,
        "rate_key": row.rate_key,
        "attempt": row.attempt,
        "failures": row.failures,
        "deaths": row.deaths,
        "cancel_requested": row.cancel_requested,
        "device_id": row.device_id,
        "not_before_wall": row.not_before_wall,
        "created_wall": row.created_wall,
        "assigned_wall": row.assigned_wall,
        "started_wall": row.started_wall,
        "finished_wall": row.finished_wall,
        "error": row.error,
    }


def task_view(row: TaskRow) -> TaskView:
    """A task for a list."""
    return TaskView(**_task_fields(row))


def task_detail_view(
    row: TaskRow, attempts: Sequence[AssignmentRow], task_data: Any, result: Any
) -> TaskDetailView:
    """A task, whole. task_data, result: already in the shapes of JSON."""
    return TaskDetailView(
        **_task_fields(row),
        task_data=task_data,
        result=result,
        attempts=[attempt_view(each) for each in attempts],
    )


def attempt_view(row: AssignmentRow) -> AttemptView:
    """One attempt of a task."""
    return AttemptView(
        attempt=row.attempt,
        device_id=row.device_id,
        assigned_wall=row.assigned_wall,
        started_wall=row.started_wall,
        ended_wall=row.ended_wall,
        outcome=row.outcome,
        run_us=row.run_us,
        error=row.error,
    )


def event_view(stored: StoredEvent) -> EventView:
    """One event."""
    row = stored.event
    return EventView(
        event_id=stored.event_id,
        at_wall=row.at_wall,
        kind=row.kind,
        task_id=row.task_id,
        attempt=row.attempt,
        job_id=row.job_id,
        device_id=row.device_id,
        detail=row.detail,
    )


def job_view(row: JobRow) -> JobView:
    """One job."""
    counts = TaskCounts(
        pending=row.pending,
        running=row.running,
        completed=row.completed,
        failed=row.failed,
        cancelled=row.cancelled,
        dead=row.dead,
    )
    return JobView(
        job_id=row.job_id,
        name=row.name,
        state=row.state,
        created_wall=row.created_wall,
        finished_wall=row.finished_wall,
        tasks=counts,
    )


def heartbeat_view(row: HeartbeatRow) -> HeartbeatView:
    """One sample of a device."""
    return HeartbeatView(
        at_wall=row.at_wall,
        cpu_pct=row.cpu_pct,
        memory_pct=row.memory_pct,
        memory_bytes=row.memory_bytes,
        disk_pct=row.disk_pct,
        net_sent_bps=row.net_sent_bps,
        net_received_bps=row.net_received_bps,
        running=row.running,
        assigned=row.assigned,
    )


def device_stats_view(device: DeviceView, samples: Sequence[HeartbeatRow]) -> DeviceStatsView:
    """Counts of a device, and means over its samples, which come newest first."""
    stats = DeviceStatsView(
        device_id=device.device_id,
        completed=device.completed,
        failed=device.failed,
        lost=device.lost,
        assigned=device.assigned,
        running=device.running,
    )
    if samples:
        count = len(samples)
        stats.samples = count
        stats.since_wall = samples[-1].at_wall
        stats.until_wall = samples[0].at_wall
        stats.cpu_pct_mean = round(sum(each.cpu_pct for each in samples) / count, 2)
        stats.cpu_pct_max = max(each.cpu_pct for each in samples)
        stats.memory_pct_mean = round(sum(each.memory_pct for each in samples) / count, 2)
        stats.running_mean = round(sum(each.running for each in samples) / count, 2)
    return stats


def changed_view(changed: Changed) -> ChangedView:
    """What a request changed, and what not."""
    untouched = [UntouchedView(task_id=each.task_id, why=each.why) for each in changed.untouched]
    return ChangedView(task_ids=changed.task_ids, untouched=untouched)


def token_view(row: TokenRow) -> TokenView:
    """One join token, without its keys."""
    return TokenView(
        token_id=row.token_id,
        role=row.role,
        created_wall=row.created_wall,
        expires_wall=row.expires_wall,
        uses_left=row.uses_left,
        revoked_wall=row.revoked_wall,
    )


# --- packed values ------------------------------------------------------------------------------


def json_value(packed: bytes) -> Any:
    """A packed value in the shapes of JSON; what has no such shape shows as {"base64": "…"}.

    packed: MessagePack a task's submitter or executor made, so anything at all.
    """
    if not packed:
        return None
    try:
        value = msgpack.unpackb(packed, raw=False, strict_map_key=False)
        return _plain(value, LEVELS_MAX)
    except (
        ValueError,
        TypeError,
        OverflowError,
        RecursionError,
        msgpack.exceptions.UnpackException,
    ):
        return _base64(packed)


def _plain(value: Any, levels: int) -> Any:
    """Raises ValueError below so many levels."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            # JSON has no name for these; null would hide that something was there.
            return value if isfinite(value) else str(value)
        case bytes():
            return _base64(value)
        case _ if levels == 0:
            raise ValueError("nested too deeply")
        case list() | tuple():
            return [_plain(each, levels - 1) for each in value]
        case dict():
            return {_key(key): _plain(each, levels - 1) for key, each in value.items()}
        case _:
            # Timestamps and extension types.
            return str(value)


def _key(key: Any) -> str:
    if isinstance(key, bytes):
        return base64.b64encode(key).decode("ascii")
    return key if isinstance(key, str) else str(key)


def _base64(value: bytes) -> dict[str, str]:
    return {"base64": base64.b64encode(value).decode("ascii")}
