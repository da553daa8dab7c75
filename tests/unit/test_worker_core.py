"""What a worker does with orders, runs, aborts and shutdown, on virtual time."""

from __future__ import annotations

import pytest

from tests.support.worker_bench import (
    BEAT_MS,
    TIMEOUT_MS,
    WorkerBench,
    done,
    order,
    ref,
    settings,
)
from zmqcluster.core.worker import AHEAD_MAX, HELD_MAX
from zmqcluster.core.worker_events import (
    Connected,
    Disconnected,
    ForgetResults,
    Sampled,
    SendToMaster,
    SpoolResults,
    StopWorker,
    Terminated,
)
from zmqcluster.core.worker_outbox import RESEND_MS, SPOOL_AFTER_MS
from zmqcluster.core.worker_queue import (
    ANNOUNCE_AFTER_MS,
    OVERDUE_GRACE_MS,
    QUEUED,
    RUNNING,
    SLACK,
)
from zmqcluster.messages import (
    Abort,
    Control,
    Enrolled,
    Goodbye,
    Heartbeat,
    Held,
    Hello,
    Hint,
    Progress,
    ProgressNote,
    RateReport,
    RateRule,
    Refused,
    Resources,
    ResultAck,
    Results,
    Returned,
    Started,
)
from zmqcluster.model import DeviceId, Outcome, RefusalCode


@pytest.fixture
def worker() -> WorkerBench:
    return WorkerBench().opened()


# --- starting ------------------------------------------------------------------------------------


def test_orders_start_in_order_as_slots_get_free(worker: WorkerBench) -> None:
    worker.assign(order(1), order(2), order(3), order(4))
    assert worker.take_runs() == [(1, 1), (2, 1)]

    worker.reports(done(2))

    assert worker.take_runs() == [(3, 1)]


def test_pools_do_not_wait_for_each_other(worker: WorkerBench) -> None:
    worker.assign(order(1, task_type="slow"), order(2, task_type="slow"), order(3))

    assert sorted(worker.take_runs()) == [(1, 1), (3, 1)]


def test_running_max_caps_all_pools_together_first_come_first_served() -> None:
    worker = WorkerBench(settings(slots=2, sync_slots=2, running_max=2)).opened()
    worker.assign(order(1))
    worker.now_ms += 1
    worker.assign(order(2, task_type="slow"))
    worker.now_ms += 1
    worker.assign(order(3, task_type="slow"), order(4))
    assert worker.take_runs() == [(1, 1), (2, 1)]

    worker.reports(done(1))

    assert worker.take_runs() == [(3, 1)]


def test_running_max_is_what_the_hello_offers() -> None:
    worker = WorkerBench(settings(slots=50, sync_slots=4, running_max=3))

    worker.feed(Connected())

    (hello,) = worker.take_sent(Hello)
    assert [one.slots for one in hello.pools] == [3, 3]
    assert hello.credit == 3 + AHEAD_MAX


def test_repeated_order_is_ignored_while_it_waits_runs_and_after_it_ended(
    worker: WorkerBench,
) -> None:
    worker.assign(order(1), order(1))
    assert worker.take_runs() == [(1, 1)]
    worker.assign(order(1))
    worker.reports(done(1))
    worker.assign(order(1))
    worker.hears(ResultAck((ref(1),)))
    worker.assign(order(1))

    assert worker.take_runs() == []
    assert worker.core.counters.repeated_orders == 4


def test_older_attempt_is_refused(worker: WorkerBench) -> None:
    worker.assign(order(1, attempt=3), order(1, attempt=2))
    worker.reports(done(1, attempt=3))
    worker.hears(ResultAck((ref(1, 3),)))
    worker.assign(order(1, attempt=2))

    assert worker.take_runs() == [(1, 3)]


def test_newer_attempt_waits_until_the_older_process_is_gone(worker: WorkerBench) -> None:
    worker.assign(order(1, attempt=1))
    worker.take_runs()
    worker.assign(order(1, attempt=2))
    assert worker.take_kills() == [(1, 1, Outcome.CANCELLED)]
    assert worker.take_runs() == []

    worker.reports(done(1, 1, Outcome.DIED))

    assert worker.take_runs() == [(1, 2)]
    assert worker.take_sent(Results)[0].results == (done(1, 1, Outcome.CANCELLED),)


