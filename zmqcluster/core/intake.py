"""How tasks come into the queue (submissions, children), and how people take them out again."""

from __future__ import annotations

from functools import partial
from hashlib import blake2b
from typing import Final

from zmqcluster.core.dispatcher import reopen
from zmqcluster.core.effects import LoadOpenTasks, Publish
from zmqcluster.core.events import Facts, OpenTasksLoaded, Peer
from zmqcluster.core.fleet import Flight
from zmqcluster.core.lifecycle import TaskCause
from zmqcluster.core.rows import GivenUp, JobRow, SubmissionRow, TaskRow, UniqueKeyRow
from zmqcluster.core.state import MasterState, Watcher
from zmqcluster.core.watching import watch_tasks
from zmqcluster.messages import (
    Abort,
    AttemptRef,
    CancelTasks,
    Changed,
    Hint,
    RateRule,
    Refused,
    RetryTasks,
    Submit,
    Submitted,
    TaskSpec,
    Untouched,
)
from zmqcluster.model import (
    NO_JOB,
    JobId,
    JobState,
    RefusalCode,
    TaskId,
    TaskState,
)

# Pending tasks of a cancelled job are closed this many a turn.
_SWEEP: Final = 1_000
KEY_HASH_BYTES: Final = 16


def unique_hash(unique_key: str) -> bytes:
    """What is stored of a unique key: 16 bytes, so 2**64 keys until two are likely to collide."""
    return blake2b(unique_key.encode(), digest_size=KEY_HASH_BYTES).digest()


def on_submit(state: MasterState, peer: Peer, message: Submit, facts: Facts) -> None:
    """Queue a batch; the same request again gets the same answer and changes nothing."""
    if _is_answered(state, peer, message, facts):
        return
    if not message.tasks:
        _refuse(state, peer, message.request_id, RefusalCode.BAD_REQUEST, "tasks: none given")
        return
    job = _job_for(state, peer, message, facts)
    if job is None:
        return
    for rule in message.rates:
        apply_rule(state, rule, job_id=job.job_id)
    added = [add_task(state, spec, job.job_id, TaskId(0), facts) for spec in message.tasks]
    ids = tuple(task_id for task_id, _ in added)
    existing = tuple(index for index, (_, is_new) in enumerate(added) if not is_new)
    state.count("tasks_submitted", len(ids) - len(existing))
    if message.watch:
        new_ids = [task_id for task_id, is_new in added if is_new]
        watch_tasks(state, Watcher(peer, message.request_id), new_ids)
    _answer(state, peer, Submitted(message.request_id, job.job_id, ids, existing))


def _is_answered(
    state: MasterState, peer: Peer, message: Submit | CancelTasks | RetryTasks, facts: Facts
) -> bool:
    """Was this very request carried out before? Then its answer is said again, and no more.

    A request that was repeated because its answer got lost must not undo what others did since.
    """
    answer = state.submissions.get(message.request_id)
    if answer is None and facts.submitted is not None:
        job_id, task_ids, existing = facts.submitted
        if isinstance(message, Submit):
            answer = Submitted(message.request_id, job_id, task_ids, existing)
        else:
            answer = Changed(message.request_id, task_ids)
    if answer is None:
        return False
    state.send(peer, answer)
    return True


def _answer(state: MasterState, peer: Peer, answer: Submitted | Changed) -> None:
    """Say what came of a request, and remember it for whoever asks again."""
    request_id = answer.request_id
    task_ids = tuple(map(TaskId, answer.task_ids))
    job_id = JobId(answer.job_id) if isinstance(answer, Submitted) else NO_JOB
    existing = answer.existing if isinstance(answer, Submitted) else ()
    state.submissions[request_id] = answer
    state.until_committed(partial(state.submissions.pop, request_id, None))
    state.changes.submissions.append(
        SubmissionRow(request_id, job_id, task_ids, existing, state.wall_ms)
    )
    state.send(peer, answer)


