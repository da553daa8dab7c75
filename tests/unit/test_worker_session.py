"""How a worker greets its master, keeps its lease, and gets back after a loss."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.support.worker_bench import (
    BEAT_MS,
    TIMEOUT_MS,
    WorkerBench,
    done,
    order,
    ref,
)
from zmqcluster.core.worker_events import (
    Connected,
    Disconnected,
    HandshakeFailed,
    KeyRefused,
    Reconnect,
)
from zmqcluster.core.worker_session import (
    BACKOFF_MS_MAX,
    BACKOFF_MS_MIN,
    HELLO_REPEAT_MS,
    LIVE_ELSEWHERE_BEATS,
    UNREACHABLE_AFTER_MS,
    UNREACHABLE_AGAIN_MS,
)
from zmqcluster.messages import (
    Control,
    Heartbeat,
    Held,
    Hello,
    HelloAgain,
    Hint,
    Refused,
    ResultAck,
)
from zmqcluster.model import RefusalCode


@pytest.fixture
def worker() -> WorkerBench:
    return WorkerBench().opened()


def refused(code: RefusalCode, problem: str = "because") -> Refused:
    return Refused(b"", code, problem)


# --- greeting ------------------------------------------------------------------------------------


def test_connection_is_greeted_at_once_and_the_welcome_is_said_once() -> None:
    worker = WorkerBench()

    worker.feed(Connected())
    (hello,) = worker.take_sent(Hello)
    worker.hears(worker.welcome())

    assert (hello.device_id, hello.boot_id, hello.name) == ("d1", b"b" * 16, "first")
    assert worker.take_lines() == ["Device registered successfully"]
    assert worker.is_registered()
    worker.feed(Disconnected(), Connected())
    worker.hears(worker.welcome())
    assert worker.take_lines()[-1] == "Connected to the master again"


def test_hello_is_repeated_until_somebody_answers_then_the_connection_is_given_up() -> None:
    worker = WorkerBench()
    worker.feed(Connected())
    worker.advance(2 * HELLO_REPEAT_MS)
    assert len(worker.take_sent(Hello)) == 3

    worker.advance(TIMEOUT_MS)

    assert len(worker.take(Reconnect)) == 1


def test_master_that_restarted_gets_a_hello_with_what_runs_and_nothing_is_killed(
    worker: WorkerBench,
) -> None:
    worker.assign(order(1))
    worker.take_runs()
    worker.epoch = 2
    worker.hears(HelloAgain(epoch=2))
    worker.hears(HelloAgain(epoch=2))

    (hello,) = worker.take_sent(Hello)
    assert hello.inventory == (Held(1, 1, 1),)
    worker.hears(worker.welcome())
    assert worker.take_kills() == []
    assert worker.take_runs() == []
    worker.reports(done(1))
    assert worker.core.kept == 1


@pytest.mark.parametrize("epoch", [1, 2])
def test_newer_epoch_in_a_hint_or_a_heartbeat_reply_is_greeted(
    worker: WorkerBench, epoch: int
) -> None:
    worker.hears(Hint(epoch=epoch))
    assert len(worker.take_sent(Hello)) == epoch - 1
    worker.opened()
    worker.advance(BEAT_MS)

    worker.ack_beats(epoch=epoch)

    assert len(worker.take_sent(Hello)) == epoch - 1


def test_master_of_the_past_is_not_obeyed() -> None:
    worker = WorkerBench()
    worker.epoch = 7
    worker.opened()
    worker.epoch = 6

    worker.feed(Disconnected(), Connected())
    worker.hears(worker.welcome())

    assert not worker.is_registered()
    assert "epoch 6" in worker.take_lines()[-1]
    worker.advance(BACKOFF_MS_MAX)
    assert len(worker.take(Reconnect)) == 1


def test_welcome_nobody_asked_for_is_ignored() -> None:
    worker = WorkerBench()

    worker.hears(worker.welcome())

    assert not worker.is_registered()


def test_hello_answered_twice_leaves_the_second_session_in_force(worker: WorkerBench) -> None:
    worker.assign(order(1))
    worker.hears(worker.welcome(session=2))
    worker.assign_seq = 0

    worker.assign(order(2))

    assert worker.take_runs() == [(1, 1), (2, 1)]


# --- refusals ------------------------------------------------------------------------------------


def test_device_live_elsewhere_is_believed_only_when_it_lasts() -> None:
    worker = WorkerBench()
    worker.feed(Connected())
    worker.hears(refused(RefusalCode.DEVICE_LIVE))
    [said] = worker.take_lines()
    assert "live elsewhere" in said
    while worker.now_ms <= 1_000_000 + LIVE_ELSEWHERE_BEATS * BEAT_MS:
        assert worker.take_stops() == []
        assert worker.take_lines() == [], "it has been said, and nothing else is the matter"
        worker.advance(BEAT_MS // 4)
        assert len(worker.take_sent(Hello)) >= 1
        worker.hears(refused(RefusalCode.DEVICE_LIVE))

    ((code, text),) = worker.take_stops()
    assert code == 1
    assert "d1 is already live elsewhere" in text


def test_device_live_elsewhere_is_forgotten_when_the_other_has_gone() -> None:
    worker = WorkerBench()
    worker.feed(Connected())
    worker.hears(refused(RefusalCode.DEVICE_LIVE))
    worker.advance(BEAT_MS // 4)
    worker.hears(worker.welcome())
    worker.advance(BEAT_MS * 2)
    worker.feed(Connected())

    worker.hears(refused(RefusalCode.DEVICE_LIVE))

    assert worker.take_stops() == []


@pytest.mark.parametrize("code", [RefusalCode.VERSION, RefusalCode.FORBIDDEN])
def test_refusal_that_cannot_change_ends_the_process(code: RefusalCode) -> None:
    worker = WorkerBench()
    worker.feed(Connected())

    worker.hears(refused(code, "speak version 2"))

    ((exit_code, text),) = worker.take_stops()
    assert exit_code == 1
    assert text.endswith("speak version 2")


def test_busy_master_is_asked_again_with_longer_and_longer_pauses() -> None:
    worker = WorkerBench()
    worker.feed(Connected())
    pauses = []
    for _ in range(8):
        worker.take_sent(Hello)
        worker.hears(refused(RefusalCode.STOPPING))
        before_ms = worker.now_ms
        while not worker.take_sent(Hello):
            worker.advance(10)
        pauses.append(worker.now_ms - before_ms)

    assert pauses[0] <= BACKOFF_MS_MIN + 10
    assert pauses[-1] > 10 * pauses[0]
    assert max(pauses) <= BACKOFF_MS_MAX + 10
    assert len([line for line in worker.take_lines() if "because" in line]) == 1


def test_refused_key_is_said_in_plain_words_now_and_again_and_tried_again() -> None:
    worker = WorkerBench()
    for _ in range(20):
        worker.feed(KeyRefused(), Disconnected())
        worker.advance(BACKOFF_MS_MAX)
        assert len(worker.take(Reconnect)) >= 1

    lines = [line for line in worker.take_lines() if "does not accept this worker's key" in line]
    assert len(lines) == 20 * BACKOFF_MS_MAX // UNREACHABLE_AGAIN_MS + 1


# --- the lease -----------------------------------------------------------------------------------


def test_answered_heartbeats_keep_the_session(worker: WorkerBench) -> None:
    worker.advance_with_acks(10 * TIMEOUT_MS)

    assert worker.take(Reconnect) == []
    assert worker.is_registered()


def test_silent_master_is_left_after_device_timeout(worker: WorkerBench) -> None:
    worker.advance(TIMEOUT_MS)
    assert worker.is_registered()

    worker.advance(1 + BACKOFF_MS_MIN)

    assert not worker.is_registered()
    assert len(worker.take(Reconnect)) == 1
    assert "No answer from the master at localhost:7989 for 15 s" in worker.take_lines()[-1]


def test_other_messages_do_not_stand_in_for_heartbeat_replies(worker: WorkerBench) -> None:
    for _ in range(16):
        worker.hears(ResultAck((ref(1),)))
        worker.advance(1_000)

    assert not worker.is_registered()


def test_lease_counts_from_what_was_sent_not_from_what_the_reply_claims(
    worker: WorkerBench,
) -> None:
    worker.advance(BEAT_MS)
    (beat,) = worker.take_sent(Heartbeat)
    worker.hears(worker.beat_ack(beat.seq, beat.sent_ms + 1_000_000))
    worker.hears(worker.beat_ack(beat.seq + 1, worker.now_ms))

    worker.advance(TIMEOUT_MS + 1)

    assert not worker.is_registered()


def test_heartbeats_are_never_late_and_do_not_march_in_step(worker: WorkerBench) -> None:
    times = []
    for _ in range(20):
        worker.advance(1)
        while not (beats := worker.take_sent(Heartbeat)):
            worker.advance(10)
        worker.hears(worker.beat_ack(beats[0].seq, beats[0].sent_ms))
        times.append(beats[0].sent_ms)

    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert max(gaps) <= BEAT_MS
    assert min(gaps) >= BEAT_MS * 9 // 10
    assert len(set(gaps)) > 5


def test_hint_of_newer_control_is_followed_by_a_heartbeat_at_once(worker: WorkerBench) -> None:
    worker.hears(Hint(epoch=1, control_version=3))
    assert len(worker.take_sent(Heartbeat)) == 1

    worker.hears(Hint(epoch=1, control_version=0))

    assert worker.take_sent(Heartbeat) == []


def test_control_of_the_welcome_counts_whatever_was_before(worker: WorkerBench) -> None:
    worker.connect(control=Control(version=9, drain=True))
    assert worker.core.is_draining

    worker.connect(control=Control(version=1))

    assert not worker.core.is_draining


# --- nobody there --------------------------------------------------------------------------------


def test_missing_master_is_said_once_in_a_while_and_not_at_each_try() -> None:
    worker = WorkerBench()
    worker.feed()
    worker.advance(UNREACHABLE_AFTER_MS)
    for _ in range(100):
        worker.feed(Disconnected())
        worker.advance(UNREACHABLE_AGAIN_MS // 100)

    lines = worker.take_lines()
    assert len(lines) == 2
    assert set(lines) == {"Master not reachable at localhost:7989; trying again until it answers"}


def test_broken_handshake_is_hinted_at() -> None:
    worker = WorkerBench()
    worker.feed(HandshakeFailed())

    worker.advance(UNREACHABLE_AFTER_MS + 1)

    assert "is it the master this worker joined?" in worker.take_lines()[-1]
    assert len(worker.take(Reconnect)) == 1


def test_short_loss_of_the_connection_is_said_in_two_lines(worker: WorkerBench) -> None:
    worker.feed(Disconnected())
    worker.advance(500)
    worker.connect()

    assert worker.take_lines() == [
        "Lost the connection to the master at localhost:7989; running work goes on",
        "Connected to the master again",
    ]
