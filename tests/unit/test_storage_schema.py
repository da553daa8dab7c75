"""Migrations: forward from every version, each whole or not at all."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from sqlite_utils import Database

from storage import schema
from storage.access_dao import AccessDAO
from storage.dao import DAO
from storage.database import open_reader, open_writer
from storage.device_dao import DeviceDAO
from storage.device_heartbeat_dao import DeviceHeartbeatDAO
from storage.task_assignment_dao import TaskAssignmentDAO
from zmqcluster.core import rows
from zmqcluster.errors import StorageError

TWO_MORE = (
    ("ALTER TABLE jobs ADD COLUMN colour TEXT",),
    ("CREATE TABLE extra (a INTEGER) STRICT", "INSERT INTO extra VALUES (1)"),
)
ROW_TABLES: dict[str, type[rows.Row]] = {
    "tasks": rows.TaskRow,
    "task_assignments": rows.AssignmentRow,
    "jobs": rows.JobRow,
    "devices": rows.DeviceRow,
    "device_heartbeats": rows.HeartbeatRow,
    "rate_keys": rows.RateKeyRow,
    "keys": rows.KeyRow,
    "tokens": rows.TokenRow,
    "unique_keys": rows.UniqueKeyRow,
    "submissions": rows.SubmissionRow,
    "events": rows.EventRow,
    "records": rows.RecordRow,
}


@pytest.fixture
def database() -> Iterator[Database]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    with closing(Database(connection, recursive_triggers=False, execute_plugins=False)) as opened:
        yield opened


def _version(database: Database) -> int:
    return int(database.execute("PRAGMA user_version").fetchone()[0])


def _definition(database: Database) -> list[tuple[str, str]]:
    return database.execute("SELECT name, sql FROM sqlite_schema ORDER BY name").fetchall()


@pytest.mark.parametrize("start", range(len(schema.MIGRATIONS) + 3))
def test_a_database_of_any_version_becomes_what_a_fresh_one_is(
    database: Database, start: int
) -> None:
    migrations = (*schema.MIGRATIONS, *TWO_MORE)
    schema.migrate(database, "x", migrations[:start])
    assert _version(database) == start

    schema.migrate(database, "x", migrations)

    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        fresh = Database(connection, recursive_triggers=False, execute_plugins=False)
        schema.migrate(fresh, "x", migrations)
        assert _definition(database) == _definition(fresh)
        assert _version(database) == _version(fresh) == len(migrations)


def test_a_step_that_fails_leaves_the_version_before_it_whole(database: Database) -> None:
    schema.migrate(database, "x")
    before = _definition(database)
    broken = ("CREATE TABLE half (a INTEGER)", "INSERT INTO nowhere VALUES (1)")

    with pytest.raises(sqlite3.OperationalError):
        schema.migrate(database, "x", (*schema.MIGRATIONS, broken))

    assert _definition(database) == before
    assert _version(database) == len(schema.MIGRATIONS)


def test_a_newer_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "cluster.db"
    newer = len(schema.MIGRATIONS) + 1
    with closing(open_writer(path)) as opened:
        opened.execute(f"PRAGMA user_version = {newer}")
    problem = (
        f"is from a newer version: schema {newer}, this program knows "
        f"{newer - 1}; upgrade, or use another data_dir"
    )

    with pytest.raises(StorageError, match=problem):
        open_writer(path)
    with pytest.raises(StorageError, match=problem):
        open_reader(path)

    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (newer,)


def test_a_reader_refuses_an_older_database_instead_of_failing_later(tmp_path: Path) -> None:
    path = tmp_path / "cluster.db"
    with closing(open_writer(path)) as opened:
        opened.execute("PRAGMA user_version = 0")

    with pytest.raises(StorageError, match="start the master once"):
        open_reader(path)


@pytest.mark.parametrize(("table", "row_type"), ROW_TABLES.items())
def test_columns_are_named_as_the_fields_of_the_rows(
    database: Database, table: str, row_type: type[rows.Row]
) -> None:
    schema.migrate(database, "x")

    columns = {column.name for column in database[table].columns}

    own = {"event_id", "record_id"}
    assert columns - own == {field.name for field in msgspec.structs.fields(row_type)}


@pytest.mark.parametrize("dao", [DeviceDAO, TaskAssignmentDAO, DeviceHeartbeatDAO, AccessDAO])
def test_init_table_makes_the_tables_and_can_be_called_again(
    database: Database, dao: type[DAO]
) -> None:
    dao(database).init_table()
    dao(database).init_table()

    assert set(ROW_TABLES) <= set(database.table_names())
