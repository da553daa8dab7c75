"""A worker's tie to its master: greeting, heartbeats, the lease, and getting back after a loss."""

from __future__ import annotations

from enum import StrEnum
from random import Random
from typing import Final

from zmqcluster.core.worker_events import Reconnect, Say, WorkerEffect, WorkerSettings
from zmqcluster.messages import Control, HeartbeatAck, Refused, Welcome
from zmqcluster.model import RefusalCode

BACKOFF_MS_MIN: Final = 100
BACKOFF_MS_MAX: Final = 5_000
# A Hello that nobody answered is repeated after this long, and answered twice at worst.
HELLO_REPEAT_MS: Final = 2_000
# The master believes in a former life of ours (a host that lost power) until it has missed its
# beat; a refusal that outlasts two beats is about somebody who does beat.
LIVE_ELSEWHERE_BEATS: Final = 2
UNREACHABLE_AFTER_MS: Final = 2_000
UNREACHABLE_AGAIN_MS: Final = 30_000
_BEATS_REMEMBERED: Final = 16
# Each beat comes up to this part of the interval early, so that a fleet does not beat in step.
_BEAT_JITTER: Final = 0.1

_REGISTERED: Final = "Device registered successfully"
_FATAL: Final = {
    RefusalCode.VERSION: "the master speaks another version of the protocol",
    RefusalCode.FORBIDDEN: "the master does not accept this device",
}


class Link(StrEnum):
    """How far the worker has got with its master."""

    AWAY = "away"
    GREETING = "greeting"
    OPEN = "open"


class Trouble(StrEnum):
    """What keeps a session from being; each is said in its own words."""

    AWAY = "away"
    KEY = "key"
    HANDSHAKE = "handshake"
    EPOCH = "epoch"
    REFUSED = "refused"


