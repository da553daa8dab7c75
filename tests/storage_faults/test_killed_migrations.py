"""A master that dies while it brings its database up to date: the next one does it."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from sqlite_utils import Database

from storage import recovery, schema
from storage.database import open_writer
from tests.support import sqlite_tap
from tests.support.sqlite_tap import Kind, Operation, tapped
from tests.support.storage_workload import content
from zmqcluster.errors import StorageError

pytestmark = pytest.mark.skipif(bool(sqlite_tap.missing()), reason=f"no {sqlite_tap.missing()}")

VERSIONS = range(len(schema.MIGRATIONS))


class Deaths:
    """A handler of the tap that keeps what a kill before each operation would leave."""

    short_bytes = 0

    def __init__(self, folder: Path, into: Path) -> None:
        self._folder = folder
        self._into = into
        self.count = 0

    def on_operation(self, operation: Operation) -> int:
        if operation.kind is not Kind.READ:
            ignored = shutil.ignore_patterns("*-shm")
            shutil.copytree(self._folder, self._into / str(self.count), ignore=ignored)
            self.count += 1
        return sqlite_tap.OK


def _made(path: Path, version: int) -> None:
    """A database as that version left it, with something in it."""
    if version == 0:
        return
    connection = sqlite3.connect(path, isolation_level=None)
    with closing(Database(connection, execute_plugins=False)) as database:
        database.execute("PRAGMA journal_mode = WAL").fetchall()
        schema.migrate(database, path, schema.MIGRATIONS[:version])
        database.execute("INSERT INTO meta VALUES ('epoch', 7)")


def _definition(database: Database) -> list[object]:
    return database.execute("SELECT name, sql FROM sqlite_schema ORDER BY name").fetchall()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_migration_killed_at_any_operation_is_completed_by_the_next_start(
    tmp_path: Path, version: int
) -> None:
    folder, copies = tmp_path / "work", tmp_path / "copies"
    folder.mkdir()
    path = folder / "cluster.db"
    _made(path, version)
    deaths = Deaths(folder, copies)

    with tapped(deaths), closing(open_writer(path)) as database:
        definition, whole = _definition(database), content(database)

    assert deaths.count > 10
    for number in range(deaths.count):
        with closing(open_writer(copies / str(number) / "cluster.db")) as database:
            assert _definition(database) == definition
            assert content(database) == whole
            assert recovery.load(database).epoch == (7 if version else 0)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_migration_that_fails_at_any_statement_leaves_the_version_before(
    tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cluster.db"
    _made(path, version)
    migrate = schema.migrate
    with closing(Database(sqlite3.connect(path), execute_plugins=False)) as database:
        before = _definition(database)

    for statement in range(len(schema.MIGRATIONS[version]) + 1):
        broken = (*schema.MIGRATIONS[version][:statement], "INSERT INTO nowhere VALUES (1)")
        migrations = (*schema.MIGRATIONS[:version], broken)
        monkeypatch.setattr(schema, "migrate", partial(migrate, migrations=migrations))
        with pytest.raises(StorageError, match="no such table: nowhere"):
            open_writer(path)

        with closing(Database(sqlite3.connect(path), execute_plugins=False)) as database:
            assert database.execute("PRAGMA user_version").fetchone() == (version,)
            assert _definition(database) == before

    monkeypatch.setattr(schema, "migrate", migrate)
    with closing(open_writer(path)) as database:
        assert recovery.load(database).epoch == (7 if version else 0)
