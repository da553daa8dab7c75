"""What operators ask and order: enrolment, keys and tokens, drain, strategy, questions."""

from __future__ import annotations

from heapq import nlargest
from typing import Final

import msgspec

from zmqcluster.core.dispatcher import TaskDispatcher
from zmqcluster.core.effects import AllowKey, DenyKey, Publish
from zmqcluster.core.events import Facts, LaneKey, Peer, Principal
from zmqcluster.core.fleet import Device
from zmqcluster.core.intake import find
from zmqcluster.core.rows import KeyRow, TaskRow, TokenRow
from zmqcluster.core.sessions import close
from zmqcluster.core.state import MasterState
from zmqcluster.messages import (
    Answer,
    AskDevices,
    AskExplain,
    AskOverview,
    Changed,
    CreateToken,
    DrainDevice,
    Enrol,
    Enrolled,
    HeartbeatAck,
    Hint,
    Refused,
    RevokeDevice,
    RevokeToken,
    SetStrategy,
)
from zmqcluster.model import (
    NO_JOB,
    PROTOCOL_VERSION,
    DeviceId,
    DeviceState,
    Outcome,
    RefusalCode,
    Role,
    TaskId,
    TaskState,
)
from zmqcluster.views import DeviceView, ExplainView, OverviewView, RateKeyView, TaskCounts

_RATE_KEYS_SHOWN: Final = 100


def on_enrol(state: MasterState, peer: Peer, principal: Principal, message: Enrol) -> None:
    """Bind a new public key to a device, if the token behind this bootstrap key allows it."""
    token = state.tokens.get(principal.token_id)
    device_id = DeviceId(message.device_id)
    known = state.keys.get(message.public_key)
    if known is not None and known.device_id == device_id and not known.revoked_wall:
        # Its reply was lost: the same key may ask again without using the token up.
        state.send(peer, Enrolled(device_id))
        return
    refusal = _enrol_refusal(state, message, token, known)
    if refusal is not None or token is None:
        code, problem = refusal or (RefusalCode.FORBIDDEN, "this join token is not known")
        state.event_of_peer(
            "enrol_refused", device_id=device_id, by=principal.token_id, detail=problem
        )
        state.send(peer, Refused(b"", code, problem))
        return
    token.uses_left -= 1
    state.changes.tokens[token.token_id] = msgspec.structs.replace(token)
    row = KeyRow(message.public_key, token.role, device_id, token.token_id, state.wall_ms)
    state.keys[message.public_key] = row
    state.changes.keys[message.public_key] = msgspec.structs.replace(row)
    state.act(AllowKey(message.public_key, principal_of(row)))
    state.revoked.discard(device_id)
    state.event("key_enrolled", device_id=device_id, detail=f"by token {token.token_id}")
    state.send(peer, Enrolled(device_id))


def principal_of(row: KeyRow) -> Principal:
    """Who the holder of an enrolled key is."""
    return Principal(role=Role(row.role), device_id=row.device_id)


def on_create_token(state: MasterState, peer: Peer, message: CreateToken) -> None:
    """Make a join token usable. Asked again with the same id, it changes nothing."""
    problem = _token_problem(state, message)
    if problem:
        state.send(peer, Refused(message.request_id, RefusalCode.CONFLICT, problem))
        return
    if message.token_id not in state.tokens:
        row = TokenRow(
            token_id=message.token_id,
            public_key=message.public_key,
            role=message.role,
            created_wall=state.wall_ms,
            expires_wall=message.expires_wall_ms,
            uses_left=message.uses,
        )
        state.tokens[row.token_id] = row
        state.changes.tokens[row.token_id] = msgspec.structs.replace(row)
        state.act(AllowKey(row.public_key, Principal(Role.ENROL, token_id=row.token_id)))
        state.event("token_created", detail=row.token_id)
    state.send(peer, Changed(message.request_id))


def on_revoke_token(state: MasterState, peer: Peer, message: RevokeToken) -> None:
    """Nobody joins with this token any more; who has joined stays."""
    row = state.tokens.get(message.token_id)
    if row is None:
        problem = f"there is no token {message.token_id}"
        state.send(peer, Refused(message.request_id, RefusalCode.NOT_FOUND, problem))
        return
    if not row.revoked_wall:
        row.revoked_wall = state.wall_ms
        state.changes.tokens[row.token_id] = msgspec.structs.replace(row)
        state.act(DenyKey(row.public_key))
        state.event("token_revoked", detail=row.token_id)
    state.send(peer, Changed(message.request_id))


