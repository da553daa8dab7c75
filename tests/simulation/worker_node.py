"""The simulated worker: the real core and codec, with hosts and a spool that obey a table."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, Final

import msgpack  # type: ignore[import-untyped]  # ships no types
import msgspec
from msgspec import Struct

from tests.simulation.links import Link
from tests.simulation.tape import Woken, WorkerTape
from tests.simulation.workload import LABEL, POOL_OF, origin_of, run_of
from tests.simulation.world import Alarm, World
from zmqcluster import codec
from zmqcluster.core.events import Principal
from zmqcluster.core.worker import WorkerCore
from zmqcluster.core.worker_events import (
    Connected,
    Disconnected,
    ForgetResults,
    FromMaster,
    HostReport,
    HostsReported,
    KillTask,
    Reconnect,
    RunTasks,
    SendToMaster,
    SpoolResults,
    StopWorker,
    Terminated,
    WorkerEvent,
    WorkerSettings,
)
from zmqcluster.messages import (
    Assign,
    AttemptRef,
    Heartbeat,
    HeartbeatAck,
    Hello,
    PoolOffer,
    ProgressNote,
    RateRule,
    ResultAck,
    Started,
    TaskOrder,
    TaskResult,
    TypeOffer,
    Welcome,
)
from zmqcluster.model import DeviceId, Outcome, Pool, Role

if TYPE_CHECKING:
    from tests.simulation.cluster import SimCluster

Key = tuple[int, int]

# An end is on disk, or settled, within the worker's own SPOOL_AFTER_MS; and something on top.
SPOOLED_WITHIN_MS: Final = 1_000


class Going(Struct):
    """A run in a host. began: its first request may have left."""

    order: TaskOrder
    number: int
    result: TaskResult | None
    began: bool = False


class Arrivals:
    """Which orders this process has read, when, which came behind later ones of their session, and
    until when it may begin any.

    Whatever is in doubt (is there a session?) is decided for the worker.
    """

    def __init__(self, lease_ms: int) -> None:
        self._lease_ms = lease_ms
        # The latest moment at which the master may yet count this process alive.
        self._alive_until_ms = 0
        self._epoch = self._seq = 0
        self._read_ms: dict[Key, int] = {}
        self._overtaken: set[Key] = set()
        self._stale: set[Key] = set()

    def read(self, now_ms: int, event: WorkerEvent) -> None:
        """The core is given this."""
        match event:
            case FromMaster(Welcome() as welcome):
                self._epoch, self._seq = max(self._epoch, welcome.epoch), 0
                self._alive_until_ms = max(self._alive_until_ms, now_ms + self._lease_ms)
            case FromMaster(HeartbeatAck() as ack):
                self._alive_until_ms = max(self._alive_until_ms, ack.sent_ms + self._lease_ms)
            case FromMaster(Assign() as assign):
                keys = [(one.task_id, one.attempt) for one in assign.orders]
                if assign.epoch < self._epoch:
                    self._stale.update(one for one in keys if one not in self._read_ms)
                elif assign.seq > self._seq:
                    self._seq = assign.seq
                    self._read_ms.update(dict.fromkeys(keys, now_ms))
                    self._overtaken.difference_update(keys)
                else:
                    self._overtaken.update(one for one in keys if one not in self._read_ms)

    def problem(self, now_ms: int, order: TaskOrder) -> str:
        """Why this order must not be carried out now; empty: it may be."""
        key = (order.task_id, order.attempt)
        if key in self._stale and key not in self._read_ms:
            return "the master that ordered it is over"
        if key in self._overtaken:
            return "a later assign of its session came before it"
        if now_ms > self._alive_until_ms:
            return f"its lease was over {now_ms - self._alive_until_ms} ms ago"
        waited_ms = now_ms - self._read_ms.get(key, now_ms)
        if order.start_within_ms and waited_ms > order.start_within_ms:
            return f"it waited {waited_ms} ms of {order.start_within_ms}"
        return ""


class WorkerNode:
    """A device: one process after the other with the same name, key and spool."""

    def __init__(self, cluster: SimCluster, name: str, device_id: str, *, has_label: bool) -> None:
        world = cluster.world
        self.cluster, self.world = cluster, world
        self.name = name
        self.principal = Principal(Role.WORKER, DeviceId(device_id))
        self.spool: dict[Key, TaskResult] = {}
        self.is_up = False
        self.is_gone = False
        self.has_label = has_label
        slots = world.options.slots
        self._slots = {Pool.ASYNC: 2 * slots, Pool.SYNC: slots}
        self._skew_ms = 1_000 + world.rng.randrange(1_000_000)
        drift = world.options.clock_drift_ppm
        self._drift_ppm = world.rng.randint(-drift, drift)
        self._boots = 0
        self._runs = 0
        self.link: Link | None = None
        self.boot()

    @property
    def now_ms(self) -> int:
        """Its own monotonic clock, a little too fast or slow."""
        now_ms = self.world.now_ms
        return self._skew_ms + now_ms + now_ms * self._drift_ppm // 1_000_000

    # --- life -----------------------------------------------------------------------------------

    def boot(self) -> None:
        """A new process; of the former one only the spool is left."""
        if self.is_gone:
            return
        options = self.world.options
        self._boots += 1
        self.is_up, self._is_paused, self._is_draining = True, False, False
        self._going: dict[Key, Going] = {}
        # Ends that this process knows of, and when it learned of them, until they are settled.
        self._unsettled: dict[Key, int] = dict.fromkeys(self.spool, self.world.now_ms)
        self._resumed_ms = 0
        self._arrivals = Arrivals(options.timeout_ms)
        self._pending: list[WorkerEvent] = []
        self._alarm = Alarm(self.world, self._feed)
        settings = WorkerSettings(
            device_id=self.principal.device_id,
            boot_id=f"{self.name}-{self._boots}".encode().ljust(16, b".")[:16],
            name=self.name,
            task_types=tuple(TypeOffer(name, pool) for name, pool in POOL_OF.items()),
            pools=tuple(PoolOffer(pool, slots) for pool, slots in self._slots.items()),
            labels=(LABEL,) if self.has_label else (),
            heartbeat_interval_ms=options.beat_ms,
            device_timeout_ms=options.timeout_ms,
        )
        chance = f"{self.name} {self._boots}"
        kept = tuple(self.spool.values())
        self.core = WorkerCore(settings, Random(chance), kept)
        self._tape: WorkerTape | None = None
        if self.cluster.oracle.keeps_tape:
            self._tape = WorkerTape(settings, chance, kept)
            self.cluster.tapes.append(self._tape)
        self.world.note("worker boots", self.name, self._boots)
        self._connect_later()

    def kill(self, *, down_ms: int | None) -> None:
        """kill -9 of the whole device; back after down_ms, or never (None)."""
        if not self.is_up:
            self.is_gone = self.is_gone or down_ms is None
            return
        self.world.note("worker dies", self.name)
        self._check_spool()
        if self.world.roll("power_losses", self.world.options.power_losses):
            # What was written a moment ago was still on its way to the disk.
            self.spool.clear()
        self.is_up, self._alarm.is_off = False, True
        self._hosts_die()
        link, self.link = self.link, None
        if link is not None:
            # Whether the closed connection is seen is chance: a host that lost power says nothing.
            notices = not self.world.roll("half_open", self.world.options.half_open)
            link.cut(master_notices=notices, peer_notices=False)
        if down_ms is None:
            self.is_gone = True
        else:
            self.world.at(down_ms, self.boot)

    def pause(self, ms: int) -> None:
        """SIGSTOP of agent and hosts, and SIGCONT later."""
        if self.is_up and not self._is_paused:
            self._is_paused = True
            self.world.at(ms, self._resume, self._boots)

    def _resume(self, boot: int) -> None:
        if self.is_up and boot == self._boots:
            self._is_paused = False
            self._resumed_ms = self.world.now_ms
            self._feed()

    # --- links ----------------------------------------------------------------------------------

    def _connect_later(self) -> None:
        self.world.at(1 + int(self.world.rng.random() * 200), self._connect, self._boots)

    def _connect(self, boot: int) -> None:
        if not self.is_up or boot != self._boots or self.link is not None:
            return
        self.link = self.cluster.connect(self)
        if self.link is None:
            self._connect_later()

    def _check_spool(self) -> None:
        """What ended a while ago and is not settled must survive the end of this process."""
        now_ms = self.world.now_ms
        for key, ended_ms in self._unsettled.items():
            is_due = now_ms - max(ended_ms, self._resumed_ms) > SPOOLED_WITHIN_MS
            if is_due and not self._is_paused and key not in self.spool:
                self.cluster.oracle.fail(f"{self.name} dies, and its end of {key} is nowhere")

    def linked(self, link: Link) -> None:
        if link is self.link and self.is_up:
            self._feed(Connected())

    def unlinked(self, link: Link) -> None:
        if link is self.link and self.is_up:
            self.link = None
            self._feed(Disconnected())
            self._connect_later()

    def hear(self, link: Link, frame: bytes) -> None:
        if link is self.link and self.is_up:
            message = codec.decode_to_worker(frame)
            if isinstance(message, ResultAck):
                self._settle(message)
            self.world.note("worker hears", self.name, type(message).__name__, data=frame)
            self._feed(FromMaster(message))

    def _settle(self, message: ResultAck) -> None:
        for ref in message.refs:
            key = (ref.task_id, ref.attempt)
            if self._unsettled.pop(key, None) is not None:
                self.cluster.oracle.settled(self.name, self.principal.device_id, key)

    def hear_hint(self, frame: bytes) -> None:
        if self.is_up:
            self._feed(FromMaster(codec.decode_hint(frame)))

    # --- the loop -------------------------------------------------------------------------------

    def terminate(self) -> None:
        """SIGTERM: it drains; and at once, when it comes again."""
        if self.is_up:
            self._feed(Terminated())
            self._is_draining = self.is_up and not self._is_paused

    def _feed(self, *events: WorkerEvent) -> None:
        if self._is_paused:
            self._pending += events
            return
        if self._pending:
            events = (*self._pending, *events)
            self._pending = []
        for event in events:
            self._arrivals.read(self.now_ms, event)
        if self._tape is not None:
            self._tape.turns.append(Woken(self.now_ms, events))
        for effect in self.core.handle(self.now_ms, *events):
            match effect:
                case SendToMaster(message):
                    if isinstance(message, Heartbeat | Hello):
                        self._check_inventory(message)
                    if self.link is not None:
                        self.link.send_up(codec.encode(message))
                case RunTasks(orders):
                    for order in orders:
                        self._run(order)
                case KillTask(ref, outcome):
                    self._kill_run(ref, outcome)
                case SpoolResults(results):
                    self.spool |= {(one.task_id, one.attempt): one for one in results}
                case ForgetResults(refs):
                    for ref in refs:
                        self.spool.pop((ref.task_id, ref.attempt))
                case Reconnect():
                    self._reconnect()
                case StopWorker():
                    self._stopped(effect)
                    return
        self._plan()

    def _check_inventory(self, message: Heartbeat | Hello) -> None:
        """Whatever is held and not told of is taken for lost."""
        told = {(one.task_id, one.attempt) for one in message.inventory}
        for key in (*self._going, *self._unsettled):
            if key not in told:
                self.cluster.oracle.fail(f"{self.name} holds {key} and does not list it")

    def _plan(self) -> None:
        now_ms = self.now_ms
        wait_ms = max(1, self.core.next_ms(now_ms) - now_ms)
        self._alarm.set(self.world.now_ms + wait_ms)

    def _reconnect(self) -> None:
        link, self.link = self.link, None
        if link is not None:
            link.cut(peer_notices=False)
        self._connect_later()

    def _stopped(self, effect: StopWorker) -> None:
        """The process ended by itself: drained, or a clone that found its twin alive."""
        self.world.note("worker stops", self.name, effect.text)
        self.is_up, self._alarm.is_off = False, True
        self._hosts_die()
        link, self.link = self.link, None
        if link is not None:
            # What it said last is still delivered.
            self.world.at(50, link.cut)
        # Somebody starts it again.
        self.world.at(1_000 + self.world.rng.randrange(4_000), self.boot)

    # --- hosts ----------------------------------------------------------------------------------

    def _run(self, order: TaskOrder) -> None:
        world, key = self.world, (order.task_id, order.attempt)
        if self._is_draining:
            self.cluster.oracle.fail(f"{self.name} was told to drain, and starts {key}")
        problem = self._arrivals.problem(self.now_ms, order)
        if problem:
            self.cluster.oracle.fail(f"{self.name} starts {key}, and {problem}")
        pool = POOL_OF[order.task_type]
        slots = self._slots[pool]
        if sum(POOL_OF[one.order.task_type] is pool for one in self._going.values()) >= slots:
            self.cluster.oracle.fail(f"{self.name} starts {key}, and has {slots} {pool} slots")
        if order.start_within_ms and self.link is None:
            self.cluster.oracle.fail(f"{self.name} starts {key}, and has no connection")
        run = run_of(order, world.options, world.rng, is_faulty=world.is_faulty)
        self._runs += 1
        going = self._going[key] = Going(order, self._runs, run.result)
        self.cluster.oracle.ordered(self.name, order, has_label=self.has_label)
        world.at(run.begins_ms, self._begin, self._boots, going, run.begins_ms, run.runs_ms)

    def _begin(self, boot: int, going: Going, waited_ms: int, runs_ms: int) -> None:
        if not self._is_current(boot, going):
            return
        if self._is_paused:
            self.world.at(50, self._begin, boot, going, waited_ms + 50, runs_ms)
            return
        order = going.order
        if order.start_within_ms and waited_ms > order.start_within_ms:
            self._end(going, TaskResult(order.task_id, order.attempt, Outcome.RETURNED))
            return
        going.began = True
        self.cluster.oracle.began(self.name, self.principal.device_id, order)
        self._report(ProgressNote(order.task_id, order.attempt, 0.0, "begun"))
        if not self._is_current(boot, going):
            return
        if order.start_within_ms and self.world.roll("closures", self.world.options.closures / 2):
            self._report(closing_rule(order, self.world))
        self.world.at(runs_ms, self._finish, boot, going)
        if order.start_within_ms:
            self._report(Started((AttemptRef(order.task_id, order.attempt),)))

    def _finish(self, boot: int, going: Going) -> None:
        if not self._is_current(boot, going):
            return
        if self._is_paused:
            self.world.at(50, self._finish, boot, going)
        elif going.result is not None:
            result, order = going.result, going.order
            if order.start_within_ms and self.world.roll("closures", self.world.options.closures):
                rules = (closing_rule(order, self.world),)
                result = msgspec.structs.replace(result, rates=rules)
            self._end(going, result)

    def _kill_run(self, ref: AttemptRef, outcome: Outcome) -> None:
        """The process is gone a moment later; a run that ends in that moment ends as it does."""
        going = self._going.get((ref.task_id, ref.attempt))
        if going is not None:
            ended = TaskResult(ref.task_id, ref.attempt, outcome)
            self.world.at(self.world.rng.randrange(20), self._killed, self._boots, going, ended)

    def _killed(self, boot: int, going: Going, ended: TaskResult) -> None:
        if not self._is_current(boot, going):
            return
        if going.order.start_within_ms and not going.began:
            # As the hosts do: whoever was killed in the act may have begun.
            self._report(Started((ended_ref(ended),)))
        self._end(going, ended)

    def _end(self, going: Going, result: TaskResult) -> None:
        key = (result.task_id, result.attempt)
        del self._going[key]
        self._unsettled[key] = self.world.now_ms
        self.cluster.oracle.ended(going.order, result)
        self._report(result)

    def _report(self, report: HostReport) -> None:
        self._feed(HostsReported((report,)))

    def _is_current(self, boot: int, going: Going) -> bool:
        key = (going.order.task_id, going.order.attempt)
        return self.is_up and boot == self._boots and self._going.get(key) is going

    def _hosts_die(self) -> None:
        for going in self._going.values():
            self.cluster.oracle.vanished(going.order)
        self._going.clear()


def closing_rule(order: TaskOrder, world: World) -> RateRule:
    """The site said: not now (Retry-After)."""
    page = msgpack.unpackb(order.data)["page"]
    closed_for_ms = world.chance.choice([500, 3_000, 10_000])
    return RateRule(origin_of(page, world.options), closed_for_ms=closed_for_ms)


def ended_ref(result: TaskResult) -> AttemptRef:
    return AttemptRef(result.task_id, result.attempt)
