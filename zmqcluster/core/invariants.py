"""What must hold between any two turns, whatever happened. Checked in tests and simulation."""

from __future__ import annotations

from zmqcluster.core.rows import TaskRow
from zmqcluster.core.state import MasterState
from zmqcluster.errors import InvariantError
from zmqcluster.model import NO_JOB, TaskState

_IN_FLIGHT = (TaskState.ASSIGNED, TaskState.RUNNING)


def check(state: MasterState) -> None:
    """Raise InvariantError naming the first thing that does not fit. O(everything in memory)."""
    for task in state.tasks.values():
        _check_task(state, task)
    for task_id, flight in state.flights.items():
        if state.tasks.get(task_id) is not flight.task:
            _fail(flight.task, "is in flight and not in memory")
        device = state.fleet.devices.get(flight.device_id)
        if device is None or device.flights.get(task_id) is not flight:
            _fail(flight.task, f"is in flight, and not among what {flight.device_id} holds")
    _check_devices(state)
    _check_shapes(state)
    _check_rates(state)
    _check_bounds(state)
    for job in state.jobs.values():
        counts = (job.pending, job.running, job.completed, job.failed, job.cancelled, job.dead)
        if min(counts) < 0:
            raise InvariantError(f"job {job.job_id} counts below zero: {counts}")


def _check_task(state: MasterState, task: TaskRow) -> None:
    places = (
        task.task_id in state.flights,
        task.task_id in state.queue,
        task.task_id in state.delays,
    )
    if sum(places) != 1:
        _fail(task, f"is in flight, queued, delayed: {places}; exactly one must hold")
    if places[1] and (task.retry_at_ms or task.not_before_wall):
        _fail(task, "is queued as ready, and the database has it among those that wait")
    if places[0] != (task.state in _IN_FLIGHT):
        _fail(task, "and its place disagree about being in flight")
    if places[0] and state.flights[task.task_id].device_id != task.device_id:
        _fail(task, f"is held by {state.flights[task.task_id].device_id}")
    if task.job_id != NO_JOB and task.job_id not in state.jobs:
        _fail(task, f"is open, and its job {task.job_id} is not in memory")


def _check_devices(state: MasterState) -> None:
    for device in state.fleet.devices.values():
        for pool, load in device.pools.items():
            in_hand = sum(one.pool is pool for one in device.flights.values())
            if load.in_hand != in_hand:
                raise InvariantError(
                    f"device {device.device_id} counts {load.in_hand} {pool} tasks, has {in_hand}"
                )
        if device.is_online != (state.fleet.by_peer.get(device.peer) is device):
            raise InvariantError(f"device {device.device_id} and its session disagree")
        for task_id, flight in device.flights.items():
            if state.flights.get(task_id) is not flight:
                _fail(flight.task, f"is with {device.device_id}, and not in flight")


def _check_shapes(state: MasterState) -> None:
    for shape in state.queue.shapes.values():
        for device in state.fleet.online() if shape.is_asleep else ():
            pool = device.types.get(shape.task_type)
            if (
                pool is not None
                and set(shape.labels) <= set(device.labels)
                and device.can_take_more
                and not device.is_capped
                and device.has_free_slot(pool)
            ):
                raise InvariantError(f"{shape.key} sleeps, and {device.device_id} has a free slot")


def _check_rates(state: MasterState) -> None:
    running: dict[str, int] = {}
    starting: dict[str, int] = {}
    for flight in state.flights.values():
        key = flight.task.rate_key
        running[key] = running.get(key, 0) + 1
        starting[key] = starting.get(key, 0) + flight.is_starting
        if flight.is_starting and flight.begun:
            _fail(flight.task, "has begun, and its rate key waits for that")
    for task in state.tasks.values():
        if task.rate_key and task.rate_key not in state.rates:
            _fail(task, f"is in memory, and its rate key {task.rate_key} is not")
    starving = sum(lane.is_starving for lane in state.queue.lanes.values())
    if state.queue.starving != starving:
        raise InvariantError(f"{starving} lanes starve, {state.queue.starving} are in line")
    for lane in state.queue.lanes.values():
        if lane.more and not (lane.count or lane.loading or lane.is_starving):
            raise InvariantError(f"{lane.key} is on disk only, and is not in line to be read")
        if lane.count and not lane.rotated and lane.rate is None:
            raise InvariantError(f"{lane.key} has tasks and no turn, and no key that is closed")
        if lane.rate is not state.rate(lane.key.rate_key):
            raise InvariantError(f"{lane.key} does not hang on its rate key")
    for rate in state.rates.values():
        if not (state.needs_rate(rate) or rate.saving_turn):
            raise InvariantError(f"rate key {rate.name} is in memory, and nothing depends on it")
        if rate.running != running.get(rate.name, 0):
            raise InvariantError(
                f"rate key {rate.name} counts {rate.running} running, "
                f"has {running.get(rate.name, 0)}"
            )
        if rate.starting != starting.get(rate.name, 0):
            raise InvariantError(
                f"rate key {rate.name} counts {rate.starting} starting, "
                f"has {starting.get(rate.name, 0)}"
            )


def _check_bounds(state: MasterState) -> None:
    """Not of the window: what was given out comes back to it however full it is."""
    settings = state.settings
    for what, count, most in (
        ("lanes", len(state.queue.lanes), settings.lanes),
        ("delayed tasks", len(state.delays), settings.delayed_tasks),
    ):
        if count > most:
            raise InvariantError(f"{count} {what} are in memory, of at most {most}")


def _fail(task: TaskRow, problem: str) -> None:
    raise InvariantError(
        f"task {task.task_id} ({task.state}, attempt {task.attempt}, "
        f"last held by {task.device_id!r}) {problem}"
    )