def test_newer_attempt_replaces_one_that_waits(worker: WorkerBench) -> None:
    worker.assign(order(1), order(2), order(3, attempt=1), order(3, attempt=2))
    worker.take_runs()

    worker.reports(done(1), done(2))

    assert worker.take_runs() == [(3, 2)]


def test_assign_of_an_older_epoch_is_refused() -> None:
    worker = WorkerBench()
    worker.epoch = 5
    worker.opened()
    worker.epoch = 4

    worker.assign(order(1))

    assert worker.take_runs() == []
    assert worker.core.counters.stale_assigns == 1


def test_assign_before_the_welcome_is_not_believed() -> None:
    worker = WorkerBench()
    worker.feed(Connected())
    worker.assign(order(1))
    worker.hears(worker.welcome())

    assert worker.take_runs() == []


def test_unknown_type_is_answered_as_failed(worker: WorkerBench) -> None:
    worker.assign(order(1, task_type="mystery"))

    (message,) = worker.take_sent(Results)
    assert message.results[0].outcome is Outcome.FAILED
    assert "mystery" in message.results[0].error


def test_more_than_a_worker_holds_is_given_back_at_once(worker: WorkerBench) -> None:
    worker.assign(*(order(n) for n in range(1, HELD_MAX + 4)))

    (returned,) = worker.take_sent(Returned)[:1]
    assert returned.refs[0] == ref(HELD_MAX + 1)
    assert worker.core.counters.given_back == 3


# --- start windows -------------------------------------------------------------------------------


def test_order_with_a_window_has_started_when_its_host_says_so(worker: WorkerBench) -> None:
    worker.assign(order(1, start_within_ms=500), order(2))
    worker.advance(ANNOUNCE_AFTER_MS - 1)
    assert worker.take_sent(Started) == []

    worker.reports(Started((ref(1), ref(2), ref(3))))
    worker.reports(Started((ref(1),)))

    assert worker.take_sent(Started) == [Started((ref(1),))]


def test_what_has_not_begun_is_no_running_line_of_the_inventory(worker: WorkerBench) -> None:
    worker.assign(order(1, start_within_ms=500), order(2, start_within_ms=500))
    worker.reports(Started((ref(1),)))
    worker.take_sent(Heartbeat)

    worker.advance(BEAT_MS)

    (beat,) = worker.take_sent(Heartbeat)
    assert {one.task_id: one.phase for one in beat.inventory} == {1: RUNNING, 2: QUEUED}
    assert beat.running == 2


def test_window_that_passed_in_the_host_is_no_start(worker: WorkerBench) -> None:
    worker.assign(order(1, start_within_ms=500))
    worker.reports(done(1, outcome=Outcome.RETURNED))
    worker.advance(1_000)

    assert worker.take_sent(Started) == []


def test_start_while_the_master_is_away_is_told_before_its_result(worker: WorkerBench) -> None:
    worker.assign(order(1, start_within_ms=500))
    worker.feed(Disconnected())
    worker.reports(Started((ref(1),)), done(1))
    worker.effects.clear()

    worker.connect()

    sent = [one.message for one in worker.take(SendToMaster)]
    kinds = [type(one) for one in sent if isinstance(one, Started | Results)]
    assert kinds == [Started, Results]


def test_delay_learned_by_a_start_is_told_before_it(worker: WorkerBench) -> None:
    worker.assign(order(1, start_within_ms=500))
    worker.reports(Started((ref(1),)), RateRule("site", delay_ms=300))

    sent = [one.message for one in worker.take(SendToMaster)]
    assert [type(one) for one in sent] == [RateReport, Started]


def test_worker_that_stops_at_once_counts_what_may_have_begun(worker: WorkerBench) -> None:
    worker.assign(order(1, start_within_ms=500), order(2, start_within_ms=500))
    worker.reports(Started((ref(1),)))
    worker.effects.clear()

    worker.feed(Terminated(), Terminated())

    sent = [one.message for one in worker.take(SendToMaster)]
    kinds = [one for one in sent if isinstance(one, Started | Goodbye)]
    assert kinds == [Started((ref(2),)), Goodbye("stopped at once")]
    assert worker.take_kills() == [(2, 1, Outcome.RETURNED)]


def test_lease_that_ends_takes_back_what_has_not_begun(worker: WorkerBench) -> None:
    worker.assign(order(1, start_within_ms=500), order(2, start_within_ms=500))
    worker.reports(Started((ref(1),)))
    worker.feed(Disconnected())
    worker.advance(TIMEOUT_MS - 1)
    assert worker.take_kills() == []

    worker.advance(2)

    assert worker.take_kills() == [(2, 1, Outcome.RETURNED)]


