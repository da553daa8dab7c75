"""A commit that takes long keeps nobody from being heard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import wait_until
from tests.support.master_bench import spec
from tests.support.running_master import DEADLINE_S, RunningMaster, connected, settle
from tests.support.storage_bench import storage_bench
from zmqcluster import codec
from zmqcluster.core.events import Principal
from zmqcluster.messages import (
    Capabilities,
    Heartbeat,
    HeartbeatAck,
    Hello,
    PoolOffer,
    Resources,
    Submit,
    TypeOffer,
    Welcome,
)
from zmqcluster.model import PROTOCOL_VERSION, DeviceId, Pool, Role
from zmqcluster.runtime.transport import PeerSockets
from zmqcluster.security.keys import new_key_pair

BEATS = 20
HELLO = Hello(
    version=PROTOCOL_VERSION,
    device_id="d1",
    boot_id=b"d1".ljust(16, b"."),
    name="d1",
    capabilities=Capabilities(),
    task_types=(TypeOffer("noop", Pool.SYNC),),
    pools=(PoolOffer(Pool.SYNC, 1),),
    labels=(),
    credit=1,
)


@pytest.fixture
def master(tmp_path: Path) -> Iterator[RunningMaster]:
    with storage_bench(tmp_path) as storage:
        running = RunningMaster(storage)
        yield running
        running.close()


def test_a_device_is_heard_while_a_commit_hangs_and_answered_when_it_is_over(
    master: RunningMaster,
) -> None:
    keys = new_key_pair()
    master.allowlist.allow(keys.public, Principal(Role.WORKER, DeviceId("d1")))
    settle(master)
    master.disk.may_write.clear()
    submitted = master.runtime.post(Submit(b"r", (spec("other"),)))
    assert master.disk.writing.wait(DEADLINE_S)

    with connected(master, keys) as peer:
        assert peer.send(codec.encode(HELLO))
        wait_until(lambda: master.runtime.offers("noop"), "the loop hears a Hello", DEADLINE_S)
        for seq in range(1, BEATS + 1):
            assert peer.send(codec.encode(_beat(seq)))

        assert not submitted.done()
        assert peer.receive(1) == []
        master.disk.may_write.set()

        assert submitted.result(DEADLINE_S)
        answers = _answers(peer)
    assert isinstance(answers[0], Welcome)
    assert [one.seq for one in answers if isinstance(one, HeartbeatAck)] == [*range(1, BEATS + 1)]


def _beat(seq: int) -> Heartbeat:
    return Heartbeat(seq, seq, Resources(), running=0, credit=1, assign_seq=0)


def _answers(peer: PeerSockets) -> list[object]:
    """All that the master says, up to the answer to the last beat."""
    heard = list[object]()

    def is_answered() -> bool:
        peer.poll(100)
        heard.extend(codec.decode_to_worker(frame) for frame in peer.receive(100))
        return isinstance(heard[-1], HeartbeatAck) and heard[-1].seq == BEATS if heard else False

    wait_until(is_answered, "the answers to all beats", DEADLINE_S)
    return heard
