"""What people and clients ask: submit once, cancel for good, retry, watch, explain, join."""

from __future__ import annotations

import msgspec
import pytest

from tests.support.master_bench import CLIENT, WALL_AT_ZERO, MasterBench, held, spec
from zmqcluster.core.effects import AllowKey, DenyKey
from zmqcluster.core.events import Committed, MessageReceived, PeerLost, Principal
from zmqcluster.core.settings import Settings
from zmqcluster.core.state import PEER_EVENTS_A_SECOND
from zmqcluster.messages import (
    Answer,
    AskDevices,
    AskExplain,
    AskOverview,
    CancelTasks,
    Changed,
    CreateToken,
    DrainDevice,
    Enrol,
    Enrolled,
    Finished,
    Outbound,
    Progress,
    ProgressNote,
    RateRule,
    Refused,
    Results,
    RetryTasks,
    RevokeDevice,
    RevokeToken,
    SetStrategy,
    Submit,
    Submitted,
    TaskOrder,
    TaskResult,
    TaskSpec,
    Watch,
)
from zmqcluster.model import DeviceId, JobState, Outcome, RefusalCode, Role, Strategy, TaskState
from zmqcluster.views import DeviceView, ExplainView, OverviewView

KEY = b"k" * 32
BEAT_MS = Settings().heartbeat_interval_ms


@pytest.fixture
def master() -> MasterBench:
    return MasterBench()


def one(master: MasterBench, name: str) -> TaskOrder:
    [order] = master.orders(name)
    return order


def refusal(answer: Outbound) -> RefusalCode:
    assert isinstance(answer, Refused), answer
    return answer.code


# --- submit -------------------------------------------------------------------------------------


def test_an_unacknowledged_submission_may_be_lost_and_an_acknowledged_never(
    master: MasterBench,
) -> None:
    kept = master.submit(spec(unique_key="a"))
    master.commits = False
    master.hears("client", Submit(b"lost", (spec(unique_key="b"),)))
    assert master.takes("client") == []
    master.commits = True

    master.restart()

    assert set(master.store.tasks) == set(kept.task_ids)
    master.device("d1")
    master.ends("d1", one(master, "d1"))
    assert master.state(kept.task_ids[0]) is TaskState.COMPLETED


def test_a_replay_before_the_commit_gets_the_same_answer(master: MasterBench) -> None:
    master.commits = False
    request = Submit(b"once", (spec(), spec()))
    master.hears("client", request)
    master.hears("client", request)
    master.commits = True
    master.commit()

    first, second = master.takes("client")

    assert first == second
    assert len(master.store.tasks) == 2


def test_a_replay_in_the_same_batch_gets_the_same_answer(master: MasterBench) -> None:
    event = master.received("client", Submit(b"once", (spec(),)))

    master.turn(event, event)

    first, second = master.takes("client")
    assert first == second
    assert len(master.store.tasks) == 1


def test_a_unique_key_is_taken_once_within_a_batch_and_before_the_commit(
    master: MasterBench,
) -> None:
    master.commits = False
    master.hears("client", Submit(b"1", (spec(unique_key="a"), spec(unique_key="a"))))
    master.hears("client", Submit(b"2", (spec(unique_key="a"), spec(unique_key="b"))))
    master.commits = True
    master.commit()

    first, second = [one for one in master.takes("client") if isinstance(one, Submitted)]

    assert first.task_ids[0] == first.task_ids[1] == second.task_ids[0]
    assert (first.existing, second.existing) == ((1,), (0,))
    assert len(master.store.tasks) == 2


def test_a_unique_key_belongs_to_its_job(master: MasterBench) -> None:
    first = master.submit(spec(unique_key="a"), job="one")
    second = master.submit(spec(unique_key="a"), job="two")
    third = master.submit(spec(unique_key="a"))

    ids = {*first.task_ids, *second.task_ids, *third.task_ids}

    assert len(ids) == 3