def test_short_runs_are_never_announced_and_longer_ones_once(worker: WorkerBench) -> None:
    worker.assign(order(1), order(2))
    worker.advance(ANNOUNCE_AFTER_MS - 1)
    worker.reports(done(1))
    assert worker.take_sent(Started) == []

    worker.advance(2)
    worker.advance(1_000)

    assert worker.take_sent(Started) == [Started((ref(2),))]


def test_missed_window_is_given_back_and_never_started(worker: WorkerBench) -> None:
    worker.assign(order(1), order(2), order(3, start_within_ms=500))
    worker.take_runs()
    worker.advance(500)
    assert worker.take_sent(Returned) == []

    worker.advance(1)
    worker.reports(done(1), done(2))

    assert worker.take_sent(Returned) == [Returned((ref(3),), "start window missed")]
    assert worker.take_runs() == []


def test_window_is_void_without_a_session_and_the_inventory_says_so(worker: WorkerBench) -> None:
    worker.assign(order(1), order(2), order(3, start_within_ms=5_000))
    worker.take_runs()
    worker.feed(Disconnected())
    worker.reports(done(1))
    assert worker.take_runs() == []

    worker.feed(Connected())

    (hello,) = worker.take_sent(Hello)
    assert {one.task_id for one in hello.inventory} == {1, 2}
    assert worker.take_sent(Returned) == []


# --- leases --------------------------------------------------------------------------------------


def test_waiting_orders_start_through_a_short_loss_of_the_master(worker: WorkerBench) -> None:
    worker.assign(order(1), order(2), order(3))
    worker.take_runs()
    worker.feed(Disconnected())
    worker.advance(1_000)

    worker.reports(done(1))

    assert worker.take_runs() == [(3, 1)]


def test_nothing_starts_once_the_master_may_have_given_it_away(worker: WorkerBench) -> None:
    worker.assign(order(1), order(2), order(3))
    worker.take_runs()
    worker.feed(Disconnected())
    worker.advance(TIMEOUT_MS + 1)
    worker.reports(done(1))
    assert worker.take_runs() == []

    worker.connect()

    assert worker.take_runs() == [(3, 1)]


# --- results -------------------------------------------------------------------------------------


def test_results_of_one_turn_leave_in_one_message(worker: WorkerBench) -> None:
    worker.assign(order(1), order(2))

    worker.reports(done(1), done(2))

    assert worker.take_sent(Results) == [Results((done(1), done(2)))]


def test_result_is_repeated_until_it_is_acknowledged(worker: WorkerBench) -> None:
    worker.assign(order(1))
    worker.reports(done(1))
    worker.take_sent(Results)
    worker.advance(RESEND_MS)
    assert worker.take_sent(Results) == [Results((done(1),))]

    worker.hears(ResultAck((ref(1),)))
    worker.advance_with_acks(4 * RESEND_MS)

    assert worker.take_sent(Results) == []
    assert worker.core.kept == 0


def test_results_are_sent_again_after_a_new_welcome(worker: WorkerBench) -> None:
    worker.assign(order(1))
    worker.reports(done(1))
    worker.feed(Disconnected())
    worker.effects.clear()

    worker.feed(Connected())
    (hello,) = worker.take_sent(Hello)
    assert worker.take_sent(Results) == []
    worker.hears(worker.welcome())

    assert hello.inventory == (Held(1, 1, 2),)
    assert worker.take_sent(Results) == [Results((done(1),))]


def test_quick_acknowledgement_spares_the_disk(worker: WorkerBench) -> None:
    worker.assign(order(1), order(2))
    worker.reports(done(1))
    worker.hears(ResultAck((ref(1),)))
    worker.reports(done(2))

    worker.advance(SPOOL_AFTER_MS)

    assert worker.take(SpoolResults) == [SpoolResults((done(2),))]
    worker.hears(ResultAck((ref(2),)))
    assert worker.take(ForgetResults) == [ForgetResults((ref(2),))]


def test_result_is_spooled_at_once_while_the_master_is_away(worker: WorkerBench) -> None:
    worker.assign(order(1))
    worker.feed(Disconnected())

    worker.reports(done(1))

    assert worker.take(SpoolResults) == [SpoolResults((done(1),))]
    assert worker.take(SendToMaster) == []


