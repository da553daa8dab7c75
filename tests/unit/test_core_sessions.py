"""Devices come and go: clones, restarts on both sides, silence, liars with a good key."""

from __future__ import annotations

import msgspec
import pytest

from tests.support.master_bench import MasterBench, held, spec
from zmqcluster.core.effects import Log
from zmqcluster.core.events import MessageReceived, Principal
from zmqcluster.core.settings import Settings
from zmqcluster.core.state import PEER_EVENTS_A_SECOND
from zmqcluster.messages import (
    Abort,
    Assign,
    AttemptRef,
    CancelTasks,
    Capabilities,
    DrainDevice,
    Heartbeat,
    HeartbeatAck,
    Held,
    Hello,
    HelloAgain,
    Message,
    PoolOffer,
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
    TaskOrder,
    TaskResult,
    TypeOffer,
    Welcome,
)
from zmqcluster.model import DeviceId, Outcome, Pool, RefusalCode, Role, TaskState

LEASE_MS = Settings().device_timeout_ms
BEAT_MS = Settings().heartbeat_interval_ms
GRACE_MS = Settings().reconnect_grace_ms


@pytest.fixture
def master() -> MasterBench:
    return MasterBench()


def one(master: MasterBench, name: str) -> TaskOrder:
    [order] = master.orders(name)
    return order


def hello(device_id: str, boot: bytes = b"x" * 16, **fields: object) -> Hello:
    return Hello(
        version=1,
        device_id=device_id,
        boot_id=boot,
        name="",
        capabilities=Capabilities(),
        task_types=(TypeOffer("noop", Pool.SYNC),),
        pools=(PoolOffer(Pool.SYNC, 1),),
        labels=(),
        credit=8,
        **fields,  # type: ignore[arg-type]  # a test's literals
    )


def says(master: MasterBench, peer: str, key_of: str, message: Message) -> list[Message]:
    """A peer with the key of that device says something; what it is told."""
    master.peers[peer] = peer.encode()
    principal = Principal(Role.WORKER, DeviceId(key_of))
    master.turn(MessageReceived(peer.encode(), principal, message))  # type: ignore[arg-type]
    return list(master.takes(peer))


# --- who is let in ------------------------------------------------------------------------------


def test_a_hello_for_another_device_is_refused(master: MasterBench) -> None:
    [refused] = says(master, "peer", "d1", hello("d2"))

    assert isinstance(refused, Refused)
    assert refused.code is RefusalCode.FORBIDDEN
    assert "hello_refused" in master.event_kinds()
    assert not master.core.state.fleet.by_peer


def test_names_made_up_without_end_leave_no_rows_and_no_memory_without_end(
    master: MasterBench,
) -> None:
    for number in range(100):
        says(master, "peer", "d1", hello(f"made-up-{number}"))

    rows = [one for one in master.store.events if one.kind == "hello_refused"]
    assert len(rows) == PEER_EVENTS_A_SECOND
    assert {one.device_id for one in rows} == {"d1"}
    assert len(master.core.state._peer_events) == 1
    assert master.core.state.counters["hello_refused"] == 100


def test_a_hello_of_another_version_is_refused(master: MasterBench) -> None:
    strange = msgspec.structs.replace(hello("d1"), version=2)
    [refused] = says(master, "peer", "d1", strange)

    assert isinstance(refused, Refused)
    assert refused.code is RefusalCode.VERSION


@pytest.mark.parametrize(
    "message",
    [
        Heartbeat(1, 1, Resources(), 0, 8, 0),
        Started((AttemptRef(1, 1),)),
        Results((TaskResult(1, 1, Outcome.COMPLETED),)),
        Returned((AttemptRef(1, 1),)),
        Progress((ProgressNote(1, 1, 0.5),)),
    ],
)
def test_whoever_speaks_without_a_session_is_asked_for_a_hello(
    master: MasterBench, message: Message
) -> None:
    assert says(master, "peer", "d1", message) == [HelloAgain(1)]


