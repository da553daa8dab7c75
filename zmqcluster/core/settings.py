"""What the operator decides for the core, already checked. Durations in ms."""

from __future__ import annotations

from msgspec import Struct

from zmqcluster.model import Durability, Strategy


class Settings(Struct, frozen=True):
    """The core's part of the configuration.

    max_tasks_per_device: 0 is no cap. window_*, delayed_*: how much of the backlog is kept in
    memory, ready and waiting for a moment.
    """

    heartbeat_interval_ms: int = 5_000
    device_timeout_ms: int = 15_000
    task_timeout_ms: int = 900_000
    max_retry_count: int = 3
    max_tasks_per_device: int = 0
    strategy: Strategy = Strategy.LEAST_TASKS
    durability: Durability = Durability.FULL
    retention_ms: int = 7 * 24 * 3_600_000
    window_tasks: int = 50_000
    window_bytes: int = 64 * 1024 * 1024
    # More than one in flight refill hides the read; 4,096 tasks are 0.2 s of the fastest fleet.
    lane_tasks: int = 4_096
    lanes: int = 50_000
    delayed_tasks: int = 4_096
    delayed_bytes: int = 32 * 1024 * 1024
    # A closed connection is a dead process unless the device is back within this time.
    reconnect_grace_ms: int = 500
    # Keyed tasks start within this time of their arrival, or go back.
    start_within_ms: int = 1_000
    heartbeat_sample_ms: int = 30_000
    task_types: tuple[str, ...] = ()
    device_id: str = ""