def test_results_of_a_former_process_are_in_the_inventory_and_sent_after_the_welcome() -> None:
    worker = WorkerBench(kept=[done(7, 2), done(7, 2)])
    worker.feed(Connected())
    (hello,) = worker.take_sent(Hello)
    assert hello.inventory == (Held(7, 2, 2),)
    worker.hears(worker.welcome())
    assert worker.take_sent(Results) == [Results((done(7, 2),))]
    assert worker.take(SpoolResults) == []

    worker.assign(order(7, attempt=2))
    worker.hears(ResultAck((ref(7, 2),)))

    assert worker.take_runs() == []
    assert worker.take(ForgetResults) == [ForgetResults((ref(7, 2),))]


def test_acks_of_unknown_attempts_change_nothing(worker: WorkerBench) -> None:
    worker.assign(order(1))
    worker.reports(done(1))

    worker.hears(ResultAck((ref(1, 2), ref(99))))

    assert worker.core.kept == 1


def test_reports_about_attempts_that_do_not_run_change_nothing(worker: WorkerBench) -> None:
    worker.assign(order(1), order(2), order(3))
    worker.effects.clear()

    worker.reports(done(3), done(1, 2), done(99), ProgressNote(99, 1, 0.5))

    assert worker.take_sent(Results) == []
    assert worker.core.counters.stray_reports == 3
    assert worker.core.running == 2


def test_full_spool_stops_the_intake_but_loses_nothing() -> None:
    worker = WorkerBench(settings(slots=1, kept_bytes_max=1_000)).opened()
    worker.assign(order(1), order(2))
    worker.take_runs()
    worker.reports(done(1, result=b"x" * 1_000))
    assert worker.take_runs() == []
    worker.advance(300)
    (beat,) = worker.take_sent(Heartbeat)
    assert beat.credit == 0

    worker.hears(ResultAck((ref(1),)))

    assert worker.take_runs() == [(2, 1)]
    worker.advance(300)
    assert worker.take_sent(Heartbeat)[-1].credit > 0


# --- aborts --------------------------------------------------------------------------------------


def test_abort_of_a_waiting_order_is_answered_at_once(worker: WorkerBench) -> None:
    worker.assign(order(1), order(2), order(3))
    worker.take_runs()

    worker.hears(Abort((ref(3),)))
    worker.reports(done(1))

    assert worker.take_sent(Results)[0].results == (done(3, 1, Outcome.CANCELLED, b""),)
    assert worker.take_runs() == []


def test_abort_of_a_run_is_answered_when_its_process_is_gone(worker: WorkerBench) -> None:
    worker.assign(order(1))
    worker.hears(Abort((ref(1),)))
    worker.hears(Abort((ref(1),)))
    assert worker.take_kills() == [(1, 1, Outcome.CANCELLED)]
    assert worker.take_sent(Results) == []

    worker.reports(done(1, 1, Outcome.DIED, b""))

    assert worker.take_sent(Results) == [Results((done(1, 1, Outcome.CANCELLED, b""),))]


def test_abort_that_comes_too_late_leaves_the_result_alone(worker: WorkerBench) -> None:
    worker.assign(order(1), order(2))
    worker.hears(Abort((ref(1),)))
    worker.reports(done(1), done(2))
    worker.hears(Abort((ref(1), ref(2))))

    assert worker.take_sent(Results) == [Results((done(1), done(2)))]


def test_abort_of_an_unknown_attempt_is_answered_so_that_the_master_can_close_it(
    worker: WorkerBench,
) -> None:
    worker.hears(Abort((ref(5),)))
    worker.hears(Abort((ref(5),)))
    worker.assign(order(5))

    assert worker.take_sent(Results) == [Results((done(5, 1, Outcome.CANCELLED, b""),))]
    assert worker.take_runs() == []


def test_abort_of_a_result_of_a_former_process_leaves_it_alone() -> None:
    worker = WorkerBench(kept=[done(7, 2)])
    worker.connect()

    worker.hears(Abort((ref(7, 2),)))

    assert worker.take_sent(Results) == [Results((done(7, 2),))]
    assert worker.core.kept == 1


def test_abort_in_a_hint_counts_only_for_what_is_here(worker: WorkerBench) -> None:
    worker.assign(order(1))

    worker.hears(Hint(epoch=1, abort=(ref(1), ref(5))))

    assert worker.take_kills() == [(1, 1, Outcome.CANCELLED)]
    assert worker.take_sent(Results) == []


