"""What a running task may do besides returning a value.

A TaskContext collects children, records and rate rules in memory; they leave with the result of
the attempt and are accepted together with it or not at all. A task that fails leaves none behind
but its rate rules.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from datetime import datetime
from typing import Any, Final

from msgspec import Struct

from executors.limits import (
    checked_labels,
    checked_name,
    checked_range,
    checked_text,
    milliseconds,
)
from executors.packing import pack_map
from zmqcluster.errors import RequestRefused, TaskRejected
from zmqcluster.messages import ProgressNote, RateRule, Record, TaskSpec
from zmqcluster.model import (
    CHILDREN_MAX,
    CONCURRENCY_MAX,
    DELAY_MS_MAX,
    FRAME_BYTES_MAX,
    NAME_CHARS_MAX,
    PRIORITY_DEFAULT,
    PRIORITY_MAX,
    RATE_KEY_CHARS_MAX,
    RECORDS_BYTES_MAX,
    RESULT_BYTES_MAX,
    RETRIES_MAX,
    TASK_DATA_BYTES_MAX,
    TASK_TYPE_PATTERN,
    TIMEOUT_MS_MAX,
    UNIQUE_KEY_CHARS_MAX,
    WALL_MS_MAX,
    RefusalCode,
)

# Result, children and records of one attempt travel in one frame; this is what the last two share.
OUTPUT_BYTES_MAX: Final = FRAME_BYTES_MAX - RESULT_BYTES_MAX - 64 * 1024
RATES_MAX: Final = 64
# What a child or record costs on the wire beside its texts and body: tags, lengths, numbers.
ITEM_BYTES: Final = 64

Check = Callable[[str, bytes], None]
Emit = Callable[[ProgressNote | RateRule], None]


class OutputFull(TaskRejected):
    """One attempt may carry no more children or records. Catch it to keep what fits."""


class ExecutorSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The part of the configuration that executors see.

    egress_allow: networks ("127.0.0.0/8") reachable beside public ones. contact: goes into the
    user agent. data_dir: a folder of this worker's own. sources_dir: the operator's own sources
    (executors/sources); empty: `sources` in data_dir.
    """

    egress_allow: tuple[str, ...] = ()
    contact: str = ""
    data_dir: str = ""
    sources_dir: str = ""
    device_id: str = ""
    version: str = "0.1"

    @property
    def user_agent(self) -> str:
        """How we name ourselves to web servers, truly."""
        contact = f" (+{self.contact})" if self.contact else ""
        return f"zmqcluster/{self.version}{contact}"


