"""The doorman: the right key, mechanism and domain, or no entry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqcluster.core.events import Principal
from zmqcluster.model import DeviceId, Role
from zmqcluster.security.zap import Allowlist, ZapHandler, user_id

KEY = b"k" * 32
WORKER = Principal(Role.WORKER, DeviceId("w1"))


def request(
    *,
    version: bytes = b"1.0",
    domain: bytes = b"dispatch",
    mechanism: bytes = b"CURVE",
    key: bytes = KEY,
) -> list[bytes]:
    return [version, b"req-1", domain, b"127.0.0.1", b"", mechanism, key]


def handler(principal: Principal = WORKER) -> ZapHandler:
    allowlist = Allowlist()
    allowlist.allow(KEY, principal)
    return ZapHandler(allowlist)


def test_known_key_passes_under_its_own_name() -> None:
    door = handler()

    assert door.answer(request()) == [
        b"1.0", b"req-1", b"200", b"OK", user_id(KEY).encode(), b"",
    ]  # fmt: skip
    assert (door.allowed, door.denied) == (1, 0)


@pytest.mark.parametrize(
    "refused",
    [
        request(key=b"x" * 32),
        request(key=KEY[:31]),
        request(key=b""),
        request(mechanism=b"NULL"),
        request(mechanism=b"PLAIN"),
        request(mechanism=b"curve"),
        request(domain=b""),
        request(domain=b"global"),
        request(version=b"2.0"),
        request()[:6],
        [*request(), b"more"],
        [],
        [b"1.0"],
    ],
)
def test_everything_else_is_refused_and_counted(refused: list[bytes]) -> None:
    door = handler()

    reply = door.answer(refused)

    assert reply[2] == b"400"
    assert reply[4] == b""
    assert (door.allowed, door.denied) == (0, 1)


@pytest.mark.parametrize(
    ("role", "domain", "passes"),
    [
        (Role.WORKER, b"dispatch", True),
        (Role.CLIENT, b"dispatch", True),
        (Role.ENROL, b"dispatch", True),
        (Role.WORKER, b"control", True),
        (Role.CLIENT, b"control", False),
        (Role.ENROL, b"control", False),
    ],
)
def test_hints_are_for_workers_only(role: Role, domain: bytes, passes: bool) -> None:
    reply = handler(Principal(role)).answer(request(domain=domain))

    assert reply[2] == (b"200" if passes else b"400")


def test_denied_key_is_a_stranger_again() -> None:
    allowlist = Allowlist()
    allowlist.allow(KEY, WORKER)
    door = ZapHandler(allowlist)
    assert allowlist.of_user_id(user_id(KEY)) == WORKER

    allowlist.deny(KEY)
    allowlist.deny(KEY)

    assert door.answer(request())[2] == b"400"
    assert allowlist.of_user_id(user_id(KEY)) is None
    assert len(allowlist) == 0


@given(st.lists(st.binary(max_size=40), max_size=9))
def test_no_frames_raise_or_pass(frames: list[bytes]) -> None:
    reply = handler().answer(frames)

    assert len(reply) == 6
    assert reply[2] == b"400"
