"""The simulated master: the real core, codec and pipeline around a disk, and ways to die."""

from __future__ import annotations

from collections import deque
from random import Random
from typing import Final

import msgspec

from tests.simulation.disk import Disk
from tests.simulation.links import Link
from tests.simulation.oracle.face import Oracle
from tests.simulation.stale_master import StaleMaster
from tests.simulation.tape import Boot, Landed, MasterOp, Turned, from_outside
from tests.simulation.workload import RETRIES_DEFAULT, TIMEOUT_MS_DEFAULT
from tests.simulation.world import Alarm, World
from zmqcluster import codec
from zmqcluster.core.effects import AllowKey, Changes, DenyKey, Log, Publish, Send
from zmqcluster.core.events import (
    Committed,
    Event,
    MessageReceived,
    PeerLost,
    Principal,
    Tick,
    TurnedAway,
)
from zmqcluster.core.master import MasterCore
from zmqcluster.core.pipeline import Pipeline
from zmqcluster.core.rows import KeyRow
from zmqcluster.core.settings import Settings
from zmqcluster.errors import RemoteProtocolError
from zmqcluster.messages import Answer, AskExplain, Hello, Results
from zmqcluster.model import DeviceId, Role, Strategy, TaskId

FRAMES_PER_TURN: Final = 256
TICK_MS: Final = 500