def test_a_unique_key_outlives_its_tasks_end_and_a_retry(master: MasterBench) -> None:
    master.device("d1")
    job = master.submit(spec(unique_key="a", max_retry_count=0), job="j")
    master.ends("d1", one(master, "d1"), Outcome.FAILED)
    again = master.submit(spec(unique_key="a"), job_id=job.job_id)
    master.changes(RetryTasks(b"r", job.task_ids))
    master.ends("d1", one(master, "d1"))
    master.restart()

    last = master.submit(spec(unique_key="a"), job_id=job.job_id)

    assert again.task_ids == last.task_ids == job.task_ids
    assert (again.existing, last.existing) == ((0,), (0,))


def test_unique_keys_hold_beyond_what_is_remembered(
    master: MasterBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zmqcluster.core.state._RECENT_KEYS", 8)
    keys = [f"key{index}" for index in range(40)]
    job = master.submit(*[spec(unique_key=key) for key in keys], job="j")
    # One turn that pushes out of memory what its second message was told is in it.
    flood = Submit(b"f", tuple(spec(unique_key=f"new{index}") for index in range(60)), job.job_id)
    again = Submit(b"a", tuple(spec(unique_key=key) for key in keys), job.job_id)

    master.turn(master.received("client", flood), master.received("client", again))

    _, answer = master.takes("client")
    assert isinstance(answer, Submitted)
    assert answer.task_ids == job.task_ids


def test_a_late_result_of_a_task_out_of_memory_cannot_take_a_key_twice(
    master: MasterBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zmqcluster.core.state._RECENT_KEYS", 0)
    master = MasterBench(Settings(delayed_tasks=2))
    master.device("d1")
    job = master.submit(spec(), spec(unique_key="/a", labels=("none",)), job="j")
    order = one(master, "d1")
    master.ends("d1", order, Outcome.RETRY, retry_after_ms=3_600_000)
    # Sooner ones push it out of memory.
    master.submit(*[spec(not_before_ms=WALL_AT_ZERO + 60_000 + n) for n in range(4)])
    assert order.task_id not in master.core.state.tasks

    master.ends("d1", order, children=(spec(unique_key="/a"),))

    assert sum(one.unique_key == "/a" for one in master.store.tasks.values()) == 1
    assert master.store.jobs[job.job_id].pending == 2  # type: ignore[index]
    master.audit()


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Submit(b"r", ()), RefusalCode.BAD_REQUEST),
        (Submit(b"r", (spec(),), job_id=77), RefusalCode.NOT_FOUND),
        (CancelTasks(b"r", job_id=77), RefusalCode.NOT_FOUND),
        (AskExplain(b"r", 77), RefusalCode.NOT_FOUND),
        (AskDevices(b"r", "nobody"), RefusalCode.NOT_FOUND),
        (DrainDevice(b"r", "nobody"), RefusalCode.NOT_FOUND),
        (RevokeDevice(b"r", "nobody"), RefusalCode.NOT_FOUND),
        (RevokeToken(b"r", "none"), RefusalCode.NOT_FOUND),
    ],
)
def test_what_cannot_be_done_is_refused(
    master: MasterBench, request_: Submit, code: RefusalCode
) -> None:
    answer = master.asks(request_)

    assert refusal(answer) is code
    assert master.store.tasks == {}


def test_a_finished_job_takes_more_tasks_and_is_active_again(master: MasterBench) -> None:
    master.device("d1")
    job = master.submit(spec(unique_key="a"), job="j")
    master.ends("d1", one(master, "d1"))
    assert master.store.jobs[job.job_id].state is JobState.FINISHED  # type: ignore[index]

    known = master.submit(spec(unique_key="a"), job_id=job.job_id)
    assert known.existing == (0,)
    assert master.store.jobs[job.job_id].state is JobState.FINISHED  # type: ignore[index]
    master.submit(spec(unique_key="b"), job_id=job.job_id)

    assert master.store.jobs[job.job_id].state is JobState.ACTIVE  # type: ignore[index]
    assert master.store.jobs[job.job_id].finished_wall == 0  # type: ignore[index]


