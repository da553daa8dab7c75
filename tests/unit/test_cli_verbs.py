"""Each verb asks the right thing and prints what came back, for people and for programs."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.cli_run import (
    DEVICE,
    EXPLAIN,
    OVERVIEW,
    job_view,
    run,
    task_detail,
    task_view,
)
from tests.support.fake_rest import Asked, FakeRest, Reply, fake_rest, problem


@pytest.fixture
def master() -> Iterator[FakeRest]:
    with fake_rest() as fake:
        yield fake


def test_status_for_people_and_for_programs(master: FakeRest) -> None:
    master.answers["GET /system/overview"] = Reply(body=OVERVIEW)

    plain = run("distribute", "status", master=master)
    as_json = run("distribute", "status", "--json", master=master)

    assert (plain.code, plain.err) == (0, "")
    assert "devices     2 online of 3" in plain.out
    assert "1 h 2 m" in plain.out
    assert as_json.json()["tasks"]["completed"] == 40


def test_tasks_passes_its_filters_and_reads_on_to_the_limit(master: FakeRest) -> None:
    def page(asked: Asked) -> Reply:
        cursor = int(asked.query.get("cursor", 5000))
        count = int(asked.query["limit"])
        found = [task_view(cursor - n, state="failed", error="HTTP 500") for n in range(count)]
        return Reply(body={"tasks": found, "next_cursor": cursor - count})

    master.answers["GET /tasks"] = page

    ran = run(
        "distribute", "tasks", "--status", "failed", "--job", "3", "--limit", "1500", master=master
    )

    assert ran.code == 0
    assert len(ran.out.splitlines()) == 1501
    assert "HTTP 500" in ran.out.splitlines()[1]
    assert [each.query["limit"] for each in master.asked] == ["1000", "500"]
    assert {each.query["state"] for each in master.asked} == {"failed"}
    assert {each.query["job_id"] for each in master.asked} == {"3"}
    assert "more with --limit" in ran.err


def test_text_from_pages_cannot_drive_the_terminal(master: FakeRest) -> None:
    evil = "a\x1b]0;owned\x07\x9b2J\u202etxt.exe\nfake line\u2028x"
    detail = task_detail(9, error=evil, result={"title": evil}, unique_key=evil)
    master.answers["GET /tasks/9"] = Reply(body=detail)
    master.answers["GET /tasks/9/events"] = Reply(
        body={
            "events": [
                {
                    "at_wall": 1,
                    "kind": "x",
                    "task_id": 9,
                    "attempt": 0,
                    "job_id": 0,
                    "device_id": "",
                    "detail": evil,
                }
            ]
        }
    )

    plain = run("distribute", "task", "9", master=master)
    as_json = run("distribute", "task", "9", "--json", master=master)

    for text in (plain.out, as_json.out):
        assert not [char for char in text if not char.isprintable() and char != "\n"]
    assert not [line for line in plain.out.splitlines() if line.startswith("fake")]
    assert as_json.json()["error"] == evil


def test_explain_and_devices(master: FakeRest) -> None:
    master.answers["GET /tasks/7/explain"] = Reply(body=EXPLAIN)
    master.answers["GET /devices"] = Reply(body={"devices": [DEVICE]})
    master.answers["GET /devices/w-1"] = Reply(body=DEVICE)

    assert "- No device is online." in run("distribute", "explain", "7", master=master).out
    assert "w-1" in run("distribute", "devices", master=master).out
    assert run("distribute", "devices", "--json", master=master).json()[0]["name"] == "left"
    assert run("distribute", "devices", "w-1", "--json", master=master).json()["slots"] == 8
    assert "task types" in run("distribute", "devices", "w-1", master=master).out


def test_no_device_says_how_to_get_one(master: FakeRest) -> None:
    master.answers["GET /devices"] = Reply(body={"devices": []})

    assert "distribute worker" in run("distribute", "devices", master=master).err


def test_jobs(master: FakeRest) -> None:
    master.answers["GET /jobs"] = Reply(body={"jobs": [job_view(3, completed=7)]})

    ran = run("distribute", "jobs", master=master)

    assert ran.out.splitlines()[1].split()[:2] == ["3", "a"]


def changed(*done: int) -> Reply:
    return Reply(body={"task_ids": list(done), "untouched": []})


def test_cancel_tells_what_it_did_and_what_it_could_not(master: FakeRest) -> None:
    left = "Task 2 is left as it is: it is completed already."
    master.answers["POST /tasks/2/cancel"] = problem(409, "conflict", left)
    master.answers["POST /tasks/4/cancel"] = problem(404, "not_found", "There is no task 4.")
    master.answers["POST /tasks/1/cancel"] = changed(1)
    master.answers["POST /jobs/3/cancel"] = changed()
    master.answers["GET /jobs/3"] = Reply(body=job_view(3, "cancelled", running=1, cancelled=5))

    some = run("distribute", "cancel", "2", "4", "1", master=master)
    listed = run("distribute", "cancel", "2", "1", "--json", master=master)
    job = run("distribute", "cancel", "--job", "3", master=master)
    as_json = run("distribute", "cancel", "--job", "3", "--json", master=master)

    assert (some.code, some.out) == (1, f"1 cancelled.\n{left}\nThere is no task 4.\n")
    assert listed.json() == {"task_ids": [1], "untouched": [{"task_id": 2, "why": left}]}
    assert (job.code, job.out) == (0, "Job 3 is cancelled: 5 cancelled, 1 still to go.\n")
    assert as_json.json()["tasks"]["cancelled"] == 5


def test_retry_by_state_asks_for_each_task_found(master: FakeRest) -> None:
    master.answers["GET /tasks"] = Reply(body={"tasks": [task_view(4), task_view(5)]})
    master.answers["POST /tasks/4/retry"] = changed(4)
    master.answers["POST /tasks/5/retry"] = changed(5)

    ran = run("distribute", "retry", "--status", "failed", "--job", "3", master=master)

    assert (ran.code, ran.out) == (0, "2 queued again.\n")
    assert master.asked[0].query == {"state": "failed", "job_id": "3", "limit": "1000"}


@pytest.mark.parametrize("words", [["cancel"], ["cancel", "1", "--job", "2"], ["retry"]])
def test_unclear_which_tasks_is_a_usage_error(words: list[str]) -> None:
    ran = run("distribute", *words)

    assert ran.code == 2
    assert "not both" in ran.err


def test_device_verbs(master: FakeRest) -> None:
    for request in ("POST /devices/w-1/drain", "POST /devices/w-1/resume", "DELETE /devices/w-1"):
        master.answers[request] = Reply(body={"done": True})

    codes = [run("distribute", verb, "w-1", master=master).code for verb in VERBS_ON_DEVICES]

    assert codes == [0, 0, 0]
    assert [f"{each.method} {each.path}" for each in master.asked] == list(master.answers)


VERBS_ON_DEVICES = ("drain", "resume", "revoke")


def test_token_create_prints_the_command_to_paste(master: FakeRest) -> None:
    master.answers["POST /tokens"] = Reply(
        body={
            "token_id": "ab",
            "token": "ck1.AbC",
            "role": "worker",
            "uses": 5,
            "expires_wall": 1_700_000_000_000,
        }
    )

    ran = run(
        "distribute",
        "token",
        "create",
        "--uses",
        "5",
        "--ttl",
        "2h",
        "--advertise",
        "m1.example.org",
        master=master,
    )

    assert ran.out == "python main.py distribute worker --join-token ck1.AbC\n"
    assert master.bodies("POST /tokens") == [
        {"role": "worker", "uses": 5, "ttl_s": 7200.0, "host": "m1.example.org"}
    ]


def test_join_command_names_this_machine_when_nobody_said_how_it_is_called(
    master: FakeRest,
) -> None:
    issued = {"token_id": "ab", "token": "ck1.x", "role": "worker", "uses": 1, "expires_wall": 1}
    master.answers["POST /tokens"] = Reply(body=issued)

    ran = run("distribute", "token", "create", master=master)

    assert f"worker --master-host {socket.gethostname()} --join-token ck1.x" in ran.out
    assert "Change " in ran.err


def test_token_list_and_revoke(master: FakeRest) -> None:
    token = {
        "token_id": "ab",
        "role": "worker",
        "created_wall": 1,
        "expires_wall": 2,
        "uses_left": 3,
        "revoked_wall": 0,
    }
    master.answers["GET /tokens"] = Reply(body={"tokens": [token]})
    master.answers["DELETE /tokens/ab"] = Reply(body={"done": True})

    assert run("distribute", "token", "list", "--json", master=master).json() == [token]
    assert "uses left" in run("distribute", "token", "list", master=master).out
    assert run("distribute", "token", "revoke", "ab", master=master).code == 0


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (problem(404, "not_found", "There is no task 9."), 1),
        (problem(422, "bad_parameters", "url: given 5"), 2),
        (problem(503, "busy", "Too much at once."), 1),
        (Reply(raw=b"{"), 1),
        (Reply(0), 3),
    ],
)
def test_what_the_master_says_decides_the_exit_code(
    master: FakeRest, reply: Reply, code: int
) -> None:
    master.answers["GET /tasks/9"] = reply

    ran = run("distribute", "task", "9", master=master)

    assert ran.code == code
    assert ran.out == ""
    assert ran.err.startswith("zmqcluster: ")
    assert ran.err.count("\n") == 1


# --- submit --------------------------------------------------------------------------------------


def submitted(asked: Asked) -> Reply:
    count = len(msgspec.json.decode(asked.body)["tasks"])
    return Reply(body={"job_id": 8, "task_ids": list(range(1, count + 1)), "existing": []})


def test_submit_turns_words_into_typed_parameters(master: FakeRest) -> None:
    master.answers["POST /tasks"] = submitted

    ran = run(
        "distribute",
        "submit",
        "echo",
        "n=5",
        "on=true",
        "name=a=b",
        'text="5"',
        "zip=01234",
        "--data",
        '{"list": [1, 2]}',
        "--timeout",
        "2m",
        "--label",
        "gpu",
        "--unique-key",
        "u",
        master=master,
    )

    (body,) = master.bodies("POST /tasks")
    assert ran.code == 0
    assert "Task 1 queued" in ran.out
    assert body["tasks"][0]["task_data"] == {
        "list": [1, 2],
        "n": 5,
        "on": True,
        "name": "a=b",
        "text": "5",
        "zip": "01234",
    }
    assert body["tasks"][0]["timeout_s"] == 120.0
    assert body["tasks"][0]["labels"] == ["gpu"]
    assert len(master.asked[0].headers["idempotency-key"]) == 32


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["echo", "--data", "{"], "--data: not JSON"),
        (["echo", "--data", "[1]"], "allowed: a JSON object"),
        (["echo", "--data", "[" * 100_000], "nested too deeply"),
        (["echo", "a=1", "a=2"], "given twice"),
        (["echo", "--file", "x"], "not both"),
        (["--file", "/none/such"], "No such file"),
        (["echo", "--job", "a", "--job-id", "3"], "give one of them"),
    ],
)
def test_submit_refuses_what_it_cannot_read(words: list[str], sentence: str) -> None:
    ran = run("distribute", "submit", *words)

    assert ran.code == 2
    assert sentence in ran.err


def test_submit_sends_a_file_in_bounded_requests_of_one_job(
    master: FakeRest, tmp_path: Path
) -> None:
    file = tmp_path / "tasks.jsonl"
    lines = [f'{{"task_type": "echo", "task_data": {{"n": {n}}}}}\n\n' for n in range(10_001)]
    file.write_text("".join(lines))
    master.answers["POST /tasks"] = submitted

    ran = run("distribute", "submit", "--file", str(file), "--job", "big", master=master)

    first, second = master.bodies("POST /tasks")
    assert ran.out == "10001 tasks queued in job 8.\n"
    assert (len(first["tasks"]), len(second["tasks"])) == (10_000, 1)
    assert (first["job_name"], second["job_id"]) == ("big", 8)
    assert "job_name" not in second
    assert second["tasks"][0]["task_data"] == {"n": 10_000}


def test_submit_tells_what_was_queued_before_a_bad_line(master: FakeRest, tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"task_type": "noop"}\n' * 10_001 + "{")
    master.answers["POST /tasks"] = submitted

    ran = run("distribute", "submit", "--file", str(file), "--job", "big", master=master)

    assert ran.code == 2
    told, why = ran.err.splitlines()
    assert told == "10000 tasks before that were queued in job 8."
    assert "line 10002: no JSON object" in why


@pytest.mark.parametrize("line", ["{", "[]", '{"task_data": {}}', '"x"', "\xff"])
def test_submit_names_the_line_that_is_no_task(tmp_path: Path, line: str) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_bytes(b'{"task_type": "echo"}\n' + line.encode("latin-1"))

    ran = run("distribute", "submit", "--file", str(file))

    assert ran.code == 2
    assert "line 2" in ran.err


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("tasks[1]: unknown task type 'nope'.", "{file}, line 3: unknown task type 'nope'."),
        ("tasks[0].priority: expected less.", "{file}, line 1: priority: expected less."),
        ("job_id: given 5, 6.", "job_id: given 5, 6."),
    ],
)
def test_submit_names_the_line_the_master_means(
    said: str, told: str, master: FakeRest, tmp_path: Path
) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"task_type": "noop"}\r\n\r\n{"task_type": "nope"}\r\n')
    master.answers["POST /tasks"] = problem(422, "bad_parameters", said)

    ran = run("distribute", "submit", "--file", str(file), master=master)

    assert (ran.code, ran.err) == (2, f"zmqcluster: {told.format(file=file)}\n")


def test_submit_of_one_task_speaks_of_no_list(master: FakeRest) -> None:
    master.answers["POST /tasks"] = problem(422, "bad_parameters", "tasks[0]: echo: no such thing.")

    ran = run("distribute", "submit", "echo", "value=1", master=master)

    assert ran.err == "zmqcluster: echo: no such thing.\n"


@pytest.mark.parametrize("words", [["tasks"], ["retry", "--status", "failed"]])
def test_no_tasks_of_a_job_that_is_not_there(words: list[str], master: FakeRest) -> None:
    master.answers["GET /tasks"] = Reply(body={"tasks": [], "next_cursor": None})
    master.answers["GET /jobs/9"] = problem(404, "not_found", "There is no job 9.")

    ran = run("distribute", *words, "--job", "9", master=master)

    assert (ran.code, ran.err) == (1, "zmqcluster: There is no job 9.\n")


@pytest.mark.parametrize(
    ("end", "code", "shown"),
    [
        ({"state": "completed", "result": {"n": 5}}, 0, '{"n": 5}'),
        ({"state": "dead", "error": "killed three workers"}, 1, "killed three workers"),
    ],
)
def test_submit_waits_for_the_end_of_one_task(
    master: FakeRest, end: dict[str, Any], code: int, shown: str
) -> None:
    master.answers["POST /tasks"] = submitted
    master.answers["GET /tasks/1"] = [
        Reply(body=task_detail(1, state="running")),
        Reply(body=task_detail(1, **end)),
    ]

    ran = run("distribute", "submit", "echo", "n=5", "--wait", master=master)

    assert ran.code == code
    assert ran.out.strip() == shown


def test_submit_waits_for_many_as_a_job(master: FakeRest, tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"task_type": "echo"}\n' * 3)
    master.answers["POST /tasks"] = submitted
    master.answers["GET /jobs/8"] = [
        Reply(body=job_view(8, pending=1, completed=2)),
        Reply(body=job_view(8, "finished", completed=2, failed=1)),
    ]

    ran = run("distribute", "submit", "--file", str(file), "--wait", master=master)

    assert ran.code == 1
    assert "2 completed, 1 failed" in ran.out
    assert master.bodies("POST /tasks")[0]["job_name"] == f"submit {file}"
