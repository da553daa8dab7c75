"""Which results leave in which message, and what an outbox never does: lose one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqcluster.codec import encode
from zmqcluster.core.worker_outbox import (
    IN_FLIGHT_BYTES_MAX,
    RESEND_MS,
    Outbox,
    packed_bytes_max,
)
from zmqcluster.messages import AttemptRef, RateRule, Record, Results, TaskResult, TaskSpec
from zmqcluster.model import (
    CHILDREN_MAX,
    FRAME_BYTES_MAX,
    RESULT_BYTES_MAX,
    RESULTS_PER_FRAME_MAX,
    Outcome,
)

NOW_MS = 1_000


def done(task_id: int, result: bytes = b"\xc0") -> TaskResult:
    return TaskResult(task_id, 1, Outcome.COMPLETED, result)


def sent_ids(outbox: Outbox, now_ms: int = NOW_MS) -> list[list[int]]:
    messages = list(outbox.take_messages(now_ms))
    for message in messages:
        assert len(encode(message)) <= FRAME_BYTES_MAX
    return [[one.task_id for one in message.results] for message in messages]


def test_many_results_are_split_by_count() -> None:
    outbox = Outbox()
    for task_id in range(1, RESULTS_PER_FRAME_MAX + 2):
        outbox.keep(NOW_MS, done(task_id))

    assert [len(ids) for ids in sent_ids(outbox)] == [RESULTS_PER_FRAME_MAX, 1]


def test_large_results_are_split_by_bytes_and_held_back_until_others_are_acknowledged() -> None:
    outbox = Outbox()
    count = 2 * IN_FLIGHT_BYTES_MAX // RESULT_BYTES_MAX
    for task_id in range(1, count + 1):
        outbox.keep(NOW_MS, done(task_id, b"x" * RESULT_BYTES_MAX))

    first = [task_id for ids in sent_ids(outbox) for task_id in ids]
    assert 0 < len(first) < count
    assert sent_ids(outbox) == []
    outbox.ack([AttemptRef(task_id, 1) for task_id in first])
    second = [task_id for ids in sent_ids(outbox) for task_id in ids]

    assert first + second == list(range(1, count + 1))


def test_result_that_fits_no_frame_becomes_a_failure_that_says_so() -> None:
    outbox = Outbox()
    records = tuple(Record("pages", str(n), b"x" * 1_000_000) for n in range(5))

    outbox.keep(NOW_MS, TaskResult(1, 1, Outcome.COMPLETED, b"ok", records=records))

    (message,) = outbox.take_messages(NOW_MS)
    (result,) = message.results
    assert result.outcome is Outcome.FAILED
    assert "5000" in result.error
    assert result.records == ()


def test_result_near_the_limit_is_measured_exactly() -> None:
    outbox = Outbox()
    child = TaskSpec("crawl", b"x" * 280, unique_key="é" * 40)
    result = TaskResult(1, 1, Outcome.COMPLETED, children=(child,) * CHILDREN_MAX)
    assert packed_bytes_max(result) > FRAME_BYTES_MAX

    outbox.keep(NOW_MS, result)

    assert next(iter(outbox.take_messages(NOW_MS))).results == (result,)


@given(
    error=st.text(max_size=50),
    body=st.binary(max_size=300),
    children=st.lists(
        st.builds(
            TaskSpec,
            st.just("crawl"),
            st.binary(max_size=300),
            unique_key=st.text(max_size=30),
            rate_key=st.text(max_size=30),
            timeout_ms=st.integers(1, 10**8),
            not_before_ms=st.integers(0, 2**53 - 1),
            labels=st.lists(st.just("gpu"), max_size=3).map(tuple),
        ),
        max_size=3,
    ).map(tuple),
    records=st.lists(
        st.builds(Record, st.just("pages"), st.text(max_size=30), st.binary(max_size=300)),
        max_size=3,
    ).map(tuple),
    rates=st.lists(
        st.builds(RateRule, st.text(min_size=1, max_size=9), st.integers(0, 10**7)), max_size=3
    ).map(tuple),
)
def test_size_bound_is_never_below_the_size(
    error: str,
    body: bytes,
    children: tuple[TaskSpec, ...],
    records: tuple[Record, ...],
    rates: tuple[RateRule, ...],
) -> None:
    result = TaskResult(
        2**63 - 1, 2**31 - 1, Outcome.COMPLETED, body, error, 2**53 - 1, 1, children, records, rates
    )

    assert packed_bytes_max(result) >= len(encode(Results((result,)))) - 16


@pytest.mark.parametrize("acked", [[], [2], [1, 2, 3]])
def test_only_what_is_unacknowledged_is_repeated(acked: list[int]) -> None:
    outbox = Outbox()
    for task_id in (1, 2, 3):
        outbox.keep(NOW_MS, done(task_id))
    sent_ids(outbox)
    outbox.ack([AttemptRef(task_id, 1) for task_id in acked])

    assert sent_ids(outbox, NOW_MS + RESEND_MS - 1) == []
    left = [task_id for task_id in (1, 2, 3) if task_id not in acked]
    assert sent_ids(outbox, NOW_MS + RESEND_MS) == ([left] if left else [])
    assert len(outbox) == len(left)
    assert (outbox.bytes_kept > 0) == bool(left)
