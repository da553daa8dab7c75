"""Key files: the secret decides, damage is never papered over, nothing prints a secret."""

from __future__ import annotations

from pathlib import Path

import pytest
import zmq
from zmq.utils import z85

from zmqcluster.errors import StartError
from zmqcluster.security.keys import (
    load_key_pair,
    load_or_create_key_pair,
    load_public_key,
    new_key_pair,
    public_of,
)


def test_pair_is_made_once_and_found_again(tmp_path: Path) -> None:
    made = load_or_create_key_pair(tmp_path, "server")

    assert load_or_create_key_pair(tmp_path, "server") == made
    assert load_key_pair(tmp_path, "server") == made
    assert load_public_key(tmp_path / "server.pub") == made.public
    assert (len(made.public), len(made.secret)) == (32, 32)
    assert (tmp_path / "server.key").stat().st_mode & 0o777 == 0o600


def test_public_half_belongs_to_the_secret_as_libzmq_sees_it() -> None:
    public, secret = zmq.curve_keypair()

    assert public_of(bytes(z85.decode(secret))) == bytes(z85.decode(public))


def test_foreign_public_file_is_written_anew(tmp_path: Path) -> None:
    made = load_or_create_key_pair(tmp_path, "server")
    load_or_create_key_pair(tmp_path, "other")
    (tmp_path / "server.pub").write_text((tmp_path / "other.pub").read_text())

    assert load_or_create_key_pair(tmp_path, "server") == made
    assert load_public_key(tmp_path / "server.pub") == made.public


@pytest.mark.parametrize("text", ["", "short", "\x00" * 40, "é" * 20, "~" * 40])
def test_damaged_secret_is_refused_and_not_replaced(tmp_path: Path, text: str) -> None:
    load_or_create_key_pair(tmp_path, "server")
    (tmp_path / "server.key").write_text(text)

    with pytest.raises(StartError, match=r"server.key is damaged"):
        load_or_create_key_pair(tmp_path, "server")

    assert (tmp_path / "server.key").read_text() == text


def test_secret_open_to_others_is_refused(tmp_path: Path) -> None:
    load_or_create_key_pair(tmp_path, "server")
    (tmp_path / "server.key").chmod(0o644)

    with pytest.raises(StartError, match="chmod 600"):
        load_or_create_key_pair(tmp_path, "server")


def test_pair_prints_without_its_secret() -> None:
    keys = new_key_pair()

    printed = f"{keys} {keys!r} {[keys]}"

    assert keys.public.hex() in printed
    assert keys.secret.hex() not in printed
    assert repr(keys.secret) not in printed
