"""A device with a good key and bad manners: whatever it says, it cannot end the master's loop."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.support.core_audit import audit_store
from tests.support.master_bench import MasterBench, spec
from zmqcluster import codec
from zmqcluster.core.settings import Settings
from zmqcluster.errors import RemoteProtocolError
from zmqcluster.messages import (
    AttemptRef,
    CancelTasks,
    Capabilities,
    Goodbye,
    Heartbeat,
    Held,
    Hello,
    Inbound,
    PoolOffer,
    Progress,
    ProgressNote,
    RateReport,
    RateRule,
    Record,
    Resources,
    Results,
    Returned,
    Started,
    TaskResult,
    TypeOffer,
)
from zmqcluster.model import PROTOCOL_VERSION, Outcome, Pool, Role, TaskState

SETTINGS = Settings(window_tasks=8, lane_tasks=4, lanes=4, delayed_tasks=4, max_retry_count=1)
STEPS_MAX = 25
# Few enough that what it names is often there, some that never can be.
TASKS = st.sampled_from([1, 2, 3, 4, 5, 6, 2**62])
ATTEMPTS = st.sampled_from([1, 1, 1, 2, 2, 3, 2**31 - 1])
TEXT = st.sampled_from(["", "x", "k1", "k2"])
REFS = st.lists(st.builds(AttemptRef, TASKS, ATTEMPTS), max_size=4).map(tuple)
INVENTORIES = st.lists(
    st.builds(Held, TASKS, ATTEMPTS, st.sampled_from([0, 1, 2])), max_size=6
).map(tuple)
RULES = st.lists(
    st.builds(
        RateRule,
        st.sampled_from(["k1", "k2"]),
        st.sampled_from([None, 0, 500]),
        st.sampled_from([None, 0, 1, 2]),
        st.sampled_from([None, 0, 500]),
    ),
    max_size=2,
).map(tuple)
CHILDREN = st.lists(
    st.builds(
        spec,
        st.sampled_from(["noop", "unheard_of"]),
        unique_key=TEXT,
        rate_key=TEXT,
        priority=st.sampled_from([0, 9]),
        not_before_ms=st.sampled_from([0, 1, 2**52]),
    ),
    max_size=3,
).map(tuple)
RECORDS = st.lists(st.builds(Record, st.just("pages"), TEXT, st.just(b"\x80")), max_size=2)
RESULTS = st.builds(
    TaskResult,
    TASKS,
    ATTEMPTS,
    st.sampled_from(list(Outcome)),
    error=TEXT,
    retry_after_ms=st.sampled_from([0, 500]),
    children=CHILDREN,
    records=RECORDS.map(tuple),
    rates=RULES,
)
CREDITS = st.sampled_from([0, 1, 1024])
MESSAGES: st.SearchStrategy[Inbound] = st.one_of(
    st.builds(
        Hello,
        st.sampled_from([PROTOCOL_VERSION, PROTOCOL_VERSION, 99]),
        st.sampled_from(["bad", "bad", "good"]),
        st.sampled_from([b"a" * 16, b"b" * 16]),
        TEXT,
        st.just(Capabilities()),
        st.lists(
            st.builds(TypeOffer, st.sampled_from(["noop", "odd"]), st.sampled_from(list(Pool))),
            max_size=3,
        ).map(tuple),
        st.lists(
            st.builds(PoolOffer, st.sampled_from(list(Pool)), st.sampled_from([0, 1, 3])),
            max_size=2,
        ).map(tuple),
        st.sampled_from([(), ("x",), ("x", "x")]),
        CREDITS,
        INVENTORIES,
        st.booleans(),
    ),
    st.builds(
        Heartbeat,
        st.sampled_from([0, 1, 2**31]),
        st.sampled_from([0, 5]),
        st.just(Resources()),
        st.sampled_from([0, 7]),
        CREDITS,
        st.sampled_from([0, 1, 2**31]),
        INVENTORIES,
        st.booleans(),
    ),
    st.builds(Started, REFS),
    st.builds(Results, st.lists(RESULTS, max_size=3).map(tuple)),
    st.builds(Returned, REFS, TEXT),
    st.builds(
        Progress, st.lists(st.builds(ProgressNote, TASKS, ATTEMPTS, st.just(0.5)), max_size=2)
    ),
    st.builds(RateReport, RULES),
    st.builds(Goodbye, TEXT),
)
ELSE = st.sampled_from(["submit", "cancel", "wait", "lose", "restart"])


def say(master: MasterBench, message: Inbound) -> None:
    """As the master would hear it: what the codec refuses never gets here."""
    try:
        message = codec.decode_inbound(Role.WORKER, codec.encode(message))
    except RemoteProtocolError:
        return
    master.hears("bad", message)


def happen(master: MasterBench, what: str) -> None:
    match what:
        case "submit":
            specs = [spec(unique_key=key, rate_key=key) for key in ("", "", "k1", "k2")]
            master.submit(*specs)
        case "cancel":
            master.changes(CancelTasks(b"c", (1, 3)))
        case "wait":
            master.advance(1_000)
        case "lose":
            master.loses("bad")
            master.device("bad", slots=2)
        case "restart":
            master.restart(downtime_ms=100)
            master.device("bad", slots=2)
    master.forget()


@given(st.lists(ELSE | MESSAGES | MESSAGES, max_size=STEPS_MAX))
def test_a_device_that_says_anything_harms_only_what_it_holds(steps: list[str | Inbound]) -> None:
    master = MasterBench(SETTINGS)
    master.device("bad", slots=2)
    happen(master, "submit")

    for step in steps:
        if isinstance(step, str):
            happen(master, step)
        else:
            say(master, step)
        master.forget()

    audit_store(master.store)
    master.loses("bad")
    master.advance(1_000)
    master.device("good", slots=1)
    [task_id] = master.submit(spec(priority=9)).task_ids
    work(master)
    assert master.state(task_id) is TaskState.COMPLETED


def work(master: MasterBench) -> None:
    """The good device does what it is given, until nothing more comes for a while."""
    for _ in range(40):
        for order in master.orders("good"):
            master.ends("good", order)
        master.advance(1_000)
        master.beat("good")
