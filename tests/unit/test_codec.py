"""Whatever the bytes: a message, or RemoteProtocolError, in bounded memory. Nothing else."""

from __future__ import annotations

import math
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack  # type: ignore[import-untyped]  # it ships none
import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.unit.test_messages import EXAMPLES, decoded, name_of
from zmqcluster import codec
from zmqcluster.errors import LocalProtocolError, RemoteProtocolError
from zmqcluster.messages import (
    Answer,
    Assign,
    ClientMessage,
    Enrol,
    Message,
    Submit,
    TaskSpec,
    Wire,
    WorkerMessage,
)
from zmqcluster.model import FRAME_BYTES_MAX, Role

DOORS: list[Callable[[bytes], object]] = [
    lambda frame: codec.decode_inbound(Role.ENROL, frame),
    lambda frame: codec.decode_inbound(Role.WORKER, frame),
    lambda frame: codec.decode_inbound(Role.CLIENT, frame),
    codec.decode_to_worker,
    codec.decode_to_client,
    codec.decode_hint,
]
FRAMES = [codec.encode(message) for message, _ in EXAMPLES]
ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=40)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=4))
    | st.builds(msgpack.Timestamp, st.integers(0, 2**32)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 3), inner, max_size=3)
    ),
    max_leaves=8,
)


def knock(frame: bytes) -> None:
    """At every door: a message of ours comes out, or the one error."""
    for door in DOORS:
        try:
            message = door(frame)
        except RemoteProtocolError:
            continue
        assert isinstance(message, Wire)


@given(st.binary(max_size=200))
@example(b"")
@example(b"\xc1")
@example(b"\x91" * 100_000)
@example(b"\x81\xa1a" * 100_000)
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\xc6\xff\xff\xff\xff")
@example(b"\xdf\xff\xff\xff\xff\xc0")
@example(b"\x92\xa4beat" + b"\x91" * 50_000)
@example(b"\x92\xa7started" + b"\xdd\x00\xff\xff\xff" + b"\x92\x01\x01" * 10)
def test_noise_is_refused(frame: bytes) -> None:
    knock(frame)


@given(st.sampled_from(FRAMES), st.data())
def test_mutated_frames_are_messages_or_refused(frame: bytes, data: st.DataObject) -> None:
    mutated = bytearray(frame)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        match data.draw(st.sampled_from(["change", "cut", "grow", "repeat"])):
            case "change":
                mutated[at] = data.draw(st.integers(0, 255))
            case "cut":
                del mutated[at + 1 :]
            case "grow":
                mutated[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case _:
                mutated += mutated[: at + 1]

    knock(bytes(mutated))


@given(st.sampled_from(EXAMPLES), st.data())
def test_fields_of_other_kinds_are_messages_or_refused(
    pair: tuple[Message, list[Any]], data: st.DataObject
) -> None:
    _, array = pair
    odd = list(array)
    where = data.draw(st.integers(0, len(odd) - 1))
    odd[where] = data.draw(ODD)

    knock(msgpack.packb(odd))


@given(st.lists(ODD, max_size=6) | ODD)
def test_well_formed_msgpack_is_a_message_or_refused(value: Any) -> None:
    knock(msgpack.packb(value))


def refused(role: Role, array: Any) -> str:
    with pytest.raises(RemoteProtocolError) as caught:
        codec.decode_inbound(role, array if isinstance(array, bytes) else msgpack.packb(array))
    return str(caught.value)


BEAT = ["beat", 1, 1, [0.0], 0, 1, 0, []]


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (1, -1),
        (1, 2**63),
        (2, 1.5),
        (2, True),
        (3, [math.nan]),
        (3, [math.inf]),
        (3, [-0.1]),
        (3, ["5"]),
        (4, 16_385),
        (5, 4_097),
        (5, -1),
        (5, "1"),
        (6, None),
        (7, [[0, 1, 0]]),
        (7, [[1, 0, 0]]),
        (7, [[1, 1, 3]]),
        (7, [[2**63, 1, 0]]),
        (7, [[1, 2**31, 0]]),
        (7, [[1, 1, 0, 0, 0]]),
        (7, [[1, 1, 0]] * 16_385),
        (7, {}),
        (0, "Beat"),
        (0, b"beat"),
        (0, 1),
    ],
)
def test_out_of_bounds_is_refused(at: int, value: Any) -> None:
    codec.decode_inbound(Role.WORKER, msgpack.packb(BEAT))

    refused(Role.WORKER, [*BEAT[:at], value, *BEAT[at + 1 :]])


@pytest.mark.parametrize(
    "spec",
    [
        ["", b""],
        ["Noop", b""],
        ["noop\n", b""],
        ["x" * 65, b""],
        ["noop", "text"],
        ["noop", bytes(256 * 1024 + 1)],
        ["noop", b"", 10],
        ["noop", b"", 5, 101],
        ["noop", b"", 5, None, 0],
        ["noop", b"", 5, None, None, -1],
        ["noop", b"", 5, None, None, 0, "u" * 2_049],
        ["noop", b"", 5, None, None, 0, "", "r" * 321],
        ["noop", b"", 5, None, None, 0, "", "", ["a,b"]],
        ["noop", b"", 5, None, None, 0, "", "", ["l"] * 17],
        {"task_type": "noop", "data": b""},
    ],
)
def test_tasks_out_of_bounds_are_refused(spec: Any) -> None:
    refused(Role.CLIENT, ["submit", b"r", [spec]])