class Session:
    """The state of the tie. What it decides to do is appended to the effects of the turn."""

    def __init__(self, settings: WorkerSettings, rng: Random) -> None:
        self.link = Link.AWAY
        self.epoch = 0
        self.assign_seq = 0
        self.control = Control()
        self.welcomes = 0
        # Why this worker cannot go on at all; empty while it can.
        self.fatal = ""
        self._master = settings.master
        self._device_id = settings.device_id
        self._refused_key_advice = settings.refused_key_advice
        self._interval_ms = settings.heartbeat_interval_ms
        self._timeout_ms = settings.device_timeout_ms
        self._rng = rng
        self._tries = 0
        self._lease_until_ms = 0
        self._greeting_since_ms = 0
        self._hello_sent_ms: int | None = None
        self._hello_due_ms: int | None = None
        self._reconnect_due_ms: int | None = None
        self._complain_due_ms: int | None = None
        self._complaints = 0
        self._trouble: tuple[Trouble, str, str] | None = None
        self._may_repeat_ms: dict[Trouble, int] = {}
        self._live_elsewhere_since_ms: int | None = None
        self._beat_due_ms = 0
        self._beat_seq = 0
        self._beats_sent_ms: dict[int, int] = {}

    @property
    def is_open(self) -> bool:
        return self.link is Link.OPEN

    @property
    def lease_until_ms(self) -> int:
        return self._lease_until_ms

    def holds_lease(self, now_ms: int) -> bool:
        """Is the master, as far as can be known here, still counting this device alive?"""
        return now_ms <= self._lease_until_ms

    # --- what happened ---------------------------------------------------------------------------

    def on_connected(self, now_ms: int) -> None:
        self._reconnect_due_ms = None
        self.greet(now_ms)

    def on_disconnected(self, now_ms: int, effects: list[WorkerEffect]) -> None:
        if self.link is Link.OPEN:
            text = f"Lost the connection to the master at {self._master}; running work goes on"
            effects.append(Say("warning", text))
            self._complain_due_ms = now_ms + UNREACHABLE_AFTER_MS
        self._live_elsewhere_since_ms = self._trouble = None
        self._leave()

    def on_key_refused(self, now_ms: int, effects: list[WorkerEffect]) -> None:
        text = f"{self._master}: {self._refused_key_advice}. Trying again until then"
        self._say(now_ms, (Trouble.KEY, "error", text), effects)
        self._reconnect_later(now_ms)

    def on_handshake_failed(self, now_ms: int) -> None:
        text = (
            f"Master not reachable at {self._master}: something answers, but the handshake fails; "
            "is it the master this worker joined? Trying again"
        )
        # Also what a master looks like that goes down just now: not said before it lasts.
        self._trouble = (Trouble.HANDSHAKE, "warning", text)
        self._reconnect_later(now_ms)

    def on_welcome(self, now_ms: int, welcome: Welcome, effects: list[WorkerEffect]) -> bool:
        """True: a session is open. False: nobody asked, or this master is from the past.

        A Hello said twice is answered twice, and the second session is the one that counts.
        """
        if self.link is Link.AWAY or self._hello_sent_ms is None:
            return False
        if welcome.epoch < self.epoch:
            text = (
                f"The master at {self._master} is in epoch {welcome.epoch}, but epoch {self.epoch} "
                "was seen: an old copy of it answers. Restart this worker if that is meant"
            )
            self._say(now_ms, (Trouble.EPOCH, "error", text), effects)
            self._reconnect_later(now_ms)
            return False
        if self.link is Link.GREETING:
            text = "Connected to the master again" if self.welcomes else _REGISTERED
            effects.append(Say("info", text))
        self.welcomes += 1
        self.link, self.epoch, self.assign_seq = Link.OPEN, welcome.epoch, 0
        self.control = welcome.control
        self._interval_ms = welcome.heartbeat_interval_ms
        self._timeout_ms = welcome.device_timeout_ms
        # The master counted this device alive no earlier than when it said Hello.
        self._lease_until_ms = self._hello_sent_ms + self._timeout_ms
        self._tries = self._complaints = 0
        self._hello_due_ms = self._complain_due_ms = self._live_elsewhere_since_ms = None
        self._trouble = None
        self._may_repeat_ms.clear()
        self._beats_sent_ms.clear()
        self._plan_beat(now_ms)
        return True

    def on_hello_again(self, now_ms: int, epoch: int) -> None:
        """The master does not know this session. In a greeting the Hello is on its way."""
        if self.link is Link.OPEN and epoch >= self.epoch:
            self.greet(now_ms)

    def on_beat_ack(self, now_ms: int, ack: HeartbeatAck) -> bool:
        """True: it is of this session, and its control and aborts count."""
        if self.link is not Link.OPEN or ack.epoch < self.epoch:
            return False
        if ack.epoch > self.epoch:
            self.greet(now_ms)
            return False
        # The echo is looked up, not believed: a wrong one must not lengthen the lease.
        sent_ms = self._beats_sent_ms.pop(ack.seq, None)
        if sent_ms is not None:
            self._lease_until_ms = max(self._lease_until_ms, sent_ms + self._timeout_ms)
        if ack.control.version >= self.control.version:
            self.control = ack.control
        return True

    def on_hint(self, now_ms: int, epoch: int, control_version: int) -> bool:
        """True: the hint is of this session, so its aborts count."""
        if self.link is not Link.OPEN or epoch < self.epoch:
            return False
        if epoch > self.epoch:
            self.greet(now_ms)
            return False
        if control_version > self.control.version:
            self._beat_due_ms = now_ms
        return True

    def on_refused(self, now_ms: int, refused: Refused, effects: list[WorkerEffect]) -> None:
        """The master said no to the Hello."""
        if self.link is Link.AWAY:
            return
        fatal = _FATAL.get(refused.code)
        if fatal is not None:
            self.fatal = f"{fatal}: {refused.problem}"
        elif refused.code is RefusalCode.DEVICE_LIVE:
            self._on_live_elsewhere(now_ms, effects)
        else:
            text = f"The master at {self._master} says: {refused.problem}; trying again"
            self._say(now_ms, (Trouble.REFUSED, "warning", text), effects)
            self.greet(now_ms, now_ms + self._next_backoff_ms())

    # --- what is due -----------------------------------------------------------------------------

    def on_turn(self, now_ms: int, effects: list[WorkerEffect]) -> None:
        """Notice silence; connect anew when it is time."""
        if self.link is Link.OPEN and now_ms > self._lease_until_ms:
            text = (
                f"No answer from the master at {self._master} for {self._timeout_ms / 1000:g} s; "
                "connecting again, running work goes on"
            )
            effects.append(Say("warning", text))
            self._complain_due_ms = now_ms + UNREACHABLE_AGAIN_MS
            self._reconnect_later(now_ms)
        elif self.link is Link.GREETING and now_ms > self._greeting_since_ms + self._timeout_ms:
            self._reconnect_later(now_ms)
        if self._reconnect_due_ms is not None and now_ms >= self._reconnect_due_ms:
            self._reconnect_due_ms = None
            effects.append(Reconnect())
        if self.link is not Link.OPEN:
            self._complain(now_ms, effects)

    def take_hello(self, now_ms: int) -> bool:
        """Is it time to say Hello? Saying it is up to the caller."""
        if self._hello_due_ms is None or now_ms < self._hello_due_ms:
            return False
        if self._hello_sent_ms is None:
            # Of a Hello that is repeated, the first may be the one that is answered.
            self._hello_sent_ms = now_ms
        self._hello_due_ms = now_ms + HELLO_REPEAT_MS
        return True

    def take_beat(self, now_ms: int, *, at_once: bool) -> int | None:
        """The number of the heartbeat to send now, or None."""
        if self.link is not Link.OPEN or not (at_once or now_ms >= self._beat_due_ms):
            return None
        self._beat_seq += 1
        self._beats_sent_ms[self._beat_seq] = now_ms
        self._beats_sent_ms.pop(self._beat_seq - _BEATS_REMEMBERED, None)
        self._plan_beat(now_ms)
        return self._beat_seq

    def due_ms(self) -> int | None:
        """When on_turn(), take_hello() or take_beat() will have something to do."""
        if self.link is Link.OPEN:
            return min(self._beat_due_ms, self._lease_until_ms + 1)
        dues = [self._hello_due_ms, self._reconnect_due_ms, self._complain_due_ms]
        if self.link is Link.GREETING:
            dues.append(self._greeting_since_ms + self._timeout_ms + 1)
        return min([due for due in dues if due is not None], default=None)

    # --- helpers ---------------------------------------------------------------------------------

    def greet(self, now_ms: int, hello_at_ms: int = 0) -> None:
        """Say Hello (again), at once or then: the session of before, if any, is over."""
        if self.link is not Link.GREETING:
            self._greeting_since_ms = now_ms
        self._leave()
        self.link = Link.GREETING
        self._hello_due_ms = max(now_ms, hello_at_ms)

    def _leave(self) -> None:
        self.link = Link.AWAY
        self._hello_sent_ms = self._hello_due_ms = None
        self._beats_sent_ms.clear()

    def _on_live_elsewhere(self, now_ms: int, effects: list[WorkerEffect]) -> None:
        """A former process of ours may linger at the master; a living one answers for itself."""
        if self._live_elsewhere_since_ms is None:
            self._live_elsewhere_since_ms = now_ms
            text = f"Device id {self._device_id} is live elsewhere, says the master; asking again"
            self._say(now_ms, (Trouble.REFUSED, "warning", text), effects)
        elif now_ms > self._live_elsewhere_since_ms + LIVE_ELSEWHERE_BEATS * self._interval_ms:
            text = (
                f"device id {self._device_id} is already live elsewhere: stop the other worker, "
                "or start this one with another --device-id"
            )
            self.fatal = text
            return
        self.greet(now_ms, now_ms + max(BACKOFF_MS_MIN, self._interval_ms // 4))

    def _reconnect_later(self, now_ms: int) -> None:
        self._leave()
        self._reconnect_due_ms = now_ms + self._next_backoff_ms()

    def _next_backoff_ms(self) -> int:
        """Doubling, with jitter so that a fleet does not come back in one wave."""
        longest = min(BACKOFF_MS_MAX, BACKOFF_MS_MIN << min(self._tries, 10))
        self._tries += 1
        return self._rng.randint(longest // 2, longest)

    def _plan_beat(self, now_ms: int) -> None:
        early = self._rng.random() * _BEAT_JITTER
        self._beat_due_ms = now_ms + max(1, int(self._interval_ms * (1 - early)))

    def _complain(self, now_ms: int, effects: list[WorkerEffect]) -> None:
        """Say that there is no session: soon, and then now and again, not at each try."""
        if self._complain_due_ms is None:
            self._complain_due_ms = now_ms + UNREACHABLE_AFTER_MS
        if now_ms < self._complain_due_ms:
            return
        self._complain_due_ms = now_ms + UNREACHABLE_AGAIN_MS
        text = f"Master not reachable at {self._master}; trying again until it answers"
        self._say(now_ms, self._trouble or (Trouble.AWAY, "warning", text), effects)
        self._complaints += 1
        if self._complaints > 1 and self.link is Link.AWAY and self._reconnect_due_ms is None:
            # The transport tries by itself, but holds on to an address that may have moved.
            effects.append(Reconnect())

    def _say(
        self, now_ms: int, trouble: tuple[Trouble, str, str], effects: list[WorkerEffect]
    ) -> None:
        """At most one line of a kind in a while, however often it goes wrong."""
        self._trouble = trouble
        kind, level, text = trouble
        if now_ms >= self._may_repeat_ms.get(kind, 0):
            self._may_repeat_ms[kind] = now_ms + UNREACHABLE_AGAIN_MS
            effects.append(Say(level, text))
