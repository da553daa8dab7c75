"""Hours of steady load with a fault now and then: does anything get lost, does anything grow?"""

from __future__ import annotations

import contextlib
import signal
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import psutil  # type: ignore[import-untyped]  # ships no types
from msgspec import Struct, field

from storage.database import READER_CACHE_KIB, WRITER_CACHE_KIB
from tests.chaos.own_tasks import measured
from tests.chaos.rig import BATCH, Load, Rig
from tests.support.cluster import Node, family, freeze, thaw
from tests.support.history import Answer, Cancel, Submission
from tests.support.proxy import Proxy, Way
from zmqcluster.client import DistributionClient, task

WORKERS: Final = 3
CALIBRATE_S: Final = 8.0
SAMPLE_S: Final = 1.0
# A process is judged by the second half of its life, if that is long enough.
HALF_LIFE_S: Final = 60.0
# What the allocator may take and keep: less than this in half a life is flat.
GROWTH_BYTES: Final = 8 * 1024 * 1024
SETTLE_S: Final = 20.0
TIMEOUT_S: Final = 3.0
FILES_A_HOST: Final = 2
FILL_BATCH: Final = 5_000
# More than all caches of pages together (storage.database).
FILL_BYTES: Final = (WRITER_CACHE_KIB + 2 * READER_CACHE_KIB) * 1024
SPOOL: Final = "/spool/"


class Sample(Struct, frozen=True):
    """One look at a process. at_s: since its start. descriptors: not those of spool and hosts.

    below_bytes: what all processes below it take together. tasks: asyncio's, of a master that
    answers; a worker's agent has no event loop.
    """

    at_s: float
    rss_bytes: int
    descriptors: int
    threads: int
    below_bytes: int = 0
    tasks: int = 0


