"""Processes that die, stop, starve and come back."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from tests.chaos.catalogue import Tier, fault
from tests.chaos.rig import Rig, Running
from tests.support.cgroups import Group
from tests.support.cluster import (
    ROOT,
    Node,
    family,
    free_ports,
    freeze,
    holder,
    lives,
    thaw,
    trace_lines,
    wait_until,
)
from zmqcluster.model import PROTOCOL_VERSION

# The rig's device_timeout, and what a promise adds to it.
TIMEOUT_S: Final = 3.0
SLACK_S: Final = 2.0
# A killed master that is started again serves within this.
BACK_S: Final = 5.0


@fault(1, "master killed under submissions, three times", tier=Tier.QUICK)
def master_killed(rig: Rig) -> None:
    cluster = rig.cluster
    master = cluster.start_master()
    cluster.start_worker()
    cluster.start_worker()
    runs = rig.running("trace", 4, seconds=5.0)
    with rig.load() as load:
        for number in range(3):
            rig.flows(load, 40)
            rig.pause(0, 0.1)
            rig.step(f"kill {number + 1}")
            master.kill()
            killed = time.monotonic()
            master = cluster.start_master()
            rig.flows(load, 1)
            took_s = time.monotonic() - killed
            rig.step(f"it serves again after {took_s:.1f} s")
            assert took_s < BACK_S + SLACK_S
        rig.flows(load, 40)
    rig.judge()
    assert rig.verdict.unknown, "a kill leaves requests without an answer"
    _went_on(rig, runs)


@fault(3, "master paused, for less and for more than device_timeout")
def master_paused(rig: Rig) -> None:
    master = rig.cluster.start_master()
    rig.cluster.start_worker()
    with rig.load() as load:
        for seconds in (2.0, TIMEOUT_S + 2.0):
            rig.flows(load)
            rig.step(f"paused for {seconds} s")
            master.signal(signal.SIGSTOP)
            time.sleep(seconds)
            master.signal(signal.SIGCONT)
        rig.flows(load)
    rig.judge()
    assert rig.events("loop_stalled") >= 2, "it was paused"
    assert rig.events("device_lost") == 0, "its own pause is nobody's silence"
    assert rig.events("task_device_lost") == 0


@fault(4, "master killed for want of memory", needs=("memory group",))
def master_out_of_memory(rig: Rig) -> None:
    group = rig.keep(Group("memory"))
    master = rig.cluster.start_master(prefix=group.prefix)
    rig.cluster.start_worker()
    with rig.load() as load:
        rig.flows(load)
        rig.step("memory runs out")
        # The kernel takes the fattest; for once it shall be the master, whoever eats the rest.
        Path(f"/proc/{master.pid}/oom_score_adj").write_text("1000")
        group.limit_memory(group.memory_bytes + 48 * 1024 * 1024)
        eater = _eater(group)
        try:
            wait_until(lambda: master.process.poll() is not None, "the kernel kills it")
        finally:
            eater.kill()
            eater.wait()
        rig.cluster.start_master()
        rig.flows(load)
    rig.judge()
    assert master.process.returncode == -signal.SIGKILL


@fault(5, "master killed every other second, six times")
def restart_storm(rig: Rig) -> None:
    rig.cluster.start_master()
    rig.cluster.start_worker()
    rig.cluster.start_worker()
    runs = rig.running("trace", 4, seconds=8.0)
    with rig.load() as load:
        for number in range(6):
            rig.step(f"kill {number + 1}")
            rig.pause(0.2, 1.0)
            rig.cluster.nodes[-1 if number else 0].kill()
            rig.cluster.start_master()
        rig.flows(load)
    rig.judge()
    assert rig.verdict.unknown, "a kill leaves requests without an answer"
    assert rig.cluster.rows("SELECT value FROM meta WHERE key = 'epoch'") == [(7,)]
    assert rig.cluster.rows("SELECT max(attempt) FROM tasks")[0][0] <= 3, "attempts explode"
    _went_on(rig, runs)


@fault(6, "stale master: one is paused, its lock removed, another one started; it goes on")
def stale_master(rig: Rig) -> None:
    cluster = rig.cluster
    stale = cluster.start_master()
    cluster.start_worker()
    with rig.load() as load:
        rig.flows(load)
        _stop_between_commits(rig, stale)
        rig.step("a second master beside the paused one")
        # Whoever takes the lock for a left-over.
        (cluster.data_dir / "master.lock").unlink()
        port = free_ports(3)
        second = _master_at(rig, port)
        second.wait_for("Master node started")
        mine = cluster._start("worker", "--master-port", str(port))
        mine.wait_for("Device registered successfully")
        task_id = _submit_elsewhere(rig, port)
        # What waits is the second one's to order.
        orders = "SELECT task_id, attempt FROM task_assignments WHERE epoch = 1"
        tasks = "SELECT count(*) FROM tasks"
        ordered, known = set(cluster.rows(orders)), cluster.rows(tasks)
        rig.step("the first one goes on")
        stale.signal(signal.SIGCONT)
        # Its clients have asked for more meanwhile.
        stopped = wait_until(lambda: stale.process.poll(), "it ends", TIMEOUT_S)
        assert stopped == 1, stale.log.read_text()
        assert stale.says("another master has begun"), stale.log.read_text()
        assert cluster.rows(tasks) == known, "it took orders"
        assert set(cluster.rows(orders)) <= ordered, "it gave orders"
        assert cluster.state(task_id) == "completed"
        rig.step("one master again")
        for node in (mine, second):
            node.end()
        cluster.start_master()
        rig.flows(load)
    rig.judge()


@fault(7, "second master on the same data")
def second_master(rig: Rig) -> None:
    rig.cluster.start_master()
    rig.cluster.start_worker()
    with rig.load() as load:
        rig.flows(load)
        second = _master_at(rig, free_ports(3))
        assert second.process.wait(20) == 1
        rig.flows(load)
    rig.judge()
    assert second.says("another master")


@fault(8, "agent killed with tasks running", tier=Tier.QUICK)
def agent_killed(rig: Rig) -> None:
    rig.cluster.start_master()
    workers = [rig.cluster.start_worker(), rig.cluster.start_worker()]
    with rig.load() as load:
        rig.flows(load)
        # One in a host of its own, the others in the asyncio host of either worker.
        runs = [*rig.running("trace_sync", seconds=2.5), *rig.running("trace", 4, seconds=2.5)]
        victim = holder(workers, runs[0].pid)
        children = [one.pid for one in family(victim.pid)[1:]]
        ours = [one.task_id for one in runs if one.pid in children]
        rig.step("agent killed")
        victim.kill()
        killed = time.monotonic()
        wait_until(lambda: not any(map(lives, children)), "its hosts are gone", 2.0)
        wait_until(lambda: all(len(rig.starts_of(one)) == 2 for one in ours), "they run again")
    rig.judge()
    for task_id in ours:
        assert rig.starts_of(task_id)[1] - killed < 2.0, "its tasks run elsewhere within 2 s"


@fault(9, "zombie worker: its agent stops for longer than device_timeout")
def zombie_worker(rig: Rig) -> None:
    rig.cluster.start_master()
    workers = [rig.cluster.start_worker(), rig.cluster.start_worker()]
    runs = rig.running("trace", 2, seconds=TIMEOUT_S + SLACK_S + 2)
    victim = holder(workers, runs[0].pid)
    ours = [one.task_id for one in runs if one.pid in [each.pid for each in family(victim.pid)]]
    rig.step("agent stopped, its hosts go on")
    victim.signal(signal.SIGSTOP)
    stopped = time.monotonic()
    wait_until(lambda: all(len(rig.starts_of(one)) == 2 for one in ours), "they run elsewhere")
    took_s = max(rig.starts_of(one)[1] for one in ours) - stopped
    # They end while nobody listens, and are told of when their attempts are over.
    firsts = {(str(one), "1") for one in ours}
    wait_until(lambda: firsts <= _ended(rig), "they end")
    rig.step("agent goes on")
    victim.signal(signal.SIGCONT)
    wait_until(lambda: rig.events("result_fenced") >= len(ours), "late results are fenced")
    rig.judge()
    assert took_s < TIMEOUT_S + SLACK_S


@fault(10, "executor host killed with tasks running")
def host_killed(rig: Rig) -> None:
    rig.cluster.start_master()
    rig.cluster.start_worker()
    with rig.load() as load:
        rig.flows(load)
        runs = []
        for kind in ("trace_sync", "trace"):
            rig.step(f"host of {kind} killed")
            runs += rig.running(kind, seconds=1.0)
            os.kill(runs[-1].pid, signal.SIGKILL)
        rig.flows(load)
    rig.judge()
    assert all(len(rig.starts_of(one.task_id)) >= 2 for one in runs), "they run again"
    assert rig.events("device_lost") == 0, "a host is not the device"
    assert rig.events("task_died") >= 1


@fault(11, "whole worker family frozen for longer than device_timeout", needs=("freezer",))
def worker_frozen(rig: Rig) -> None:
    group = rig.keep(Group("freezer"))
    rig.cluster.start_master()
    victim = rig.cluster.start_worker(prefix=group.prefix)
    other = rig.cluster.start_worker()
    runs = rig.running("trace", 4, seconds=TIMEOUT_S + SLACK_S)
    ours = [one.task_id for one in runs if holder([victim, other], one.pid) is victim]
    with rig.load() as load:
        rig.step("frozen")
        group.freeze()
        frozen = time.monotonic()
        try:
            wait_until(lambda: all(len(rig.starts_of(one)) == 2 for one in ours), "they run again")
            rig.flows(load)
        finally:
            group.thaw()
        rig.flows(load)
    rig.judge()
    assert ours
    for task_id in ours:
        assert rig.starts_of(task_id)[1] - frozen < TIMEOUT_S + SLACK_S


@fault(12, "worker with a twentieth of a core, and work for more", needs=("cpu group",))
def worker_starved(rig: Rig) -> None:
    group = rig.keep(Group("cpu"))
    rig.cluster.start_master()
    rig.cluster.start_worker(prefix=group.prefix)
    with rig.load(pause_s=0.02) as load:
        rig.flows(load)
        rig.step("starved")
        before = group.throttled
        group.starve(5)
        time.sleep(2 * TIMEOUT_S)
        throttled = group.throttled - before
        group.feed()
        rig.flows(load)
    rig.judge()
    assert throttled > 30, f"throttled {throttled} times, of 60: it wanted more than it got"
    assert rig.events("device_lost") == 0, "slow is not silent"


@fault(15, "suspend and resume: everything stops for longer than device_timeout")
def suspended(rig: Rig) -> None:
    rig.cluster.start_master()
    rig.cluster.start_worker()
    rig.cluster.start_worker()
    with rig.load() as load:
        rig.flows(load)
        runs = rig.running("trace_sync", 2, seconds=TIMEOUT_S)
        rig.step("suspended")
        for node in rig.cluster.nodes:
            freeze(node.pid)
        assert not _ended(rig) & {(str(one.task_id), "1") for one in runs}, "they are at it"
        time.sleep(TIMEOUT_S + SLACK_S)
        rig.step("resumed")
        # The master first and the workers a moment later, as their machines wake.
        for node in rig.cluster.nodes:
            thaw(node.pid)
        rig.flows(load)
    rig.judge()
    assert rig.events("loop_stalled") >= 1, "it stopped"
    assert rig.events("device_lost") == 0, "nobody was away"
    assert all(len(rig.starts_of(one.task_id)) == 1 for one in runs)


@fault(16, "drain by SIGTERM, then a second SIGTERM")
def drained(rig: Rig) -> None:
    rig.cluster.start_master()
    victim = rig.cluster.start_worker()
    with rig.load() as load:
        rig.flows(load)
        rig.running("trace", seconds=30.0)
        rig.step("drains")
        victim.signal(signal.SIGTERM)
        victim.wait_for("Stopping")
        # Two within half a second count as one: an echo of the terminal.
        rig.pause(0.7, 1.0)
        assert victim.process.poll() is None, "it waits for what runs"
        rig.step("ends at once")
        victim.signal(signal.SIGTERM)
        began = time.monotonic()
        victim.process.wait(10)
        took_s = time.monotonic() - began
        task_id = rig.extra.submissions[-1].task_ids[0]
        rig.cancel(task_id)
        rig.cluster.start_worker()
        rig.flows(load)
    rig.judge()
    assert took_s < 3.0


@fault(17, "new agent with an old master, and an old agent with a new master")
def mixed_releases(rig: Rig) -> None:
    cluster = rig.cluster
    newer = _newer_release(rig)
    master = cluster.start_master()
    old = cluster.start_worker()
    with rig.load() as load:
        rig.flows(load)
        rig.step("a new agent comes to the old master")
        cluster.root = newer
        new = cluster._start("worker", "--master-port", str(cluster.port))
        assert new.process.wait(TIMEOUT_S + SLACK_S) == 1
        assert new.says(f"this master speaks {PROTOCOL_VERSION}"), new.log.read_text()
        rig.flows(load)
        assert old.process.poll() is None, "nobody else is concerned"
        rig.step("a new master comes to the old agent")
        [run] = rig.running("trace", seconds=60.0)
        master.end()
        master = cluster.start_master()
        restarted = time.monotonic()
        assert old.process.wait(TIMEOUT_S + SLACK_S) == 1
        assert old.says("another version of the protocol"), old.log.read_text()
        assert not lives(run.pid), "what it ran ended with it"
        cluster.start_worker()
        wait_until(lambda: len(rig.starts_of(run.task_id)) == 2, "its task runs on a new one")
        took_s = rig.starts_of(run.task_id)[1] - restarted
        rig.cancel(run.task_id)
        rig.flows(load)
        assert master.process.poll() is None
    rig.judge()
    assert took_s < 2 * (TIMEOUT_S + SLACK_S)


@fault(18, "task that forks beside a live worker")
def forking_task(rig: Rig) -> None:
    rig.cluster.config["executors"] = ["tests.support.accept_tasks", "tests.support.odd_tasks"]
    rig.cluster.start_master()
    worker = rig.cluster.start_worker()
    with rig.load() as load:
        rig.flows(load)
        rig.running("fork", 20, times=5)
        rig.flows(load)
        assert worker.process.poll() is None
    rig.judge()
    assert rig.events("device_lost") == 0
    assert rig.events("task_died") == 0


def _went_on(rig: Rig, runs: list[Running]) -> None:
    """Each is still the attempt it was, begun once and completed by whoever held it."""
    for one in runs:
        assert len(rig.starts_of(one.task_id)) == 1, f"task {one.task_id} began again"
        found = rig.cluster.rows("SELECT state, attempt FROM tasks WHERE task_id = ?", one.task_id)
        assert found == [("completed", 1)], f"task {one.task_id} was not adopted: {found}"


def _ended(rig: Rig) -> set[tuple[str, str]]:
    """Task and attempt of each run that came to its end."""
    return {(line[1], line[2]) for line in trace_lines(rig.trace, "end")}


def _newer_release(rig: Rig) -> Path:
    """A copy of the program that speaks the next version of the protocol."""
    root = rig.folder / "newer"
    root.mkdir()
    shutil.copy(ROOT / "main.py", root)
    for name in ("zmqcluster", "storage", "executors"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    model = root / "zmqcluster" / "model.py"
    now, then = (f"PROTOCOL_VERSION: Final = {PROTOCOL_VERSION + step}\n" for step in (0, 1))
    text = model.read_text()
    assert text.count(now) == 1
    model.write_text(text.replace(now, then))
    return root


def _master_at(rig: Rig, port: int) -> Node:
    """Another master over the same data."""
    return rig.cluster._start("master", "--master-port", str(port))


def _submit_elsewhere(rig: Rig, port: int) -> int:
    """A task for the master at this port, waited for; the judge knows of it."""
    first, rig.cluster.port = rig.cluster.port, port
    try:
        [run] = rig.running("trace")
        rig.cluster.wait_state(run.task_id, "completed")
    finally:
        rig.cluster.port = first
    return run.task_id


def _stop_between_commits(rig: Rig, master: Node) -> None:
    """Stopped in the middle of one it would hold the write lock, and nobody else could start."""

    def stopped() -> bool:
        master.signal(signal.SIGSTOP)
        with contextlib.closing(
            sqlite3.connect(rig.cluster.data_dir / "cluster.db", timeout=0, isolation_level=None)
        ) as looker:
            try:
                looker.execute("BEGIN IMMEDIATE")
                looker.execute("ROLLBACK")
            except sqlite3.OperationalError:
                master.signal(signal.SIGCONT)
                return False
            return True

    wait_until(stopped, "it is stopped between two commits")


def _eater(group: Group) -> subprocess.Popen[bytes]:
    """Takes 64 MiB in the group and keeps them."""
    code = "import time; kept = bytearray(b'x') * (64 << 20); time.sleep(60)"
    return subprocess.Popen([*group.prefix, sys.executable, "-c", code])
