"""How every socket of the cluster is set up: options, limits, binding, watching.

The reasons stand beside the figures; docs/security.md says which threat each one answers.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import resource
import struct
from typing import Final

import zmq
from zmq.utils import z85

from zmqcluster.errors import StartError
from zmqcluster.model import FRAME_BYTES_MAX
from zmqcluster.security.keys import KeyPair

# A handshake takes 0.4 ms, but 10,000 of them queue up when a whole fleet comes back: with 3 s up
# to half were cut off and began again, with 15 s none of 5,000 devices was (back in 12 s, measured
# on two busy cores with the devices on them). A silent stranger holds a descriptor that long.
HANDSHAKE_MS: Final = 15_000
# A silent connection is probed by the kernel: dead after 10 + 3 * 3 s without an answer.
KEEPALIVE_IDLE_S: Final = 10
KEEPALIVE_INTERVAL_S: Final = 3
KEEPALIVE_MISSES: Final = 3
TCP_STALL_MS: Final = 20_000
BACKLOG: Final = 4096
# Messages per peer, not bytes. 5,000 flooding peers cost 911 MiB with the default of 1,000 and
# 351 MiB with 16, at twice the throughput (measured for this project).
RECEIVE_HWM: Final = 16
SEND_HWM: Final = 64
# libzmq compares its limit with the encrypted frame, longer by command name, nonce, tag and flags.
# Without these 33 bytes a frame of exactly FRAME_BYTES_MAX cost its sender the connection.
WIRE_BYTES_MAX: Final = FRAME_BYTES_MAX + 33
# Subscriptions are all a peer may say to the PUB socket.
CONTROL_IN_BYTES_MAX: Final = 4096
HINTS_HWM: Final = 1000
RECONNECT_MS: Final = 100
RECONNECT_MAX_MS: Final = 2_000
PEER_SEND_HWM: Final = 1000
PEER_RECEIVE_HWM: Final = 1000
# A master without any peer has 36 open. libzmq aborts the process where it cannot open its own.
DESCRIPTORS_MIN: Final = 64

Socket = zmq.Socket[bytes]
Context = zmq.Context[Socket]

_MONITOR_HEAD: Final = struct.Struct("=Hi")
_MONITOR_NUMBERS: Final = itertools.count()


class Monitor:
    """Connection events of one socket, as (event, value) pairs."""

    def __init__(self, context: Context, watched: Socket, events: int) -> None:
        address = f"inproc://monitor.{next(_MONITOR_NUMBERS)}"
        self._watched = watched
        watched.monitor(address, events)
        self.socket = context.socket(zmq.PAIR)
        self.socket.linger = 0
        # libzmq's I/O thread blocks, and all traffic with it, when a monitor's queue is full.
        self.socket.set(zmq.RCVHWM, 0)
        self.socket.connect(address)

    def events(self) -> list[tuple[int, int]]:
        """All that happened since the last call, in order.

        All, because whose connection a message came through is only known from what was before
        it; making an event (a connection) takes libzmq far longer than reading it takes us.
        """
        pairs: list[tuple[int, int]] = []
        with contextlib.suppress(zmq.Again):
            while True:
                head, _endpoint = self.socket.recv_multipart(zmq.NOBLOCK)
                pairs.append(_MONITOR_HEAD.unpack(head))
        return pairs

    def close(self) -> None:
        if not self.socket.closed:
            with contextlib.suppress(zmq.ZMQError):
                self._watched.disable_monitor()
            self.socket.close(linger=0)


def raise_descriptor_limit() -> int:
    """Let this process have as many descriptors as it may; a connected device takes two.

    Out of descriptors, libzmq's listener spins on a core. Returns the limit now in force.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def require_descriptors() -> None:
    """Raises StartError when this process may not open enough for a master."""
    limit = raise_descriptor_limit()
    if limit < DESCRIPTORS_MIN:
        raise StartError(
            f"this process may open {limit} files and sockets, and a master needs at least "
            f"{DESCRIPTORS_MIN}, and two for each device: raise the limit (`ulimit -n 4096`)"
        )


def lock_down(socket: Socket, keys: KeyPair, domain: bytes) -> None:
    # All before bind: what is set later does not count, and a NULL client would be let in.
    socket.set(zmq.CURVE_SERVER, 1)
    socket.set(zmq.CURVE_SECRETKEY, z85.encode(keys.secret))
    socket.set(zmq.ZAP_DOMAIN, domain)
    socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)
    socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.set(zmq.BACKLOG, BACKLOG)
    socket.set(zmq.LINGER, 0)
    notice_dead_ends(socket)


def notice_dead_ends(socket: Socket) -> None:
    """A host that vanished without a word is noticed by the kernel, whatever Python is at.

    Not by ZMTP heartbeats: libzmq looks through all timers of an I/O thread to cancel one, so
    3,000 idle devices cost the master 23 % of a core with them, and 0.7 % with these probes.
    """
    socket.set(zmq.TCP_KEEPALIVE, 1)
    socket.set(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_IDLE_S)
    socket.set(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_INTERVAL_S)
    socket.set(zmq.TCP_KEEPALIVE_CNT, KEEPALIVE_MISSES)
    socket.set(zmq.TCP_MAXRT, TCP_STALL_MS)


def bind_to(socket: Socket, address: str, port: int, key: str) -> int:
    if ":" in address:
        socket.set(zmq.IPV6, 1)
    try:
        socket.bind(endpoint(address, port or "*"))
    except zmq.ZMQError as error:
        raise StartError(_why_not_bound(error, address, port, key)) from None
    bound = socket.get(zmq.LAST_ENDPOINT)
    assert isinstance(bound, bytes)
    return int(bound.decode("ascii").rstrip("\0").rpartition(":")[2])


def _why_not_bound(error: zmq.ZMQError, address: str, port: int, key: str) -> str:
    flag = "--" + key.replace("_", "-")
    match error.errno:
        case errno.EADDRINUSE:
            return (
                f"port {port} is in use on {address}: stop the program that uses it "
                f"(another master?), or choose another port with {flag}"
            )
        case errno.EACCES:
            return f"port {port} needs more rights: choose one above 1023 with {flag}"
        case _:
            why = zmq.strerror(error.errno or 0)
            return f"cannot listen on {address}:{port} ({why}): check --bind and {flag}"


def endpoint(host: str, port: int | str) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