def test_a_session_does_not_pass_to_another_key(master: MasterBench) -> None:
    master.device("d1")
    master.submit()
    order = one(master, "d1")
    peer = master.peers["d1"]

    stolen = Results((TaskResult(order.task_id, 1, Outcome.COMPLETED),))
    master.turn(MessageReceived(peer, Principal(Role.WORKER, DeviceId("d2")), stolen))

    assert [type(one) for one in master.takes("d1")] == [HelloAgain]
    assert master.state(order.task_id) is TaskState.ASSIGNED


def test_a_clone_is_refused_while_the_first_lives(master: MasterBench) -> None:
    master.device("d1")
    master.submit()
    order = one(master, "d1")

    [refused] = says(master, "clone", "d1", hello("d1"))

    assert isinstance(refused, Refused)
    assert refused.code is RefusalCode.DEVICE_LIVE
    # The first is spoken to, so that a dead connection shows itself.
    assert isinstance(master.takes("d1")[0], HeartbeatAck)
    master.ends("d1", order)
    assert master.state(order.task_id) is TaskState.COMPLETED


def test_a_clone_takes_over_from_a_silent_device_whose_words_count_no_more(
    master: MasterBench,
) -> None:
    master.device("d1")
    [task_id] = master.submit().task_ids
    order = one(master, "d1")
    master.advance(2 * BEAT_MS)

    [welcome, assign] = says(master, "clone", "d1", hello("d1"))

    assert isinstance(welcome, Welcome)
    assert master.store.assignments[task_id, 1].outcome == "device_lost"  # type: ignore[index]
    assert isinstance(assign, Assign)
    assert assign.orders[0].attempt == 2
    master.ends("d1", order)
    assert [type(one) for one in master.takes("d1")] == [HelloAgain]
    assert master.state(task_id) is TaskState.ASSIGNED


def test_a_restarted_device_is_let_in_once_its_connection_is_seen_closed(
    master: MasterBench,
) -> None:
    master.device("d1")
    [refused] = master.device("d1", reboot=True)
    assert isinstance(refused, Refused)
    master.peers["d1"] = b"d1#1"
    former = next(iter(master.core.state.fleet.by_peer))
    master.peers["former"] = former
    master.loses("former")

    [welcome] = master.device("d1")

    assert isinstance(welcome, Welcome)
    master.advance(2 * GRACE_MS)
    assert "device_lost" not in master.event_kinds()


def test_the_same_process_may_say_hello_again_and_keeps_what_it_lists(
    master: MasterBench,
) -> None:
    master.device("d1")
    [kept, dropped] = master.submit(spec(), spec(rate_key="other")).task_ids
    first = one(master, "d1")
    master.device("d1", slots=2, inventory=(held(first),))

    orders = master.orders("d1")

    assert master.task(kept).attempt == 1
    assert [order.task_id for order in orders] == [dropped]
    assert master.event_kinds().count("device_lost") == 0


def test_a_hello_may_offer_another_pool_than_before(master: MasterBench) -> None:
    master.device("d1", pool=Pool.SYNC)
    master.submit()
    assert len(master.orders("d1")) == 1
    master.loses("d1")

    master.device("d1", pool=Pool.ASYNC, reboot=True)

    assert [one.attempt for one in master.orders("d1")] == [2]


def test_an_assign_that_crossed_a_hello_is_handed_out_anew(master: MasterBench) -> None:
    master.device("d1")
    [task_id] = master.submit().task_ids
    assert one(master, "d1").attempt == 1

    master.device("d1")

    assert one(master, "d1").attempt == 2
    assert master.store.assignments[task_id, 1].outcome == "dispatch_lost"  # type: ignore[index]
    assert master.task(task_id).deaths == 0


def test_a_beat_of_the_session_before_tells_nothing_about_the_assigns_of_this_one(
    master: MasterBench,
) -> None:
    master.device("d1", slots=2)
    master.submit()
    known = one(master, "d1")
    # Said again because the Welcome is late; what is assigned from now on is behind it.
    master.hears("d1", msgspec.structs.replace(master.hellos["d1"], inventory=(held(known),)))
    master.submit()
    on_its_way = one(master, "d1")

    master.beat("d1", held(known), assign_seq=1)

    assert master.state(on_its_way.task_id) is TaskState.ASSIGNED
    assert master.task(on_its_way.task_id).attempt == 1


