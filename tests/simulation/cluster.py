"""One whole run: a cluster in a virtual world, first under fire, then healing."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from tests.simulation.client_node import ClientNode
from tests.simulation.disk import Disk
from tests.simulation.hostile_node import HostileNode
from tests.simulation.links import Link, PeerEnd
from tests.simulation.master_node import MasterNode
from tests.simulation.options import Options
from tests.simulation.oracle.face import Oracle
from tests.simulation.oracle.room import TERMINAL
from tests.simulation.tape import WorkerTape
from tests.simulation.worker_node import WorkerNode
from tests.simulation.workload import LABEL
from tests.simulation.world import Violation, World
from zmqcluster.core.rows import TaskRow
from zmqcluster.model import DeviceId

# After the faults end, everything must have ended within this much virtual time: a back-off takes
# five minutes at most, and a hung task its deadline.
HEALING_MS: Final = 1_800_000
RESUME_EVERY_MS: Final = 30_000
_LOOK_EVERY: Final = 200


class Report(Struct, frozen=True):
    """What came of a run that broke no promise."""

    seed: int
    events: int
    digest: str
    virtual_ms: int
    tasks: int
    faults: dict[str, int]


class SimCluster:
    """A master, workers, clients and chance."""

    def __init__(
        self,
        options: Options,
        left_out: frozenset[int] = frozenset(),
        *,
        keeps_tape: bool = False,
    ) -> None:
        self.world = World(options, left_out)
        disk = Disk()
        self.oracle = Oracle(self.world, disk, keeps_tape=keeps_tape)
        self.tapes: list[WorkerTape] = []
        self.master = MasterNode(self.world, self.oracle, disk)
        self._links = 0
        self._open: dict[bytes, Link] = {}
        names = [f"w{index}" for index in range(options.devices)]
        self.device_ids = [DeviceId(name) for name in names]
        self.master.enrol(self.device_ids)
        self.workers = [
            WorkerNode(self, name, name, has_label=index == 0) for index, name in enumerate(names)
        ]
        # A clone: the same device id, key and label, in another machine.
        for index in range(options.clones):
            self.workers.append(WorkerNode(self, f"w{index}'", f"w{index}", has_label=index == 0))
        self.clients = [
            ClientNode(self, f"c{index}", crawls=index < 2) for index in range(options.clients)
        ]
        self.hostile = [HostileNode(self, f"evil{index}") for index in range(options.hostile)]
        self._plan_faults()

    # --- running --------------------------------------------------------------------------------

    def run(self, events: int) -> Report:
        """Faults for so many events, then healing. Raises Violation."""
        world = self.world
        world.run(events)
        self._heal()
        until_ms = world.now_ms + HEALING_MS
        steps = 0
        while not (steps % _LOOK_EVERY == 0 and self._is_quiet()):
            steps += 1
            if not world.step() or world.now_ms > until_ms:
                raise Violation(f"at {world.now_ms} ms: still not at rest: {self._unrest()}")
        while not self.master.is_settled:
            world.step()
        self.oracle.judge(self.master.core, self.master.disk)
        return Report(
            world.options.seed,
            world.events,
            world.digest,
            world.now_ms,
            len(self.oracle.disk.tasks),
            dict(world.faults),
        )

    def _heal(self) -> None:
        """Faults end. Of the workers a random part never comes back."""
        world = self.world
        gone = world.chance.sample(range(len(self.workers)), min(
            world.options.worker_gone, len(self.workers) - 1
        ))  # fmt: skip
        for index in gone:
            if world.fault("worker_gone"):
                self.workers[index].kill(down_ms=None)
        world.is_faulty = False
        world.healed_ms = world.now_ms
        world.wall_steps += world.wall_step_ms != 0
        world.wall_step_ms = 0
        world.note("healing begins")
        self._resume_all()

    def _resume_all(self) -> None:
        """Somebody resumes what is drained; again, since orders to drain may still be under way."""
        self.clients[0].resume_all()
        self.world.at(RESUME_EVERY_MS, self._resume_all)

    def _is_quiet(self) -> bool:
        if self.oracle.open_tasks and any(self._runnable()):
            return False
        workers_idle = all(
            not worker.is_up
            # Whoever lost his key keeps his ends for himself.
            or self.master.is_denied(worker.principal.device_id)
            or (worker.core.running, worker.core.waiting, worker.core.kept) == (0, 0, 0)
            for worker in self.workers
        )
        return workers_idle and all(self._is_served(client) for client in self.clients)

    def _is_served(self, client: ClientNode) -> bool:
        if client.core.open_requests:
            return False
        tasks = self.oracle.disk.tasks
        return all(
            one in client.ended or tasks[one].state not in TERMINAL for one in client.awaited
        )

    def _runnable(self) -> list[TaskRow]:
        """Open tasks that some living worker could run."""
        alive = [
            one
            for one in self.workers
            if not one.is_gone and not self.master.is_denied(one.principal.device_id)
        ]
        if not alive:
            return []
        has_label = any(one.has_label for one in alive)
        return [
            row
            for row in self.master.disk.tasks.values()
            if row.state not in TERMINAL and (has_label or LABEL not in row.labels)
        ]

    def _unrest(self) -> str:
        open_tasks = [
            f"{row.task_id} {row.task_type} {row.state}, attempt {row.attempt} by "
            f"{row.device_id!r}: {self.master.explain(row.task_id)}"
            for row in self._runnable()
        ]
        held = {
            worker.name: (worker.core.running, worker.core.waiting, worker.core.kept)
            for worker in self.workers
            if worker.is_up
        }
        clients = {
            client.name: (client.core.open_requests, sorted(client.awaited - client.ended)[:9])
            for client in self.clients
        }
        return f"tasks {open_tasks[:9]}; workers (running, waiting, kept) {held}; clients {clients}"

    # --- links ----------------------------------------------------------------------------------

    def connect(self, peer: PeerEnd) -> Link | None:
        """A new connection; None: nobody listens."""
        if not self.master.is_up or self.master.is_denied(peer.principal.device_id):
            return None
        self._links += 1
        link = Link(self.world, self.master, peer, self._links)
        self.world.at(self.world.options.latency_ms, self._opened, link)
        return link

    def _opened(self, link: Link) -> None:
        if not link.is_open:
            return
        if not self.master.is_up or self.master.is_denied(link.peer.principal.device_id):
            link.cut(master_notices=False)
            return
        self._open[link.name] = link
        self.master.opened(link)
        link.peer.linked(link)

    # --- faults ---------------------------------------------------------------------------------

    def _plan_faults(self) -> None:
        options, world = self.world.options, self.world
        for mean_ms, kind, do in (
            (options.breaks_every_ms, "breaks", self._break_a_link),
            (options.partitions_every_ms, "partitions", self._partition),
            (options.worker_kills_every_ms, "worker_kills", self._kill_a_worker),
            (options.worker_pauses_every_ms, "worker_pauses", self._pause_a_worker),
            (options.master_crashes_every_ms, "master_crashes", self.master.crash),
            (options.master_pauses_every_ms, "master_pauses", self._pause_master),
            (options.wall_steps_every_ms, "wall_steps", self._step_wall),
            (options.cancels_every_ms, "cancels", self._cancel),
            (options.retries_every_ms, "retries", self._retry),
            (options.drains_every_ms, "drains", self._drain),
            (options.blackouts_every_ms, "blackouts", self._black_out),
            (options.terminates_every_ms, "terminates", self._terminate),
            (options.client_crashes_every_ms, "client_crashes", self._crash_a_client),
            (options.strategies_every_ms, "strategies", self._change_strategy),
        ):
            world.every(mean_ms, kind, do)
        if options.revokes:
            world.at(world.chance.randrange(60_000), self._revoke)

    def _a_link(self) -> Link | None:
        self._open = {name: one for name, one in self._open.items() if one.is_open}
        return self.world.chance.choice(list(self._open.values())) if self._open else None

    def _break_a_link(self) -> None:
        link = self._a_link()
        if link is not None:
            world = self.world
            silent = world.roll("half_open", world.options.half_open)
            side = world.chance.random() < 0.5
            # Half open: one side never learns of it.
            link.cut(master_notices=not (silent and side), peer_notices=not (silent and not side))

    def _partition(self) -> None:
        """A link that carries nothing for a while, in one direction or both."""
        link = self._a_link()
        if link is not None:
            rng, now_ms = self.world.chance, self.world.now_ms
            until_ms = now_ms + rng.choice([500, 2_000, 5_000, 20_000])
            which = rng.randrange(3)
            if which != 1:
                link.up_stalled_ms = until_ms
            if which != 0:
                link.down_stalled_ms = until_ms

    def _black_out(self) -> None:
        """A switch restarts: nothing gets through for a while, and nothing is lost."""
        until_ms = self.world.now_ms + self.world.chance.choice([1_000, 4_000, 8_000, 15_000])
        for link in self._open.values():
            link.up_stalled_ms = link.down_stalled_ms = until_ms

    def _revoke(self) -> None:
        """The last device loses its key for ever: never the first, which alone has the label."""
        if self.world.fault("revokes"):
            self.clients[0].revoke(self.device_ids[-1])

    def _terminate(self) -> None:
        rng = self.world.chance
        worker = rng.choice(self.workers)
        worker.terminate()
        if rng.random() < 0.4:
            self.world.at(rng.choice([0, 100, 3_000]), worker.terminate)

    def _crash_a_client(self) -> None:
        self.world.chance.choice(self.clients).crash()

    def _change_strategy(self) -> None:
        self.world.chance.choice(self.clients).change_strategy()

    def _kill_a_worker(self) -> None:
        rng = self.world.chance
        rng.choice(self.workers).kill(down_ms=rng.choice([0, 300, 3_000, 15_000]))

    def _pause_a_worker(self) -> None:
        rng = self.world.chance
        rng.choice(self.workers).pause(rng.choice([100, 1_500, 4_000, 20_000]))

    def _pause_master(self) -> None:
        self.master.pause(self.world.chance.choice([100, 1_500, 4_000, 20_000]))

    def _step_wall(self) -> None:
        self.world.wall_steps += 1
        self.world.wall_step_ms += self.world.chance.choice(
            [-86_400_000, -3_600_000, -1_500, 1_500, 3_600_000, 86_400_000]
        )

    def _cancel(self) -> None:
        self.world.chance.choice(self.clients).cancel_something()

    def _retry(self) -> None:
        self.world.chance.choice(self.clients).retry_something()

    def _drain(self) -> None:
        self.world.chance.choice(self.clients).drain_something()
