"""What a task may hand out, and that nothing leaves a host that the wire would not take."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import msgpack  # type: ignore[import-untyped]  # ships no types
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct

from executors.builtin import FanOutParams
from executors.context import OutputFull, TaskContext
from executors.outcome import STORY_CHARS_MAX, completed, ended, error_line, log_failure
from executors.packing import Unpackable, pack
from executors.registry import Registry
from zmqcluster.errors import TaskRejected, TaskRetryable
from zmqcluster.messages import (
    ProgressNote,
    RateRule,
    Results,
    TaskOrder,
    TaskResult,
    WorkerMessage,
)
from zmqcluster.model import (
    DELAY_MS_MAX,
    ERROR_CHARS_MAX,
    FRAME_BYTES_MAX,
    RESULT_BYTES_MAX,
    Outcome,
)

REGISTRY = Registry.load(built_in=("executors.builtin",))
ORDER = TaskOrder(1, 1, "noop", b"\x80", 60_000)


def on_the_wire(result: TaskResult) -> TaskResult:
    """The result as the master decodes it; fails when it would not."""
    frame = msgspec.msgpack.encode(Results((result,)))
    assert len(frame) <= FRAME_BYTES_MAX
    message = msgspec.msgpack.decode(frame, type=WorkerMessage)
    assert isinstance(message, Results)
    return message.results[0]


def context() -> TaskContext:
    return TaskContext(1, check=REGISTRY.check)


def test_child_carries_everything_it_was_given() -> None:
    one = context()

    one.add_child(
        "fan_out",
        FanOutParams(depth=0),
        priority=9,
        unique_key="ключ",
        rate_key="https://example.com",
        labels=["browser"],
        max_retry_count=0,
        timeout_s=1.5,
        not_before=datetime(2030, 1, 1, tzinfo=UTC),
    )

    child = on_the_wire(completed(ORDER, one, None, 0)).children[0]
    assert msgpack.unpackb(child.data) == {"breadth": 2, "depth": 0, "name": "root"}
    assert (child.priority, child.max_retry_count, child.timeout_ms) == (9, 0, 1500)
    assert (child.unique_key, child.labels) == ("ключ", ("browser",))
    assert child.not_before_ms == 1_893_456_000_000


def test_delay_is_counted_from_now() -> None:
    one = context()

    one.add_child("noop", {}, delay_s=60)

    assert 59_000 < one.children[0].not_before_ms - time.time() * 1000 < 61_000


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"task_type": "NOPE"}, "task_type"),
        ({"data": {"depth": -1}}, "depth: -1 given"),
        ({"data": [1]}, "must be a mapping"),
        ({"data": {"name": object()}}, "not a plain value"),
        ({"priority": 10}, "priority: 10 given, allowed is 0..9"),
        ({"priority": True}, "priority"),
        ({"unique_key": "x" * 3000}, "unique_key"),
        ({"unique_key": "\ud800"}, "surrogate"),
        ({"rate_key": "x" * 400}, "rate_key"),
        ({"labels": ["not ok"]}, "labels"),
        ({"labels": "abc"}, "labels"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"max_retry_count": 101}, "max_retry_count"),
        ({"not_before": datetime(2030, 1, 1)}, "time zone"),  # noqa: DTZ001  # the mistake
    ],
)
def test_child_that_does_not_fit_is_refused_at_once(wrong: dict[str, Any], words: str) -> None:
    given_: dict[str, Any] = {"task_type": "fan_out", "data": {}} | wrong
    one = context()

    with pytest.raises(ValueError, match=words):
        one.add_child(given_.pop("task_type"), given_.pop("data"), **given_)

    assert one.children == []


def test_child_of_a_type_unknown_here_is_left_to_the_master() -> None:
    one = context()

    one.add_child("somebody.elses", {"any": 1})

    assert one.children[0].task_type == "somebody.elses"


def test_children_and_records_never_outgrow_a_frame() -> None:
    one = context()

    def fill() -> None:
        for number in range(20_000):
            one.add_record("pages", f"{number}-" + "ü" * 500, {"text": "y" * 3_000})

    with pytest.raises(OutputFull):
        fill()
    result = completed(ORDER, one, b"z" * (RESULT_BYTES_MAX - 5), 0)

    assert on_the_wire(result).outcome is Outcome.COMPLETED
    assert len(result.records) > 500


def test_number_of_children_is_bounded() -> None:
    one = TaskContext(1)
    for _ in range(10_000):
        one.add_child("noop", {})

    with pytest.raises(OutputFull, match="10,000 children"):
        one.add_child("noop", {})


def test_rules_of_one_key_are_merged_and_sent_at_once_too() -> None:
    sent: list[object] = []
    one = TaskContext(1, emit=sent.append)

    one.report_rate("https://example.com", delay_s=0.5)
    one.report_rate("https://example.com", concurrency=2)
    one.report_rate("https://slow.example.com", delay_s=1e9, closed_for_s=float("inf"))

    day_ms = 24 * 3_600_000
    assert one.rates[0] == RateRule("https://example.com", 500, 2)
    assert one.rates[1].delay_ms == day_ms
    assert (one.rates[1].closed_for_ms or 0) > day_ms - 5_000
    assert sent[0] == RateRule("https://example.com", 500)
    assert len(sent) == 3


def test_rules_survive_a_failed_attempt_and_children_do_not() -> None:
    one = context()
    one.add_child("noop", {})
    one.report_rate("https://example.com", closed_for_s=10)

    result = ended(ORDER, one, TaskRetryable("429", 10_000), 5)

    assert (result.outcome, result.retry_after_ms) == (Outcome.RETRY, 10_000)
    assert result.children == ()
    assert len(on_the_wire(result).rates) == 1


@given(st.floats(), st.text(max_size=300))
def test_progress_always_fits_the_wire(done: float, note: str) -> None:
    sent: list[ProgressNote | RateRule] = []

    TaskContext(1, emit=sent.append).progress(done, note)

    msgspec.msgpack.decode(msgspec.msgpack.encode(sent[0]), type=ProgressNote)


@given(st.text(max_size=6_000))
def test_any_error_text_becomes_one_line_that_fits(text: str) -> None:
    result = on_the_wire(ended(ORDER, context(), RuntimeError(text), 0))

    assert result.outcome is Outcome.FAILED
    assert result.error.startswith("RuntimeError")
    assert len(result.error) <= ERROR_CHARS_MAX
    assert result.error.isprintable() or " " in result.error
    assert "\n" not in result.error


@pytest.mark.parametrize("kind", [Exception, TaskRetryable, TaskRejected, Unpackable])
@pytest.mark.parametrize("what_it_raises", [ValueError("no"), SystemExit(3)])
def test_error_that_cannot_be_shown_is_still_an_error(
    kind: type[Exception], what_it_raises: BaseException
) -> None:
    class Rude(kind):  # type: ignore[valid-type,misc]  # each of them
        def __str__(self) -> str:
            raise what_it_raises

    assert error_line(Rude("x")) == "Rude: (its text cannot be shown)"
    assert "(its text cannot be shown)" in ended(ORDER, context(), Rude("x"), 0).error


@pytest.mark.parametrize(
    ("after_ms", "counts_as"),
    [(1.5, 1), (-1, 0), (math.nan, 0), (math.inf, DELAY_MS_MAX), (None, 0), ("soon", 0)],
)
def test_retry_after_whatever_a_task_says_is_a_time_that_fits(
    after_ms: Any, counts_as: int
) -> None:
    result = on_the_wire(ended(ORDER, context(), TaskRetryable("later", after_ms), 0))

    assert (result.outcome, result.retry_after_ms) == (Outcome.RETRY, counts_as)


def test_story_of_a_failure_is_kept_short(caplog: pytest.LogCaptureFixture) -> None:
    log_failure(logging.getLogger("test"), ORDER, ValueError("x" * 5_000_000))

    (line,) = caplog.messages
    assert line.startswith("task 1/1 (noop) failed")
    assert len(line) < STORY_CHARS_MAX + 100


def test_errors_of_the_task_map_to_outcomes() -> None:
    for error, outcome in [
        (TaskRejected("never"), Outcome.REJECTED),
        (TaskRetryable("later"), Outcome.RETRY),
        (SystemExit(1), Outcome.FAILED),
        (KeyError("x"), Outcome.FAILED),
    ]:
        assert ended(ORDER, context(), error, 0).outcome is outcome


class Point(Struct, frozen=True):
    x: int


@dataclasses.dataclass
class Size:
    width: int


def test_values_of_everyday_life_are_packed_plainly() -> None:
    value = {
        "struct": Point(1),
        "dataclass": Size(2),
        "date": date(2024, 1, 2),
        "when": datetime(2024, 1, 2, tzinfo=UTC),
        "set": {3},
        "id": UUID(int=0),
        "price": Decimal("1.50"),
        "bytes": b"raw",
        "inside": [Point(4)],
        "keys": {1: "a", None: "b", date(2024, 1, 2): "c"},
    }

    assert msgpack.unpackb(pack(value, 1000, "result"), strict_map_key=False) == {
        "struct": {"x": 1},
        "dataclass": {"width": 2},
        "date": "2024-01-02",
        "when": "2024-01-02T00:00:00Z",
        "set": [3],
        "id": "00000000-0000-0000-0000-000000000000",
        "price": "1.50",
        "bytes": b"raw",
        "inside": [{"x": 4}],
        "keys": {1: "a", None: "b", "2024-01-02": "c"},
    }


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (object(), "builtins.object is not a plain value"),
        (2**64, "64 bits"),
        ("\ud800", "surrogate"),
        (nested(102), "deeper than 100 levels"),
        ([Point(nested(102))], "deeper than 100 levels"),  # type: ignore[arg-type]  # on purpose
        (nested(5_000), "recursion limit"),
        ({(1, 2): 3}, "key made of parts"),
        ([{"inside": {frozenset((1,)): 2}}], "key made of parts"),
        ({Point(1): 2}, "key made of parts"),
        ("x" * 2_000, "takes 2,003 bytes packed; at most 1,000"),
        (lambda: 1, "function"),
    ],
)
def test_value_that_cannot_be_packed_says_why(value: object, words: str) -> None:
    with pytest.raises(Unpackable, match=words):
        pack(value, 1_000, "result")

    assert pack(nested(99), 1_000, "result")
    assert pack(1, 10, "result") == b"\x01", "the packer is whole again"


def test_remaining_time_counts_down_to_zero() -> None:
    assert 59_000 < TaskContext(1, timeout_ms=60_000).remaining_ms() <= 60_000
    assert TaskContext(1, timeout_ms=0).remaining_ms() == 0