def test_a_job_that_ends_twice_before_a_commit_keeps_its_counts(master: MasterBench) -> None:
    job = master.submit(job="j")
    master.commits = False
    master.hears("client", CancelTasks(b"1", job.task_ids))
    first = master.core.state.turn
    master.hears("client", RetryTasks(b"2", job.task_ids))
    master.hears("client", CancelTasks(b"3", job.task_ids))
    # Only the first of the three turns is on disk, and that is all a read can know.
    master.turn(Committed(first))
    master.hears("client", RetryTasks(b"4", job.task_ids))
    master.commits = True
    master.commit()

    assert master.store.jobs[job.job_id].pending == 1  # type: ignore[index]
    assert len(master.takes("client")) == 4
    master.audit()


# --- cancel -------------------------------------------------------------------------------------


def test_a_pending_task_is_cancelled_at_once_and_never_begins(master: MasterBench) -> None:
    [task_id] = master.submit().task_ids

    changed = master.changes(CancelTasks(b"c", (task_id, task_id, 99)))
    master.device("d1")

    assert changed.task_ids == (task_id,)
    assert [(one.task_id, one.why) for one in changed.untouched] == [
        (task_id, "it is cancelled already"),
        (99, "there is no such task"),
    ]
    assert master.state(task_id) is TaskState.CANCELLED
    assert master.orders("d1") == []


def test_a_completed_task_is_left_as_it_is(master: MasterBench) -> None:
    master.device("d1")
    [task_id] = master.submit().task_ids
    master.ends("d1", one(master, "d1"))

    changed = master.changes(CancelTasks(b"c", (task_id,)))

    assert changed.task_ids == ()
    assert master.state(task_id) is TaskState.COMPLETED


@pytest.mark.parametrize("is_cancel_first", [True, False])
def test_a_cancel_that_races_a_result_in_one_batch(
    master: MasterBench, is_cancel_first: bool
) -> None:
    master.device("d1")
    [task_id] = master.submit().task_ids
    order = one(master, "d1")
    result = master.received(
        "d1", Results((TaskResult(task_id, order.attempt, Outcome.COMPLETED, b"\x01"),))
    )
    cancel = master.received("client", CancelTasks(b"c", (task_id,)))

    master.turn(*((cancel, result) if is_cancel_first else (result, cancel)))

    changed = master.take("client", Changed)
    if is_cancel_first:
        assert changed.task_ids == (task_id,)
        assert master.state(task_id) is TaskState.CANCELLED
        assert master.task(task_id).result == b""
        assert "result_discarded" in master.event_kinds()
    else:
        assert changed.task_ids == ()
        assert master.state(task_id) is TaskState.COMPLETED


@pytest.mark.parametrize(
    "outcome", [Outcome.FAILED, Outcome.RETRY, Outcome.DIED, Outcome.TIMED_OUT, Outcome.RETURNED]
)
def test_however_a_cancelled_run_ends_it_is_cancelled(
    master: MasterBench, outcome: Outcome
) -> None:
    master.device("d1")
    [task_id] = master.submit().task_ids
    order = one(master, "d1")
    master.starts("d1", order)
    master.changes(CancelTasks(b"c", (task_id,)))

    master.ends("d1", order, outcome)

    assert master.state(task_id) is TaskState.CANCELLED


def test_cancelled_children_and_records_of_a_discarded_result_are_not_taken(
    master: MasterBench,
) -> None:
    master.device("d1")
    [task_id] = master.submit().task_ids
    order = one(master, "d1")
    master.changes(CancelTasks(b"c", (task_id,)))

    master.ends("d1", order, children=(spec(),))

    assert set(master.store.tasks) == {task_id}


def test_a_cancelled_job_ends_far_beyond_the_window() -> None:
    master = MasterBench(Settings(window_tasks=64, lane_tasks=32))
    master.audited_tasks_max = 0
    job = master.submit(*[spec(rate_key=f"k{n % 5}") for n in range(10_000)], job="j")
    other = master.submit(job="other")
    master.device("d1", slots=3)
    running = master.orders("d1")

    master.changes(CancelTasks(b"c", job_id=job.job_id))
    master.forget()
    for order in running:
        master.ends("d1", order)

    states = [master.state(task_id) for task_id in job.task_ids]
    assert set(states) == {TaskState.CANCELLED}
    assert master.store.jobs[job.job_id].state is JobState.CANCELLED  # type: ignore[index]
    assert refusal(master.asks(Submit(b"s", (spec(),), job.job_id))) is RefusalCode.CONFLICT
    assert master.state(other.task_ids[0]) is not TaskState.CANCELLED
    master.forget()
    master.audit()


