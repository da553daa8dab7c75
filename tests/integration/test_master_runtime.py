"""The master's loop with its own sockets and database: what leaves when, and what cannot end it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.master_bench import spec
from tests.support.running_master import DEADLINE_S, RunningMaster, connected, settle
from tests.support.storage_bench import StorageBench, storage_bench
from zmqcluster import codec
from zmqcluster.core.events import Principal
from zmqcluster.errors import StartError, StorageError
from zmqcluster.messages import Submit, Submitted
from zmqcluster.model import DeviceId, Role
from zmqcluster.security.keys import new_key_pair


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[StorageBench]:
    with storage_bench(tmp_path) as bench:
        yield bench


@pytest.fixture
def master(storage: StorageBench) -> Iterator[RunningMaster]:
    running = RunningMaster(storage)
    yield running
    running.close()


def events(storage: StorageBench) -> list[tuple[str, str]]:
    """(kind, device_id) of each event on disk."""
    rows = storage.database.query("SELECT kind, device_id FROM events ORDER BY event_id")
    return [(row["kind"], row["device_id"]) for row in rows]


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
