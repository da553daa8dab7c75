"""Multi-row statements: every row written once, whatever the number of rows."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest

from storage.statements import PARAMETERS_MAX, ROWS_MAX, ByKeys, MultiRow

INSERT = MultiRow("INSERT INTO t (a, b) {}", 2)


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as opened:
        opened.execute("CREATE TABLE t (a INTEGER PRIMARY KEY, b BLOB NOT NULL) STRICT")
        yield opened


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 16, 17, 24, 50, 383, 384, 511, 512, 513, 1300])
def test_each_row_is_written_once_and_nothing_else(
    connection: sqlite3.Connection, count: int
) -> None:
    rows = [(i, b"%d" % i) for i in range(count)]

    touched = INSERT.run(connection, rows)

    assert touched == count
    assert connection.execute("SELECT a, b FROM t ORDER BY a").fetchall() == rows


def test_a_later_row_wins_over_an_earlier_one_with_its_key(connection: sqlite3.Connection) -> None:
    replace = MultiRow("INSERT OR REPLACE INTO t (a, b) {}", 2)

    replace.run(connection, [(1, b"old"), (2, b"x"), (1, b"new")])

    assert connection.execute("SELECT b FROM t WHERE a = 1").fetchone() == (b"new",)


def test_update_says_how_many_rows_it_found(connection: sqlite3.Connection) -> None:
    INSERT.run(connection, [(i, b"old") for i in range(20)])
    update = MultiRow("UPDATE t SET b = new.column2 FROM ({}) AS new WHERE a = new.column1", 2)

    found = update.run(connection, [(i, b"new") for i in range(15, 45)])

    assert found == 5
    assert connection.execute("SELECT count(*) FROM t WHERE b = x'6e6577'").fetchone() == (5,)


def test_no_statement_has_more_parameters_than_sqlite_allows_by_default() -> None:
    wide = MultiRow("INSERT INTO t {}", 200)

    largest = max(sql.count("?") for sql in wide._sql.values())

    assert PARAMETERS_MAX / 3 < largest <= PARAMETERS_MAX


@pytest.mark.parametrize("count", [0, 1, 3, 64, ROWS_MAX, ROWS_MAX + 1, 2 * ROWS_MAX + 5])
def test_rows_are_found_by_any_number_of_keys(connection: sqlite3.Connection, count: int) -> None:
    INSERT.run(connection, [(i, b"") for i in range(3000)])

    found = ByKeys("SELECT a FROM t WHERE a > ? AND a IN ({})").run(
        connection, range(1, 2 * count, 2), 0
    )

    assert sorted(found) == [(i,) for i in range(1, 2 * count, 2)]