def test_a_job_sweep_goes_on_after_a_restart(master: MasterBench) -> None:
    job = master.submit(*[spec() for _ in range(20)], job="j")
    master.commits = False
    master.hears("client", CancelTasks(b"c", job_id=job.job_id))
    # The decision is on disk, and the master dies before it reads the first page.
    [turn] = master.take_undone()
    master.store.apply(turn.changes)
    master.commits = True

    master.restart()

    assert {master.state(task_id) for task_id in job.task_ids} == {TaskState.CANCELLED}


def test_nothing_is_retried_out_of_a_job_that_is_still_being_swept(master: MasterBench) -> None:
    master.device("d1")
    job = master.submit(*[spec() for _ in range(5)], job="j")
    [order] = master.orders("d1")
    master.changes(CancelTasks(b"c", job_id=job.job_id))

    early = master.changes(RetryTasks(b"r", job.task_ids[1:2]))
    master.ends("d1", order, Outcome.CANCELLED)
    later = master.changes(RetryTasks(b"s", job.task_ids[1:2]))

    assert early.task_ids == ()
    assert "still being cancelled" in early.untouched[0].why
    assert later.task_ids == job.task_ids[1:2]
    assert one(master, "d1").task_id == job.task_ids[1]
    assert master.store.jobs[job.job_id].cancelled == 4  # type: ignore[index]


def test_a_task_that_has_just_left_memory_is_cancelled_as_it_is_now() -> None:
    master = MasterBench(Settings(delayed_tasks=2, max_retry_count=5))
    master.device("d1")
    [task_id] = master.submit().task_ids
    order = one(master, "d1")
    master.submit(*[spec(not_before_ms=WALL_AT_ZERO + 60_000 + n) for n in range(4)])
    master.commits = False
    # It fails, and waits too far away to stay in memory; the disk still says it is assigned.
    master.ends("d1", order, Outcome.RETRY, retry_after_ms=3_600_000)
    assert task_id not in master.core.state.tasks

    master.hears("client", CancelTasks(b"c", (task_id,)))
    master.commits = True
    master.commit()

    assert master.state(task_id) is TaskState.CANCELLED
    master.audit()


# --- retry --------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.DIED, Outcome.CANCELLED])
def test_an_ended_task_gets_a_new_life_and_its_attempts_go_on(
    master: MasterBench, outcome: Outcome
) -> None:
    master.device("d1")
    job = master.submit(spec(max_retry_count=0), job="j")
    [task_id] = job.task_ids
    order = one(master, "d1")
    if outcome is Outcome.CANCELLED:
        master.changes(CancelTasks(b"c", (task_id,)))
    master.ends("d1", order, outcome, error="boom")
    while not master.state(task_id).is_terminal:
        master.advance(3_000)
        order = one(master, "d1")
        master.ends("d1", order, outcome)
    last = master.task(task_id).attempt

    changed = master.changes(RetryTasks(b"r", (task_id,)))

    assert changed.task_ids == (task_id,)
    assert one(master, "d1").attempt == last + 1
    task = master.task(task_id)
    assert (task.failures, task.deaths, task.error, task.finished_wall) == (0, 0, "", 0)
    assert master.store.jobs[job.job_id].state is JobState.ACTIVE  # type: ignore[index]


def test_what_has_not_failed_is_not_retried(master: MasterBench) -> None:
    master.device("d1")
    done, waiting = master.submit(spec(), spec(labels=("none",))).task_ids
    master.ends("d1", one(master, "d1"))

    changed = master.changes(RetryTasks(b"r", (done, waiting, 99)))

    assert changed.task_ids == ()
    assert [one.why for one in changed.untouched] == [
        "it is completed",
        "it is pending, not ended",
        "there is no such task",
    ]


def test_a_revived_row_does_not_meet_its_former_self(master: MasterBench) -> None:
    # Found by the state machine: the lane still held the row of the cancelled life.
    first, second = master.submit(spec(), spec()).task_ids
    master.changes(CancelTasks(b"c", (first,)))
    master.changes(RetryTasks(b"r", (first,)))

    master.device("d1", slots=2)

    assert {one.task_id for one in master.orders("d1")} == {first, second}


