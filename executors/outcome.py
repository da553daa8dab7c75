"""How a run's end becomes a TaskResult that always fits the wire."""

from __future__ import annotations

import asyncio
import logging
import re
import traceback
from typing import Final

from executors.context import TaskContext
from executors.packing import Unpackable, pack
from zmqcluster.errors import ClusterError, RequestRefused, TaskRejected, TaskRetryable
from zmqcluster.messages import TaskOrder, TaskResult
from zmqcluster.model import (
    DELAY_MS_MAX,
    ERROR_CHARS_MAX,
    RESULT_BYTES_MAX,
    Outcome,
    RefusalCode,
)

STORY_CHARS_MAX: Final = 32 * 1024
_NOTHING: Final = b"\xc0"  # MessagePack's nil
_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")


def completed(order: TaskOrder, context: TaskContext, value: object, run_us: int) -> TaskResult:
    """The task returned value; one that cannot be packed makes a failed attempt."""
    if value is None:
        result = _NOTHING
    else:
        try:
            result = pack(value, RESULT_BYTES_MAX, "result")
        # _plain may call a task's own __repr__ or properties: the same door as the run.
        except Exception as error:  # noqa: BLE001
            return ended(order, context, error, run_us)
    return TaskResult(
        order.task_id,
        order.attempt,
        Outcome.COMPLETED,
        result,
        "",
        run_us,
        0,
        tuple(context.children),
        tuple(context.records),
        context.rates,
    )


def ended(order: TaskOrder, context: TaskContext, error: BaseException, run_us: int) -> TaskResult:
    """The task raised error. Its children and records are gone; what it learned of sites stays.

    Never raises, whatever the error is made of: an attempt without a result would hang.
    """
    outcome, text, after_ms = Outcome.FAILED, error_line(error), 0
    match error:
        case TaskRetryable():
            outcome, text, after_ms = Outcome.RETRY, one_line(_shown(error)), _after_ms(error)
        case TaskRejected():
            outcome, text = Outcome.REJECTED, one_line(_shown(error))
        case RequestRefused(code=RefusalCode.BAD_PARAMETERS):
            outcome, text = Outcome.REJECTED, one_line(_shown(error))
        case Unpackable():
            text = one_line(_shown(error))
        case asyncio.CancelledError() if context.cancelled:
            outcome, text = Outcome.CANCELLED, ""
        case _:
            pass
    return TaskResult(
        order.task_id,
        order.attempt,
        outcome,
        error=text,
        run_us=run_us,
        retry_after_ms=after_ms,
        rates=context.rates,
    )


def returned(order: TaskOrder, reason: str) -> TaskResult:
    """The attempt is given back, for no fault of its own."""
    return TaskResult(order.task_id, order.attempt, Outcome.RETURNED, error=one_line(reason))


def error_line(error: BaseException) -> str:
    """`TypeName: text` in one line of at most ERROR_CHARS_MAX characters."""
    name, text = type(error).__name__, _shown(error)
    return one_line(f"{name}: {text}" if text else name)


def log_failure(log: logging.Logger, order: TaskOrder, error: BaseException) -> None:
    """The traceback of an unexpected error, for the task's author, in the worker's log."""
    if isinstance(error, ClusterError | asyncio.CancelledError):
        return
    story = "".join(traceback.format_exception(error))
    # An error may quote a page of 50 MB; printing that would hold up a whole host for seconds.
    shown = story if len(story) <= STORY_CHARS_MAX else f"[…]\n{story[-STORY_CHARS_MAX:]}"
    log.error("task %d/%d (%s) failed\n%s", order.task_id, order.attempt, order.task_type, shown)


def _shown(error: BaseException) -> str:
    try:
        return str(error)
    # The task's own __str__ may raise anything, SystemExit too: the same door as its run.
    except BaseException:  # noqa: BLE001
        return "(its text cannot be shown)"


def _after_ms(error: TaskRetryable) -> int:
    """Within 0..DELAY_MS_MAX; 0, the usual back-off, for what is no number."""
    after_ms = getattr(error, "after_ms", 0)
    return int(min(DELAY_MS_MAX, max(0, after_ms))) if isinstance(after_ms, int | float) else 0


def one_line(text: str) -> str:
    """Free of control characters, line breaks and lone surrogates, and not too long."""
    line = _UNPRINTABLE.sub(" ", text[: 2 * ERROR_CHARS_MAX]).strip()
    return line if len(line) <= ERROR_CHARS_MAX else line[: ERROR_CHARS_MAX - 1] + "…"
