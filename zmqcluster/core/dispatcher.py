"""TaskDispatcher: which task goes to which device, and what becomes of it when one is lost."""

from __future__ import annotations

from typing import Final

from zmqcluster.core.fleet import Device, Flight, take
from zmqcluster.core.lanes import Shape
from zmqcluster.core.lifecycle import TaskCause, backoff_ms, cause_of
from zmqcluster.core.rows import GivenUp, TaskRow
from zmqcluster.core.state import MasterState
from zmqcluster.messages import Assign, TaskOrder
from zmqcluster.model import (
    CREDIT_MAX,
    PRIORITY_MAX,
    DeviceId,
    JobState,
    Outcome,
    TaskId,
    TaskState,
)

# Shapes of equal priority take turns at the fleet in portions of this many tasks.
_PORTION: Final = 32
# Small orders go together up to this, as results do (worker_outbox.BATCH_BYTES): a frame that takes
# a slow line longer than device_timeout never arrives.
_ASSIGN_BYTES: Final = 16 * 1024


class TaskDispatcher:
    """Hands ready tasks to devices by priority, fairness and strategy; takes them back."""

    def __init__(self, state: MasterState) -> None:
        self._state = state
        self._orders: dict[DeviceId, list[TaskOrder]] = {}

    def dispatch(self) -> None:
        """Assign all that can be assigned now, highest priority first."""
        queue, fleet = self._state.queue, self._state.fleet
        for key in fleet.take_woken():
            queue.wake(key)
        for shape in queue.take_untried():
            if not fleet.may_take(shape):
                self._put_to_sleep(shape)
        awake = queue.awake()
        if not awake or not fleet.by_peer:
            return
        # Shapes that found no device. True: and will not before one of them changes.
        blocked: dict[Shape, bool] = {}
        for priority in range(PRIORITY_MAX, -1, -1):
            shapes = [one for one in awake if one.rotations.get(priority) and one not in blocked]
            while shapes:
                shapes = [one for one in shapes if self._dispatch_some(one, priority, blocked)]
        self._send_orders()
        aside = queue.take_back_aside()
        for shape in queue.awake():
            if blocked.get(shape) or (shape in aside and not fleet.may_take(shape)):
                self._put_to_sleep(shape)

    def assign(self, task: TaskRow, device: Device) -> None:
        """Make device the holder of a new attempt of task."""
        state = self._state
        state.move(task, TaskCause.DISPATCHED)
        task.attempt += 1
        task.device_id = device.device_id
        task.assigned_wall = state.wall_ms
        task.started_wall = 0
        task.retry_at_ms = 0
        task.not_before_wall = 0
        task.given_up = GivenUp.NO
        rate = state.rate(task.rate_key)
        flight = Flight(
            task=task,
            device_id=device.device_id,
            pool=device.types[task.task_type],
            expected_us=state.fleet.durations.expected_us(task.task_type) or 0,
            seq=device.assign_seq + 1,
            sent_ms=state.now_ms,
            is_starting=rate is not None and rate.grant(),
        )
        state.flights[task.task_id] = flight
        take(device, flight)
        state.fleet.took(device)
        state.record_open(task)
        start_within_ms = state.settings.start_within_ms if rate and rate.has_limits else 0
        order = TaskOrder(
            task.task_id,
            task.attempt,
            task.task_type,
            task.task_data,
            task.timeout_ms,
            task.job_id,
            start_within_ms,
        )
        self._orders.setdefault(device.device_id, []).append(order)

    def end(
        self,
        flight: Flight,
        outcome: Outcome,
        *,
        error: str = "",
        run_us: int = 0,
        retry_after_ms: int = 0,
        is_unheard: bool = False,
        begins_within_ms: int | None = None,
    ) -> None:
        """An attempt in flight is over: charge it to the task and move the task on.

        is_unheard: its holder did not say so; if it does yet, `take_back` comes first.
        begins_within_ms: how long its holder may still begin it; None: for the start window.
        """
        state, task = self._state, flight.task
        state.land(flight)
        self._release_key(flight, outcome, begins_within_ms or state.settings.start_within_ms)
        state.record_end(task, outcome, run_us, error)
        if is_unheard:
            is_death = outcome is Outcome.DEVICE_LOST and flight.begun
            task.given_up = GivenUp.DIED if is_death else GivenUp.LOST
        self.conclude(task, outcome, error=error, retry_after_ms=retry_after_ms)

    def take_back(self, task: TaskRow) -> None:
        """There is word of an attempt that was given up: it was not lost, nor a death."""
        task.deaths -= task.given_up == GivenUp.DIED
        task.given_up = GivenUp.NO

    def conclude(
        self,
        task: TaskRow,
        outcome: Outcome,
        *,
        error: str = "",
        retry_after_ms: int = 0,
    ) -> None:
        """Decide what an attempt's end means for its task, which nobody holds any more."""
        state = self._state
        if outcome in (Outcome.FAILED, Outcome.RETRY, Outcome.TIMED_OUT, Outcome.REJECTED):
            task.failures += 1
        elif outcome is Outcome.DIED or task.given_up == GivenUp.DIED:
            task.deaths += 1
        cause = cause_of(task, outcome)
        # What went wrong before is with the attempts it happened to.
        task.error = "" if outcome is Outcome.COMPLETED else error
        if outcome is not Outcome.COMPLETED:
            detail = f"{cause}: {error}" if error else str(cause)
            state.event(f"task_{outcome}", task=task, detail=detail)
        if cause is TaskCause.RETRIED or (cause is TaskCause.LOST and outcome is Outcome.DIED):
            tries = max(1, task.failures + task.deaths)
            task.retry_at_ms = state.now_ms + max(backoff_ms(tries, state.rng), retry_after_ms)
        self._move_on(task, cause)

    def _move_on(self, task: TaskRow, cause: TaskCause) -> None:
        state = self._state
        state.queue.remove(task)
        state.delays.remove(task.task_id)
        if task.state is TaskState.PENDING and cause not in _ENDS_PENDING:
            # It is back in the queue already, and this end of its last attempt came late: only
            # the moment from which it may run again has changed.
            state.save(task)
        else:
            state.move(task, cause)
        if task.state is TaskState.PENDING:
            # What waited longest goes first again.
            state.wait(task, first=True)

    def _dispatch_some(self, shape: Shape, priority: int, blocked: dict[Shape, bool]) -> bool:
        """One portion of a shape. False: it has nothing more to give, or nobody to give it to."""
        state = self._state
        for _ in range(_PORTION):
            task = state.queue.pop(shape, priority, state.now_ms)
            if task is None:
                return False
            if state.job(task.job_id).state is JobState.CANCELLED:
                state.move(task, TaskCause.CANCELLED)
                continue
            rate = state.rates.get(task.rate_key)
            free_only = rate is not None and rate.is_delayed
            device = state.fleet.pick(shape, free_only=free_only)
            if device is not None:
                self.assign(task, device)
                state.queue.served(shape, priority, state.now_ms)
                continue
            lane = state.lane_of(task)
            assert lane is not None, "its lane was there a moment ago"
            state.queue.push(task, lane, first=True)
            is_hopeless = not free_only or not state.fleet.runs(shape)
            if is_hopeless or not state.queue.set_aside(lane):
                blocked[shape] = is_hopeless
                return False
        return True

    def _put_to_sleep(self, shape: Shape) -> None:
        fleet = self._state.fleet
        if fleet.will_wake(shape):
            self._state.queue.sleep(shape, is_stranded=not fleet.runs(shape))

    def _release_key(self, flight: Flight, outcome: Outcome, within_ms: int) -> None:
        state = self._state
        rate = state.rates.get(flight.task.rate_key)
        if rate is None:
            return
        is_unsure = outcome in (Outcome.DEVICE_LOST, Outcome.DISPATCH_LOST)
        if is_unsure or (outcome is Outcome.RETURNED and flight.begun):
            # A host that is being ended may still have its request open.
            rate.lost(state.now_ms, within_ms, was_starting=flight.is_starting)
            if rate.has_limits:
                # The next master must not begin anew what the lost one may still begin.
                state.save_rate(rate)
        else:
            has_run = flight.begun or outcome is not Outcome.RETURNED
            rate.ended(state.now_ms, was_starting=flight.is_starting, has_run=has_run)
        reopen(state, rate.name)
        state.rest(rate.name)

    def _send_orders(self) -> None:
        state = self._state
        for device_id, orders in self._orders.items():
            device = state.fleet.devices[device_id]
            while orders:
                count = _portion(orders)
                device.assign_seq += 1
                for order in orders[:count]:
                    state.flights[TaskId(order.task_id)].seq = device.assign_seq
                state.send(
                    device.peer, Assign(state.epoch, device.assign_seq, tuple(orders[:count]))
                )
                del orders[:count]
        self._orders.clear()


# Ends that still count for a task that is back in the queue: its last attempt was not superseded.
_ENDS_PENDING: Final = frozenset(
    {TaskCause.SUCCEEDED, TaskCause.FAILED, TaskCause.POISONED, TaskCause.CANCELLED}
)


def reopen(state: MasterState, name: str) -> None:
    """A key's limits or load changed: its lanes take part now, or when time opens it."""
    rate = state.rates.get(name)
    if rate is None or not rate.lanes:
        return
    opens_ms = rate.opens_at_ms()
    if opens_ms > state.now_ms:
        state.timers.set_no_later(f"key {name}", opens_ms)
    elif rate.is_open(state.now_ms):
        state.queue.reopen(rate)


def _portion(orders: list[TaskOrder]) -> int:
    """How many of the orders fit one Assign; at least one."""
    size = 0
    for count, order in enumerate(orders[:CREDIT_MAX]):
        size += len(order.data) + 128
        if size > _ASSIGN_BYTES and count:
            return count
    return min(len(orders), CREDIT_MAX)
