"""Real sockets on loopback: who gets in, what gets through, and who is noticed to be gone."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import zmq
from zmq.utils import z85

from tests.support.proxy import Proxy
from zmqcluster.core.events import Principal
from zmqcluster.errors import StartError
from zmqcluster.model import FRAME_BYTES_MAX, DeviceId, Role
from zmqcluster.runtime import socket_options
from zmqcluster.runtime.transport import Link, MasterSockets, PeerSockets, Received, Sent
from zmqcluster.security.keys import KeyPair, new_key_pair
from zmqcluster.security.zap import Allowlist

DEADLINE_S = 5.0
WORKER = Principal(Role.WORKER, DeviceId("w1"))


class MasterBench:
    """The master's sockets, with a loop around them that runs until something is true."""

    def __init__(self) -> None:
        self.keys = new_key_pair()
        self.allowlist = Allowlist()
        self.sockets = MasterSockets("127.0.0.1", 0, 0, self.keys, self.allowlist)
        self.received: list[Received] = []
        self.lost: list[bytes] = []

    def turn(self, timeout_ms: int = 10) -> None:
        poller = zmq.Poller()
        for one in self.sockets.sockets:
            poller.register(one, zmq.POLLIN)
        poller.poll(timeout_ms)
        self.sockets.answer_zap()
        self.received += self.sockets.receive(100)
        self.lost += self.sockets.lost_peers()

    def until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + DEADLINE_S
        while not true():
            assert time.monotonic() < end, "the deadline passed"
            self.turn()

    def frames(self) -> list[bytes]:
        return [frame for _, _, frame in self.received]

    def worker_keys(self, principal: Principal = WORKER) -> KeyPair:
        keys = new_key_pair()
        self.allowlist.allow(keys.public, principal)
        return keys


@pytest.fixture
def master() -> Iterator[MasterBench]:
    bench = MasterBench()
    yield bench
    bench.sockets.close()


@pytest.fixture
def peers(master: MasterBench) -> Iterator[Callable[..., PeerSockets]]:
    made: list[PeerSockets] = []

    def make(keys: KeyPair | None = None, *, server_public: bytes | None = None) -> PeerSockets:
        ports = master.sockets.dispatch_port, master.sockets.control_port
        public = server_public or master.keys.public
        made.append(PeerSockets("127.0.0.1", *ports, public, keys or master.worker_keys()))
        return made[-1]

    yield make
    for one in made:
        one.close()


Peers = Callable[..., PeerSockets]


def links_of(master: MasterBench, peer: PeerSockets, wanted: Link) -> list[Link]:
    links: list[Link] = []

    def seen() -> bool:
        links.extend(peer.poll_monitor())
        return wanted in links

    master.until(seen)
    return links


class Stranger:
    """Plain pyzmq: a program that is not ours."""

    def __init__(self, master: MasterBench) -> None:
        self._master = master
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []

    def bare(self, kind: int, port: int) -> zmq.Socket[bytes]:
        """Without any security."""
        socket = self._socket(kind)
        socket.connect(f"tcp://127.0.0.1:{port}")
        return socket

    def enrolled_dealer(self, routing_id: bytes = b"") -> zmq.Socket[bytes]:
        """With a key the master knows."""
        keys = self._master.worker_keys()
        dealer = self._socket(zmq.DEALER)
        dealer.curve_serverkey = z85.encode(self._master.keys.public)
        dealer.curve_publickey = z85.encode(keys.public)
        dealer.curve_secretkey = z85.encode(keys.secret)
        if routing_id:
            dealer.routing_id = routing_id
        dealer.connect(f"tcp://127.0.0.1:{self._master.sockets.dispatch_port}")
        return dealer

    def close(self) -> None:
        self._context.destroy(linger=0)

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        self._sockets.append(self._context.socket(kind))
        self._sockets[-1].linger = 0
        return self._sockets[-1]


@pytest.fixture
def stranger(master: MasterBench) -> Iterator[Stranger]:
    one = Stranger(master)
    yield one
    one.close()


def test_known_worker_is_heard_under_its_name_and_answered(
    master: MasterBench, peers: Peers
) -> None:
    worker = peers()

    assert worker.send(b"hello")
    master.until(lambda: bool(master.received))
    peer, principal, frame = master.received[0]
    assert (principal, frame) == (WORKER, b"hello")
    assert master.sockets.send(peer, b"welcome") is Sent.SENT
    master.until(lambda: worker.receive(10) == [b"welcome"])
    assert master.sockets.counters.connections == 1


