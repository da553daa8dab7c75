"""ClientCore on virtual time: what it repeats, what it watches, what it tells once."""

from __future__ import annotations

from random import Random

import pytest

from zmqcluster.core.client import ANSWER_MS, ASK_AGAIN_MS, WATCH_AGAIN_MS, ClientCore
from zmqcluster.core.client_events import (
    Answered,
    Ask,
    Await,
    ClientEffect,
    ClientEvent,
    Drop,
    Ended,
    Forget,
    FromMaster,
    LinkDown,
    LinkUp,
    SendToMaster,
    Unanswered,
)
from zmqcluster.messages import (
    CancelTasks,
    Changed,
    ClientMessage,
    Finished,
    Submit,
    Submitted,
    TaskEnd,
    TaskSpec,
    Watch,
)
from zmqcluster.model import TaskId, TaskState

CANCEL = CancelTasks(b"cancel", (1,))
SUBMIT = Submit(b"submit", (TaskSpec("noop", b"\x80"),), watch=True)
RECEIPT = Submitted(b"submit", 0, (1,))


class Bench:
    """A ClientCore and what it wants done."""

    def __init__(self) -> None:
        self.core = ClientCore(Random(1))
        self.now_ms = 1_000

    def feed(self, *events: ClientEvent) -> list[ClientEffect]:
        return self.core.handle(self.now_ms, *events)

    def sends(self, *events: ClientEvent) -> list[ClientMessage]:
        return [one.message for one in self.feed(*events) if isinstance(one, SendToMaster)]

    def later(self, ms: int) -> list[ClientEffect]:
        self.now_ms += ms
        return self.feed()


@pytest.fixture
def client() -> Bench:
    return Bench()


def end(task_id: int, state: TaskState = TaskState.COMPLETED) -> TaskEnd:
    return TaskEnd(task_id, state, b"", "", 1)


def watched(sent: list[ClientMessage]) -> list[tuple[int, ...]]:
    return [one.task_ids for one in sent if isinstance(one, Watch)]


def test_a_request_is_repeated_as_it_was_until_it_is_answered(client: Bench) -> None:
    assert client.sends(Ask(CANCEL)) == [CANCEL]
    assert client.later(ASK_AGAIN_MS - 1) == []
    assert client.later(1) == [SendToMaster(CANCEL)]

    answer = Changed(b"cancel", (1,))
    assert client.feed(FromMaster(answer)) == [Answered(b"cancel", answer)]

    assert client.later(ASK_AGAIN_MS) == []
    assert client.core.next_ms() is None


def test_a_request_that_nobody_answers_is_given_up_as_unknown(client: Bench) -> None:
    client.feed(Ask(CANCEL))
    for _ in range(ANSWER_MS // ASK_AGAIN_MS - 1):
        assert client.later(ASK_AGAIN_MS) == [SendToMaster(CANCEL)]

    assert client.later(ASK_AGAIN_MS) == [Unanswered(b"cancel")]
    assert client.core.open_requests == 0


def test_an_answer_that_comes_twice_is_told_once(client: Bench) -> None:
    client.feed(Ask(CANCEL))
    answer = FromMaster(Changed(b"cancel", (1,)))

    told = [*client.feed(answer), *client.feed(answer)]

    assert len(told) == 1


def test_what_is_open_is_asked_again_at_once_over_a_new_connection(client: Bench) -> None:
    client.feed(Ask(CANCEL))
    client.feed(LinkDown())

    assert client.sends(LinkUp()) == [CANCEL]


def test_the_first_connection_repeats_nothing(client: Bench) -> None:
    client.feed(Ask(CANCEL))

    assert client.sends(LinkUp()) == []


def test_dropped_requests_are_not_repeated(client: Bench) -> None:
    client.feed(Ask(CANCEL))
    client.feed(Drop(b"cancel"))

    assert client.later(ANSWER_MS) == []


def test_an_end_nobody_asked_for_is_not_kept(client: Bench) -> None:
    assert client.feed(FromMaster(Finished(b"old", (end(7),)))) == []


def test_submitted_tasks_are_watched_without_another_request(client: Bench) -> None:
    client.feed(Ask(SUBMIT), FromMaster(RECEIPT))

    assert client.sends(Await((TaskId(1),))) == []


def test_tasks_of_a_receipt_that_was_asked_for_twice_are_watched_anew(client: Bench) -> None:
    """It may be the answer of a master that knows nothing of the first one's watch."""
    client.feed(Ask(SUBMIT))
    client.later(ASK_AGAIN_MS)
    client.feed(FromMaster(RECEIPT))

    assert watched(client.sends(Await((TaskId(1),)))) == [(1,)]


def test_an_end_that_overtakes_its_receipt_is_told_and_answers_nothing(client: Bench) -> None:
    client.feed(Ask(SUBMIT))

    assert client.feed(FromMaster(Finished(b"submit", (end(1),)))) == [Ended(end(1))]
    assert client.feed(FromMaster(RECEIPT)) == [Answered(b"submit", RECEIPT)]
    assert client.sends(Await((TaskId(1),))) == []


def test_an_end_is_told_once_however_often_it_comes(client: Bench) -> None:
    client.feed(Ask(SUBMIT), FromMaster(RECEIPT))
    finished = FromMaster(Finished(b"submit", (end(1),)))

    told = [*client.feed(finished), *client.feed(finished)]

    assert told == [Ended(end(1))]


def test_a_new_connection_sets_the_watches_anew(client: Bench) -> None:
    client.feed(Ask(SUBMIT), FromMaster(RECEIPT), LinkDown())

    assert watched(client.sends(LinkUp())) == [(1,)]


def test_silence_sets_the_watches_of_awaited_tasks_anew_ever_more_seldom(client: Bench) -> None:
    client.feed(Ask(SUBMIT), FromMaster(RECEIPT), Await((TaskId(1),)))

    first = client.later(WATCH_AGAIN_MS)
    assert [type(one) for one in first] == [SendToMaster]
    [asked] = [one.message for one in first if isinstance(one, SendToMaster)]
    client.feed(FromMaster(Finished(asked.request_id, ())))

    assert client.later(WATCH_AGAIN_MS) == []
    assert len(client.later(WATCH_AGAIN_MS)) == 1


def test_a_watch_the_master_had_no_room_for_is_asked_again(client: Bench) -> None:
    client.feed(Await((TaskId(1),)))

    full = Finished(b"other", (end(1, TaskState.PENDING),))
    assert client.feed(FromMaster(full)) == []

    assert any(isinstance(one, SendToMaster) for one in client.later(WATCH_AGAIN_MS))


def test_forgotten_tasks_are_told_anew(client: Bench) -> None:
    """A retried task has another end."""
    client.feed(Ask(SUBMIT), FromMaster(RECEIPT), FromMaster(Finished(b"submit", (end(1),))))
    client.feed(Forget((TaskId(1),)))

    assert watched(client.sends(Await((TaskId(1),)))) == [(1,)]
    assert client.feed(FromMaster(Finished(b"x", (end(1),)))) == [Ended(end(1))]
