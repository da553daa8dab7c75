"""A crawler cluster that needs no broker: one master, any number of workers, SQLite underneath.

The names below are the library; they are looked up at first use, so that importing one part does
not load them all.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

__version__ = "0.1.0"

_HOMES: Final = {
    "DeviceManager": "zmqcluster.runtime.device_manager",
    "DistributionCLI": "zmqcluster.cli",
    "DistributionClient": "zmqcluster.client",
    "SchedulerMode": "zmqcluster.model",
    "TaskDispatcher": "zmqcluster.core.dispatcher",
    "TaskScheduler": "zmqcluster.scheduler",
    "get_async_distribution_client": "zmqcluster.client",
    "init_distribution_services": "zmqcluster.services",
    "start_distribution_services": "zmqcluster.services",
    "stop_distribution_services": "zmqcluster.services",
    "task": "zmqcluster.client",
}

__all__ = sorted([*_HOMES, "__version__"])  # one list, not two


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
