"""What devices say about attempts: begun, ended, given back. Only the holder of the current
attempt is believed; the end of an attempt nobody has superseded is salvaged."""

from __future__ import annotations

from typing import Final

from zmqcluster.core.dispatcher import TaskDispatcher, reopen
from zmqcluster.core.events import Facts
from zmqcluster.core.fleet import Device, Flight
from zmqcluster.core.intake import add_task, apply_rule, find
from zmqcluster.core.lifecycle import TaskCause
from zmqcluster.core.rows import GivenUp, RecordRow, TaskRow
from zmqcluster.core.state import MasterState
from zmqcluster.messages import (
    AttemptRef,
    Progress,
    RateReport,
    RateRule,
    ResultAck,
    Results,
    Returned,
    Started,
    TaskResult,
)
from zmqcluster.model import ERROR_CHARS_MAX, JobState, Outcome, TaskId, TaskState

# Outcomes only the master may decide; a device that sends one is broken.
_MASTERS_OWN: Final = (Outcome.DEVICE_LOST, Outcome.DISPATCH_LOST)


def on_results(
    state: MasterState, dispatcher: TaskDispatcher, device: Device, message: Results, facts: Facts
) -> None:
    """Accept each end that counts, fence the others, and acknowledge all."""
    settled: list[AttemptRef] = []
    for result in message.results:
        flight = flight_of(state, device, result.task_id, result.attempt)
        if flight is None:
            _salvage(state, dispatcher, device, result, facts)
        else:
            _accept(state, dispatcher, device, flight, result, facts)
        for rule in result.rates:
            is_own = flight is not None and flight.task.rate_key == rule.rate_key
            _learn(state, device, rule, is_own=is_own)
        settled.append(AttemptRef(result.task_id, result.attempt))
    state.send(device.peer, ResultAck(tuple(settled)))


def on_started(state: MasterState, device: Device, message: Started) -> None:
    """These attempts run now; a delayed rate key counts from here."""
    for ref in message.refs:
        flight = flight_of(state, device, ref.task_id, ref.attempt)
        if flight is not None:
            begin(state, flight)
        else:
            _was_there(state, state.row_of(TaskId(ref.task_id)))


def begin(state: MasterState, flight: Flight) -> None:
    """The attempt is known to run. Saying it twice changes nothing."""
    if flight.begun:
        return
    flight.begun = True
    task = flight.task
    if task.state is TaskState.ASSIGNED:
        task.started_wall = state.wall_ms
        state.move(task, TaskCause.STARTED)
    rate = state.rates.get(task.rate_key)
    if rate is not None:
        rate.began(state.now_ms, was_starting=flight.is_starting)
        flight.is_starting = False
        reopen(state, rate.name)


def on_returned(
    state: MasterState, dispatcher: TaskDispatcher, device: Device, message: Returned
) -> None:
    """These attempts never began on this device; others may have them."""
    for ref in message.refs:
        flight = flight_of(state, device, ref.task_id, ref.attempt)
        if flight is not None:
            dispatcher.end(flight, Outcome.RETURNED, error=message.reason)


def on_progress(state: MasterState, device: Device, message: Progress) -> None:
    """Keep the newest word of each running task, in memory only."""
    for note in message.notes:
        flight = flight_of(state, device, note.task_id, note.attempt)
        if flight is not None:
            flight.progress, flight.note = note.done, note.note


def on_rate_report(state: MasterState, device: Device, message: RateReport) -> None:
    """Rules learned in mid-task."""
    for rule in message.rates:
        _learn(state, device, rule)


def flight_of(state: MasterState, device: Device, task_id: int, attempt: int) -> Flight | None:
    """The attempt, if it is the current one and this device holds it: the fence."""
    flight = state.flights.get(TaskId(task_id))
    if flight is None or flight.task.attempt != attempt or flight.device_id != device.device_id:
        return None
    return flight


def _learn(state: MasterState, device: Device, rule: RateRule, *, is_own: bool = False) -> None:
    """Take over a rule. One about a key no task in memory depends on is paid for: whoever invents
    keys may not fill the disk. is_own: it is about the task that has just ended."""
    is_needed = is_own or state.needs_rate(state.rates[rule.rate_key])
    if is_needed or device.may_foretell(state.now_ms):
        apply_rule(state, rule, device_id=device.device_id)
    else:
        state.event_of_peer(
            "rate_rule_refused", device_id=device.device_id, detail=f"{rule.rate_key} is not known"
        )


