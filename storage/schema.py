"""The tables, as a list of forward migrations. A new database runs all of them.

A migration is frozen once released: a change of the schema is a new entry at the end. Columns have
the names of the fields in zmqcluster/core/rows.py. The number of migrations applied is SQLite's
user_version, so it lies in the file's header and moves in the same transaction as the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sqlite_utils import Database

from storage.probe import damaged
from zmqcluster.errors import StorageError

# "zmqc": tells our files from other programs' databases.
APPLICATION_ID: Final = 0x7A6D7163

Migration = tuple[str, ...]

FIRST: Final[Migration] = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID",
    # Small and often read first, large and seldom read last: a list never touches the bodies.
    """CREATE TABLE tasks (
        task_id INTEGER PRIMARY KEY,
        job_id INTEGER NOT NULL,
        parent_id INTEGER NOT NULL,
        task_type TEXT NOT NULL,
        labels TEXT NOT NULL,
        rate_key TEXT NOT NULL,
        priority INTEGER NOT NULL,
        max_retry_count INTEGER NOT NULL,
        timeout_ms INTEGER NOT NULL,
        created_wall INTEGER NOT NULL,
        state TEXT NOT NULL,
        attempt INTEGER NOT NULL,
        failures INTEGER NOT NULL,
        deaths INTEGER NOT NULL,
        cancel_requested INTEGER NOT NULL,
        not_before_wall INTEGER NOT NULL,
        retry_at_ms INTEGER NOT NULL,
        device_id TEXT NOT NULL,
        assigned_wall INTEGER NOT NULL,
        started_wall INTEGER NOT NULL,
        finished_wall INTEGER NOT NULL,
        unique_key TEXT NOT NULL,
        error TEXT NOT NULL,
        task_data BLOB,
        result BLOB NOT NULL
    ) STRICT""",
    # The task_data that would make each change of its task dear; NULL in the task's own row.
    """CREATE TABLE task_bodies (
        task_id INTEGER PRIMARY KEY,
        task_data BLOB NOT NULL
    ) STRICT""",
    # Each pending task is in exactly one of the next three. An index ends with its task_id.
    """CREATE INDEX tasks_ready ON tasks (task_type, labels, rate_key, priority)
        WHERE state = 'pending' AND retry_at_ms = 0 AND not_before_wall = 0""",
    """CREATE INDEX tasks_retry ON tasks (retry_at_ms)
        WHERE state = 'pending' AND retry_at_ms > 0""",
    """CREATE INDEX tasks_scheduled ON tasks (not_before_wall)
        WHERE state = 'pending' AND retry_at_ms = 0 AND not_before_wall > 0""",
    """CREATE INDEX tasks_held ON tasks (device_id)
        WHERE state IN ('assigned', 'running')""",
    "CREATE INDEX tasks_of_job ON tasks (job_id) WHERE job_id > 0",
    # 'completed' is not in it: most tasks are, and each would pay for it.
    """CREATE INDEX tasks_unsuccessful ON tasks (state)
        WHERE state IN ('failed', 'cancelled', 'dead')""",
    "CREATE INDEX tasks_finished ON tasks (finished_wall) WHERE finished_wall > 0",
    """CREATE TABLE task_assignments (
        task_id INTEGER NOT NULL,
        attempt INTEGER NOT NULL,
        device_id TEXT NOT NULL,
        epoch INTEGER NOT NULL,
        assigned_wall INTEGER NOT NULL,
        started_wall INTEGER NOT NULL,
        ended_wall INTEGER NOT NULL,
        outcome TEXT NOT NULL,
        run_us INTEGER NOT NULL,
        error TEXT NOT NULL,
        PRIMARY KEY (task_id, attempt)
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE jobs (
        job_id INTEGER PRIMARY KEY,
        name TEXT NOT NULL,
        state TEXT NOT NULL,
        created_wall INTEGER NOT NULL,
        finished_wall INTEGER NOT NULL,
        pending INTEGER NOT NULL,
        running INTEGER NOT NULL,
        completed INTEGER NOT NULL,
        failed INTEGER NOT NULL,
        cancelled INTEGER NOT NULL,
        dead INTEGER NOT NULL
    ) STRICT""",
    # A cancelled job can have open tasks for a while.
    """CREATE INDEX jobs_open ON jobs (job_id)
        WHERE state = 'active' OR pending > 0 OR running > 0""",
    "CREATE INDEX jobs_finished ON jobs (finished_wall) WHERE finished_wall > 0",
    """CREATE TABLE devices (
        device_id TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        state TEXT NOT NULL,
        host TEXT NOT NULL,
        platform TEXT NOT NULL,
        cpu_count INTEGER NOT NULL,
        memory_bytes INTEGER NOT NULL,
        addresses TEXT NOT NULL,
        task_types TEXT NOT NULL,
        labels TEXT NOT NULL,
        slots INTEGER NOT NULL,
        boot_id TEXT NOT NULL,
        drained INTEGER NOT NULL,
        registered_wall INTEGER NOT NULL,
        last_seen_wall INTEGER NOT NULL,
        completed INTEGER NOT NULL,
        failed INTEGER NOT NULL,
        lost INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE device_heartbeats (
        device_id TEXT NOT NULL,
        at_wall INTEGER NOT NULL,
        cpu_pct REAL NOT NULL,
        memory_pct REAL NOT NULL,
        memory_bytes INTEGER NOT NULL,
        disk_pct REAL NOT NULL,
        net_sent_bps INTEGER NOT NULL,
        net_received_bps INTEGER NOT NULL,
        running INTEGER NOT NULL,
        assigned INTEGER NOT NULL,
        PRIMARY KEY (device_id, at_wall)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX device_heartbeats_by_age ON device_heartbeats (at_wall)",
    """CREATE TABLE rate_keys (
        rate_key TEXT PRIMARY KEY,
        delay_ms INTEGER NOT NULL,
        concurrency INTEGER NOT NULL,
        next_at_ms INTEGER NOT NULL,
        closed_until_ms INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE unique_keys (
        job_id INTEGER NOT NULL,
        key_hash BLOB NOT NULL,
        task_id INTEGER NOT NULL,
        PRIMARY KEY (job_id, key_hash)
    ) STRICT, WITHOUT ROWID""",
    # task_ids, existing: MessagePack, runs of neighbours folded (storage/submission_dao.py).
    """CREATE TABLE submissions (
        request_id BLOB PRIMARY KEY,
        job_id INTEGER NOT NULL,
        task_ids BLOB NOT NULL,
        existing BLOB NOT NULL,
        at_wall INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX submissions_by_age ON submissions (at_wall)",
    """CREATE TABLE keys (
        public_key BLOB PRIMARY KEY,
        role TEXT NOT NULL,
        device_id TEXT NOT NULL,
        token_id TEXT NOT NULL,
        created_wall INTEGER NOT NULL,
        revoked_wall INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE tokens (
        token_id TEXT PRIMARY KEY,
        public_key BLOB NOT NULL,
        role TEXT NOT NULL,
        created_wall INTEGER NOT NULL,
        expires_wall INTEGER NOT NULL,
        uses_left INTEGER NOT NULL,
        revoked_wall INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE events (
        event_id INTEGER PRIMARY KEY,
        at_wall INTEGER NOT NULL,
        kind TEXT NOT NULL,
        task_id INTEGER NOT NULL,
        attempt INTEGER NOT NULL,
        job_id INTEGER NOT NULL,
        device_id TEXT NOT NULL,
        detail TEXT NOT NULL
    ) STRICT""",
    "CREATE INDEX events_of_task ON events (task_id) WHERE task_id > 0",
    "CREATE INDEX events_by_age ON events (at_wall)",
    # A rowid table: bodies reach 1 MiB, and those do not belong into an index's pages.
    """CREATE TABLE records (
        record_id INTEGER PRIMARY KEY,
        table_name TEXT NOT NULL,
        key TEXT NOT NULL,
        job_id INTEGER NOT NULL,
        task_id INTEGER NOT NULL,
        attempt INTEGER NOT NULL,
        at_wall INTEGER NOT NULL,
        body BLOB NOT NULL
    ) STRICT""",
    "CREATE UNIQUE INDEX records_by_key ON records (table_name, key)",
)

GIVEN_UP: Final[Migration] = (
    # Was the last attempt given up without a word from its holder? See core/rows.py: GivenUp.
    "ALTER TABLE tasks ADD COLUMN given_up INTEGER NOT NULL DEFAULT 0",
)

RATE_KEYS_AGE: Final[Migration] = (
    # Rate keys are forgotten in time: not while a task has them, or the job that asked for them is.
    "ALTER TABLE rate_keys ADD COLUMN job_id INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE rate_keys ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE rate_keys ADD COLUMN changed_wall INTEGER NOT NULL DEFAULT 0",
    "CREATE INDEX rate_keys_by_age ON rate_keys (changed_wall)",
    "CREATE INDEX tasks_of_rate_key ON tasks (rate_key) WHERE rate_key > ''",
)

MIGRATIONS: Final[tuple[Migration, ...]] = (FIRST, GIVEN_UP, RATE_KEYS_AGE)


def migrate(
    database: Database, path: Path | str, migrations: Sequence[Migration] = MIGRATIONS
) -> None:
    """Bring the database from whatever version it has to the newest, one transaction a step.

    Raises StorageError when it is newer than this program, or not ours; sqlite3.Error when a step
    fails, which leaves the version before that step.
    """
    for version in range(_version(database, path, len(migrations)), len(migrations)):
        with database.atomic():
            for sql in migrations[version]:
                database.execute(sql)
            database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            database.execute(f"PRAGMA user_version = {version + 1}")


def require_known(database: Database, path: Path | str) -> None:
    """Raises StorageError when the database is newer than this program, or not ours."""
    _version(database, path, len(MIGRATIONS))


def require_current(database: Database, path: Path | str) -> None:
    """For readers, which cannot migrate. Raises StorageError unless the schema is the newest."""
    version = _version(database, path, len(MIGRATIONS))
    if version < len(MIGRATIONS):
        raise StorageError(
            f"{path} has schema {version}, this program needs {len(MIGRATIONS)}: "
            "start the master once, it brings it up to date"
        )


def _version(database: Database, path: Path | str, known: int) -> int:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    (application,) = database.execute("PRAGMA application_id").fetchone()
    is_new = version == 0 and application == 0 and not database.table_names()
    if application != APPLICATION_ID and not is_new:
        raise StorageError(
            f"{path} is a database of another program: move it away, or use another data_dir"
        )
    if version < 0:
        raise StorageError(f"{path} {damaged(f'schema {version}')}")
    if version > known:
        raise StorageError(
            f"{path} is from a newer version: schema {version}, this program knows {known}; "
            "upgrade, or use another data_dir"
        )
    return int(version)
