"""How hosts start, wear out and end; what is left when the agent is killed. Real processes."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgpack  # type: ignore[import-untyped]  # ships no types
import psutil  # type: ignore[import-untyped]  # ships no types
import pytest

from tests.support.host_bench import HostBench
from tests.support.host_processes import below, is_alive, wait_gone, wait_pid_in
from zmqcluster.errors import ConfigError, StartError
from zmqcluster.messages import RateRule, Started, TaskOrder, TaskResult, TypeOffer
from zmqcluster.model import Outcome, Pool
from zmqcluster.runtime import hosts_fleet
from zmqcluster.runtime.hosts import HostPool
from zmqcluster.runtime.hosts_settings import HostSettings


def windowed(task_id: int, task_type: str, **data: object) -> TaskOrder:
    """An order whose start the master waits for."""
    body: bytes = msgpack.packb(data)
    return TaskOrder(task_id, 1, task_type, body, 60_000, start_within_ms=60_000)


AGENT = """
import sys, time
from tests.support.host_bench import HostBench
bench = HostBench(sync_slots=2, start_method=sys.argv[3])
bench.submit(1, "h.grandchild_sync", path=sys.argv[1])
bench.submit(2, "h.grandchild", path=sys.argv[2])
bench.submit(3, "h.endless_sync")
while True:
    bench.turn(1.0)
