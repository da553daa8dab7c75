"""Secrets that people carry: the join token of a new machine, the bearer token of the REST API.

A join token authenticates the master to the newcomer (it names the server's key) before the
newcomer says anything, and gives it a bootstrap key that may do one thing: enrol its own key.
The master keeps only the public half of that bootstrap key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from zmqcluster.errors import ConfigError, StartError
from zmqcluster.messages import PublicKey, ShortText, WallMs
from zmqcluster.model import Role
from zmqcluster.security.datadir import DataDir, read_small_file, write_small_file
from zmqcluster.security.keys import KeyPair, new_key_pair, public_of

PREFIX: Final = "ck1."
TOKEN_VERSION: Final = 1
TOKEN_CHARS_MAX: Final = 1024
_CHECKSUM_BYTES: Final = 4
_API_TOKEN_BYTES: Final = 32

Port = Annotated[int, Meta(ge=1, le=65535)]


class JoinToken(Struct, frozen=True, forbid_unknown_fields=True):
    """What a newcomer needs. role: what its own key will be. Prints without the secret.

    host: how other machines reach the master; empty leaves it to the newcomer's configuration.
    expires_wall_ms: by the master's wall clock, which has the last word; 0 is never.
    """

    host: ShortText
    dispatch_port: Port
    control_port: Port
    server_public: PublicKey
    secret: PublicKey
    token_id: ShortText
    expires_wall_ms: WallMs
    role: Role = Role.WORKER
    v: Literal[1] = 1

    @property
    def bootstrap_keys(self) -> KeyPair:
        return KeyPair(public=public_of(self.secret), secret=self.secret)

    def __repr__(self) -> str:
        return f"JoinToken({self.token_id!r}, host={self.host!r}, role={self.role!r})"


class _Versioned(Struct, frozen=True):
    """The one field every version of a token has."""

    v: int


def new_join_token(
    *,
    host: str,
    dispatch_port: int,
    control_port: int,
    server_public: bytes,
    expires_wall_ms: int,
    role: Role = Role.WORKER,
) -> JoinToken:
    """A token with a fresh bootstrap key and id; good once the master knows its public half."""
    return JoinToken(
        host=host,
        dispatch_port=dispatch_port,
        control_port=control_port,
        server_public=server_public,
        secret=new_key_pair().secret,
        token_id=secrets.token_hex(6),
        expires_wall_ms=expires_wall_ms,
        role=role,
    )


def encode_join_token(token: JoinToken) -> str:
    """One line without spaces, good for a shell: `ck1.` and base64url of body and checksum."""
    body = msgspec.msgpack.encode(token)
    return PREFIX + base64.urlsafe_b64encode(body + _checksum(body)).decode("ascii").rstrip("=")


def decode_join_token(text: str) -> JoinToken:
    """The token in this text; surrounding white space is ignored.

    Raises ConfigError(join_token), and nothing else, whatever the text; it never repeats the text.
    """
    text = text.strip()
    if not text.startswith(PREFIX):
        raise _bad(f"a token begins with {PREFIX!r}; get one with `distribute token create`")
    body = _body(text)
    try:
        if msgspec.msgpack.decode(body, type=_Versioned).v > TOKEN_VERSION:
            raise _bad("it comes from a newer version of this program: update this machine first")
        token = msgspec.msgpack.decode(body, type=JoinToken)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise _damaged() from None
    if token.role is Role.ENROL or encode_join_token(token) != text:
        # Base64 has several spellings of the same bytes; we accept the one we print.
        raise _damaged()
    return token


def require_unexpired(token: JoinToken, wall_ms: int) -> None:
    """Raises ConfigError(join_token) early; the master checks again by its own clock."""
    if 0 < token.expires_wall_ms <= wall_ms:
        raise _bad(
            "it has expired by this machine's clock; "
            "make a new one with `distribute token create` on the master"
        )


def load_or_create_api_token(data_dir: DataDir) -> str:
    """The bearer token of the REST API, kept in data_dir/api-token, made at first use."""
    token = read_small_file(data_dir.api_token_file, secret=True)
    if token is None:
        token = secrets.token_urlsafe(_API_TOKEN_BYTES)
        write_small_file(data_dir.api_token_file, token + "\n")
    if len(token) < _API_TOKEN_BYTES:
        raise StartError(f"{data_dir.api_token_file} is too short: delete it to get a new one")
    return token


def same_secret(given: str, expected: str) -> bool:
    """Compares in a time that tells nothing about where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode("utf-8"))


def save_join_token(data_dir: DataDir, token: JoinToken) -> None:
    """Leave a token where workers started with the same data directory find it."""
    write_small_file(data_dir.join_token_file, encode_join_token(token) + "\n")


def load_join_token(data_dir: DataDir) -> JoinToken | None:
    """The token the master of this data directory left, or None before its first start."""
    text = read_small_file(data_dir.join_token_file, secret=True)
    return None if text is None else decode_join_token(text)


def _body(text: str) -> bytes:
    if len(text) > TOKEN_CHARS_MAX or not text.isascii():
        raise _damaged()
    encoded = text.removeprefix(PREFIX)
    try:
        raw = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    except binascii.Error:
        raise _damaged() from None
    body, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    if checksum != _checksum(body):
        raise _damaged()
    return body


def _checksum(body: bytes) -> bytes:
    # Against slips of the clipboard, not against forgery: a forged token names no known key.
    return hashlib.blake2b(body, digest_size=_CHECKSUM_BYTES).digest()


def _damaged() -> ConfigError:
    return _bad("it is damaged or cut short: copy the whole line again")


def _bad(problem: str) -> ConfigError:
    return ConfigError("join_token", problem)
