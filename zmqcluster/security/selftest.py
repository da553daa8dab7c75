"""Before serving, the master tries its own locks: a stranger and a bare client must be refused.

A wrong order of socket options, or a ZAP handler that is not there, leaves a ROUTER that looks
right and lets everybody in. So it is tried, at the real ports, at each start.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

import zmq
from zmq.utils import z85

from zmqcluster.errors import StartError
from zmqcluster.security.keys import KeyPair, new_key_pair

TURN_MS: Final = 10
# A restart can meet a whole fleet at its door, each of its members to be let in before a knock.
PATIENCE_MS: Final = 5_000
_ANY_HOST: Final = {"0.0.0.0": "127.0.0.1", "*": "127.0.0.1", "::": "::1"}
_EVENTS: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)
_AUTH: Final = int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
_IN: Final = int(zmq.EVENT_HANDSHAKE_SUCCEEDED)


def check_doors(
    bind: str,
    dispatch_port: int,
    control_port: int,
    server_public: bytes,
    serve_door: Callable[[int], None],
    now_ms: Callable[[], int],
    patience_ms: int = PATIENCE_MS,
) -> None:
    """Knock at both ports as somebody who must not get in. Takes about 20 ms.

    serve_door(timeout_ms): lets the master answer its door meanwhile, in this thread.

    Raises StartError when a knock got in, or was not answered within patience_ms of now_ms().
    """
    context = zmq.Context()
    try:
        knocks = [
            _Knock(context, kind, host_port, keys, server_public)
            for kind, host_port in (
                (zmq.DEALER, (bind, dispatch_port)),
                (zmq.SUB, (bind, control_port)),
            )
            for keys in (new_key_pair(), None)
        ]
        end_ms = now_ms() + patience_ms
        while now_ms() < end_ms:
            serve_door(TURN_MS)
            if all([knock.is_answered() for knock in knocks]):
                return
        unanswered = next(knock for knock in knocks if not knock.is_answered())
        raise StartError(
            f"security self-test: {unanswered.name} got no refusal in time; the master does not "
            "serve. Is the machine overloaded? Start it again"
        )
    finally:
        context.destroy(linger=0)


class _Knock:
    """One attempt to get in: with a key nobody knows, or (keys None) with no security at all."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        kind: int,
        host_port: tuple[str, int],
        keys: KeyPair | None,
        server_public: bytes,
    ) -> None:
        host, port = host_port
        host = _ANY_HOST.get(host, host)
        self.name = f"{'a stranger' if keys else 'a bare client'} at port {port}"
        self._must_fail_with = {_AUTH} if keys else _REFUSALS
        self._refused = False
        self._socket = context.socket(kind)
        self._socket.linger = 0
        if keys is not None:
            self._socket.set(zmq.CURVE_SERVERKEY, z85.encode(server_public))
            self._socket.set(zmq.CURVE_PUBLICKEY, z85.encode(keys.public))
            self._socket.set(zmq.CURVE_SECRETKEY, z85.encode(keys.secret))
        self._monitor = self._socket.get_monitor_socket(_EVENTS)
        self._monitor.linger = 0
        if ":" in host:
            self._socket.set(zmq.IPV6, 1)
            host = f"[{host}]"
        self._socket.connect(f"tcp://{host}:{port}")

    def is_answered(self) -> bool:
        """True once it was refused. Raises StartError when it got in."""
        while not self._refused and self._monitor.poll(0):
            event = int.from_bytes(self._monitor.recv_multipart()[0][:2], sys.byteorder)
            if event == _IN:
                raise StartError(
                    f"security self-test: {self.name} was let in; the master does not serve. "
                    "This is a bug: please report it"
                )
            self._refused = event in self._must_fail_with
        return self._refused


_REFUSALS: Final = frozenset(
    {
        int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL),
        int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL),
        int(zmq.EVENT_DISCONNECTED),
    }
)
