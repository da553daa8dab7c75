"""JSON bodies to messages: what fits, what is refused, and how that is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgpack  # type: ignore[import-untyped]  # ships no types
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqcluster import codec
from zmqcluster.messages import Submit
from zmqcluster.model import Role
from zmqcluster.rest.bodies import request_id_of, submission
from zmqcluster.rest.problems import Problem

T = TypeVar("T")
ID = b"r" * 16


def accept_all(task_type: str, data: bytes) -> None:
    """No executor objects."""


def parse(body: Any) -> Submit:
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return submission(raw, ID, accept_all)


def outcome(attempt: Callable[[], T]) -> T | Problem:
    """What came of it; any other error is the test's failure."""
    try:
        return attempt()
    except Problem as problem:
        return problem


def nested(levels: int) -> bytes:
    inner = b"[" * (levels - 1) + b"]" * (levels - 1)
    return b'{"task_type": "noop", "task_data": {"a": ' + (inner or b"1") + b"}}"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_task_data_arrives_as_it_was_given(data: dict[str, Any]) -> None:
    [spec] = parse({"task_type": "noop", "task_data": data}).tasks

    assert msgpack.unpackb(spec.data) == data


@given(st.binary() | JSON.map(msgspec.json.encode) | st.lists(JSON).map(msgspec.json.encode))
def test_whatever_the_bytes_it_is_a_message_or_a_problem(body: bytes) -> None:
    answer = outcome(lambda: submission(body, ID, accept_all))

    if isinstance(answer, Problem):
        assert answer.status in (400, 422)
        msgspec.json.decode(answer.body())
    else:
        assert isinstance(answer, Submit)


@given(
    st.fixed_dictionaries(
        {"task_type": st.sampled_from(["noop", "a.b-c_9", "X", "", "a b"])},
        optional={
            "priority": st.integers(-1, 10),
            "max_retry_count": st.none() | st.integers(-1, 101),
            "timeout_s": st.none() | st.floats(-1, 1e6) | st.integers(0, 10),
            "not_before": st.none()
            | st.integers(-5, 2**60)
            | st.datetimes(timezones=st.timezones()).map(lambda at: at.isoformat()),
            "unique_key": st.text(max_size=2100),
            "rate_key": st.text(max_size=330),
            "labels": st.lists(st.text(max_size=3), max_size=17),
            "job_id": st.integers(-1, 2**63),
        },
    )
)
def test_what_is_accepted_here_is_accepted_by_the_wire(task: dict[str, Any]) -> None:
    message = outcome(lambda: parse(task))

    if not isinstance(message, Problem):
        assert codec.decode_inbound(Role.CLIENT, codec.encode(message)) == message


