"""CURVE key pairs: who a process is on the wire. On disk as Z85 text, in memory as 32 raw bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import zmq
from msgspec import Struct
from zmq.utils import z85

from zmqcluster.errors import StartError
from zmqcluster.security.datadir import read_small_file, write_small_file

KEY_BYTES: Final = 32
_Z85_CHARS: Final = 40


class KeyPair(Struct, frozen=True):
    """public and secret: 32 raw bytes each. Prints without the secret."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"KeyPair({self.public.hex()})"


def new_key_pair() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(public=z85.decode(public), secret=z85.decode(secret))


def public_of(secret: bytes) -> bytes:
    """The public half that belongs to a secret key of 32 bytes."""
    return bytes(z85.decode(zmq.curve_public(z85.encode(secret))))


def load_or_create_key_pair(folder: Path, name: str) -> KeyPair:
    """The pair in folder/{name}.key and .pub, made at first use.

    The secret decides: a missing or foreign .pub is written anew. Raises StartError when the
    secret is damaged or open to other users: making a new one silently would be a new identity.
    """
    keys = load_key_pair(folder, name)
    if keys is None:
        keys = new_key_pair()
        write_small_file(folder / f"{name}.key", _text(keys.secret))
    public_file = folder / f"{name}.pub"
    if load_public_key(public_file) != keys.public:
        write_small_file(public_file, _text(keys.public))
    return keys


def load_key_pair(folder: Path, name: str) -> KeyPair | None:
    """The pair whose secret lies in folder/{name}.key, or None when there is none."""
    path = folder / f"{name}.key"
    text = read_small_file(path, secret=True)
    if text is None:
        return None
    secret = _key(text)
    if secret is None:
        raise StartError(f"{path} is damaged: restore it from a copy, or delete it and enrol anew")
    return KeyPair(public=public_of(secret), secret=secret)


def load_public_key(path: Path) -> bytes | None:
    """The public key in this file, or None when there is none or it is damaged."""
    text = read_small_file(path, secret=False)
    return None if text is None else _key(text)


def save_public_key(path: Path, public: bytes) -> None:
    write_small_file(path, _text(public))


def _text(key: bytes) -> str:
    return z85.encode(key).decode("ascii") + "\n"


def _key(text: str) -> bytes | None:
    if len(text) != _Z85_CHARS:
        return None
    try:
        key = bytes(z85.decode(text.encode("ascii")))
    except (KeyError, ValueError, UnicodeEncodeError):
        return None
    return key if len(key) == KEY_BYTES else None