# --- how they go --------------------------------------------------------------------------------


def test_a_killed_workers_task_runs_elsewhere_within_two_seconds(master: MasterBench) -> None:
    master.device("d1")
    master.submit()
    master.starts("d1", one(master, "d1"))
    master.device("d2")
    killed_ms = master.now_ms

    master.loses("d1")
    while not master.orders("d2"):
        master.advance(100, step_ms=100)

    assert master.now_ms - killed_ms <= 2_000


def test_a_silent_hosts_task_runs_elsewhere_within_its_lease_and_two_seconds(
    master: MasterBench,
) -> None:
    master.device("d1")
    master.submit()
    master.starts("d1", one(master, "d1"))
    silent_ms = master.now_ms
    master.device("d2")

    while not master.orders("d2"):
        master.advance(500)
        master.beat("d2")

    assert LEASE_MS <= master.now_ms - silent_ms <= LEASE_MS + 2_000


def test_a_device_back_within_its_moment_of_grace_loses_nothing(master: MasterBench) -> None:
    master.device("d1")
    master.submit()
    order = one(master, "d1")
    master.starts("d1", order)
    master.loses("d1")
    master.advance(GRACE_MS - 1, step_ms=100)

    master.device("d1", inventory=(held(order),))
    master.advance(GRACE_MS * 4)

    assert master.orders("d1") == []
    assert "device_lost" not in master.event_kinds()


def test_whoever_is_about_to_be_lost_gets_nothing_new(master: MasterBench) -> None:
    master.device("d1", slots=4)
    master.loses("d1")

    master.submit()

    assert master.orders("d1") == []


# --- what a restart of the master changes -------------------------------------------------------


def test_a_spooled_result_counts_after_both_sides_restarted(master: MasterBench) -> None:
    master.device("d1")
    [task_id] = master.submit().task_ids
    order = one(master, "d1")
    master.restart()

    master.device("d1", reboot=True, inventory=(held(order, phase=2),))
    assert master.orders("d1") == []
    master.ends("d1", order, result=b"\x09")

    assert master.task(task_id).result == b"\x09"
    assert master.task(task_id).attempt == 1


def test_nobody_coming_back_costs_one_lease(master: MasterBench) -> None:
    master.device("d1")
    [task_id] = master.submit().task_ids
    master.starts("d1", one(master, "d1"))
    master.restart()

    master.advance(LEASE_MS + 500)

    assert master.state(task_id) is TaskState.PENDING
    assert master.task(task_id).deaths == 1


def test_a_drained_device_stays_drained_over_restarts_of_both(master: MasterBench) -> None:
    master.device("d1")
    master.changes(DrainDevice(b"r", "d1", on=True))
    master.restart()
    [welcome] = master.device("d1", reboot=True)
    master.submit()

    assert isinstance(welcome, Welcome)
    assert welcome.control.drain
    assert master.orders("d1") == []
    master.changes(DrainDevice(b"s", "d1", on=False))
    assert master.take("d1", HeartbeatAck).control.drain is False
    assert len(master.orders("d1")) == 1


def test_a_device_that_drains_itself_gets_nothing_new_until_it_stops(master: MasterBench) -> None:
    master.device("d1")
    beat = Heartbeat(1, 1, Resources(), 0, 8, 0, (), draining=True)
    master.hears("d1", beat)
    assert master.store.devices[DeviceId("d1")].state == "draining"

    master.submit()
    assert master.orders("d1") == []
    master.beat("d1")

    assert len(master.orders("d1")) == 1
    assert master.store.devices[DeviceId("d1")].state == "online"


# --- liars with a good key ----------------------------------------------------------------------


@pytest.mark.parametrize("attempt", [0, 2, 3, 2**31 - 1])
def test_only_the_current_attempt_counts(master: MasterBench, attempt: int) -> None:
    master.device("d1")
    master.device("d2", types=("other",))
    master.submit()
    order = one(master, "d1")

    master.hears("d1", Results((TaskResult(order.task_id, attempt, Outcome.COMPLETED),)))

    assert master.state(order.task_id) is TaskState.ASSIGNED
    assert "result_fenced" in master.event_kinds()
    assert master.take("d1", ResultAck).refs == (AttemptRef(order.task_id, attempt),)


