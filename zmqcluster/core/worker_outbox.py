"""Results a worker keeps until the master has them on disk: sent, repeated, spooled."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec
from msgspec import Struct

from zmqcluster.messages import AttemptRef, Results, TaskResult, TaskSpec
from zmqcluster.model import FRAME_BYTES_MAX, RESULTS_PER_FRAME_MAX, Outcome

Key = tuple[int, int]

# An acknowledgement takes a commit and a round trip, some ms; when nothing was acknowledged for
# so long, or something that left later was, ask again. While others still come, a slow line is at
# work on it: what is repeated then only makes the queue before the line longer.
RESEND_MS: Final = 3_000
# Small results go together up to this. A frame is heard of when all of it has arrived, and that
# must be within device_timeout: on a line of 64 kbit/s, 4 MiB at once took ten minutes, and both
# sides gave the other up and began again, for ever.
BATCH_BYTES: Final = 16 * 1024
# Most results are acknowledged long before, and never touch this machine's disk.
SPOOL_AFTER_MS: Final = 200
# Sent and unacknowledged at once: a master that was away is not hit with the whole spool in one go.
# A session begins with little, and more follows as fast as acknowledgements are prompt: beats wait
# behind what is in flight, and on a slow line they must not wait for device_timeout.
IN_FLIGHT_BYTES_MIN: Final = 4 * BATCH_BYTES
IN_FLIGHT_BYTES_MAX: Final = 4 * FRAME_BYTES_MAX
PROMPT_MS: Final = 1_000
_MESSAGE_BYTES_MAX: Final = FRAME_BYTES_MAX - 1024
# Tags, ids and lengths of one result or one part of it, at their longest (rounded up).
_FRAMING_BYTES: Final = 96


class Kept(Struct, gc=False, eq=False):
    """One unacknowledged result. sent_ms: when it last left in this session."""

    key: Key
    result: TaskResult
    bytes_max: int
    since_ms: int
    sent_ms: int = 0
    is_spooled: bool = False
    is_acked: bool = False


class Outbox:
    """Every result that ended here and is not acknowledged; nothing is dropped from it."""

    def __init__(self) -> None:
        self.bytes_kept = 0
        self._kept: dict[Key, Kept] = {}
        # Three views of it, each in order of time; what was acknowledged since is skipped.
        self._waiting: deque[Kept] = deque()
        self._sent: deque[Kept] = deque()
        self._unspooled: deque[Kept] = deque()
        self._in_flight_bytes = 0
        self._window_bytes = IN_FLIGHT_BYTES_MIN
        # When something was last acknowledged, and when the newest of what was had been sent.
        self._moved_ms = 0
        self._overtaken_ms = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def __iter__(self) -> Iterator[Key]:
        return iter(self._kept)

    def restore(self, now_ms: int, results: Iterable[TaskResult]) -> None:
        """Take over what a former process had spooled; of equal keys the first counts."""
        for result in results:
            if (result.task_id, result.attempt) not in self._kept:
                self.keep(now_ms, result)
        while self._unspooled:
            self._unspooled.popleft().is_spooled = True

    def keep(self, now_ms: int, result: TaskResult) -> None:
        """From now on this result is safe from everything but the loss of this machine."""
        bytes_max = packed_bytes_max(result)
        if bytes_max > _MESSAGE_BYTES_MAX:
            # The bound is generous; what comes near the limit is worth an exact look.
            bytes_max = len(msgspec.msgpack.encode(result))
        if bytes_max > _MESSAGE_BYTES_MAX:
            result = _refusal_of(result, bytes_max)
            bytes_max = packed_bytes_max(result)
        key = (result.task_id, result.attempt)
        assert key not in self._kept, "an attempt ends once"
        kept = self._kept[key] = Kept(key, result, bytes_max, now_ms)
        self.bytes_kept += bytes_max
        self._waiting.append(kept)
        self._unspooled.append(kept)

    def ack(self, now_ms: int, refs: Iterable[AttemptRef]) -> list[AttemptRef]:
        """Forget these; returns those of them that were spooled. Unknown ones do not matter."""
        spooled = []
        self._moved_ms = now_ms
        for ref in refs:
            kept = self._kept.pop((ref.task_id, ref.attempt), None)
            if kept is None:
                continue
            kept.is_acked = True
            self.bytes_kept -= kept.bytes_max
            if kept.sent_ms:
                self._in_flight_bytes -= kept.bytes_max
                self._overtaken_ms = max(self._overtaken_ms, kept.sent_ms)
                if now_ms - kept.sent_ms <= PROMPT_MS:
                    self._window_bytes += kept.bytes_max
            if kept.is_spooled:
                spooled.append(ref)
        self._window_bytes = min(self._window_bytes, IN_FLIGHT_BYTES_MAX)
        return spooled

    def rewind(self) -> None:
        """A new session: nothing that was sent before counts as sent."""
        self._sent.clear()
        self._waiting = deque(self._kept.values())
        self._in_flight_bytes = self._moved_ms = self._overtaken_ms = 0
        self._window_bytes = IN_FLIGHT_BYTES_MIN
        for kept in self._waiting:
            kept.sent_ms = 0

    def take_messages(self, now_ms: int) -> Iterator[Results]:
        """What is to be sent now: new results, and those that were sent too long ago."""
        self._repeat_overdue(now_ms)
        while self._waiting and self._in_flight_bytes < self._window_bytes:
            batch = self._take_batch(now_ms)
            if batch:
                yield Results(tuple(batch))

    def take_unspooled(self, now_ms: int, *, at_once: bool) -> list[TaskResult]:
        """What has waited long enough to be worth a write; at_once: all that is not spooled."""
        taken = []
        queue = self._unspooled
        while queue and (
            queue[0].is_acked or at_once or queue[0].since_ms + SPOOL_AFTER_MS <= now_ms
        ):
            kept = queue.popleft()
            if not kept.is_acked:
                kept.is_spooled = True
                taken.append(kept.result)
        return taken

    def spool_due_ms(self) -> int | None:
        """When take_unspooled() will have something, as far as known."""
        return self._unspooled[0].since_ms + SPOOL_AFTER_MS if self._unspooled else None

    def resend_due_ms(self) -> int | None:
        """When take_messages() will repeat something, as far as known."""
        return self._due_ms(self._sent[0]) if self._sent else None

    def _due_ms(self, kept: Kept) -> int:
        """When to send it again. Never earlier for one that was sent later."""
        is_overtaken = kept.sent_ms < self._overtaken_ms
        return RESEND_MS + (kept.sent_ms if is_overtaken else max(kept.sent_ms, self._moved_ms))

    def _repeat_overdue(self, now_ms: int) -> None:
        queue = self._sent
        while queue and (queue[0].is_acked or self._due_ms(queue[0]) <= now_ms):
            kept = queue.popleft()
            if not kept.is_acked:
                self._in_flight_bytes -= kept.bytes_max
                self._window_bytes = IN_FLIGHT_BYTES_MIN
                kept.sent_ms = 0
                self._waiting.append(kept)

    def _take_batch(self, now_ms: int) -> list[TaskResult]:
        """Results for one frame: few enough, small enough. Empty: all were acknowledged."""
        batch: list[TaskResult] = []
        waiting, sent, size = self._waiting, self._sent, 0
        while waiting and len(batch) < RESULTS_PER_FRAME_MAX:
            kept = waiting[0]
            if not kept.is_acked:
                size += kept.bytes_max
                if size > BATCH_BYTES and batch:
                    break
                self._in_flight_bytes += kept.bytes_max
                kept.sent_ms = now_ms
                sent.append(kept)
                batch.append(kept.result)
            waiting.popleft()
        return batch


def packed_bytes_max(result: TaskResult) -> int:
    """An upper bound of the result's size on the wire, without packing it."""
    size = _FRAMING_BYTES + len(result.result) + _text_bytes_max(result.error)
    if result.children:
        size += sum(map(_child_bytes_max, result.children))
    for record in result.records:
        size += 32 + len(record.table) + _text_bytes_max(record.key) + len(record.body)
    for rule in result.rates:
        size += 32 + _text_bytes_max(rule.rate_key)
    return size


def _child_bytes_max(child: TaskSpec) -> int:
    size = _FRAMING_BYTES + len(child.data) + len(child.task_type)
    size += _text_bytes_max(child.unique_key) + _text_bytes_max(child.rate_key)
    return size + sum(len(label) + 2 for label in child.labels)


def _text_bytes_max(text: str) -> int:
    return len(text) if text.isascii() else 4 * len(text)


def _refusal_of(result: TaskResult, bytes_max: int) -> TaskResult:
    error = (
        f"result, children and records together take {bytes_max} bytes, "
        f"at most {_MESSAGE_BYTES_MAX}"
    )
    return msgspec.structs.replace(
        result, outcome=Outcome.FAILED, result=b"", error=error, children=(), records=(), rates=()
    )
