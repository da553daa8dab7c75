"""What a device says about itself, and the clocks it lives by."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest

from zmqcluster.codec import decode_inbound, encode
from zmqcluster.config import ClusterConfig
from zmqcluster.core.worker_identity import ENDED_REMEMBERED, Memory
from zmqcluster.messages import Heartbeat, Hello
from zmqcluster.model import NAME_CHARS_MAX, DeviceId, Role, SchedulerMode
from zmqcluster.runtime.clock import ManualClock, SystemClock
from zmqcluster.runtime.device_manager import DeviceManager
from zmqcluster.runtime.worker import host_settings
from zmqcluster.security.datadir import DataDir

DEVICE_ID = DeviceId("worker-1700000000-0badcafe")


def test_friendly_name_is_made_of_host_and_id_unless_given() -> None:
    assert DeviceManager(DEVICE_ID).name.endswith("-cafe")
    assert DeviceManager(DEVICE_ID, "attic").name == "attic"
    assert len(DeviceManager(DEVICE_ID, "x" * 500).name) == NAME_CHARS_MAX


def test_sources_are_the_clusters_and_data_is_the_workers_own(tmp_path: Path) -> None:
    config = ClusterConfig(mode=SchedulerMode.WORKER, data_dir=str(tmp_path))
    with DataDir(tmp_path).take_worker_folder() as folder:
        chosen = host_settings(config, folder, DEVICE_ID).executor

        assert chosen.sources_dir == str(tmp_path / "sources")
        assert chosen.data_dir == str(folder.path) != str(tmp_path)


def test_limit_of_a_tasks_memory_is_the_configured_one(tmp_path: Path) -> None:
    config = ClusterConfig(data_dir=str(tmp_path), task_memory_max=300)
    with DataDir(tmp_path).take_worker_folder() as folder:
        chosen = host_settings(config, folder, DEVICE_ID)

    assert chosen.rss_bytes_max == 300 * 1024 * 1024
    assert host_settings(ClusterConfig(task_memory_max=0), folder, DEVICE_ID).rss_bytes_max == 0


def test_capabilities_and_samples_pass_the_wire(tmp_path: Path) -> None:
    device = DeviceManager(DEVICE_ID, disk_path=str(tmp_path))
    able = device.capabilities()
    hello = Hello(1, DEVICE_ID, b"b" * 16, device.name, able, (), (), (), 0)
    beat = Heartbeat(1, 1, device.sample(1_000), 0, 0, 0)

    assert decode_inbound(Role.WORKER, encode(hello)) == hello
    assert decode_inbound(Role.WORKER, encode(beat)) == beat
    assert able.cpu_count >= 1
    assert able.memory_bytes > 0
    assert 0 < beat.resources.memory_pct <= 100
    assert not any(address.startswith("127.") for address in able.addresses)


def test_network_rates_are_per_second_since_the_last_sample(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Counters:
        bytes_sent = 10_000
        bytes_recv = 50_000

    counters = Counters()
    monkeypatch.setattr("psutil.net_io_counters", lambda: counters)
    device = DeviceManager(DEVICE_ID)
    first = device.sample(1_000)
    counters.bytes_sent, counters.bytes_recv = 20_000, 40_000

    second = device.sample(3_000)

    assert (first.net_sent_bps, first.net_received_bps) == (0, 0)
    # A counter that ran backwards (an interface went away) is no negative rate.
    assert (second.net_sent_bps, second.net_received_bps) == (5_000, 0)


def test_disk_that_is_gone_does_not_stop_the_beats() -> None:
    assert DeviceManager(DEVICE_ID, disk_path="/no/such/place").sample(1).disk_pct == 0


def test_start_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    DeviceManager(DEVICE_ID).start(1_000)

    assert caplog.messages == ["DeviceManager started"]


def test_system_clock_runs_forward_and_knows_the_year() -> None:
    clock = SystemClock()

    earlier, later = clock.monotonic_ms(), clock.monotonic_ms()

    assert 0 < earlier <= later
    assert abs(clock.wall_ms() - time.time() * 1000) < 60_000


def test_manual_clock_moves_when_told_and_wall_steps_leave_cluster_time_alone() -> None:
    clock = ManualClock(1_000, 5_000)
    clock.advance(250)

    clock.step_wall(-4_000)

    assert (clock.monotonic_ms(), clock.wall_ms()) == (1_250, 1_250)


def test_memory_of_ended_attempts_is_bounded_and_keeps_the_last() -> None:
    memory = Memory()
    memory.ended(1, 3)
    memory.ended(1, 2)
    assert memory.newest(1) == 3

    for task_id in range(2, 3 * ENDED_REMEMBERED):
        memory.ended(task_id, 1)

    assert memory.newest(1) == 0
    assert memory.newest(3 * ENDED_REMEMBERED - ENDED_REMEMBERED // 2) == 1
