"""The wire as a second reader sees it: plain msgpack and docs/protocol.md, nothing of ours."""

from __future__ import annotations

from typing import Any

import msgpack  # type: ignore[import-untyped]  # it ships none
import msgspec
import pytest

from tests.support.wire_page import (
    PAGE,
    senders,
    structs,
    tables_of_the_code,
    tables_of_the_page,
    tag_of,
)
from zmqcluster import codec, model
from zmqcluster.errors import RemoteProtocolError
from zmqcluster.messages import (
    Abort,
    Answer,
    AskDevices,
    AskExplain,
    AskOverview,
    Assign,
    AttemptRef,
    CancelTasks,
    Capabilities,
    Changed,
    ClientMessage,
    Control,
    CreateToken,
    DrainDevice,
    Enrol,
    Enrolled,
    Finished,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Held,
    Hello,
    HelloAgain,
    Hint,
    Message,
    PoolOffer,
    Progress,
    ProgressNote,
    RateReport,
    RateRule,
    Record,
    Refused,
    Resources,
    ResultAck,
    Results,
    RetryTasks,
    Returned,
    RevokeDevice,
    RevokeToken,
    SetStrategy,
    Started,
    Submit,
    Submitted,
    TaskEnd,
    TaskOrder,
    TaskResult,
    TaskSpec,
    ToClient,
    ToWorker,
    TypeOffer,
    Untouched,
    Watch,
    Welcome,
    Wire,
    WorkerMessage,
)
from zmqcluster.model import Outcome, Pool, RefusalCode, Role, Strategy, TaskState

KEY = b"k" * 32
REQUEST = b"r1"
REF, REF_WIRE = AttemptRef(7, 2), [7, 2]
SPEC = TaskSpec("noop", b"\x80", 9, 3, 1_000, 5, "key", "https://a.example", ("eu", "gpu"))
SPEC_WIRE = ["noop", b"\x80", 9, 3, 1_000, 5, "key", "https://a.example", ["eu", "gpu"]]
PLAIN_SPEC_WIRE = ["noop", b"", 5, None, None, 0, "", "", []]
RULE, RULE_WIRE = RateRule("k", 500, 2, None), ["k", 500, 2, None]
HELD, HELD_WIRE = Held(7, 2, 1, 40), [7, 2, 1, 40]
CONTROL, CONTROL_WIRE = Control(3, True, False), [3, True, False]
RESOURCES = Resources(12.5, 50.0, 1 << 33, 1.0, 10, 20)
RESOURCES_WIRE = [12.5, 50.0, 1 << 33, 1.0, 10, 20]
RECORD, RECORD_WIRE = Record("pages", "u", b"\x80"), ["pages", "u", b"\x80"]
RESULT = TaskResult(
    7, 2, Outcome.COMPLETED, b"\x01", "", 900, 0, (SPEC, TaskSpec("noop", b"")), (RECORD,), (RULE,)
)
RESULT_WIRE = [
    7, 2, "completed", b"\x01", "", 900, 0, [SPEC_WIRE, PLAIN_SPEC_WIRE], [RECORD_WIRE],
    [RULE_WIRE],
]  # fmt: skip

