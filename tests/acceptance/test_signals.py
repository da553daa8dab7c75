"""Signals at bad moments: many at once, before there is a master, while waiting."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable

import pytest

from tests.support.cluster import Cluster, Node, wait_until
from zmqcluster.client import DistributionClient, task

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(60)]

Make = Callable[..., Cluster]


@pytest.mark.parametrize("verb", ["master", "worker", "standalone"])
def test_storm_of_signals_ends_a_process_promptly(make_cluster: Make, verb: str) -> None:
    cluster = make_cluster()
    node = cluster._start(verb, "--master-port", str(cluster.port))
    node.wait_for("TaskScheduler started")

    for _ in range(200):
        if node.process.poll() is not None:
            break
        os.kill(node.pid, signal.SIGTERM)

    wait_until(lambda: node.process.poll() is not None, "it has ended", 15)


def test_worker_that_waits_for_its_master_ends_at_the_first_signal(make_cluster: Make) -> None:
    cluster = make_cluster()
    node = cluster._start("worker", "--master-port", str(cluster.port))
    node.wait_for("TaskScheduler started")

    node.signal(signal.SIGTERM)

    assert node.process.wait(10) == 0


def test_end_of_the_terminal_drains_like_a_polite_request(make_cluster: Make) -> None:
    cluster = make_cluster()
    node = cluster.start_master()

    node.signal(signal.SIGHUP)

    assert node.process.wait(10) == 0
    assert node.says("Stopping (SIGHUP)")


def test_interrupt_is_told_by_the_exit_code(make_cluster: Make) -> None:
    cluster = make_cluster()
    node = cluster.start_master()

    node.signal(signal.SIGINT)

    assert node.process.wait(10) == 130


def test_master_ends_promptly_in_the_middle_of_a_large_cancel(make_cluster: Make) -> None:
    cluster = make_cluster()
    master = cluster.start_master()

    async def work(client: DistributionClient) -> None:
        answer = await client.submit_many([task("noop")] * 10_000, job_name="big", watch=False)
        for _ in range(14):
            await client.submit_many([task("noop")] * 10_000, job_id=answer.job_id, watch=False)
        await client.cancel(job_id=answer.job_id)

    cluster.ask(work)
    began = time.monotonic()
    master.signal(signal.SIGTERM)

    assert master.process.wait(15) == 0
    assert time.monotonic() - began < 5
    cluster.start_master()
    wait_until(lambda: cluster.counts() == {"cancelled": 150_000}, "the cancel goes on", 40)


def test_second_signal_ends_a_master_that_still_waits_for_a_slow_client(
    make_cluster: Make,
) -> None:
    cluster = make_cluster()
    master = cluster.start_master()
    with socket.create_connection(("127.0.0.1", cluster.port)) as slow:
        slow.sendall(b"POST /api/distribution/tasks HTTP/1.1\r\nHost: localhost\r\n")

        master.signal(signal.SIGTERM)
        master.wait_for("Stopping")
        wait_until(lambda: _ends_after(master), "the second signal ends it", 5)

    assert master.process.returncode in (0, 130)


def _ends_after(node: Node) -> bool:
    if node.process.poll() is None:
        node.signal(signal.SIGTERM)
    return node.process.poll() is not None
