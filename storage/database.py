"""Open the database file: the one connection that writes, and those that only read.

Exactly one connection in the world writes or checkpoints (the master lock sees to that): SQLite
before 3.51.3 can damage a WAL database that two connections checkpoint at once. Readers open the
file read-only, so they can do neither.

Nobody but SQLite opens the file while a connection of this process is open. Closing any descriptor
of a file drops all locks the process has on it (POSIX): a tool that looks in then takes itself for
the last user and deletes the WAL when it goes, while our writer goes on writing to it.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final

from sqlite_utils import Database

from storage import schema
from storage.meta_dao import DATABASE_ID, MetaDAO
from storage.probe import damaged, explain, is_made, probe_content, probe_file
from storage.wal import probe_wal
from zmqcluster.errors import StorageError
from zmqcluster.model import Durability

# STRICT tables need 3.37; UPDATE … FROM needs 3.33.
SQLITE_OLDEST: Final = (3, 37, 0)
# Statements of ten sizes for each table that is written in bulk; more than there are.
STATEMENTS_KEPT: Final = 256
# At start a lock means that somebody else runs; later it is a tool that looks in, and goes again.
OPENING_BUSY_MS: Final = 1_000
BUSY_MS: Final = 30_000
WRITER_CACHE_KIB: Final = 65_536
READER_CACHE_KIB: Final = 16_384
# 4,000 pages are 16 MiB: the copying shares one commit in some thousand, and takes about 50 ms.
CHECKPOINT_PAGES: Final = 4_000
WAL_BYTES_KEPT: Final = 64 * 1024 * 1024
REWRITTEN_BYTES: Final = 1024 * 1024


def open_writer(path: str | Path, durability: Durability = Durability.FULL) -> Database:
    """Open the database for writing, making or migrating it as needed. One such a file, ever.

    The connection may be used from any thread, by one at a time.

    Raises StorageError, in one sentence that says what to do, when this cannot work.
    """
    path = Path(path)
    _require_sqlite()
    probe_file(path)
    with storage_errors(f"cannot open the database {path}", path):
        _look_first(path, durability)
        _make_private(path)
        database = _connect(path, "rwc")
    try:
        with storage_errors(f"cannot open the database {path}", path):
            _set_up_writer(database, path, durability)
            schema.migrate(database, path)
            database.conn.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
    except BaseException:
        database.close()
        raise
    return database


def open_reader(path: str | Path) -> Database:
    """Open the database for reading only. Cheap (under a millisecond); any number of them.

    Raises StorageError when the file is missing, is not ours or has another schema.
    """
    path = Path(path)
    _require_sqlite()
    if not path.exists():
        raise StorageError(f"there is no database at {path}: start a master with this data_dir")
    with storage_errors(f"cannot open the database {path}", path):
        database = _connect(path, "ro")
    try:
        with storage_errors(f"cannot read the database {path}", path):
            database.conn.execute(f"PRAGMA cache_size = -{READER_CACHE_KIB}")
            database.conn.execute("PRAGMA query_only = ON")
            schema.require_current(database, path)
    except BaseException:
        database.close()
        raise
    return database


class Place:
    """Where an open database lies: are the file and its WAL still there? 4 us to ask.

    A deleted file can be written to as long as it is open. What is acknowledged then ends with the
    process, and whoever starts a second master there finds no lock.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._parts = (self._path, self._path.with_name(self._path.name + "-wal"))
        self._files = self._look()

    def require(self) -> None:
        """Raises StorageError when the files at this path are not the ones they were."""
        if None in self._files or self._look() != self._files:
            raise StorageError(
                f"the database {self._path} was moved or deleted while it was in use: what is "
                "written now would be lost; put it back, or start anew"
            )

    def _look(self) -> list[tuple[int, int] | None]:
        return [_file_at(part) for part in self._parts]


