"""Between the window in memory and the backlog in the database: start, refills, due moments."""

from __future__ import annotations

from itertools import islice
from typing import Final

from zmqcluster.core.effects import ListLanes, LoadBacklog, LoadDelayed
from zmqcluster.core.events import BacklogLoaded, DelayedLoaded, LanesListed
from zmqcluster.core.fleet import Device
from zmqcluster.core.intake import sweep_job
from zmqcluster.core.lifecycle import BACKOFF_MAX_MS
from zmqcluster.core.rows import RateKeyRow, TaskRow
from zmqcluster.core.sessions import recover_flight
from zmqcluster.core.state import MasterState, Past
from zmqcluster.model import DELAY_MS_MAX, JobState, TaskState

_LANES_LISTED: Final = 1_000
# So often, when there is no room for any.
_LIST_EVERY_MS: Final = 1_000
# Refills of one turn together stay small enough not to hold up the loop for long.
_REFILLS_PER_TURN: Final = 8
# Looking for lanes to shorten takes a look at all that have two tasks or more.
_SHED_EVERY_MS: Final = 100


def recover(state: MasterState, past: Past) -> None:
    """Rebuild memory from rows. Leases start at full length; delayed keys start closed, those that
    are read later too (RateKey.of_row).

    Whose keys pass is rebuilt by whoever opens the door: it must know before the first knock.
    """
    for job in past.jobs:
        state.jobs[job.job_id] = job
        if job.state is JobState.CANCELLED:
            sweep_job(state, job.job_id)
    for row in past.devices:
        state.fleet.devices[row.device_id] = Device(row)
    limits = {row.rate_key: row for row in past.rate_keys}
    names = [task.rate_key for task in past.in_flight if task.rate_key]
    state.recall(limits.get(name) or RateKeyRow(name) for name in names)
    for task in past.in_flight:
        recover_flight(state, task)
    for key in past.keys:
        state.keys[key.public_key] = key
    state.revoked = {key.device_id for key in past.keys} - {
        key.device_id for key in past.keys if not key.revoked_wall
    }
    for token in past.tokens:
        state.tokens[token.token_id] = token
    state.queue.unlisted = True
    state.delays.reached(state.now_ms)


def on_loaded(state: MasterState, event: BacklogLoaded) -> None:
    """Tasks of one lane arrived from the database."""
    lane = state.queue.lanes.get(event.lane)
    if lane is None:
        return
    last_id = event.rows[-1].task_id if event.rows else lane.cursor
    for row in event.rows:
        task = _news(state, row)
        if task is not None and not (task.retry_at_ms or task.not_before_wall):
            state.tasks[task.task_id] = task
            state.queue.push(task, lane)
    state.queue.loaded(lane, last_id, more=event.more)


def on_lanes(state: MasterState, event: LanesListed) -> None:
    """Lanes were found in the database; those without room are found again another time."""
    listing = state.listing
    listing.is_asked = False
    state.recall(event.rates.values())
    has_room = True
    for key in event.lanes:
        # A new lane is read as long as there are lanes that are not listed, and so is this one.
        # What nobody online runs is passed over when all lanes are taken.
        has_room = state.lane(key) is not None or state.is_stranded(key)
        if not has_room:
            break
        listing.after = key
    # A lane that found no room while this was read, or was given up for another, may not be in it.
    listing.has_skipped = state.queue.take_missed() or listing.has_skipped
    if has_room and not event.more:
        listing.after = None
        state.queue.unlisted = listing.has_skipped
        listing.has_skipped = False
    else:
        state.queue.unlisted = True
        listing.has_skipped = listing.has_skipped or not has_room


def on_delayed(state: MasterState, event: DelayedLoaded) -> None:
    """The tasks due soonest arrived from the database."""
    state.delays.loaded()
    state.recall(event.rates.values())
    latest_ms = state.now_ms
    for row in event.rows:
        if row.retry_at_ms and row.failures + row.deaths:
            # A clock that was set back while we were down must not make a retry wait for ever.
            row.retry_at_ms = min(row.retry_at_ms, state.now_ms + max(BACKOFF_MAX_MS, DELAY_MS_MAX))
        latest_ms = max(latest_ms, state.due_ms(row))
        task = _news(state, row)
        if task is None:
            continue
        due_ms = state.due_ms(task)
        if due_ms <= state.now_ms and state.queue.has_room:
            # At once: however large those of one moment are together, each read moves on.
            state.ready(task)
        else:
            state.delay(task, due_ms)
    if event.more:
        state.delays.reached(latest_ms)


def release_due(state: MasterState) -> None:
    """Delayed tasks whose moment has come go to their lanes, while the window has room."""
    delays = state.delays
    while delays.is_due(state.now_ms) and state.queue.has_room:
        state.ready(delays.pop_due())


def ask_for_more(state: MasterState) -> None:
    """Order what the window lacks: lanes not listed, lanes that run dry, the next due moments."""
    queue = state.queue
    if queue.unlisted and not state.listing.is_asked and _may_list(state):
        state.listing.is_asked, state.listing.asked_ms = True, state.now_ms
        if state.listing.after is None:
            queue.take_missed()
        state.act(ListLanes(state.listing.after, _LANES_LISTED))
    _make_room(state)
    # Before lanes are filled: what is due already must not wait behind all that is not read yet.
    release_due(state)
    if state.delays.needs_load(state.now_ms) and queue.has_room:
        state.delays.asked()
        state.act(LoadDelayed(state.settings.delayed_tasks // 2))
    for lane, limit in islice(queue.refills(state.now_ms), _REFILLS_PER_TURN):
        state.act(LoadBacklog(lane.key, lane.cursor, limit))


def on_wall_step(state: MasterState) -> None:
    """Somebody set the wall clock: user schedules follow it, nothing else does."""
    state.wall_stepped()
    scheduled = [
        task
        for task in state.tasks.values()
        if task.not_before_wall and task.task_id in state.delays
    ]
    for task in scheduled:
        state.delays.remove(task.task_id)
        state.delay(task, state.due_ms(task))
    # What lies in the database may be due before the horizon now.
    state.delays.reached(state.now_ms)
    # Written down, because the database compares the two clocks by their last saved readings.
    state.event("wall_clock_stepped")


def _may_list(state: MasterState) -> bool:
    """Is there room for lanes, or is it time to see who has waited longer than those in memory?"""
    is_time = state.now_ms - state.listing.asked_ms >= _LIST_EVERY_MS
    return len(state.queue.lanes) < state.settings.lanes or is_time


def _make_room(state: MasterState) -> None:
    """Full of tasks that cannot run now? Their lanes fall back on the database for others' sake."""
    queue, delays, now_ms = state.queue, state.delays, state.now_ms
    if queue.has_room:
        return
    if queue.is_starving(now_ms) or delays.needs_load(now_ms) or delays.is_due(now_ms):
        gone = queue.yield_idle()
        if not gone and now_ms - state.shed_ms >= _SHED_EVERY_MS:
            state.shed_ms = now_ms
            gone = queue.shed(now_ms)
        for task in gone:
            state.leave(task)


def _news(state: MasterState, row: TaskRow) -> TaskRow | None:
    """The task of a row that was read, as it is now; None if it is in memory or has ended."""
    task_id = row.task_id
    if task_id in state.tasks:
        return None
    left = state.departed.get(task_id)
    task = row if left is None else left[1]
    return task if task.state is TaskState.PENDING else None
