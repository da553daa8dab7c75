"""Which results leave in which message, and what an outbox never does: lose one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqcluster.codec import encode
from zmqcluster.core.worker_outbox import (
    BATCH_BYTES,
    IN_FLIGHT_BYTES_MAX,
    IN_FLIGHT_BYTES_MIN,
    PROMPT_MS,
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


def flat(frames: list[list[int]]) -> list[int]:
    return [task_id for ids in frames for task_id in ids]


def test_many_small_results_go_together() -> None:
    outbox = Outbox()
    for task_id in range(1, RESULTS_PER_FRAME_MAX + 2):
        outbox.keep(NOW_MS, done(task_id))

    [first, *_] = sent_ids(outbox)

    assert 100 < len(first) <= RESULTS_PER_FRAME_MAX


def test_large_results_are_split_by_bytes_and_held_back_until_others_are_acknowledged() -> None:
    outbox = Outbox()
    count = 2 * IN_FLIGHT_BYTES_MAX // RESULT_BYTES_MAX
    for task_id in range(1, count + 1):
        outbox.keep(NOW_MS, done(task_id, b"x" * RESULT_BYTES_MAX))

    rounds: list[list[int]] = []
    while ids := flat(sent_ids(outbox)):
        assert sent_ids(outbox) == []
        rounds.append(ids)
        outbox.ack(NOW_MS, [AttemptRef(task_id, 1) for task_id in ids])

    assert flat(rounds) == list(range(1, count + 1))
    assert len(rounds[0]) == 1, "little at first"
    assert len(rounds) < 8, "and more with each acknowledgement"
    assert max(map(len, rounds)) <= IN_FLIGHT_BYTES_MAX // RESULT_BYTES_MAX


def test_no_more_is_in_flight_while_acknowledgements_are_slow() -> None:
    outbox = Outbox()
    for task_id in range(1, 41):
        outbox.keep(NOW_MS, done(task_id, b"x" * BATCH_BYTES))
    now_ms = NOW_MS

    while ids := flat(sent_ids(outbox, now_ms)):
        assert len(ids) * BATCH_BYTES <= IN_FLIGHT_BYTES_MIN
        now_ms += PROMPT_MS + 1
        outbox.ack(now_ms, [AttemptRef(task_id, 1) for task_id in ids])

    assert len(outbox) == 0


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
    outbox.ack(NOW_MS, [AttemptRef(task_id, 1) for task_id in acked])

    assert sent_ids(outbox, NOW_MS + RESEND_MS - 1) == []
    left = [task_id for task_id in (1, 2, 3) if task_id not in acked]
    assert sent_ids(outbox, NOW_MS + RESEND_MS) == ([left] if left else [])
    assert len(outbox) == len(left)
    assert (outbox.bytes_kept > 0) == bool(left)


def test_frame_is_as_small_as_its_largest_result_allows() -> None:
    outbox = Outbox()
    half, whole = b"x" * (BATCH_BYTES // 2), b"x" * (2 * BATCH_BYTES)
    for task_id, body in enumerate((b"", half, half, whole, b""), start=1):
        outbox.keep(NOW_MS, done(task_id, body))

    assert sent_ids(outbox) == [[1, 2], [3], [4], [5]]


def test_nothing_is_repeated_while_a_slow_line_still_brings_one_after_the_other() -> None:
    outbox = Outbox()
    for task_id in range(1, 5):
        outbox.keep(NOW_MS, done(task_id, b"x" * BATCH_BYTES))
    assert flat(sent_ids(outbox)) == [1, 2, 3, 4]

    for task_id in range(1, 4):
        now_ms = NOW_MS + task_id * (RESEND_MS - 1)
        assert sent_ids(outbox, now_ms) == []
        outbox.ack(now_ms, [AttemptRef(task_id, 1)])

    assert outbox.resend_due_ms() == now_ms + RESEND_MS
    assert sent_ids(outbox, now_ms + RESEND_MS) == [[4]]


def test_what_was_overtaken_is_repeated_though_others_are_acknowledged_all_the_time() -> None:
    outbox = Outbox()
    outbox.keep(NOW_MS, done(1))
    sent_ids(outbox)
    for task_id in (2, 3):
        outbox.keep(NOW_MS, done(task_id))
        sent_ids(outbox, NOW_MS + task_id)
        outbox.ack(NOW_MS + RESEND_MS - 1, [AttemptRef(task_id, 1)])

    assert outbox.resend_due_ms() == NOW_MS + RESEND_MS
    assert sent_ids(outbox, NOW_MS + RESEND_MS) == [[1]]
