"""What a turn of the master owes to what came in with it: each thing gets its word."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from tests.simulation.disk import Disk
from tests.simulation.oracle.leases import Leases
from tests.simulation.oracle.room import GIVEN_UP, TERMINAL, Key, Room, device_of
from tests.simulation.oracle.wishes import Wishes
from tests.simulation.world import World
from zmqcluster.core.effects import Action, Changes, Send, Turn
from zmqcluster.core.events import Peer
from zmqcluster.core.rows import AssignmentRow, GivenUp, TaskRow
from zmqcluster.core.state import MasterState
from zmqcluster.messages import Heartbeat, HeartbeatAck, Held, Hello, Inbound, ResultAck, Welcome
from zmqcluster.model import DeviceId, TaskId, TaskState

# The phase of an inventory line whose run has ended.
DONE: Final = 2


class Replies(Room):
    """All but _fenced is of one turn."""

    def __init__(self, world: World, disk: Disk, wishes: Wishes, leases: Leases) -> None:
        super().__init__(world, disk)
        self._wishes = wishes
        self._leases = leases
        # Who greeted, and what they listed of what they hold.
        self._greeted: set[DeviceId] = set()
        self._listed: set[Key] = set()
        # By connection and number of the beat (0: a Hello): what is listed there and has to end.
        self._unwanted: dict[tuple[Peer, int], set[Key]] = {}
        # Did somebody tell of ends, was the master away before it.
        self._has_ends = self._is_stalled = False
        # The ends that this master said not to count.
        self._fenced = 0

    def master_started(self) -> None:
        self._fenced = 0
        self._is_stalled = self._has_ends = False

    def stalled(self) -> None:
        self._is_stalled = True

    def ends_heard(self) -> None:
        self._has_ends = True

    def heard(self, peer: Peer, message: Inbound) -> None:
        if isinstance(message, Heartbeat | Hello):
            key = (peer, message.seq if isinstance(message, Heartbeat) else 0)
            unwanted = {
                (held.task_id, held.attempt)
                for held in message.inventory
                if held.phase != DONE and self._is_unwanted(held)
            }
            # Said twice in a turn, it is answered twice.
            self._unwanted[key] = unwanted & self._unwanted.get(key, unwanted)

    def greeted(self, device_id: DeviceId, inventory: Iterable[Held]) -> None:
        if device_id in self._greeted:
            # Two processes under one name: only one of them can be believed.
            self._listed.clear()
            return
        self._greeted.add(device_id)
        for held in inventory:
            key = (held.task_id, held.attempt)
            if self._leases.holders.get(key) == device_id:
                self._listed.add(key)

    def check_stall(self) -> None:
        """An event says that the master was away."""
        if not self._is_stalled:
            self.fail("a stall is told of, and the master was never away")
        self._is_stalled = False

    def check_listed(self, changes: Changes, key: Key, row: AssignmentRow) -> None:
        """What a device listed in its Hello of this turn does not end as lost."""
        if self.world.options.reorder:
            # A beat from before a Hello may come after it, and lists less. No connection of ours
            # does that (CURVE numbers its frames), and all it costs is another attempt.
            return
        if key not in self._listed or row.outcome not in GIVEN_UP:
            return
        # Lost by an older word of this turn, and wanted by nobody any more: that is fine.
        task = changes.tasks[row.task_id]
        is_wanted = task.state is not TaskState.CANCELLED
        is_wanted = is_wanted and task.job_id not in self._wishes.jobs_cancelled
        is_revoked = any(
            event.kind == "key_revoked" and event.device_id == row.device_id
            for event in changes.events
        )
        if is_wanted and not is_revoked:
            self.fail(f"attempt {key} is listed in a Hello and is taken for {row.outcome}")

    def answered(self, actions: list[Action]) -> None:
        """Whoever lists what nobody wants any more is told so, each time."""
        for one in actions if any(self._unwanted.values()) else ():
            match one:
                case Send(peer, Welcome(abort=refs)):
                    seq = 0
                # Without a number it answers no beat.
                case Send(peer, HeartbeatAck(seq=seq, abort=refs)) if seq:
                    pass
                case _:
                    continue
            told = {(ref.task_id, ref.attempt) for ref in refs}
            untold = self._unwanted.get((peer, seq), set()) - told
            if untold:
                self.fail(f"{peer!r} is not told to give up {sorted(untold)}")

    def turn_over(self, turn: Turn, state: MasterState) -> None:
        """The next turn has other messages."""
        self._unwanted.clear()
        if self._has_ends:
            self._has_ends = False
            self._check_fences(turn, state)
        if self._greeted:
            self._greeted.clear()
            self._listed.clear()
        if self._is_stalled:
            self.fail("the master was away, and no event says so")

    def _check_fences(self, turn: Turn, state: MasterState) -> None:
        """Ends that are settled count, or are told of, however many they are; and the end of an
        attempt that was given up counts while no other was handed out."""
        settled, counted = 0, set()
        for one in turn.actions:
            if not isinstance(one, Send) or not isinstance(one.message, ResultAck):
                continue
            settled += len(one.message.refs)
            device_id = device_of(one.peer)
            for ref in one.message.refs:
                row = turn.changes.assignments.get((TaskId(ref.task_id), ref.attempt))
                is_of_it = row is not None and row.device_id == device_id
                if row is not None and is_of_it and row.outcome not in ("", *GIVEN_UP):
                    counted.add((ref.task_id, ref.attempt))
                    continue
                task = state.row_of(TaskId(ref.task_id)) or self.disk.tasks.get(TaskId(ref.task_id))
                if task is not None and _could_be_salvaged(task, ref.attempt, device_id):
                    self.fail(f"an end of {(ref.task_id, ref.attempt)} that counts is thrown away")
        fenced = state.counters.get("result_fenced", 0)
        told, self._fenced = fenced - self._fenced, fenced
        if told < settled - len(counted):
            self.fail(
                f"{settled} ends are settled, {len(counted)} of them count, {told} are said not to"
            )

    def _is_unwanted(self, held: Held) -> bool:
        row = self.disk.tasks.get(TaskId(held.task_id))
        return row is not None and (
            row.cancel_requested or row.state in TERMINAL or row.attempt > held.attempt
        )


def _could_be_salvaged(task: TaskRow, attempt: int, device_id: DeviceId) -> bool:
    return (
        task.state is TaskState.PENDING
        and task.attempt == attempt
        and task.device_id == device_id
        and task.given_up != GivenUp.NO
    )