def add_task(
    state: MasterState, spec: TaskSpec, job_id: JobId, parent_id: TaskId, facts: Facts
) -> tuple[TaskId, bool]:
    """One new task, or the one that holds its unique key already. True: it is new."""
    key = None
    if spec.unique_key:
        key = (job_id, unique_hash(spec.unique_key))
        known = state.holder_of(key) or facts.keys.get(key)
        if known is not None:
            return known, False
    task_id = TaskId(state.next_task_id)
    state.next_task_id += 1
    if key is not None:
        state.take_key(key, task_id)
        state.changes.unique_keys.append(UniqueKeyRow(job_id, key[1], task_id))
    settings = state.settings
    task = TaskRow(
        task_id=task_id,
        job_id=job_id,
        parent_id=parent_id,
        task_type=spec.task_type,
        labels=",".join(sorted(set(spec.labels))) if spec.labels else "",
        rate_key=spec.rate_key,
        unique_key=spec.unique_key,
        priority=spec.priority,
        max_retry_count=(
            settings.max_retry_count if spec.max_retry_count is None else spec.max_retry_count
        ),
        timeout_ms=settings.task_timeout_ms if spec.timeout_ms is None else spec.timeout_ms,
        created_wall=state.wall_ms,
        task_data=spec.data,
        # Never the past: the database would keep it among those that wait for a moment.
        not_before_wall=spec.not_before_ms if spec.not_before_ms > state.wall_ms else 0,
    )
    state.add(task)
    if task.not_before_wall:
        state.wait(task)
    elif state.queue.admit(task, state.lane_of(task)):
        state.tasks[task_id] = task
    return task_id, True


def apply_rule(
    state: MasterState, rule: RateRule, *, device_id: str = "", job_id: JobId = NO_JOB
) -> None:
    """Take over what a device, or a client for this job, said about a rate key. A longer closure in
    force wins."""
    rate = state.rates[rule.rate_key]
    former = rate.row()
    rate.job_id = job_id or rate.job_id
    if rule.delay_ms is not None:
        if rule.delay_ms > rate.delay_ms and rate.running:
            # What runs already may be at the origin this very moment.
            rate.next_at_ms = max(rate.next_at_ms, state.now_ms + rule.delay_ms)
        rate.delay_ms = rule.delay_ms
    if rule.concurrency is not None:
        rate.concurrency = rule.concurrency
    if rule.closed_for_ms:
        rate.closed_until_ms = max(rate.closed_until_ms, state.now_ms + rule.closed_for_ms)
        state.event_of_peer(
            "rate_key_closed",
            device_id=device_id,
            detail=f"{rate.name} for {rule.closed_for_ms} ms",
        )
    if rate.row() != former:
        state.save_rate(rate)
    reopen(state, rate.name)


def on_cancel(state: MasterState, peer: Peer, message: CancelTasks, facts: Facts) -> None:
    """Cancel tasks, or a job: what waits is cancelled now, what runs once its process is gone."""
    if _is_answered(state, peer, message, facts):
        return
    if message.job_id:
        _cancel_job(state, peer, message, facts)
        return
    changed, untouched = [], []
    for task_id in map(TaskId, message.task_ids):
        task = find(state, task_id, facts)
        if task is None:
            untouched.append(Untouched(task_id, "there is no such task"))
        elif task.state.is_terminal:
            untouched.append(Untouched(task_id, f"it is {task.state} already"))
        else:
            cancel(state, task)
            changed.append(task_id)
    _answer(state, peer, Changed(message.request_id, tuple(changed), tuple(untouched)))


def cancel(state: MasterState, task: TaskRow) -> None:
    """From now on no attempt of task starts, and it is never completed."""
    if task.state is TaskState.PENDING:
        state.queue.remove(task)
        state.delays.remove(task.task_id)
        state.event("task_cancelled", task=task, detail="before it began")
        state.move(task, TaskCause.CANCELLED)
        return
    if task.cancel_requested:
        return
    task.cancel_requested = True
    state.save(task)
    state.event("cancel_requested", task=task)
    flight = state.flights.get(task.task_id)
    if flight is not None:
        abort(state, flight)


def abort(state: MasterState, flight: Flight) -> None:
    """Tell the holder to stop; repeated with each heartbeat reply until it has."""
    device = state.fleet.devices.get(flight.device_id)
    if device is not None and device.is_online:
        ref = AttemptRef(flight.task.task_id, flight.task.attempt)
        state.send(device.peer, Abort((ref,)))
        state.act(Publish(Hint(state.epoch, device.control_version, (ref,))))


