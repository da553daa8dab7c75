"""What goes wrong in a run, and how much: a swarm, drawn from the seed and printed with it.

Each class of fault is off in half of the runs: a fault that is always there hides what only shows
without it (swarm testing, Groce et al. 2012).
"""

from __future__ import annotations

from random import Random
from typing import Final

import msgspec
from msgspec import Struct

# Fault classes that can be left out one by one when a failing run is made smaller.
FAULTS: Final = (
    "loss", "duplicates", "reorder", "slow_links", "breaks", "half_open", "partitions",
    "worker_kills", "worker_pauses", "worker_gone", "clones", "clock_drift",
    "master_crashes", "commit_crashes", "master_pauses", "wall_steps", "slow_commits",
    "task_failures", "task_deaths", "task_hangs", "endless", "closures", "cancels", "retries",
    "drains", "hostile", "blackouts", "terminates", "power_losses", "client_crashes", "strategies",
    "revokes", "stale_masters",
)  # fmt: skip


class Options(Struct, frozen=True):
    """One run. *_every_ms: mean time between two faults of a kind; 0: none. Rates are 0..1."""

    seed: int
    # The cluster.
    devices: int = 3
    clients: int = 2
    slots: int = 3
    tasks: int = 60
    pages: int = 30
    origins: int = 2
    delay_ms: int = 200
    concurrency: int = 2
    beat_ms: int = 1_000
    timeout_ms: int = 3_000
    window_tasks: int = 50_000
    lane_tasks: int = 4_096
    lanes: int = 50_000
    delayed_tasks: int = 4_096
    # Seven days: no run takes so long.
    retention_ms: int = 604_800_000
    strategy: str = "least_tasks"
    # Links.
    latency_ms: int = 2
    loss: float = 0.0
    duplicates: float = 0.0
    reorder: float = 0.0
    slow_links: float = 0.0
    breaks_every_ms: int = 0
    half_open: float = 0.0
    partitions_every_ms: int = 0
    blackouts_every_ms: int = 0
    # Workers.
    worker_kills_every_ms: int = 0
    worker_pauses_every_ms: int = 0
    worker_gone: int = 0
    terminates_every_ms: int = 0
    power_losses: float = 0.0
    revokes: int = 0
    clones: int = 0
    clock_drift_ppm: int = 0
    # The master.
    master_crashes_every_ms: int = 0
    commit_crashes: float = 0.0
    master_pauses_every_ms: int = 0
    stale_masters: float = 0.0
    wall_steps_every_ms: int = 0
    slow_commits: float = 0.0
    # Tasks and people.
    task_failures: float = 0.0
    task_deaths: float = 0.0
    task_hangs: float = 0.0
    endless: int = 0
    closures: float = 0.0
    cancels_every_ms: int = 0
    retries_every_ms: int = 0
    drains_every_ms: int = 0
    strategies_every_ms: int = 0
    client_crashes_every_ms: int = 0
    hostile: int = 0

    def told(self) -> str:
        """Everything that is not as it is by default, for people."""
        default = Options(self.seed)
        names = [one for one in self.__struct_fields__ if one != "seed"]
        told = [
            f"{name}={getattr(self, name)}"
            for name in names
            if getattr(self, name) != getattr(default, name)
        ]
        return f"seed={self.seed} " + " ".join(told)

    def without(self, fault: str) -> Options:
        """The same run with one class of fault off."""
        names = [one for one in self.__struct_fields__ if one.startswith(fault)]
        return msgspec.structs.replace(self, **{name: 0 for name in names})


def draw(seed: int) -> Options:
    """The swarm of this seed."""
    rng = Random(f"swarm {seed}")

    def often(mean_ms: int) -> int:
        return round(mean_ms * rng.choice([0.3, 1, 3])) if rng.random() < 0.5 else 0

    def rate(most: float) -> float:
        return round(most * rng.random() ** 2, 4) if rng.random() < 0.5 else 0.0

    is_tight = rng.random() < 0.5
    devices = rng.choice([1, 2, 3, 4, 5])
    drawn = Options(
        seed,
        devices=devices,
        clients=rng.choice([1, 2, 3]),
        slots=rng.choice([1, 2, 4]),
        tasks=rng.choice([20, 60, 120]),
        pages=rng.choice([5, 20, 40]),
        origins=rng.choice([1, 2, 3]),
        delay_ms=rng.choice([0, 100, 500]),
        concurrency=rng.choice([0, 1, 2]),
        window_tasks=rng.choice([4, 16]) if is_tight else 50_000,
        lane_tasks=rng.choice([2, 8]) if is_tight else 4_096,
        delayed_tasks=rng.choice([2, 8]) if is_tight else 4_096,
        strategy=rng.choice(["least_tasks", "round_robin", "weighted", "random"]),
        latency_ms=rng.choice([1, 2, 20]),
        loss=rate(0.1),
        duplicates=rate(0.2),
        reorder=rate(0.2),
        slow_links=rate(0.05),
        breaks_every_ms=often(5_000),
        half_open=rate(1.0),
        partitions_every_ms=often(10_000),
        worker_kills_every_ms=often(10_000),
        worker_pauses_every_ms=often(10_000),
        worker_gone=rng.choice([0, 0, 1, devices - 1]),
        clones=rng.choice([0, 0, 1]),
        clock_drift_ppm=rng.choice([0, 0, 100]),
        master_crashes_every_ms=often(8_000),
        commit_crashes=rate(0.01),
        master_pauses_every_ms=often(15_000),
        wall_steps_every_ms=often(20_000),
        slow_commits=rate(0.1),
        task_failures=rate(0.3),
        task_deaths=rate(0.05),
        task_hangs=rate(0.05),
        cancels_every_ms=often(2_000),
        retries_every_ms=often(3_000),
        drains_every_ms=often(10_000),
        hostile=rng.choice([0, 0, 1]),
        blackouts_every_ms=often(20_000),
        terminates_every_ms=often(10_000),
        power_losses=rate(0.5),
        revokes=rng.choice([0, 0, 0, 1]) if devices > 1 else 0,
        endless=rng.choice([0, 0, 1, 3]),
        closures=rate(0.3),
        strategies_every_ms=often(10_000),
        client_crashes_every_ms=often(10_000),
        lanes=rng.choice([6, 20]) if is_tight else 50_000,
        stale_masters=rate(0.02),
    )
    if drawn.wall_steps_every_ms:
        # A clock that was set back and forward again makes what ended in between look old.
        return drawn
    retention_ms = rng.choice([150_000, drawn.retention_ms])
    return msgspec.structs.replace(drawn, retention_ms=retention_ms)
