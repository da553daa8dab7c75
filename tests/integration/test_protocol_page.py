"""The worker of docs/protocol.md, copied from the page as it stands, against a real master."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import msgpack  # type: ignore[import-untyped]  # it ships none
import pytest

from tests.support.cluster import free_ports, wait_until
from tests.support.wire_page import PAGE
from zmqcluster.client import DistributionClient
from zmqcluster.config import ClusterConfig
from zmqcluster.messages import TaskEnd
from zmqcluster.model import SchedulerMode, TaskState
from zmqcluster.services import DistributionServices

DEADLINE_S = 20.0
TYPE = "page.double"


@pytest.fixture
def config(tmp_path: Path) -> Iterator[ClusterConfig]:
    """Of a master that runs, and knows nothing of the page's task type."""
    port = free_ports(3)
    config = ClusterConfig(
        mode=SchedulerMode.MASTER,
        master_port=port,
        dispatch_port=port + 1,
        control_port=port + 2,
        data_dir=str(tmp_path / "data"),
        heartbeat_interval=0.2,
        device_timeout=0.6,
    )
    services = DistributionServices(config)
    services.start()
    yield config
    services.stop()


@pytest.fixture
def worker(config: ClusterConfig, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The one Python block of the page, run by an interpreter that cannot import this project."""
    _, code = PAGE.read_text().split("```python\n")
    script = tmp_path / "worker.py"
    script.write_text(code.split("```")[0])
    token = (Path(config.data_dir) / "join-token").read_text().strip()
    with ExitStack() as stack:
        log = stack.enter_context((tmp_path / "worker.log").open("wb"))
        process = subprocess.Popen(
            [sys.executable, "-I", str(script), token, "page-1"],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            yield process
            assert process.poll() is None, (tmp_path / "worker.log").read_text()
        finally:
            process.kill()
            process.wait()


def client_of(config: ClusterConfig) -> DistributionClient:
    return DistributionClient.of_data_dir(config.data_dir, "localhost", config.dispatch_port)


def is_online(config: ClusterConfig) -> bool:
    async def ask() -> bool:
        async with client_of(config) as client:
            return any(one.state == "online" for one in await client.devices())

    return asyncio.run(ask())


def doubled(config: ClusterConfig, numbers: range) -> list[TaskEnd]:
    """Ask for these, once the device is there, and wait for the ends."""
    wait_until(lambda: is_online(config), "the worker of the page is online", DEADLINE_S)

    async def ask() -> list[TaskEnd]:
        async with client_of(config) as client:
            ids = [await client.submit(TYPE, {"number": number}) for number in numbers]
            return await client.wait(ids, timeout_s=DEADLINE_S)

    return asyncio.run(ask())


def lost(config: ClusterConfig) -> int:
    """How often the master gave a device up, says its database."""
    database = Path(config.data_dir) / "cluster.db"
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        sql = "SELECT count(*) FROM events WHERE kind = 'device_lost'"
        return int(connection.execute(sql).fetchone()[0])


def test_the_worker_of_the_page_works(
    config: ClusterConfig, worker: subprocess.Popen[bytes]
) -> None:
    ends = doubled(config, range(20))

    assert {one.state for one in ends} == {TaskState.COMPLETED}
    assert [msgpack.unpackb(one.result) for one in ends] == [2 * n for n in range(20)]


def test_the_worker_of_the_page_keeps_its_session_by_its_beats(
    config: ClusterConfig, worker: subprocess.Popen[bytes]
) -> None:
    doubled(config, range(1))
    began = time.monotonic()

    # Three leases: a worker that did not beat would have been given up, and its connection stays.
    wait_until(lambda: time.monotonic() - began > 3 * config.device_timeout, "three leases")

    assert {one.state for one in doubled(config, range(3))} == {TaskState.COMPLETED}
    assert lost(config) == 0
