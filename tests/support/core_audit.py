"""What must be true of a master and its store together, beyond what each can say of itself."""

from __future__ import annotations

from collections import Counter
from random import Random

from tests.support.naive_store import NaiveStore, lane_of
from zmqcluster.core.master import MasterCore, Wants
from zmqcluster.core.rows import TaskRow
from zmqcluster.core.state import MasterState
from zmqcluster.model import NO_JOB, JobState, TaskState

_IN_FLIGHT = (TaskState.ASSIGNED, TaskState.RUNNING)
_COUNTED = {TaskState.ASSIGNED: "running"}


def audit_store(store: NaiveStore) -> None:
    """At any commit boundary: exact counts, one holder a key, a whole history of attempts."""
    _audit_jobs(store)
    _audit_attempts(store)
    keys = [(one.job_id, one.unique_key) for one in store.tasks.values() if one.unique_key]
    assert len(keys) == len(set(keys)), "two tasks have the same unique key"
    assert len(store.unique_keys) == len(keys)
    assert set(store.unique_keys.values()) <= set(store.tasks)


def audit_live(state: MasterState, store: NaiveStore) -> None:
    """Once all is committed: memory is what the store says, and no pending task is out of reach."""
    for task_id, task in state.tasks.items():
        assert store.tasks[task_id] == task, ("memory and store differ", store.tasks[task_id], task)
    held = {one.task_id for one in store.tasks.values() if one.state in _IN_FLIGHT}
    assert held == set(state.flights)
    overdue = [turn for turn, _ in state.departed.values() if turn <= state.committed_turn]
    assert not overdue, "all is on disk, and something is still remembered as if it were not"
    for task in store.tasks.values():
        if task.state is TaskState.PENDING and task.task_id not in state.tasks:
            assert _is_reachable(state, task), ("lost until the next restart", task)
    for job in store.jobs.values():
        is_open = bool(job.pending or job.running)
        if job.job_id != NO_JOB and not state.is_idle_job(job.job_id):
            assert (job.job_id in state.jobs) == is_open, job
        if is_open:
            assert state.jobs[job.job_id] == job


def audit_recovery(core: MasterCore, store: NaiveStore) -> None:
    """Once all is committed: a master started now would know what this one knows, leases aside."""
    live = core.state
    past = store.past()
    store.epoch -= 1
    past.clock_ms = live.now_ms
    fresh = MasterCore(live.settings, past, Random(1)).state
    assert _flights(fresh) == _flights(live)
    assert fresh.next_task_id == live.next_task_id
    assert fresh.next_job_id == live.next_job_id
    assert fresh.keys == live.keys
    assert fresh.tokens == live.tokens
    assert fresh.revoked == live.revoked
    open_jobs = {key for key in live.jobs if key and not live.is_idle_job(key)}
    assert {key for key in fresh.jobs if key} == open_jobs
    drained = {one.device_id for one in live.fleet.devices.values() if one.row.drained}
    assert {one.device_id for one in fresh.fleet.devices.values() if one.row.drained} == drained
    fresh.recall(store.facts(Wants(rates=tuple(live.rates))).rates.values())
    for name, rate in live.rates.items():
        other = fresh.rates[name]
        assert (rate.delay_ms, rate.concurrency) == (other.delay_ms, other.concurrency)
        assert rate.closed_until_ms == other.closed_until_ms
        assert rate.running == other.running
        assert not rate.delay_ms or other.next_at_ms > live.now_ms, "a delayed key starts shut"


def _audit_jobs(store: NaiveStore) -> None:
    counts: Counter[tuple[int, str]] = Counter()
    for task in store.tasks.values():
        counts[task.job_id, _COUNTED.get(task.state, str(task.state))] += 1
    for job in store.jobs.values():
        for name in ("pending", "running", "completed", "failed", "cancelled", "dead"):
            said, found = getattr(job, name), counts[job.job_id, name]
            assert said == found, f"job {job.job_id} says {said} {name}, there are {found}"
        is_open = bool(job.pending or job.running)
        if job.job_id != NO_JOB and is_open:
            assert job.state is not JobState.FINISHED
        elif job.job_id != NO_JOB and (job.completed or job.failed or job.cancelled or job.dead):
            assert job.state is not JobState.ACTIVE, job


def _audit_attempts(store: NaiveStore) -> None:
    """Attempts are numbered from 1 without a gap; only the current one may be open."""
    attempts: Counter[int] = Counter()
    completed: Counter[int] = Counter()
    for (task_id, attempt), row in store.assignments.items():
        task = store.tasks[task_id]
        attempts[task_id] += 1
        assert attempt <= task.attempt
        is_open = attempt == task.attempt and task.state in _IN_FLIGHT
        assert (row.outcome == "") == is_open, (task, row)
        assert not is_open or row.device_id == task.device_id
        completed[task_id] += row.outcome == "completed"
    for task in store.tasks.values():
        assert attempts[task.task_id] == task.attempt, task
        assert completed[task.task_id] <= 1, "two completions were accepted"
        if task.state is TaskState.COMPLETED:
            assert completed[task.task_id] == 1


def _is_reachable(state: MasterState, task: TaskRow) -> bool:
    """Will the master find it in the database by what it remembers?"""
    if state.job(task.job_id).state is JobState.CANCELLED:
        return True
    if task.retry_at_ms or task.not_before_wall:
        # From its horizon on the database is asked, whatever fell due before.
        return max(state.due_ms(task), state.now_ms) >= state.delays.horizon_ms
    lane = state.queue.lanes.get(lane_of(task))
    if lane is None:
        return state.queue.unlisted
    return bool(lane.loading) or (lane.more and lane.cursor < task.task_id)


def _flights(state: MasterState) -> dict[int, tuple[int, str]]:
    return {key: (one.task.attempt, one.device_id) for key, one in state.flights.items()}
