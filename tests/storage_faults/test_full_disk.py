"""A real master on a disk that is really full: it says so, ends, and goes on when there is room."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from tests.support.cluster import Cluster, Node
from zmqcluster.client import DistributionClient, task
from zmqcluster.errors import MasterUnreachable

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

SMALL, LARGE = "3m", "64m"
FULL_LINE = "the disk is full: free some space and start again"
ANSWER_S = 0.5
DEADLINE_S = 30.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, SMALL."""
    folder = tmp_path / "data"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SMALL},mode=700", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    ) if shutil.which("mount") else None  # fmt: skip
    if made is None or made.returncode:
        pytest.skip("disk full: this machine cannot mount a tmpfs (it takes root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def cluster(tmp_path: Path, disk: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    assert cluster.data_dir == disk
    yield cluster
    cluster.close()


async def _fill(client: DistributionClient, master: Node, acknowledged: list[int]) -> None:
    """Submit until the master has ended."""
    rng = Random(1)
    while master.process.poll() is None:
        specs = [task("trace", {"path": rng.randbytes(2_000).hex()}) for _ in range(20)]
        with suppress(TimeoutError, MasterUnreachable):
            async with asyncio.timeout(ANSWER_S):
                answer = await client.submit_many(specs, watch=False)
                acknowledged.extend(answer.task_ids)


def _leave_no_room(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
        while ballast.write(bytes(4096)):
            pass


def _ended(node: Node) -> str:
    """Its log, once it has ended by itself, and not well."""
    assert node.process.wait(DEADLINE_S) == 1
    return node.log.read_text()


def test_a_full_disk_ends_the_master_in_one_line_and_room_brings_everything_back(
    cluster: Cluster, disk: Path
) -> None:
    acknowledged = list[int]()
    master = cluster.start_master()

    cluster.ask(lambda client: _fill(client, master, acknowledged))

    assert len(acknowledged) > 20
    assert f"ERROR - cannot save to the database: {FULL_LINE}" in _ended(master)

    _leave_no_room(disk)
    flags = ["--data-dir", str(disk), "--master-port", str(cluster.port)]
    log = _ended(Node("master", cluster.folder / "full.log", flags))
    assert "free some space and start again" in log
    assert "Master node started" not in log

    subprocess.run(["mount", "-o", f"remount,size={LARGE}", str(disk)], check=True)
    cluster.start_master()
    there = {task_id for (task_id,) in cluster.rows("SELECT task_id FROM tasks")}
    assert there >= set(acknowledged)
    assert cluster.submit("trace", {"path": "after"}) > max(there)
    assert cluster.rows("PRAGMA integrity_check") == [("ok",)]