"""


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_killed_agent_leaves_no_process_behind(tmp_path: Path, start_method: str) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    agent = subprocess.Popen([sys.executable, "-c", AGENT, *map(str, paths), start_method])
    try:
        daemons = [wait_pid_in(path) for path in paths]
        pids = {*below(agent.pid), *daemons}
    finally:
        agent.kill()
        agent.wait()

    wait_gone(list(pids), within_s=2.0)

    assert len(pids) >= 6, "a warden, three hosts, two daemons"


def test_killed_warden_takes_its_hosts_with_it() -> None:
    bench = HostBench(sync_slots=1)
    bench.submit(1, "h.hold_gil_sync")
    bench.until_started(1)
    bench.submit(2, "h.pid")
    host = bench.value(2)
    warden = _parent(host)

    os.kill(warden, signal.SIGKILL)

    wait_gone([host], within_s=2.0)
    assert bench.result(1).outcome is Outcome.DIED
    bench.close()


def test_modules_are_named_in_words_when_they_cannot_be_used(tmp_path: Path) -> None:
    for module, problem in [
        ("no.such.module", "there is no module 'no.such.module'"),
        ("tests.support.host_processes", "has no TaskExecutor class"),
    ]:
        pool = HostPool(HostSettings(modules=(module,), built_in=()))

        with pytest.raises(ConfigError, match=problem):
            pool.start()


def test_module_that_ends_the_process_is_a_start_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "suicidal.py").write_text("import os\nprint('farewell', flush=True)\nos._exit(9)\n")
    monkeypatch.syspath_prepend(tmp_path)
    pool = HostPool(HostSettings(modules=("suicidal",), built_in=()))

    with pytest.raises(StartError, match="farewell"):
        pool.start()


def test_module_that_starts_threads_gets_hosts_that_are_not_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "threaded.py").write_text(
        "import os, threading, time\n"
        "from executors.base import task\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "PID = os.getpid()\n"
        "@task('threaded')\n"
        "async def threaded(context) -> bool:\n"
        "    return PID == os.getpid()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    bench = HostBench(modules=("threaded",))
    bench.submit(1, "threaded")

    assert bench.value(1) is True, "imported in the host itself"
    bench.close()


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_pool_runs_both_kinds_with_either_start_method(start_method: str) -> None:
    bench = HostBench(start_method=start_method, sync_slots=2)
    for task_id in range(1, 21):
        bench.submit(task_id, "noop" if task_id % 2 else "noop_sync")

    assert {bench.result(task_id).outcome for task_id in range(1, 21)} == {Outcome.COMPLETED}
    bench.close()


def test_offers_and_slots_say_what_runs_here() -> None:
    pool = HostPool(HostSettings(built_in=("executors.builtin",), async_slots=7, sync_slots=3))
    pool.start()

    offers, slots = pool.offers(), pool.slots()

    pool.close()
    assert TypeOffer("noop", Pool.ASYNC) in offers
    assert TypeOffer("noop_sync", Pool.SYNC) in offers
    assert slots == {Pool.ASYNC: 7, Pool.SYNC: 3}


def test_type_that_is_not_offered_is_given_back() -> None:
    bench = HostBench()
    bench.submit(1, "nobody.knows")

    assert bench.result(1).outcome is Outcome.RETURNED
    bench.close()


def test_order_given_twice_runs_once() -> None:
    bench = HostBench()
    bench.submit(1, "noop")
    bench.submit(1, "noop")
    bench.submit(2, "noop")

    assert bench.result(2).outcome is Outcome.COMPLETED
    assert bench.result(1).outcome is Outcome.COMPLETED
    bench.close()


def test_started_is_told_of_what_runs_and_not_of_what_has_ended() -> None:
    bench = HostBench(sync_slots=1)
    bench.submit(1, "sleep_sync", seconds=60)
    bench.submit(2, "noop_sync")
    bench.until_started(1)
    bench.kill(1)
    bench.result(2)

    bench.close()
    started = [ref.task_id for one in bench.seen if isinstance(one, Started) for ref in one.refs]
    assert started[0] == 1
    assert len(started) == len(set(started))


@pytest.mark.parametrize("task_type", ["sleep", "sleep_sync"])
def test_order_with_a_window_has_started_once_its_host_begins_it(task_type: str) -> None:
    bench = HostBench(sync_slots=1)
    bench.pool.run(windowed(1, task_type, seconds=60))
    bench.turn(0)
    bench.turn(0)
    assert bench.seen == [], "its host is being started"

    bench.until_started(1)
    bench.kill(1)
    bench.result(1)

    bench.close()
    assert [type(one) for one in bench.seen] == [Started, TaskResult]


def test_executor_that_tells_its_begin_itself_is_believed() -> None:
    bench = HostBench()
    bench.pool.run(windowed(1, "h.late_begin"))

    bench.result(1)

    bench.close()
    kinds = [type(one) for one in bench.seen]
    assert kinds == [RateRule, Started, TaskResult], "the rule was told before the begin"


def test_start_nobody_knows_of_counts_when_its_host_dies() -> None:
    bench = HostBench()
    bench.pool.run(windowed(1, "h.late_begin", seconds=60))
    bench.submit(2, "h.pid")
    bench.result(2)
    bench.submit(3, "h.segfault")

    assert bench.result(1).outcome is Outcome.RETURNED

    bench.close()
    about_1 = [one for one in bench.seen if isinstance(one, Started) and one.refs[0].task_id == 1]
    assert len(about_1) == 1


def test_worn_host_is_replaced_without_losing_a_task() -> None:
    bench = HostBench(sync_slots=1, sync_tasks_max=3)
    for task_id in range(1, 11):
        bench.submit(task_id, "h.pid_sync")

    pids = [bench.value(task_id) for task_id in range(1, 11)]

    bench.close()
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 3, 1]


def test_grown_host_finishes_what_it_has_while_a_fresh_one_takes_over() -> None:
    bench = HostBench(grown_bytes_max=1)
    bench.submit(1, "sleep", seconds=3)
    bench.until_counted("hosts_replaced")
    bench.submit(2, "h.pid")
    bench.submit(3, "h.pid")

    assert bench.value(2) == bench.value(3)
    assert bench.value(1) == 3
    bench.close()


def test_worn_host_that_will_not_close_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts_fleet, "RETIRE_MS", 300)
    bench = HostBench(sync_slots=1, sync_tasks_max=1)
    bench.submit(1, "h.bad_loser_sync")
    host = bench.value(1)

    bench.until_counted("hosts_killed")
    deadline = time.monotonic() + 5
    while is_alive(host):
        assert time.monotonic() < deadline
        bench.turn(0.05)
    bench.submit(2, "noop_sync")

    assert bench.result(2).outcome is Outcome.COMPLETED
    bench.close()


def test_host_goes_before_the_agent_when_memory_runs_out() -> None:
    bench = HostBench(sync_slots=1)
    bench.submit(1, "h.victim_score_sync")

    assert bench.value(1) == 500
    bench.close()


def test_close_gives_back_what_runs_and_leaves_nothing() -> None:
    bench = HostBench(sync_slots=1)
    bench.submit(1, "sleep", seconds=60)
    bench.submit(2, "h.endless_sync")
    bench.submit(3, "noop_sync")
    bench.submit(4, "h.pid")
    host = bench.value(4)
    bench.until_started(2)

    reports = bench.pool.close(grace_ms=300)

    results = {one.task_id: one.outcome for one in reports if isinstance(one, TaskResult)}
    assert results == {1: Outcome.RETURNED, 2: Outcome.RETURNED, 3: Outcome.RETURNED}
    assert not is_alive(host)
    assert bench.pool.close() == []


def test_idle_pool_asks_for_nothing() -> None:
    bench = HostBench()
    bench.submit(1, "noop")
    bench.result(1)
    bench.turn(0.2)

    assert bench.pool.next_deadline_ms() is None
    assert select.select([bench.pool.fileno()], [], [], 0)[0] == []
    bench.close()


def test_fleet_keeps_up_with_many_small_tasks() -> None:
    """Far below what is measured (docs/executors.md), so that a busy machine passes too."""
    bench = HostBench(async_slots=200)
    began = time.perf_counter()
    for task_id in range(1, 10_001):
        bench.submit(task_id, "noop")

    while len(bench.results) < 10_000:
        bench.turn(1.0)

    elapsed_s = time.perf_counter() - began
    bench.close()
    assert elapsed_s < 3


def _parent(pid: int) -> int:
    parent: int = psutil.Process(pid).ppid()
    return parent
