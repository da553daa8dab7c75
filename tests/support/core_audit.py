"""What must be true of a master and its store together, beyond what each can say of itself."""

from __future__ import annotations

from random import Random

from tests.support.history import Final, FinalAttempt, FinalJob, FinalTask, kept_problems
from tests.support.naive_store import NaiveStore, lane_of
from zmqcluster.core.master import MasterCore
from zmqcluster.core.rows import TaskRow
from zmqcluster.core.state import MasterState
from zmqcluster.model import NO_JOB, JobState, TaskState

_IN_FLIGHT = (TaskState.ASSIGNED, TaskState.RUNNING)


def final_of(store: NaiveStore) -> Final:
    """What a checker of histories wants to know of it."""
    return Final(
        tasks={
            task_id: FinalTask(
                one.state, one.attempt, one.job_id, one.parent_id, one.unique_key, one.device_id,
                one.task_data, one.result, one.max_retry_count,
            )
            for task_id, one in store.tasks.items()
        },
        attempts={
            key: FinalAttempt(one.outcome, one.device_id, one.started_wall > 0)
            for key, one in store.assignments.items()
        },
        jobs={
            job_id: FinalJob(
                one.state, one.pending, one.running,
                one.completed, one.failed, one.cancelled, one.dead,
            )
            for job_id, one in store.jobs.items()
        },
        keys={key: task_id for key, task_id in store.unique_keys.items()},
        events={(one.kind, one.task_id, one.attempt) for one in store.events if one.task_id},
        job_events={(one.kind, one.job_id) for one in store.events if not one.task_id},
    )  # fmt: skip


def audit_store(store: NaiveStore) -> None:
    """At any commit boundary: exact counts, one holder a key, a whole history of attempts."""
    found = kept_problems(final_of(store))
    assert not found, str(found[0])


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
    fresh.recall(store.rates_named(live.rates).values())
    for name, rate in live.rates.items():
        other = fresh.rates[name]
        assert (rate.delay_ms, rate.concurrency) == (other.delay_ms, other.concurrency)
        assert rate.closed_until_ms == other.closed_until_ms
        assert rate.running == other.running
        assert not rate.delay_ms or other.next_at_ms > live.now_ms, "a delayed key starts shut"


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
