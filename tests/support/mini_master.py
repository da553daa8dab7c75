"""A master without a memory, over real sockets: says yes to everything a worker asks."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import zmq
from msgspec import Struct, field

from zmqcluster.codec import decode_inbound, encode
from zmqcluster.core.events import Principal
from zmqcluster.messages import (
    Assign,
    AttemptRef,
    Control,
    Enrol,
    Enrolled,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Hello,
    HelloAgain,
    Hint,
    Inbound,
    ResultAck,
    Results,
    TaskOrder,
    TaskResult,
    ToWorker,
    Welcome,
)
from zmqcluster.model import DeviceId, Role
from zmqcluster.runtime.transport import MasterSockets
from zmqcluster.security.keys import KeyPair, new_key_pair
from zmqcluster.security.tokens import JoinToken, new_join_token
from zmqcluster.security.zap import Allowlist

BEAT_MS = 500
TIMEOUT_MS = 3_000
WAIT_S = 20.0


class Door(Struct):
    """What outlives a restart of the master: its keys, ports, and whom it lets in."""

    keys: KeyPair = field(default_factory=new_key_pair)
    allowlist: Allowlist = field(default_factory=Allowlist)
    dispatch_port: int = 0
    control_port: int = 0
    token: JoinToken | None = None


class MiniMaster:
    """One life of it. Everything heard is kept in order; wait_for() waits for a part of it."""

    def __init__(self, door: Door, *, epoch: int = 1, acks: bool = True) -> None:
        self.door = door
        self.epoch = epoch
        self.heard: list[Inbound] = []
        self.results: dict[tuple[int, int], TaskResult] = {}
        self.acks = acks
        self.control = Control()
        self._changed = threading.Condition()
        self._outbox: queue.SimpleQueue[ToWorker | Hint] = queue.SimpleQueue()
        self._peer = b""
        self._assign_seq = 0
        self._is_silent = False
        self._stop = threading.Event()
        self._sockets = MasterSockets(
            "127.0.0.1", door.dispatch_port, door.control_port, door.keys, door.allowlist
        )
        door.dispatch_port = self._sockets.dispatch_port
        door.control_port = self._sockets.control_port
        if door.token is None:
            door.token = new_join_token(
                host="127.0.0.1",
                dispatch_port=door.dispatch_port,
                control_port=door.control_port,
                server_public=door.keys.public,
                expires_wall_ms=0,
            )
            bootstrap = Principal(Role.ENROL, token_id=door.token.token_id)
            door.allowlist.allow(door.token.bootstrap_keys.public, bootstrap)
        self._thread = threading.Thread(target=self._run, name="mini-master")
        self._thread.start()

    def close(self) -> None:
        """As by kill -9: no farewell."""
        self._stop.set()
        self._thread.join()

    def say(self, message: ToWorker | Hint) -> None:
        self._outbox.put(message)

    def assign(self, *orders: TaskOrder) -> None:
        self._assign_seq += 1
        self.say(Assign(self.epoch, self._assign_seq, orders))

    def be_silent(self) -> None:
        """Hear everything, answer nothing."""
        self._is_silent = True

    def wait_for(self, what: Callable[[MiniMaster], bool], why: str = "it") -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: what(self), WAIT_S), f"waited for {why}"

    def wait_for_message(self, kind: type[Inbound], count: int = 1) -> None:
        self.wait_for(lambda master: len(master.of(kind)) >= count, kind.__name__)

    def wait_for_result(self, task_id: int, attempt: int = 1) -> TaskResult:
        key = (task_id, attempt)
        self.wait_for(lambda master: key in master.results, f"the result of {key}")
        return self.results[key]

    def of(self, kind: type[Inbound]) -> list[Inbound]:
        return [one for one in self.heard if isinstance(one, kind)]

    def hello(self) -> Hello:
        """The newest Hello."""
        self.wait_for_message(Hello)
        hello = self.of(Hello)[-1]
        assert isinstance(hello, Hello)
        return hello

    def _run(self) -> None:
        sockets = self._sockets
        poller = zmq.Poller()
        for socket in sockets.sockets:
            poller.register(socket, zmq.POLLIN)
        try:
            while not self._stop.is_set():
                poller.poll(5)
                sockets.answer_zap()
                for peer, principal, frame in sockets.receive(256):
                    self._hear(peer, decode_inbound(principal.role, frame))
                while not self._outbox.empty():
                    self._send(self._outbox.get())
        finally:
            sockets.close()

    def _hear(self, peer: bytes, message: Inbound) -> None:
        answers = [] if self._is_silent else self._answers(peer, message)
        for answer in answers:
            self._sockets.send(peer, encode(answer))
        with self._changed:
            self.heard.append(message)
            if isinstance(message, Results):
                for result in message.results:
                    self.results[result.task_id, result.attempt] = result
            self._changed.notify_all()

    def _answers(self, peer: bytes, message: Inbound) -> list[ToWorker]:
        match message:
            case Enrol():
                device_id = DeviceId(message.device_id)
                self.door.allowlist.allow(message.public_key, Principal(Role.WORKER, device_id))
                return [Enrolled(device_id)]
            case Hello():
                self._peer, self._assign_seq = peer, 0
                return [Welcome(self.epoch, 1, BEAT_MS, TIMEOUT_MS, self.control)]
            case _ if peer != self._peer:
                return [HelloAgain(self.epoch)]
            case Heartbeat():
                return [HeartbeatAck(message.seq, message.sent_ms, self.epoch, self.control)]
            case Results() if self.acks:
                refs = tuple(AttemptRef(one.task_id, one.attempt) for one in message.results)
                return [ResultAck(refs)]
            case Goodbye():
                self._peer = b""
        return []

    def _send(self, message: ToWorker | Hint) -> None:
        if isinstance(message, Hint):
            self._sockets.publish(encode(message))
            return
        deadline = time.monotonic() + WAIT_S
        while not self._peer and time.monotonic() < deadline:
            self._sockets.answer_zap()
            for peer, principal, frame in self._sockets.receive(16):
                self._hear(peer, decode_inbound(principal.role, frame))
        self._sockets.send(self._peer, encode(message))
