"""The stream between agent, warden and hosts, however it is cut into pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executors.hostwire import (
    FROM_HOST,
    HOST_FRAME_BYTES_MAX,
    TO_HOST,
    Cancel,
    Finished,
    Framer,
    Ping,
    Pong,
    Run,
    frame,
)
from zmqcluster.errors import RemoteProtocolError
from zmqcluster.messages import AttemptRef, TaskOrder, TaskResult
from zmqcluster.model import Outcome

MESSAGES = (
    Ping(1),
    Run((TaskOrder(1, 1, "noop", b"\x80", 1000),) * 3, 5),
    Cancel((AttemptRef(1, 1),)),
    Run((), 0),
)


@given(st.lists(st.integers(1, 40), max_size=60))
def test_messages_come_out_however_the_stream_is_cut(sizes: list[int]) -> None:
    stream = b"".join(frame(message) for message in MESSAGES)
    framer, got, at = Framer(TO_HOST), [], 0

    for size in [*sizes, len(stream)]:
        got += framer.feed(stream[at : at + size])
        at += size

    assert tuple(got) == MESSAGES


@given(st.binary(max_size=100))
def test_any_bytes_are_messages_or_one_kind_of_error(data: bytes) -> None:
    framer = Framer(FROM_HOST)
    try:
        framer.feed(data)
        framer.feed(len(data).to_bytes(4, "big") + data)
    except RemoteProtocolError:
        return


def test_oversize_frame_is_refused_unread() -> None:
    with pytest.raises(RemoteProtocolError, match="frame of"):
        Framer(FROM_HOST).feed((HOST_FRAME_BYTES_MAX + 1).to_bytes(4, "big"))


def test_host_cannot_send_what_only_the_agent_says() -> None:
    with pytest.raises(RemoteProtocolError):
        Framer(FROM_HOST).feed(frame(MESSAGES[1]))

    assert Framer(FROM_HOST).feed(frame(Pong(1))) == [Pong(1)]


def test_result_out_of_bounds_does_not_pass() -> None:
    wrong = TaskResult(1, 1, Outcome.FAILED, error="x" * 5_000)

    with pytest.raises(RemoteProtocolError):
        Framer(FROM_HOST).feed(frame(Finished((wrong,))))
