"""Tokens that people carry: any slip is noticed, and no message repeats the secret."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from zmqcluster.errors import ConfigError, StartError
from zmqcluster.model import Role
from zmqcluster.security.datadir import DataDir
from zmqcluster.security.keys import public_of
from zmqcluster.security.tokens import (
    JoinToken,
    decode_join_token,
    encode_join_token,
    load_join_token,
    load_or_create_api_token,
    new_join_token,
    require_unexpired,
    same_secret,
    save_join_token,
)

TOKEN = new_join_token(
    host="crawl.example",
    dispatch_port=7990,
    control_port=7991,
    server_public=b"s" * 32,
    expires_wall_ms=2_000_000_000_000,
)
TEXT = encode_join_token(TOKEN)


def sealed(body: bytes) -> str:
    """A token text whose checksum is right, whatever the body says."""
    checksum = hashlib.blake2b(body, digest_size=4).digest()
    return "ck1." + base64.urlsafe_b64encode(body + checksum).decode().rstrip("=")


def test_token_comes_back_whole_and_survives_white_space() -> None:
    assert decode_join_token(f"  {TEXT}\n") == TOKEN
    assert TEXT.startswith("ck1.")
    assert " " not in TEXT
    assert TOKEN.bootstrap_keys.public == public_of(TOKEN.secret)


def test_two_tokens_share_neither_secret_nor_id() -> None:
    other = new_join_token(
        host="", dispatch_port=1, control_port=2, server_public=b"s" * 32, expires_wall_ms=0
    )

    assert other.secret != TOKEN.secret
    assert other.token_id != TOKEN.token_id


@given(st.integers(0, len(TEXT) - 1), st.characters(min_codepoint=33, max_codepoint=126))
@example(len(TEXT) - 1, chr(ord(TEXT[-1]) + 1))
def test_one_wrong_character_anywhere_is_noticed(position: int, character: str) -> None:
    slipped = TEXT[:position] + character + TEXT[position + 1 :]

    if slipped == TEXT:
        return
    with pytest.raises(ConfigError, match=r"^join_token: ") as caught:
        decode_join_token(slipped)
    assert TEXT[8:24] not in str(caught.value)


@given(st.integers(0, len(TEXT) - 1))
def test_cut_token_is_noticed(length: int) -> None:
    with pytest.raises(ConfigError):
        decode_join_token(TEXT[:length])


@given(st.one_of(st.text(), st.text().map("ck1.".__add__), st.binary().map(sealed)))
def test_no_text_raises_anything_but_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^join_token: "):
        decode_join_token(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("v", 0),
        ("role", "enrol"),
        ("role", "root"),
        ("dispatch_port", 0),
        ("control_port", 65536),
        ("server_public", b"short"),
        ("secret", b"s" * 33),
        ("expires_wall_ms", -1),
        ("host", "h" * 200),
        ("surprise", 1),
    ],
)
def test_well_sealed_nonsense_is_refused(field: str, value: object) -> None:
    body = msgspec.to_builtins(TOKEN, builtin_types=(bytes,)) | {field: value}

    with pytest.raises(ConfigError, match="damaged"):
        decode_join_token(sealed(msgspec.msgpack.encode(body)))


def test_token_of_a_newer_version_says_so() -> None:
    text = sealed(msgspec.msgpack.encode({"v": 2, "anything": "else"}))

    with pytest.raises(ConfigError, match="newer version"):
        decode_join_token(text)


def test_damage_is_not_mistaken_for_a_newer_version() -> None:
    text = sealed(msgspec.msgpack.encode({"v": 2, "anything": "else"}))

    with pytest.raises(ConfigError, match="damaged"):
        decode_join_token(text[:-1] + ("A" if text[-1] != "A" else "Q"))


def test_wrong_prefix_says_where_tokens_come_from() -> None:
    with pytest.raises(ConfigError, match="distribute token create"):
        decode_join_token("Bearer abc")


def test_expiry_is_by_the_given_clock_and_zero_is_never() -> None:
    require_unexpired(TOKEN, TOKEN.expires_wall_ms - 1)
    require_unexpired(msgspec.structs.replace(TOKEN, expires_wall_ms=0), 2**50)

    with pytest.raises(ConfigError, match="expired"):
        require_unexpired(TOKEN, TOKEN.expires_wall_ms)


def test_token_prints_without_its_secret() -> None:
    printed = f"{TOKEN} {TOKEN!r}"

    assert TOKEN.token_id in printed
    assert repr(TOKEN.secret) not in printed


def test_client_token_keeps_its_role() -> None:
    token = msgspec.structs.replace(TOKEN, role=Role.CLIENT)

    assert decode_join_token(encode_join_token(token)).role is Role.CLIENT


def test_join_token_lies_where_a_local_worker_finds_it(tmp_path: Path) -> None:
    data = DataDir(tmp_path / "data")
    assert load_join_token(data) is None

    save_join_token(data, TOKEN)

    found: JoinToken | None = load_join_token(data)
    assert found == TOKEN
    assert data.join_token_file.stat().st_mode & 0o777 == 0o600


def test_api_token_is_made_once_private_and_long(tmp_path: Path) -> None:
    data = DataDir(tmp_path / "data")

    token = load_or_create_api_token(data)

    assert load_or_create_api_token(data) == token
    assert len(token) >= 43
    assert data.api_token_file.stat().st_mode & 0o777 == 0o600
    assert same_secret(token, token)
    assert not same_secret(token[:-1], token)
    assert not same_secret("\udcff", token)


def test_api_token_that_somebody_shortened_is_refused(tmp_path: Path) -> None:
    data = DataDir(tmp_path / "data")
    load_or_create_api_token(data)
    data.api_token_file.write_text("123\n")

    with pytest.raises(StartError, match="too short"):
        load_or_create_api_token(data)
