"""The promises of the cluster, tried on real processes; each name is the claim."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # ships no types
import pytest

from tests.support.cluster import (
    Cluster,
    free_ports,
    freeze,
    holder,
    lives,
    thaw,
    trace_lines,
    wait_until,
)
from zmqcluster.client import DistributionClient, task
from zmqcluster.errors import MasterUnreachable

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

Make = Callable[..., Cluster]


def test_no_acknowledged_submission_is_lost_when_the_master_is_killed(make_cluster: Make) -> None:
    cluster = make_cluster()
    master = cluster.start_master()
    acknowledged: list[int] = []
    killed = threading.Event()

    async def submit_until_killed(client: DistributionClient) -> None:
        while not killed.is_set():
            try:
                async with asyncio.timeout(1.0):
                    answer = await client.submit_many([task("noop")] * 20, watch=False)
            except (TimeoutError, MasterUnreachable):
                return
            acknowledged.extend(answer.task_ids)

    for _ in range(3):
        killed.clear()
        began = len(acknowledged)
        thread = threading.Thread(target=cluster.ask, args=(submit_until_killed,))
        thread.start()
        wait_until(lambda: len(acknowledged) > began + 500, "submissions flow")  # noqa: B023
        master.kill()
        killed.set()
        thread.join()
        master = cluster.start_master()

    kept = {row[0] for row in cluster.rows("SELECT task_id FROM tasks")}
    assert len(acknowledged) > 1500
    assert set(acknowledged) <= kept
    assert len(set(acknowledged)) == len(acknowledged)


def test_killed_workers_tasks_run_elsewhere_within_two_seconds(
    make_cluster: Make, tmp_path: Path
) -> None:
    cluster = make_cluster()
    cluster.start_master()
    workers = [cluster.start_worker(), cluster.start_worker()]
    trace = tmp_path / "trace"
    task_id = cluster.submit("trace", {"path": str(trace), "seconds": 3.0})
    wait_until(lambda: trace_lines(trace, "start"), "it runs")
    first = holder(workers, int(trace_lines(trace, "start")[0][3]))

    killed = time.monotonic()
    first.kill()

    wait_until(lambda: len(trace_lines(trace, "start")) == 2, "it runs again", 10)
    began_again = float(trace_lines(trace, "start")[1][4])
    assert began_again - killed < 2.0
    cluster.wait_state(task_id, "completed")
    assert len(trace_lines(trace, "end")) == 1


def test_silent_hosts_tasks_run_elsewhere_after_the_timeout(
    make_cluster: Make, tmp_path: Path
) -> None:
    timeout_s = 3.0
    cluster = make_cluster(heartbeat_interval=1.0, device_timeout=timeout_s)
    cluster.start_master()
    workers = [cluster.start_worker(), cluster.start_worker()]
    trace = tmp_path / "trace"
    task_id = cluster.submit("trace", {"path": str(trace), "seconds": 4.0})
    wait_until(lambda: trace_lines(trace, "start"), "it runs")
    first = holder(workers, int(trace_lines(trace, "start")[0][3]))

    freeze(first.pid)
    frozen = time.monotonic()

    wait_until(lambda: len(trace_lines(trace, "start")) == 2, "it runs again", 15)
    began_again = float(trace_lines(trace, "start")[1][4])
    # The last beat came before the freeze, so the lease ends at most one timeout after it.
    assert began_again - frozen < timeout_s + 2.0
    # It finds its lease and its attempt gone, and speaks of it while the second one still runs.
    thaw(first.pid)
    fenced = "SELECT count(*) FROM events WHERE kind = 'result_fenced'"
    wait_until(lambda: cluster.rows(fenced)[0][0] == 1, "the late result is fenced")
    cluster.wait_state(task_id, "completed")
    assert "2" in [line[2] for line in trace_lines(trace, "end")], "the second one's end counted"
    attempts = "SELECT attempt, outcome FROM task_assignments WHERE task_id = ? ORDER BY attempt"
    assert cluster.rows(attempts, task_id) == [(1, "device_lost"), (2, "completed")]


def test_restarting_the_master_does_not_disturb_running_tasks(
    make_cluster: Make, tmp_path: Path
) -> None:
    cluster = make_cluster()
    master = cluster.start_master()
    cluster.start_worker()
    trace = tmp_path / "trace"
    data = {"path": str(trace), "seconds": 4.0}
    ids = [cluster.submit(kind, data) for kind in ("trace", "trace_sync")]
    wait_until(lambda: len(trace_lines(trace, "start")) == 2, "both run")

    master.kill()
    cluster.start_master()

    for task_id in ids:
        cluster.wait_state(task_id, "completed")
    assert len(trace_lines(trace, "start")) == 2
    assert cluster.rows("SELECT attempt FROM tasks") == [(1,), (1,)]


def test_results_ended_while_the_master_was_away_count_once(
    make_cluster: Make, tmp_path: Path
) -> None:
    cluster = make_cluster()
    master = cluster.start_master()
    cluster.start_worker()
    trace = tmp_path / "trace"
    task_id = cluster.submit("trace", {"path": str(trace), "seconds": 0.5})
    wait_until(lambda: trace_lines(trace, "start"), "it runs")

    master.kill()
    wait_until(lambda: trace_lines(trace, "end"), "it ends without a master")
    cluster.start_master()

    cluster.wait_state(task_id, "completed")
    assert cluster.rows("SELECT attempt, outcome FROM task_assignments") == [(1, "completed")]


def test_one_task_a_unique_key_across_a_restart_and_racing_clients(make_cluster: Make) -> None:
    cluster = make_cluster()
    master = cluster.start_master()
    specs = [task("noop", unique_key=f"key {number}") for number in range(200)]
    first = cluster.ask(lambda client: client.submit_many(specs, job_name="once"))

    async def race(client: DistributionClient) -> None:
        await asyncio.gather(
            *(client.submit_many(specs, job_id=first.job_id, watch=False) for _ in range(10))
        )

    cluster.ask(race)
    master.kill()
    cluster.start_master()
    again = cluster.ask(lambda client: client.submit_many(specs, job_id=first.job_id))

    assert again.task_ids == first.task_ids
    assert cluster.rows("SELECT count(*) FROM tasks") == [(200,)]


def test_master_memory_does_not_grow_with_the_backlog(make_cluster: Make) -> None:
    cluster = make_cluster()
    master = cluster.start_master()
    process = psutil.Process(master.pid)

    def submit(count: int) -> None:
        async def work(client: DistributionClient) -> None:
            for _ in range(count // 10_000):
                await client.submit_many([task("echo", {"value": 1})] * 10_000, watch=False)

        cluster.ask(work)

    submit(100_000)
    settled = process.memory_info().rss
    submit(300_000)

    grown = process.memory_info().rss - settled
    # In memory a task takes about 600 bytes: 300,000 of them would be 180 MB.
    assert grown < 60_000_000
    assert cluster.counts() == {"pending": 400_000}


@pytest.mark.parametrize(
    ("task_type", "data"),
    [("segfault", {}), ("vanish", {}), ("hold_gil", {"path": "t"}), ("hold_loop", {"path": "t"})],
)
def test_no_task_can_kill_block_or_starve_the_agent(
    make_cluster: Make, tmp_path: Path, task_type: str, data: dict[str, str]
) -> None:
    cluster = make_cluster(heartbeat_interval=0.5, device_timeout=2.0, max_retry_count=0)
    cluster.start_master()
    cluster.start_worker()
    if data:
        data = {"path": str(tmp_path / "trace")}

    task_id = cluster.submit(task_type, data, timeout_s=4.0)

    wait_until(lambda: cluster.state(task_id) in ("failed", "dead"), "it is ended", 60)
    other = cluster.submit("echo", {"value": 1})
    cluster.wait_state(other, "completed")
    events = {row[0] for row in cluster.rows("SELECT DISTINCT kind FROM events")}
    assert "device_lost" not in events
    assert {"task_died", "task_timed_out"} & events


def test_killed_agent_leaves_no_process_behind(make_cluster: Make, tmp_path: Path) -> None:
    cluster = make_cluster()
    cluster.start_master()
    worker = cluster.start_worker()
    trace = tmp_path / "trace"
    cluster.submit("trace_sync", {"path": str(trace), "seconds": 600.0})
    cluster.submit("hold_gil", {"path": str(trace)})
    wait_until(lambda: len(trace_lines(trace, "start")) == 2, "both run")
    hosts = [int(line[3]) for line in trace_lines(trace, "start")]

    worker.kill()

    wait_until(lambda: not any(lives(pid) for pid in hosts), "the hosts are dead", 2.0)


def test_cancelled_means_that_the_process_is_gone(make_cluster: Make, tmp_path: Path) -> None:
    cluster = make_cluster()
    cluster.start_master()
    cluster.start_worker()
    trace = tmp_path / "trace"
    task_id = cluster.submit("trace_sync", {"path": str(trace), "seconds": 600.0})
    wait_until(lambda: trace_lines(trace, "start"), "it runs")
    host = int(trace_lines(trace, "start")[0][3])

    changed = cluster.ask(lambda client: client.cancel([task_id]))

    assert changed.task_ids == (task_id,)
    cluster.wait_state(task_id, "cancelled", 10)
    assert not lives(host)
    waiting = cluster.submit("noop", not_before=time.time() + 3600)
    cluster.ask(lambda client: client.cancel([waiting]))
    assert cluster.state(waiting) == "cancelled"


def test_cancel_acknowledged_before_a_kill_holds_after_it(
    make_cluster: Make, tmp_path: Path
) -> None:
    cluster = make_cluster()
    master = cluster.start_master()
    worker = cluster.start_worker()
    trace = tmp_path / "trace"
    task_id = cluster.submit("trace_sync", {"path": str(trace), "seconds": 5.0})
    wait_until(lambda: trace_lines(trace, "start"), "it runs")
    freeze(worker.pid)
    cluster.ask(lambda client: client.cancel([task_id]))
    master.kill()

    cluster.start_master()
    thaw(worker.pid)

    cluster.wait_state(task_id, "cancelled")
    assert trace_lines(trace, "end") == []
    assert len(trace_lines(trace, "start")) == 1


def test_three_deaths_make_a_task_dead_with_the_evidence_kept(make_cluster: Make) -> None:
    cluster = make_cluster()
    cluster.start_master()
    cluster.start_worker()

    task_id = cluster.submit("segfault")

    cluster.wait_state(task_id, "dead", 60)
    rows = cluster.rows("SELECT outcome, error FROM task_assignments WHERE task_id = ?", task_id)
    assert [outcome for outcome, _ in rows] == ["died"] * 3
    assert all("SIGSEGV" in error or "signal 11" in error for _, error in rows)
    kinds = cluster.rows("SELECT count(*) FROM events WHERE kind = 'task_died'")
    assert kinds == [(3,)]


def test_drained_worker_hands_back_what_waits_and_finishes_what_runs(
    make_cluster: Make, tmp_path: Path
) -> None:
    cluster = make_cluster(concurrent_tasks=1)
    cluster.start_master()
    worker = cluster.start_worker()
    trace = tmp_path / "trace"
    ids = [cluster.submit("trace", {"path": str(trace), "seconds": 1.5}) for _ in range(3)]
    wait_until(lambda: trace_lines(trace, "start"), "the first runs")

    worker.signal(signal.SIGTERM)

    assert worker.process.wait(15) == 0
    assert cluster.state(ids[0]) == "completed"
    assert cluster.counts() == {"completed": 1, "pending": 2}
    assert len(trace_lines(trace, "start")) == 1


def test_second_master_on_the_same_data_is_refused(make_cluster: Make) -> None:
    cluster = make_cluster()
    cluster.start_master()

    second = cluster._start("master", "--master-port", str(free_ports(3)))

    assert second.process.wait(20) == 1
    assert "another master" in second.log.read_text()


def test_every_loss_is_an_event_and_a_counter(make_cluster: Make, tmp_path: Path) -> None:
    cluster = make_cluster()
    cluster.start_master()
    worker = cluster.start_worker()
    trace = tmp_path / "trace"
    task_id = cluster.submit("trace", {"path": str(trace), "seconds": 600.0})
    wait_until(lambda: trace_lines(trace, "start"), "it runs")

    worker.kill()

    lost = "SELECT task_id FROM events WHERE kind = 'task_device_lost'"
    wait_until(lambda: cluster.rows(lost), "the loss is an event", 5)
    assert cluster.rows(lost) == [(task_id,)]
    counters = cluster.ask(lambda client: client.status()).counters
    assert counters["device_lost"] == 1
    assert counters["task_device_lost"] == 1


assert os.name == "posix", "these tests send signals"
