"""A planted bug is found, made small, and told as a plain test that fails as the run did."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.simulation.runs import Failure, case_of, run
from tests.simulation.shrink import minimised, shrink
from zmqcluster.core import results
from zmqcluster.core.fleet import Device, Flight
from zmqcluster.core.rates import RateKey
from zmqcluster.core.state import MasterState
from zmqcluster.core.worker import WorkerCore
from zmqcluster.core.worker_queue import WorkQueue
from zmqcluster.messages import AttemptRef
from zmqcluster.model import TaskId

EVENTS = 4_000
# Far more than it takes: what is found must not depend on how busy the machine is.
SHRINK_S = 40.0


def without_fence(state: MasterState, device: Device, task_id: int, attempt: int) -> Flight | None:
    return state.flights.get(TaskId(task_id))


def first_failure(check: str) -> Failure:
    """Of this check: one bug has many faces."""
    for seed in range(1, 200):
        outcome = run(case_of(seed, EVENTS))
        if isinstance(outcome, Failure) and check in outcome.check:
            return outcome
    raise AssertionError("nobody noticed")


def fails_alike(test: str) -> bool:
    scope: dict[str, Callable[[], None]] = {}
    exec(compile(test, "told.py", "exec"), scope)
    [play] = [made for name, made in scope.items() if name.startswith("test_")]
    with pytest.raises(Exception, match=r".+"):
        play()
    return True


def test_a_bug_of_the_master_is_told_as_a_few_turns_of_its_core(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(results, "flight_of", without_fence)
    failure = first_failure("_check_fences()")

    small = shrink(failure, SHRINK_S, lambda _: None)

    assert small.failure.check == failure.check
    assert isinstance(run(small.failure.case), Failure), "its command shows it again"
    assert small.test.count("master.turn(") < 30
    assert fails_alike(small.test)


def test_a_bug_of_a_worker_is_told_as_a_few_turns_of_its_core(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def drop_nothing(self: WorkQueue) -> list[AttemptRef]:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(WorkQueue, "take_queued", drop_nothing)
    failure = first_failure("drop_nothing()")

    small = shrink(failure, SHRINK_S, lambda _: None)

    assert WorkerCore.__name__ in small.test
    assert small.test.count("core.handle(") <= 3
    assert fails_alike(small.test)


def test_what_no_core_shows_alone_is_told_with_the_end_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Only who stands at a site sees that it is hit too often.
    monkeypatch.setattr(RateKey, "is_open", lambda _self, _now_ms: True)
    failure = first_failure("began()")

    small = shrink(failure, 1.0, lambda _: None)

    assert small.test == ""
    assert "It takes the whole cluster" in small.text
    assert small.failure.trace[-1] in small.text


def test_minimised_finds_the_two_that_matter() -> None:
    def fails(items: object) -> bool:
        return isinstance(items, list) and {3, 77} <= set(items)

    assert minimised(list(range(100)), fails, float("inf")) == [3, 77]