# --- watch --------------------------------------------------------------------------------------


def test_a_watcher_hears_of_each_end_once_it_is_on_disk(master: MasterBench) -> None:
    master.device("d1", slots=2)
    done, cancelled, unknown = *master.submit(spec(), spec()).task_ids, 99
    orders = {one.task_id: one for one in master.orders("d1")}
    master.hears("client", Watch(b"w", (done, cancelled, unknown)))
    [ends] = [one.ends for one in master.takes("client") if isinstance(one, Finished)]
    assert [one.task_id for one in ends] == [unknown]

    master.commits = False
    master.ends("d1", orders[done], result=b"\x05")
    assert master.takes("client") == []
    master.commits = True
    master.commit()

    [finished] = master.takes("client")
    assert isinstance(finished, Finished)
    assert [(one.task_id, one.state, one.result) for one in finished.ends] == [
        (done, TaskState.COMPLETED, b"\x05")
    ]
    master.hears("client", Watch(b"x", (done,)))
    [again] = master.takes("client")
    assert isinstance(again, Finished)
    assert again.ends == finished.ends


def test_a_watcher_of_a_job_hears_of_tasks_added_later(master: MasterBench) -> None:
    master.device("d1")
    job = master.submit(job="j")
    master.hears("client", Watch(b"w", job_id=job.job_id))
    assert master.take("client", Finished).ends == ()

    master.ends("d1", one(master, "d1"), children=(spec(unique_key="c"),))
    master.ends("d1", one(master, "d1"))

    heard = [one for one in master.takes("client") if isinstance(one, Finished)]
    assert sum(len(one.ends) for one in heard) == 2


def test_submit_may_watch_what_it_adds(master: MasterBench) -> None:
    master.device("d1")
    master.hears("client", Submit(b"s", (spec(),), watch=True))
    master.take("client", Submitted)

    master.ends("d1", one(master, "d1"))

    assert len(master.take("client", Finished).ends) == 1


def test_a_client_that_is_gone_is_forgotten(master: MasterBench) -> None:
    master.device("d1")
    master.submit()
    master.hears("client", Watch(b"w", (1,), 0))
    master.takes("client")
    master.turn(PeerLost(CLIENT))
    master.ends("d1", one(master, "d1"))

    assert master.takes("client") == []
    assert master.core.state.task_watchers == {}


# --- joining ------------------------------------------------------------------------------------


def token(master: MasterBench, **fields: object) -> Outbound:
    given: dict[str, object] = {
        "token_id": "t",
        "public_key": KEY,
        "role": Role.WORKER,
        "expires_wall_ms": 0,
        "uses": 1,
    }
    return master.asks(CreateToken(b"t", **(given | fields)))  # type: ignore[arg-type]


def enrol(master: MasterBench, key: bytes, device_id: str, token_id: str = "t") -> Outbound:
    master.peers["new"] = b"new"
    message = Enrol(1, key, device_id)
    master.turn(MessageReceived(b"new", Principal(Role.ENROL, token_id=token_id), message))
    [answer] = master.takes("new")
    return answer


def test_a_token_lets_as_many_keys_in_as_it_has_uses(master: MasterBench) -> None:
    assert isinstance(token(master, uses=2), Changed)
    assert AllowKey(KEY, Principal(Role.ENROL, token_id="t")) in master.actions

    assert enrol(master, b"a" * 32, "d1") == Enrolled("d1")
    assert AllowKey(b"a" * 32, Principal(Role.WORKER, DeviceId("d1"))) in master.actions
    assert enrol(master, b"a" * 32, "d1") == Enrolled("d1"), "a lost reply costs no use"
    assert enrol(master, b"b" * 32, "d2") == Enrolled("d2")

    assert refusal(enrol(master, b"c" * 32, "d3")) is RefusalCode.FORBIDDEN
    assert "enrol_refused" in master.event_kinds()
    master.audit()