def test_hints_reach_subscribers(master: MasterBench, peers: Peers) -> None:
    worker = peers()
    heard: list[bytes] = []

    def hint_heard() -> bool:
        master.sockets.publish(b"hint")
        heard.extend(worker.receive_hints(10))
        return bool(heard)

    master.until(hint_heard)

    assert set(heard) == {b"hint"}


def test_stranger_with_a_random_key_is_refused_and_told_so(
    master: MasterBench, peers: Peers
) -> None:
    stranger = peers(new_key_pair())
    stranger.send(b"let me in")

    links = links_of(master, stranger, Link.REFUSED)

    assert Link.CONNECTED not in links
    assert master.received == []
    assert master.sockets.counters.handshakes_denied >= 1


def test_refused_peer_gets_in_with_fresh_sockets_once_its_key_is_known(
    master: MasterBench, peers: Peers
) -> None:
    keys = new_key_pair()
    peer = peers(keys)
    links_of(master, peer, Link.REFUSED)

    master.allowlist.allow(keys.public, WORKER)
    peer.recreate()
    peer.send(b"hello")
    master.until(lambda: master.frames() == [b"hello"])


def test_connection_with_a_frame_that_cannot_be_opened_is_closed(
    master: MasterBench, peers: Peers
) -> None:
    with Proxy(master.sockets.dispatch_port) as proxy:
        peer = PeerSockets("127.0.0.1", proxy.port, 0, master.keys.public, master.worker_keys())
        peer.send(b"before")
        master.until(lambda: master.frames() == [b"before"])
        proxy.weather.edit = lambda _, frame: [frame[:-1] + bytes([frame[-1] ^ 1])]

        peer.send(b"spoiled")
        master.until(lambda: len(master.lost) == 1)

        proxy.clear()
        # What leaves before the peer hears of it is lost with the old connection.
        master.until(lambda: peer.send(b"after") and master.frames()[-1] == b"after")
        peer.close()

    assert b"spoiled" not in master.frames()


@pytest.mark.parametrize("kind", [zmq.DEALER, zmq.REQ])
def test_client_without_curve_is_refused(
    master: MasterBench, stranger: Stranger, kind: int
) -> None:
    stranger.bare(kind, master.sockets.dispatch_port).send(b"let me in")

    master.until(lambda: master.sockets.counters.handshakes_broken > 0)

    assert master.received == []


def test_strangers_hear_no_hints(master: MasterBench, peers: Peers, stranger: Stranger) -> None:
    unknown = peers(new_key_pair())
    client = peers(master.worker_keys(Principal(Role.CLIENT)))
    bare = stranger.bare(zmq.SUB, master.sockets.control_port)
    bare.subscribe(b"")
    known = peers()
    heard: list[bytes] = []

    def many_hints_heard() -> bool:
        master.sockets.publish(b"hint")
        heard.extend(known.receive_hints(10))
        return len(heard) > 20

    master.until(many_hints_heard)

    assert unknown.receive_hints(10) == []
    assert client.receive_hints(10) == []
    assert bare.poll(0) == 0


def test_revoked_key_is_cut_off_at_its_next_message_while_connected(
    master: MasterBench, peers: Peers
) -> None:
    keys = master.worker_keys()
    worker, other = peers(keys), peers()
    worker.send(b"before")
    master.until(lambda: master.frames() == [b"before"])

    master.allowlist.deny(keys.public)
    worker.send(b"after")
    master.until(lambda: master.sockets.counters.dropped_unknown_key == 1)
    other.send(b"others go on")
    master.until(lambda: len(master.received) == 2)

    assert master.frames() == [b"before", b"others go on"]


def test_changed_principal_counts_from_the_next_message(master: MasterBench, peers: Peers) -> None:
    keys = master.worker_keys()
    worker = peers(keys)
    worker.send(b"1")
    master.until(lambda: len(master.received) == 1)

    master.allowlist.allow(keys.public, Principal(Role.CLIENT))
    worker.send(b"2")
    master.until(lambda: len(master.received) == 2)

    assert [who.role for _, who, _ in master.received] == [Role.WORKER, Role.CLIENT]


