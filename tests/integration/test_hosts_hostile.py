"""What a task may do to its host, and what the agent makes of it. Real processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgpack  # type: ignore[import-untyped]  # ships no types
import pytest

from tests.support.host_bench import HostBench, evidence
from tests.support.host_processes import is_alive
from zmqcluster.messages import ProgressNote, RateRule, Started, TaskOrder, TaskResult
from zmqcluster.model import Outcome
from zmqcluster.runtime import hosts, hosts_fleet


@pytest.fixture
def bench() -> Iterator[HostBench]:
    bench = HostBench(sync_slots=2)
    yield bench
    bench.close()
    assert bench.longest_poll_s < 1.0, "poll() must never block"


def test_segfault_kills_one_host_and_is_told_with_evidence(bench: HostBench) -> None:
    bench.submit(1, "h.segfault_sync")

    result = bench.result(1)

    assert result.outcome is Outcome.DIED
    assert "SIGSEGV" in result.error
    assert "about to crash" in evidence(result)["output"]
    assert "segfault_sync" in evidence(result)["output"], "faulthandler names the function"


def test_next_task_after_a_death_runs_in_a_fresh_host(bench: HostBench) -> None:
    bench.submit(1, "h.segfault")
    died = bench.result(1)

    bench.submit(2, "echo", value="still here")

    assert died.outcome is Outcome.DIED
    assert bench.value(2) == "still here"


@pytest.mark.parametrize("task_type", ["h.exit", "h.exit_sync"])
def test_exit_with_code_0_is_a_death_and_no_success(bench: HostBench, task_type: str) -> None:
    bench.submit(1, task_type)

    result = bench.result(1)

    assert result.outcome is Outcome.DIED
    assert "exited with code 0" in result.error


@pytest.mark.parametrize("task_type", ["h.system_exit", "h.system_exit_sync"])
def test_system_exit_is_a_failure_and_the_host_lives(bench: HostBench, task_type: str) -> None:
    pid_type = "h.pid_sync" if task_type.endswith("sync") else "h.pid"
    bench.submit(1, pid_type)
    before = bench.value(1)

    bench.submit(2, task_type)
    result = bench.result(2)
    bench.submit(3, pid_type)

    assert (result.outcome, result.error) == (Outcome.FAILED, "SystemExit: 3")
    assert bench.value(3) == before


def test_system_exit_of_a_background_task_does_not_stop_the_loop(bench: HostBench) -> None:
    bench.submit(1, "h.background_exit")

    assert bench.value(1) == "survived True"


def test_company_of_a_killer_is_given_back_unblamed_and_the_killer_is_found_out(
    bench: HostBench,
) -> None:
    for task_id in (1, 2, 3):
        bench.submit(task_id, "sleep", seconds=60)
    bench.until_started(3)
    bench.submit(4, "h.segfault")

    first = [bench.result(task_id).outcome for task_id in (1, 2, 3, 4)]
    for task_id in (1, 2, 3):
        bench.submit(task_id, "sleep", attempt=2, seconds=0)
    bench.submit(4, "h.segfault", attempt=2)
    again = [bench.result(task_id, attempt=2).outcome for task_id in (1, 2, 3, 4)]

    assert first == [Outcome.RETURNED] * 4
    assert again == [Outcome.COMPLETED] * 3 + [Outcome.DIED]


def test_suspect_runs_alone_and_cannot_hurt_others_again(bench: HostBench) -> None:
    bench.submit(1, "sleep", seconds=60)
    bench.submit(2, "h.segfault")
    assert bench.result(2).outcome is Outcome.RETURNED
    assert bench.result(1).outcome is Outcome.RETURNED
    bench.submit(3, "sleep", seconds=0.3)

    bench.submit(2, "h.segfault", attempt=2)

    assert bench.result(2, attempt=2).outcome is Outcome.DIED
    assert bench.result(3).outcome is Outcome.COMPLETED


def test_timeout_of_an_async_task_cancels_it_and_spares_the_host(bench: HostBench) -> None:
    bench.submit(1, "h.pid")
    before = bench.value(1)

    bench.submit(2, "sleep", timeout_ms=100, seconds=60)
    result = bench.result(2)
    bench.submit(3, "h.pid")

    assert result.outcome is Outcome.TIMED_OUT
    assert result.error == "ran longer than its 0.1 s; it was cancelled"
    assert bench.value(3) == before


def test_task_that_ignores_cancellation_is_killed_and_its_company_given_back(
    bench: HostBench,
) -> None:
    bench.submit(9, "noop")
    bench.result(9)  # The host is up, so that 100 ms are enough to begin.
    bench.submit(1, "sleep", seconds=60)
    bench.submit(2, "h.stubborn", timeout_ms=100)

    began = time.monotonic()
    result = bench.result(2)

    assert result.outcome is Outcome.TIMED_OUT
    assert time.monotonic() - began < 10
    assert bench.result(1).outcome is Outcome.RETURNED
    assert "stopped" in bench.result(1).error
    bench.submit(1, "h.pid", attempt=2)
    bench.submit(3, "h.pid")
    same = bench.result(1, attempt=2).result == bench.result(3).result
    assert same, "an innocent is no suspect: it shares the host"


def test_gil_hog_at_its_deadline_is_killed_and_its_company_suspected(bench: HostBench) -> None:
    bench.submit(1, "sleep", seconds=60)
    bench.submit(2, "h.hold_gil", timeout_ms=200)

    first = bench.result(2)
    bench.submit(2, "h.hold_gil", attempt=2, timeout_ms=200)

    assert first.outcome is Outcome.RETURNED, "it may have been the other's fault"
    assert bench.result(1).outcome is Outcome.RETURNED
    assert bench.result(2, attempt=2).outcome is Outcome.TIMED_OUT, "nobody else was there"
    bench.submit(1, "h.pid", attempt=2)
    bench.submit(3, "h.pid")
    assert bench.result(1, attempt=2).result != bench.result(3).result, "it runs alone"


def test_loop_that_stands_still_is_noticed_without_a_deadline(
    bench: HostBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "UNANSWERED_MAX", 2)
    bench.submit(1, "h.hold_gil", timeout_ms=600_000)

    result = bench.result(1, within_s=30)

    assert result.outcome is Outcome.DIED
    assert "did not turn" in result.error
    assert "hostile_tasks.py" in result.error
    assert "in _hold_gil" in result.error


@pytest.mark.parametrize("task_type", ["h.endless_sync", "h.hold_gil_sync"])
def test_endless_function_is_killed_at_its_deadline(bench: HostBench, task_type: str) -> None:
    bench.submit(1, task_type, timeout_ms=200)

    began = time.monotonic()
    result = bench.result(1)

    assert result.outcome is Outcome.TIMED_OUT
    assert time.monotonic() - began < 5
    assert "killed" in result.error


def test_cancelled_function_and_its_daemon_are_gone_when_it_is_reported(
    bench: HostBench, tmp_path: Path
) -> None:
    path = tmp_path / "pid"
    bench.submit(1, "h.grandchild_sync", path=str(path))
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline
        bench.turn(0.05)
    pid = int(path.read_text())
    assert is_alive(pid)

    bench.kill(1)

    assert bench.result(1).outcome is Outcome.CANCELLED
    assert not is_alive(pid)


def test_daemon_left_behind_by_a_finished_function_is_killed(
    bench: HostBench, tmp_path: Path
) -> None:
    path = tmp_path / "pid"
    bench.submit(1, "h.grandchild_sync", path=str(path), then="return")

    pid = bench.value(1)

    bench.until_counted("orphans_killed")
    assert not is_alive(pid)


def test_thread_left_behind_costs_the_host_but_not_the_next_task(bench: HostBench) -> None:
    bench.submit(1, "h.thread_sync")
    before = bench.value(1)

    bench.submit(2, "h.pid_sync")

    assert bench.value(2) != before


def test_cancelled_async_task_is_reported_as_cancelled(bench: HostBench) -> None:
    bench.submit(1, "sleep", seconds=60)
    bench.until_started(1)

    bench.kill(1)
    bench.kill(1)

    assert bench.result(1).outcome is Outcome.CANCELLED


def test_async_task_cancelled_before_its_first_step_is_reported_all_the_same(
    bench: HostBench,
) -> None:
    bench.submit(1, "h.pid")
    before = bench.value(1)
    began = time.monotonic()
    bench.submit(2, "sleep", seconds=60)
    bench.kill(2)

    assert bench.result(2).outcome is Outcome.CANCELLED
    assert time.monotonic() - began < 1.5, "by itself, before the host would be killed for it"
    bench.submit(3, "h.pid")
    assert bench.value(3) == before


def test_kill_of_a_waiting_order_means_it_never_begins(bench: HostBench) -> None:
    for task_id in (1, 2, 3):
        bench.submit(task_id, "sleep_sync", seconds=30)

    bench.kill(3)

    assert bench.result(3).outcome is Outcome.CANCELLED
    bench.kill(1)
    bench.kill(2)
    assert bench.result(1).outcome is Outcome.CANCELLED


def test_kill_of_an_unknown_attempt_does_nothing(bench: HostBench) -> None:
    bench.kill(99)
    bench.submit(1, "noop")

    assert bench.result(1).outcome is Outcome.COMPLETED
    assert len(bench.results) == 1


def test_200_mb_of_output_neither_block_the_agent_nor_stay_in_memory(bench: HostBench) -> None:
    bench.submit(1, "h.print", megabytes=200)

    assert bench.value(1, within_s=30) == 200
    bench.submit(2, "h.exit")
    output = evidence(bench.result(2))["output"]
    assert output.endswith("the very last line\n")
    assert "bytes before this are not kept" in output
    assert len(output) < 70_000


def test_result_that_cannot_be_packed_fails_with_the_type_in_words(bench: HostBench) -> None:
    bench.submit(1, "h.object")

    result = bench.result(1)

    assert result.outcome is Outcome.FAILED
    assert "builtins.object is not a plain value" in result.error


def test_result_that_is_too_big_fails_with_its_size(bench: HostBench) -> None:
    bench.submit(1, "h.huge")

    result = bench.result(1)

    assert result.outcome is Outcome.FAILED
    assert "takes 2,000,005 bytes packed; at most 1,048,576 are allowed" in result.error


def test_many_large_results_at_once_all_arrive(bench: HostBench) -> None:
    for task_id in range(1, 31):
        bench.submit(task_id, "h.huge", size=1_000_000)

    assert all(len(bench.result(task_id).result) > 1_000_000 for task_id in range(1, 31))


def test_nonsense_on_the_channel_costs_the_host(bench: HostBench) -> None:
    bench.submit(1, "h.junk")

    result = bench.result(1)

    assert result.outcome is Outcome.DIED
    assert "channel" in result.error


def test_death_of_the_warden_is_survived_and_its_killer_found_out(bench: HostBench) -> None:
    bench.submit(1, "sleep_sync", seconds=60)
    bench.until_started(1)
    bench.submit(2, "h.kill_parent")

    first = [bench.result(1).outcome, bench.result(2).outcome]
    bench.submit(2, "h.kill_parent", attempt=2)
    again = bench.result(2, attempt=2).outcome
    bench.submit(3, "echo", value=3)

    assert first == [Outcome.RETURNED, Outcome.RETURNED]
    assert again is Outcome.DIED
    assert bench.value(3) == 3


def test_task_that_forks_and_returns_twice_makes_no_second_host(bench: HostBench) -> None:
    bench.submit(1, "h.fork")
    host = bench.value(1)

    for task_id in range(2, 42):
        bench.submit(task_id, "h.pid")
        assert bench.value(task_id) == host
    assert not bench.pool.counters


def test_warden_that_stands_still_is_replaced_and_its_task_ends_all_the_same(
    bench: HostBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts_fleet, "WARDEN_PING_MS", 20)
    bench.submit(1, "h.stop_parent", timeout_ms=300)

    result = bench.result(1)
    bench.submit(2, "echo", value="still here")

    assert result.outcome is Outcome.TIMED_OUT
    assert bench.pool.counters["wardens_lost"] == 1
    assert bench.value(2) == "still here"


def test_function_that_outgrows_its_memory_is_killed() -> None:
    bench = HostBench(sync_slots=1, rss_bytes_max=300 * 1024 * 1024)
    bench.submit(1, "h.grow_sync", megabytes=400)

    result = bench.result(1)

    bench.close()
    assert result.outcome is Outcome.DIED
    assert "memory" in result.error


def test_notes_and_rules_arrive_while_the_task_still_runs(bench: HostBench) -> None:
    bench.submit(1, "h.note")

    result = bench.result(1)

    kinds = [type(report) for report in bench.seen]
    assert kinds.index(RateRule) < kinds.index(TaskResult)
    assert kinds.index(ProgressNote) < kinds.index(TaskResult)
    assert (result.outcome, result.retry_after_ms) == (Outcome.RETRY, 5_000)
    closed_ms = result.rates[0].closed_for_ms
    assert closed_ms is not None
    assert 25_000 < closed_ms < 29_900, "the time since the report has been taken off"


def test_setup_runs_once_a_host_and_sees_the_settings(bench: HostBench) -> None:
    for task_id in range(1, 6):
        bench.submit(task_id, "h.shared")

    assert {tuple(bench.value(task_id)) for task_id in range(1, 6)} == {(1, "zmqcluster/0.1")}


def test_broken_setup_fails_its_own_tasks_only(bench: HostBench) -> None:
    bench.submit(1, "h.broken_setup")
    bench.submit(2, "echo", value=1)

    assert bench.value(2) == 1
    assert bench.result(1).error == "OSError: no such device"


def test_hosts_see_no_setting_of_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZMQCLUSTER_JOIN_TOKEN", "secret")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    bench = HostBench()
    bench.submit(1, "h.env")

    environment = bench.value(1)

    bench.close()
    assert not [name for name in environment if name.startswith("ZMQCLUSTER_")]
    assert environment["PYTHONPATH"] == "/somewhere"


def test_start_window_that_passed_in_a_busy_loop_gives_the_order_back(bench: HostBench) -> None:
    bench.submit(1, "h.hold_gil", seconds=1.0)
    bench.until_started(1)
    bench.pool.run(TaskOrder(2, 1, "noop", msgpack.packb({}), 60_000, start_within_ms=100))

    assert bench.result(2).outcome is Outcome.RETURNED
    assert "start window" in bench.result(2).error
    started = [ref.task_id for one in bench.seen if isinstance(one, Started) for ref in one.refs]
    assert started == [1]
