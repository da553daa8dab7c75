"""The master's loop: poll, receive, decide, commit, send. One thread, five phases, one direction.

What is decided while a commit is under way collects in the next batch; nothing leaves before the
batch that holds its cause is on disk. Reads (facts, refills) happen on this thread, and the core
hears of them before it hears of the next commit: see MasterCore.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

import zmq

from storage.queries import Queries
from zmqcluster import codec
from zmqcluster.core.effects import (
    Action,
    AllowKey,
    DenyKey,
    Log,
    Publish,
    Send,
)
from zmqcluster.core.events import (
    Committed,
    Event,
    FramesDropped,
    MessageReceived,
    PeerLost,
    Principal,
    Tick,
    TurnedAway,
)
from zmqcluster.core.master import MasterCore
from zmqcluster.core.pipeline import Pipeline
from zmqcluster.errors import (
    LocalProtocolError,
    RemoteProtocolError,
    RequestRefused,
    StartError,
)
from zmqcluster.messages import ClientMessage, Outbound, Refused, Submit, ToClient
from zmqcluster.model import RefusalCode, Role
from zmqcluster.runtime.clock import Clock
from zmqcluster.runtime.descriptors import Descriptors
from zmqcluster.runtime.doorbell import Doorbell
from zmqcluster.runtime.journal import Apply, Journal
from zmqcluster.runtime.lookups import Lookups
from zmqcluster.runtime.mailbox import Mailbox
from zmqcluster.runtime.transport import MasterSockets, Sent
from zmqcluster.security.zap import Allowlist

log = logging.getLogger(__name__)

# Bounds of one turn: then decide, so that a flood delays nobody for long.
FRAMES_PER_TURN: Final = 256
# A frame of 160 KB may submit 10,000 tasks, decided in 0.1 s: four clients that sent ten such each
# had everybody else wait for 20 s while only frames were counted, and 2 s since.
BYTES_PER_TURN: Final = 128 * 1024
# Rows collected while a commit runs. Beyond, nothing more is received: the senders wait.
BATCH_ROWS_MAX: Final = 20_000
TICK_MS: Final = 500
TICK_MS_MIN: Final = 50
# Frames a peer that does not read may have waiting here, besides its socket's own queue.
BACKED_UP_FRAMES_MAX: Final = 256
# What the sockets turn away by themselves: the counter there, the event it becomes each tick.
_TURNED_AWAY: Final = {
    "handshakes_denied": "handshake_denied",
    "dropped_unknown_key": "frame_of_revoked_key",
    "dropped_shape": "frame_of_no_shape",
}

Check = Callable[[str, bytes], None]
_LOCAL_CLIENT: Final = Principal(Role.CLIENT)
_LEVELS: Final = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class MasterRuntime:
    """Owns the core, the sockets and the journal of one master process.

    check: refuses parameters a task type cannot run with (RequestRefused); pure and quick.
    apply: writes one Changes durably. clock_ms: cluster time to go on from.
    tick_ms: how often the core is told the time though nothing happens; well below the heartbeat
    interval, or the core takes each pause for a stall of its own.
    """

    def __init__(
        self,
        core: MasterCore,
        sockets: MasterSockets,
        allowlist: Allowlist,
        queries: Queries,
        apply: Apply,
        check: Check,
        clock: Clock,
        clock_ms: int,
        tick_ms: int = TICK_MS,
    ) -> None:
        self._core = core
        self._sockets = sockets
        self._allowlist = allowlist
        self._check = check
        self._clock = clock
        self._offset_ms = clock_ms - clock.monotonic_ms()
        self._tick_ms = max(TICK_MS_MIN, min(tick_ms, TICK_MS))
        self._doorbell = Doorbell()
        self._mailbox = Mailbox(self._doorbell)
        self._journal = Journal(apply, self._doorbell.ring)
        self._lookups = Lookups(queries, core)
        self._pipeline = Pipeline()
        self._answers: list[Event] = []
        self._backed_up: dict[bytes, deque[bytes]] = {}
        self._too_slow: set[bytes] = set()
        self._dropped_frames = 0
        self._next_tick_ms = 0
        self._turned_ms = clock.monotonic_ms()
        self._descriptors = Descriptors()
        # What the sockets counted until now: our own knocks at the start.
        self._turned_away = self._count_turned_away()
        self._is_stopping = False
        self._poller = zmq.Poller()
        self._poller.register(self._doorbell.fileno(), zmq.POLLIN)
        # While the batch is full, only the end of the commit under way may wake us.
        self._full_poller = zmq.Poller()
        self._full_poller.register(self._doorbell.fileno(), zmq.POLLIN)
        for socket in sockets.sockets:
            self._poller.register(socket, zmq.POLLIN)

    # --- from any thread ----------------------------------------------------------------------

    def post(self, message: ClientMessage) -> Future[ToClient]:
        """Ask the core from another thread of this process; see Mailbox.post."""
        return self._mailbox.post(message)

    def stop(self) -> None:
        """End run() once everything decided so far is on disk and sent."""
        self._is_stopping = True
        self._doorbell.ring()

    def counters(self) -> dict[str, float]:
        """Everything counted since the start."""
        counts: dict[str, float] = dict(self._core.state.counters)
        sockets = self._sockets.counters
        for name in sockets.__struct_fields__:
            counts[f"socket_{name}"] = getattr(sockets, name)
        counts["frames_dropped"] = self._dropped_frames
        return counts

    def silent_ms(self) -> int:
        """How long ago the loop began its last turn; it begins one at least each TICK_MS."""
        return self._clock.monotonic_ms() - self._turned_ms

    def offers(self, task_type: str) -> bool:
        """Does any connected device run this type? For types this master has no code of."""
        return any(task_type in one.types for one in list(self._core.state.fleet.by_peer.values()))

    def check(self, task_type: str, data: bytes) -> None:
        """Refuse a task nobody could run; types only devices know are taken on trust."""
        try:
            self._check(task_type, data)
        except RequestRefused as refusal:
            if refusal.code != RefusalCode.UNKNOWN_TASK_TYPE or not self.offers(task_type):
                raise

    # --- the loop -------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until stop(). Raises StorageError when a commit fails: stop the process then."""
        try:
            while not (self._is_stopping and self._is_settled()):
                self._turn()
        finally:
            self._close_inside()

    def close(self) -> None:
        """After run() has ended, or instead of it; harmless when done twice."""
        self._close_inside()
        self._sockets.close()
        self._doorbell.close()

    def _close_inside(self) -> None:
        self._mailbox.close(StartError("the master is stopping"))
        self._journal.close()

    def _turn(self) -> None:
        self._wait()
        self._turned_ms = self._clock.monotonic_ms()
        now_ms = self._now_ms()
        events: list[Event] = []
        if now_ms >= self._next_tick_ms:
            self._next_tick_ms = now_ms + self._tick_ms
            events.append(Tick(self._clock.wall_ms()))
            events += self._newly_turned_away()
            events += self._descriptors.look(now_ms)
        committed_turn = 0
        if self._journal.take_done():
            committed_turn = self._pipeline.done()
            self._release()
        if self._backed_up:
            self._send_backed_up()
        events += self._answers
        self._answers = []
        self._sockets.answer_zap()
        if not self._is_stopping:
            self._receive(events)
        events += [PeerLost(peer) for peer in self._lost_peers()]
        if committed_turn:
            events.append(Committed(committed_turn, self._journal.prune_more))
        self._decide(now_ms, events)
        self._commit()

    def _wait(self) -> None:
        """Until there is something to do; frames wait outside while the batch is full."""
        if self._answers or self._backed_up:
            timeout_ms = 1 if self._backed_up and not self._answers else 0
        else:
            wake_ms = self._core.next_wake_ms()
            until_ms = self._next_tick_ms if wake_ms is None else min(wake_ms, self._next_tick_ms)
            timeout_ms = max(0, until_ms - self._now_ms())
        poller = self._full_poller if self._is_batch_full else self._poller
        poller.poll(timeout_ms)
        self._doorbell.hush()

    def _receive(self, events: list[Event]) -> None:
        if not self._is_batch_full:
            for peer, principal, frame in self._sockets.receive(FRAMES_PER_TURN, BYTES_PER_TURN):
                self._on_frame(events, peer, principal, frame)
        for peer, message in self._mailbox.take():
            facts = self._lookups.facts_for(message)
            events.append(MessageReceived(peer, _LOCAL_CLIENT, message, facts))

    def _on_frame(
        self, events: list[Event], peer: bytes, principal: Principal, frame: bytes
    ) -> None:
        try:
            message = codec.decode_inbound(principal.role, frame)
        except RemoteProtocolError as error:
            events.append(TurnedAway("frame_refused", principal.device_id, str(error)))
            return
        if isinstance(message, Submit):
            refused = self._refusal(message)
            if refused is not None:
                self._send(peer, refused)
                # Not the problem itself, which may quote what somebody wanted to be kept secret.
                events.append(TurnedAway("request_refused", "", str(refused.code)))
                return
        facts = self._lookups.facts_for(message)
        events.append(MessageReceived(peer, principal, message, facts))

    def _count_turned_away(self) -> dict[str, int]:
        return {name: getattr(self._sockets.counters, name) for name in _TURNED_AWAY}

    def _newly_turned_away(self) -> list[Event]:
        """What the sockets turned away since the last tick, one event a kind."""
        before, self._turned_away = self._turned_away, self._count_turned_away()
        return [
            TurnedAway(_TURNED_AWAY[name], "", f"{count - before[name]} since the last tick")
            for name, count in self._turned_away.items()
            if count > before[name]
        ]

    def _refusal(self, message: Submit) -> Refused | None:
        for index, spec in enumerate(message.tasks):
            try:
                self.check(spec.task_type, spec.data)
            except RequestRefused as refusal:
                problem = f"task {index}: {refusal.problem}"
                return Refused(message.request_id, RefusalCode(refusal.code), problem)
        return None

    def _decide(self, now_ms: int, events: list[Event]) -> None:
        wake_ms = self._core.next_wake_ms()
        if not events and (wake_ms is None or wake_ms > now_ms):
            return
        self._pipeline.add(self._core.handle(now_ms, events))

    def _commit(self) -> None:
        batch = self._pipeline.begin()
        if batch is not None:
            self._journal.commit(batch)
        self._release()

    def _release(self) -> None:
        """Do what is on disk by now."""
        for action in self._pipeline.take():
            self._do(action)

    def _do(self, action: Action) -> None:
        match action:
            case Send(peer, message):
                self._send(peer, message)
            case Publish(hint):
                self._sockets.publish(codec.encode(hint))
            case AllowKey(public_key, principal):
                self._allowlist.allow(public_key, principal)
            case DenyKey(public_key):
                self._allowlist.deny(public_key)
                # Nothing of it is heard any more; and as one that is gone, it is told nothing.
                self._answers += map(PeerLost, self._sockets.peers_of(public_key))
            case Log(level, text):
                log.log(_LEVELS[level], "%s", text)
            case _ if self._is_stopping:
                # The next master asks again: what has no end must not begin now.
                pass
            case _:
                answer = self._lookups.answer(action)
                assert answer is not None, action
                self._answers.append(answer)

    def _send(self, peer: bytes, message: Outbound) -> None:
        if Mailbox.is_local(peer):
            self._mailbox.answer(peer, message)
            return
        frame = self._encode(message)
        waiting = self._backed_up.get(peer)
        if waiting is not None:
            self._back_up(peer, waiting, frame)
            return
        match self._sockets.send(peer, frame):
            case Sent.GONE:
                self._answers.append(PeerLost(peer))
            case Sent.FULL:
                self._backed_up[peer] = deque([frame])
            case Sent.SENT:
                pass

    def _back_up(self, peer: bytes, waiting: deque[bytes], frame: bytes) -> None:
        """A peer that does not read. Devices' inventories and clients' repeated questions repair
        what it misses beyond this."""
        if len(waiting) < BACKED_UP_FRAMES_MAX:
            waiting.append(frame)
            return
        self._dropped_frames += 1
        if peer not in self._too_slow:
            self._too_slow.add(peer)
            self._answers.append(FramesDropped(peer))

    def _send_backed_up(self) -> None:
        for peer, waiting in list(self._backed_up.items()):
            while waiting:
                sent = self._sockets.send(peer, waiting[0])
                if sent is Sent.FULL:
                    break
                if sent is Sent.GONE:
                    self._answers.append(PeerLost(peer))
                    waiting.clear()
                    break
                waiting.popleft()
            if not waiting:
                del self._backed_up[peer]
                self._too_slow.discard(peer)

    @staticmethod
    def _encode(message: Outbound) -> bytes:
        try:
            return codec.encode(message)
        except LocalProtocolError:
            request_id = getattr(message, "request_id", None)
            if request_id is None:
                raise
            problem = "the answer is too large for one frame: ask for less"
            return codec.encode(Refused(request_id, RefusalCode.BAD_REQUEST, problem))

    def _lost_peers(self) -> list[bytes]:
        lost = self._sockets.lost_peers()
        for peer in lost:
            self._backed_up.pop(peer, None)
            self._too_slow.discard(peer)
        return lost

    @property
    def _is_batch_full(self) -> bool:
        return self._pipeline.size >= BATCH_ROWS_MAX

    def _is_settled(self) -> bool:
        return self._pipeline.is_settled and not self._answers

    def _now_ms(self) -> int:
        return self._clock.monotonic_ms() + self._offset_ms
