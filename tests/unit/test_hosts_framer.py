"""The stream between processes: what was said before the noise still counts."""

from __future__ import annotations

import msgspec
import pytest

from executors.hostwire import Framer, Pong, frame
from zmqcluster.errors import RemoteProtocolError

NOISE = b"\xff" * 64


def test_messages_before_the_noise_are_heard_and_the_noise_is_told() -> None:
    framer = Framer(msgspec.msgpack.Decoder(Pong))

    assert framer.feed(frame(Pong(1)) + frame(Pong(2)) + NOISE) == [Pong(1), Pong(2)]

    with pytest.raises(RemoteProtocolError):
        framer.check()
    with pytest.raises(RemoteProtocolError):
        framer.feed(frame(Pong(3)))


def test_noise_alone_raises_at_once() -> None:
    framer = Framer(msgspec.msgpack.Decoder(Pong))

    with pytest.raises(RemoteProtocolError):
        framer.feed(NOISE)


def test_messages_may_come_byte_by_byte() -> None:
    framer = Framer(msgspec.msgpack.Decoder(Pong))
    stream = frame(Pong(1)) + frame(Pong(2))

    heard = [message for byte in stream for message in framer.feed(bytes([byte]))]

    assert heard == [Pong(1), Pong(2)]
    framer.check()