@pytest.mark.parametrize(
    ("body", "status", "detail"),
    [
        (b"", 400, "body: not valid JSON: Input data was truncated."),
        (b"\xff\xfe", 400, "body: not valid JSON"),
        (b"17", 422, "body: expected an object, got a whole number; given 17."),
        (b"[]", 422, "body: expected a list of length >= 1; given []."),
        (b'{"tasks": []}', 422, "tasks: expected a list of length >= 1; given []."),
        (b'{"tasks": {}}', 422, "tasks: expected a list, got an object; given {}."),
        (b"{}", 422, "body: object missing required field task_type; given {}."),
        ([{"task_type": "x"}, {}], 422, "tasks[1]: object missing required field task_type"),
        ({"task_type": "Ä"}, 422, "task_type: expected text of small letters, digits and"),
        (
            {"task_type": "x", "priority": 12},
            422,
            "priority: expected a whole number <= 9; given 12.",
        ),
        (
            {"task_type": "x", "priority": True},
            422,
            "priority: expected a whole number, got true or false",
        ),
        ({"task_type": "x", "timeout_s": 0}, 422, "timeout_s: expected a number > 0.0; given 0."),
        (
            {"task_type": "x", "labels": ["ok", "no way"]},
            422,
            "labels[1]: expected text of letters",
        ),
        ({"task_type": "x", "not_before": "soon"}, 422, "not_before: invalid RFC3339"),
        ({"task_type": "x", "not_before": "2026-01-01T00:00:00"}, 422, "not_before"),
        ({"task_type": "x", "prioriti": 1}, 422, "did you mean priority?"),
        ([{"task_type": "x", "prioriti": 1}], 422, 'tasks[0]: there is no "prioriti"'),
        ({"tasks": [{"task_type": "x"}], "job": "x"}, 422, "did you mean job_id?"),
        (
            {"tasks": [{"task_type": "x"}], "rates": [{"rate_key": "k", "delays": 1}]},
            422,
            'rates[0]: there is no "delays"; allowed are rate_key, delay_s, concurrency',
        ),
        ({"tasks": [{"task_type": "x"}], "rates": [{"rate_key": ""}]}, 422, "rates[0].rate_key"),
        ({"task_type": "x", "task_data": [1]}, 422, "task_data: expected an object, got a list"),
        ({"task_type": "x", "task_data": {"n": 2**64}}, 422, "must fit in 64 bits"),
        (b'{"task_type": "x", "task_data": {"n": 1e999}}', 422, "task_data: number out of range."),
        (b'{"task_type": "x", "task_data": {"s": "\\ud800"}}', 400, "not valid JSON"),
        ({"task_type": "x", "task_data": {"s": "x" * 262_144}}, 422, "at most 262144"),
        (nested(33), 422, "task_data: given more than 32 levels of nesting."),
        (nested(5000), 4, "nest"),
        (b"[" * 100_000, 4, ""),
        (b'{"a":' * 100_000, 4, ""),
        (
            [{"task_type": "x", "job_id": 4}, {"task_type": "x", "job_id": 5}],
            422,
            "job_id: given 4, 5; one request fills one job.",
        ),
        ({"tasks": [{"task_type": "x"}], "job_id": 4, "job_name": "n"}, 422, "job_name: given"),
        ({"tasks": [{"task_type": "x"}], "job_name": "n" * 129}, 422, "job_name: expected"),
    ],
)
def test_a_refusal_names_what_was_wrong(body: Any, status: int, detail: str) -> None:
    with pytest.raises(Problem) as refused:
        parse(body)

    assert detail in refused.value.detail
    assert str(refused.value.status.value).startswith(str(status))
    assert len(refused.value.detail) < 600


def test_32_levels_are_allowed() -> None:
    [spec] = parse(nested(32)).tasks

    assert spec.data.startswith(b"\x81\xa1a")


def test_many_flat_lists_are_not_deep() -> None:
    [spec] = parse({"task_type": "noop", "task_data": {"rows": [[]] * 100}}).tasks

    assert msgpack.unpackb(spec.data) == {"rows": [[]] * 100}


def test_times_become_whole_ms() -> None:
    tasks = [
        {"task_type": "noop", "timeout_s": 0.0001, "not_before": 1.0004},
        {"task_type": "noop", "timeout_s": 90, "not_before": "1970-01-01T00:00:02Z"},
        {"task_type": "noop", "not_before": "1950-01-01T00:00:00Z"},
        {"task_type": "noop"},
    ]

    specs = parse(tasks).tasks

    assert [spec.timeout_ms for spec in specs] == [1, 90_000, None, None]
    assert [spec.not_before_ms for spec in specs] == [1_000, 2_000, 0, 0]


def test_tasks_may_name_their_common_job() -> None:
    tasks = [{"task_type": "noop", "job_id": 4}, {"task_type": "noop"}]

    assert parse(tasks).job_id == 4
    assert parse({"tasks": tasks, "job_id": 4}).job_id == 4


@given(st.text())
def test_any_idempotency_key_is_16_bytes_or_a_problem(key: str) -> None:
    answer = outcome(lambda: request_id_of(key, bytes))

    if isinstance(answer, Problem):
        assert answer.status == 400
    else:
        assert len(answer) == 16
        assert answer == request_id_of(key, bytes)


def test_without_an_idempotency_key_the_request_is_new() -> None:
    assert request_id_of(None, lambda count: b"n" * count) == b"n" * 16
    for key in ("", " ", "x" * 256, "ü", "a\nb"):
        with pytest.raises(Problem, match="Idempotency-Key"):
            request_id_of(key, bytes)