class TaskContext:
    """One attempt's side of the cluster. Made by the host; tests make their own, all but the id
    has defaults."""

    __slots__ = (
        "_check",
        "_deadline",
        "_emit",
        "_on_begun",
        "_output_bytes",
        "_rated",
        "attempt",
        "cancelled",
        "children",
        "is_paced",
        "job_id",
        "records",
        "settings",
        "task_id",
        "task_type",
    )

    def __init__(
        self,
        task_id: int,
        attempt: int = 1,
        *,
        task_type: str = "task",
        job_id: int = 0,
        timeout_ms: int = TIMEOUT_MS_MAX,
        settings: ExecutorSettings | None = None,
        check: Check | None = None,
        emit: Emit | None = None,
        on_begun: Callable[[], None] | None = None,
    ) -> None:
        """check: Registry.check, to refuse a child whose parameters do not fit before it leaves.
        emit: where progress and rate rules go at once. on_begun: who waits for tell_begun(), if
        the master does: it limits the starts of this attempt's rate key."""
        self.task_id = task_id
        self.attempt = attempt
        self.task_type = task_type
        self.job_id = job_id
        self.settings = settings if settings is not None else _NO_SETTINGS
        # True once somebody wants the task gone; an async task also gets CancelledError.
        self.cancelled = False
        self.children: list[TaskSpec] = []
        self.records: list[Record] = []
        self._check = check
        self._emit = emit
        self._on_begun = on_begun
        self.is_paced = on_begun is not None
        self._deadline = time.monotonic() + timeout_ms / 1000
        self._output_bytes = 0
        self._rated: dict[str, tuple[float, RateRule]] = {}

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger whose lines name the task; they end up in the worker's log."""
        logger = logging.getLogger(f"task.{self.task_type}")
        return _TaskLog(logger, {"task_id": self.task_id, "attempt": self.attempt})

    def remaining_ms(self) -> int:
        """Time left before the deadline ends this attempt; never below 0."""
        return max(0, int((self._deadline - time.monotonic()) * 1000))

    def progress(self, done: float, note: str = "") -> None:
        """Say how far this is. done: 0..1, clamped. note: cut to NAME_CHARS_MAX.

        Meant for people: too many a second are thinned out, the last one is not kept for ever.
        """
        if self._emit is not None:
            clamped = min(1.0, max(0.0, done))
            clamped = clamped if clamped == clamped else 0.0  # NaN
            text = note[:NAME_CHARS_MAX].encode(errors="replace").decode()
            self._emit(ProgressNote(self.task_id, self.attempt, clamped, text))

    def tell_begun(self) -> None:
        """Say that this attempt reaches what its rate key guards now; only the first call counts.

        The next start of a key with a delay waits for this. The host says it just before run(),
        unless the executor's tells_begin promises that run() does.
        """
        on_begun, self._on_begun = self._on_begun, None
        if on_begun is not None:
            on_begun()

    def add_child(
        self,
        task_type: str,
        data: Struct | Mapping[str, object],
        *,
        priority: int = PRIORITY_DEFAULT,
        unique_key: str = "",
        rate_key: str = "",
        labels: Sequence[str] = (),
        max_retry_count: int | None = None,
        timeout_s: float | None = None,
        delay_s: float = 0.0,
        not_before: datetime | None = None,
    ) -> None:
        """Queue one more task in this task's job, once this attempt is accepted.

        unique_key: queued once in the whole job, whoever adds it. None takes the master's default.

        Raises ValueError naming what does not fit, OutputFull when CHILDREN_MAX or the bytes are
        used up.
        """
        checked_name("task_type", task_type, TASK_TYPE_PATTERN)
        body = pack_map(data, TASK_DATA_BYTES_MAX, f"data of child {task_type}")
        if self._check is not None:
            self._check_child(task_type, body)
        spec = TaskSpec(
            task_type,
            body,
            checked_range("priority", priority, 0, PRIORITY_MAX),
            max_retry_count
            if max_retry_count is None
            else checked_range("max_retry_count", max_retry_count, 0, RETRIES_MAX),
            None if timeout_s is None else milliseconds("timeout_s", timeout_s, 1, TIMEOUT_MS_MAX),
            _not_before_ms(delay_s, not_before) if delay_s or not_before else 0,
            checked_text("unique_key", unique_key, UNIQUE_KEY_CHARS_MAX),
            checked_text("rate_key", rate_key, RATE_KEY_CHARS_MAX),
            checked_labels(labels) if labels else (),
        )
        # Counted as if every character took four bytes only where it can: not in ASCII.
        texts = _text_bytes(unique_key) + _text_bytes(rate_key) + len(task_type)
        self._take_room("children", len(self.children), len(body) + texts)
        self.children.append(spec)

    def add_record(self, table: str, key: str, row: Struct | Mapping[str, object]) -> None:
        """Put one row into the catalogue: the last one with this table and key wins.

        Raises ValueError naming what does not fit, OutputFull when there is no more room.
        """
        checked_name("table", table, TASK_TYPE_PATTERN)
        checked_text("key", key, UNIQUE_KEY_CHARS_MAX)
        body = pack_map(row, RECORDS_BYTES_MAX, f"record of table {table}")
        texts = _text_bytes(key) + len(table)
        self._take_room("records", len(self.records), len(body) + texts)
        self.records.append(Record(table, key, body))

    def report_rate(
        self,
        rate_key: str,
        delay_s: float | None = None,
        concurrency: int | None = None,
        closed_for_s: float | None = None,
    ) -> None:
        """Tell the whole fleet how a site wants to be treated; counts whatever becomes of the task.

        delay_s: between two starts. concurrency: 0 is unbounded. closed_for_s: nothing starts for
        so long. None leaves that part alone. Durations above a day are cut to a day.

        It leaves at once and again with the result, so that a lost message costs nothing.
        """
        checked_text("rate_key", rate_key, RATE_KEY_CHARS_MAX)
        if not rate_key:
            raise ValueError("rate_key: must not be empty")
        rule = RateRule(
            rate_key,
            None if delay_s is None else _capped_ms("delay_s", delay_s),
            concurrency
            if concurrency is None
            else checked_range("concurrency", concurrency, 0, CONCURRENCY_MAX),
            None if closed_for_s is None else _capped_ms("closed_for_s", closed_for_s),
        )
        if self._emit is not None:
            self._emit(rule)
        before = self._rated.get(rate_key)
        if before is None and len(self._rated) >= RATES_MAX:
            return
        # A later rule overrides only the parts it names.
        merged = rule if before is None else _merged(before[1], rule)
        at = time.monotonic() if closed_for_s is not None or before is None else before[0]
        self._rated[rate_key] = (at, merged)

    @property
    def output_bytes(self) -> int:
        """About what children and records take on the wire; at most OUTPUT_BYTES_MAX."""
        return self._output_bytes

    @property
    def rates(self) -> tuple[RateRule, ...]:
        """The rules reported so far, closures shortened by the time that has passed since."""
        if not self._rated:
            return ()
        now = time.monotonic()
        return tuple(_aged(rule, int((now - at) * 1000)) for at, rule in self._rated.values())

    def _check_child(self, task_type: str, body: bytes) -> None:
        assert self._check is not None
        try:
            self._check(task_type, body)
        except RequestRefused as refusal:
            # Another worker may well know a type that this one does not.
            if refusal.code != RefusalCode.UNKNOWN_TASK_TYPE:
                raise ValueError(f"child {refusal.problem}") from None

    def _take_room(self, what: str, count: int, item_bytes: int) -> None:
        total = self._output_bytes + item_bytes + ITEM_BYTES
        if count >= CHILDREN_MAX:
            raise OutputFull(f"one attempt carries at most {CHILDREN_MAX:,} {what}")
        if total > OUTPUT_BYTES_MAX:
            raise OutputFull(
                f"children and records of one attempt take at most {OUTPUT_BYTES_MAX:,} bytes"
            )
        self._output_bytes = total


