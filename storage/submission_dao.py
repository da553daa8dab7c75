"""Answers already given, so that asking again gives the same answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final

import msgspec

from storage.dao import DAO
from storage.statements import MultiRow
from zmqcluster.core.rows import SubmissionRow
from zmqcluster.model import JobId, TaskId


class SubmissionDAO(DAO):
    """The table `submissions`. 10,000 new tasks have neighbouring ids and take a few bytes."""

    _WRITE: Final = MultiRow(
        "INSERT OR REPLACE INTO submissions (request_id, job_id, task_ids, existing, at_wall) {}",
        5,
    )

    def write(self, rows: Iterable[SubmissionRow]) -> None:
        self._WRITE.run(
            self._database.conn,
            [
                (r.request_id, r.job_id, fold_runs(r.task_ids), fold_runs(r.existing), r.at_wall)
                for r in rows
            ],
        )

    def get(self, request_id: bytes) -> SubmissionRow | None:
        found = self._database.conn.execute(
            "SELECT job_id, task_ids, existing, at_wall FROM submissions WHERE request_id = ?",
            (request_id,),
        ).fetchone()
        if found is None:
            return None
        job_id, task_ids, existing, at_wall = found
        return SubmissionRow(
            request_id=request_id,
            job_id=JobId(job_id),
            task_ids=tuple(map(TaskId, unfold_runs(task_ids))),
            existing=tuple(unfold_runs(existing)),
            at_wall=at_wall,
        )

    def prune(self, before_wall: int, limit: int) -> int:
        """Forget the oldest answers given before this instant; says how many."""
        cursor = self._database.conn.execute(
            """DELETE FROM submissions WHERE request_id IN (
                SELECT request_id FROM submissions WHERE at_wall < ? ORDER BY at_wall LIMIT ?)""",
            (before_wall, limit),
        )
        return cursor.rowcount


_decoder: Final = msgspec.msgpack.Decoder(list[int])


def fold_runs(numbers: Sequence[int]) -> bytes:
    """Numbers in any order, as MessagePack [first, length, first, length, …] of rising runs."""
    starts = [0] if numbers else []
    starts += [i for i, (a, b) in enumerate(pairwise(numbers), start=1) if b != a + 1]
    folded: list[int] = []
    for start, end in pairwise([*starts, len(numbers)]):
        folded += (numbers[start], end - start)
    return msgspec.msgpack.encode(folded)


def unfold_runs(folded: bytes) -> list[int]:
    """What fold_runs was given."""
    runs = _decoder.decode(folded)
    numbers: list[int] = []
    for first, length in zip(runs[::2], runs[1::2], strict=True):
        numbers += range(first, first + length)
    return numbers
