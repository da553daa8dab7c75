"""A master's process from the inside: what it claims, gives back, and does when it cannot go on."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

import zmqcluster
from storage import writer
from tests.support.cluster import free_ports, wait_until
from zmqcluster.codec import decode_to_client, decode_to_worker, encode
from zmqcluster.config import ClusterConfig
from zmqcluster.errors import ConfigError, StartError, StorageError
from zmqcluster.messages import (
    CancelTasks,
    Changed,
    CreateToken,
    DrainDevice,
    Enrol,
    Enrolled,
    Finished,
    RevokeDevice,
    RevokeToken,
    Submit,
    Submitted,
    TaskSpec,
    Watch,
)
from zmqcluster.model import PROTOCOL_VERSION, Role, SchedulerMode
from zmqcluster.runtime.transport import PeerSockets
from zmqcluster.security.datadir import DataDir
from zmqcluster.security.keys import KeyPair, load_public_key, new_key_pair
from zmqcluster.security.tokens import load_join_token
from zmqcluster.services import DistributionServices, backend
from zmqcluster.services.master_node import MasterNode

DEADLINE_S = 10.0
REQUEST = b"r" * 16


@pytest.fixture
def config(tmp_path: Path) -> ClusterConfig:
    base = free_ports(3)
    return ClusterConfig(
        mode=SchedulerMode.MASTER,
        master_port=base,
        dispatch_port=base + 1,
        control_port=base + 2,
        data_dir=str(tmp_path / "data"),
    )


@pytest.fixture
def services(config: ClusterConfig) -> Iterator[DistributionServices]:
    one = DistributionServices(config)
    yield one
    one.stop()


def master_of(services: DistributionServices) -> MasterNode:
    assert services._master is not None
    return services._master


def test_services_that_never_started_leave_nothing(services: DistributionServices) -> None:
    before = set(threading.enumerate())

    services.open()
    services.open()
    services.stop()
    services.stop()

    assert set(threading.enumerate()) <= before


def test_ports_and_files_are_free_once_stopped(config: ClusterConfig) -> None:
    for _ in range(2):
        services = DistributionServices(config)
        services.start()
        services.start()
        services.stop()


def test_second_master_on_one_data_directory_is_refused_and_harms_nothing(
    services: DistributionServices, config: ClusterConfig
) -> None:
    services.start()

    with pytest.raises(StartError, match=r"another master .* already uses"):
        DistributionServices(config).open()

    token = RevokeToken(REQUEST, "no-such-token")
    assert "no token" in str(master_of(services).runtime.post(token).exception(DEADLINE_S))


def test_master_that_cannot_save_ends_with_the_reason_and_answers_nobody_more(
    services: DistributionServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> bool:
        raise StorageError("cannot save to the database: the disk is full")

    services.start()
    runtime = master_of(services).runtime
    token = load_join_token(DataDir(services.config.data_dir))
    assert token is not None
    monkeypatch.setattr(writer, "apply", no_room)

    unsaved = runtime.post(RevokeToken(REQUEST, token.token_id))

    with pytest.raises(StorageError, match="the disk is full"):
        services.wait()
    assert isinstance(unsaved.exception(DEADLINE_S), StartError)
    late = runtime.post(DrainDevice(REQUEST, "d", on=True))
    assert isinstance(late.exception(DEADLINE_S), StartError)


def test_revoked_client_hears_no_more_of_what_it_watched(services: DistributionServices) -> None:
    services.start()
    runtime = master_of(services).runtime
    spy, friend = (client_named(services, name) for name in ("spy", "friend"))
    with closing(spy), closing(friend):
        spy.send(encode(Submit(REQUEST, (TaskSpec("noop", b"\x80"),), watch=True)))
        submitted = decode_to_client(received(spy))
        assert isinstance(submitted, Submitted)
        friend.send(encode(Watch(REQUEST, submitted.task_ids)))
        received(friend)

        runtime.post(RevokeDevice(b"1" * 16, "spy")).result(DEADLINE_S)
        runtime.post(CancelTasks(b"2" * 16, submitted.task_ids)).result(DEADLINE_S)

        assert isinstance(decode_to_client(received(friend)), Finished)
        assert not any(isinstance(one, Finished) for one in map(decode_to_client, left_in(spy)))


def client_named(services: DistributionServices, name: str) -> PeerSockets:
    """A program with a client's key of its own."""
    bootstrap, keys = new_key_pair(), new_key_pair()
    token = CreateToken(name.encode(), name, bootstrap.public, Role.CLIENT, 0, 1)
    master_of(services).runtime.post(token).result(DEADLINE_S)
    with closing(peer_of(services, bootstrap)) as newcomer:
        newcomer.send(encode(Enrol(PROTOCOL_VERSION, keys.public, name)))
        assert isinstance(decode_to_worker(received(newcomer)), Enrolled)
    return peer_of(services, keys)


