"""An honest worker reduced to what the master can see of one: it keeps its side of the protocol."""

from __future__ import annotations

from collections import Counter

from msgspec import Struct

from tests.support.master_bench import MasterBench
from zmqcluster.messages import (
    Abort,
    Assign,
    AttemptRef,
    Heartbeat,
    HeartbeatAck,
    Held,
    HelloAgain,
    Outbound,
    Refused,
    Resources,
    ResultAck,
    Results,
    Returned,
    Started,
    TaskOrder,
    TaskResult,
    TaskSpec,
    Welcome,
)
from zmqcluster.model import Outcome, Pool

SLOTS = 2
CREDIT = 4
Key = tuple[int, int]


class Attempt(Struct):
    """An order in this worker's hands."""

    order: TaskOrder
    received_ms: int
    is_running: bool = False


class ModelWorker:
    """One process and, after reboot(), its successor. What it is told is fed in by listen().

    begun: (rate key's task id, moment) of every run it ever started, for politeness. types: what
    it runs, and in which pool; each pool runs so many at once.
    """

    def __init__(
        self,
        bench: MasterBench,
        name: str,
        types: dict[str, Pool] | None = None,
        labels: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.types = types or {"noop": Pool.SYNC}
        self.labels = labels
        self.held: dict[Key, Attempt] = {}
        self.kept: dict[Key, TaskResult] = {}
        self.begun: list[tuple[int, int]] = []
        self.seen: list[Key] = []
        self.is_linked = False
        self.in_session = False
        self.assign_seq = 0
        self.told_credit = CREDIT
        self._bench = bench
        self._lease_from_ms = 0
        self._wants_reboot = False

    # --- what it does ---------------------------------------------------------------------------

    def connect(self) -> None:
        """A new connection, and a Hello over it."""
        self._drop_windowed()
        self.is_linked, self.in_session, self.assign_seq = True, False, 0
        self._lease_from_ms = self._bench.now_ms
        told = self._bench.device(
            self.name,
            slots=SLOTS,
            types=self.types,
            labels=self.labels,
            credit=CREDIT,
            inventory=self._inventory(),
            reboot=self._wants_reboot,
        )
        self._wants_reboot = False
        for message in told:
            self._hear(message)
        self.listen()

    def hang_up(self, *, is_noticed: bool) -> None:
        """The connection breaks; running work goes on. is_noticed: the master is told."""
        self.is_linked = self.in_session = False
        self._drop_windowed()
        if is_noticed:
            self._bench.loses(self.name)

    def reboot(self, *, is_noticed: bool) -> None:
        """kill -9: only results that were kept on disk survive."""
        self.hang_up(is_noticed=is_noticed)
        self.held.clear()
        self._wants_reboot = True

    def beat(self) -> None:
        if self.is_linked:
            inventory = self._inventory()
            self._lease_from_ms = self._bench.now_ms
            beat = Heartbeat(
                1, self._bench.now_ms, Resources(), 0, CREDIT, self.assign_seq, inventory
            )
            self._bench.hears(self.name, beat)

    def start_one(self) -> bool:
        """Begin the first queued attempt, if a slot, the lease and its window allow it."""
        self._return_late()
        lease_ms = self._lease_from_ms + self._bench.settings.device_timeout_ms
        if self._bench.now_ms > lease_ms:
            return False
        busy = Counter(self._pool(one) for one in self.held.values() if one.is_running)
        for (task_id, attempt), one in self.held.items():
            if not one.is_running and busy[self._pool(one)] < SLOTS:
                one.is_running = True
                self.begun.append((task_id, self._bench.now_ms))
                if self.is_linked:
                    self._bench.hears(self.name, Started((AttemptRef(task_id, attempt),)))
                return True
        return False

    def finish_one(
        self, outcome: Outcome, children: tuple[TaskSpec, ...] = (), retry_after_ms: int = 0
    ) -> None:
        """The oldest run ends; its result is kept until acknowledged."""
        for key, one in self.held.items():
            if one.is_running:
                del self.held[key]
                result = TaskResult(
                    *key, outcome, b"\x01", retry_after_ms=retry_after_ms, children=children
                )
                self.kept[key] = result
                self.resend()
                return

    def resend(self) -> None:
        if self.is_linked and self.kept:
            self._bench.hears(self.name, Results(tuple(self.kept.values())))

    def give_back(self) -> None:
        """Return all that has not begun."""
        queued = [key for key, one in self.held.items() if not one.is_running]
        self._give_back(queued)

    def lose_orders(self) -> None:
        """What the master just sent never arrives."""
        self._bench.orders(self.name)

    # --- what it hears --------------------------------------------------------------------------

    def listen(self) -> None:
        for message in self._bench.takes(self.name) if self.is_linked else []:
            self._hear(message)

    def _hear(self, message: Outbound) -> None:
        match message:
            case Assign() if self.in_session:
                self.assign_seq = message.seq
                for order in message.orders:
                    key = (order.task_id, order.attempt)
                    self.seen.append(key)
                    self.held[key] = Attempt(order, self._bench.now_ms)
            case ResultAck(refs):
                for ref in refs:
                    self.kept.pop((ref.task_id, ref.attempt), None)
            case Welcome():
                self.in_session = True
                self._abort(message.abort)
            case HeartbeatAck():
                self._abort(message.abort)
            case Abort(refs):
                self._abort(refs)
            case HelloAgain() | Refused():
                self.is_linked = self.in_session = False
                self._drop_windowed()
            case _:
                pass

    def _abort(self, refs: tuple[AttemptRef, ...]) -> None:
        for ref in refs:
            key = (ref.task_id, ref.attempt)
            if key not in self.kept:
                self.held.pop(key, None)
                self.kept[key] = TaskResult(*key, Outcome.CANCELLED)

    # --- helpers --------------------------------------------------------------------------------

    def _pool(self, one: Attempt) -> Pool:
        """Where an order runs; it must be of a type that was offered."""
        return self.types[one.order.task_type]

    def _inventory(self) -> tuple[Held, ...]:
        lines = [Held(*key, phase=int(one.is_running)) for key, one in self.held.items()]
        lines += [Held(*key, phase=2) for key in self.kept]
        return tuple(lines)

    def _return_late(self) -> None:
        now_ms = self._bench.now_ms
        self._give_back(
            [
                key
                for key, one in self.held.items()
                if not one.is_running
                and one.order.start_within_ms
                and now_ms > one.received_ms + one.order.start_within_ms
            ]
        )

    def _give_back(self, keys: list[Key]) -> None:
        for key in keys:
            del self.held[key]
        if keys and self.is_linked:
            refs = tuple(AttemptRef(*key) for key in keys)
            self._bench.hears(self.name, Returned(refs, "test"))

    def _drop_windowed(self) -> None:
        """Without a session nothing that has a start window begins."""
        late = [
            key
            for key, one in self.held.items()
            if not one.is_running and one.order.start_within_ms
        ]
        for key in late:
            del self.held[key]
