"""What can be seen from outside, written down: what a history is made of."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from tests.support.history import (
    Answer,
    Arrival,
    Cancel,
    End,
    History,
    Retry,
    Start,
    Submission,
    Told,
)
from zmqcluster.messages import CancelTasks, RetryTasks, Submit, Submitted, TaskResult
from zmqcluster.model import Outcome


class Seen(Struct):
    """Requests by their ids; answers when there were any."""

    submits: dict[bytes, Submit] = {}
    receipts: dict[bytes, Submitted] = {}
    cancels: dict[bytes, tuple[CancelTasks, int]] = {}
    cancelled: dict[bytes, Cancel] = {}
    retries: dict[bytes, tuple[RetryTasks, int]] = {}
    # What was answered when, and which of them it changed.
    retried: dict[bytes, tuple[int, tuple[int, ...]]] = {}
    refused: set[bytes] = set()
    starts: list[Start] = []
    told: list[Told] = []
    arrivals: list[Arrival] = []

    def history(self, ends: Iterable[TaskResult]) -> History:
        return History(
            submissions=[self._submission(one) for one in self.submits.values()],
            cancels=[self._cancel(*one) for one in self.cancels.values()],
            retries=[self._retry(*one) for one in self.retries.values()],
            starts=self.starts,
            ends=[
                End(one.task_id, one.attempt, one.result)
                for one in ends
                if one.outcome is Outcome.COMPLETED
            ],
            told=self.told,
            arrivals=self.arrivals,
        )

    def _submission(self, asked: Submit) -> Submission:
        keys = tuple(one.unique_key for one in asked.tasks)
        marks = tuple(one.data for one in asked.tasks)
        answer = self.receipts.get(asked.request_id)
        if answer is None:
            return Submission(self._unanswered(asked.request_id), keys, marks=marks)
        return Submission(Answer.OK, keys, answer.task_ids, answer.job_id, marks)

    def _cancel(self, asked: CancelTasks, asked_ms: int) -> Cancel:
        answer = self._unanswered(asked.request_id)
        former = Cancel(answer, asked.task_ids, asked.job_id, asked_ms)
        return self.cancelled.get(asked.request_id, former)

    def _retry(self, asked: RetryTasks, asked_ms: int) -> Retry:
        if asked.request_id not in self.retried:
            return Retry(self._unanswered(asked.request_id), asked.task_ids, asked_ms)
        answered_ms, changed = self.retried[asked.request_id]
        return Retry(Answer.OK, changed, asked_ms, answered_ms)

    def _unanswered(self, request_id: bytes) -> Answer:
        return Answer.FAIL if request_id in self.refused else Answer.UNKNOWN