def test_a_token_that_knocks_in_vain_costs_a_bounded_number_of_rows(master: MasterBench) -> None:
    for number in range(200):
        enrol(master, number.to_bytes(32, "big"), f"d{number}", "unknown")

    assert master.event_kinds().count("enrol_refused") == PEER_EVENTS_A_SECOND


def test_uses_and_keys_survive_a_restart(master: MasterBench) -> None:
    token(master)
    enrol(master, b"a" * 32, "d1")
    master.restart()

    assert enrol(master, b"a" * 32, "d1") == Enrolled("d1")
    assert refusal(enrol(master, b"b" * 32, "d2")) is RefusalCode.FORBIDDEN


def test_who_may_not_join(master: MasterBench) -> None:
    token(master, uses=9, expires_wall_ms=WALL_AT_ZERO + 10_000)
    enrol(master, b"a" * 32, "d1")

    assert refusal(enrol(master, b"z" * 32, "d9", token_id="")) is RefusalCode.FORBIDDEN
    assert refusal(enrol(master, b"z" * 32, "d9", token_id="other")) is RefusalCode.FORBIDDEN
    assert refusal(enrol(master, b"a" * 32, "d2")) is RefusalCode.CONFLICT
    assert refusal(enrol(master, b"b" * 32, "d1")) is RefusalCode.CONFLICT
    master.advance(11_000)
    assert refusal(enrol(master, b"b" * 32, "d2")) is RefusalCode.FORBIDDEN
    master.changes(RevokeToken(b"r", "t"))
    assert DenyKey(KEY) in master.actions
    assert refusal(enrol(master, b"b" * 32, "d2")) is RefusalCode.FORBIDDEN


@pytest.mark.parametrize(
    "fields",
    [
        {"token_id": ""},
        {"token_id": "u", "role": Role.ENROL},
        {"public_key": b"x" * 32},
        {"role": Role.CLIENT},
        {"token_id": "u"},
        {"token_id": "u", "public_key": b"a" * 32},
    ],
)
def test_tokens_that_cannot_be_made(master: MasterBench, fields: dict[str, object]) -> None:
    token(master)
    enrol(master, b"a" * 32, "d1")
    before = list(master.actions)

    assert refusal(token(master, **fields)) is RefusalCode.CONFLICT

    assert master.actions == before
    assert isinstance(token(master), Changed), "the same again is fine"


def test_a_revoked_device_is_out_even_before_the_door_is_shut(master: MasterBench) -> None:
    token(master, uses=2)
    enrol(master, b"a" * 32, "d1")
    master.device("d1")
    master.submit()
    order = one(master, "d1")

    master.changes(RevokeDevice(b"r", "d1"))
    [refused] = master.device("d1", inventory=(held(order),))

    assert DenyKey(b"a" * 32) in master.actions
    assert refusal(refused) is RefusalCode.FORBIDDEN
    assert master.state(order.task_id) is TaskState.PENDING
    master.restart()
    [refused] = master.device("d1")
    assert refusal(refused) is RefusalCode.FORBIDDEN
    enrol(master, b"b" * 32, "d1")
    master.device("d1")
    assert len(master.orders("d1")) == 1


# --- questions ----------------------------------------------------------------------------------


def explain(master: MasterBench, task_id: int) -> str:
    answer = master.asks(AskExplain(b"e", task_id))
    assert isinstance(answer, Answer)
    return "; ".join(msgspec.msgpack.decode(answer.body, type=ExplainView).reasons)


