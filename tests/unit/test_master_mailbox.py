"""Requests of other threads: each is answered once, or told that nobody will answer it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from zmqcluster.errors import RequestRefused, StartError
from zmqcluster.messages import AskDevices, Changed, Refused
from zmqcluster.model import RefusalCode
from zmqcluster.runtime.doorbell import Doorbell
from zmqcluster.runtime.mailbox import Mailbox

QUESTION = AskDevices(b"q" * 16)
END = StartError("the master is stopping")


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    with closing(Doorbell()) as doorbell:
        yield Mailbox(doorbell)


def test_a_question_is_taken_once_and_its_first_answer_counts(mailbox: Mailbox) -> None:
    future = mailbox.post(QUESTION)
    ((peer, message),) = mailbox.take()

    mailbox.answer(peer, Changed(b"1"))
    mailbox.answer(peer, Changed(b"2"))

    assert message is QUESTION
    assert mailbox.take() == []
    assert future.result(0) == Changed(b"1")


def test_a_refusal_is_raised_for_the_one_who_asked(mailbox: Mailbox) -> None:
    future = mailbox.post(QUESTION)
    ((peer, _),) = mailbox.take()

    mailbox.answer(peer, Refused(b"", RefusalCode.NOT_FOUND, "no such device"))

    with pytest.raises(RequestRefused, match="no such device"):
        future.result(0)


def test_a_question_nobody_waits_for_any_more_is_not_taken(mailbox: Mailbox) -> None:
    mailbox.post(QUESTION).cancel()

    assert mailbox.take() == []


def test_whoever_waits_when_it_closes_hears_why(mailbox: Mailbox) -> None:
    taken = mailbox.post(QUESTION)
    mailbox.take()
    posted = mailbox.post(QUESTION)

    mailbox.close(END)

    assert taken.exception(0) is END
    assert posted.exception(0) is END


def test_whoever_asks_after_it_closed_hears_why_at_once(mailbox: Mailbox) -> None:
    mailbox.close(END)

    assert mailbox.post(QUESTION).exception(0) is END
