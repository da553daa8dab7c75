"""Every valid frame with lies in it: a message that is one, or the one error, in little memory."""

from __future__ import annotations

import tracemalloc
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.hostile_bytes import LIES, lies, paths, widest
from tests.unit.test_codec import DOORS
from tests.unit.test_messages import EXAMPLES, decoded, name_of
from zmqcluster import codec
from zmqcluster.errors import RemoteProtocolError
from zmqcluster.messages import Message

# What a byte on the wire may become: a task reference of three bytes is about 100 bytes in memory.
GROWTH_MAX = 48
# An error, its text, and what Python keeps for next time.
OVERHEAD_BYTES_MAX = 64 * 1024


def knock(frame: bytes) -> None:
    """At every door; what comes out has one spelling, which is read as the same."""
    tracemalloc.start()
    try:
        heard = [message for door in DOORS if (message := _answer(door, frame)) is not None]
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes <= OVERHEAD_BYTES_MAX + GROWTH_MAX * len(frame), (peak_bytes, len(frame))
    for message in heard:
        assert isinstance(message, get_args(Message))
        spelled = codec.encode(message)
        again = decoded(message, spelled)
        assert (again, codec.encode(again)) == (message, spelled)


def _answer(door: Any, frame: bytes) -> Any:
    try:
        return door(frame)
    except RemoteProtocolError:
        return None


@pytest.mark.parametrize(("message", "array"), EXAMPLES, ids=name_of)
def test_the_longest_form_is_the_same_message(message: Message, array: list[Any]) -> None:
    frame = widest(array)

    assert decoded(message, frame) == message
    assert codec.encode(decoded(message, frame)) == codec.encode(message)


@pytest.mark.parametrize(("message", "array"), EXAMPLES, ids=name_of)
def test_every_lie_in_every_place_is_refused_or_harmless(
    message: Message, array: list[Any]
) -> None:
    for place in paths(array):
        for lie in LIES:
            knock(widest(array, {place: lie}))


@given(st.sampled_from(EXAMPLES), st.data())
def test_lies_are_refused_or_harmless(pair: tuple[Message, list[Any]], data: st.DataObject) -> None:
    _, array = pair
    places = st.sampled_from(list(paths(array)))
    frame = widest(array, data.draw(st.dictionaries(places, lies, min_size=1, max_size=3)))

    knock(frame[: data.draw(st.integers(0, len(frame)))])
    knock(frame)
    knock(frame + data.draw(lies))


@pytest.mark.parametrize(("message", "array"), EXAMPLES, ids=name_of)
def test_every_cut_is_refused(message: Message, array: list[Any]) -> None:
    frame = widest(array)

    for end in range(len(frame)):
        with pytest.raises(RemoteProtocolError):
            decoded(message, frame[:end])


@pytest.mark.parametrize(("message", "array"), EXAMPLES, ids=name_of)
def test_a_position_given_twice_is_refused(message: Message, array: list[Any]) -> None:
    """Arrays have no names to repeat: one value too many is refused, and so is a map of them."""
    named = {index: value for index, value in enumerate(array)}
    pairs = b"".join(widest(each) for pair in [*named.items(), (0, array[0])] for each in pair)

    for frame in (
        widest([*array, array[-1]]),
        widest([array[0], *array]),
        b"\xdf" + (len(array) + 1).to_bytes(4, "big") + pairs,
    ):
        with pytest.raises(RemoteProtocolError):
            decoded(message, frame)