def on_open_tasks(state: MasterState, event: OpenTasksLoaded) -> None:
    """A page of what a cancelled job still had in the database."""
    job = state.jobs.get(event.job_id)
    if job is None or job.state is not JobState.CANCELLED:
        return
    for row in event.rows:
        task = state.row_of(row.task_id) or row
        if task is not None and task.state is TaskState.PENDING:
            state.queue.remove(task)
            state.delays.remove(task.task_id)
            state.move(task, TaskCause.CANCELLED)
    if event.next_id:
        state.act(LoadOpenTasks(event.job_id, event.next_id, _SWEEP))


def on_retry(state: MasterState, peer: Peer, message: RetryTasks, facts: Facts) -> None:
    """Give ended tasks another life, with their counts at zero; attempts go on counting."""
    if _is_answered(state, peer, message, facts):
        return
    changed, untouched = [], []
    for task_id in map(TaskId, message.task_ids):
        task = find(state, task_id, facts)
        why = _why_not_revived(state, task, facts)
        if task is None or why:
            untouched.append(Untouched(task_id, why))
            continue
        _revive(state, task)
        changed.append(task_id)
    _answer(state, peer, Changed(message.request_id, tuple(changed), tuple(untouched)))


def find(state: MasterState, task_id: TaskId, facts: Facts) -> TaskRow | None:
    """The task as it is now: in memory, just ended, or as the database had it."""
    return state.row_of(task_id) or facts.tasks.get(task_id)


def sweep_job(state: MasterState, job_id: JobId) -> None:
    """Close what a cancelled job has in the database, page by page."""
    state.act(LoadOpenTasks(job_id, 0, _SWEEP))


def _why_not_revived(state: MasterState, task: TaskRow | None, facts: Facts) -> str:
    if task is None:
        return "there is no such task"
    if not task.state.is_terminal:
        return f"it is {task.state}, not ended"
    if task.state is TaskState.COMPLETED:
        return "it is completed"
    if state.known_job(task.job_id, facts) is None:
        return "its job is gone"
    job = state.job(task.job_id)
    if job.state is JobState.CANCELLED and (job.pending or job.running):
        return "its job is still being cancelled: try again in a moment"
    return ""


def _revive(state: MasterState, task: TaskRow) -> None:
    job = state.job(task.job_id)
    if job.job_id != NO_JOB:
        job.state, job.finished_wall = JobState.ACTIVE, 0
    task.failures = task.deaths = 0
    task.cancel_requested = False
    task.given_up = GivenUp.NO
    task.finished_wall = task.retry_at_ms = task.not_before_wall = 0
    task.error = ""
    state.event("task_revived", task=task, detail=f"was {task.state}")
    state.move(task, TaskCause.REVIVED)
    state.wait(task)


def _cancel_job(state: MasterState, peer: Peer, message: CancelTasks, facts: Facts) -> None:
    job = state.known_job(JobId(message.job_id), facts)
    if job is None:
        problem = f"there is no job {message.job_id}"
        _refuse(state, peer, message.request_id, RefusalCode.NOT_FOUND, problem)
        return
    if job.pending or job.running:
        job.state = JobState.CANCELLED
        state.save_job(job)
        state.event("job_cancelled", job_id=job.job_id)
        for flight in [one for one in state.flights.values() if one.task.job_id == job.job_id]:
            cancel(state, flight.task)
        sweep_job(state, job.job_id)
    _answer(state, peer, Changed(message.request_id))


def _job_for(state: MasterState, peer: Peer, message: Submit, facts: Facts) -> JobRow | None:
    if message.job_name:
        job_id = JobId(state.next_job_id)
        state.next_job_id += 1
        job = JobRow(job_id, message.job_name, JobState.ACTIVE, state.wall_ms)
        state.jobs[job_id] = job
        state.save_job(job)
        return job
    known = state.known_job(JobId(message.job_id), facts)
    if known is None:
        problem = f"there is no job {message.job_id}"
        _refuse(state, peer, message.request_id, RefusalCode.NOT_FOUND, problem)
        return None
    if known.state is JobState.CANCELLED:
        problem = f"job {message.job_id} is cancelled: it takes no more tasks"
        _refuse(state, peer, message.request_id, RefusalCode.CONFLICT, problem)
        return None
    return known


def _refuse(
    state: MasterState, peer: Peer, request_id: bytes, code: RefusalCode, problem: str
) -> None:
    state.event_of_peer("request_refused", device_id="", detail=f"{code}: {problem}")
    state.send(peer, Refused(request_id, code, problem))
