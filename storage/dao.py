"""What each DAO is: the SQL of one table, on a connection that somebody else owns."""

from __future__ import annotations

from sqlite_utils import Database

from storage import schema


class DAO:
    """Writes happen inside the caller's transaction: a DAO never begins or commits one.

    DAOs do not know each other; storage/writer.py and storage/queries.py put them together.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def init_table(self) -> None:
        """Make the tables, or bring them up to date: all of them, they only fit together.

        Safe to call again. Not inside a transaction.
        """
        schema.migrate(self._database, "the database")
