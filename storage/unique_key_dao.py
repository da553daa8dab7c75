"""One task for a unique key within its job: the database itself refuses a second."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from storage.dao import DAO
from storage.row_table import RowTable
from storage.statements import ByKeys
from zmqcluster.core.rows import UniqueKeyRow
from zmqcluster.model import JobId, TaskId

JobKey = tuple[JobId, bytes]


class UniqueKeyDAO(DAO):
    """The table `unique_keys`, by job and 16-byte hash."""

    # Plain INSERT: a key that is there already is a bug above us, and no task may come of it.
    _TABLE: Final = RowTable("unique_keys", UniqueKeyRow, verb="INSERT")
    _KNOWN: Final = ByKeys(
        "SELECT key_hash, task_id FROM unique_keys WHERE job_id = ? AND key_hash IN ({})"
    )

    def write(self, rows: Iterable[UniqueKeyRow]) -> None:
        """In the order of the index: hashes are random, and neighbours share a page."""
        in_order = sorted(rows, key=lambda row: (row.job_id, row.key_hash))
        self._TABLE.write(self._database.conn, in_order)

    def known(self, keys: Sequence[JobKey]) -> dict[JobKey, TaskId]:
        """The tasks of those keys that are taken."""
        found: dict[JobKey, TaskId] = {}
        by_job: dict[JobId, list[bytes]] = {}
        for job_id, key_hash in keys:
            by_job.setdefault(job_id, []).append(key_hash)
        for job_id, hashes in by_job.items():
            for key_hash, task_id in self._KNOWN.run(self._database.conn, hashes, job_id):
                found[job_id, key_hash] = task_id
        return found

    def delete_of_job(self, job_id: int, limit: int) -> int:
        """Delete at most limit keys of a job; says how many."""
        cursor = self._database.conn.execute(
            """DELETE FROM unique_keys WHERE job_id = ? AND key_hash IN (
                SELECT key_hash FROM unique_keys WHERE job_id = ? LIMIT ?)""",
            (job_id, job_id, limit),
        )
        return cursor.rowcount