_NO_SETTINGS: Final = ExecutorSettings()


class _TaskLog(logging.LoggerAdapter[logging.Logger]):
    """Puts the task's id before each line."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, Any]:
        assert self.extra is not None
        return f"task {self.extra['task_id']}/{self.extra['attempt']}: {msg}", kwargs


def _text_bytes(text: str) -> int:
    return len(text) if text.isascii() else 4 * len(text)


def _not_before_ms(delay_s: float, not_before: datetime | None) -> int:
    """The wall-clock instant in ms; the later one when both are given."""
    at = 0
    if delay_s:
        at = int(time.time() * 1000) + milliseconds("delay_s", delay_s, 0, TIMEOUT_MS_MAX)
    if not_before is not None:
        if not_before.tzinfo is None:
            raise ValueError("not_before: needs a time zone")
        at = max(at, int(not_before.timestamp() * 1000))
    return checked_range("not_before", at, 0, WALL_MS_MAX)


def _capped_ms(name: str, seconds: float) -> int:
    if seconds == float("inf"):
        return DELAY_MS_MAX
    return min(DELAY_MS_MAX, milliseconds(name, seconds, 0, WALL_MS_MAX))


def _merged(old: RateRule, new: RateRule) -> RateRule:
    return RateRule(
        old.rate_key,
        old.delay_ms if new.delay_ms is None else new.delay_ms,
        old.concurrency if new.concurrency is None else new.concurrency,
        old.closed_for_ms if new.closed_for_ms is None else new.closed_for_ms,
    )


def _aged(rule: RateRule, age_ms: int) -> RateRule:
    if rule.closed_for_ms is None:
        return rule
    left = max(0, rule.closed_for_ms - age_ms)
    return RateRule(rule.rate_key, rule.delay_ms, rule.concurrency, left)
