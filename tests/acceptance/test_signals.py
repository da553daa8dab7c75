"""Signals at bad moments: many at once, before there is a master, while waiting."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.support.cluster import Cluster, wait_until

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


def test_interrupt_is_told_by_the_exit_code(make_cluster: Make) -> None:
    cluster = make_cluster()
    node = cluster.start_master()

    node.signal(signal.SIGINT)

    assert node.process.wait(10) == 130
