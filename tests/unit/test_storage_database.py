"""Opening: what can be wrong with the file is said in one sentence that says what to do."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from storage import database, probe
from storage.database import Place, open_reader, open_writer, storage_errors, transaction
from tests.support.storage_bench import StorageBench, storage_bench, task
from zmqcluster.errors import StorageError
from zmqcluster.model import Durability


def test_a_new_database_is_private_and_in_wal_mode(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cluster.db"

    with closing(open_writer(path)) as opened:
        files = list(path.parent.iterdir())

        assert opened.journal_mode == "wal"
        assert len(files) == 3
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}


@pytest.mark.parametrize(
    ("durability", "waits_for"),
    [
        (Durability.FULL, {"synchronous": 2, "fullfsync": 1, "checkpoint_fullfsync": 1}),
        (Durability.NORMAL, {"synchronous": 1, "fullfsync": 0, "checkpoint_fullfsync": 1}),
    ],
)
def test_durability_decides_what_waits_for_the_disk(
    tmp_path: Path, durability: Durability, waits_for: dict[str, int]
) -> None:
    with closing(open_writer(tmp_path / "cluster.db", durability)) as opened:
        found = {name: opened.execute(f"PRAGMA {name}").fetchone()[0] for name in waits_for}

    assert found == waits_for


def test_no_connection_maps_the_file(tmp_path: Path) -> None:
    with storage_bench(tmp_path) as bench, closing(open_reader(bench.path)) as reader:
        for one in (bench.database, reader):
            assert one.execute("PRAGMA mmap_size").fetchone() == (0,)


def test_the_file_can_be_opened_again_and_is_one_file_when_closed(tmp_path: Path) -> None:
    path = tmp_path / "cluster.db"
    open_writer(path).close()

    open_writer(path).close()

    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_was_deleted_or_replaced_while_in_use_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "cluster.db"
    with storage_bench(tmp_path):
        place = Place(path)
        place.require()

        away = path.rename(tmp_path / "away.db")
        with pytest.raises(StorageError, match="moved or deleted"):
            place.require()
        path.write_bytes(away.read_bytes())
        with pytest.raises(StorageError, match="moved or deleted"):
            place.require()
        away.replace(path)
        place.require()

        path.with_name("cluster.db-wal").unlink()
        with pytest.raises(StorageError, match="moved or deleted"):
            place.require()


def test_a_reader_cannot_write(tmp_path: Path) -> None:
    with storage_bench(tmp_path) as bench, closing(open_reader(bench.path)) as reader:
        assert reader.conn.execute("PRAGMA query_only").fetchone() == (1,)

        reader.execute("PRAGMA query_only = OFF")

        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader.execute("DELETE FROM tasks")


def test_a_reader_needs_a_database_and_makes_none(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="start a master with this data_dir"):
        open_reader(tmp_path / "cluster.db")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"hello", b"SQLite format 3\x00", b"{}" * 3000])
def test_a_file_that_is_no_database_is_refused_and_left_alone(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "cluster.db"
    path.write_bytes(content)

    with pytest.raises(StorageError, match="is not a database: move it away, or use another"):
        open_writer(path)

    assert path.read_bytes() == content


def test_an_empty_file_becomes_a_database(tmp_path: Path) -> None:
    path = tmp_path / "cluster.db"
    path.touch()

    with closing(open_writer(path)) as opened:
        assert "tasks" in opened.table_names()


def test_a_database_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "cluster.db"
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE bookmarks (url TEXT)")

    with pytest.raises(StorageError, match="is a database of another program"):
        open_writer(path)

    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT name FROM sqlite_schema").fetchall() == [("bookmarks",)]


def _filled(folder: Path) -> Path:
    """A database of about a hundred pages, closed."""
    with storage_bench(folder) as bench:
        bench.save(*(task(i, task_data=b"x" * 1500) for i in range(1, 200)))
        return bench.path


def test_a_database_whose_end_is_missing_is_refused(tmp_path: Path) -> None:
    path = _filled(tmp_path)
    os.truncate(path, path.stat().st_size // 2)

    with pytest.raises(StorageError, match=r"damaged \(its end is missing\): restore a backup"):
        open_writer(path)


def test_a_small_database_with_a_broken_page_is_refused(tmp_path: Path) -> None:
    path = _filled(tmp_path)
    with path.open("r+b") as file:
        for page in range(30, 60):
            file.seek(page * 4096)
            file.write(b"\xff" * 64)

    with pytest.raises(StorageError, match=r"damaged .*: restore a backup"):
        open_writer(path)


def test_a_large_database_opens_without_being_read_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _filled(tmp_path)
    monkeypatch.setattr(probe, "CHECKED_BYTES_MAX", 4096)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 4096)
        file.write(b"\xff" * 64)

    open_writer(path).close()


def test_a_locked_database_is_refused_after_a_short_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _filled(tmp_path)
    monkeypatch.setattr(database, "OPENING_BUSY_MS", 10)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")

        with pytest.raises(StorageError, match="another process holds it locked: stop the other"):
            open_writer(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir(mode=0o500)

    with pytest.raises(StorageError, match=f"make {folder} writable, or use another data_dir"):
        open_writer(folder / "cluster.db")


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").touch()

    with pytest.raises(StorageError, match=f"check {tmp_path / 'data'}"):
        open_writer(tmp_path / "data" / "cluster.db")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("SQLITE_FULL", "the disk is full: free some space"),
        ("SQLITE_IOERR_SHMSIZE", "there is no room for its -shm file: free some space"),
        ("SQLITE_IOERR_WRITE", r"the disk failed \(boom\): check it"),
        ("SQLITE_READONLY_DIRECTORY", "it cannot be written: make /data writable, or use another"),
        ("SQLITE_CANTOPEN", "it cannot be opened: make /data writable, with space for new files"),
        ("SQLITE_CORRUPT_INDEX", r"it is damaged \(boom\): restore a backup"),
    ],
)
def test_troubles_of_the_disk_say_what_to_do(code: str, words: str) -> None:
    error = sqlite3.OperationalError("boom")
    error.sqlite_errorname = code

    with (
        pytest.raises(StorageError, match=f"^cannot save: {words}"),
        storage_errors("cannot save", Path("/data/cluster.db")),
    ):
        raise error


def test_a_read_that_failed_in_use_is_not_taken_for_damage() -> None:
    # As SQLite 3.40 reports EIO of a read: see SQLITE_IOERR_CORRUPTFS.
    error = sqlite3.DatabaseError("database disk image is malformed")
    error.sqlite_errorname = "SQLITE_CORRUPT"

    with (
        pytest.raises(StorageError, match=r"the disk failed or the file is damaged .* start again"),
        storage_errors("cannot read the database"),
    ):
        raise error


def test_a_sqlite_that_is_too_old_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 31, 0))

    with pytest.raises(StorageError, match=r"3\.37\.0 or newer is needed"):
        open_writer(tmp_path / "cluster.db")


def test_what_was_written_before_an_error_is_gone_after_it(tmp_path: Path) -> None:
    def write_and_fail(bench: StorageBench) -> None:
        with transaction(bench.database, "cannot save"):
            bench.database.execute("INSERT INTO meta VALUES ('a', 1)")
            raise KeyError("ours")

    with storage_bench(tmp_path) as bench:
        with pytest.raises(KeyError, match="ours"):
            write_and_fail(bench)

        assert bench.count("meta") == 0
        assert not bench.database.conn.in_transaction


def test_the_writer_goes_on_while_a_reader_reads(tmp_path: Path) -> None:
    with storage_bench(tmp_path) as bench, closing(open_reader(bench.path)) as reader:
        bench.save(task(1))
        reader.execute("BEGIN")
        before = reader["tasks"].count

        bench.save(task(2))

        assert reader["tasks"].count == before == 1
        reader.execute("COMMIT")
        assert reader["tasks"].count == 2


def test_a_killed_writer_loses_nothing_it_committed(tmp_path: Path) -> None:
    left_behind = StorageBench(tmp_path / "cluster.db")
    left_behind.save(task(1), task(2))
    copy = tmp_path / "copy"
    copy.mkdir()
    # What a kill leaves: the files as they are, nothing closed.
    for file in tmp_path.glob("cluster.db*"):
        (copy / file.name).write_bytes(file.read_bytes())
    left_behind.close()

    with storage_bench(copy) as bench:
        assert list(bench.queries.tasks_by_id([1, 2, 3])) == [1, 2]


_LOOK_IN = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
print(connection.execute("SELECT count(*) FROM tasks").fetchone()[0])
connection.close()
"""


def test_a_tool_that_looks_in_and_goes_takes_no_log_away_from_the_writer(tmp_path: Path) -> None:
    with storage_bench(tmp_path) as bench, closing(open_reader(bench.path)):
        for number in (1, 2):
            bench.save(task(number))

            looked = subprocess.run(
                [sys.executable, "-c", _LOOK_IN, str(bench.path)], capture_output=True, check=True
            )

            assert looked.stdout.split() == [str(number).encode()]
            assert bench.path.with_name("cluster.db-wal").exists()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EIO, "the disk failed"),
        (errno.ENOSPC, "the disk is full"),
        (errno.EACCES, "make /data writable"),
    ],
)
def test_what_the_system_says_reads_like_what_sqlite_says(number: int, words: str) -> None:
    assert words in probe.explain(OSError(number, os.strerror(number)), Path("/data/cluster.db"))
