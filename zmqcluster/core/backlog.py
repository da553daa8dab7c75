"""Between the window in memory and the backlog in the database: start, refills, due moments."""

from __future__ import annotations

from typing import Final

from zmqcluster.core.dispatcher import reopen
from zmqcluster.core.effects import ListLanes, LoadBacklog, LoadDelayed
from zmqcluster.core.events import BacklogLoaded, DelayedLoaded, LanesListed
from zmqcluster.core.fleet import Device
from zmqcluster.core.intake import sweep_job
from zmqcluster.core.lifecycle import BACKOFF_MAX_MS
from zmqcluster.core.rates import RateKey
from zmqcluster.core.rows import RateKeyRow, TaskRow
from zmqcluster.core.sessions import recover_flight
from zmqcluster.core.state import MasterState, Past
from zmqcluster.model import DELAY_MS_MAX, JobState, TaskState

_LANES_LISTED: Final = 1_000
# Refills of one turn together stay small enough not to hold up the loop for long.
_REFILLS_PER_TURN: Final = 8


def recover(state: MasterState, past: Past) -> None:
    """Rebuild memory from rows. Leases start at full length; delayed keys start closed.

    Whose keys pass is rebuilt by whoever opens the door: it must know before the first knock.
    """
    for job in past.jobs:
        state.jobs[job.job_id] = job
        if job.state is JobState.CANCELLED:
            sweep_job(state, job.job_id)
    for row in past.devices:
        state.fleet.devices[row.device_id] = Device(row)
    for limits in past.rate_keys:
        _recover_rate(state, limits)
    for task in past.in_flight:
        recover_flight(state, task)
    for key in past.keys:
        state.keys[key.public_key] = key
    for token in past.tokens:
        state.tokens[token.token_id] = token
    state.queue.unlisted = True
    state.delays.loaded(state.now_ms)


def on_loaded(state: MasterState, event: BacklogLoaded) -> None:
    """Tasks of one lane arrived from the database."""
    lane = state.queue.lanes.get(event.lane)
    if lane is None:
        return
    last_id = event.rows[-1].task_id if event.rows else lane.cursor
    for row in event.rows:
        if _is_news(state, row):
            state.tasks[row.task_id] = row
            state.queue.push(row, lane)
    state.queue.loaded(lane, last_id, more=event.more)


def on_lanes(state: MasterState, event: LanesListed) -> None:
    """Lanes were found in the database; those without room are found again another time."""
    listing = state.listing
    listing.is_asked = False
    has_room = True
    for key in event.lanes:
        has_room = state.queue.listed(key, state.rate(key.rate_key))
        if not has_room:
            break
        listing.after = key
    if has_room and not event.more:
        listing.after = None
        state.queue.unlisted = listing.has_skipped
        listing.has_skipped = False
    else:
        state.queue.unlisted = True
        listing.has_skipped = listing.has_skipped or not has_room


def on_delayed(state: MasterState, event: DelayedLoaded) -> None:
    """The tasks due soonest arrived from the database."""
    delays = state.delays
    delays.loaded(None)
    latest_ms = state.now_ms
    for row in event.rows:
        if row.retry_at_ms and row.failures + row.deaths:
            # A clock that was set back while we were down must not make a retry wait for ever.
            row.retry_at_ms = min(row.retry_at_ms, state.now_ms + max(BACKOFF_MAX_MS, DELAY_MS_MAX))
        due_ms = state.due_ms(row)
        latest_ms = max(latest_ms, due_ms)
        if _is_news(state, row):
            state.tasks[row.task_id] = row
            delays.add(row.task_id, due_ms)
    for evicted in delays.take_evicted():
        state.tasks.pop(evicted, None)
    if event.more:
        delays.loaded(min(latest_ms, delays.horizon_ms))


def release_due(state: MasterState) -> None:
    """Delayed tasks whose moment has come go to their lanes, while there is room."""
    while state.queue.has_room:
        task_id = state.delays.pop_due(state.now_ms)
        if task_id is None:
            return
        task = state.tasks.get(task_id)
        if task is not None and task.state is TaskState.PENDING:
            lane = state.lane_of(task)
            if lane is None:
                del state.tasks[task_id]
            else:
                state.queue.push(task, lane)


def ask_for_more(state: MasterState) -> None:
    """Order what the window lacks: lanes not listed, lanes that run dry, the next due moments."""
    queue = state.queue
    if queue.unlisted and not state.listing.is_asked and len(queue.lanes) < state.settings.lanes:
        state.listing.is_asked = True
        state.act(ListLanes(state.listing.after, _LANES_LISTED))
    if queue.hungry:
        for count, (lane, limit) in enumerate(queue.refills(), 1):
            state.act(LoadBacklog(lane.key, lane.cursor, limit))
            if count == _REFILLS_PER_TURN:
                break
    if state.delays.needs_load(state.now_ms):
        state.delays.loading = True
        state.act(LoadDelayed(state.settings.delayed_tasks // 2))


def on_wall_step(state: MasterState) -> None:
    """Somebody set the wall clock: user schedules follow it, nothing else does."""
    scheduled = [
        task
        for task in state.tasks.values()
        if task.not_before_wall and task.task_id in state.delays
    ]
    for task in scheduled:
        state.delays.remove(task.task_id)
        state.wait(task)
    # What lies in the database may be due before the horizon now.
    state.delays.loaded(state.now_ms)


def _recover_rate(state: MasterState, row: RateKeyRow) -> None:
    """Fail closed: whatever was handed out just before the end counts as begun just now."""
    state.rates[row.rate_key] = RateKey(
        name=row.rate_key,
        delay_ms=row.delay_ms,
        concurrency=row.concurrency,
        next_at_ms=state.now_ms + row.delay_ms,
        closed_until_ms=min(row.closed_until_ms, state.now_ms + DELAY_MS_MAX),
    )
    reopen(state, row.rate_key)


def _is_news(state: MasterState, row: TaskRow) -> bool:
    """Not yet in memory, and not changed by a turn that the read could not see."""
    return row.task_id not in state.tasks and row.task_id not in state.settled
