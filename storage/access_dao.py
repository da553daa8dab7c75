"""Who may come in: enrolled public keys and join tokens. No secret is ever in the database."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from storage.dao import DAO
from storage.row_table import RowTable
from zmqcluster.core.rows import KeyRow, TokenRow


class AccessDAO(DAO):
    """The tables `keys` and `tokens`. Revoked ones stay: who had access is worth knowing."""

    _KEYS: Final = RowTable("keys", KeyRow)
    _TOKENS: Final = RowTable("tokens", TokenRow)

    def write_keys(self, rows: Iterable[KeyRow]) -> None:
        self._KEYS.write(self._database.conn, rows)

    def write_tokens(self, rows: Iterable[TokenRow]) -> None:
        self._TOKENS.write(self._database.conn, rows)

    def keys(self) -> list[KeyRow]:
        return self._KEYS.read(self._database, order_by="created_wall, public_key")

    def tokens(self) -> list[TokenRow]:
        return self._TOKENS.read(self._database, order_by="created_wall, token_id")
