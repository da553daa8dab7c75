"""A master's process from the inside: what it claims, gives back, and does when it cannot go on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import zmqcluster
from storage import writer
from tests.support.cluster import free_ports
from zmqcluster.config import ClusterConfig
from zmqcluster.errors import ConfigError, StartError, StorageError
from zmqcluster.messages import Changed, DrainDevice, RevokeToken
from zmqcluster.model import SchedulerMode
from zmqcluster.security.datadir import DataDir
from zmqcluster.security.tokens import load_join_token
from zmqcluster.services import DistributionServices
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
