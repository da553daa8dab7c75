"""Group commit: one batch at a time, and a batch that failed is never taken for one on disk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from zmqcluster.core.effects import Changes
from zmqcluster.errors import StorageError
from zmqcluster.runtime.journal import Journal

DEADLINE_S = 10.0


@contextmanager
def journal(apply: Callable[[Changes], bool]) -> Iterator[tuple[Journal, threading.Event]]:
    """A journal, and the bell it rings."""
    rung = threading.Event()
    opened = Journal(apply, rung.set)
    try:
        yield opened, rung
    finally:
        opened.close()


def test_a_batch_is_done_once_it_was_applied_and_not_before() -> None:
    may_end = threading.Event()

    def apply(_: Changes) -> bool:
        return may_end.wait(DEADLINE_S)

    with journal(apply) as (one, rung):
        one.commit(Changes())
        before = one.take_done()

        may_end.set()

        assert rung.wait(DEADLINE_S)
        assert before is False
        assert (one.take_done(), one.take_done()) == (True, False)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (StorageError("the disk is full"), "^the disk is full$"),
        (ZeroDivisionError("ours"), "^cannot save: ZeroDivisionError: ours$"),
    ],
)
def test_a_batch_that_failed_is_raised_where_it_is_asked_for(error: Exception, words: str) -> None:
    def apply(_: Changes) -> bool:
        raise error

    with journal(apply) as (one, rung):
        one.commit(Changes())

        assert rung.wait(DEADLINE_S)
        with pytest.raises(StorageError, match=words):
            one.take_done()


def test_closing_waits_for_the_batch_under_way_and_may_be_done_twice() -> None:
    applied: list[Changes] = []

    def apply(changes: Changes) -> bool:
        applied.append(changes)
        return False

    with journal(apply) as (one, _):
        batch = Changes()
        one.commit(batch)

        one.close()
        one.close()

        assert applied == [batch]
