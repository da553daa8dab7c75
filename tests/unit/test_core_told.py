"""Promise 12: every loss, fence, refusal and quarantine is an event and a counter, one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.master_bench import CLIENT, MasterBench, spec
from zmqcluster.core.events import (
    Facts,
    FramesDropped,
    MessageReceived,
    Noticed,
    Principal,
    TurnedAway,
)
from zmqcluster.core.settings import Settings
from zmqcluster.messages import CancelTasks, Enrol, RateReport, RateRule, Refused, Submit, TaskOrder
from zmqcluster.model import DEATHS_MAX, PROTOCOL_VERSION, Outcome, Role

BEAT_MS = Settings().heartbeat_interval_ms
LEASE_MS = Settings().device_timeout_ms


def running(master: MasterBench, *, retries: int = 3) -> TaskOrder:
    """One task that runs on d1."""
    master.device("d1")
    master.submit(spec(max_retry_count=retries))
    [order] = master.orders("d1")
    master.starts("d1", order)
    return order


def lose_the_device(master: MasterBench) -> None:
    running(master)
    master.loses("d1")
    master.advance(1_000)


def lose_a_dispatch(master: MasterBench) -> None:
    master.device("d1")
    master.submit()
    master.orders("d1")
    for _ in range(2):
        master.advance(BEAT_MS)
        master.beat("d1", assign_seq=0)


def end_as(outcome: Outcome) -> Callable[[MasterBench], None]:
    def end(master: MasterBench) -> None:
        order = running(master, retries=0)
        master.ends("d1", order, outcome, error="boom")

    return end


def end_twice(master: MasterBench) -> None:
    order = running(master)
    master.ends("d1", order)
    master.ends("d1", order)


def complete_after_cancel(master: MasterBench) -> None:
    order = running(master)
    master.changes(CancelTasks(b"c", (order.task_id,)))
    master.ends("d1", order)


def cancel_what_runs(master: MasterBench) -> None:
    order = running(master)
    master.changes(CancelTasks(b"c", (order.task_id,)))


def cancel_what_waits(master: MasterBench) -> None:
    [task_id] = master.submit().task_ids
    master.changes(CancelTasks(b"c", (task_id,)))


def salvage(master: MasterBench) -> None:
    order = running(master)
    master.loses("d1")
    master.advance(1_000)
    master.device("d1", types=("other",))
    master.ends("d1", order)


def child_nobody_runs(master: MasterBench) -> None:
    order = running(master)
    master.ends("d1", order, children=(spec("unheard_of"),))


def hello_of_another(master: MasterBench) -> None:
    master.device("d1")
    master.device("d1", reboot=True)


def enrol_without_a_token(master: MasterBench) -> None:
    peer = b"newcomer"
    enrol = Enrol(PROTOCOL_VERSION, b"k" * 32, "d1")
    master.turn(MessageReceived(peer, Principal(Role.ENROL, token_id="none"), enrol, Facts()))


def ask_for_a_job_that_is_not_there(master: MasterBench) -> None:
    assert isinstance(master.asks(Submit(b"s", (spec(),), job_id=99)), Refused)


def close_an_origin(master: MasterBench) -> None:
    master.device("d1")
    master.hears("d1", RateReport((RateRule("k", closed_for_ms=5_000),)))


def turn_away_a_frame(master: MasterBench) -> None:
    master.turn(TurnedAway("frame_refused", "d1", "noise"))


def drop_frames(master: MasterBench) -> None:
    master.turn(FramesDropped(CLIENT))


def run_out_of_descriptors(master: MasterBench) -> None:
    master.turn(Noticed("descriptors_gone", "error", "all 64 descriptors are in use"))


def pause(master: MasterBench) -> None:
    master.jump(BEAT_MS * 2)


def fall_silent_together(master: MasterBench) -> None:
    for index in range(6):
        master.device(f"d{index}")
    master.advance(LEASE_MS)


TOLD: dict[str, Callable[[MasterBench], None]] = {
    "device_lost": lose_the_device,
    "descriptors_gone": run_out_of_descriptors,
    "task_device_lost": lose_the_device,
    "task_dispatch_lost": lose_a_dispatch,
    "task_died": end_as(Outcome.DIED),
    "task_failed": end_as(Outcome.FAILED),
    "task_retry": end_as(Outcome.RETRY),
    "task_rejected": end_as(Outcome.REJECTED),
    "task_timed_out": end_as(Outcome.TIMED_OUT),
    "task_returned": end_as(Outcome.RETURNED),
    "task_cancelled": cancel_what_waits,
    "cancel_requested": cancel_what_runs,
    "result_discarded": complete_after_cancel,
    "result_fenced": end_twice,
    "result_salvaged": salvage,
    "child_unroutable": child_nobody_runs,
    "hello_refused": hello_of_another,
    "enrol_refused": enrol_without_a_token,
    "request_refused": ask_for_a_job_that_is_not_there,
    "frame_refused": turn_away_a_frame,
    "frames_dropped": drop_frames,
    "rate_key_closed": close_an_origin,
    "mass_loss_brake": fall_silent_together,
    "loop_stalled": pause,
}


@pytest.mark.parametrize("kind", TOLD)
def test_what_went_wrong_is_an_event_and_a_counter(kind: str) -> None:
    master = MasterBench()

    TOLD[kind](master)

    assert master.event_kinds().count(kind) == 1
    assert master.core.state.counters[kind] == 1
    master.forget()


def test_the_quarantine_of_a_poisonous_task_is_told_with_its_reason() -> None:
    master = MasterBench()
    master.device("d1")
    master.submit()

    for _ in range(DEATHS_MAX):
        [order] = master.orders("d1")
        master.ends("d1", order, Outcome.DIED, error="signal 11")
        master.advance(BEAT_MS)
        master.beat("d1")

    details = [one.detail for one in master.store.events if one.kind == "task_died"]
    assert details == ["lost: signal 11"] * (DEATHS_MAX - 1) + ["poisoned: signal 11"]
    assert master.core.state.counters["task_died"] == DEATHS_MAX
    master.forget()
