"""The master tries its own locks; each lock taken out makes the self-test fail."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from zmqcluster.config import ClusterConfig
from zmqcluster.errors import StartError
from zmqcluster.model import SchedulerMode
from zmqcluster.runtime import socket_options, transport
from zmqcluster.runtime.clock import ManualClock, SystemClock
from zmqcluster.runtime.transport import MasterSockets
from zmqcluster.security.keys import KeyPair, new_key_pair
from zmqcluster.security.selftest import check_doors
from zmqcluster.security.zap import Allowlist, ZapHandler
from zmqcluster.services.master_node import MasterNode

KEYS = new_key_pair()
CLOCK = SystemClock()
HOST = "127.0.0.1"


def check(sockets: MasterSockets, bind: str = HOST) -> None:
    ports = sockets.dispatch_port, sockets.control_port
    check_doors(bind, *ports, KEYS.public, sockets.serve_door, CLOCK.monotonic_ms)


@pytest.fixture
def sockets() -> Iterator[MasterSockets]:
    one = MasterSockets(HOST, 0, 0, KEYS, Allowlist())
    yield one
    one.close()


def test_locked_doors_pass_quickly_and_the_knocks_are_counted(sockets: MasterSockets) -> None:
    started = time.monotonic()

    check(sockets)

    assert time.monotonic() - started < 0.5
    assert sockets.counters.handshakes_denied >= 2


def test_doors_bound_to_every_address_are_tried_through_loopback(sockets: MasterSockets) -> None:
    check(sockets, bind="0.0.0.0")


@pytest.mark.parametrize(
    "let_in", [b"dispatch", b"control"], ids=["zap lets all in", "zap lets all hear"]
)
def test_doorman_that_lets_everybody_in_is_noticed(
    sockets: MasterSockets, monkeypatch: pytest.MonkeyPatch, let_in: bytes
) -> None:
    strict = ZapHandler.answer

    def lax(self: ZapHandler, frames: list[bytes]) -> list[bytes]:
        if frames[2] == let_in:
            return [b"1.0", frames[1], b"200", b"OK", b"anybody", b""]
        return strict(self, frames)

    monkeypatch.setattr(ZapHandler, "answer", lax)

    with pytest.raises(StartError, match=r"a stranger at port .* was let in.*does not serve"):
        check(sockets)


def test_doors_without_a_doorman_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def curve_without_zap(socket: socket_options.Socket, keys: KeyPair, domain: bytes) -> None:
        socket_options.lock_down(socket, keys, domain)
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 0)

    monkeypatch.setattr(transport, "lock_down", curve_without_zap)
    monkeypatch.setattr(transport, "ZAP_ENDPOINT", "inproc://nobody-asks-here")
    open_sockets = MasterSockets(HOST, 0, 0, KEYS, Allowlist())
    try:
        with pytest.raises(StartError, match=r"a stranger at port .* was let in"):
            check(open_sockets)
    finally:
        open_sockets.close()


def test_doors_without_curve_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "lock_down", lambda *_: None)
    open_sockets = MasterSockets(HOST, 0, 0, KEYS, Allowlist())
    try:
        with pytest.raises(StartError, match=r"a bare client at port .* was let in"):
            check(open_sockets)
    finally:
        open_sockets.close()


def test_doorman_that_does_not_answer_is_no_proof(sockets: MasterSockets) -> None:
    clock = ManualClock()
    ports = sockets.dispatch_port, sockets.control_port

    with pytest.raises(StartError, match=r"a stranger at port .* got no refusal in time"):
        check_doors(HOST, *ports, KEYS.public, clock.advance, clock.monotonic_ms)


def test_knocks_behind_a_crowd_are_waited_for(sockets: MasterSockets) -> None:
    ahead = 200

    def serve_door(timeout_ms: int) -> None:
        """Each turn lets in one of the crowd, at once."""
        nonlocal ahead
        ahead -= 1
        if ahead <= 0:
            sockets.serve_door(timeout_ms)

    ports = sockets.dispatch_port, sockets.control_port

    check_doors(HOST, *ports, KEYS.public, serve_door, CLOCK.monotonic_ms)


def test_master_tries_its_locks_before_it_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def lax(self: ZapHandler, frames: list[bytes]) -> list[bytes]:
        return [b"1.0", frames[1], b"200", b"OK", b"anybody", b""]

    monkeypatch.setattr(ZapHandler, "answer", lax)
    config = ClusterConfig(mode=SchedulerMode.MASTER, master_port=0, data_dir=str(tmp_path))

    with pytest.raises(StartError, match="was let in"):
        MasterNode(config, SystemClock()).open()