def test_text_that_is_not_utf8_is_refused() -> None:
    frame = msgpack.packb(["goodbye", "xx"]).replace(b"xx", b"\xff\xfe")

    refused(Role.WORKER, frame)


def test_a_type_that_nests_would_be_no_way_out_either() -> None:
    # Nothing on the wire nests without end today; the day something does, this must hold.
    nesting = msgspec.msgpack.Decoder(Any)

    with pytest.raises(RemoteProtocolError):
        codec._decode(nesting, b"\x91" * 100_000)


def test_lone_surrogates_are_refused() -> None:
    frame = msgpack.packb(["goodbye", "xxx"]).replace(b"xxx", b"\xed\xa0\x80")

    refused(Role.WORKER, frame)


@pytest.mark.parametrize(("message", "array"), EXAMPLES, ids=name_of)
def test_what_a_role_may_not_send_is_as_undecodable_as_noise(
    message: Message, array: list[Any]
) -> None:
    frame = msgpack.packb(array)
    opened = 0
    for role in Role:
        try:
            codec.decode_inbound(role, frame)
            opened += 1
        except RemoteProtocolError:
            pass

    is_inbound = isinstance(message, (Enrol, *_types(ClientMessage))) or _is_worker(message)
    assert opened == int(is_inbound)


def _types(union: Any) -> tuple[type, ...]:
    return tuple(union.__args__)


def _is_worker(message: Message) -> bool:
    return isinstance(message, _types(WorkerMessage))


def test_a_frame_too_long_is_refused_unread() -> None:
    assert "at most" in refused(Role.CLIENT, bytes(FRAME_BYTES_MAX + 1))


def test_the_longest_frame_is_read() -> None:
    spec = TaskSpec("noop", bytes(256 * 1024))
    request = Submit(b"r", (spec,) * 15)
    spare = FRAME_BYTES_MAX - len(codec.encode(request))
    full = Submit(b"r", (*request.tasks, TaskSpec("noop", bytes(spare - 26))))
    frame = codec.encode(full)

    assert FRAME_BYTES_MAX - 16 <= len(frame) <= FRAME_BYTES_MAX
    assert codec.decode_inbound(Role.CLIENT, frame) == full


def test_our_own_frames_are_bounded_too() -> None:
    with pytest.raises(LocalProtocolError, match="Answer of"):
        codec.encode(Answer(b"r", bytes(FRAME_BYTES_MAX)))


@pytest.mark.parametrize(
    "frame",
    [
        # 2**32 - 1 elements, entries or bytes, announced and not there.
        b"\x92\xa7started\xdd\xff\xff\xff\xff",
        b"\x93\xa6submit\xa1r\xdd\xff\xff\xff\xff",
        b"\x93\xa6submit\xc6\xff\xff\xff\xff",
        b"\x92\xa7goodbye\xdb\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
        # As many as a frame can hold: cheap to send, and not to be dear to read.
        b"\x92\xa7started\xdd\x00\x3f\xff\x00" + b"\xc0" * (FRAME_BYTES_MAX - 32),
        b"\x92\xa7started\xdd\x00\x3f\xff\x00" + b"\x90" * (FRAME_BYTES_MAX - 32),
        b"\x92\xa7started\xdd\x00\x10\x00\x00" + b"\x92\x01\x01" * 1_048_576,
    ],
)
def test_a_hostile_frame_costs_no_more_memory_than_a_few_frames(frame: bytes) -> None:
    assert len(frame) <= FRAME_BYTES_MAX
    tracemalloc.start()
    try:
        refused(Role.WORKER, frame)
        refused(Role.CLIENT, frame)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak_bytes <= 32 * FRAME_BYTES_MAX


@given(st.sampled_from(EXAMPLES))
def test_encoding_and_decoding_are_inverse(pair: tuple[Message, list[Any]]) -> None:
    message, _ = pair

    assert decoded(message, codec.encode(message)) == message


def test_floats_of_either_width_are_read() -> None:
    narrow = msgpack.packb(["progress", [[1, 1, 0.5, ""]]], use_single_float=True)

    assert struct.pack(">f", 0.5) in narrow
    assert codec.decode_inbound(Role.WORKER, narrow) == codec.decode_inbound(
        Role.WORKER, msgpack.packb(["progress", [[1, 1, 0.5, ""]]])
    )


def test_a_session_may_last_longer_than_32_bits_of_assigns() -> None:
    # 1,000 turns a second get there in 50 days, and nobody would check it at the sending end.
    assign = Assign(1, 2**32, ())

    assert codec.decode_to_worker(codec.encode(assign)) == assign