def test_abort_in_a_heartbeat_reply_and_in_a_welcome_count(worker: WorkerBench) -> None:
    worker.assign(order(1), order(2))
    worker.advance(BEAT_MS)
    worker.ack_beats(abort=(ref(1),))
    assert worker.take_kills() == [(1, 1, Outcome.CANCELLED)]

    worker.connect(abort=(ref(2),))

    assert worker.take_kills() == [(2, 1, Outcome.CANCELLED)]


# --- what takes too long -------------------------------------------------------------------------


def test_run_that_outlives_its_deadline_is_killed_again_and_again(worker: WorkerBench) -> None:
    worker.assign(order(1, timeout_ms=1_000))
    worker.advance_with_acks(1_000 + OVERDUE_GRACE_MS)
    worker.advance_with_acks(2_000)
    assert worker.take_kills() == [(1, 1, Outcome.TIMED_OUT)]

    worker.advance_with_acks(OVERDUE_GRACE_MS)

    assert worker.take_kills() == [(1, 1, Outcome.TIMED_OUT)]
    assert worker.core.running == 1


def test_orders_that_would_wait_long_go_back_but_for_a_fair_stock() -> None:
    worker = WorkerBench(settings(slots=2)).opened()
    worker.assign(*(order(n) for n in range(1, 11)))
    worker.take_runs()

    worker.advance_with_acks(4_000)

    given_back = [one.task_id for message in worker.take_sent(Returned) for one in message.refs]
    assert given_back == [5, 6, 7, 8, 9, 10]
    assert worker.core.waiting == 2


def test_orders_that_move_are_kept() -> None:
    worker = WorkerBench(settings(slots=2)).opened()
    worker.assign(*(order(n) for n in range(1, 41)))

    for first in range(1, 40, 2):
        worker.advance_with_acks(100, step_ms=100)
        worker.reports(done(first), done(first + 1))

    assert worker.take_sent(Returned) == []
    assert worker.core.counters.finished == 40


def test_orders_taken_back_behind_a_slow_task_leave_nothing_behind() -> None:
    worker = WorkerBench(settings(slots=1)).opened()
    worker.assign(order(1), order(2), order(3, start_within_ms=10**9))
    for attempt in range(1, 6 * SLACK):  # more than once through every clean-up
        worker.assign(order(4, attempt, start_within_ms=10**9))
        worker.hears(Abort((ref(4, attempt),)), ResultAck((ref(4, attempt),)))

    queue = worker.core._queue
    entries = sum(len(lane.queue) for lane in queue._lanes.values()) + len(queue._windows)
    assert worker.core.waiting == 2
    assert entries < 2 * SLACK + 10


def test_no_start_window_is_forgotten_in_a_clean_up() -> None:
    worker = WorkerBench(settings(slots=1)).opened()
    worker.assign(order(1))
    for task_id in range(2, 4 * SLACK):
        worker.assign(order(task_id, start_within_ms=100))
        worker.hears(Abort((ref(task_id),)))
        worker.assign(order(10_000 + task_id, start_within_ms=1))

    worker.advance(2)

    returned = sum(len(one.refs) for one in worker.take_sent(Returned))
    assert returned == 4 * SLACK - 2


def test_a_master_that_hands_out_too_much_again_is_met_with_patience() -> None:
    worker = WorkerBench(settings(slots=1)).opened()
    worker.assign(*(order(n) for n in range(1, 21)))
    attempt = 1
    for _ in range(60):
        worker.advance_with_acks(1_000)
        returned = [one.task_id for message in worker.take_sent(Returned) for one in message.refs]
        if returned:
            attempt += 1
            worker.assign(*(order(task_id, attempt) for task_id in returned))

    assert 3 <= attempt <= 8


# --- heartbeats and news -------------------------------------------------------------------------


def test_heartbeats_carry_the_inventory_and_come_in_time(worker: WorkerBench) -> None:
    worker.feed(Sampled(Resources(cpu_pct=12.5)))
    worker.assign(order(1), order(2), order(3))
    worker.reports(done(1))
    worker.advance(BEAT_MS)

    (beat,) = worker.take_sent(Heartbeat)
    phases = {one.task_id: one.phase for one in beat.inventory}
    assert phases == {1: 2, 2: 1, 3: 1}
    assert beat.running == 2
    assert beat.assign_seq == 1
    assert beat.resources.cpu_pct == 12.5
    assert beat.credit == 3 + AHEAD_MAX


