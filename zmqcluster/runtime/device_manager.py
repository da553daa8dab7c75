"""DeviceManager: who this device is, what it can do, and how busy it is."""

from __future__ import annotations

import ipaddress
import logging
import os
import platform
import socket
from typing import Final

import psutil  # type: ignore[import-untyped]  # ships no types

from zmqcluster import __version__
from zmqcluster.messages import Capabilities, Resources
from zmqcluster.model import NAME_CHARS_MAX, DeviceId

_ADDRESSES_MAX: Final = 16
# Interfaces that come and go with containers say nothing about where a device can be reached.
_TRANSIENT: Final = ("lo", "veth", "docker", "br-", "virbr")

log = logging.getLogger(__name__)


class DeviceManager:
    """This node's identity, capabilities and load; registering and beating is the core's part.

    name: as given by the operator, else made of the host's name and the end of the device id.
    disk_path: the disk whose use is reported.
    """

    def __init__(self, device_id: DeviceId, name: str = "", disk_path: str = ".") -> None:
        self.device_id = device_id
        self.name = (name or f"{socket.gethostname()}-{device_id[-4:]}")[:NAME_CHARS_MAX]
        self._disk_path = disk_path
        self._sampled_ms = 0
        self._sent_bytes = 0
        self._received_bytes = 0

    def start(self, now_ms: int) -> None:
        """Begin to count: the first sample then says something."""
        psutil.cpu_percent(None)
        self.sample(now_ms)
        log.info("DeviceManager started")

    def capabilities(self) -> Capabilities:
        """What this device is, for the fleet's list and the weighted strategy."""
        return Capabilities(
            host=socket.gethostname()[:NAME_CHARS_MAX],
            platform=f"{platform.system()} {platform.machine()}"[:NAME_CHARS_MAX],
            cpu_count=_usable_cpus(),
            memory_bytes=psutil.virtual_memory().total,
            addresses=_addresses(),
            version=__version__,
        )

    def sample(self, now_ms: int) -> Resources:
        """What this device uses right now; network rates are since the last sample."""
        memory = psutil.virtual_memory()
        sent_bps, received_bps = self._network_bps(now_ms)
        return Resources(
            cpu_pct=psutil.cpu_percent(None),
            memory_pct=memory.percent,
            memory_bytes=memory.used,
            disk_pct=self._disk_pct(),
            net_sent_bps=sent_bps,
            net_received_bps=received_bps,
        )

    def _network_bps(self, now_ms: int) -> tuple[int, int]:
        counters = psutil.net_io_counters()
        if counters is None:
            return 0, 0
        elapsed_ms = now_ms - self._sampled_ms
        is_first = not self._sampled_ms or elapsed_ms <= 0
        sent = max(0, counters.bytes_sent - self._sent_bytes)
        received = max(0, counters.bytes_recv - self._received_bytes)
        self._sampled_ms = now_ms
        self._sent_bytes, self._received_bytes = counters.bytes_sent, counters.bytes_recv
        if is_first:
            return 0, 0
        return sent * 1000 // elapsed_ms, received * 1000 // elapsed_ms

    def _disk_pct(self) -> float:
        try:
            return float(psutil.disk_usage(self._disk_path).percent)
        except OSError:
            return 0.0


def _usable_cpus() -> int:
    """Cores this process may use, not those the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS has no affinity.
        return os.cpu_count() or 1


def _addresses() -> tuple[str, ...]:
    """Where this device may be reached, IPv4 first; no loopback, no link-local."""
    found: list[tuple[int, str]] = []
    for interface, entries in psutil.net_if_addrs().items():
        if interface.startswith(_TRANSIENT):
            continue
        for entry in entries:
            if entry.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            address = ipaddress.ip_address(entry.address.partition("%")[0])
            if not (address.is_loopback or address.is_link_local):
                found.append((address.version, str(address)))
    return tuple(text for _, text in sorted(set(found))[:_ADDRESSES_MAX])
