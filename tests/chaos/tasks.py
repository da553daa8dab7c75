"""Tasks that crash, hang, hoard, fork and lie; the agent lives on, and so does all other work."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # ships no types

from tests.chaos.catalogue import Tier, fault
from tests.chaos.own_tasks import End, end_of, events, has_begun, submit, submit_wild
from tests.chaos.rig import Load, Rig
from tests.chaos.storage import small_disk
from tests.support import wild_tasks
from tests.support.cluster import Node, trace_lines, wait_until

MIB = 1024 * 1024
# A part of what a task may leave in the agent: its own bookkeeping, and a tail of output.
AGENT_GROWS_BYTES_MAX = 40 * MIB


@contextlib.contextmanager
def at_work(rig: Rig, **config: object) -> Iterator[tuple[Load, Node]]:
    """A worker under load. Afterwards it is the same worker, never lost, and all has ended well."""
    cluster = rig.cluster
    cluster.config |= {"executors": ["tests.support.accept_tasks", "tests.support.wild_tasks"]}
    cluster.config |= config
    cluster.start_master()
    worker = cluster.start_worker()
    agent = psutil.Process(worker.pid)
    with rig.load() as load:
        rig.flows(load, 10)
        before = agent.memory_info().rss
        yield load, worker
        rig.flows(load, 10)
        grown = agent.memory_info().rss - before
    rig.judge()
    assert worker.process.poll() is None, "the agent ended"
    assert events(rig, "device_lost") == 0, "the agent fell silent"
    assert grown < AGENT_GROWS_BYTES_MAX, f"the agent grew by {grown:,} bytes"


@fault(74, "a task dies of each deadly signal", tier=Tier.QUICK)
def deadly_signals(rig: Rig) -> None:
    names = ("SIGSEGV", "SIGABRT", "SIGILL", "SIGBUS", "SIGFPE", "SIGKILL")
    with at_work(rig):
        ids = {
            name: submit_wild(rig, "signal", number=signal.Signals[name].value) for name in names
        }
        shared = submit_wild(rig, "read_nothing")
        for name, task_id in ids.items():
            end = end_of(rig, task_id)
            assert (end.state, end.outcomes) == ("dead", ("died",) * 3), end
            assert name in end.error, end
        end = end_of(rig, shared)
        assert end.state == "dead", end
        assert set(end.outcomes) <= {"died", "returned"}, "company is given back, not blamed"


@fault(75, "a task hangs in C and never lets go of the GIL")
def gil_hogs(rig: Rig) -> None:
    with at_work(rig):
        alone = submit_wild(rig, "hold_gil", timeout_s=1.5)
        shared = submit_wild(rig, "hold_loop", timeout_s=1.5)
        for task_id in (alone, shared):
            end = end_of(rig, task_id)
            assert (end.state, end.outcomes[-1]) == ("failed", "timed_out"), end
            assert "ran longer than its 1.5 s" in end.error, end


@fault(76, "a task ignores every signal and every cancellation")
def deaf_tasks(rig: Rig) -> None:
    with at_work(rig):
        for name in ("deaf", "stubborn"):
            late = submit_wild(rig, name, timeout_s=1.0)
            assert end_of(rig, late).outcomes[-1] == "timed_out"
            unwanted = submit_wild(rig, name, timeout_s=60.0)
            pid = has_begun(rig, unwanted)
            rig.cancel(unwanted)
            end = end_of(rig, unwanted)
            assert end.state == "cancelled", end
            assert not _lives(pid), "cancelled means that the process is gone"


@fault(77, "a task hoards memory")
def hoarder(rig: Rig) -> None:
    with at_work(rig, task_memory_max=300):
        task_id = submit_wild(rig, "hoard")
        peaks = []
        while rig.cluster.state(task_id) not in ("dead", "failed"):
            peaks.append(max(map(_rss, _below(rig))))
            time.sleep(0.05)
        end = end_of(rig, task_id)
        assert (end.state, end.outcomes) == ("dead", ("died",) * 3), end
        assert "bytes of memory" in end.error, end
        assert max(peaks) < wild_tasks.HOARD_BYTES_MAX, "nobody stopped it"


@fault(78, "a task forks without end, and one leaves a daemon behind")
def fork_bomb(rig: Rig) -> None:
    bomb, daemon = rig.folder / "bomb", rig.folder / "daemon"
    with at_work(rig):
        task_id = submit_wild(rig, "fork_bomb", timeout_s=3.0, pids=str(bomb))
        end = end_of(rig, task_id)
        assert end.outcomes == ("timed_out",), end
        left = submit_wild(rig, "daemon", pids=str(daemon))
        assert end_of(rig, left).state == "completed"
        pids = [int(line) for path in (bomb, daemon) for line in path.read_text().split()]
        assert len(pids) > wild_tasks.FORKS_MAX // 2, "the bomb went off"
        wait_until(lambda: not any(map(_lives, pids)), "all of them are gone", 5)


@fault(79, "a task prints 5 GB")
def babbler(rig: Rig) -> None:
    with at_work(rig) as (_, worker):
        task_id = submit_wild(rig, "babble", 90.0, megabytes=5_000)
        end = end_of(rig, task_id, 90.0)
        assert end.state == "completed", end
        assert worker.log.stat().st_size < MIB
    assert events(rig, "device_lost") == 0, "its heartbeats go on"


@fault(80, "a task returns what cannot travel")
def odd_results(rig: Rig) -> None:
    words = {
        "object": "not a plain value",
        "cycle": "recursion limit",
        "deep": "recursion limit",
        "generator": "not a plain value",
        "100 MB": "100,000,005 bytes",
        "2^64": "64 bits",
        "lone surrogate": "surrogate",
        "liar": "SystemExit",
    }
    with at_work(rig):
        for name in ("return", "return_sync"):
            ids = {what: submit_wild(rig, name, what=what) for what in words}
            for what, task_id in ids.items():
                end = end_of(rig, task_id)
                assert (end.state, end.outcomes) == ("failed", ("failed",)), (name, what, end)
                assert words[what] in end.error, (name, what, end)


@fault(81, "a task leaves with code 0, or raises what is no Exception")
def leavers(rig: Rig) -> None:
    raised = ("SystemExit", "BaseException", "KeyboardInterrupt", "GeneratorExit")
    with at_work(rig):
        for name in ("raise", "raise_sync"):
            ids = {what: submit_wild(rig, name, what=what) for what in raised}
            gone = submit_wild(rig, name, what="os._exit(0)")
            for what, task_id in ids.items():
                end = end_of(rig, task_id)
                # Its host may have died under it by the hand of the one that left.
                assert end.state == "failed", (name, what, end)
                assert end.outcomes[-1] == "failed", (name, what, end)
                assert what in end.error, (name, what, end)
            end = end_of(rig, gone)
            assert end.state == "dead", end
            assert "code 0" in end.error, end


@fault(82, "a task closes all descriptors, and one patches the libraries")
def vandals(rig: Rig) -> None:
    with at_work(rig):
        for name in ("close_fds", "close_fds_async"):
            end = end_of(rig, submit_wild(rig, name))
            assert end.state == "dead", (name, end)
        for _ in range(3):
            end = end_of(rig, submit_wild(rig, "patch"))
            assert end.state == "completed", end


@fault(83, "a task fills the worker's disk", needs=("tmpfs",))
def disk_filler(rig: Rig) -> None:
    cluster = rig.cluster
    cluster.config |= {"executors": ["tests.support.accept_tasks", "tests.support.wild_tasks"]}
    cluster.start_master()
    token = (cluster.data_dir / "join-token").read_text().strip()
    with small_disk(rig.folder / "worker", 4) as folder:
        worker = cluster.start_worker("--data-dir", str(folder), "--join-token", token)
        with rig.load() as load:
            rig.flows(load, 20)
            task_id = submit_wild(rig, "fill_disk", folder=str(folder))
            assert end_of(rig, task_id).state == "completed"
            assert (folder / "filler").stat().st_size > MIB
            rig.flows(load, 50)
        rig.judge()
        assert worker.process.poll() is None
        assert events(rig, "device_lost") == 0
        worker.end()


@fault(84, "a poisonous task kills the hosts of three devices")
def poison(rig: Rig) -> None:
    cluster = rig.cluster
    cluster.config |= {"executors": ["tests.support.accept_tasks", "tests.support.wild_tasks"]}
    cluster.start_master()
    workers = [cluster.start_worker() for _ in range(3)]
    with rig.load() as load:
        rig.flows(load, 20)
        end = end_of(rig, submit_wild(rig, "kill_warden", retries=100))
        rig.flows(load, 20)
    rig.judge()
    assert end.state == "dead", end
    assert end.outcomes.count("died") == 3, end
    assert all(one.process.poll() is None for one in workers)
    innocent = "SELECT count(*) FROM tasks WHERE state = 'dead' AND task_type LIKE 'trace%'"
    assert cluster.rows(innocent) == [(0,)], "company of a killer is not blamed"


@fault(85, "an error whose text is 50 MB, or no text at all")
def odd_errors(rig: Rig) -> None:
    odd = ("50 MB", "surrogates", "mute", "recursive cause")
    with at_work(rig) as (_, worker):
        for name in ("raise", "raise_sync"):
            for what in odd:
                end = end_of(rig, submit_wild(rig, name, what=what))
                assert (end.state, end.outcomes) == ("failed", ("failed",)), (name, what, end)
                assert len(end.error) <= 4096
                assert end.error.isprintable(), (name, what, end.error[:80])
        assert worker.log.stat().st_size < MIB
        assert "\x1b" not in worker.log.read_text(errors="replace")


@fault(86, "tasks end within a hair of their deadline")
def close_finishes(rig: Rig) -> None:
    # The first have all the time they need, the last none.
    lasts_s = (0.1, *(1.0 + step / 1000 for step in range(-20, 4, 3)), 2.0)
    with at_work(rig):
        ids = [
            submit(
                rig,
                kind,
                data={"path": str(rig.trace), "seconds": seconds},
                timeout_s=1.0,
                max_retry_count=0,
            )[0]
            for seconds in lasts_s
            for kind in ("trace", "trace_sync")
        ]
        ends = [end_of(rig, task_id) for task_id in ids]
        for end in ends:
            assert _is_one_outcome(end), end
        assert [end.state for end in ends[:2]] == ["completed"] * 2
        assert [end.state for end in ends[-2:]] == ["failed"] * 2
        done = {one for one, end in zip(ids, ends, strict=True) if end.state == "completed"}
        over = {int(line[1]) for line in trace_lines(rig.trace, "end")}
        assert done <= over, "what was not over did not complete"


@fault(87, "each task leaks five descriptors")
def leakers(rig: Rig) -> None:
    with at_work(rig) as (_, worker):
        before = psutil.Process(worker.pid).num_fds()
        ids = submit(rig, "w.leak_fd", 400, data={"path": str(rig.trace)}, max_retry_count=3)
        for task_id in ids:
            assert end_of(rig, task_id).state == "completed"
        assert psutil.Process(worker.pid).num_fds() <= before + 5


def _is_one_outcome(end: End) -> bool:
    """Completed in time, or not: never both, never neither. What waited for a host came back."""
    last = {"completed": "completed", "failed": "timed_out"}.get(end.state)
    return end.outcomes[-1] == last and set(end.outcomes[:-1]) <= {"returned"}


def _below(rig: Rig) -> list[psutil.Process]:
    """All processes below the agents."""
    return [
        child
        for node in rig.cluster.nodes
        if node.process.poll() is None
        for child in psutil.Process(node.pid).children(recursive=True)
    ] or [psutil.Process(os.getpid())]


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