class MasterNode:
    """One master after the other over the same disk. tape: what each core was given, if wanted."""

    def __init__(self, world: World, oracle: Oracle, disk: Disk) -> None:
        options = world.options
        self.world = world
        self.oracle = oracle
        self.disk = disk
        self.settings = Settings(
            heartbeat_interval_ms=options.beat_ms,
            device_timeout_ms=options.timeout_ms,
            task_timeout_ms=TIMEOUT_MS_DEFAULT,
            max_retry_count=RETRIES_DEFAULT,
            strategy=Strategy(options.strategy),
            window_tasks=options.window_tasks,
            lane_tasks=options.lane_tasks,
            lanes=options.lanes,
            delayed_tasks=options.delayed_tasks,
            retention_ms=options.retention_ms,
        )
        self.is_up = False
        self.boots = 0
        self.tape: list[MasterOp] = []
        self.core: MasterCore

    # --- life -----------------------------------------------------------------------------------

    def enrol(self, device_ids: list[DeviceId]) -> None:
        """These have keys when the first master starts."""
        for device_id in device_ids:
            key = device_id.encode()
            self.disk.keys[key] = KeyRow(key, Role.WORKER, device_id, "", 0)
        self.start()

    def is_denied(self, device_id: DeviceId) -> bool:
        """Is the key of this device revoked?"""
        row = self.disk.keys.get(device_id.encode())
        return row is not None and row.revoked_wall > 0

    def start(self) -> None:
        """Read the disk and serve."""
        world = self.world
        self.boots += 1
        if self.oracle.keeps_tape:
            self.tape.append(Boot(world.wall_ms))
        past = self.disk.boot(world.wall_ms)
        self._offset_ms = past.clock_ms - world.now_ms
        self.core = MasterCore(self.settings, past, Random(self.boots))
        self.is_up, self._is_paused = True, False
        self._pipeline = Pipeline()
        self._answers: list[Event] = []
        self._inbox: deque[tuple[Link, bytes]] = deque()
        self._lost: list[bytes] = []
        self._links: dict[bytes, Link] = {}
        self._is_committed = self._has_old = False
        self._next_tick_ms = 0
        self._ticked_ms = world.now_ms
        self._alarm = Alarm(world, self._turn)
        self.oracle.master_started(self.core.state.epoch)
        world.note("master starts", self.boots)
        self._alarm.hurry(world.now_ms)

    def crash(self) -> None:
        """kill -9: what is not on the disk never was."""
        if not self.is_up:
            return
        world = self.world
        world.note("master dies")
        self._end()
        downtime_ms = world.chance.choice([0, 200, 2_000, 8_000])
        world.at(downtime_ms, self.start)

    def _end(self) -> None:
        self.is_up, self._alarm.is_off = False, True
        links, self._links = self._links, {}
        for link in links.values():
            link.cut(master_notices=False)

    def pause(self, ms: int) -> None:
        """SIGSTOP, and SIGCONT later: frames pile up meanwhile."""
        if self.is_up and not self._is_paused:
            self._is_paused = True
            self.world.at(ms, self._resume, self.boots)

    def _resume(self, boot: int) -> None:
        if self.is_up and boot == self.boots:
            self._is_paused = False
            self._alarm.hurry(self.world.now_ms)

    @property
    def is_settled(self) -> bool:
        """All it decided is on disk, and nothing is on its way to it."""
        is_idle = not (self._inbox or self._answers or self._lost or self._is_committed)
        return self.is_up and is_idle and self._pipeline.is_settled

    def _overtake(self) -> None:
        """SIGSTOP, and SIGCONT only after a successor has begun."""
        self._is_paused = True
        self.world.at(self.world.chance.choice([2, 50, 1_000]), self._succeed, self.boots)

    def _succeed(self, boot: int) -> None:
        world = self.world
        if not self.is_up or boot != self.boots:
            return
        stale = StaleMaster(
            world,
            self.disk,
            self.core,
            self._pipeline,
            self._links.values(),
            heard=self._inbox,
            offset_ms=self._offset_ms,
            is_landed=self._is_committed,
        )
        world.note("master is overtaken")
        self._end()
        self.start()
        world.at(world.chance.choice([1, 300, 1_000, 5_000]), stale.go_on)

    def explain(self, task_id: TaskId) -> str:
        """The master's own words about a task; for stories of runs that do not come to rest."""
        if not self.is_up:
            return "no master is up"
        ask = AskExplain(b"judge", task_id)
        facts = self.disk.facts(self.core, ask)
        event = MessageReceived(b"judge", Principal(Role.CLIENT), ask, facts)
        turn = self.core.handle(self.world.now_ms + self._offset_ms, [event])
        for action in turn.actions:
            if isinstance(action, Send) and isinstance(action.message, Answer):
                return repr(msgspec.msgpack.decode(action.message.body))
        return "no answer"

    # --- what links bring -----------------------------------------------------------------------

    def opened(self, link: Link) -> None:
        self._links[link.name] = link

    def closed(self, link: Link) -> None:
        if self.is_up and self._links.pop(link.name, None) is not None:
            self._lost.append(link.name)
            self.oracle.master_lost(link.name)
            self._alarm.hurry(self.world.now_ms)

    def frame(self, link: Link, frame: bytes) -> None:
        if self.is_up and link.name in self._links:
            self._inbox.append((link, frame))
            self._alarm.hurry(self.world.now_ms)

    # --- the loop -------------------------------------------------------------------------------

    def _turn(self) -> None:
        """As MasterRuntime._turn, without a poller."""
        if not self.is_up or self._is_paused:
            return
        world, core, pipeline = self.world, self.core, self._pipeline
        events: list[Event] = []
        if world.now_ms >= self._next_tick_ms:
            self._next_tick_ms = world.now_ms + TICK_MS
            events.append(Tick(world.wall_ms))
            self.oracle.clock_read()
            if world.now_ms - self._ticked_ms > self.settings.heartbeat_interval_ms:
                self.oracle.master_stalled()
            self._ticked_ms = world.now_ms
            self.oracle.check_leases()
        is_committed, self._is_committed = self._is_committed, False
        committed_turn = 0
        if is_committed:
            committed_turn = pipeline.done()
            if not self._release():
                return
        events += self._answers
        self._answers = []
        if self._inbox:
            for _ in range(min(FRAMES_PER_TURN, len(self._inbox))):
                self._receive(events, *self._inbox.popleft())
        if self._lost:
            events += map(PeerLost, self._lost)
            self._lost = []
        if is_committed:
            events.append(Committed(committed_turn, prune_more=self._has_old))
        now_ms = world.now_ms + self._offset_ms
        if events or self._is_due(now_ms):
            if self.oracle.keeps_tape:
                self.tape.append(Turned(now_ms, from_outside(events)))
            turn = core.handle(now_ms, events)
            pipeline.add(turn)
            self.oracle.master_turned(core.state)
            self.oracle.answered(turn.actions)
            if turn.writes:
                self.oracle.decided(turn.changes, turn.actions)
            self.oracle.turn_over(turn, core.state)
        self._commit()
        if self.is_up:
            self._plan()

    def _is_due(self, now_ms: int) -> bool:
        wake_ms = self.core.next_wake_ms()
        return wake_ms is not None and wake_ms <= now_ms

    def _plan(self) -> None:
        """When to turn next."""
        if self._answers or self._inbox or self._lost:
            self._alarm.hurry(self.world.now_ms)
            return
        wake_ms = self.core.next_wake_ms()
        due_ms = self._next_tick_ms
        if wake_ms is not None:
            due_ms = min(due_ms, wake_ms - self._offset_ms)
        self._alarm.hurry(max(due_ms, self.world.now_ms + 1))

    def _receive(self, events: list[Event], link: Link, frame: bytes) -> None:
        principal = link.peer.principal
        try:
            message = codec.decode_inbound(principal.role, frame)
        except RemoteProtocolError as error:
            events.append(TurnedAway("frame_refused", principal.device_id, str(error)))
            return
        self.world.note("master hears", link.name, type(message).__name__, data=frame)
        self.oracle.master_heard(link.name, message)
        if isinstance(message, Hello):
            self.oracle.greeted(principal.device_id, message.inventory)
        elif isinstance(message, Results):
            self.oracle.ends_heard()
        facts = self.disk.facts(self.core, message)
        events.append(MessageReceived(link.name, principal, message, facts))

    # --- commit before send ---------------------------------------------------------------------

    def _commit(self) -> None:
        world = self.world
        batch = self._pipeline.begin()
        if batch is None:
            self._release()
            return
        self.oracle.commit_begun()
        options = world.options
        if world.roll("commit_crashes", options.commit_crashes):
            # The end of a failed commit is unknown: it may be on disk, and nothing was sent.
            if world.chance.random() < 0.5:
                self._land(batch)
            self.crash()
            return
        if world.roll("stale_masters", options.stale_masters):
            # In the middle of a commit: what waits for that is what it may still send.
            self._overtake()
        delay_ms = 1
        if world.roll("slow_commits", options.slow_commits):
            delay_ms = world.chance.choice([20, 200, 2_000])
        world.at(delay_ms, self._durable, self.boots, batch)

    def _deny(self) -> None:
        """The door lets nothing more of a revoked key through."""
        for link in list(self._links.values()):
            if self.is_denied(link.peer.principal.device_id):
                link.cut()

    def _durable(self, boot: int, batch: Changes) -> None:
        if boot != self.boots or not self.is_up:
            return
        self._land(batch)
        self.world.note("on disk", data=b"%d" % len(batch.tasks))
        # The writer thread is done; the loop hears of it a little later.
        self.world.at(int(self.world.rng.random() * 1.5), self._hear_commit, boot)

    def _land(self, batch: Changes) -> None:
        if self.oracle.keeps_tape:
            self.tape.append(Landed())
        self.oracle.committing(batch)
        self._has_old = self.disk.save(batch)

    def _hear_commit(self, boot: int) -> None:
        if boot == self.boots and self.is_up:
            self._is_committed = True
            self._alarm.hurry(self.world.now_ms)

    def _release(self) -> bool:
        """Do what is on disk. False: a crash in the middle left the rest undone."""
        world = self.world
        rate = world.options.commit_crashes / 4
        for action in self._pipeline.take():
            if rate and world.roll("commit_crashes", rate):
                self.crash()
                return False
            match action:
                case Send():
                    link = self._links.get(action.peer)
                    if link is None:
                        self._answers.append(PeerLost(action.peer))
                    else:
                        link.send_down(codec.encode(action.message))
                case Publish(hint):
                    frame = codec.encode(hint)
                    for link in self._links.values():
                        link.publish(frame)
                case DenyKey():
                    self._deny()
                case AllowKey() | Log():
                    pass
                case _:
                    answer = self.disk.read(action)
                    assert answer is not None, action
                    self._answers.append(answer)
        return True