def test_only_the_holder_counts(master: MasterBench) -> None:
    master.device("d1")
    master.device("d2", types=("other",))
    master.submit()
    order = one(master, "d1")
    ref = AttemptRef(order.task_id, order.attempt)

    master.ends("d2", order)
    master.hears("d2", Returned((ref,)))
    master.starts("d2", order)
    master.beat("d2", held(order))

    assert master.state(order.task_id) is TaskState.ASSIGNED
    assert master.take("d2", HeartbeatAck).abort == (ref,)
    assert master.task(order.task_id).device_id == "d1"


@pytest.mark.parametrize("outcome", [Outcome.DEVICE_LOST, Outcome.DISPATCH_LOST])
def test_outcomes_only_the_master_may_decide_are_failures(
    master: MasterBench, outcome: Outcome
) -> None:
    master.device("d1")
    [task_id] = master.submit(spec(max_retry_count=0)).task_ids

    master.ends("d1", one(master, "d1"), outcome)

    assert master.state(task_id) is TaskState.FAILED
    assert outcome in master.task(task_id).error


def test_tasks_that_never_were_change_nothing(master: MasterBench) -> None:
    master.device("d1")
    ghost = AttemptRef(999, 1)

    master.hears("d1", Results((TaskResult(999, 1, Outcome.COMPLETED, children=(spec(),)),)))
    master.hears("d1", Returned((ghost,)))
    master.hears("d1", Started((ghost,)))
    master.hears("d1", Progress((ProgressNote(999, 1, 0.5),)))
    master.beat("d1", Held(999, 1, 1), Held(999, 2, 2))

    assert master.store.tasks == {}
    assert master.take("d1", HeartbeatAck).abort == (ghost,)
    master.audit()


def test_a_device_cannot_claim_a_pending_task_it_never_had(master: MasterBench) -> None:
    [task_id] = master.submit().task_ids
    master.device("d1", types=("other",))

    master.beat("d1", Held(task_id, 0 + 1, 1))
    master.hears("d1", Results((TaskResult(task_id, 1, Outcome.COMPLETED),)))

    assert master.state(task_id) is TaskState.PENDING
    assert master.task(task_id).attempt == 0


def test_the_same_result_twice_in_a_frame_counts_once(master: MasterBench) -> None:
    master.device("d1")
    job = master.submit(spec(), spec(rate_key="x"), job="j")
    order = one(master, "d1")
    result = TaskResult(order.task_id, 1, Outcome.COMPLETED, children=(spec(),))

    master.hears("d1", Results((result, result)))

    assert len(master.store.tasks) == 3
    assert master.store.jobs[job.job_id].completed == 1  # type: ignore[index]


@pytest.mark.parametrize("credit", [0, 1, 3, 4096])
def test_never_more_in_hand_than_the_credit(master: MasterBench, credit: int) -> None:
    master.device("d1", slots=8, credit=credit)
    master.submit(*[spec() for _ in range(20)])

    assert len(master.orders("d1")) == min(credit, 8)


def test_credit_follows_the_beats(master: MasterBench) -> None:
    master.device("d1", slots=8, credit=0)
    master.submit(*[spec() for _ in range(20)])
    master.beat("d1", credit=2)
    orders = master.orders("d1")
    assert len(orders) == 2

    master.beat("d1", *[held(one) for one in orders], credit=1)
    master.ends("d1", orders[0])
    assert master.orders("d1") == []
    master.ends("d1", orders[1])

    assert len(master.orders("d1")) == 1


def test_slots_nobody_has_are_never_filled(master: MasterBench) -> None:
    master.device("d2")
    master.submit()
    master.ends("d2", one(master, "d2"), run_us=0)
    master.leaves("d2")

    master.device("d1", slots=0)
    master.submit(*[spec() for _ in range(3)])

    assert master.orders("d1") == []