def test_progress_is_thinned_out_to_the_newest_note(worker: WorkerBench) -> None:
    worker.assign(order(1))
    for step in range(10):
        worker.reports(ProgressNote(1, 1, step / 10))
        worker.advance(20)
    worker.advance(300)

    sent = worker.take_sent(Progress)
    assert len(sent) == 2
    assert sent[-1].notes == (ProgressNote(1, 1, 0.9),)


def test_rates_learned_while_the_master_is_away_are_told_later_and_shorter(
    worker: WorkerBench,
) -> None:
    worker.feed(Disconnected())
    worker.reports(RateRule("http://a", delay_ms=100, closed_for_ms=10_000))
    worker.advance(4_000)
    worker.reports(RateRule("http://a", concurrency=2))

    worker.connect()

    assert worker.take_sent(RateReport) == [RateReport((RateRule("http://a", 100, 2, 6_000),))]


# --- draining and stopping -----------------------------------------------------------------------


def test_first_signal_drains_and_the_last_acknowledgement_ends_it(worker: WorkerBench) -> None:
    worker.assign(order(1), order(2), order(3))
    worker.take_runs()
    worker.feed(Terminated())
    assert worker.take_sent(Returned) == [Returned((ref(3),), "draining")]
    worker.assign(order(4))
    assert worker.take_sent(Returned) == [Returned((ref(4),), "draining")]
    worker.reports(done(1), done(2))
    assert worker.take(StopWorker) == []

    worker.hears(ResultAck((ref(1), ref(2))))

    assert worker.take_runs() == []
    assert worker.take_sent(Goodbye) == [Goodbye("drained")]
    assert worker.take_stops() == [(0, "drained")]


def test_drained_worker_does_not_wait_for_ever_for_the_master(worker: WorkerBench) -> None:
    worker.assign(order(1))
    worker.feed(Disconnected(), Terminated())
    worker.reports(done(1))
    assert worker.take_stops() == []
    assert worker.take(SpoolResults) == [SpoolResults((done(1),))]

    worker.advance(10_000)

    assert worker.take_stops() == [(0, "drained")]
    assert "1 unacknowledged results are kept on disk for the next start" in worker.take_lines()


def test_second_signal_stops_at_once_and_keeps_the_results(worker: WorkerBench) -> None:
    worker.assign(order(1), order(2))
    worker.reports(done(1))

    worker.feed(Terminated(), Terminated())

    assert worker.take(SpoolResults) == [SpoolResults((done(1),))]
    assert worker.take_stops()[0][0] == 130
    assert worker.core.handle(worker.now_ms, Connected()) == []


def test_signal_before_the_master_ever_answered_ends_the_process() -> None:
    worker = WorkerBench()

    worker.feed(Terminated())

    assert worker.take_stops() == [(0, "drained")]


def test_standing_order_to_drain_gives_back_and_stays(worker: WorkerBench) -> None:
    worker.assign(order(1), order(2), order(3))
    worker.advance(BEAT_MS)
    worker.take_sent(Returned)
    worker.ack_beats(control=Control(version=1, drain=True))
    worker.advance(300)
    (beat,) = worker.take_sent(Heartbeat)
    assert (beat.credit, beat.draining) == (0, True)
    assert worker.core.waiting == 0
    worker.advance(BEAT_MS)

    worker.ack_beats(control=Control(version=2))
    worker.advance(300)

    assert worker.take_stops() == []
    assert worker.take_sent(Heartbeat)[-1].draining is False


def test_standing_order_of_the_past_is_ignored(worker: WorkerBench) -> None:
    worker.connect(control=Control(version=5))
    worker.advance(BEAT_MS)

    worker.ack_beats(control=Control(version=4, drain=True))

    assert not worker.core.is_draining


def test_standing_order_to_stop_drains_and_ends(worker: WorkerBench) -> None:
    worker.advance(BEAT_MS)

    worker.ack_beats(control=Control(version=1, stop=True))

    assert worker.take_stops() == [(0, "drained")]


def test_late_repeat_of_the_enrolment_changes_nothing(worker: WorkerBench) -> None:
    worker.hears(Enrolled(DeviceId("d1")), Refused(b"", RefusalCode.BUSY, "later"))

    assert worker.take_stops() == []