def on_revoke_device(
    state: MasterState, dispatcher: TaskDispatcher, peer: Peer, message: RevokeDevice
) -> None:
    """Refuse a device's keys from the next message on; its tasks go elsewhere."""
    device_id = DeviceId(message.device_id)
    rows = [row for row in state.keys.values() if row.device_id == device_id]
    if not rows:
        problem = f"no key belongs to a device {device_id}"
        state.send(peer, Refused(message.request_id, RefusalCode.NOT_FOUND, problem))
        return
    for row in rows:
        if not row.revoked_wall:
            row.revoked_wall = state.wall_ms
            state.changes.keys[row.public_key] = msgspec.structs.replace(row)
            state.act(DenyKey(row.public_key))
            state.event("key_revoked", device_id=device_id)
    # Until the door is shut, what was on its way may still come in.
    state.revoked.add(device_id)
    device = state.fleet.devices.get(device_id)
    if device is not None and device.is_online:
        close(state, dispatcher, device, "its key was revoked", Outcome.DEVICE_LOST)
    state.send(peer, Changed(message.request_id))


def on_drain(state: MasterState, peer: Peer, message: DrainDevice) -> None:
    """Let a device run dry, or take part again. Kept across restarts of both sides."""
    device = state.fleet.devices.get(DeviceId(message.device_id))
    if device is None:
        problem = f"there is no device {message.device_id}"
        state.send(peer, Refused(message.request_id, RefusalCode.NOT_FOUND, problem))
        return
    if device.row.drained != message.on:
        device.row.drained = message.on
        device.control_version += 1
        device.row.state = device.state
        state.save_device(device)
        state.fleet.refresh(device)
        state.event(
            "device_drained" if message.on else "device_resumed", device_id=device.device_id
        )
        if device.is_online:
            state.send(device.peer, HeartbeatAck(0, 0, state.epoch, device.control))
            state.act(Publish(Hint(state.epoch, device.control_version)))
    state.send(peer, Changed(message.request_id))


def on_strategy(state: MasterState, peer: Peer, message: SetStrategy) -> None:
    """Change the load balance strategy until the next restart."""
    state.fleet.set_strategy(message.strategy)
    state.event("strategy_changed", detail=str(message.strategy))
    state.send(peer, Changed(message.request_id))


def on_ask_overview(state: MasterState, peer: Peer, message: AskOverview) -> None:
    """The cluster at a glance."""
    online = list(state.fleet.online())
    view = OverviewView(
        epoch=state.epoch,
        uptime_s=(state.now_ms - state.started_ms) / 1000,
        durability=state.settings.durability,
        strategy=state.fleet.strategy,
        device_id=state.settings.device_id,
        devices_online=len(online),
        devices_total=len(state.fleet.devices),
        slots=sum(load.slots for one in online for load in one.pools.values()),
        tasks=TaskCounts(**state.totals),
        jobs_active=sum(job_id != NO_JOB for job_id in state.jobs),
        window_tasks=len(state.queue),
        expiry_held=state.now_ms < state.expiry_held_until_ms,
        counters=dict(sorted(state.counters.items())),
        rate_keys=_rate_views(state),
    )
    state.send(peer, Answer(message.request_id, msgspec.msgpack.encode(view)))


def on_ask_devices(state: MasterState, peer: Peer, message: AskDevices) -> None:
    """All devices, or one."""
    devices = state.fleet.devices
    if message.device_id and message.device_id not in devices:
        problem = f"there is no device {message.device_id}"
        state.send(peer, Refused(message.request_id, RefusalCode.NOT_FOUND, problem))
        return
    chosen = [devices[DeviceId(message.device_id)]] if message.device_id else devices.values()
    views = [_device_view(state, one) for one in chosen]
    state.send(peer, Answer(message.request_id, msgspec.msgpack.encode(views)))


def on_ask_explain(state: MasterState, peer: Peer, message: AskExplain, facts: Facts) -> None:
    """Why is a task where it is?"""
    task = find(state, TaskId(message.task_id), facts)
    if task is None:
        problem = f"there is no task {message.task_id}"
        state.send(peer, Refused(message.request_id, RefusalCode.NOT_FOUND, problem))
        return
    view = ExplainView(task.task_id, task.state, _reasons(state, task))
    state.send(peer, Answer(message.request_id, msgspec.msgpack.encode(view)))


