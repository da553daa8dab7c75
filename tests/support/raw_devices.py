"""Many devices in one thread: enrolled, connected, beating by the agent's own core, idle."""

from __future__ import annotations

import threading
import time
from random import Random
from typing import Final, Self

import zmq

from tests.support.cluster import Cluster, wait_until
from tests.support.worker_bench import settings
from zmqcluster.codec import decode_to_worker, encode
from zmqcluster.core.worker import WorkerCore
from zmqcluster.core.worker_events import (
    Connected,
    Disconnected,
    FromMaster,
    HandshakeFailed,
    KeyRefused,
    Reconnect,
    SendToMaster,
    WorkerEvent,
)
from zmqcluster.messages import Enrol, Enrolled, Welcome
from zmqcluster.model import PROTOCOL_VERSION, DeviceId
from zmqcluster.runtime.transport import Link, PeerSockets
from zmqcluster.security.datadir import DataDir
from zmqcluster.security.keys import KeyPair, new_key_pair
from zmqcluster.security.tokens import JoinToken, load_join_token

TURN_MS: Final = 20
FRAMES_A_TURN: Final = 64
LINKS: Final[dict[Link, WorkerEvent]] = {
    Link.CONNECTED: Connected(),
    Link.DISCONNECTED: Disconnected(),
    Link.REFUSED: KeyRefused(),
    Link.FAILED: HandshakeFailed(),
    Link.BROKEN: HandshakeFailed(),
}


class _Device:
    """epoch: of the last Welcome it got."""

    def __init__(self, number: int, sockets: PeerSockets, now_ms: int) -> None:
        self.epoch = 0
        self._sockets = sockets
        self._core = WorkerCore(
            settings(
                device_id=DeviceId(f"raw-{number}"), boot_id=number.to_bytes(16, "big"), slots=1
            ),
            Random(number),
            (),
        )
        self._due_ms = now_ms

    def turn(self, now_ms: int) -> None:
        events: list[WorkerEvent] = [
            LINKS[link] for link in self._sockets.poll_monitor() if link in LINKS
        ]
        for frame in self._sockets.receive(FRAMES_A_TURN):
            message = decode_to_worker(frame)
            if isinstance(message, Welcome):
                self.epoch = message.epoch
            events.append(FromMaster(message))
        if not events and now_ms < self._due_ms:
            return
        for effect in self._core.handle(now_ms, *events):
            match effect:
                case SendToMaster():
                    self._sockets.send(encode(effect.message))
                case Reconnect():
                    self._sockets.recreate()
        self._due_ms = self._core.next_ms(now_ms)

    def close(self) -> None:
        self._sockets.close()


class RawDevices:
    """So many of them, from now until close(); they offer types that no test submits."""

    def __init__(self, cluster: Cluster, count: int) -> None:
        self._cluster = cluster
        self._stop = threading.Event()
        token = load_join_token(DataDir(cluster.data_dir))
        assert token is not None, "a master that started leaves one"
        self._token = token
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, count * 4 + 16)
        keys = [new_key_pair() for _ in range(count)]
        self._enrol(token, keys)
        self._devices: list[_Device] = []
        self._thread = threading.Thread(target=self._run, args=(keys,), name="raw devices")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._context.term()

    def wait_welcome(self, timeout_s: float) -> None:
        """Until the newest master has welcomed every one."""
        sql = "SELECT value FROM meta WHERE key = 'epoch'"
        [(epoch,)] = self._cluster.rows(sql)

        def welcomed() -> bool:
            assert self._thread.is_alive()
            return bool(self._devices) and all(one.epoch == epoch for one in self._devices)

        wait_until(welcomed, f"{len(self._devices)} devices are welcome", timeout_s)

    def _sockets(self, token: JoinToken, keys: KeyPair) -> PeerSockets:
        host, port = self._cluster.host, self._cluster.port + 1
        return PeerSockets(host, port, 0, token.server_public, keys, self._context)

    def _enrol(self, token: JoinToken, keys: list[KeyPair]) -> None:
        """All over one connection, a few at a time."""
        sockets = self._sockets(token, token.bootstrap_keys)
        try:
            for number, one in enumerate(keys):
                device_id = DeviceId(f"raw-{number}")
                sockets.send(encode(Enrol(PROTOCOL_VERSION, one.public, device_id, "")))
                assert sockets.poll(10_000), "the master answers"
                wait_until(lambda: _is_enrolled(sockets), f"{device_id} is enrolled", 10)
        finally:
            sockets.close()

    def _run(self, keys: list[KeyPair]) -> None:
        now_ms = _now_ms()
        self._devices = [
            _Device(number, self._sockets(self._token, one), now_ms)
            for number, one in enumerate(keys)
        ]
        try:
            while not self._stop.wait(TURN_MS / 1000):
                for device in self._devices:
                    device.turn(_now_ms())
        finally:
            for device in self._devices:
                device.close()


def _is_enrolled(sockets: PeerSockets) -> bool:
    return any(isinstance(decode_to_worker(frame), Enrolled) for frame in sockets.receive(16))


def _now_ms() -> int:
    return int(time.monotonic() * 1000)