def peer_of(services: DistributionServices, keys: KeyPair) -> PeerSockets:
    public = load_public_key(Path(services.config.data_dir) / "keys" / "server.pub")
    assert public is not None
    return PeerSockets("127.0.0.1", services.config.dispatch_port, 0, public, keys)


def received(peer: PeerSockets) -> bytes:
    end = time.monotonic() + DEADLINE_S
    while time.monotonic() < end:
        peer.poll(100)
        peer.poll_monitor()
        for frame in peer.receive(1):
            return frame
    raise AssertionError("nothing came")


def left_in(peer: PeerSockets) -> list[bytes]:
    """What was sent to it before anybody else was told."""
    peer.poll_monitor()
    peer.poll(200)
    return peer.receive(10)


def test_the_token_for_workers_of_this_machine_is_made_anew_once_revoked(
    config: ClusterConfig,
) -> None:
    tokens = []
    for _ in range(3):
        services = DistributionServices(config)
        services.start()
        token = load_join_token(DataDir(config.data_dir))
        assert token is not None
        tokens.append(token.token_id)
        if len(tokens) == 2:
            revoke = RevokeToken(REQUEST, token.token_id)
            assert master_of(services).runtime.post(revoke).result(DEADLINE_S) == Changed(REQUEST)
        services.stop()

    assert tokens[0] == tokens[1]
    assert tokens[2] != tokens[1]


def test_the_three_functions_are_safe_twice_and_say_what_is_missing(config: ClusterConfig) -> None:
    with pytest.raises(ConfigError, match="init_distribution_services"):
        zmqcluster.start_distribution_services()

    made = zmqcluster.init_distribution_services(SchedulerMode.MASTER, "master-7", config)
    try:
        again = zmqcluster.init_distribution_services(SchedulerMode.MASTER)
        zmqcluster.start_distribution_services()
        zmqcluster.start_distribution_services()

        assert again is made
        assert master_of(made).device_id == "master-7"
    finally:
        zmqcluster.stop_distribution_services()
        zmqcluster.stop_distribution_services()


def test_master_whose_loop_stands_still_is_not_ready(
    services: DistributionServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    services.start()
    master = master_of(services)
    go_on = threading.Event()
    real = master.runtime._core.handle
    monkeypatch.setattr(
        master.runtime._core, "handle", lambda *turn: go_on.wait(DEADLINE_S) and real(*turn)
    )
    monkeypatch.setattr(backend, "SILENT_MS_MAX", 1_000)

    wait_until(lambda: not master.backend.ready()[0], "it is not ready")

    assert "loop has stood still" in master.backend.ready()[1]
    go_on.set()
    wait_until(lambda: master.backend.ready() == (True, ""), "it is ready again")


def test_signal_that_does_not_wake_the_main_thread_is_noticed_all_the_same(
    config: ClusterConfig,
) -> None:
    """One that comes while it falls asleep wakes nobody; one that another thread takes neither."""
    services = DistributionServices(config)
    main = threading.main_thread()

    def sleeps() -> bool:
        assert main.ident is not None
        frame = sys._current_frames()[main.ident]
        state = Path(f"/proc/self/task/{main.native_id}/stat").read_text().rpartition(")")[2]
        return frame.f_code.co_name == "_next_news" and state.split()[0] == "S"

    def take_it() -> None:
        wait_until(sleeps, "the main thread waits")
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    former = signal.signal(signal.SIGTERM, lambda number, _: services.on_signal(number))
    thread = threading.Thread(target=take_it)
    try:
        thread.start()
        assert services.wait() == 0
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, former)
