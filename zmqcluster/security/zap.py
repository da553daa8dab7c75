"""The doorman: which public keys pass, and as whom (ZAP 1.0, RFC 27). Pure: frames in, frames out.

Fails closed: what is not a CURVE request for a domain of ours with an allowed key is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from zmqcluster.core.events import Principal
from zmqcluster.model import Role

ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
DISPATCH_DOMAIN: Final = b"dispatch"
CONTROL_DOMAIN: Final = b"control"

# A bootstrap key may only enrol, and a client hears no hints.
DOMAIN_ROLES: Final[Mapping[bytes, frozenset[Role]]] = {
    DISPATCH_DOMAIN: frozenset(Role),
    CONTROL_DOMAIN: frozenset({Role.WORKER}),
}

_VERSION: Final = b"1.0"
# version, request id, domain, address, routing id, mechanism, the client's public key.
_CURVE_FRAMES: Final = 7
_KEY_BYTES: Final = 32


def user_id(public_key: bytes) -> str:
    """The name libzmq attaches to every message of this key."""
    return public_key.hex()


class Allowlist:
    """Public keys that pass, each with its principal. For one thread.

    Looked up at the handshake by key, and again at every message by user id: a revoked key that
    is still connected is cut off at its next message.
    """

    def __init__(self) -> None:
        self._by_user_id: dict[str, Principal] = {}

    def allow(self, public_key: bytes, principal: Principal) -> None:
        """From now on this key passes, as this principal. Again: the principal is replaced."""
        self._by_user_id[user_id(public_key)] = principal

    def deny(self, public_key: bytes) -> None:
        """From now on nothing of this key passes; harmless for an unknown key."""
        self._by_user_id.pop(user_id(public_key), None)

    def of_key(self, public_key: bytes) -> Principal | None:
        return self._by_user_id.get(user_id(public_key))

    def of_user_id(self, name: str) -> Principal | None:
        return self._by_user_id.get(name)

    def __len__(self) -> int:
        return len(self._by_user_id)

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_user_id)


class ZapHandler:
    """Answers libzmq's questions about connecting peers. allowed, denied: how many so far."""

    def __init__(self, allowlist: Allowlist) -> None:
        self._allowlist = allowlist
        self.allowed = 0
        self.denied = 0

    def answer(self, frames: Sequence[bytes]) -> list[bytes]:
        """The reply to one request, whatever it holds.

        200 with the user id, or 400: libzmq then refuses the peer for good. Never 300 ("try
        again later"): a refused client that keeps trying costs us a handshake each time.
        """
        request_id = frames[1] if len(frames) > 1 else b""
        name = self._user_id(frames)
        if name is None:
            self.denied += 1
            return [_VERSION, request_id, b"400", b"key not known here", b"", b""]
        self.allowed += 1
        return [_VERSION, request_id, b"200", b"OK", name.encode("ascii"), b""]

    def _user_id(self, frames: Sequence[bytes]) -> str | None:
        if len(frames) != _CURVE_FRAMES:
            return None
        version, _, domain, _, _, mechanism, key = frames
        if version != _VERSION or mechanism != b"CURVE" or len(key) != _KEY_BYTES:
            return None
        principal = self._allowlist.of_key(key)
        roles = DOMAIN_ROLES.get(domain)
        if principal is None or roles is None or principal.role not in roles:
            return None
        return user_id(key)