class Life(Struct):
    """One process from its start to its end. name: its role."""

    name: str
    node: Node
    began_s: float
    samples: list[Sample] = field(default_factory=list)
    at_rest: Sample | None = None

    @property
    def is_over(self) -> bool:
        return self.node.process.poll() is not None

    @property
    def is_long(self) -> bool:
        """Did it live long enough to say whether it grew?"""
        return bool(self.samples) and self.samples[-1].at_s >= 2 * HALF_LIFE_S

    @property
    def growth_bytes(self) -> float:
        """How much it and what is below it grew, by the trend in the second half.

        In the first half caches fill: the master's of database pages takes some minutes.
        """
        warm = self.samples[len(self.samples) // 2 :]
        times = [one.at_s for one in warm]
        taken = [float(one.rss_bytes + one.below_bytes) for one in warm]
        slope, _ = statistics.linear_regression(times, taken)
        return slope * (times[-1] - times[0])


class Soak:
    """Make one, call run() in any thread, look at it from another.

    say: told of each fault, and of each part of the run, as it begins.
    """

    def __init__(self, folder: Path, seed: int, say: Callable[[str], None]) -> None:
        self.rig = Rig(folder, seed)
        self.lives: list[Life] = []
        self.strikes: list[str] = []
        self.now = "starting"
        self.per_s = 0.0
        self.load: Load | None = None
        self.problems: list[str] = []
        self._say = say
        self._began_s = time.monotonic()
        self._stop = threading.Event()
        self._is_enough = threading.Event()
        self._baseline: dict[str, Sample] = {}
        self._workers: list[Node] = []

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._began_s

    def run(self, minutes: float, every_s: float, per_s: float = 0.0) -> None:
        """All of it; what was broken is in `problems`. per_s: 0 for half of what it can do."""
        with self.rig as rig:
            self._start()
            sampler = threading.Thread(target=self._sample_for_ever, name="sampler")
            sampler.start()
            try:
                self._fill_caches()
                able_per_s = self._calibrate()
                self.per_s = per_s or able_per_s / 2
                self._rest()
                self._baseline = self._look_all()
                with rig.load(BATCH / self.per_s) as load:
                    self.load = load
                    self._strike_until(time.monotonic() + minutes * 60, every_s)
                self._rest()
                for life in self.lives:
                    if not life.is_over:
                        life.at_rest = self._settled(life)
            finally:
                self._stop.set()
                sampler.join()
            self._tell("judging")
            self._judge()

    @property
    def judged_lives(self) -> list[Life]:
        """Those of which can be said whether they grew."""
        return [one for one in self.lives if one.is_long]

    def end_early(self) -> None:
        """No more faults: rest, and be judged."""
        self._is_enough.set()

    def _start(self) -> None:
        self._tell("starting")
        self._born("master", self.rig.cluster.start_master())
        self._proxy = self.rig.keep(Proxy(self.rig.cluster.port + 1, self.rig.seed))
        for number in range(WORKERS):
            self._workers.append(self._new_worker(number))

    def _new_worker(self, number: int) -> Node:
        """The first one is behind the proxy."""
        port = self._proxy.port if number == 0 else self.rig.cluster.port + 1
        node = self.rig.cluster.start_worker("--dispatch-port", str(port))
        self._born(f"worker {number + 1}", node)
        return node

    def _born(self, name: str, node: Node) -> None:
        self.lives.append(Life(name, node, time.monotonic()))

    def _fill_caches(self) -> None:
        """As many rows as the master keeps in memory, so that what grows later is something else.

        They wait for a label that nobody has, and are cancelled.
        """
        self._tell("filling the master's cache of database pages")
        batch = [task("trace", {"path": "x" * 400}, labels=["nobody"])] * FILL_BATCH

        async def work(client: DistributionClient) -> tuple[int, list[int]]:
            job_id, ids = 0, list[int]()
            while _bytes_in(self.rig.cluster.data_dir / "cluster.db") < FILL_BYTES:
                answer = await client.submit_many(
                    batch,
                    watch=False,
                    **({"job_id": job_id} if job_id else {"job_name": "filling"}),
                )
                job_id = answer.job_id
                ids += answer.task_ids
            await client.cancel(job_id=job_id)
            return job_id, ids

        job_id, ids = self.rig.cluster.ask(work)
        self.rig.extra.submissions.append(
            Submission(Answer.OK, ("",) * len(ids), tuple(ids), job_id)
        )
        self.rig.extra.cancels.append(Cancel(Answer.OK, (), job_id))
        self.rig.rests()

    def _calibrate(self) -> float:
        """How many tasks of the load end in a second when there is always one more."""
        self._tell("measuring what this machine can do")
        with self.rig.load(0.0) as load:
            self.rig.flows(load, 100)
            before, began_s = self._ended(), time.monotonic()
            time.sleep(CALIBRATE_S)
            return (self._ended() - before) / (time.monotonic() - began_s)

    def _ended(self) -> int:
        sql = "SELECT count(*) FROM tasks WHERE state IN ('completed', 'cancelled')"
        return int(self.rig.cluster.rows(sql)[0][0])

    def _strike_until(self, deadline_s: float, every_s: float) -> None:
        deck: list[str] = []
        while (left_s := deadline_s - time.monotonic()) > 0:
            self.now = "steady"
            if self._is_enough.wait(min(every_s, left_s)):
                return
            if deadline_s - time.monotonic() < every_s / 2:
                # The last stretch is for its end to be seen undisturbed.
                continue
            if not deck:
                deck = list(STRIKES)
                self.rig.rng.shuffle(deck)
            name = deck.pop()
            self.strikes.append(name)
            self._tell(name)
            STRIKES[name](self)

    def _rest(self) -> None:
        self._tell("waiting for rest")
        self.rig.rests()
        time.sleep(2 * SAMPLE_S)

    def _tell(self, words: str) -> None:
        self.now = words
        self._say(words)

    # --- looking ---

    def _sample_for_ever(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            for life in list(self.lives):
                if sample := _look(life):
                    life.samples.append(sample)
            # A poller that is answered late or not at all, too, must leave nothing behind.
            with contextlib.suppress(OSError):
                measured(self.rig.cluster.port, "zmqcluster_http_tasks", SAMPLE_S)

    def _look_all(self) -> dict[str, Sample]:
        return {life.name: sample for life in self.lives if (sample := self._look_at_rest(life))}

    def _look_at_rest(self, life: Life) -> Sample | None:
        """With the asyncio tasks, which only a master that answers can tell."""
        sample = _look(life)
        if sample is None or life.name != "master":
            return sample
        tasks = measured(self.rig.cluster.port, "zmqcluster_http_tasks")
        return msgspec.structs.replace(sample, tasks=int(tasks))

    def _settled(self, life: Life) -> Sample | None:
        """Once it is as at the beginning, or as it is when that does not come."""
        wanted = self._baseline[life.name]
        deadline_s = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline_s:
            seen = self._look_at_rest(life)
            if seen is None or _is_rest(seen, wanted):
                return seen
            time.sleep(0.2)
        return self._look_at_rest(life)

    def _judge(self) -> None:
        try:
            self.rig.judge()
        except AssertionError as error:
            self.problems += str(error).splitlines()
        if not self.judged_lives:
            self.problems.append("no process lived long enough to say whether it grew")
        for life in self.judged_lives:
            if life.growth_bytes > GROWTH_BYTES and self._is_above_rest(life):
                self.problems.append(f"{life.name} grew by {life.growth_bytes / 2**20:.1f} MiB")
        for life in self.lives:
            wanted, seen = self._baseline[life.name], life.at_rest
            if seen is not None and not _is_rest(seen, wanted):
                self.problems.append(f"{life.name} at rest: {_told(seen)}; before: {_told(wanted)}")

    def _is_above_rest(self, life: Life) -> bool:
        """A new master fills its caches anew, for longer than it may live."""
        last, rest = life.samples[-1], self._baseline[life.name]
        return last.rss_bytes + last.below_bytes > rest.rss_bytes + rest.below_bytes

    # --- faults ---

    def kill_master(self) -> None:
        self._master.kill()
        self._born("master", self.rig.cluster.start_master())

    def pause_master(self) -> None:
        self._master.signal(signal.SIGSTOP)
        time.sleep(self.rig.rng.choice([1.0, TIMEOUT_S + 2]))
        self._master.signal(signal.SIGCONT)

    def kill_worker(self) -> None:
        number = self._some()
        self._workers[number].kill()
        self._workers[number] = self._new_worker(number)

    def drain_worker(self) -> None:
        number = self._some()
        self._workers[number].signal(signal.SIGTERM)
        self._workers[number].process.wait(60)
        self._workers[number] = self._new_worker(number)

    def stop_agent(self) -> None:
        victim = self._workers[self._some()]
        victim.signal(signal.SIGSTOP)
        time.sleep(TIMEOUT_S + 2)
        victim.signal(signal.SIGCONT)

    def freeze_worker(self) -> None:
        victim = self._workers[self._some()]
        freeze(victim.pid)
        time.sleep(TIMEOUT_S + 2)
        thaw(victim.pid)

    def kill_host(self) -> None:
        """Any process below an agent: a host, or what watches over them."""
        below = family(self._workers[self._some()].pid)[1:]
        if below:
            self.rig.rng.choice(below).kill()

    def reset_connections(self) -> None:
        for _ in range(5):
            self._proxy.reset_all()
            self.rig.pause(0.1, 1.0)

    def slow_link(self) -> None:
        self._proxy.weather.delay_ms, self._proxy.weather.jitter_ms = 200.0, 100.0
        self._for_a_while()

    def lossy_link(self) -> None:
        rng = self.rig.rng
        self._proxy.weather.edit = lambda _, frame: [frame] if rng.random() < 0.75 else []
        self._for_a_while()

    def corrupt_link(self) -> None:
        rng = self.rig.rng
        self._proxy.weather.edit = lambda _, frame: (
            [frame] if rng.random() < 0.95 else [frame[:-1] + b"?"]
        )
        self._for_a_while()

    def cut_link(self) -> None:
        self._proxy.weather.stalled = set(self.rig.rng.choice(_CUTS))
        self._for_a_while()

    def _for_a_while(self) -> None:
        self.rig.pause(4.0, 10.0)
        self._proxy.clear()

    def _some(self) -> int:
        return self.rig.rng.randrange(WORKERS)

    @property
    def _master(self) -> Node:
        return next(one.node for one in reversed(self.lives) if one.name == "master")


_CUTS: Final = ((Way.UP,), (Way.DOWN,), (Way.UP, Way.DOWN))

STRIKES: Final[dict[str, Callable[[Soak], None]]] = {
    "master killed": Soak.kill_master,
    "master paused": Soak.pause_master,
    "worker killed": Soak.kill_worker,
    "worker drained and replaced": Soak.drain_worker,
    "agent stopped beyond its lease": Soak.stop_agent,
    "worker family frozen beyond its lease": Soak.freeze_worker,
    "executor host killed": Soak.kill_host,
    "connections reset": Soak.reset_connections,
    "link slow": Soak.slow_link,
    "link loses frames": Soak.lossy_link,
    "link corrupts frames": Soak.corrupt_link,
    "link cut": Soak.cut_link,
}


def _look(life: Life) -> Sample | None:
    """None when it is gone."""
    try:
        process = psutil.Process(life.node.pid)
        with process.oneshot():
            if process.status() == psutil.STATUS_ZOMBIE:
                return None
            return Sample(
                time.monotonic() - life.began_s,
                process.memory_info().rss,
                process.num_fds() - _spool_files(process) - _host_files(process),
                process.num_threads(),
                sum(map(_shared_out_bytes, process.children(recursive=True))),
            )
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def _shared_out_bytes(process: psutil.Process) -> int:
    """Its memory, of pages it shares only its share: forked hosts share most of them."""
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def _bytes_in(file: Path) -> int:
    """With its write-ahead log, where rows are first."""
    wal = file.with_name(file.name + "-wal")
    return sum(one.stat().st_size for one in (file, wal) if one.exists())


def _spool_files(process: psutil.Process) -> int:
    """A worker opens the file of its spool when it first needs it, and keeps it: at most one."""
    return min(1, sum(SPOOL in one.path for one in process.open_files()))


def _host_files(process: psutil.Process) -> int:
    """Two each: a task that may have killed others gets a host of its own, and that one stays."""
    wardens = process.children()
    return FILES_A_HOST * sum(len(one.children()) for one in wardens)


def _is_rest(seen: Sample, wanted: Sample) -> bool:
    """Nothing is more than it was."""
    return (
        seen.descriptors <= wanted.descriptors
        and seen.threads <= wanted.threads
        and seen.tasks <= wanted.tasks
    )


def _told(sample: Sample) -> str:
    """What must not become more."""
    counts = (sample.descriptors, sample.threads, sample.tasks)
    return "{} descriptors, {} threads, {} asyncio tasks".format(*counts)
