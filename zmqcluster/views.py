"""What the master tells people and programs about itself: answers to Ask… messages, and REST.

Field names are the JSON names. Durations end in their unit; `*_wall` instants are wall-clock ms.
"""

from __future__ import annotations

from msgspec import Struct, field


class View(Struct, forbid_unknown_fields=True):
    """Shared shape of all views: plain maps."""


class DeviceView(View):
    """One device, live. slots: most at once. assigned: in its hands, waiting or running."""

    device_id: str
    name: str
    state: str
    host: str = ""
    platform: str = ""
    cpu_count: int = 0
    memory_bytes: int = 0
    addresses: list[str] = field(default_factory=list)
    task_types: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    slots: int = 0
    assigned: int = 0
    running: int = 0
    completed: int = 0
    failed: int = 0
    lost: int = 0
    beat_age_ms: int | None = None
    cpu_pct: float = 0.0
    memory_pct: float = 0.0
    registered_wall: int = 0
    last_seen_wall: int = 0


class TaskCounts(View):
    """How many tasks are in each state."""

    pending: int = 0
    running: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    dead: int = 0


class RateKeyView(View):
    """A rate key with something waiting or running."""

    rate_key: str
    delay_ms: int
    concurrency: int
    running: int
    waiting: int
    open_in_ms: int


class OverviewView(View):
    """The cluster at a glance. counters: everything counted since this master started."""

    epoch: int
    uptime_s: float
    durability: str
    strategy: str
    device_id: str
    devices_online: int
    devices_total: int
    slots: int
    tasks: TaskCounts
    jobs_active: int
    window_tasks: int
    expiry_held: bool
    counters: dict[str, int] = field(default_factory=dict)
    rate_keys: list[RateKeyView] = field(default_factory=list)


class ExplainView(View):
    """Why a task is where it is, most telling reason first."""

    task_id: int
    state: str
    reasons: list[str]
