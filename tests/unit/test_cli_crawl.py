"""The verb crawl: what it queues, how it watches, what it tells at the end."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator

import pytest
from rich.console import Console

from tests.support.cli_run import EXPLAIN, job_view, run, task_detail, task_view
from tests.support.fake_rest import Asked, FakeRest, Reply, fake_rest, problem
from zmqcluster.cli import crawl
from zmqcluster.cli.arguments import parse
from zmqcluster.cli.call import Call
from zmqcluster.cli.follow import PATIENCE_S, Follower
from zmqcluster.cli.output import Output
from zmqcluster.cli.progress import PLAIN_LINE_EVERY_S, PlainDisplay, Progress, render
from zmqcluster.config import ClusterConfig
from zmqcluster.errors import MasterUnreachable, RequestRefused
from zmqcluster.rest.schemas import JobView, TaskPage
from zmqcluster.runtime.clock import ManualClock

SEED = "http://127.0.0.1:9/docs/"


@pytest.fixture
def master() -> Iterator[FakeRest]:
    with fake_rest() as fake:
        fake.answers["POST /tasks"] = Reply(body={"job_id": 3, "task_ids": [1], "existing": []})
        yield fake


def crawled(master: FakeRest, statuses: list[int]) -> None:
    """Let the master have a finished job of pages with these statuses."""
    pages = [task_view(number) for number in range(1, len(statuses) + 1)]

    def page(asked: Asked) -> Reply:
        if asked.query["state"] != "completed":
            return Reply(body={"tasks": []})
        after, limit = int(asked.query["cursor"]), int(asked.query["limit"])
        found = [each for each in pages if each.task_id > after][:limit]
        more = bool(found) and found[-1].task_id < len(pages)
        return Reply(body={"tasks": found, "next_cursor": found[-1].task_id if more else None})

    master.answers["GET /tasks"] = page
    for number, status in enumerate(statuses, 1):
        url = f"{SEED}{number}"
        result = {"url": url, "status": status, "title": f"Page {number}", "bytes": 10, "links": 2}
        result["skipped"] = "" if status else "robots"
        master.answers[f"GET /tasks/{number}"] = Reply(body=task_detail(number, result=result))
    master.answers["GET /jobs/3"] = [
        Reply(body=job_view(3, pending=1, running=1, completed=1)),
        Reply(body=job_view(3, "finished", completed=len(statuses))),
    ]


def test_seeds_become_one_job_of_canonical_urls(master: FakeRest) -> None:
    ran = run(
        "crawl",
        "http://127.0.0.1:9/docs/../docs/#top",
        SEED,
        "HTTP://127.0.0.1:9/other",
        "--depth",
        "2",
        "--delay",
        "0.5",
        "--scope",
        "host",
        "--detach",
        master=master,
    )

    (body,) = master.bodies("POST /tasks")
    assert ran.code == 0
    assert "crawl --follow 3" in ran.out
    assert [task["unique_key"] for task in body["tasks"]] == [SEED, "http://127.0.0.1:9/other"]
    assert body["tasks"][0] == {
        "task_type": "crawl",
        "task_data": {
            "url": SEED,
            "scope_base": SEED,
            "scope": "host",
            "depth": 2,
            "delay_s": 0.5,
        },
        "unique_key": SEED,
        "rate_key": "http://127.0.0.1:9",
    }
    assert body["job_name"] == f"crawl {SEED} and 1 more"
    assert [(rate["rate_key"], rate["delay_s"]) for rate in body["rates"]] == [
        ("http://127.0.0.1:9", 0.5)
    ]


def test_public_sites_are_polite_from_the_first_request_on(master: FakeRest) -> None:
    run("crawl", "https://example.org", "--contact", "me@example.org", "--detach", master=master)

    (body,) = master.bodies("POST /tasks")
    assert body["rates"] == [
        {
            "rate_key": "https://example.org",
            "delay_s": 1.0,
            "concurrency": 4,
            "closed_for_s": None,
        }
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "give URLs"),
        (["http://127.0.0.1/", "--follow", "3"], "give URLs"),
        (["example.org"], "did you mean https://example.org?"),
        (["ftp://127.0.0.1/"], "only http and https"),
    ],
)
def test_wrong_crawl_is_refused_before_anything_is_asked(words: list[str], sentence: str) -> None:
    ran = run("crawl", *words)

    assert ran.code == 2
    assert sentence in ran.err


def test_a_crawl_of_one_page_and_of_none_is_told_without_empty_tables(master: FakeRest) -> None:
    crawled(master, [200])
    one = run("crawl", SEED, master=master)
    crawled(master, [])
    none = run("crawl", SEED, master=master)

    assert (one.code, none.code) == (0, 1)
    assert ": 1 page, 10 B, 0 failed" in one.out
    assert none.out.splitlines() == [
        "Job 3 is finished: 0 pages, 0 B, 0 failed, in 2.0 s, 0 a second."
    ]


def test_crawl_ends_with_pages_codes_and_where_the_data_is(master: FakeRest) -> None:
    crawled(master, [200] * 12 + [404, 0])

    ran = run("crawl", SEED, master=master)

    assert ran.code == 0
    rows = {tuple(line.split()) for line in ran.out.splitlines()}
    assert {("200", "12"), ("404", "1"), ("robots", "1")} <= rows
    assert "Page 10" in ran.out
    assert "Page 11" not in ran.out
    assert "14 pages, 140 B, 0 failed, in 2.0 s, 7 a second" in ran.out
    assert "data/cluster.db" in ran.out


def test_each_page_is_counted_once_and_all_are(master: FakeRest) -> None:
    crawled(master, [200] * 30)
    details = [f"/tasks/{number}" for number in range(1, 31)]

    report = run("crawl", SEED, "--json", master=master).json()

    assert (report["codes"], report["codes_complete"]) == ({"200": 30}, True)
    asked = Counter(each.path for each in master.asked)
    assert [asked[path] for path in details] == [1] * 30


def test_crawl_of_which_nothing_came_is_failed(master: FakeRest) -> None:
    crawled(master, [])
    failed = task_view(1, state="failed", error="127.0.0.1 is loopback: see egress_allow")
    master.answers["GET /jobs/3"] = Reply(body=job_view(3, "finished", failed=1))

    def page(asked: Asked) -> Reply:
        return Reply(body={"tasks": [failed] if asked.query["state"] == "failed" else []})

    master.answers["GET /tasks"] = page

    ran = run("crawl", SEED, master=master)

    assert ran.code == 1
    assert "see egress_allow" in ran.out


def test_ctrl_c_leaves_the_job_running_and_says_so() -> None:
    out = Output(io.StringIO(), io.StringIO())
    call = Call(parse(["crawl", SEED]), ClusterConfig(), out, {})

    call._api = _InterruptedApi()  # type: ignore[assignment]  # a person at the keyboard
    code = crawl._watch(call, 3)

    assert code == 130
    assert isinstance(out.stderr, io.StringIO)
    assert "Job 3 goes on without you" in out.stderr.getvalue()
    assert "cancel --job 3" in out.stderr.getvalue()


class _InterruptedApi:
    def get(self, *args: object) -> None:
        raise KeyboardInterrupt


# --- following -----------------------------------------------------------------------------------


class Script:
    """Stands for a master over time: each question gets the next answer."""

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.clock = ManualClock()
        self.err = io.StringIO()
        out = Output(io.StringIO(), self.err)
        self.call = Call(parse(["distribute", "status"]), ClusterConfig(), out, {})
        self.call._api = self  # type: ignore[assignment]  # only get() is asked
        self.follower = Follower(
            self.call, self.clock, lambda seconds: self.clock.advance(int(seconds * 1000))
        )

    def get(self, path: str, answer: object, query: object = None) -> object:
        found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if callable(found):
            found = found(path)
        if isinstance(found, Exception):
            raise found
        return found


AWAY = MasterUnreachable("away")


def test_a_master_that_is_restarted_is_waited_for() -> None:
    stopping = RequestRefused("stopping", "I stop.")
    late = RequestRefused("timeout", "The master did not answer in time.")
    script = Script(job_view(3), AWAY, stopping, late, job_view(3, "finished", completed=1))
    looks: list[JobView] = []

    view = script.follower.job(3, lambda now_s, view: looks.append(view))

    assert view.state == "finished"
    assert len(looks) == 2
    assert script.err.getvalue().splitlines() == [
        "The master does not answer; waiting for it to come back.",
        "The master is back.",
    ]


def test_a_master_that_stays_away_is_given_up_in_the_end() -> None:
    script = Script(AWAY)
    began = script.follower.now_s()

    with pytest.raises(MasterUnreachable):
        script.follower.job(3, lambda now_s, view: None)

    assert PATIENCE_S < script.follower.now_s() - began < PATIENCE_S + 5


def test_a_refusal_that_will_not_change_ends_the_wait_at_once() -> None:
    script = Script(RequestRefused("not_found", "There is no job 3."))

    with pytest.raises(RequestRefused):
        script.follower.job(3, lambda now_s, view: None)

    assert script.err.getvalue() == ""


def test_a_job_in_which_nothing_moves_says_why_once() -> None:
    pending = job_view(3, pending=1)
    left = 40

    def answer(path: str) -> object:
        nonlocal left
        if path == "/tasks":
            return TaskPage([task_view(7)])
        if path.endswith("explain"):
            return EXPLAIN
        left -= 1
        return pending if left else job_view(3, "finished", completed=1)

    script = Script(answer)

    script.follower.job(3, lambda now_s, view: None)

    assert script.err.getvalue() == "Nothing runs now: No device is online.\n"


# --- progress ------------------------------------------------------------------------------------


def fed(*looks: tuple[float, int]) -> Progress:
    progress = Progress()
    for now_s, completed in looks:
        progress.feed(now_s, job_view(3, pending=5, running=2, completed=completed, failed=1))
    return progress


def test_rate_is_that_of_the_last_seconds() -> None:
    progress = fed((100, 0), (150, 10), (155, 110), (160, 210))

    assert progress.per_second == 20.0
    assert progress.elapsed_s == 60.0
    assert (progress.ended, progress.known) == (211, 218)


def test_no_rate_before_the_second_look() -> None:
    assert fed((1, 50)).per_second == 0.0
    assert Progress().line() == "waiting"


def test_piped_progress_is_a_line_now_and_then_and_a_last_one() -> None:
    stream = io.StringIO()
    display = PlainDisplay(Output(io.StringIO(), stream))
    progress = Progress()

    for step in range(60):
        progress.feed(step / 10, job_view(3, running=1, completed=step))
        display.show(progress)
    display.close()
    display.close()

    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 + int(6 / PLAIN_LINE_EVERY_S)
    assert lines[-1].startswith("59 pages done, 0 pending, 1 running, 0 failed, 10.0 pages/s")


def test_panel_shows_counts_codes_and_current_pages_without_markup() -> None:
    progress = fed((0, 0), (2, 20))
    progress.codes["404"] = 1
    progress.current = ["http://x/[red]\x1b[2J"]
    stream = io.StringIO()

    Console(file=stream, width=100).print(render(progress))

    shown = stream.getvalue()
    assert "20 done" in shown
    assert "10.0 pages/s" in shown
    assert "404 x 1" in shown
    assert "http://x/[red][2J" in shown
    assert "\x1b" not in shown


def test_master_that_refuses_the_closer_look_does_not_end_the_watch(master: FakeRest) -> None:
    crawled(master, [200])
    whole = master.answers["GET /tasks"]
    master.answers["GET /tasks"] = [problem(503, "busy", "Later."), whole]  # type: ignore[list-item]

    assert run("crawl", "--follow", "3", master=master).code == 0


def test_no_seed_comes_without_the_limit_of_its_origin(master: FakeRest) -> None:
    seeds = [f"http://127.0.0.1:{port}/" for port in range(1, 301)]

    run("crawl", *seeds, "--delay", "1", "--detach", master=master)

    bodies = master.bodies("POST /tasks")
    assert [len(body["tasks"]) for body in bodies] == [256, 44]
    assert [len(body["rates"]) for body in bodies] == [256, 44]
    assert bodies[1]["job_id"] == 3
