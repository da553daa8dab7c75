"""The master's loop with its own sockets and database: what leaves when, and what cannot end it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import msgspec
import pytest

from storage import writer
from tests.support.master_bench import spec
from tests.support.storage_bench import StorageBench, storage_bench
from zmqcluster import codec
from zmqcluster.core.effects import Changes
from zmqcluster.core.events import Principal
from zmqcluster.core.master import MasterCore
from zmqcluster.core.settings import Settings
from zmqcluster.core.state import Past
from zmqcluster.errors import RequestRefused, StartError, StorageError
from zmqcluster.messages import Answer, AskOverview, Submit, Submitted
from zmqcluster.model import DeviceId, RefusalCode, Role
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


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[StorageBench]:
    with storage_bench(tmp_path) as bench:
        yield bench


@pytest.fixture
def master(storage: StorageBench) -> Iterator[RunningMaster]:
    running = RunningMaster(storage)
    yield running
    running.close()


def refuse_unheard_of(task_type: str, data: bytes) -> None:
    if task_type == "unheard_of":
        raise RequestRefused(RefusalCode.UNKNOWN_TASK_TYPE, f"nobody runs {task_type}")


def events(storage: StorageBench) -> list[tuple[str, str]]:
    """(kind, device_id) of each event on disk."""
    rows = storage.database.query("SELECT kind, device_id FROM events ORDER BY event_id")
    return [(row["kind"], row["device_id"]) for row in rows]


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


def test_nothing_is_acknowledged_while_its_commit_is_under_way(
    master: RunningMaster, storage: StorageBench
) -> None:
    settle(master)
    master.disk.may_write.clear()

    answer = master.runtime.post(Submit(b"r", (spec(),)))
    assert master.disk.writing.wait(DEADLINE_S)
    assert not answer.done()
    master.disk.may_write.set()

    submitted = answer.result(DEADLINE_S)
    assert isinstance(submitted, Submitted)
    assert len(submitted.task_ids) == 1
    assert storage.count("tasks") == 1


def test_failed_commit_acknowledges_nothing_and_ends_the_master(master: RunningMaster) -> None:
    settle(master)
    master.disk.trouble = StorageError("the disk is full")

    answer = master.runtime.post(Submit(b"r", (spec(),)))

    assert isinstance(answer.exception(DEADLINE_S), StartError)
    master.join()
    assert master.ended is master.disk.trouble


@pytest.mark.parametrize(
    "frame", [b"", b"\xc1", b"\x81\xa4type\xa1\xff", b"\x91" * 10_000, b"\x82\xa4type"]
)
def test_noise_of_a_known_peer_is_told_of_and_ends_nothing(
    master: RunningMaster, storage: StorageBench, frame: bytes
) -> None:
    keys = new_key_pair()
    master.allowlist.allow(keys.public, Principal(Role.WORKER, DeviceId("w1")))
    settle(master)

    with connected(master, keys) as peer:
        assert peer.send(frame)
        assert master.disk.writing.wait(DEADLINE_S)

    assert master.overview().counters["frame_refused"] == 1
    assert events(storage) == [("frame_refused", "w1")]


def test_task_that_fits_no_executor_is_refused_and_told_of(
    master: RunningMaster, storage: StorageBench
) -> None:
    keys = new_key_pair()
    master.allowlist.allow(keys.public, Principal(Role.CLIENT))
    settle(master)

    with connected(master, keys) as peer:
        assert peer.send(codec.encode(Submit(b"r", (spec("unheard_of"),))))
        assert master.disk.writing.wait(DEADLINE_S)

    assert master.overview().counters["request_refused"] == 1
    assert events(storage) == [("request_refused", "")]
    assert storage.count("tasks") == 0


def test_stranger_at_the_door_is_told_of(master: RunningMaster, storage: StorageBench) -> None:
    settle(master)

    with connected(master, new_key_pair()):
        assert master.disk.writing.wait(DEADLINE_S)

    assert master.overview().counters["handshake_denied"] >= 1
    assert ("handshake_denied", "") in events(storage)