@pytest.mark.parametrize("parts", [2, 3, 1000])
def test_message_of_many_frames_is_dropped_whole_and_counted(
    master: MasterBench, stranger: Stranger, parts: int
) -> None:
    dealer = stranger.enrolled_dealer()

    dealer.send_multipart([b"x"] * parts)
    dealer.send(b"one")
    master.until(lambda: bool(master.received))

    assert master.frames() == [b"one"]
    assert master.sockets.counters.dropped_shape == 1


def test_message_without_a_payload_is_an_empty_frame_for_the_codec_to_refuse(
    master: MasterBench, peers: Peers
) -> None:
    peers().send(b"")

    master.until(lambda: master.frames() == [b""])


def test_peer_that_names_itself_is_not_heard(master: MasterBench, stranger: Stranger) -> None:
    dealer = stranger.enrolled_dealer(routing_id=b"boss")

    dealer.send(b"it is me")
    master.until(lambda: master.sockets.counters.dropped_shape == 1)

    assert master.received == []


def test_largest_frame_passes_and_a_larger_one_costs_the_connection(
    master: MasterBench, peers: Peers
) -> None:
    worker, other = peers(), peers()
    worker.send(b"x" * FRAME_BYTES_MAX)
    master.until(lambda: len(master.received) == 1)
    worker.poll_monitor()

    worker.send(b"x" * (FRAME_BYTES_MAX + 1))
    links_of(master, worker, Link.DISCONNECTED)
    other.send(b"others go on")
    master.until(lambda: len(master.received) == 2)

    assert [len(frame) for frame in master.frames()] == [FRAME_BYTES_MAX, len(b"others go on")]


@pytest.mark.parametrize(
    "greeting",
    [
        b"",
        b"\x00",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\xff" * 64,
        b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f" * 10,
        # A good greeting of ZMTP 3.1 with CURVE, then noise for a HELLO.
        b"\xff%b\x7f\x03\x01CURVE%b" % (b"\0" * 8, b"\0" * 47) + b"\x07" * 500,
        # The greeting of ZMTP 1.0, whose heap overflow was an advisory.
        b"\x01\x00" + b"\xff" * 200,
    ],
)  # fmt: skip
def test_garbage_in_place_of_a_greeting_changes_nothing(
    master: MasterBench, peers: Peers, greeting: bytes
) -> None:
    worker = peers()
    for port in (master.sockets.dispatch_port, master.sockets.control_port):
        with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as raw:
            raw.sendall(greeting)
            # A reset instead of a polite end, too.
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    worker.send(b"still here")

    master.until(lambda: bool(master.received))

    assert master.frames() == [b"still here"]
    assert master.lost == []


def test_peer_that_leaves_is_noticed_and_sends_to_it_say_so(
    master: MasterBench, peers: Peers
) -> None:
    worker = peers()
    worker.send(b"hello")
    master.until(lambda: bool(master.received))
    peer = master.received[0][0]

    worker.close()
    master.until(lambda: master.lost == [peer])

    master.until(lambda: master.sockets.send(peer, b"anyone?") is Sent.GONE)
    assert master.sockets.counters.sent_gone == 1


def test_peer_heard_before_anybody_asked_who_is_connected_is_not_lost(
    master: MasterBench, peers: Peers
) -> None:
    peers().send(b"hello")
    router = master.sockets.sockets[0]
    # It knocks at both ports, in any order.
    while not router.poll(10):
        master.sockets.answer_zap()

    assert len(master.sockets.receive(10)) == 1
    assert master.sockets.lost_peers() == []