def test_progress_is_kept_in_memory_for_the_holder_alone(master: MasterBench) -> None:
    master.device("d1")
    master.submit()
    order = one(master, "d1")
    before = len(master.store.events)

    master.hears("d1", Progress((ProgressNote(order.task_id, 1, 0.5, "half"),)))

    flight = master.core.state.flights[order.task_id]  # type: ignore[index]
    assert (flight.progress, flight.note) == (0.5, "half")
    assert len(master.store.events) == before


def test_a_cancelled_job_gets_no_attempt_back_from_a_returning_device(
    master: MasterBench,
) -> None:
    master.device("d1")
    answer = master.submit(job="j")
    order = one(master, "d1")
    master.starts("d1", order)
    master.loses("d1")
    master.advance(1_000)
    assert master.state(order.task_id) is TaskState.PENDING
    # The sweep is decided, and its pages are not read yet.
    master.commits = False
    master.hears("client", CancelTasks(b"c", job_id=answer.job_id))
    master.commits = True

    master.device("d1", inventory=(held(order),))
    master.ends("d1", order)

    assert master.state(order.task_id) is TaskState.CANCELLED


# --- doubts of the master about itself ----------------------------------------------------------


def fleet(master: MasterBench, count: int) -> None:
    for index in range(count):
        master.device(f"d{index}")
    master.submit(*[spec() for _ in range(count)])
    master.forget()


