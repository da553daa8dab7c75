"""A workbench for the master core: virtual time, a naive store, devices and clients by name.

Every send must be taken by the test: an unexpected message fails it as surely as a missing one.
"""

from __future__ import annotations

from itertools import count
from random import Random
from typing import TypeVar

from tests.support.core_audit import audit_live, audit_recovery, audit_store
from tests.support.naive_store import NaiveStore
from zmqcluster.core.effects import Action, AllowKey, Changes, DenyKey, Log, Publish, Send, Turn
from zmqcluster.core.events import (
    Committed,
    Event,
    Facts,
    MessageReceived,
    PeerLost,
    Principal,
    Tick,
)
from zmqcluster.core.invariants import check
from zmqcluster.core.master import MasterCore
from zmqcluster.core.rows import TaskRow
from zmqcluster.core.settings import Settings
from zmqcluster.messages import (
    Assign,
    AttemptRef,
    Capabilities,
    Changed,
    CreateToken,
    Enrol,
    Goodbye,
    Heartbeat,
    Held,
    Hello,
    Inbound,
    Outbound,
    PoolOffer,
    RateRule,
    Resources,
    ResultAck,
    Results,
    Started,
    Submit,
    Submitted,
    TaskOrder,
    TaskResult,
    TaskSpec,
    TypeOffer,
    Welcome,
)
from zmqcluster.model import (
    PROTOCOL_VERSION,
    WALL_MS_MAX,
    DeviceId,
    JobId,
    Outcome,
    Pool,
    Role,
    TaskId,
    TaskState,
)

WALL_AT_ZERO = 1_700_000_000_000
CLIENT = b"client"
M = TypeVar("M", bound=Outbound)


def spec(task_type: str = "noop", data: bytes = b"\x80", **fields: object) -> TaskSpec:
    """A submission of one task; fields as in TaskSpec."""
    return TaskSpec(task_type, data, **fields)  # type: ignore[arg-type]  # a test's literals


