"""Whatever clients ask and devices do, in any order: REST says what a few dicts would say."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlencode

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec import Struct, field

from tests.support.model_worker import ModelWorker
from tests.support.rest_bench import TOKEN, Reply, rest_bench
from tests.support.tiers import stateful
from zmqcluster.core.settings import Settings
from zmqcluster.model import Outcome, Strategy

# Memory is much smaller than the backlog, so that REST reads what only the database knows.
SETTINGS = Settings(window_tasks=6, lane_tasks=3, lanes=3, delayed_tasks=3, retention_ms=10**12)
ENDED = ("completed", "failed", "cancelled", "dead")
COUNTED = {"assigned": "running"}

TASKS = st.fixed_dictionaries(
    {"task_type": st.sampled_from(["noop", "noop", "echo"])},
    optional={
        "task_data": st.dictionaries(
            st.sampled_from(["a", "é"]),
            st.none() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=3) | st.just([{}, []]),
            max_size=2,
        ),
        "priority": st.integers(0, 9),
        "max_retry_count": st.sampled_from([0, 1]),
        "timeout_s": st.sampled_from([1, 2.5]),
        "unique_key": st.sampled_from(["", "u1", "u2"]),
        "rate_key": st.sampled_from(["", "k1", "one"]),
        "labels": st.sampled_from([[], ["nobody", "has"]]),
    },
)
KEYS = st.sampled_from([None, None, "key 1", "key 2"])
FILTERS = st.fixed_dictionaries(
    {"limit": st.integers(1, 4), "order": st.sampled_from(["newest", "oldest"])},
    optional={
        "state": st.sampled_from(["pending", "assigned", "running", *ENDED]),
        "task_type": st.sampled_from(["noop", "echo"]),
        "job_id": st.integers(0, 3),
        "rate_key": st.sampled_from(["", "k1"]),
        "device_id": st.just("d1"),
    },
)
TASK_IDS = st.integers(1, 6) | st.integers(0, 16)
JOB_IDS = st.sampled_from([1, 2, 3, 0])
WRONG_FIELDS = st.sampled_from(
    [
        {"task_type": "Noop"},
        {"task_type": "mystery"},
        {"task_type": None},
        {"task_data": []},
        {"task_data": {"n": 2**64}},
        {"task_data": {"t": "refuse me"}},
        {"priority": 10},
        {"priority": 1.5},
        {"max_retry_count": -1},
        {"timeout_s": 0},
        {"not_before": "2023-11-15T00:13:20"},
        {"unique_key": "u" * 2049},
        {"labels": ["a,b"]},
        {"job_id": -1},
        {"job_id": 99},
        {"task_tpye": "noop"},
    ]
)
WRONG_REQUESTS = st.sampled_from(
    [
        ("POST", "/tasks", b""),
        ("POST", "/tasks", b"[]"),
        ("POST", "/tasks", b"{]"),
        ("POST", "/tasks", b"\xff"),
        ("POST", "/tasks", b"[" * 9_999),
        ("POST", "/tasks", b'{"tasks": []}'),
        ("GET", "/tasks?limit=0", None),
        ("GET", "/tasks?limit=1001", None),
        ("GET", "/tasks?cursor=x", None),
        ("GET", "/tasks?state=lost", None),
        ("GET", "/tasks?order=newest&order=newest", None),
        ("GET", "/tasks?nonsense=1", None),
        ("GET", "/tasks/0", None),
        ("GET", "/tasks/x", None),
        ("GET", f"/tasks/{2**63}", None),
        ("POST", "/tasks/1/cancel", b"{1}"),
        ("PUT", "/tasks/1", None),
        ("GET", "/jobs/0", None),
        ("GET", "/jobs?cursor=-1", None),
        ("PUT", "/strategy", {"strategy": "best"}),
        ("PUT", "/strategy", b""),
        ("POST", "/devices/nobody/drain", None),
        ("POST", "/devices/-/drain", None),
        ("DELETE", "/devices/d1", None),
        ("DELETE", "/tokens/none", None),
        ("POST", "/tokens", {"uses": 0}),
        ("GET", "/nowhere", None),
    ]
)


class Task(Struct):
    """What REST must say of a task. fields: as submitted, with the defaults."""

    fields: dict[str, Any]
    job_id: int
    end: str = ""
    is_cancelling: bool = False
    failures: int = 0


class Walk(Struct):
    """A list being read page by page. stable: what fits its filter since it began."""

    query: dict[str, Any]
    stable: set[int]
    seen: list[int] = field(default_factory=list)
    cursor: int | None = None


class RestMachine(RuleBasedStateMachine):
    """One device, d1, runs no-ops; nobody runs echo, and nobody has labels."""

    @initialize()
    def start(self) -> None:
        self.stack = ExitStack()
        folder = Path(self.stack.enter_context(TemporaryDirectory()))
        self.rest = self.stack.enter_context(rest_bench(folder, SETTINGS))
        self.worker = ModelWorker(self.rest.master, "d1")
        self.worker.connect()
        self.tasks: dict[int, Task] = {}
        # Names of the jobs by id, and those that were cancelled and not begun again.
        self.jobs: dict[int, str] = {}
        self.cancelled_jobs: set[int] = set()
        self.unique: dict[tuple[int, str], int] = {}
        self.answers: dict[str, Any] = {}
        self.walks: list[Walk] = []
        # What the device was told to stop and has not reported, by the state it was in.
        self.stopping: dict[int, str] = {}
        self.is_drained = False
        self.strategy = "least_tasks"
        for name in ("first", "second", ""):
            self.submit_many([{"task_type": "noop"}] * 3, name, None)

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.stack.close()

    # --- submitting -----------------------------------------------------------------------------

    @rule(task=TASKS, job_id=JOB_IDS, key=KEYS)
    def submit_one(self, task: dict[str, Any], job_id: int, key: str | None) -> None:
        self._submit({**task, "job_id": job_id}, [task], job_id, "", key)

    @rule(
        tasks=st.lists(TASKS, min_size=1, max_size=6),
        name=st.sampled_from(["", "a job"]),
        key=KEYS,
    )
    def submit_many(self, tasks: list[dict[str, Any]], name: str, key: str | None) -> None:
        rates = [{"rate_key": "one", "concurrency": 1}]
        batch = {"tasks": tasks, "job_name": name, "rates": rates}
        self._submit(batch if name else tasks, tasks, 0, name, key)

    def _submit(
        self, body: Any, tasks: list[dict[str, Any]], job_id: int, name: str, key: str | None
    ) -> None:
        headers = {} if key is None else {"idempotency-key": key}
        reply = self.rest.post("/tasks", body, headers=headers)
        if key in self.answers:
            assert (reply.status, reply.json()) == (201, self.answers[key])
        elif job_id and job_id not in self.jobs:
            self._is_refused(reply, 404)
        elif job_id in self.cancelled_jobs:
            self._is_refused(reply, 409)
        else:
            if name:
                job_id = max(self.jobs, default=0) + 1
                self.jobs[job_id] = name
            assert (reply.status, reply.json()) == (201, self._added(tasks, job_id))
            if key is not None:
                self.answers[key] = reply.json()
        self._hear()

    def _added(self, tasks: list[dict[str, Any]], job_id: int) -> dict[str, Any]:
        """The answer to a submission, and the model after it."""
        task_ids, existing = [], []
        for position, fields in enumerate(tasks):
            key = (job_id, fields.get("unique_key", ""))
            if key in self.unique:
                existing.append(position)
                task_ids.append(self.unique[key])
                continue
            task_id = max(self.tasks, default=0) + 1
            self.tasks[task_id] = Task(fields, job_id)
            task_ids.append(task_id)
            if key[1]:
                self.unique[key] = task_id
        return {"job_id": job_id, "task_ids": task_ids, "existing": existing}

    # --- tasks, jobs, devices -------------------------------------------------------------------

    @rule(task_id=TASK_IDS)
    def cancel(self, task_id: int) -> None:
        reply = self.rest.post(f"/tasks/{task_id}/cancel")
        task = self.tasks.get(task_id)
        if task is None:
            self._is_refused(reply, 404)
        elif task.end:
            self._is_refused(reply, 409)
        else:
            assert reply.json() == {"task_ids": [task_id], "untouched": []}
            self._cancelled(task_id)
        self._hear()

    @rule(task_id=TASK_IDS)
    def retry(self, task_id: int) -> None:
        reply = self.rest.post(f"/tasks/{task_id}/retry")
        task = self.tasks.get(task_id)
        if task is None:
            self._is_refused(reply, 404)
        elif task.end in ("", "completed") or self._is_job_closing(task.job_id):
            self._is_refused(reply, 409)
        else:
            assert reply.json() == {"task_ids": [task_id], "untouched": []}
            task.end, task.is_cancelling, task.failures = "", False, 0
            self.cancelled_jobs.discard(task.job_id)
        self._hear()

    @rule(job_id=JOB_IDS)
    def cancel_job(self, job_id: int) -> None:
        reply = self.rest.post(f"/jobs/{job_id}/cancel")
        if job_id not in self.jobs:
            self._is_refused(reply, 404)
        else:
            assert (reply.status, reply.json()) == (200, {"task_ids": [], "untouched": []})
            for task_id in self._open_of(job_id):
                self.cancelled_jobs.add(job_id)
                self._cancelled(task_id)
        self._hear()

    @rule(on=st.booleans(), strategy=st.sampled_from(Strategy))
    def operate(self, on: bool, strategy: Strategy) -> None:
        reply = self.rest.post("/devices/d1/" + ("drain" if on else "resume"))
        assert (reply.status, reply.json()) == (200, {"done": True})
        self.is_drained = on
        self._hear()
        reply = self.rest.call("PUT", "/strategy", {"strategy": strategy}, token=TOKEN)
        assert (reply.status, reply.json()) == (200, {"strategy": strategy})
        self.strategy = strategy

    @rule(fields=WRONG_FIELDS, good=st.integers(0, 2), single=st.booleans(), request=WRONG_REQUESTS)
    def ask_wrongly(
        self, fields: dict[str, Any], good: int, single: bool, request: tuple[str, str, Any]
    ) -> None:
        """One task that does not fit: none is queued, and the answer names its position."""
        wrong = {"task_type": "noop", **fields}
        body = wrong if single else [*[{"task_type": "noop"}] * good, wrong]

        problem = self._is_refused(self.rest.post("/tasks", body))

        assert single or "job_id" in fields or f"tasks[{good}]" in problem, problem
        method, path, given = request
        self._is_refused(self.rest.call(method, path, given, token=TOKEN))
        self._is_refused(self.rest.call("POST", "/tasks", {"task_type": "noop"}), 401)

    # --- the device, time, death ----------------------------------------------------------------

    @rule()
    def begin(self) -> None:
        self.worker.start_one()
        self._hear()

    @rule()
    def report(self) -> None:
        """What the device was told to stop has stopped."""
        for task_id in self.stopping:
            self._ended(self.tasks[task_id], Outcome.CANCELLED)
        self.stopping.clear()
        self.worker.resend()
        self._hear()

    @rule(outcome=st.sampled_from([Outcome.COMPLETED, Outcome.FAILED, Outcome.REJECTED]))
    def finish(self, outcome: Outcome) -> None:
        self.report()
        running = [key for key, one in self.worker.held.items() if one.is_running]
        self.worker.finish_one(outcome)
        if running:
            self._ended(self.tasks[running[0][0]], outcome)
        self._hear()

    @rule(ms=st.sampled_from([10, 1_500]))
    def pass_time(self, ms: int) -> None:
        for _ in range(0, ms, 500):
            self.rest.master.advance(min(ms, 500))
            self.worker.beat()
            self._hear()

    @rule()
    def kill_master(self) -> None:
        self.worker.hang_up(is_noticed=False)
        self.rest.master.restart()
        self.strategy = "least_tasks"
        self.worker.connect()

    # --- reading --------------------------------------------------------------------------------

    @rule(query=FILTERS)
    def begin_walk(self, query: dict[str, Any]) -> None:
        self.walks.append(Walk(query, {key for key in self.tasks if self._fits(key, query)}))

    @precondition(lambda self: self.walks)
    @rule(data=st.data(), pages=st.integers(1, 9))
    def read_on(self, data: st.DataObject, pages: int) -> None:
        walk = data.draw(st.sampled_from(self.walks))
        while pages and walk in self.walks:
            self._read_a_page(walk)
            pages -= 1

    def _read_a_page(self, walk: Walk) -> None:
        query = walk.query if walk.cursor is None else {**walk.query, "cursor": walk.cursor}
        page = self.rest.get("/tasks?" + urlencode(query)).json()
        for row in page["tasks"]:
            assert self._fits(row["task_id"], walk.query), row
            assert row.items() >= self._shown(row["task_id"]).items()
            walk.seen.append(row["task_id"])
        walk.cursor = page["next_cursor"]
        assert len(page["tasks"]) <= walk.query["limit"]
        assert walk.seen == sorted(set(walk.seen), reverse=walk.query["order"] == "newest")
        if walk.cursor is None:
            assert walk.stable <= set(walk.seen), "a task was on no page"
            self.walks.remove(walk)

    @rule(task_id=TASK_IDS, limit=st.integers(1, 3))
    def read(self, task_id: int, limit: int) -> None:
        self._read_a_task(task_id)
        self._read_the_jobs(limit)
        self._read_the_devices()

    def _read_a_task(self, task_id: int) -> None:
        reply = self.rest.get(f"/tasks/{task_id}")
        events = self.rest.get(f"/tasks/{task_id}/events")
        explained = self.rest.get(f"/tasks/{task_id}/explain")
        if task_id not in self.tasks:
            for each in (reply, events, explained):
                self._is_refused(each, 404)
            return
        shown, found = self._shown(task_id), reply.json()
        assert found.items() >= shown.items()
        assert found["task_data"] == self.tasks[task_id].fields.get("task_data", {})
        assert [one["attempt"] for one in found["attempts"]] == list(range(shown["attempt"], 0, -1))
        assert explained.json()["state"] == shown["state"]
        assert bool(explained.json()["reasons"])
        ids = [one["event_id"] for one in events.json()["events"]]
        assert ids == sorted(set(ids))

    def _read_the_jobs(self, limit: int) -> None:
        cursor, found = "", list[Any]()
        while True:
            page = self.rest.get(f"/jobs?limit={limit}{cursor}").json()
            found += page["jobs"]
            assert len(page["jobs"]) <= limit
            if page["next_cursor"] is None:
                break
            cursor = f"&cursor={page['next_cursor']}"
        assert [one["job_id"] for one in found] == sorted(self.jobs, reverse=True)
        for one in found:
            job_id = one["job_id"]
            assert (one["name"], one["state"]) == (self.jobs[job_id], self._job_state(job_id))
            assert one["tasks"] == self._counts(job_id)
            assert self.rest.get(f"/jobs/{job_id}").json() == one

    def _read_the_devices(self) -> None:
        [device] = self.rest.get("/devices").json()["devices"]
        assert device == self.rest.get("/devices/d1").json()
        assert device["state"] == ("draining" if self.is_drained else "online")
        assert device["assigned"] == len(self.worker.held) + len(self.stopping)
        for end in ("completed", "failed"):
            assert device[end] == self.rest.get("/devices/d1/stats").json()[end]

    # --- what must hold -------------------------------------------------------------------------

    @invariant()
    def figures_agree(self) -> None:
        overview = self.rest.get("/system/overview").json()
        counts = self._counts()
        assert overview["tasks"] == counts
        assert self.rest.get("/tasks/stats").json() == counts
        assert (overview["devices_online"], overview["strategy"]) == (1, self.strategy)
        for walk in self.walks:
            walk.stable = {key for key in walk.stable if self._fits(key, walk.query)}

    # --- the model ------------------------------------------------------------------------------

    def _hear(self) -> None:
        """The device is told what the master has for it."""
        former = {task_id: self._state(task_id) for task_id, _ in self.worker.held}
        self.worker.listen()
        for task_id, _ in self.worker.kept:
            self.stopping.setdefault(task_id, former.get(task_id, "assigned"))

    def _shown(self, task_id: int) -> dict[str, Any]:
        task = self.tasks[task_id]
        defaults = {"priority": 5, "max_retry_count": 3, "timeout_s": 900.0}
        texts: dict[str, Any] = {"unique_key": "", "rate_key": "", "labels": []}
        given = {**defaults, **texts, **task.fields}
        given["labels"] = sorted(given["labels"])
        given.pop("task_data", None)
        attempts = [attempt for one, attempt in self.worker.seen if one == task_id]
        return {
            **given,
            "task_id": task_id,
            "job_id": task.job_id,
            "state": self._state(task_id),
            "attempt": max(attempts, default=0),
            "failures": task.failures,
        }

    def _state(self, task_id: int) -> str:
        for (held_id, _), one in self.worker.held.items():
            if held_id == task_id:
                return "running" if one.is_running else "assigned"
        return self.stopping.get(task_id) or self.tasks[task_id].end or "pending"

    def _fits(self, task_id: int, query: dict[str, Any]) -> bool:
        task = self.tasks[task_id]
        has_run = any(one == task_id for one, _ in self.worker.seen)
        said = {
            "state": self._state(task_id),
            "task_type": task.fields["task_type"],
            "job_id": task.job_id,
            "rate_key": task.fields.get("rate_key", ""),
            "device_id": "d1" if has_run else "",
        }
        return all(said[name] == value for name, value in query.items() if name in said)

    def _counts(self, job_id: int | None = None) -> dict[str, int]:
        counts = dict.fromkeys(("pending", "running", *ENDED), 0)
        for task_id, task in self.tasks.items():
            if job_id is None or task.job_id == job_id:
                state = self._state(task_id)
                counts[COUNTED.get(state, state)] += 1
        return counts

    def _open_of(self, job_id: int) -> list[int]:
        return [key for key, one in self.tasks.items() if one.job_id == job_id and not one.end]

    def _is_job_closing(self, job_id: int) -> bool:
        return job_id in self.cancelled_jobs and bool(self._open_of(job_id))

    def _job_state(self, job_id: int) -> str:
        if job_id in self.cancelled_jobs:
            return "cancelled"
        return "active" if self._open_of(job_id) else "finished"

    def _cancelled(self, task_id: int) -> None:
        """What waits has ended; what is in hands ends once the device says so."""
        task = self.tasks[task_id]
        if self._state(task_id) == "pending":
            task.end = "cancelled"
        task.is_cancelling = True

    def _ended(self, task: Task, outcome: Outcome) -> None:
        if task.is_cancelling:
            task.end = "cancelled"
        elif outcome is Outcome.COMPLETED:
            task.end = "completed"
        else:
            task.failures += 1
            retries = task.fields.get("max_retry_count", 3)
            if outcome is Outcome.REJECTED or task.failures > retries:
                task.end = "failed"

    def _is_refused(self, reply: Reply, status: int = 0) -> str:
        problem = reply.problem()
        assert 400 <= reply.status < 500, reply
        assert status in (0, reply.status), reply
        return problem


TestRestMachine = RestMachine.TestCase
TestRestMachine.settings = stateful(examples=20, steps=40)
