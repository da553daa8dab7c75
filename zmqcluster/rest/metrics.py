"""The text of /metrics, in the exposition format of Prometheus (0.0.4)."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Iterable, Mapping
from typing import Final

import msgspec
import psutil  # type: ignore[import-untyped]  # it ships no types

from zmqcluster.views import OverviewView

METRICS_TYPE: Final = "text/plain; version=0.0.4"
_NOT_IN_NAMES: Final = re.compile(r"[^a-z0-9_]+")

Sample = tuple[str, float]


def metrics_text(
    overview: OverviewView, counters: Mapping[str, float], answered: Mapping[int, int]
) -> str:
    """All metrics. counters: of the runtime; answered: HTTP requests by status.

    Called in the event loop of the REST service, whose asyncio tasks it counts.
    """
    tasks = [(f'{{state="{name}"}}', value) for name, value in _fields(overview.tasks)]
    statuses = [(f'{{status="{status}"}}', answered[status]) for status in sorted(answered)]
    lines = [
        *_metric("zmqcluster_tasks", "gauge", "Tasks by state.", tasks),
        *_one("zmqcluster_devices", "gauge", "Devices known.", overview.devices_total),
        *_one("zmqcluster_devices_online", "gauge", "Devices online.", overview.devices_online),
        *_one("zmqcluster_slots", "gauge", "Tasks the fleet can run at once.", overview.slots),
        *_one("zmqcluster_jobs_active", "gauge", "Jobs with open tasks.", overview.jobs_active),
        *_one("zmqcluster_window_tasks", "gauge", "Tasks in memory.", overview.window_tasks),
        *_one("zmqcluster_epoch", "gauge", "Starts of the master so far.", overview.epoch),
        *_one("zmqcluster_uptime_seconds", "gauge", "Since the start.", overview.uptime_s),
        *_metric("zmqcluster_http_requests_total", "counter", "HTTP requests.", statuses),
        *_one("zmqcluster_http_tasks", "gauge", "Asyncio tasks alive.", len(asyncio.all_tasks())),
    ]
    counted = {**overview.counters, **counters}
    for name in sorted(counted):
        safe = _NOT_IN_NAMES.sub("_", name.lower()).strip("_")
        lines += _one(f"zmqcluster_{safe}_total", "counter", "Since the start.", counted[name])
    return "\n".join([*lines, *_process(), ""])


def _process() -> list[str]:
    """The usual metrics of a process, under their usual names."""
    process = psutil.Process(os.getpid())
    with process.oneshot():
        memory, cpu = process.memory_info().rss, process.cpu_times()
        files, threads = process.num_fds(), process.num_threads()
    return [
        *_one("process_resident_memory_bytes", "gauge", "Memory in use.", memory),
        *_one("process_cpu_seconds_total", "counter", "CPU used.", cpu.user + cpu.system),
        *_one("process_open_fds", "gauge", "Open file descriptors.", files),
        *_one("process_threads", "gauge", "Threads.", threads),
    ]


def _fields(counts: msgspec.Struct) -> Iterable[Sample]:
    return [(name, getattr(counts, name)) for name in counts.__struct_fields__]


def _one(name: str, kind: str, text: str, value: float) -> list[str]:
    return _metric(name, kind, text, [("", value)])


def _metric(name: str, kind: str, text: str, samples: Iterable[Sample]) -> list[str]:
    return [
        f"# HELP {name} {text}",
        f"# TYPE {name} {kind}",
        *(f"{name}{labels} {value}" for labels, value in samples),
    ]