def _accept(
    state: MasterState,
    dispatcher: TaskDispatcher,
    device: Device,
    flight: Flight,
    result: TaskResult,
    facts: Facts,
) -> None:
    outcome, error = _outcome_of(state, flight.task, result)
    _take_over(state, device, flight.task, result, outcome, facts)
    dispatcher.end(
        flight,
        outcome,
        error=error,
        run_us=result.run_us,
        retry_after_ms=result.retry_after_ms,
    )


def _salvage(
    state: MasterState,
    dispatcher: TaskDispatcher,
    device: Device,
    result: TaskResult,
    facts: Facts,
) -> None:
    """A late end: it counts if no newer attempt was handed out, else it is fenced."""
    task = find(state, TaskId(result.task_id), facts)
    if result.outcome is not Outcome.RETURNED:
        _was_there(state, task)
    is_last = (
        task is not None
        and task.state is TaskState.PENDING
        and task.attempt == result.attempt
        and task.device_id == device.device_id
        and task.given_up != GivenUp.NO
    )
    if task is None or not is_last:
        state.event_of_peer(
            "result_fenced",
            device_id=device.device_id,
            task=task,
            detail=f"attempt {result.attempt} of task {result.task_id}: {result.outcome}",
        )
        return
    dispatcher.take_back(task)
    if state.job(task.job_id).state is JobState.CANCELLED:
        # It is about to be swept up, and nothing of a cancelled job is completed.
        task.cancel_requested = True
    outcome, error = _outcome_of(state, task, result)
    state.event("result_salvaged", task=task, detail=str(outcome))
    _take_over(state, device, task, result, outcome, facts)
    state.record_end(task, outcome, result.run_us, error)
    dispatcher.conclude(task, outcome, error=error, retry_after_ms=result.retry_after_ms)


def _was_there(state: MasterState, task: TaskRow | None) -> None:
    """An attempt that we gave up on, whose order was long under way, may be at its origin yet."""
    rate = state.rates.get(task.rate_key) if task is not None else None
    if rate is not None:
        rate.began(state.now_ms, was_starting=False)
        reopen(state, rate.name)
        state.rest(rate.name)


def _outcome_of(state: MasterState, task: TaskRow, result: TaskResult) -> tuple[Outcome, str]:
    """What the end of an attempt counts as, and why."""
    if result.outcome is Outcome.COMPLETED and task.cancel_requested:
        # After an acknowledged cancel a task is never completed, however far it got.
        why = "it was cancelled before it ended"
        state.event("result_discarded", task=task, detail=why)
        return Outcome.CANCELLED, why
    if result.outcome in _MASTERS_OWN:
        return Outcome.FAILED, f"the device reported the outcome {result.outcome!s}"
    return result.outcome, result.error[:ERROR_CHARS_MAX]


def _take_over(
    state: MasterState,
    device: Device,
    task: TaskRow,
    result: TaskResult,
    outcome: Outcome,
    facts: Facts,
) -> None:
    """What an end brings with it: the result, children and records of a completed attempt."""
    if outcome is not Outcome.COMPLETED:
        if outcome not in (Outcome.CANCELLED, Outcome.RETURNED):
            device.row.failed += 1
            state.tally(device)
        return
    device.row.completed += 1
    state.tally(device)
    state.fleet.durations.observe(task.task_type, result.run_us)
    task.result = result.result
    # Before the parent's own end, so that its job is never without an open task in between.
    for spec in result.children:
        if not state.knows_type(spec.task_type):
            state.event_of_peer(
                "child_unroutable",
                device_id=device.device_id,
                task=task,
                detail=f"nobody runs {spec.task_type}",
            )
        _, is_new = add_task(state, spec, task.job_id, task.task_id, facts)
        state.count("children_added" if is_new else "children_known")
    for record in result.records:
        state.changes.records[record.table, record.key] = RecordRow(
            table_name=record.table,
            key=record.key,
            job_id=task.job_id,
            task_id=task.task_id,
            attempt=task.attempt,
            at_wall=state.wall_ms,
            body=record.body,
        )
