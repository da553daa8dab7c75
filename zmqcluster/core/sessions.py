"""Devices come, beat, fall silent and go: sessions, leases, reconciliation, the brake."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

import msgspec

from zmqcluster.core.dispatcher import TaskDispatcher, reopen
from zmqcluster.core.effects import Publish
from zmqcluster.core.events import Peer, Principal
from zmqcluster.core.fleet import Device, Flight, PoolLoad
from zmqcluster.core.lifecycle import TaskCause
from zmqcluster.core.results import begin, flight_of
from zmqcluster.core.rows import DeviceRow, HeartbeatRow, TaskRow
from zmqcluster.core.state import MasterState
from zmqcluster.messages import (
    AttemptRef,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Held,
    Hello,
    HelloAgain,
    Hint,
    Refused,
    Welcome,
)
from zmqcluster.model import (
    PROTOCOL_VERSION,
    DeviceId,
    JobState,
    Outcome,
    Pool,
    RefusalCode,
    TaskId,
    TaskState,
)

QUEUED: Final = 0
RUNNING: Final = 1

# The brake: when more than half of a fleet of at least this size falls silent within one lease,
# the fault is more likely ours (a paused loop, a cut cable) than theirs. Kubernetes stops evicting
# at 55 % of a zone for the same reason.
BRAKE_DEVICES_MIN: Final = 4
BRAKE_SHARE: Final = 0.5
BRAKE_LEASES: Final = 4


def on_hello(
    state: MasterState,
    dispatcher: TaskDispatcher,
    peer: Peer,
    principal: Principal,
    message: Hello,
) -> None:
    """Open a session, and bring what both sides believe about its attempts together."""
    refusal = _hello_refusal(state, peer, principal, message)
    if refusal is not None:
        code, problem = refusal
        # Under the name of its key: what it calls itself may be another one each time.
        state.event_of_peer("hello_refused", device_id=principal.device_id, detail=problem)
        state.send(peer, Refused(b"", code, problem))
        return
    device = _device_for(state, message)
    has_rebooted = device.boot_id not in (b"", message.boot_id)
    # A Hello said again, or by another process while the former one was not seen to end (a copy of
    # its machine, perhaps): what we sent before may still be read and begun.
    may_begin = (device.peer == peer or has_rebooted) and device.is_online
    may_begin = may_begin and device.lost_at_ms is None
    _open_session(state, device, peer, message)
    aborted = reconcile(
        state,
        dispatcher,
        device,
        message.inventory,
        is_hello=True,
        has_rebooted=has_rebooted,
        may_begin=may_begin,
    )
    state.fleet.join(device)
    device_id = device.device_id
    if state.event_of_peer("device_online", device_id=device_id, detail=device.row.name):
        state.log("info", f"Device {device_id} is online ({_slots_text(device)})")
    settings = state.settings
    state.send(
        peer,
        Welcome(
            epoch=state.epoch,
            session=device.session,
            heartbeat_interval_ms=settings.heartbeat_interval_ms,
            device_timeout_ms=settings.device_timeout_ms,
            control=device.control,
            abort=aborted,
        ),
    )


def on_heartbeat(
    state: MasterState, dispatcher: TaskDispatcher, device: Device, message: Heartbeat
) -> None:
    """Count the device alive, compare inventories, and repeat the standing orders."""
    device.resources = message.resources
    device.running = message.running
    device.beat_seq = message.assign_seq
    if device.credit != message.credit or device.draining != message.draining:
        device.credit, device.draining = message.credit, message.draining
        state.fleet.refresh(device)
        if device.row.state != device.state:
            device.row.state = device.state
            state.save_device(device)
    aborted = reconcile(state, dispatcher, device, message.inventory)
    _sample(state, device)
    state.send(
        device.peer,
        HeartbeatAck(message.seq, message.sent_ms, state.epoch, device.control, aborted),
    )


def on_goodbye(
    state: MasterState, dispatcher: TaskDispatcher, device: Device, message: Goodbye
) -> None:
    """The device leaves on purpose."""
    close(state, dispatcher, device, f"said goodbye: {message.reason}", Outcome.RETURNED)


def on_unknown_session(state: MasterState, peer: Peer) -> None:
    """Somebody with a good key speaks without a session: it has one with a former life of ours."""
    state.count("hello_again")
    state.send(peer, HelloAgain(state.epoch))


def on_peer_lost(state: MasterState, peer: Peer) -> None:
    """A connection is gone. A device has a moment to come back with another one."""
    device = state.fleet.by_peer.get(peer)
    if device is None or device.lost_at_ms is not None:
        return
    _await_return(state, device)
    state.fleet.refresh(device)


def _await_return(state: MasterState, device: Device) -> None:
    device.lost_at_ms = state.now_ms
    state.timers.set(f"gone {device.device_id}", state.now_ms + state.settings.reconnect_grace_ms)


def on_reconnect_over(state: MasterState, dispatcher: TaskDispatcher, device_id: DeviceId) -> None:
    """The moment is over: the process behind a closed connection is taken for dead."""
    device = state.fleet.devices[device_id]
    if device.is_online and device.lost_at_ms is not None:
        close(state, dispatcher, device, "its connection closed", Outcome.DEVICE_LOST)


def on_lease_over(state: MasterState, dispatcher: TaskDispatcher, device_id: DeviceId) -> None:
    """A device may have been silent for a whole lease."""
    device = state.fleet.devices[device_id]
    timeout_ms = state.settings.device_timeout_ms
    orphaned = any(one.is_orphan for one in device.flights.values())
    if not device.is_online and not orphaned:
        return
    expires_ms = device.heard_ms + timeout_ms
    if state.now_ms < expires_ms:
        state.timers.set(f"lease {device_id}", expires_ms)
    elif device.is_online and _brake_holds(state):
        again_ms = state.now_ms + state.settings.heartbeat_interval_ms
        state.timers.set(f"lease {device_id}", min(state.expiry_held_until_ms, again_ms))
    elif device.is_online:
        silent_ms = state.now_ms - device.heard_ms
        close(state, dispatcher, device, f"silent for {silent_ms} ms", Outcome.DEVICE_LOST)
    else:
        _take_back_all(
            state, dispatcher, device, Outcome.DEVICE_LOST, "not back since the master restarted"
        )


def forgive_silence(state: MasterState) -> None:
    """We were not listening: every lease starts anew, so that our pause kills nobody; and so does
    the moment to come back, as who came is only now let in.

    Nor were we sending: an order of the moment before may only now be on its way.
    """
    for device in state.fleet.online():
        device.heard_ms = state.now_ms
        if device.lost_at_ms is not None:
            _await_return(state, device)
    for flight in state.flights.values():
        # What waits in our socket was said before the pause, perhaps before the order arrived.
        flight.sent_ms = state.now_ms
    state.event("loop_stalled", detail="leases restarted")


def close(
    state: MasterState, dispatcher: TaskDispatcher, device: Device, why: str, outcome: Outcome
) -> None:
    """End a session; what the device held goes elsewhere."""
    state.fleet.leave(device)
    state.fleet.by_peer.pop(device.peer, None)
    device.peer = b""
    device.lost_at_ms = None
    state.timers.cancel(f"gone {device.device_id}")
    state.timers.cancel(f"lease {device.device_id}")
    held = len(device.flights)
    if outcome is Outcome.DEVICE_LOST:
        device.row.lost += 1
    device.row.last_seen_wall = state.wall_ms - (state.now_ms - device.heard_ms)
    device.row.state = device.state
    state.save_device(device)
    kind = "device_lost" if outcome is Outcome.DEVICE_LOST else "device_offline"
    if state.event_of_peer(kind, device_id=device.device_id, detail=f"{why}; held {held} tasks"):
        level = "warning" if outcome is Outcome.DEVICE_LOST else "info"
        state.log(level, f"Device {device.device_id} is offline: {why}; held {held} tasks")
    _take_back_all(state, dispatcher, device, outcome, f"device {device.device_id} {why}")


def reconcile(
    state: MasterState,
    dispatcher: TaskDispatcher,
    device: Device,
    inventory: tuple[Held, ...],
    *,
    is_hello: bool = False,
    has_rebooted: bool = False,
    may_begin: bool = False,
) -> tuple[AttemptRef, ...]:
    """Make our record of a device's attempts and its own inventory agree.

    Returns what the device holds and must drop: superseded, cancelled or unknown attempts.
    """
    unwanted: list[AttemptRef] = []
    matched, is_astray = 0, False
    listed: set[tuple[int, int]] = set()
    for held in inventory:
        listed.add((held.task_id, held.attempt))
        flight = flight_of(state, device, held.task_id, held.attempt)
        if flight is None:
            flight = _adopt(state, dispatcher, device, held)
        if flight is None:
            if held.phase in (QUEUED, RUNNING):
                unwanted.append(AttemptRef(held.task_id, held.attempt))
            is_astray |= _was_never_given(state, held)
            continue
        matched += 1
        flight.is_orphan, flight.seq = False, 0
        if held.phase == RUNNING:
            begin(state, flight)
        if flight.task.cancel_requested and held.phase in (QUEUED, RUNNING):
            unwanted.append(AttemptRef(held.task_id, held.attempt))
    if matched != len(device.flights):
        _take_back_missing(state, dispatcher, device, listed, is_hello, has_rebooted, may_begin)
    if device.is_astray != is_astray:
        device.is_astray = is_astray
        state.fleet.refresh(device)
        if is_astray:
            detail = "it holds attempts that were never given out: was a backup restored?"
            state.event_of_peer("device_astray", device_id=device.device_id, detail=detail)
    return tuple(unwanted)


def _was_never_given(state: MasterState, held: Held) -> bool:
    """A master that began again from a backup gives its numbers out once more, to other tasks.

    A device that still holds the former ones must let go of them first: given an attempt of the
    same number, it would end it with the result of another task.
    """
    task = state.tasks.get(TaskId(held.task_id))
    return held.task_id >= state.next_task_id or (task is not None and held.attempt > task.attempt)


def _take_back_missing(
    state: MasterState,
    dispatcher: TaskDispatcher,
    device: Device,
    listed: set[tuple[int, int]],
    is_hello: bool,
    has_rebooted: bool,
    may_begin: bool,
) -> None:
    """Attempts we believe this device has, and it does not list.

    may_begin: whoever held them may still begin them, while its lease lasts. An Assign on its way
    over a living connection arrives before any later word of ours, so that this lease ends no later
    than counted from now.
    """
    patience_ms = state.settings.heartbeat_interval_ms + 1_000
    lost = partial(dispatcher.end, is_unheard=True)
    lease_ms = state.settings.device_timeout_ms
    within_ms = lease_ms if may_begin else None
    for flight in list(device.flights.values()):
        if (flight.task.task_id, flight.task.attempt) in listed:
            continue
        if has_rebooted:
            error = "its device was restarted"
            lost(flight, Outcome.DEVICE_LOST, error=error, begins_within_ms=within_ms)
        elif is_hello or device.beat_seq >= flight.seq:
            # It has seen our Assign, or has a new session, and still does not list the attempt.
            error = "the device does not have it"
            lost(flight, Outcome.DISPATCH_LOST, error=error, begins_within_ms=within_ms)
        elif state.now_ms - flight.sent_ms > patience_ms:
            error = "the dispatch never arrived"
            lost(flight, Outcome.DISPATCH_LOST, error=error, begins_within_ms=lease_ms)


def _adopt(
    state: MasterState, dispatcher: TaskDispatcher, device: Device, held: Held
) -> Flight | None:
    """An attempt we gave up on, but never handed out again, is still alive: let it go on."""
    task = state.tasks.get(TaskId(held.task_id))
    if (
        task is None
        or task.state is not TaskState.PENDING
        or task.attempt != held.attempt
        or task.device_id != device.device_id
        or not task.given_up
        or held.phase == QUEUED
        or task.task_type not in device.types
        or state.job(task.job_id).state is JobState.CANCELLED
    ):
        return None
    state.queue.remove(task)
    state.delays.remove(task.task_id)
    dispatcher.take_back(task)
    task.retry_at_ms = 0
    task.error = ""
    task.started_wall = task.started_wall or state.wall_ms
    state.move(task, TaskCause.ADOPTED)
    state.record_open(task)
    rate = state.rate(task.rate_key)
    if rate is not None:
        rate.running += 1
        rate.began(state.now_ms, was_starting=False)
        reopen(state, rate.name)
    state.event("attempt_adopted", task=task)
    return _board(state, device, task, begun=True)


def _board(state: MasterState, device: Device, task: TaskRow, *, begun: bool) -> Flight:
    flight = Flight(
        task=task,
        device_id=device.device_id,
        pool=device.types.get(task.task_type, Pool.SYNC),
        expected_us=0,
        seq=0,
        sent_ms=state.now_ms,
        begun=begun,
    )
    state.flights[task.task_id] = flight
    device.flights[task.task_id] = flight
    _count_pools(device)
    state.fleet.refresh(device)
    return flight


def recover_flight(state: MasterState, task: TaskRow) -> None:
    """At start: an attempt that was out when the former master ended. Its device may return."""
    device = state.fleet.devices.get(task.device_id)
    if device is None:
        # The row of its device is gone: nobody can claim it, so the lease of a placeholder ends it.
        row = DeviceRow(
            device_id=task.device_id, name="", state="offline", host="", platform="",
            cpu_count=0, memory_bytes=0, addresses="[]", task_types="[]", labels="[]", slots=0,
            boot_id="", drained=False, registered_wall=0, last_seen_wall=0,
        )  # fmt: skip
        device = state.fleet.devices[task.device_id] = Device(row)
    state.tasks[task.task_id] = task
    flight = _board(state, device, task, begun=task.state is TaskState.RUNNING)
    flight.is_orphan = True
    rate = state.rate(task.rate_key)
    if rate is not None:
        rate.running += 1
        if rate.is_delayed and not flight.begun:
            rate.starting += 1
            flight.is_starting = True
    device.heard_ms = state.now_ms
    state.timers.set_no_later(
        f"lease {device.device_id}", state.now_ms + state.settings.device_timeout_ms
    )


def _take_back_all(
    state: MasterState, dispatcher: TaskDispatcher, device: Device, outcome: Outcome, why: str
) -> None:
    for flight in list(device.flights.values()):
        dispatcher.end(flight, outcome, error=why, is_unheard=True)


def _hello_refusal(
    state: MasterState, peer: Peer, principal: Principal, message: Hello
) -> tuple[RefusalCode, str] | None:
    if message.version != PROTOCOL_VERSION:
        return (
            RefusalCode.VERSION,
            f"protocol version {message.version}; this master speaks {PROTOCOL_VERSION}",
        )
    if message.device_id in state.revoked:
        return RefusalCode.FORBIDDEN, f"the key of device {message.device_id} was revoked"
    if principal.device_id != message.device_id:
        return (
            RefusalCode.FORBIDDEN,
            f"this key belongs to device {principal.device_id}, not to {message.device_id}",
        )
    device = state.fleet.devices.get(DeviceId(message.device_id))
    if device is None or not device.is_online or device.peer == peer:
        return None
    is_same_process = device.boot_id == message.boot_id
    age_ms = state.now_ms - device.heard_ms
    # One missed beat is enough to believe that the newcomer is the restarted device.
    is_alive = age_ms <= state.settings.heartbeat_interval_ms * 3 // 2
    if is_same_process or device.lost_at_ms is not None or not is_alive:
        return None
    # Whether anybody is still there shows when this does not find its way.
    state.send(device.peer, HeartbeatAck(0, 0, state.epoch, device.control))
    return (
        RefusalCode.DEVICE_LIVE,
        f"device {message.device_id} is already live elsewhere "
        f"(host {device.row.host}, heard {age_ms} ms ago)",
    )


def _device_for(state: MasterState, message: Hello) -> Device:
    device = state.fleet.devices.get(DeviceId(message.device_id))
    if device is None:
        row = _row_of(message, registered_wall=state.wall_ms)
        device = state.fleet.devices[row.device_id] = Device(row)
    return device


def _open_session(state: MasterState, device: Device, peer: Peer, message: Hello) -> None:
    # Its seats are of what it offered before; it is seated anew once both sides agree.
    state.fleet.leave(device)
    state.fleet.by_peer.pop(device.peer, None)
    state.timers.cancel(f"gone {device.device_id}")
    former = device.row
    device.row = _row_of(message, registered_wall=former.registered_wall or state.wall_ms)
    device.row.drained = former.drained
    device.row.completed, device.row.failed = former.completed, former.failed
    device.row.lost = former.lost
    device.row.last_seen_wall = state.wall_ms
    state.sessions += 1
    device.peer, device.boot_id = peer, message.boot_id
    device.session = state.sessions
    # Assigns are counted on over sessions: a beat may come that left before our Welcome arrived,
    # and must not name the number of an Assign which is still on its way.
    device.beat_seq = 0
    device.heard_ms, device.lost_at_ms = state.now_ms, None
    device.credit, device.draining = message.credit, message.draining
    device.running_max = state.settings.max_tasks_per_device
    device.types = {offer.task_type: offer.pool for offer in message.task_types}
    device.pools = {offer.pool: PoolLoad(offer.slots) for offer in message.pools}
    device.types = {name: pool for name, pool in device.types.items() if pool in device.pools}
    device.labels = tuple(sorted(set(message.labels)))
    _count_pools(device)
    device.row.state = device.state
    state.fleet.by_peer[peer] = device
    state.save_device(device)
    state.timers.set(f"lease {device.device_id}", state.now_ms + state.settings.device_timeout_ms)


def _count_pools(device: Device) -> None:
    """Pools are counted anew from the flights, whose types may have changed pool."""
    for load in device.pools.values():
        load.in_hand = load.expected_us = 0
    for flight in device.flights.values():
        flight.pool = device.types.get(flight.task.task_type, flight.pool)
        at = device.pools.get(flight.pool)
        if at is not None:
            at.in_hand += 1
            at.expected_us += flight.expected_us


def _row_of(message: Hello, *, registered_wall: int) -> DeviceRow:
    able = message.capabilities
    return DeviceRow(
        device_id=DeviceId(message.device_id),
        name=message.name,
        state="online",
        host=able.host,
        platform=able.platform,
        cpu_count=able.cpu_count,
        memory_bytes=able.memory_bytes,
        addresses=_as_json(able.addresses),
        task_types=_as_json(sorted([offer.task_type for offer in message.task_types])),
        labels=_as_json(sorted(set(message.labels))),
        slots=sum(offer.slots for offer in message.pools),
        boot_id=message.boot_id.hex(),
        drained=False,
        registered_wall=registered_wall,
        last_seen_wall=registered_wall,
    )


def _as_json(names: Sequence[str]) -> str:
    return msgspec.json.encode(names).decode()


def _sample(state: MasterState, device: Device) -> None:
    """Beats live in memory; one in a while goes to the history table."""
    if device.sampled_ms and state.now_ms - device.sampled_ms < state.settings.heartbeat_sample_ms:
        return
    device.sampled_ms = state.now_ms
    used = device.resources
    state.changes.heartbeats.append(
        HeartbeatRow(
            device_id=device.device_id,
            at_wall=state.wall_ms,
            cpu_pct=used.cpu_pct,
            memory_pct=used.memory_pct,
            memory_bytes=used.memory_bytes,
            disk_pct=used.disk_pct,
            net_sent_bps=used.net_sent_bps,
            net_received_bps=used.net_received_bps,
            running=device.running,
            assigned=len(device.flights),
        )
    )
    device.row.last_seen_wall = state.wall_ms
    state.save_device(device)


def _brake_holds(state: MasterState) -> bool:
    """Is this a mass loss that we should doubt? Engages the brake when it begins to look so."""
    now_ms, timeout_ms = state.now_ms, state.settings.device_timeout_ms
    brake = state.brake
    if brake.turn != state.turn:
        # Once a turn: a mass loss brings many leases to an end in the same one.
        brake.turn = state.turn
        brake.is_mass_loss = _is_mass_loss(state)
    if now_ms < state.expiry_held_until_ms:
        if not brake.is_mass_loss:
            state.expiry_held_until_ms = 0
            state.event("mass_loss_over")
        return brake.is_mass_loss
    if state.expiry_held_until_ms and now_ms < state.expiry_held_until_ms + timeout_ms:
        # Held long enough: whoever is silent still is gone.
        return False
    if not brake.is_mass_loss:
        return False
    state.expiry_held_until_ms = now_ms + BRAKE_LEASES * timeout_ms
    text = "more than half of the devices fell silent at once: expiry is held for a while"
    state.event("mass_loss_brake", detail=text)
    state.log("error", text)
    state.act(Publish(Hint(state.epoch)))
    return True


def _is_mass_loss(state: MasterState) -> bool:
    online = state.fleet.by_peer.values()
    # "About to be": their leases end within the next beat.
    margin_ms = state.settings.device_timeout_ms - state.settings.heartbeat_interval_ms
    silent = sum(state.now_ms - one.heard_ms >= margin_ms for one in online)
    return len(online) >= BRAKE_DEVICES_MIN and silent > BRAKE_SHARE * len(online)


def _slots_text(device: Device) -> str:
    return ", ".join(f"{load.slots} {pool} slots" for pool, load in device.pools.items())