# Each message, and the array that docs/protocol.md makes of it, written by hand.
EXAMPLES: list[tuple[Message, list[Any]]] = [
    (Enrol(1, KEY, "d1", "Desk"), ["enrol", 1, KEY, "d1", "Desk"]),
    (
        Hello(
            1, "d1", b"b" * 16, "Desk",
            Capabilities("h", "linux", 2, 1 << 34, ("10.0.0.1",), "0.1"),
            (TypeOffer("noop", Pool.SYNC),), (PoolOffer(Pool.SYNC, 2),), ("eu",), 64, (HELD,), True,
        ),
        [
            "hello", 1, "d1", b"b" * 16, "Desk", ["h", "linux", 2, 1 << 34, ["10.0.0.1"], "0.1"],
            [["noop", "sync"]], [["sync", 2]], ["eu"], 64, [HELD_WIRE], True,
        ],
    ),
    (
        Heartbeat(9, 123_456, RESOURCES, 1, 64, 4, (HELD,)),
        ["beat", 9, 123_456, RESOURCES_WIRE, 1, 64, 4, [HELD_WIRE], False],
    ),
    (Started((REF,)), ["started", [REF_WIRE]]),
    (Results((RESULT,)), ["results", [RESULT_WIRE]]),
    (Returned((REF,), "draining"), ["returned", [REF_WIRE], "draining"]),
    (Progress((ProgressNote(7, 2, 0.5, "half"),)), ["progress", [[7, 2, 0.5, "half"]]]),
    (RateReport((RULE,)), ["rates", [RULE_WIRE]]),
    (Goodbye("drained"), ["goodbye", "drained"]),
    (Enrolled("d1"), ["enrolled", "d1"]),
    (
        Welcome(3, 8, 5_000, 15_000, CONTROL, (REF,)),
        ["welcome", 3, 8, 5_000, 15_000, CONTROL_WIRE, [REF_WIRE]],
    ),
    (
        Assign(3, 1, (TaskOrder(7, 2, "noop", b"\x80", 1_000, 4, 250),)),
        ["assign", 3, 1, [[7, 2, "noop", b"\x80", 1_000, 4, 250]]],
    ),
    (ResultAck((REF,)), ["ack", [REF_WIRE]]),
    (HeartbeatAck(9, 5, 3, CONTROL, (REF,)), ["beat_ack", 9, 5, 3, CONTROL_WIRE, [REF_WIRE]]),
    (Abort((REF,)), ["abort", [REF_WIRE]]),
    (HelloAgain(3), ["hello_again", 3]),
    (Hint(3, 4, (REF,)), ["hint", 3, 4, [REF_WIRE]]),
    (
        Submit(REQUEST, (SPEC,), 4, "crawl", (RULE,), True),
        ["submit", REQUEST, [SPEC_WIRE], 4, "crawl", [RULE_WIRE], True],
    ),
    (CancelTasks(REQUEST, (7,), 4), ["cancel", REQUEST, [7], 4]),
    (RetryTasks(REQUEST, (7,)), ["retry", REQUEST, [7]]),
    (DrainDevice(REQUEST, "d1"), ["drain", REQUEST, "d1", True]),
    (SetStrategy(REQUEST, Strategy.RANDOM), ["strategy", REQUEST, "random"]),
    (
        CreateToken(REQUEST, "t", KEY, Role.WORKER, 99, 5),
        ["token", REQUEST, "t", KEY, "worker", 99, 5],
    ),
    (RevokeToken(REQUEST, "t"), ["revoke_token", REQUEST, "t"]),
    (RevokeDevice(REQUEST, "d1"), ["revoke_device", REQUEST, "d1"]),
    (Watch(REQUEST, (7,), 4), ["watch", REQUEST, [7], 4]),
    (AskOverview(REQUEST), ["ask_overview", REQUEST]),
    (AskDevices(REQUEST, "d1"), ["ask_devices", REQUEST, "d1"]),
    (AskExplain(REQUEST, 7), ["ask_explain", REQUEST, 7]),
    (Refused(b"", RefusalCode.BUSY, "later"), ["refused", b"", "busy", "later"]),
    (Submitted(REQUEST, 4, (7, 8), (1,)), ["submitted", REQUEST, 4, [7, 8], [1]]),
    (
        Changed(REQUEST, (7,), (Untouched(8, "it is completed"),)),
        ["changed", REQUEST, [7], [[8, "it is completed"]]],
    ),
    (
        Finished(REQUEST, (TaskEnd(7, TaskState.DEAD, b"", "signal 11", 3),)),
        ["finished", REQUEST, [[7, "dead", b"", "signal 11", 3]]],
    ),
    (Answer(REQUEST, b"\x80"), ["answer", REQUEST, b"\x80"]),
]  # fmt: skip


def name_of(value: object) -> str:
    return type(value).__name__ if isinstance(value, Wire) else ""