def _reasons(state: MasterState, task: TaskRow) -> list[str]:
    if task.state.is_terminal:
        return [f"it is {task.state}" + (f": {task.error}" if task.error else "")]
    if task.state is not TaskState.PENDING:
        asked = "; cancel requested" if task.cancel_requested else ""
        flight = state.flights.get(task.task_id)
        told = ""
        if flight is not None and (flight.progress or flight.note):
            told = f", {flight.progress:.0%} done" + (f" ({flight.note})" if flight.note else "")
        where = f"on device {task.device_id}, attempt {task.attempt}"
        return [f"it is {task.state} {where}{told}{asked}"]
    reasons = []
    wait_ms = state.due_ms(task) - state.now_ms
    if wait_ms > 0:
        what = "its retry" if task.failures or task.deaths else "its not_before"
        why = f" (it ended with: {task.error})" if task.error else ""
        reasons.append(f"waiting for {what}, due in {wait_ms / 1000:.1f} s{why}")
    rate = state.rates.get(task.rate_key)
    if rate is not None and not rate.is_open(state.now_ms):
        opens_ms = rate.opens_at_ms() - state.now_ms
        if opens_ms > 0:
            reasons.append(f"rate key {rate.name} is closed for {opens_ms / 1000:.1f} s more")
        else:
            reasons.append(f"rate key {rate.name} has {rate.running} running, its limit is reached")
    key = LaneKey(task.task_type, task.labels, task.rate_key, task.priority)
    lane = state.queue.lanes.get(key)
    if not state.fleet.by_peer:
        reasons.append("no device is online")
    elif not any(one.state is DeviceState.ONLINE for one in state.fleet.online()):
        reasons.append("every device that is online is drained")
    elif state.is_stranded(key):
        labels = f" with labels {task.labels}" if task.labels else ""
        reasons.append(f"no online device{labels} runs {task.task_type}")
    ahead = sum(
        one.count for other, one in state.queue.lanes.items() if other.priority > task.priority
    )
    if ahead:
        reasons.append(f"at least {ahead} tasks of higher priority are ready")
    if wait_ms <= 0 and (lane is None or task.task_id not in state.queue):
        reasons.append("it waits in the database behind the tasks in memory")
    return reasons or ["it is ready: every device that could run it is busy"]


def _token_problem(state: MasterState, message: CreateToken) -> str:
    """Why this token cannot be made; empty if it can, or is there already."""
    known = state.tokens.get(message.token_id)
    if not message.token_id:
        return "a join token needs an id"
    if message.role is Role.ENROL:
        return "a join token is for keys of workers or clients, not for other tokens"
    if known is not None:
        is_same = known.public_key == message.public_key and known.role == message.role
        return "" if is_same else f"there is another join token {message.token_id}"
    if message.public_key in state.keys:
        return "this key is enrolled already: a join token needs one of its own"
    if any(one.public_key == message.public_key for one in state.tokens.values()):
        return "this key belongs to another join token"
    return ""


def _enrol_refusal(
    state: MasterState, message: Enrol, token: TokenRow | None, known: KeyRow | None
) -> tuple[RefusalCode, str] | None:
    if message.version != PROTOCOL_VERSION:
        problem = f"protocol version {message.version}; this master speaks {PROTOCOL_VERSION}"
        return RefusalCode.VERSION, problem
    if token is None:
        return RefusalCode.FORBIDDEN, "this join token is not known"
    if token.revoked_wall:
        return RefusalCode.FORBIDDEN, f"join token {token.token_id} is revoked"
    if token.expires_wall and state.wall_ms > token.expires_wall:
        return RefusalCode.FORBIDDEN, f"join token {token.token_id} has expired"
    if token.uses_left <= 0:
        return RefusalCode.FORBIDDEN, f"join token {token.token_id} is used up"
    if known is not None:
        return RefusalCode.CONFLICT, "this key is enrolled already"
    for row in state.keys.values():
        if row.device_id == message.device_id and not row.revoked_wall:
            return (
                RefusalCode.CONFLICT,
                f"device {message.device_id} has joined with another key: "
                "choose another --device-id, or revoke that device first",
            )
    return None


def _rate_views(state: MasterState) -> list[RateKeyView]:
    """The busiest keys: those with the most running, then with the most waiting."""
    busy = nlargest(
        _RATE_KEYS_SHOWN,
        (one for one in state.rates.values() if one.is_used),
        key=lambda one: (one.running, state.queue.waiting(one)),
    )
    return [
        RateKeyView(
            rate_key=one.name,
            delay_ms=one.delay_ms,
            concurrency=one.concurrency,
            running=one.running,
            waiting=state.queue.waiting(one),
            open_in_ms=max(0, one.opens_at_ms() - state.now_ms),
        )
        for one in busy
    ]


def _device_view(state: MasterState, device: Device) -> DeviceView:
    row = device.row
    is_online = device.is_online
    return DeviceView(
        device_id=device.device_id,
        name=row.name,
        state=device.state,
        host=row.host,
        platform=row.platform,
        cpu_count=row.cpu_count,
        memory_bytes=row.memory_bytes,
        addresses=msgspec.json.decode(row.addresses, type=list[str]),
        task_types=msgspec.json.decode(row.task_types, type=list[str]),
        labels=msgspec.json.decode(row.labels, type=list[str]),
        slots=row.slots,
        assigned=len(device.flights),
        running=device.running if is_online else 0,
        completed=row.completed,
        failed=row.failed,
        lost=row.lost,
        beat_age_ms=state.now_ms - device.heard_ms if is_online else None,
        cpu_pct=device.resources.cpu_pct if is_online else 0.0,
        memory_pct=device.resources.memory_pct if is_online else 0.0,
        registered_wall=row.registered_wall,
        last_seen_wall=state.wall_ms if is_online else row.last_seen_wall,
    )
