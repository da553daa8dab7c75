"""Files that something else has changed: refused in one sentence and left alone, or opened whole.

SQLite has no checksums over its pages, so a bit that flips within a row's data is found by nobody;
a WAL has them. What its cut-off end has lost cannot be told from what a power loss left unwritten.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from random import Random

import pytest
from msgspec import Struct
from sqlite_utils import Database

from storage import recovery, schema
from storage.database import open_writer
from storage.writer import apply
from tests.support.storage_bench import task
from tests.support.storage_workload import content
from zmqcluster.core.effects import Changes
from zmqcluster.core.rows import TaskRow
from zmqcluster.errors import StorageError
from zmqcluster.model import Durability, TaskId

PAGE_BYTES = 4096
# What somebody who reads a refusal can do.
ADVICE = ("restore a backup", "another data_dir", "move it away")


class Left(Struct, frozen=True):
    """What a killed master left. states: after each of its commits. ends: of each in the WAL."""

    files: dict[str, bytes]
    states: list[int]
    ends: list[int]


def _left(folder: Path) -> Left:
    """Half of the tasks are in the file itself, and a commit each for the others in its WAL."""
    path = folder / "cluster.db"
    wal = path.with_name("cluster.db-wal")
    with closing(open_writer(path, Durability.NORMAL)) as database:
        connection = database.conn
        recovery.begin_epoch(database)
        apply(database, Changes(new_tasks={TaskId(i): _task(i) for i in range(1, 100)}))
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        states, ends = [content(database)], [0]
        for i in range(100, 110):
            apply(database, Changes(new_tasks={TaskId(i): _task(i)}, clock_ms=i))
            states.append(content(database))
            ends.append(wal.stat().st_size)
        files = {one.name: one.read_bytes() for one in (path, wal)}
    return Left(files, states, ends)


def _task(number: int) -> TaskRow:
    return task(number, task_data=bytes([number]) * 700)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Left:
    return _left(tmp_path_factory.mktemp("left"))


@pytest.fixture(scope="module")
def closed(left: Left, tmp_path_factory: pytest.TempPathFactory) -> Left:
    """The same after an orderly end: one file."""
    path = tmp_path_factory.mktemp("closed") / "cluster.db"
    _put(path.parent, left.files)
    open_writer(path).close()
    return Left({path.name: path.read_bytes()}, left.states[-1:], [])


def _put(folder: Path, files: Mapping[str, bytes]) -> None:
    for one in folder.iterdir():
        one.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _open(
    folder: Path, files: Mapping[str, bytes], durability: Durability = Durability.FULL
) -> int | str:
    """The content of a database made of these files, or why it is refused: with its files kept."""
    _put(folder, files)
    try:
        with closing(open_writer(folder / "cluster.db", durability)) as database:
            recovery.load(database)
            return content(database)
    except StorageError as error:
        sentence = str(error)
    assert "\n" not in sentence
    assert any(advice in sentence for advice in ADVICE), sentence
    now = {one.name: one.read_bytes() for one in folder.iterdir() if one.suffix != ".db-shm"}
    # Even a look makes a WAL.
    assert {name: data for name, data in now.items() if data or name in files} == files, sentence
    return sentence


def _flipped(data: bytes, at: int, rng: Random) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed)


def test_a_bit_in_the_header_costs_nothing(closed: Left, tmp_path: Path) -> None:
    [data], rng = closed.files.values(), Random(1)

    for at in range(0, 100, 2):
        found = _open(tmp_path, {"cluster.db": _flipped(data, at, rng)})

        assert isinstance(found, str) or found == closed.states[0], at


def test_a_bit_in_a_page_s_structure_costs_no_row(closed: Left, tmp_path: Path) -> None:
    [data], rng = closed.files.values(), Random(2)
    refused = 0

    for page in range(1, len(data) // PAGE_BYTES):
        at = page * PAGE_BYTES + rng.randrange(12)
        found = _open(tmp_path, {"cluster.db": _flipped(data, at, rng)})

        refused += isinstance(found, str)
        assert isinstance(found, str) or found == closed.states[0], at
    assert refused > 10


def test_a_cut_off_database_is_refused(closed: Left, tmp_path: Path) -> None:
    [data], rng = closed.files.values(), Random(3)

    for _ in range(20):
        found = _open(tmp_path, {"cluster.db": data[: rng.randrange(1, len(data))]})

        assert isinstance(found, str)


def test_a_cut_off_wal_costs_the_commits_that_were_cut_and_no_other(
    left: Left, tmp_path: Path
) -> None:
    wal, rng = left.files["cluster.db-wal"], Random(4)

    for _ in range(20):
        end = rng.randrange(len(wal))
        found = _open(tmp_path, left.files | {"cluster.db-wal": wal[:end]})

        assert found == left.states[sum(one <= end for one in left.ends) - 1]


def test_a_bit_in_a_wal_is_refused_unless_it_is_in_its_last_two_commits(
    left: Left, tmp_path: Path
) -> None:
    wal, rng = left.files["cluster.db-wal"], Random(5)

    for at in [*range(32), *(rng.randrange(left.ends[-3]) for _ in range(40))]:
        found = _open(tmp_path, left.files | {"cluster.db-wal": _flipped(wal, at, rng)})

        assert "start once with durability=normal to go on without" in str(found), at

    for _ in range(10):
        at = rng.randrange(left.ends[-2], left.ends[-1])
        found = _open(tmp_path, left.files | {"cluster.db-wal": _flipped(wal, at, rng)})

        assert found == left.states[-2]


def test_the_advice_of_a_damaged_wal_works(left: Left, tmp_path: Path) -> None:
    broken = _flipped(left.files["cluster.db-wal"], left.ends[4] + 99, Random(6))
    files = left.files | {"cluster.db-wal": broken}
    assert isinstance(_open(tmp_path, files), str)

    found = _open(tmp_path, files, Durability.NORMAL)

    assert found == left.states[4]
    with closing(open_writer(tmp_path / "cluster.db")) as database:
        assert content(database) == left.states[4]


def test_a_garbled_wal_is_refused(left: Left, tmp_path: Path) -> None:
    garbage = Random(7).randbytes(50_000)

    found = _open(tmp_path, left.files | {"cluster.db-wal": garbage})

    assert "is damaged" in str(found)


@pytest.mark.parametrize("database", [{"cluster.db": b""}, {}], ids=["empty", "missing"])
def test_a_wal_without_its_database_is_refused_and_kept(
    left: Left, tmp_path: Path, database: dict[str, bytes]
) -> None:
    found = _open(tmp_path, database | {"cluster.db-wal": left.files["cluster.db-wal"]})

    assert "its -wal file is not" in str(found)


def test_a_database_of_another_program_is_left_as_it_is(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "other")) as other:
        other.execute("CREATE TABLE bookmarks (url TEXT)")

    found = _open(tmp_path, {"cluster.db": (tmp_path / "other").read_bytes()})

    assert "is a database of another program" in str(found)


def test_a_newer_database_keeps_its_wal(left: Left, tmp_path: Path) -> None:
    _put(tmp_path, left.files)
    with closing(sqlite3.connect(tmp_path / "cluster.db")) as newer:
        newer.execute(f"PRAGMA user_version = {len(schema.MIGRATIONS) + 1}")
        names = ("cluster.db", "cluster.db-wal")
        files = {name: (tmp_path / name).read_bytes() for name in names}

    found = _open(tmp_path, files)

    assert "is from a newer version" in str(found)


def test_a_task_that_its_index_does_not_know_is_found(tmp_path: Path) -> None:
    path = tmp_path / "made" / "cluster.db"
    open_writer(path).close()
    with closing(sqlite3.connect(path)) as broken:
        row = broken.execute("SELECT * FROM sqlite_schema WHERE name = 'tasks_ready'").fetchone()
        broken.execute("PRAGMA writable_schema = ON")
        broken.execute("DELETE FROM sqlite_schema WHERE name = 'tasks_ready'")
        broken.commit()
    with closing(sqlite3.connect(path)) as broken:
        apply(Database(broken), Changes(new_tasks={TaskId(1): _task(1)}))
        broken.execute("PRAGMA writable_schema = ON")
        broken.execute("INSERT INTO sqlite_schema VALUES (?, ?, ?, ?, ?)", row)
        broken.commit()
    folder = tmp_path / "looked_at"
    folder.mkdir()

    found = _open(folder, {"cluster.db": path.read_bytes()})

    assert "tasks_ready" in str(found)


def test_a_schema_that_is_no_text_is_refused(closed: Left, tmp_path: Path) -> None:
    column = b"assigned_wall INTEGER NOT NULL"
    broken = b"assigned_wal\xff".ljust(len(column))

    found = _open(tmp_path, {"cluster.db": closed.files["cluster.db"].replace(column, broken)})

    assert "its text cannot be read" in str(found)


def test_a_master_begins_with_an_empty_wal(left: Left, tmp_path: Path) -> None:
    _put(tmp_path, left.files)

    with closing(open_writer(tmp_path / "cluster.db")):
        assert (tmp_path / "cluster.db-wal").stat().st_size == 0


def test_the_wal_of_another_database_is_refused(
    left: Left, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    other = _left(tmp_path_factory.mktemp("other"))

    found = _open(tmp_path, left.files | {"cluster.db-wal": other.files["cluster.db-wal"]})

    assert "has the -wal file of another database beside it: move that away" in str(found)
