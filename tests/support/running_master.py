"""A master's loop on a thread of its own, with real sockets and a disk that can be slow or full."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random

import msgspec

from storage import writer
from tests.support.storage_bench import StorageBench
from zmqcluster.core.effects import Changes
from zmqcluster.core.master import MasterCore
from zmqcluster.core.settings import Settings
from zmqcluster.core.state import Past
from zmqcluster.errors import RequestRefused, StorageError
from zmqcluster.messages import Answer, AskOverview
from zmqcluster.model import RefusalCode
from zmqcluster.runtime.clock import SystemClock
from zmqcluster.runtime.master import MasterRuntime
from zmqcluster.runtime.transport import MasterSockets, PeerSockets
from zmqcluster.security.keys import KeyPair, new_key_pair
from zmqcluster.security.zap import Allowlist
from zmqcluster.views import OverviewView

DEADLINE_S = 5.0


class Disk:
    """Applies changes to a real database, and can be slow or full. writing: a commit has begun."""

    def __init__(self, storage: StorageBench) -> None:
        self._storage = storage
        self.writing = threading.Event()
        self.may_write = threading.Event()
        self.may_write.set()
        self.trouble: StorageError | None = None

    def apply(self, changes: Changes) -> bool:
        self.writing.set()
        assert self.may_write.wait(DEADLINE_S)
        if self.trouble is not None:
            raise self.trouble
        return writer.apply(self._storage.database, changes)


class RunningMaster:
    """A MasterRuntime on a thread of its own. ended: how run() ended, once it has."""

    def __init__(self, storage: StorageBench) -> None:
        clock = SystemClock()
        self.disk = Disk(storage)
        self.keys = new_key_pair()
        self.allowlist = Allowlist()
        self.sockets = MasterSockets("127.0.0.1", 0, 0, self.keys, self.allowlist)
        self.runtime = MasterRuntime(
            core=MasterCore(Settings(), Past(epoch=1, clock_ms=clock.wall_ms()), Random(1)),
            sockets=self.sockets,
            allowlist=self.allowlist,
            queries=storage.queries,
            apply=self.disk.apply,
            check=refuse_unheard_of,
            clock=clock,
            clock_ms=clock.wall_ms(),
        )
        self.ended: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def overview(self) -> OverviewView:
        answer = self.runtime.post(AskOverview(b"overview")).result(DEADLINE_S)
        assert isinstance(answer, Answer)
        return msgspec.msgpack.decode(answer.body, type=OverviewView)

    def join(self) -> None:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def close(self) -> None:
        self.disk.may_write.set()
        self.runtime.stop()
        self.join()
        self.runtime.close()

    def _run(self) -> None:
        try:
            self.runtime.run()
        except StorageError as error:
            self.ended = error


@contextmanager
def connected(master: RunningMaster, keys: KeyPair) -> Iterator[PeerSockets]:
    ports = master.sockets.dispatch_port, master.sockets.control_port
    peer = PeerSockets("127.0.0.1", *ports, master.keys.public, keys)
    try:
        yield peer
    finally:
        peer.close(linger_ms=1_000)


def settle(master: RunningMaster) -> None:
    """Until the loop turns, and whatever it wrote first is on disk."""
    master.overview()
    master.disk.writing.clear()


def refuse_unheard_of(task_type: str, data: bytes) -> None:
    if task_type == "unheard_of":
        raise RequestRefused(RefusalCode.UNKNOWN_TASK_TYPE, f"nobody runs {task_type}")
