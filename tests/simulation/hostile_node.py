"""A device with a good key and no manners: well-typed messages about whatever comes to mind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.simulation.links import Link
from tests.simulation.oracle.room import TERMINAL
from zmqcluster import codec
from zmqcluster.core.events import Principal
from zmqcluster.core.rows import TaskRow
from zmqcluster.messages import (
    AttemptRef,
    Capabilities,
    Heartbeat,
    Held,
    Hello,
    PoolOffer,
    Progress,
    ProgressNote,
    Record,
    Resources,
    Results,
    Returned,
    Started,
    TaskResult,
    TaskSpec,
    TypeOffer,
    WorkerMessage,
)
from zmqcluster.model import PROTOCOL_VERSION, DeviceId, Outcome, Pool, Role

if TYPE_CHECKING:
    from tests.simulation.cluster import SimCluster

# Nobody submits this, so that it never holds anything for real.
TASK_TYPE = "mischief"
EVERY_MS = 50
# So often it looks which tasks are worth a lie: what nobody ran or what has ended is not.
_LOOK_AGAIN = 8
# And so often it says a number that comes to its mind, which may be nobody's.
_NOBODYS = 1 / 16
_ANY_TASK = 300
_NEARLY = (-1, 0, 0, 0, 1)
_OUTCOMES = tuple(Outcome)


class HostileNode:
    """Claims ends, starts and inventories of tasks that are not its own, or nobody's."""

    def __init__(self, cluster: SimCluster, name: str) -> None:
        self.cluster, self.world = cluster, cluster.world
        self.name = name
        self.principal = Principal(Role.WORKER, DeviceId(name))
        self.link: Link | None = None
        self._seq = self._said = 0
        self._tried: list[TaskRow] = []
        self._act()

    def _act(self) -> None:
        world = self.world
        if not world.is_faulty:
            return
        if self.link is None:
            self.link = self.cluster.connect(self)
        elif world.fault("hostile"):
            self.link.send_up(codec.encode(self._message()))
        world.at(1 + int(world.chance.random() * 2 * EVERY_MS), self._act)

    def _message(self) -> WorkerMessage:
        rng = self.world.chance
        if self._said % _LOOK_AGAIN == 0:
            rows = self.cluster.master.disk.tasks.values()
            self._tried = [row for row in rows if row.attempt and row.state not in TERMINAL]
        self._said += 1
        roll = int(rng.random() * 8)
        refs = tuple([self._ref() for _ in range(1 + int(rng.random() * 3))])
        if roll == 2:
            return Started(refs)
        if roll == 3:
            return Returned(refs, "because")
        if roll == 4:
            return Progress(tuple([ProgressNote(*_pair(one), 0.5, "ha") for one in refs]))
        if roll > 4:
            return Results(tuple([self._result(one) for one in refs]))
        inventory = tuple([Held(one.task_id, one.attempt, int(rng.random() * 3)) for one in refs])
        if roll == 0:
            return Hello(
                PROTOCOL_VERSION, self.name, rng.randbytes(16), "x", Capabilities(),
                (TypeOffer(TASK_TYPE, Pool.SYNC),), (PoolOffer(Pool.SYNC, rng.randrange(100)),),
                (), rng.randrange(4_096), inventory,
            )  # fmt: skip
        self._seq += rng.randrange(3)
        return Heartbeat(
            self._seq, rng.randrange(10**6), Resources(), rng.randrange(5),
            rng.randrange(4_096), rng.randrange(9), inventory, rng.random() < 0.1,
        )  # fmt: skip

    def _result(self, ref: AttemptRef) -> TaskResult:
        rng = self.world.chance
        outcome = _OUTCOMES[int(rng.random() * len(_OUTCOMES))]
        children = (TaskSpec("page", b"\x81\xa4page\xcd\x03\xe7", unique_key="http://evil/"),)
        records = (Record("pages", "evil", b"\xc0"),)
        return TaskResult(*_pair(ref), outcome, b"evil", children=children, records=records)

    def _ref(self) -> AttemptRef:
        """A task that was tried and is open, mostly, and an attempt near its own."""
        rng = self.world.chance
        nearly = _NEARLY[int(rng.random() * 5)]
        if not self._tried or rng.random() < _NOBODYS:
            return AttemptRef(1 + int(rng.random() * _ANY_TASK), 1 + max(0, nearly))
        row = self._tried[int(rng.random() * len(self._tried))]
        return AttemptRef(row.task_id, max(1, row.attempt + nearly))

    def linked(self, link: Link) -> None:
        """It does not wait to be welcomed."""

    def unlinked(self, link: Link) -> None:
        if link is self.link:
            self.link = None

    def hear(self, link: Link, frame: bytes) -> None:
        codec.decode_to_worker(frame)

    def hear_hint(self, frame: bytes) -> None:
        """It does not listen."""


def _pair(ref: AttemptRef) -> tuple[int, int]:
    return ref.task_id, ref.attempt
