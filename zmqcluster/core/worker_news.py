"""What a worker has to tell besides results and heartbeats: starts, returns, progress, rates."""

from __future__ import annotations

from typing import Final

from zmqcluster.messages import (
    AttemptRef,
    Progress,
    ProgressNote,
    RateReport,
    RateRule,
    Returned,
    Started,
    WorkerMessage,
)
from zmqcluster.model import RESULTS_PER_FRAME_MAX

# Progress is for eyes; these see four changes a second.
PROGRESS_MS: Final = 250
RATES_PER_FRAME_MAX: Final = 256
# Rules wait here while the master is away; of more keys than this the oldest word is lost.
RATE_KEYS_MAX: Final = 4_096


class News:
    """Collects in any state; take() empties it into messages once there is a session."""

    def __init__(self) -> None:
        self.rules_lost = 0
        self._returned: list[tuple[str, list[AttemptRef]]] = []
        self._notes: dict[int, ProgressNote] = {}
        self._notes_due_ms = 0
        self._rules: dict[str, tuple[int, RateRule]] = {}

    def give_back(self, refs: list[AttemptRef], reason: str) -> None:
        self._returned.append((reason, refs))

    def drop_returned(self) -> None:
        """Without a session: that these are not held any more shows in the next inventory."""
        self._returned.clear()

    def note(self, note: ProgressNote) -> None:
        """Only the newest note of a task counts."""
        self._notes[note.task_id] = note

    def forget(self, task_id: int) -> None:
        """The task ended: its progress is of no interest any more."""
        if self._notes:
            self._notes.pop(task_id, None)

    def rule(self, now_ms: int, rule: RateRule) -> None:
        """The newest word on each part of a rule counts."""
        known = self._rules.pop(rule.rate_key, None)
        if known is not None:
            rule = _merged(_aged(now_ms, *known), rule)
        elif len(self._rules) >= RATE_KEYS_MAX:
            self.rules_lost += 1
            del self._rules[next(iter(self._rules))]
        self._rules[rule.rate_key] = (now_ms, rule)

    def take(self, now_ms: int, begun: list[AttemptRef]) -> list[WorkerMessage]:
        """All there is to tell now. begun: runs that began.

        Rules first: a start counts by the delay that is known when it is told.
        """
        messages: list[WorkerMessage] = []
        if self._rules:
            rules = [_aged(now_ms, at_ms, rule) for at_ms, rule in self._rules.values()]
            self._rules.clear()
            for first in range(0, len(rules), RATES_PER_FRAME_MAX):
                messages.append(RateReport(tuple(rules[first : first + RATES_PER_FRAME_MAX])))
        if begun:
            messages.append(Started(tuple(begun)))
        for reason, refs in self._returned:
            messages.append(Returned(tuple(refs), reason))
        self._returned.clear()
        if self._notes and now_ms >= self._notes_due_ms:
            notes = list(self._notes.values())
            self._notes.clear()
            self._notes_due_ms = now_ms + PROGRESS_MS
            for first in range(0, len(notes), RESULTS_PER_FRAME_MAX):
                messages.append(Progress(tuple(notes[first : first + RESULTS_PER_FRAME_MAX])))
        return messages

    def due_ms(self) -> int | None:
        """When the notes that are here may be told; everything else is told in its own turn."""
        return self._notes_due_ms if self._notes else None


def _aged(now_ms: int, at_ms: int, rule: RateRule) -> RateRule:
    """The rule as it reads now: a closure is shorter by the time it waited here."""
    if not rule.closed_for_ms or now_ms == at_ms:
        return rule
    closed_for_ms = max(0, rule.closed_for_ms - (now_ms - at_ms))
    return RateRule(rule.rate_key, rule.delay_ms, rule.concurrency, closed_for_ms)


def _merged(old: RateRule, new: RateRule) -> RateRule:
    closures = [one.closed_for_ms for one in (old, new) if one.closed_for_ms is not None]
    return RateRule(
        new.rate_key,
        old.delay_ms if new.delay_ms is None else new.delay_ms,
        old.concurrency if new.concurrency is None else new.concurrency,
        max(closures, default=None),
    )