class MasterBench:
    """Drives a MasterCore by hand. commits=False leaves turns uncommitted until commit()."""

    def __init__(self, settings: Settings | None = None, seed: int = 1) -> None:
        self.settings = settings or Settings()
        self.store = NaiveStore()
        # Cluster time is never 0: a turn stamped with it would count as empty.
        self.now_ms = 1
        self.wall_step_ms = 0
        self.commits = True
        self.audited_tasks_max = 300
        self.sends: list[Send] = []
        self.actions: list[Action] = []
        self._uncommitted: list[Turn] = []
        self._requests = count(1)
        self._seed = seed
        self.peers: dict[str, bytes] = {}
        self._boots: dict[str, int] = {}
        # What each device said last when it greeted.
        self.hellos: dict[str, Hello] = {}
        self.core = self._start()

    # --- the master -----------------------------------------------------------------------------

    def restart(self, *, downtime_ms: int = 0) -> None:
        """kill -9 and start again: what was not committed is gone, connections too."""
        self._uncommitted.clear()
        self.sends.clear()
        self.peers.clear()
        self.now_ms = max(self.now_ms, self.store.clock_ms) + downtime_ms
        self.core = self._start()

    def turn(self, *events: Event) -> Turn:
        """One turn at the current time; its effects are released if it may commit."""
        turn = self.core.handle(self.now_ms, events)
        self._uncommitted.append(turn)
        check(self.core.state)
        if self.commits:
            self.commit()
        return turn

    def commit(self) -> None:
        """Put all decided turns on disk, and only then release what they do."""
        while self._uncommitted:
            self.commit_some(len(self._uncommitted))
        if len(self.store.tasks) <= self.audited_tasks_max:
            audit_store(self.store)
            audit_live(self.core.state, self.store)

    def commit_some(self, count: int) -> None:
        """Put the oldest turns on disk and do what they order; what is read knows no later turn."""
        turns, self._uncommitted = self._uncommitted[:count], self._uncommitted[count:]
        answers: list[Event] = []
        batch = Changes()
        for turn in turns:
            batch.add(turn.changes)
        self.store.apply(batch)
        for turn in turns:
            for action in turn.actions:
                answer = self.store.read(action)
                if answer is not None:
                    answers.append(answer)
                elif isinstance(action, Send):
                    self.sends.append(action)
                elif isinstance(action, Publish | AllowKey | DenyKey | Log):
                    self.actions.append(action)
        # What was read is handled before the next Committed.
        if answers or any(turn.writes for turn in turns):
            events = [*answers, Committed(turns[-1].number)]
            self._uncommitted.append(self.core.handle(self.now_ms, events))
            check(self.core.state)

    @property
    def pending_turns(self) -> int:
        """How many decided turns are not on disk."""
        return len(self._uncommitted)

    def take_undone(self) -> list[Turn]:
        """The turns that are decided and not committed; they are the caller's now."""
        turns, self._uncommitted = self._uncommitted, []
        return turns

    def advance(self, ms: int, *, step_ms: int = 500) -> None:
        """Let time pass in steps short enough that the master does not think it stalled."""
        end_ms = self.now_ms + ms
        while self.now_ms < end_ms:
            self.now_ms = min(end_ms, self.now_ms + step_ms)
            self.turn(self._tick())

    def jump(self, ms: int) -> None:
        """Let time pass in one step, as if the process had been stopped."""
        self.now_ms += ms
        self.turn(self._tick())

    def audit(self) -> None:
        """All that can be said of the master and its store together; ends a long test well."""
        self.commit()
        audit_store(self.store)
        audit_live(self.core.state, self.store)
        audit_recovery(self.core, self.store)

    # --- devices --------------------------------------------------------------------------------

    def device(
        self,
        name: str,
        *,
        slots: int = 1,
        pool: Pool = Pool.SYNC,
        types: tuple[str, ...] | dict[str, Pool] = ("noop",),
        labels: tuple[str, ...] = (),
        credit: int = 1024,
        inventory: tuple[Held, ...] = (),
        reboot: bool = False,
    ) -> list[Outbound]:
        """A device says Hello over a new connection; what it is told, but for its orders.

        types: all in pool, or each with its own; every pool has so many slots.
        """
        offers = types if isinstance(types, dict) else dict.fromkeys(types, pool)
        self._boots[name] = self._boots.get(name, 1) + reboot
        connections = sum(1 for _ in self.peers) + next(self._requests)
        self.peers[name] = f"{name}#{connections}".encode()
        hello = Hello(
            version=PROTOCOL_VERSION,
            device_id=name,
            boot_id=f"{name}-{self._boots[name]}".encode().ljust(16, b".")[:16],
            name=name,
            capabilities=Capabilities(),
            task_types=tuple(TypeOffer(name, where) for name, where in offers.items()),
            pools=tuple(PoolOffer(one, slots) for one in dict.fromkeys(offers.values())),
            labels=labels,
            credit=credit,
            inventory=inventory,
        )
        self.hellos[name] = hello
        self.hears(name, hello)
        orders = [one for one in self.sends if isinstance(one.message, Assign)]
        self.sends = [one for one in self.sends if one not in orders]
        told = self.takes(name)
        self.sends.extend(orders)
        return told

    def hears(self, name: str, message: Inbound) -> None:
        """The master receives message from the device or client of this name."""
        self.turn(self.received(name, message))

    def received(self, name: str, message: Inbound) -> MessageReceived:
        """The event of that message, with the facts the master wants for it."""
        if name == "client":
            peer, principal = CLIENT, Principal(Role.CLIENT)
        else:
            peer, principal = self.peers[name], Principal(Role.WORKER, DeviceId(name))
        facts = self.store.facts(self.core, message)
        return MessageReceived(peer, principal, message, facts)

    def beat(
        self, name: str, *held: Held, assign_seq: int = 0, credit: int = 1024, seq: int = 1
    ) -> None:
        """A heartbeat with this inventory."""
        beat = Heartbeat(seq, self.now_ms, Resources(), len(held), credit, assign_seq, held)
        self.hears(name, beat)

    def starts(self, name: str, order: TaskOrder) -> None:
        self.hears(name, Started((_ref(order),)))

    def ends(
        self, name: str, order: TaskOrder, outcome: Outcome = Outcome.COMPLETED, **fields: object
    ) -> None:
        """The device reports the end of an order, and is told that this is kept."""
        result = TaskResult(order.task_id, order.attempt, outcome, **fields)  # type: ignore[arg-type]
        self.hears(name, Results((result,)))

    def loses(self, name: str) -> None:
        """The device's connection closes."""
        self.turn(PeerLost(self.peers[name]))

    def enrols(self, name: str, public_key: bytes) -> Outbound:
        """A device shows a join token that is good for ever, and is given a key; the answer."""
        token = CreateToken(b"t", "token", b"b" * 32, Role.WORKER, WALL_MS_MAX, 1_000_000)
        self.hears("client", token)
        enrol = Enrol(PROTOCOL_VERSION, public_key, name)
        principal = Principal(Role.ENROL, token_id="token")
        self.turn(MessageReceived(b"enrolling", principal, enrol))
        [answer] = [one.message for one in self.sends if one.peer == b"enrolling"]
        self.sends = [one for one in self.sends if one.peer not in (b"enrolling", CLIENT)]
        return answer

    def leaves(self, name: str) -> None:
        self.hears(name, Goodbye("test"))

    # --- clients --------------------------------------------------------------------------------

    def submit(
        self,
        *specs: TaskSpec,
        job: str = "",
        job_id: int = 0,
        rates: tuple[RateRule, ...] = (),
        request_id: bytes = b"",
    ) -> Submitted:
        """Queue specs (default: one no-op), and the answer."""
        request_id = request_id or b"request %d" % next(self._requests)
        tasks = specs or (spec(),)
        self.hears("client", Submit(request_id, tasks, job_id, job, rates))
        return self.take("client", Submitted)

    def asks(self, message: Inbound) -> Outbound:
        """One request, one answer."""
        self.hears("client", message)
        [answer] = self.takes("client")
        return answer

    def changes(self, message: Inbound) -> Changed:
        answer = self.asks(message)
        assert isinstance(answer, Changed), answer
        return answer

    # --- what went out --------------------------------------------------------------------------

    def takes(self, name: str) -> list[Outbound]:
        """All messages sent to name since the last call."""
        peer = CLIENT if name == "client" else self.peers[name]
        taken = [one.message for one in self.sends if one.peer == peer]
        self.sends = [one for one in self.sends if one.peer != peer]
        return taken

    def take(self, name: str, kind: type[M]) -> M:
        """The one message of this kind sent to name; other kinds stay."""
        peer = CLIENT if name == "client" else self.peers[name]
        mine = [one for one in self.sends if one.peer == peer and isinstance(one.message, kind)]
        assert len(mine) == 1, (name, kind.__name__, [one.message for one in self.sends])
        self.sends.remove(mine[0])
        message = mine[0].message
        assert isinstance(message, kind)
        return message

    def orders(self, name: str) -> list[TaskOrder]:
        """All tasks handed to this device since the last call."""
        peer = self.peers.get(name)
        mine = [one for one in self.sends if one.peer == peer and isinstance(one.message, Assign)]
        self.sends = [one for one in self.sends if one not in mine]
        return [
            order for one in mine if isinstance(one.message, Assign) for order in one.message.orders
        ]

    def forget(self, *kinds: type[Outbound]) -> None:
        """Messages of these kinds (default: all) are not the test's subject."""
        self.sends = [one for one in self.sends if kinds and not isinstance(one.message, kinds)]

    def task(self, task_id: int) -> TaskRow:
        """The task as it is on disk."""
        return self.store.tasks[TaskId(task_id)]

    def state(self, task_id: int) -> TaskState:
        return self.task(task_id).state

    def event_kinds(self) -> list[str]:
        return [one.kind for one in self.store.events]

    def job(self, job_id: int) -> object:
        return self.store.jobs[JobId(job_id)]

    def _tick(self) -> Tick:
        return Tick(WALL_AT_ZERO + self.now_ms + self.wall_step_ms)

    def _start(self) -> MasterCore:
        past = self.store.past()
        past.clock_ms = self.now_ms
        self.core = MasterCore(self.settings, past, Random(self._seed))
        self.turn(self._tick())
        return self.core


def _ref(order: TaskOrder) -> AttemptRef:
    return AttemptRef(order.task_id, order.attempt)


def held(order: TaskOrder, phase: int = 1) -> Held:
    """An inventory line for an order: 0 queued, 1 running, 2 done."""
    return Held(order.task_id, order.attempt, phase)


__all__ = ["Facts", "MasterBench", "ResultAck", "Welcome", "held", "spec"]