def beat_all(master: MasterBench, names: range, ms: int) -> None:
    for _ in range(0, ms, BEAT_MS // 2):
        master.advance(BEAT_MS // 2)
        for index in names:
            held_now = master.core.state.fleet.devices[DeviceId(f"d{index}")].flights.values()
            lines = [Held(one.task.task_id, one.task.attempt, 1) for one in held_now]
            master.beat(f"d{index}", *lines)
    master.forget()


def test_a_mass_loss_is_doubted_and_then_believed(master: MasterBench) -> None:
    fleet(master, 6)

    beat_all(master, range(2), LEASE_MS + BEAT_MS)
    assert master.event_kinds().count("mass_loss_brake") == 1
    assert "device_lost" not in master.event_kinds()
    beat_all(master, range(2), 5 * LEASE_MS)

    assert master.event_kinds().count("device_lost") == 4
    assert master.event_kinds().count("mass_loss_brake") == 1


def test_the_brake_is_let_go_once_most_are_back(master: MasterBench) -> None:
    fleet(master, 6)
    beat_all(master, range(2), LEASE_MS + BEAT_MS)
    assert "mass_loss_brake" in master.event_kinds()

    beat_all(master, range(5), 2 * BEAT_MS)

    assert "mass_loss_over" in master.event_kinds()
    lost = [one.device_id for one in master.store.events if one.kind == "device_lost"]
    assert lost == ["d5"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_small_fleets_are_not_braked(master: MasterBench, count: int) -> None:
    fleet(master, count)

    master.advance(LEASE_MS + 500)

    assert master.event_kinds().count("device_lost") == count
    master.forget()


def test_after_a_stall_every_lease_begins_anew_and_still_ends(master: MasterBench) -> None:
    master.device("d1")
    master.submit()
    master.orders("d1")
    master.jump(10 * LEASE_MS)
    assert "loop_stalled" in master.event_kinds()

    master.advance(LEASE_MS - 1_000)
    assert "device_lost" not in master.event_kinds()
    master.advance(2_000)

    assert "device_lost" in master.event_kinds()


def test_a_stall_takes_nothing_from_the_time_to_connect_again(master: MasterBench) -> None:
    master.device("d1")
    master.loses("d1")

    master.jump(10 * LEASE_MS)
    master.advance(GRACE_MS - 100)
    assert "loop_stalled" in master.event_kinds()
    assert "device_lost" not in master.event_kinds()
    master.advance(200)

    assert "device_lost" in master.event_kinds()


def test_an_abort_is_repeated_until_it_is_obeyed(master: MasterBench) -> None:
    master.device("d1")
    master.submit()
    order = one(master, "d1")
    ref = AttemptRef(order.task_id, order.attempt)
    master.changes(CancelTasks(b"c", (order.task_id,)))
    assert master.take("d1", Abort).refs == (ref,)

    for _ in range(2):
        master.beat("d1", held(order))
        assert master.take("d1", HeartbeatAck).abort == (ref,)
    master.ends("d1", order, Outcome.CANCELLED)
    master.takes("d1")
    master.beat("d1")

    assert master.take("d1", HeartbeatAck).abort == ()


def test_end_kept_by_a_device_that_comes_back_counts_and_is_not_run_again(
    master: MasterBench,
) -> None:
    master.device("d1")
    [task_id] = master.submit().task_ids
    [order] = master.orders("d1")
    master.loses("d1")
    master.advance(1_000)

    master.device("d1", inventory=(held(order, phase=2),))
    again = master.orders("d1")
    master.ends("d1", order, result=b"\x07")

    assert again == []
    assert master.task(task_id).result == b"\x07"
    assert "result_fenced" not in master.event_kinds()


@pytest.mark.parametrize("phase", [0, 1, 2])
def test_device_that_knows_more_than_a_restored_master_gets_nothing_until_it_has_let_go(
    master: MasterBench, phase: int
) -> None:
    [task_id] = master.submit().task_ids
    namesake, unborn = Held(task_id, 1, phase), Held(task_id + 5, 1, phase)

    master.device("d1", slots=2, inventory=(namesake, unborn))
    master.hears("d1", Results((TaskResult(task_id, 1, Outcome.COMPLETED, b"\x07"),)))
    master.beat("d1", unborn)
    before = master.orders("d1")
    master.beat("d1")

    assert before == []
    assert [(one.task_id, one.attempt) for one in master.orders("d1")] == [(task_id, 1)]
    assert master.task(task_id).result == b""
    assert master.event_kinds().count("device_astray") == 1
    assert master.event_kinds().count("result_fenced") == 1


def test_labels_nobody_asks_for_do_not_split_the_fleet(master: MasterBench) -> None:
    for number in range(30):
        master.device(f"d{number}", labels=(f"host=h{number}", "gpu" if number % 2 else "cpu"))
    master.submit(spec())
    assert list(master.core.state.fleet.sections) == [()]

    master.submit(spec(labels=("gpu",)))

    assert list(master.core.state.fleet.sections) == [(), ("gpu",)]
    assert [len(one.groups) for one in master.core.state.fleet.sections.values()] == [1, 1]
    assert sum(len(master.orders(f"d{number}")) for number in range(30)) == 2


# --- what a device causes in the event log ------------------------------------------------------


def test_a_device_that_claims_other_names_costs_a_bounded_number_of_rows(
    master: MasterBench,
) -> None:
    for number in range(200):
        says(master, "liar", "d1", hello(f"other-{number}"))

    refused = [one for one in master.store.events if one.kind == "hello_refused"]
    assert len(refused) == PEER_EVENTS_A_SECOND
    assert {one.device_id for one in refused} == {"d1"}


def test_a_device_that_comes_and_goes_costs_a_bounded_number_of_rows_and_lines(
    master: MasterBench,
) -> None:
    for _ in range(200):
        master.device("d1")
        master.leaves("d1")

    kinds = master.event_kinds()
    assert kinds.count("device_online") == kinds.count("device_offline") == PEER_EVENTS_A_SECOND
    lines = [one for one in master.actions if isinstance(one, Log)]
    assert len(lines) == 2 * PEER_EVENTS_A_SECOND


def test_rules_a_device_reports_cost_a_bounded_number_of_rows(master: MasterBench) -> None:
    master.device("d1")

    for number in range(200):
        rule = RateRule(f"https://{number}.example", closed_for_ms=60_000)
        master.hears("d1", RateReport((rule,)))

    assert master.event_kinds().count("rate_key_closed") == PEER_EVENTS_A_SECOND
    assert master.core.state.counters["rate_key_closed"] == 200


def test_children_nobody_can_run_cost_a_bounded_number_of_rows(master: MasterBench) -> None:
    master.device("d1")
    master.submit()
    order = one(master, "d1")
    children = tuple(spec("nobody", unique_key=str(number)) for number in range(200))

    master.ends("d1", order, children=children)

    assert master.event_kinds().count("child_unroutable") == PEER_EVENTS_A_SECOND
