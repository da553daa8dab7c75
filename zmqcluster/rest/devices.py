"""Routes of devices."""

from __future__ import annotations

import secrets

from litestar import delete, get, post

from zmqcluster.messages import AskDevices, DrainDevice, RevokeDevice
from zmqcluster.rest.asking import (
    QUERY,
    Asked,
    Master,
    PathText,
    ask,
    known_device,
    order,
    query_of,
)
from zmqcluster.rest.backend import Backend
from zmqcluster.rest.rendering import device_stats_view, heartbeat_view
from zmqcluster.rest.schemas import (
    LIST_MAX,
    DeviceList,
    DeviceStatsView,
    DoneView,
    HeartbeatList,
    LimitQuery,
)
from zmqcluster.views import DeviceView


@get("/devices")
async def list_devices(backend: Master) -> DeviceList:
    """All devices the master knows, as they are now."""
    message = AskDevices(secrets.token_bytes(16))
    return DeviceList(devices=await ask(backend, message, list[DeviceView]))


@get("/devices/{device_id:str}")
async def get_device(device_id: PathText, backend: Master) -> DeviceView:
    """One device, as it is now."""
    return await _device(backend, device_id)


@get("/devices/{device_id:str}/heartbeats", opt={QUERY: LimitQuery})
async def device_heartbeats(request: Asked, device_id: PathText, backend: Master) -> HeartbeatList:
    """Kept samples of a device's heartbeats, newest first."""
    limit = query_of(request, LimitQuery).limit
    device = await _device(backend, device_id)
    rows = await backend.read(lambda reader: reader.heartbeats(device.device_id, limit))
    return HeartbeatList(device_id=device_id, heartbeats=[heartbeat_view(row) for row in rows])


@get("/devices/{device_id:str}/stats")
async def device_stats(device_id: PathText, backend: Master) -> DeviceStatsView:
    """What a device did, and how busy its latest samples were."""
    device = await _device(backend, device_id)
    rows = await backend.read(lambda reader: reader.heartbeats(device.device_id, LIST_MAX))
    return device_stats_view(device, rows)


@post("/devices/{device_id:str}/drain", status_code=200)
async def drain_device(device_id: PathText, backend: Master) -> DoneView:
    """Give a device nothing new, and take back what has not begun."""
    return await _drain(backend, device_id, on=True)


@post("/devices/{device_id:str}/resume", status_code=200)
async def resume_device(device_id: PathText, backend: Master) -> DoneView:
    """Let a drained device take part again."""
    return await _drain(backend, device_id, on=False)


@delete("/devices/{device_id:str}", status_code=200)
async def revoke_device(device_id: PathText, backend: Master) -> DoneView:
    """Refuse a device's key from now on; its tasks go elsewhere."""
    await order(backend, RevokeDevice(secrets.token_bytes(16), known_device(device_id)))
    return DoneView()


async def _device(backend: Backend, device_id: str) -> DeviceView:
    message = AskDevices(secrets.token_bytes(16), known_device(device_id))
    return (await ask(backend, message, list[DeviceView]))[0]


async def _drain(backend: Backend, device_id: str, *, on: bool) -> DoneView:
    await order(backend, DrainDevice(secrets.token_bytes(16), known_device(device_id), on))
    return DoneView()
