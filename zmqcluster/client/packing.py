"""What a program hands to the library and gets back: tasks, requests, results, as bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]  # ships no types

from executors.packing import pack_map
from zmqcluster import codec
from zmqcluster.errors import ClusterError, RequestRefused
from zmqcluster.messages import ClientMessage, TaskSpec
from zmqcluster.model import PRIORITY_DEFAULT, TASK_DATA_BYTES_MAX, RefusalCode, Role

# In a Submit, where messages travel as arrays: its tasks come third.
_WHERE: Final = re.compile(r" - at `\$\[2\]\[(?P<task>\d+)\]\[(?P<field>\d+)\].*`")


def task(
    task_type: str,
    data: dict[str, Any] | None = None,
    *,
    priority: int = PRIORITY_DEFAULT,
    max_retry_count: int | None = None,
    timeout_s: float | None = None,
    not_before: float | None = None,
    unique_key: str = "",
    rate_key: str = "",
    labels: Sequence[str] = (),
) -> TaskSpec:
    """One task to submit. data: its parameters; dates become ISO text, sets lists.

    not_before: seconds since 1970. Raises ValueError for data that cannot be sent; everything else
    is checked by submit() and by the master, which name what does not fit.
    """
    if isinstance(labels, str):
        raise ValueError(f"labels: give a list of texts, not the text {labels!r:.80}")
    return TaskSpec(
        task_type=task_type,
        data=pack_map(data or {}, TASK_DATA_BYTES_MAX, "data"),
        priority=priority,
        max_retry_count=max_retry_count,
        timeout_ms=None if timeout_s is None else _ms("timeout_s", timeout_s),
        not_before_ms=0 if not_before is None else _ms("not_before", not_before),
        unique_key=unique_key,
        rate_key=rate_key,
        labels=tuple(labels),
    )


def unpack(result: bytes) -> Any:
    """A task's result as Python values; None for an empty one."""
    return msgpack.unpackb(result, strict_map_key=False) if result else None


def frame_of(message: ClientMessage) -> bytes:
    """Raises RequestRefused for what the master would not even decode, and so never answer."""
    try:
        frame = codec.encode(message)
        codec.decode_inbound(Role.CLIENT, frame)
    except (ClusterError, TypeError, ValueError, OverflowError) as error:
        problem = _WHERE.sub(_named, str(error))
        raise RequestRefused(RefusalCode.BAD_REQUEST, problem) from None
    return frame


def _named(where: re.Match[str]) -> str:
    """What a position in a Submit means to whoever wrote its tasks."""
    field = TaskSpec.__struct_fields__[int(where["field"])]
    return f" (task {where['task']}: {field})"


def _ms(name: str, seconds: float) -> int:
    """Whole milliseconds, rounded up: a short time is not none."""
    if not math.isfinite(seconds):
        raise ValueError(f"{name}: {seconds!r} is no time")
    return math.ceil(seconds * 1000)
