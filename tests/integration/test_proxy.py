"""What a proxy can and cannot do to a CURVE connection: the ground the network faults stand on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import zmq

from tests.support.cluster import wait_until
from tests.support.proxy import Proxy, Way, is_message

WAIT_MS = 5_000


class Pair:
    """A ROUTER, a proxy before it, and a DEALER that talks through the proxy."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        public, secret = zmq.curve_keypair()
        self.router = self.context.socket(zmq.ROUTER)
        self.router.set(zmq.CURVE_SERVER, 1)
        self.router.set(zmq.CURVE_SECRETKEY, secret)
        self.proxy = Proxy(self.router.bind_to_random_port("tcp://127.0.0.1"))
        self.dealer = self.context.socket(zmq.DEALER)
        self.dealer.set(zmq.CURVE_SERVERKEY, public)
        own_public, own_secret = zmq.curve_keypair()
        self.dealer.set(zmq.CURVE_PUBLICKEY, own_public)
        self.dealer.set(zmq.CURVE_SECRETKEY, own_secret)
        self.dealer.set(zmq.RECONNECT_IVL, 10)
        self.dealer.connect(f"tcp://127.0.0.1:{self.proxy.port}")

    def close(self) -> None:
        self.dealer.close(0)
        self.router.close(0)
        self.proxy.close()
        self.context.term()

    def hears(self) -> bytes:
        assert self.router.poll(WAIT_MS)
        return self.router.recv_multipart()[-1]


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def test_lost_frame_leaves_the_connection_standing(pair: Pair) -> None:
    pair.dealer.send(b"first")
    assert pair.hears() == b"first"
    losses = iter([True])
    pair.proxy.weather.edit = lambda _, frame: [] if next(losses, False) else [frame]

    pair.dealer.send(b"lost")
    pair.dealer.send(b"next")

    assert pair.hears() == b"next"
    assert pair.proxy.connections == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda frame: [frame, frame],
        lambda frame: [frame[:-1] + bytes([frame[-1] ^ 1])],
    ],
    ids=["repeated", "changed"],
)
def test_spoiled_frame_costs_the_connection_and_is_never_heard_twice(
    pair: Pair, spoil: Callable[[bytes], list[bytes]]
) -> None:
    pair.dealer.send(b"first")
    assert pair.hears() == b"first"
    pair.proxy.weather.edit = lambda _, frame: spoil(frame)

    pair.dealer.send(b"spoiled")

    wait_until(lambda: pair.proxy.connections > 1, "it connects anew")
    pair.proxy.clear()
    pair.dealer.send(b"after")
    heard = [pair.hears()]
    while heard[-1] != b"after":
        heard.append(pair.hears())
    assert heard.count(b"spoiled") <= 1


def test_stalled_way_delivers_later(pair: Pair) -> None:
    pair.dealer.send(b"first")
    assert pair.hears() == b"first"
    pair.proxy.weather.stalled = {Way.UP}

    pair.dealer.send(b"held")

    assert not pair.router.poll(100)
    pair.proxy.clear()
    assert pair.hears() == b"held"


def test_messages_are_told_from_the_handshake() -> None:
    assert is_message(b"\x00\x0a\x07MESSAGE..")
    assert is_message(b"\x02" + (300).to_bytes(8, "big") + b"\x07MESSAGE..")
    assert not is_message(b"\x04\x0a\x05HELLO....")
