"""The parts of the host pool that need no process: blame, output, descriptors."""

from __future__ import annotations

import os
import socket
import tracemalloc
from collections.abc import Iterator

import msgpack  # type: ignore[import-untyped]  # ships no types
import pytest

from executors.context import ExecutorSettings
from executors.hostwire import Begin, pack_settings
from zmqcluster.messages import TaskOrder, TaskResult
from zmqcluster.model import Outcome, Pool
from zmqcluster.runtime.hosts_fate import SUSPECTS_MAX, Suspects, after_death, as_ended
from zmqcluster.runtime.hosts_link import Entry, HostLink, Kind
from zmqcluster.runtime.hosts_output import PIPE_BYTES, TAIL_BYTES_MAX, OutputTail
from zmqcluster.runtime.hosts_poller import HostPoller

SIGSEGV = -11


@pytest.fixture
def link() -> Iterator[HostLink]:
    link = HostLink(1, Kind.ASYNC, Begin(Pool.ASYNC, pack_settings(ExecutorSettings())))
    link.close_child_fds()
    link.is_ready = True
    yield link
    link.close()


def entry(task_id: int, ending: Outcome | None = None) -> Entry:
    order = TaskOrder(task_id, 1, "noop", b"\x80", 60_000)
    return Entry(order, (task_id, 1), ending=ending)


def run_in(link: HostLink, *entries: Entry) -> None:
    for one in entries:
        link.hand_over(one)


def outcomes(results: list[TaskResult]) -> dict[int, Outcome]:
    return {result.task_id: result.outcome for result in results}


def test_task_alone_in_a_dead_host_is_the_one(link: HostLink) -> None:
    run_in(link, entry(1))

    results, is_surprise = after_death(link, SIGSEGV, "", Suspects())

    assert outcomes(results) == {1: Outcome.DIED}
    assert msgpack.unpackb(results[0].result)["exit"] == "was killed by SIGSEGV"
    assert is_surprise


def test_one_of_several_is_not_blamed_but_suspected(link: HostLink) -> None:
    suspects = Suspects()
    run_in(link, entry(1), entry(2))

    results, _ = after_death(link, SIGSEGV, "", suspects)

    assert outcomes(results) == {1: Outcome.RETURNED, 2: Outcome.RETURNED}
    assert 1 in suspects
    assert 2 in suspects


def test_company_of_a_task_we_ended_is_given_back_unsuspected(link: HostLink) -> None:
    suspects = Suspects()
    run_in(link, entry(1), entry(2, Outcome.CANCELLED))

    results, is_surprise = after_death(link, -9, "", suspects)

    assert outcomes(results) == {1: Outcome.RETURNED, 2: Outcome.CANCELLED}
    assert len(suspects) == 0
    assert not is_surprise


def test_company_in_a_loop_that_stood_still_stays_suspected(link: HostLink) -> None:
    suspects = Suspects()
    run_in(link, entry(1), entry(2, Outcome.CANCELLED))
    link.was_silent = True

    results, _ = after_death(link, -9, "", suspects)

    assert outcomes(results) == {1: Outcome.RETURNED, 2: Outcome.CANCELLED}
    assert 1 in suspects


def test_deadline_missed_in_a_loop_that_stood_still_blames_nobody_for_certain(
    link: HostLink,
) -> None:
    suspects = Suspects()
    run_in(link, entry(1), entry(2, Outcome.TIMED_OUT), entry(3, Outcome.TIMED_OUT))
    link.was_silent = True

    results, is_surprise = after_death(link, -9, "", suspects)

    assert outcomes(results) == dict.fromkeys((1, 2, 3), Outcome.RETURNED)
    assert all(task_id in suspects for task_id in (1, 2, 3))
    assert is_surprise


def test_deadline_missed_alone_in_a_loop_that_stood_still_is_its_own(link: HostLink) -> None:
    run_in(link, entry(1, Outcome.TIMED_OUT))
    link.was_silent = True

    results, _ = after_death(link, -9, "", Suspects())

    assert outcomes(results) == {1: Outcome.TIMED_OUT}