def test_why_a_task_does_not_run(master: MasterBench) -> None:
    [first] = master.submit(priority_spec(5)).task_ids
    assert explain(master, first) == "no device is online"
    master.device("d1", types=("other",))
    assert explain(master, first) == "no online device runs noop"
    [labelled] = master.submit(spec(labels=("gpu",))).task_ids
    assert explain(master, labelled) == "no online device with labels gpu runs noop"
    master.device("d2")
    assert f"it is assigned on device d2, attempt {1}" in explain(master, first)
    # Two others are ready: the one with the label, and the next.
    [behind] = master.submit(priority_spec(1)).task_ids
    master.submit(priority_spec(9))
    assert explain(master, behind) == "at least 2 tasks of higher priority are ready"
    [plain] = master.submit(priority_spec(9)).task_ids
    assert explain(master, plain) == "it is ready: every device that could run it is busy"
    [later] = master.submit(spec(not_before_ms=WALL_AT_ZERO + master.now_ms + 9_000)).task_ids
    assert "waiting for its not_before, due in 9.0 s" in explain(master, later)
    keyed = master.submit(
        spec(rate_key="k", priority=9), rates=(RateRule("k", closed_for_ms=4_000),)
    )
    assert "rate key k is closed for 4.0 s more" in explain(master, keyed.task_ids[0])
    order = one(master, "d2")
    master.changes(CancelTasks(b"c", (order.task_id,)))
    assert explain(master, order.task_id).endswith("; cancel requested")
    master.ends("d2", order, Outcome.CANCELLED)
    assert explain(master, order.task_id) == "it is cancelled"
    master.forget()


def priority_spec(priority: int) -> TaskSpec:
    return spec(priority=priority)


def test_the_overview_counts_what_is_there(master: MasterBench) -> None:
    master.device("d1", slots=2)
    master.submit(*[spec() for _ in range(5)], job="j")
    for order in master.orders("d1")[:1]:
        master.ends("d1", order, run_us=10_000_000)
    master.changes(SetStrategy(b"s", Strategy.RANDOM))

    answer = master.asks(AskOverview(b"o"))

    assert isinstance(answer, Answer)
    view = msgspec.msgpack.decode(answer.body, type=OverviewView)
    assert (view.devices_online, view.devices_total, view.slots) == (1, 1, 2)
    assert (view.tasks.pending, view.tasks.running, view.tasks.completed) == (2, 2, 1)
    assert (view.jobs_active, view.strategy) == (1, Strategy.RANDOM)
    master.forget()


def test_devices_are_shown_whole(master: MasterBench) -> None:
    master.device("d1", slots=2, labels=("eu",))
    master.device("d2")
    master.submit()
    master.forget()

    answer = master.asks(AskDevices(b"d"))

    assert isinstance(answer, Answer)
    views = msgspec.msgpack.decode(answer.body, type=list[DeviceView])
    assert [(one.device_id, one.slots, one.labels) for one in views] == [
        ("d1", 2, ["eu"]),
        ("d2", 1, []),
    ]
    assert sum(one.assigned for one in views) == 1


def test_totals_follow_a_task_through_a_second_life(master: MasterBench) -> None:
    master.device("d1")
    [task_id] = master.submit(spec(max_retry_count=0)).task_ids
    master.ends("d1", master.orders("d1")[0], Outcome.FAILED, error="boom")
    master.changes(RetryTasks(b"r", (task_id,)))

    master.ends("d1", master.orders("d1")[0])

    totals = master.core.state.totals
    assert totals["completed"] == 1
    assert totals["failed"] == 0


def test_watching_a_job_that_does_not_exist_is_refused(master: MasterBench) -> None:
    answer = master.asks(Watch(b"w", job_id=777))

    assert isinstance(answer, Refused)
    assert "777" in answer.problem


def test_pruning_goes_on_at_once_while_there_is_more(master: MasterBench) -> None:
    master.commits = False
    assert master.turn().changes.prune_before_wall == 0
    master.turn(Committed(master.core.state.turn, prune_more=True))

    master.now_ms += 30
    turn = master.turn()

    assert turn.changes.prune_before_wall > 0


def test_child_nobody_runs_is_told(master: MasterBench) -> None:
    master.device("d1")
    master.submit()

    master.ends("d1", master.orders("d1")[0], children=(spec("unheard_of"),))

    assert "child_unroutable" in master.event_kinds()


def test_progress_of_a_running_task_is_in_its_explanation(master: MasterBench) -> None:
    master.device("d1")
    [task_id] = master.submit().task_ids
    [order] = master.orders("d1")
    master.hears("d1", Progress((ProgressNote(order.task_id, order.attempt, 0.4, "page 2"),)))

    answer = master.asks(AskExplain(b"e", task_id))

    assert isinstance(answer, Answer)
    [reason] = msgspec.msgpack.decode(answer.body, type=ExplainView).reasons
    assert "40% done (page 2)" in reason
