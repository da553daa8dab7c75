"""Every route over a real core and a real database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]  # ships no types
import msgspec
import pytest

from tests.support.rest_bench import RestBench, rest_bench
from zmqcluster.errors import StartError, StorageError
from zmqcluster.messages import Submit
from zmqcluster.model import Outcome, Strategy, TaskState


@pytest.fixture
def rest(tmp_path: Path) -> Iterator[RestBench]:
    with rest_bench(tmp_path) as bench:
        yield bench


def submit(rest: RestBench, **fields: Any) -> int:
    """Queue one no-op; its id."""
    reply = rest.post("/tasks", {"task_type": "noop", **fields})
    assert reply.status == 201, reply
    return int(reply.json()["task_ids"][0])


# --- submitting ---------------------------------------------------------------------------------


def test_one_task_is_queued_and_shown_whole(rest: RestBench) -> None:
    task = {
        "task_type": "crawl",
        "task_data": {"url": "https://example.com/", "depth": 2, "deep": [{"é": None}]},
        "priority": 7,
        "max_retry_count": 0,
        "timeout_s": 1.5,
        "not_before": "2023-11-15T00:13:20+01:00",
        "unique_key": "https://example.com/",
        "rate_key": "https://example.com",
        "labels": ["eu", "big=yes"],
    }

    reply = rest.post("/tasks", task)

    assert reply.status == 201
    assert reply.json() == {"job_id": 0, "task_ids": [1], "existing": []}
    assert reply.headers["location"] == "/api/distribution/tasks/1"
    shown = rest.get("/tasks/1").json()
    same = ("task_type", "task_data", "priority", "max_retry_count", "timeout_s", "unique_key")
    assert {name: shown[name] for name in same} == {name: task[name] for name in same}
    assert shown["labels"] == ["big=yes", "eu"]
    assert shown["not_before_wall"] == 1_700_003_600_000
    assert (shown["state"], shown["attempt"], shown["attempts"]) == ("pending", 0, [])
    assert shown["result"] is None


def test_a_list_is_queued_in_its_order(rest: RestBench) -> None:
    reply = rest.post("/tasks", [{"task_type": "noop"}, {"task_type": "echo"}])

    assert reply.json()["task_ids"] == [1, 2]
    assert "location" not in reply.headers
    assert rest.get("/tasks/2").json()["task_type"] == "echo"


def test_a_batch_with_a_name_makes_a_job_with_its_rates(rest: RestBench) -> None:
    body = {
        "tasks": [{"task_type": "noop", "rate_key": "k"}] * 3,
        "job_name": "three",
        "rates": [{"rate_key": "k", "delay_s": 0.25, "concurrency": 1}],
    }

    job_id = rest.post("/tasks", body).json()["job_id"]

    assert rest.get(f"/jobs/{job_id}").json()["name"] == "three"
    message = rest.backend.messages[0]
    assert isinstance(message, Submit)
    [rate] = message.rates
    assert (rate.rate_key, rate.delay_ms, rate.concurrency, rate.closed_for_ms) == (
        "k",
        250,
        1,
        None,
    )


def test_a_unique_key_is_queued_once_and_said_to_exist(rest: RestBench) -> None:
    first = submit(rest, unique_key="u")

    reply = rest.post("/tasks", [{"task_type": "noop"}, {"task_type": "noop", "unique_key": "u"}])

    assert reply.json()["task_ids"][1] == first
    assert reply.json()["existing"] == [1]


def test_the_same_idempotency_key_gets_the_same_answer(rest: RestBench) -> None:
    key = {"idempotency-key": "order-17"}
    first = rest.post("/tasks", {"task_type": "noop"}, headers=key)

    again = rest.post("/tasks", {"task_type": "noop"}, headers=key)
    other = rest.post("/tasks", {"task_type": "noop"}, headers={"idempotency-key": "order-18"})
    without = rest.post("/tasks", {"task_type": "noop"})

    assert (again.status, again.json()) == (201, first.json())
    assert other.json()["task_ids"] == [2]
    assert without.json()["task_ids"] == [3]


def test_one_task_that_does_not_fit_refuses_all_and_is_named(rest: RestBench) -> None:
    tasks: list[Any] = [
        {"task_type": "noop"},
        {"task_type": "noop", "task_data": {"t": "refuse me"}},
    ]

    reply = rest.post("/tasks", {"tasks": tasks})

    assert reply.status == 422
    assert reply.problem() == "tasks[1]: task_data.text: given 'refuse me'."
    assert rest.get("/tasks").json()["tasks"] == []


def test_an_unknown_task_type_is_422(rest: RestBench) -> None:
    reply = rest.post("/tasks", {"task_type": "telepathy"})

    assert reply.status == 422
    assert reply.json()["code"] == "unknown_task_type"
    assert "known are" in reply.problem()


def test_an_unknown_job_is_said_by_the_core(rest: RestBench) -> None:
    reply = rest.post("/tasks", {"tasks": [{"task_type": "noop"}], "job_id": 99})

    assert reply.status == 404
    assert "99" in reply.problem()


# --- looking ------------------------------------------------------------------------------------


def test_a_task_that_ran_shows_its_result_attempts_and_events(rest: RestBench) -> None:
    task_id = submit(rest)
    rest.master.device("d1")
    [order] = rest.master.orders("d1")
    result = msgpack.packb({"title": "Hi", "raw": b"\x00", 7: [1.5, None]})
    rest.master.starts("d1", order)
    rest.master.ends("d1", order, result=result, run_us=1234)

    shown = rest.get(f"/tasks/{task_id}").json()

    assert shown["state"] == "completed"
    assert shown["result"] == {"title": "Hi", "raw": {"base64": "AA=="}, "7": [1.5, None]}
    [attempt] = shown["attempts"]
    assert (attempt["device_id"], attempt["outcome"], attempt["run_us"]) == (
        "d1",
        "completed",
        1234,
    )
    assert rest.get("/tasks/stats").json()["completed"] == 1


def test_a_failure_is_in_its_events(rest: RestBench) -> None:
    task_id = submit(rest, max_retry_count=0)
    rest.master.device("d1")
    [order] = rest.master.orders("d1")
    rest.master.ends("d1", order, Outcome.FAILED, error="ValueError: no")

    events = rest.get(f"/tasks/{task_id}/events").json()["events"]

    assert events
    assert all(event["task_id"] == task_id for event in events)
    assert rest.get(f"/tasks/{task_id}").json()["error"] == "ValueError: no"


def test_pages_follow_each_other_both_ways(rest: RestBench) -> None:
    for _ in range(5):
        submit(rest)

    for order, expected in (("newest", [5, 4, 3, 2, 1]), ("oldest", [1, 2, 3, 4, 5])):
        seen: list[int] = []
        cursor = ""
        while True:
            page = rest.get(f"/tasks?limit=2&order={order}{cursor}").json()
            seen += [task["task_id"] for task in page["tasks"]]
            if page["next_cursor"] is None:
                break
            cursor = f"&cursor={page['next_cursor']}"
        assert seen == expected


def test_filters_hold_together(rest: RestBench) -> None:
    rest.post("/tasks", {"tasks": [{"task_type": "echo", "rate_key": "a/b"}], "job_name": "j"})
    submit(rest, rate_key="a/b")
    submit(rest)

    def ids(query: str) -> list[int]:
        return [task["task_id"] for task in rest.get(f"/tasks?{query}").json()["tasks"]]

    assert ids("rate_key=a%2Fb") == [2, 1]
    assert ids("rate_key=a%2Fb&task_type=noop") == [2]
    assert ids("job_id=1") == [1]
    assert ids("state=pending&limit=1") == [3]
    assert ids("state=completed") == []
    assert ids("device_id=d1") == []


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("limit=0", 'limit: expected a whole number >= 1; given "0".'),
        ("limit=1001", "<= 1000"),
        ("limit=many", "limit"),
        ("state=pendin", "pending, assigned, running"),
        ("status=failed", "did you mean state?"),
        ("order=up", "order"),
        ("cursor=-1", "cursor"),
        ("cursor=9223372036854775808", "cursor"),
        ("limit=1&limit=2", "given twice"),
        ("device_id=a%20b", "device_id"),
    ],
)
def test_a_wrong_query_is_400_and_named(rest: RestBench, query: str, named: str) -> None:
    reply = rest.get(f"/tasks?{query}")

    assert reply.status == 400
    assert named in reply.problem()


@pytest.mark.parametrize("task_id", ["7", "0", "-1", "9223372036854775808", "9" * 40])
def test_tasks_that_are_not_there_are_404(rest: RestBench, task_id: str) -> None:
    for path in ("", "/events", "/explain"):
        reply = rest.get(f"/tasks/{task_id}{path}")
        assert reply.status == 404, path
        reply.problem()
    for verb in ("cancel", "retry"):
        reply = rest.post(f"/tasks/{task_id}/{verb}")
        assert reply.status == 404, verb
        assert reply.problem() == f"There is no task {task_id}."


def test_explain_says_why(rest: RestBench) -> None:
    view = rest.get(f"/tasks/{submit(rest)}/explain").json()

    assert view["state"] == "pending"
    assert view["reasons"]


# --- changing -----------------------------------------------------------------------------------


def test_cancel_and_retry_one_task(rest: RestBench) -> None:
    task_id = submit(rest)

    cancelled = rest.post(f"/tasks/{task_id}/cancel")
    assert (cancelled.status, cancelled.json()["task_ids"]) == (200, [task_id])
    assert rest.master.state(task_id) is TaskState.CANCELLED

    again = rest.post(f"/tasks/{task_id}/cancel")
    assert again.status == 409
    assert "cancelled already" in again.problem()

    retried = rest.post(f"/tasks/{task_id}/retry")
    assert (retried.status, retried.json()["task_ids"]) == (200, [task_id])
    assert rest.master.state(task_id) is TaskState.PENDING
    assert rest.post(f"/tasks/{task_id}/retry").status == 409


def test_jobs_are_listed_shown_and_cancelled(rest: RestBench) -> None:
    for name in ("one", "two", "three"):
        rest.post("/tasks", {"tasks": [{"task_type": "noop"}] * 2, "job_name": name})

    first = rest.get("/jobs?limit=2").json()
    rest_of_them = rest.get(f"/jobs?limit=2&cursor={first['next_cursor']}").json()
    assert [job["name"] for job in first["jobs"]] == ["three", "two"]
    assert [job["name"] for job in rest_of_them["jobs"]] == ["one"]
    assert rest_of_them["next_cursor"] is None

    assert rest.post("/jobs/1/cancel").status == 200
    rest.master.advance(1_000)
    job = rest.get("/jobs/1").json()
    assert job["tasks"] == {
        "pending": 0, "running": 0, "completed": 0, "failed": 0, "cancelled": 2, "dead": 0,
    }  # fmt: skip
    assert rest.get("/jobs/99").status == 404
    assert rest.post("/jobs/99/cancel").status == 404


def test_devices_are_listed_shown_drained_and_revoked(rest: RestBench) -> None:
    rest.master.device("d1", slots=3, labels=("eu",))

    assert [one["device_id"] for one in rest.get("/devices").json()["devices"]] == ["d1"]
    device = rest.get("/devices/d1").json()
    assert (device["state"], device["slots"], device["labels"]) == ("online", 3, ["eu"])

    assert rest.post("/devices/d1/drain").json() == {"done": True}
    assert rest.get("/devices/d1").json()["state"] == "draining"
    assert rest.post("/devices/d1/resume").status == 200
    assert rest.get("/devices/d1").json()["state"] == "online"

    # This bench's device never enrolled, so there is no key to revoke; the core says so.
    assert rest.call("DELETE", "/devices/d1", token="the-api-token").status == 404


def test_heartbeats_and_their_means(rest: RestBench) -> None:
    rest.master.device("d1")
    for _ in range(12):
        rest.master.beat("d1")
        rest.master.advance(5_000)

    samples = rest.get("/devices/d1/heartbeats?limit=2").json()
    stats = rest.get("/devices/d1/stats").json()

    assert samples["device_id"] == "d1"
    assert 1 <= len(samples["heartbeats"]) <= 2
    assert stats["samples"] >= len(samples["heartbeats"])
    assert stats["until_wall"] == samples["heartbeats"][0]["at_wall"]


@pytest.mark.parametrize("device_id", ["nobody", "a%20b", "..", "x" * 65, "d1%0a"])
def test_devices_that_are_not_there_are_404(rest: RestBench, device_id: str) -> None:
    for path in ("", "/heartbeats", "/stats"):
        assert rest.get(f"/devices/{device_id}{path}").status == 404, path
    for verb in ("drain", "resume"):
        assert rest.post(f"/devices/{device_id}/{verb}").status == 404, verb


def test_the_strategy_is_changed_from_the_next_dispatch_on(rest: RestBench) -> None:
    put = {"strategy": "weighted"}

    reply = rest.call("PUT", "/strategy", put, token="the-api-token")

    assert (reply.status, reply.json()) == (200, put)
    assert rest.get("/strategy").json() == put
    wrong = rest.call("PUT", "/strategy", {"strategy": "best"}, token="the-api-token")
    assert wrong.status == 422
    for strategy in Strategy:
        assert strategy in wrong.problem()


def test_tokens_are_made_listed_without_secrets_and_revoked(rest: RestBench) -> None:
    body = {"uses": 3, "ttl_s": 60, "host": "10.0.0.1"}

    made = rest.post("/tokens", body)
    assert made.status == 201
    assert made.json() == {
        "token_id": "token-10.0.0.1",
        "token": "ck1.secret",
        "role": "worker",
        "uses": 3,
        "expires_wall": 1_700_000_060_000,
    }
    listed = rest.get("/tokens")
    assert b"secret" not in listed.body
    assert listed.json()["tokens"][0]["uses_left"] == 3

    token_path = "/tokens/token-10.0.0.1"
    assert rest.call("DELETE", token_path, token="the-api-token").json() == {"done": True}
    assert rest.get("/tokens").json()["tokens"][0]["revoked_wall"] > 0
    assert rest.call("DELETE", "/tokens/none", token="the-api-token").status == 404
    assert rest.post("/tokens").status == 201


@pytest.mark.parametrize(
    "body",
    [
        {"uses": 0},
        {"ttl_s": 0},
        {"ttl_s": 1e12},
        {"role": "king"},
        {"role": "enrol"},
        {"host": "x" * 300},
        [],
    ],
)
def test_a_token_nobody_should_make_is_422(rest: RestBench, body: Any) -> None:
    assert rest.post("/tokens", body).status == 422


# --- the whole ----------------------------------------------------------------------------------


def test_the_overview_counts_what_earlier_masters_finished(rest: RestBench) -> None:
    task_id = submit(rest)
    rest.post(f"/tasks/{task_id}/cancel")
    rest.master.restart()

    view = rest.get("/system/overview").json()

    assert view["tasks"]["cancelled"] == 1
    assert view["epoch"] > 1


def test_ready_or_not(rest: RestBench) -> None:
    assert rest.get("//readyz").json() == {"ready": True, "reason": ""}

    rest.backend.readiness = (False, "the self-test is still running")
    reply = rest.get("//readyz")

    assert reply.status == 503
    assert reply.json()["reason"] == "the self-test is still running"
    assert reply.headers["retry-after"] == "1"


def test_metrics_are_prometheus_text(rest: RestBench) -> None:
    submit(rest)
    rest.get("/nothing")

    reply = rest.get("//metrics")

    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = dict(
        line.rsplit(" ", 1) for line in reply.body.decode().splitlines() if line[0] != "#"
    )
    assert samples['zmqcluster_tasks{state="pending"}'] == "1"
    assert samples["zmqcluster_commits_total"] == "17"
    assert samples["zmqcluster_odd_name_total"] == "1"
    assert samples['zmqcluster_http_requests_total{status="404"}'] == "1"
    assert float(samples["process_resident_memory_bytes"]) > 1e6
    assert all(int(samples[f"process_{name}"]) > 0 for name in ("open_fds", "threads"))
    assert int(samples["zmqcluster_http_tasks"]) > 0
    names = [name.partition("{")[0] for name in samples]
    assert all(name.replace("_", "").isalnum() for name in names)


def test_what_is_not_there_and_what_is_not_allowed_are_problems(rest: RestBench) -> None:
    missing = rest.get("/nothing")
    assert missing.status == 404
    assert "/docs" in missing.problem()

    wrong = rest.call("PATCH", "/tasks", token="the-api-token")
    assert wrong.status == 405
    assert "PATCH is not allowed" in wrong.problem()


def test_no_answer_in_time_is_503_and_says_what_is_unknown(rest: RestBench) -> None:
    rest.backend.trouble = TimeoutError()

    reply = rest.post("/tasks", {"task_type": "noop"})

    assert reply.status == 503
    assert reply.headers["retry-after"] == "1"
    assert "may or may not have happened" in reply.problem()


def test_a_master_that_stops_is_503(rest: RestBench) -> None:
    rest.backend.trouble = StartError("the master is stopping")

    reply = rest.post("/tasks", {"task_type": "noop"})

    assert (reply.status, reply.json()["code"]) == (503, "stopping")
    assert reply.problem() == "The master is stopping."


def test_a_disk_in_trouble_is_503(rest: RestBench) -> None:
    rest.backend.trouble = StorageError("disk I/O error in /secret/path")

    reply = rest.get("/tasks")

    assert reply.status == 503
    assert b"/secret/path" not in reply.body


def test_our_own_bug_is_500_logged_once_and_never_shown(
    rest: RestBench, caplog: pytest.LogCaptureFixture
) -> None:
    rest.backend.trouble = ZeroDivisionError("the secret of the bug")

    reply = rest.get("/tasks")

    assert reply.status == 500
    assert b"secret" not in reply.body
    assert b"Traceback" not in reply.body
    assert "its log says what" in reply.problem()
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_ten_thousand_tasks_fit_one_request_and_one_more_does_not(rest: RestBench) -> None:
    task = {"task_type": "noop"}

    accepted = rest.post("/tasks", {"tasks": [task] * 10_000})
    refused = rest.post("/tasks", [task] * 10_001)

    assert accepted.status == 201
    assert len(msgspec.json.decode(accepted.body)["task_ids"]) == 10_000
    assert refused.status == 422
    assert "10000" in refused.problem()