def _file_at(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextmanager
def storage_errors(doing: str, path: Path | None = None) -> Iterator[None]:
    """Turn SQLite's errors, and values it cannot hold, into a StorageError.

    doing: what was tried, as the first half of the sentence.
    """
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StorageError(f"{doing}: {explain(error, path)}") from error
    except (OverflowError, UnicodeEncodeError) as error:
        raise StorageError(f"{doing}: a value does not fit: {error}") from error
    except UnicodeDecodeError as error:
        # SQLite quotes from the file when it complains, and sqlite3 takes that for UTF-8.
        raise StorageError(f"{doing}: it {damaged('its text cannot be read')}") from error


@contextmanager
def transaction(database: Database, doing: str) -> Iterator[None]:
    """All that is written inside, or nothing.

    Raises StorageError on any trouble of the disk. When the COMMIT itself failed, nobody knows
    whether it happened: stop, and rebuild from what a new start finds.
    """
    connection = database.conn
    with storage_errors(doing):
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            # Some errors (disk full, I/O) have rolled back already.
            if connection.in_transaction:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
            raise


def _require_sqlite() -> None:
    if sqlite3.sqlite_version_info < SQLITE_OLDEST:
        needed = ".".join(map(str, SQLITE_OLDEST))
        raise StorageError(
            f"this Python comes with SQLite {sqlite3.sqlite_version}, and {needed} or newer is "
            "needed: use a newer Python"
        )


def _look_first(path: Path, durability: Durability) -> None:
    """Refuse what is not to be touched: whoever can write changes a file by closing it."""
    if not is_made(path):
        return
    own_id = _id_without_wal(path)
    with closing(_connect(path, "ro")) as database:
        schema.require_known(database, path)
        if own_id is not None and MetaDAO(database).read().get(DATABASE_ID) != own_id:
            raise StorageError(
                f"{path} has the -wal file of another database beside it: move that away, or "
                "restore a backup"
            )
        probe_content(database, path)
        if durability is Durability.FULL:
            probe_wal(path)


def _id_without_wal(path: Path) -> int | None:
    """What the file by itself says; None when that makes no sense, as in mid-checkpoint."""
    with (
        suppress(sqlite3.Error, UnicodeDecodeError),
        closing(_connect(path, "ro&immutable=1")) as alone,
    ):
        return MetaDAO(alone).read().get(DATABASE_ID)
    return None


def _make_private(path: Path) -> None:
    """A new file is readable by its owner only; SQLite gives -wal and -shm the same mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _connect(path: Path, mode: str) -> Database:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=STATEMENTS_KEPT,
        timeout=OPENING_BUSY_MS / 1000,
    )
    # A disk error under a mapped file is a signal that ends the process, not an error.
    connection.execute("PRAGMA mmap_size = 0").fetchall()
    # sqlite-utils plug-ins of the user's own tools have no business in here.
    return Database(connection, recursive_triggers=False, execute_plugins=False)


def _set_up_writer(database: Database, path: Path, durability: Durability) -> None:
    """auto_vacuum stays off: freed pages are used again by the next tasks.

    On macOS a plain fsync leaves the data in the drive's cache; full ones do not, and are what
    durability means there. Elsewhere they are the same.
    """
    connection = database.conn
    is_full = durability is Durability.FULL
    for pragma in (
        f"cache_size = -{WRITER_CACHE_KIB}",
        "foreign_keys = OFF",
        "secure_delete = FAST",
        "temp_store = MEMORY",
        "journal_mode = WAL",
        f"synchronous = {'FULL' if is_full else 'NORMAL'}",
        f"fullfsync = {is_full:d}",
        # Without this one a checkpoint could overtake its WAL: damage, not a lost second.
        "checkpoint_fullfsync = 1",
        f"wal_autocheckpoint = {CHECKPOINT_PAGES}",
        f"journal_size_limit = {WAL_BYTES_KEPT}",
    ):
        connection.execute(f"PRAGMA {pragma}").fetchall()
    (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
    if mode != "wal":
        raise sqlite3.OperationalError(f"its file system cannot hold a WAL (journal mode {mode})")
    # Fails now, not at the first task, when the file or the disk cannot be written.
    connection.execute("BEGIN IMMEDIATE")
    if is_full:
        _rewrite_wal(path)
    connection.execute("ROLLBACK")
    # A WAL of its own for each master: what is found in it later was written by one.
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _rewrite_wal(path: Path) -> None:
    """Put what a killed master left in its WAL on disk, even if a sync of it had failed.

    Linux takes pages for clean that it failed to write: they read well, and no later sync writes
    them. At power loss they would be gone, and with them every commit that was written behind.
    Nobody else may write meanwhile.
    """
    # SQLite puts it beside the file itself, wherever a link to that lies.
    file = os.open(f"{path.resolve()}-wal", os.O_RDWR)
    try:
        at = 0
        while part := os.pread(file, REWRITTEN_BYTES, at):
            at += os.pwrite(file, part, at)
        os.fsync(file)
    finally:
        os.close(file)
