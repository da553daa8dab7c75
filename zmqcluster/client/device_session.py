"""A program of yours as a device of the cluster: registered, beating, running no tasks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import threading
from typing import Final, Self

from zmqcluster import codec
from zmqcluster.client.channel import Channel
from zmqcluster.config import ClusterConfig
from zmqcluster.errors import MasterUnreachable, RemoteProtocolError, RequestRefused
from zmqcluster.messages import (
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Hello,
    HelloAgain,
    PoolOffer,
    Refused,
    Welcome,
    WorkerMessage,
)
from zmqcluster.model import PROTOCOL_VERSION, DeviceId, DeviceState
from zmqcluster.runtime.clock import SystemClock
from zmqcluster.runtime.device_manager import DeviceManager
from zmqcluster.runtime.transport import Link, PeerSockets
from zmqcluster.security.datadir import DataDir, WorkerFolder
from zmqcluster.security.join import Identity, ensure_enrolled

log = logging.getLogger(__name__)

JOIN_MS: Final = 15_000
WELCOME_S: Final = 10.0
ASK_AGAIN_S: Final = 1.0
# The other side may have missed our Goodbye for as long as its queue is read.
GOODBYE_S: Final = 0.05


class DeviceSession:
    """One session; its folder in data_dir is locked until close()."""

    def __init__(self, config: ClusterConfig, folder: WorkerFolder, identity: Identity) -> None:
        self.device_id = DeviceId(identity.device_id)
        self.interval_s = config.heartbeat_interval
        self._config = config
        self._folder = folder
        self._manager = DeviceManager(
            self.device_id, config.device_name, disk_path=str(folder.path)
        )
        self._clock = SystemClock()
        self._boot_id = os.urandom(16)
        self._is_draining = False
        self._seq = 0
        self._acked = asyncio.Event()
        self._welcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._beating: asyncio.Task[None] | None = None
        self._channel = Channel(
            lambda: PeerSockets(
                identity.master_host,
                identity.dispatch_port,
                0,
                identity.server_public,
                identity.keys,
            ),
            self._on_frame,
            self._on_link,
        )

    @classmethod
    async def join(cls, config: ClusterConfig) -> Self:
        """Enrol if need be, say Hello, and wait for the Welcome."""
        data_dir = DataDir(config.data_dir)
        folder = data_dir.take_worker_folder(config.device_id)
        try:
            identity = await asyncio.to_thread(_enrol, config, data_dir, folder)
            session = cls(config, folder, identity)
            await session._open()
        except BaseException:
            folder.close()
            raise
        return session

    def start_beating(self) -> None:
        if self._beating is None:
            self._beating = asyncio.get_running_loop().create_task(self._beat_for_ever())

    async def stop_beating(self) -> None:
        beating, self._beating = self._beating, None
        if beating is not None:
            beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beating

    async def update(self, status: DeviceState) -> None:
        """Say how it is now, and wait until the master knows (offline: until it was said)."""
        if status is DeviceState.OFFLINE:
            await self.stop_beating()
            self._send(Goodbye("status set to offline"))
            await asyncio.sleep(GOODBYE_S)
            return
        self._is_draining = status is DeviceState.DRAINING
        self._acked.clear()
        deadline = asyncio.get_running_loop().time() + WELCOME_S
        while not self._acked.is_set():
            self._beat()
            if asyncio.get_running_loop().time() > deadline:
                raise MasterUnreachable(f"no answer to a beat within {WELCOME_S:.0f} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._acked.wait(), ASK_AGAIN_S)

    async def close(self) -> None:
        """End the session and give the folder back. Again: nothing happens."""
        await self.stop_beating()
        self._channel.close()
        self._folder.close()

    async def _open(self) -> None:
        self._channel.open()
        deadline = asyncio.get_running_loop().time() + WELCOME_S
        try:
            while not self._welcome.done():
                self._send(self._hello())
                if asyncio.get_running_loop().time() > deadline:
                    raise MasterUnreachable(f"no welcome from the master within {WELCOME_S:.0f} s")
                await asyncio.wait([self._welcome], timeout=ASK_AGAIN_S)
            self._welcome.result()
        except BaseException:
            self._channel.close()
            raise

    async def _beat_for_ever(self) -> None:
        while True:
            self._beat()
            await asyncio.sleep(self.interval_s * random.uniform(0.9, 1.0))

    def _beat(self) -> None:
        self._seq += 1
        now_ms = self._clock.monotonic_ms()
        resources = self._manager.sample(now_ms)
        self._send(Heartbeat(self._seq, now_ms, resources, 0, 0, 0, draining=self._is_draining))

    def _hello(self) -> Hello:
        return Hello(
            version=PROTOCOL_VERSION,
            device_id=self.device_id,
            boot_id=self._boot_id,
            name=self._manager.name,
            capabilities=self._manager.capabilities(),
            task_types=(),
            pools=tuple[PoolOffer, ...](),
            labels=self._config.labels,
            credit=0,
            draining=self._is_draining,
        )

    def _send(self, message: WorkerMessage) -> None:
        self._channel.send(codec.encode(message))

    def _on_link(self, link: Link) -> None:
        if link is Link.REFUSED and not self._welcome.done():
            problem = "the master does not accept this device's key: it was revoked"
            self._welcome.set_exception(RequestRefused("forbidden", problem))

    def _on_frame(self, frame: bytes) -> None:
        try:
            message = codec.decode_to_worker(frame)
        except RemoteProtocolError:
            return
        match message:
            case Welcome():
                self.interval_s = message.heartbeat_interval_ms / 1000
                if not self._welcome.done():
                    self._welcome.set_result(None)
            case Refused() if not self._welcome.done():
                self._welcome.set_exception(RequestRefused(message.code, message.problem))
            case Refused():
                log.warning(
                    "device %s is not welcome any more: %s", self.device_id, message.problem
                )
            case HelloAgain():
                self._send(self._hello())
            case HeartbeatAck() if message.seq == self._seq:
                self._acked.set()
            case _:
                # Orders for a device without slots: nothing to drop, nothing to run.
                pass


def _enrol(config: ClusterConfig, data_dir: DataDir, folder: WorkerFolder) -> Identity:
    identity = ensure_enrolled(
        config,
        data_dir,
        folder,
        connect=PeerSockets,
        clock=SystemClock(),
        rng=random.Random(),
        say=lambda _: None,
        stop=threading.Event(),
        patience_ms=JOIN_MS,
    )
    assert identity is not None, "nobody stops it"
    return identity