def decoded(message: Message, frame: bytes) -> Message:
    """As whoever may receive it does."""
    for role, union in (
        (Role.ENROL, Enrol),
        (Role.WORKER, WorkerMessage),
        (Role.CLIENT, ClientMessage),
    ):
        if tag_of(type(message)) in senders(union):
            return codec.decode_inbound(role, frame)
    if isinstance(message, Hint):
        return codec.decode_hint(frame)
    if tag_of(type(message)) in senders(ToWorker):
        return codec.decode_to_worker(frame)
    return codec.decode_to_client(frame)


@pytest.mark.parametrize(("message", "array"), EXAMPLES, ids=name_of)
def test_what_we_write_another_reader_reads(message: Message, array: list[Any]) -> None:
    assert msgpack.unpackb(codec.encode(message)) == array


@pytest.mark.parametrize(("message", "array"), EXAMPLES, ids=name_of)
def test_what_another_writer_writes_we_read(message: Message, array: list[Any]) -> None:
    assert decoded(message, msgpack.packb(array)) == message


@pytest.mark.parametrize(("message", "array"), EXAMPLES, ids=name_of)
def test_optional_fields_may_be_left_out_from_the_end_and_no_others(
    message: Message, array: list[Any]
) -> None:
    fields = msgspec.structs.fields(message)
    required = sum(one.required for one in fields)

    for length in range(len(array)):
        frame = msgpack.packb(array[:length])
        if length > required:
            short = decoded(message, frame)
            assert msgpack.unpackb(codec.encode(short))[:length] == array[:length]
        else:
            with pytest.raises(RemoteProtocolError):
                decoded(message, frame)


@pytest.mark.parametrize(("message", "array"), EXAMPLES, ids=name_of)
def test_nothing_may_follow(message: Message, array: list[Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        decoded(message, msgpack.packb([*array, 0]))
    with pytest.raises(RemoteProtocolError):
        decoded(message, msgpack.packb(array) + b"\x00")


def test_every_message_and_part_has_an_example() -> None:
    seen: set[str] = set()

    def visit(value: object) -> None:
        if isinstance(value, Wire):
            seen.add(type(value).__name__)
            for name in value.__struct_fields__:
                visit(getattr(value, name))
        elif isinstance(value, tuple):
            for one in value:
                visit(one)

    for message, _ in EXAMPLES:
        visit(message)

    assert seen == {one.__name__ for one in structs()}


def test_the_page_has_exactly_the_messages_fields_and_bounds_that_there_are() -> None:
    page, code = tables_of_the_page(), tables_of_the_code()

    assert page.keys() == code.keys()
    for key, table in code.items():
        assert page[key] == table, key


@pytest.mark.parametrize(
    ("heading", "union"),
    [
        ("From a newcomer", Enrol),
        ("From a worker", WorkerMessage),
        ("From a client", ClientMessage),
        ("To everybody who subscribes", Hint),
    ],
)
def test_the_page_says_who_may_send_what(heading: str, union: Any) -> None:
    assert _tags_under(heading) == senders(union)


def test_the_page_says_who_hears_what() -> None:
    assert _tags_under("To a worker") | {"refused"} == senders(ToWorker)
    assert _tags_under("To a client") | {"enrolled"} == senders(ToClient)


def _tags_under(heading: str) -> set[str]:
    [section] = [
        one for one in PAGE.read_text().split("\n## ") if one.splitlines()[0].strip() == heading
    ]
    return {line.split("`")[1] for line in section.splitlines() if line.startswith("### `")}


@pytest.mark.parametrize(
    "words", [Outcome, Pool, Role, Strategy, TaskState, RefusalCode], ids=lambda one: one.__name__
)
def test_the_page_lists_the_words_of_each_kind(words: Any) -> None:
    [row] = [
        line for line in PAGE.read_text().splitlines() if line.startswith(f"| {words.__name__} ")
    ]

    assert set(row.split("`")[1::2]) == {str(one) for one in words}


def test_the_page_names_the_largest_frame_and_the_version() -> None:
    text = PAGE.read_text()

    assert f"{model.FRAME_BYTES_MAX:,} bytes" in text
    assert f"Version {model.PROTOCOL_VERSION}." in text