def test_killed_process_is_noticed_within_200_ms(master: MasterBench) -> None:
    keys = master.worker_keys()
    program = (
        "import sys, time\n"
        "from zmqcluster.runtime.transport import PeerSockets\n"
        "from zmqcluster.security.keys import KeyPair\n"
        "port, server, public, secret = sys.argv[1:]\n"
        "keys = KeyPair(bytes.fromhex(public), bytes.fromhex(secret))\n"
        "peer = PeerSockets('127.0.0.1', int(port), 0, bytes.fromhex(server), keys)\n"
        "peer.send(b'hello')\n"
        "time.sleep(60)\n"
    )
    port = str(master.sockets.dispatch_port)
    keys_hex = [part.hex() for part in (master.keys.public, keys.public, keys.secret)]
    with subprocess.Popen([sys.executable, "-c", program, port, *keys_hex]) as child:
        try:
            master.until(lambda: bool(master.received))
        finally:
            os.kill(child.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        master.until(lambda: bool(master.lost))
        noticed_after_s = time.monotonic() - killed_at

    assert master.lost == [master.received[0][0]]
    assert noticed_after_s < 0.2


def test_reconnected_peer_is_a_new_one_and_the_old_one_is_lost(
    master: MasterBench, peers: Peers
) -> None:
    worker = peers()
    for round_ in range(5):
        worker.send(b"hello")
        master.until(lambda wanted=round_ + 1: len(master.received) == wanted)  # type: ignore[misc]
        worker.recreate()

    master.until(lambda: len(set(master.lost)) == 5)

    assert len({peer for peer, _, _ in master.received}) == 5
    assert set(master.lost) == {peer for peer, _, _ in master.received}


def test_peer_that_does_not_read_makes_sends_full_and_costs_nobody_else(
    master: MasterBench, peers: Peers
) -> None:
    lazy, eager = peers(), peers()
    lazy.send(b"lazy")
    eager.send(b"eager")
    master.until(lambda: len(master.received) == 2)
    peer_of = {frame: peer for peer, _, frame in master.received}
    frame = b"x" * 100_000

    outcomes = [master.sockets.send(peer_of[b"lazy"], frame) for _ in range(5_000)]

    assert outcomes[0] is Sent.SENT
    assert set(outcomes) == {Sent.SENT, Sent.FULL}
    assert master.sockets.counters.sent_full == outcomes.count(Sent.FULL)
    assert master.sockets.send(peer_of[b"eager"], b"you") is Sent.SENT
    master.until(lambda: eager.receive(10) == [b"you"])


def test_one_turn_reads_no_more_than_asked_for(master: MasterBench, peers: Peers) -> None:
    worker = peers()
    worker.send(b"hello")
    master.until(lambda: bool(master.received))
    for number in range(10):
        worker.send(b"%d" % number)
    router = master.sockets.sockets[0]

    counts: list[int] = []
    while sum(counts) < 10 and router.poll(1000):
        counts.append(len(master.sockets.receive(3)))

    assert sum(counts) == 10
    assert max(counts) <= 3


def test_receive_stops_at_its_bytes_however_few_frames_they_are(
    master: MasterBench, peers: Peers
) -> None:
    worker = peers()
    worker.send(b"hello")
    master.until(lambda: bool(master.received))
    for _ in range(9):
        worker.send(b"x" * 1000)
    router = master.sockets.sockets[0]

    counts: list[int] = []
    while sum(counts) < 9 and router.poll(1000):
        counts.append(len(master.sockets.receive(100, bytes_max=2500)))

    assert sum(counts) == 9
    assert max(counts) <= 3


def test_wrong_server_key_never_connects_and_is_told_apart(
    master: MasterBench, peers: Peers
) -> None:
    worker = peers(server_public=new_key_pair().public)
    worker.send(b"hello")

    links = links_of(master, worker, Link.BROKEN)

    assert Link.CONNECTED not in links
    assert master.received == []


def test_port_in_use_is_one_clear_sentence(master: MasterBench) -> None:
    port = master.sockets.dispatch_port

    with pytest.raises(
        StartError, match=rf"port {port} is in use on 127\.0\.0\.1.*--dispatch-port"
    ):
        MasterSockets("127.0.0.1", port, 0, new_key_pair(), Allowlist())
    with pytest.raises(StartError, match=rf"port {port} is in use.*--control-port"):
        MasterSockets("127.0.0.1", 0, port, new_key_pair(), Allowlist())


@pytest.mark.parametrize("address", ["192.0.2.1", "no-such-interface", "1.2.3.4.5"])
def test_address_that_is_not_ours_is_one_clear_sentence(address: str) -> None:
    with pytest.raises(StartError, match=r"cannot listen on .*check --bind"):
        MasterSockets(address, 0, 0, new_key_pair(), Allowlist())


def test_nothing_is_left_open_after_close() -> None:
    bench = MasterBench()
    peer = PeerSockets(
        "127.0.0.1", bench.sockets.dispatch_port, 0, bench.keys.public, bench.worker_keys()
    )
    peer.send(b"hello")
    bench.until(lambda: bool(bench.received))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    started = time.monotonic()

    for _ in range(2):
        peer.close()
        bench.sockets.close()

    assert time.monotonic() - started < 1.0
    if before:
        assert len(os.listdir("/proc/self/fd")) < before


def test_too_few_descriptors_are_said_before_anything_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket_options, "raise_descriptor_limit", lambda: 63)

    with pytest.raises(StartError, match=r"may open 63 .* at least 64.*ulimit -n"):
        MasterBench()
