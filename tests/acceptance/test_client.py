"""The library, against a real master: what a program of the user's own does."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tests.support.cluster import Cluster, wait_until
from zmqcluster.client import DistributionClient, task, unpack
from zmqcluster.core.client_events import ClientEvent, FromMaster
from zmqcluster.errors import RequestRefused, StartError
from zmqcluster.messages import Finished, TaskEnd
from zmqcluster.model import DeviceState, TaskId, TaskState

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(60)]

Make = Callable[..., Cluster]


def test_results_come_back_in_the_order_asked_for(make_cluster: Make) -> None:
    cluster = make_cluster()
    cluster.start_master()
    cluster.start_worker()

    async def work(client: DistributionClient) -> list[object]:
        specs = [task("echo", {"value": number}) for number in range(50)]
        answer = await client.submit_many(specs, job_name="echoes")
        ends = await client.wait(reversed(answer.task_ids), timeout_s=20)
        return [unpack(end.result) for end in ends]

    assert cluster.ask(work) == list(reversed(range(50)))


def test_wait_goes_on_across_a_master_killed_and_restarted(make_cluster: Make) -> None:
    cluster = make_cluster()
    master = cluster.start_master()
    cluster.start_worker()

    async def work(client: DistributionClient) -> list[TaskEnd]:
        ids = [await client.submit("sleep", {"seconds": 3.0}) for _ in range(3)]
        waiting = asyncio.create_task(client.wait(ids, timeout_s=40))
        running = lambda: cluster.counts().get("running") == 3  # noqa: E731  # said once
        await asyncio.to_thread(wait_until, running, "all three run")
        await asyncio.to_thread(master.kill)
        await asyncio.to_thread(cluster.start_master)
        return await waiting

    ends = cluster.ask(work)

    assert [end.state for end in ends] == [TaskState.COMPLETED] * 3
    assert [end.attempt for end in ends] == [1] * 3


def test_task_that_ended_before_anybody_waited_is_told_at_once(make_cluster: Make) -> None:
    cluster = make_cluster()
    cluster.start_master()
    cluster.start_worker()
    task_id = cluster.submit("echo", {"value": "early"})
    cluster.wait_state(task_id, "completed")

    async def work(client: DistributionClient) -> list[TaskEnd]:
        return await client.wait([TaskId(task_id), TaskId(999)], timeout_s=5)

    [end, unknown] = cluster.ask(work)

    assert unpack(end.result) == "early"
    assert "no such task" in unknown.error


def test_refusals_name_the_task_and_the_field(make_cluster: Make) -> None:
    cluster = make_cluster()
    cluster.start_master()

    async def work(client: DistributionClient) -> None:
        await client.submit_many([task("noop"), task("sleep", {"seconds": "long"})])

    with pytest.raises(RequestRefused, match=r"task 1: .*seconds"):
        cluster.ask(work)
    assert cluster.counts() == {}


def test_program_as_a_device_registers_beats_drains_and_leaves(make_cluster: Make) -> None:
    cluster = make_cluster(heartbeat_interval=0.3, device_timeout=1.5)
    cluster.start_master()

    async def work(client: DistributionClient) -> list[str]:
        seen = []
        device_id = await client.register_device("my-program", name="Mine", labels=["eu"])
        await client.start_heartbeat()
        # Longer than the lease: only beats keep it.
        await asyncio.sleep(2.0)
        [view] = await client.devices(device_id)
        seen.append(view.state)
        await client.update_device_status(DeviceState.DRAINING)
        [view] = await client.devices(device_id)
        seen.append(view.state)
        await client.update_device_status(DeviceState.OFFLINE)
        return seen

    assert cluster.ask(work) == ["online", "draining"]
    state = "SELECT state, name FROM devices WHERE device_id = 'my-program'"
    wait_until(lambda: cluster.rows(state) == [("offline", "Mine")], "it is offline", 5)


def test_device_that_stops_beating_is_lost(make_cluster: Make) -> None:
    cluster = make_cluster(heartbeat_interval=0.3, device_timeout=1.0)
    cluster.start_master()

    async def work(client: DistributionClient) -> str:
        device_id = await client.register_device("quiet")
        await client.start_heartbeat()
        await client.stop_heartbeat()
        while True:
            [view] = await client.devices(device_id)
            if view.state == "offline":
                return view.state
            await asyncio.sleep(0.05)

    assert cluster.ask(work) == "offline"


def test_client_without_a_master_to_learn_from_says_so(make_cluster: Make) -> None:
    cluster = make_cluster()

    with pytest.raises(StartError, match="start a master"):
        DistributionClient.of_data_dir(cluster.data_dir)


def test_wait_after_a_retry_waits_for_the_new_end(make_cluster: Make) -> None:
    cluster = make_cluster()
    cluster.start_master()

    async def work(client: DistributionClient) -> list[str]:
        task_id = await client.submit("echo", {"value": 1})
        await client.cancel([task_id])
        seen = [(await client.wait([task_id], timeout_s=5))[0].state]
        await client.retry([task_id])
        await asyncio.to_thread(cluster.start_worker)
        seen.append((await client.wait([task_id], timeout_s=10))[0].state)
        return [str(state) for state in seen]

    assert cluster.ask(work) == ["cancelled", "completed"]


def test_end_that_got_lost_on_its_way_is_asked_for(
    make_cluster: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zmqcluster.core.client.WATCH_AGAIN_MS", 500)
    cluster = make_cluster()
    cluster.start_master()
    cluster.start_worker()

    async def work(client: DistributionClient) -> TaskEnd:
        feed, lost = client._feed, asyncio.Event()

        def feed_but_ends(*events: ClientEvent) -> None:
            for event in events:
                if isinstance(event, FromMaster) and isinstance(event.message, Finished):
                    lost.set()
                else:
                    feed(event)

        with monkeypatch.context() as deaf:
            deaf.setattr(client, "_feed", feed_but_ends)
            task_id = await client.submit("echo", {"value": 1})
            await asyncio.wait_for(lost.wait(), 10)
        return (await client.wait([task_id], timeout_s=10))[0]

    assert cluster.ask(work).state is TaskState.COMPLETED