def test_host_that_never_began_blames_nobody(link: HostLink) -> None:
    suspects = Suspects()
    link.is_ready = False
    run_in(link, entry(1))

    results, _ = after_death(link, 3, "", suspects)

    assert outcomes(results) == {1: Outcome.RETURNED}
    assert len(suspects) == 0


def test_third_death_beside_a_task_is_its_own(link: HostLink) -> None:
    suspects = Suspects()
    run_in(link, entry(1), entry(2))

    after_death(link, SIGSEGV, "", suspects)
    after_death(link, SIGSEGV, "", suspects)
    suspects.clear(2)
    results, _ = after_death(link, SIGSEGV, "", suspects)

    assert outcomes(results) == {1: Outcome.DIED, 2: Outcome.RETURNED}


def test_suspects_are_bounded() -> None:
    suspects = Suspects()
    for task_id in range(SUSPECTS_MAX + 10):
        suspects.add(task_id)

    assert len(suspects) == SUSPECTS_MAX
    assert 0 not in suspects


@pytest.mark.parametrize(
    ("ending", "came", "counts_as"),
    [
        (Outcome.TIMED_OUT, Outcome.COMPLETED, Outcome.COMPLETED),
        (Outcome.TIMED_OUT, Outcome.CANCELLED, Outcome.TIMED_OUT),
        (Outcome.TIMED_OUT, Outcome.FAILED, Outcome.TIMED_OUT),
        (Outcome.CANCELLED, Outcome.COMPLETED, Outcome.CANCELLED),
        (Outcome.CANCELLED, Outcome.FAILED, Outcome.CANCELLED),
    ],
)
def test_late_result_of_an_ended_task(ending: Outcome, came: Outcome, counts_as: Outcome) -> None:
    result = TaskResult(1, 1, came, result=b"\x01")

    assert as_ended(entry(1, ending), result).outcome is counts_as


@pytest.fixture
def output() -> Iterator[OutputTail]:
    output = OutputTail("test")
    yield output
    output.close()


def test_output_keeps_its_end_and_says_what_is_missing(output: OutputTail) -> None:
    with open(output.child_fd, "wb", buffering=0) as pipe:
        for number in range(40):
            pipe.write(b"%06d\x1b[31m\n" % number * 500)
            output.read(0)

    text = output.text()

    assert text.endswith("000039?[31m\n")
    assert text.startswith("[… 174,464 bytes before this are not kept …]")
    assert output.last_line() == "000039?[31m"


def test_output_without_end_takes_no_memory(output: OutputTail) -> None:
    block = b"x" * 65_536
    with open(output.child_fd, "wb", buffering=0) as pipe:
        pipe.write(block)
        output.read(0)
        tracemalloc.start()
        for _ in range(200):
            pipe.write(block)
            output.read(0)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()

    assert peak_bytes < 16 * TAIL_BYTES_MAX


def test_full_pipe_asks_for_a_pause_and_an_empty_one_does_not(output: OutputTail) -> None:
    os.set_blocking(output.child_fd, False)
    with open(output.child_fd, "wb", buffering=0) as pipe:
        pipe.write(b"x" * PIPE_BYTES)

        assert output.read(0) is True
        assert output.read(0) is False
        assert output.is_open

    assert output.read(0) is False
    assert not output.is_open


def test_handler_of_something_closed_meanwhile_is_not_called() -> None:
    poller = HostPoller()
    pairs = [socket.socketpair(), socket.socketpair()]
    called: list[int] = []

    def handler(number: int) -> None:
        other = pairs[1 - number][0]
        called.append(number)
        poller.remove(other)
        other.close()

    poller.add(pairs[0][0], lambda _: handler(0))
    poller.add(pairs[1][0], lambda _: handler(1))
    for _, far in pairs:
        far.send(b"x")

    poller.dispatch(0)

    poller.close()
    for pair in pairs:
        for end in pair:
            end.close()
    assert len(called) == 1
