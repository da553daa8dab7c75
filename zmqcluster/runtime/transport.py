"""The cluster's sockets: everything ZeroMQ is set up, read and written here and nowhere else.

Plain threads, no asyncio; nothing here blocks. An object belongs to one thread at a time.

Master:  ROUTER (dispatch), PUB (hints), the ZAP door, and a monitor of the ROUTER.
Peer:    DEALER (dispatch), SUB (hints; workers only), and a monitor of the DEALER.
"""

from __future__ import annotations

import errno
import random
from enum import Enum, StrEnum
from typing import Final

import zmq
from msgspec import Struct
from zmq.utils import z85

from zmqcluster.core.events import Principal
from zmqcluster.model import FRAME_BYTES_MAX
from zmqcluster.runtime.connections import Connections
from zmqcluster.runtime.socket_options import (
    CONTROL_IN_BYTES_MAX,
    HINTS_HWM,
    PEER_RECEIVE_HWM,
    PEER_SEND_HWM,
    RECEIVE_HWM,
    RECONNECT_MAX_MS,
    RECONNECT_MS,
    SEND_HWM,
    WIRE_BYTES_MAX,
    Context,
    Monitor,
    Socket,
    bind_to,
    endpoint,
    lock_down,
    notice_dead_ends,
    require_descriptors,
)
from zmqcluster.security.keys import KeyPair
from zmqcluster.security.zap import (
    CONTROL_DOMAIN,
    DISPATCH_DOMAIN,
    ZAP_ENDPOINT,
    Allowlist,
    ZapHandler,
    user_id,
)

ZAP_REQUESTS_A_TURN: Final = 64

# What libzmq gives a peer that named no routing id of its own: a zero byte and a counter.
_AUTO_ID_BYTES: Final = 5

Received = tuple[bytes, Principal, bytes]


class Sent(Enum):
    """What became of a frame handed to the ROUTER."""

    SENT = "sent"
    # The peer's connection is closed: EHOSTUNREACH.
    GONE = "gone"
    # The peer does not read fast enough: EAGAIN. The frame was not sent.
    FULL = "full"


class Link(StrEnum):
    """What a peer's connection to the master went through."""

    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    # Nobody listens there (yet); libzmq tries again by itself.
    RETRYING = "retrying"
    # Our key is not known to the master. libzmq does not try again: recreate(), with back-off.
    REFUSED = "handshake_failed_auth"
    # The other end is no master of ours, or has another server key.
    FAILED = "handshake_failed_protocol"
    # The connection broke, or fell silent, in the middle of the handshake.
    BROKEN = "handshake_failed_no_detail"


class Counters(Struct):
    """What the master's sockets saw since they were opened. connections: open right now.

    handshakes_broken: connections that ended before anything was heard, but for those denied.
    """

    connections: int = 0
    received: int = 0
    dropped_shape: int = 0
    dropped_unknown_key: int = 0
    sent: int = 0
    sent_gone: int = 0
    sent_full: int = 0
    handshakes_allowed: int = 0
    handshakes_denied: int = 0
    handshakes_broken: int = 0


class MasterSockets:
    """The master's side: bound, authenticated, bounded.

    bind: address of both sockets. Ports of 0 take free ones; `dispatch_port` and `control_port`
    tell which. allowlist: changed by the owner at any time, effective at the next message.

    Raises StartError when a port is in use or the address is not ours.
    """

    def __init__(
        self,
        bind: str,
        dispatch_port: int,
        control_port: int,
        server_keys: KeyPair,
        allowlist: Allowlist,
    ) -> None:
        self.counters = Counters()
        self._allowlist = allowlist
        self._zap = ZapHandler(allowlist)
        self._connections = Connections()
        # Whose connection each one is that was heard: the user id of its key.
        self._user_ids: dict[bytes, str] = {}
        require_descriptors()
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, 64)
        try:
            # The doorman stands at the door before it opens.
            self._zap_socket = self._context.socket(zmq.REP)
            self._zap_socket.linger = 0
            self._zap_socket.bind(ZAP_ENDPOINT)
            self._router = self._router_socket(server_keys)
            self._monitor = Monitor(self._context, self._router, _MASTER_EVENTS)
            self._publisher = self._publisher_socket(server_keys)
            self.dispatch_port = bind_to(self._router, bind, dispatch_port, "dispatch_port")
            self.control_port = bind_to(self._publisher, bind, control_port, "control_port")
        except BaseException:
            self._context.destroy(linger=0)
            raise

    @property
    def sockets(self) -> tuple[Socket, ...]:
        """To be polled for POLLIN: call receive(), lost_peers() and answer_zap() when any is."""
        return (self._router, self._monitor.socket, self._zap_socket)

    def receive(self, frames_max: int, bytes_max: int = FRAME_BYTES_MAX) -> list[Received]:
        """What peers sent, at most this many messages, in order: (peer, principal, frame).

        bytes_max: no more is read once there is as much; the last frame may go beyond it.
        A message of any other shape than one frame, and any of a key that is not allowed (any
        more), is dropped and counted. 1.7 us a message of 100 bytes, all checks included.
        """
        received: list[Received] = []
        bytes_left = bytes_max
        for _ in range(frames_max):
            if bytes_left <= 0:
                break
            try:
                peer = self._router.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            frame = self._router.recv(zmq.NOBLOCK, copy=False)
            if frame.more or not _is_auto_id(peer):
                self.counters.dropped_shape += 1
                if frame.more:
                    _skip_rest(self._router)
                continue
            name = _user_id(frame)
            # Asked at each message and not kept by peer: 0.3 us, and a revocation bites at once.
            principal = self._allowlist.of_user_id(name)
            if principal is None:
                self.counters.dropped_unknown_key += 1
                continue
            self._note(peer, name, frame)
            received.append((peer, principal, frame.bytes))
            bytes_left -= len(frame)
        self.counters.received += len(received)
        return received

    def send(self, peer: bytes, frame: bytes) -> Sent:
        """Hand a frame to a peer without waiting. GONE and FULL: nothing was sent."""
        try:
            self._router.send(peer, zmq.SNDMORE | zmq.NOBLOCK)
            self._router.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            self.counters.sent_full += 1
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            self.counters.sent_gone += 1
            return Sent.GONE
        self.counters.sent += 1
        return Sent.SENT

    def publish(self, frame: bytes) -> None:
        """Tell every subscriber that keeps up."""
        self._publisher.send(frame, zmq.NOBLOCK)

    def lost_peers(self) -> list[bytes]:
        """Peers whose connection closed since the last call; only such that were heard before.

        Call receive() first: what a peer said last may still be unread, and a frame read after
        this makes the peer be named once more. A peer may be named twice, never wrongly. A send
        to it in the next instant may still say SENT: libzmq takes its queue down a little later.
        """
        self._drain_monitor()
        lost = self._connections.take_lost()
        for peer in lost:
            self._user_ids.pop(peer, None)
        return lost

    def peers_of(self, public_key: bytes) -> list[bytes]:
        """Peers with this key that were heard and are not lost: those of a key just denied."""
        name = user_id(public_key)
        return [peer for peer, other in self._user_ids.items() if other == name]

    def answer_zap(self) -> None:
        """Let in or turn away whoever is at the door. Nobody gets in while this is not called."""
        for _ in range(ZAP_REQUESTS_A_TURN):
            try:
                request = self._zap_socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._zap_socket.send_multipart(self._zap.answer(request), zmq.NOBLOCK)
        self.counters.handshakes_denied = self._zap.denied
        self.counters.handshakes_allowed = self._zap.allowed

    def serve_door(self, timeout_ms: int) -> None:
        """Wait a little for someone at the door and answer: for the start-up self-test."""
        if self._zap_socket.poll(timeout_ms):
            self.answer_zap()

    def close(self) -> None:
        """Close everything at once, unsent frames included; harmless when done twice."""
        if not self._context.closed:
            self._monitor.close()
            self._context.destroy(linger=0)

    def _router_socket(self, keys: KeyPair) -> Socket:
        router = self._context.socket(zmq.ROUTER)
        lock_down(router, keys, DISPATCH_DOMAIN)
        router.set(zmq.ROUTER_MANDATORY, 1)
        router.set(zmq.MAXMSGSIZE, WIRE_BYTES_MAX)
        router.set(zmq.RCVHWM, RECEIVE_HWM)
        router.set(zmq.SNDHWM, SEND_HWM)
        return router

    def _publisher_socket(self, keys: KeyPair) -> Socket:
        publisher = self._context.socket(zmq.PUB)
        lock_down(publisher, keys, CONTROL_DOMAIN)
        publisher.set(zmq.MAXMSGSIZE, CONTROL_IN_BYTES_MAX)
        publisher.set(zmq.SNDHWM, HINTS_HWM)
        return publisher

    def _note(self, peer: bytes, name: str, frame: zmq.Frame) -> None:
        descriptor = frame.get(zmq.SRCFD)
        if not self._connections.knows(peer, descriptor):
            self._user_ids[peer] = name
            self._drain_monitor()
            self._connections.heard(peer, descriptor)
            self.counters.connections = len(self._connections)

    def _drain_monitor(self) -> None:
        for event, value in self._monitor.events():
            if event == zmq.EVENT_ACCEPTED:
                self._connections.accepted(value)
            else:
                self._connections.disconnected(value)
        counters = self.counters
        counters.connections = len(self._connections)
        # Of those that left without a word, the door knows whom it turned away, and it may say so
        # before they are seen to leave.
        unheard = self._connections.unheard - self._zap.denied
        counters.handshakes_broken = max(counters.handshakes_broken, unheard)


class PeerSockets:
    """A worker's or client's side: connected to one master whose public key it knows.

    control_port: 0 for a peer that wants no hints. context: one for many peers of a process
    (load tests); else each has its own.
    """

    def __init__(
        self,
        master_host: str,
        dispatch_port: int,
        control_port: int,
        server_public: bytes,
        keys: KeyPair,
        context: Context | None = None,
    ) -> None:
        self.dropped_shape = 0
        self._host = master_host
        self._dispatch_port = dispatch_port
        self._control_port = control_port
        self._server_public = server_public
        self._keys = keys
        self._own_context = context is None
        self._context = context or zmq.Context()
        self._open()

    @property
    def sockets(self) -> tuple[Socket, ...]:
        """To be polled for POLLIN. Other sockets after recreate(): register them again."""
        return tuple(socket for socket in (self.dealer, self.hints, self._monitor.socket) if socket)

    def send(self, frame: bytes) -> bool:
        """Queue a frame for the master; False when the queue is full and nothing was queued.

        True promises nothing: keep what matters until it is acknowledged.
        """
        try:
            self.dealer.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self, frames_max: int) -> list[bytes]:
        """Frames from the master, in order, at most this many."""
        return self._drain(self.dealer, frames_max)

    def receive_hints(self, frames_max: int) -> list[bytes]:
        """Frames of the PUB socket, at most this many."""
        return self._drain(self.hints, frames_max) if self.hints is not None else []

    def poll_monitor(self) -> list[Link]:
        """What happened to the connection since the last call, in order."""
        return [_LINKS[event] for event, _ in self._monitor.events() if event in _LINKS]

    def poll(self, timeout_ms: int) -> bool:
        """Wait until a socket has something to read; False when the time is over."""
        poller = zmq.Poller()
        for socket in self.sockets:
            poller.register(socket, zmq.POLLIN)
        return bool(poller.poll(timeout_ms))

    def recreate(self) -> None:
        """Begin again with fresh sockets: the only way back after REFUSED. Unsent frames go."""
        self._close_sockets(linger_ms=0)
        self._open()

    def close(self, linger_ms: int = 0) -> None:
        """Close all; harmless when done twice.

        linger_ms: how long unsent frames (a Goodbye) may still leave; this blocks that long.
        """
        if self.dealer.closed:
            return
        self._close_sockets(linger_ms)
        if self._own_context:
            self._context.term()

    def _open(self) -> None:
        # libzmq doubles the interval without any jitter: a fleet would come back in step.
        jitter = random.uniform(0.75, 1.25)
        self.dealer = self._connecting(zmq.DEALER, jitter)
        self._monitor = Monitor(self._context, self.dealer, _PEER_EVENTS)
        self.dealer.connect(endpoint(self._host, self._dispatch_port))
        self.hints: Socket | None = None
        if self._control_port:
            self.hints = self._connecting(zmq.SUB, jitter)
            self.hints.subscribe(b"")
            self.hints.connect(endpoint(self._host, self._control_port))

    def _connecting(self, kind: int, jitter: float) -> Socket:
        socket = self._context.socket(kind)
        socket.set(zmq.CURVE_SERVERKEY, z85.encode(self._server_public))
        socket.set(zmq.CURVE_PUBLICKEY, z85.encode(self._keys.public))
        socket.set(zmq.CURVE_SECRETKEY, z85.encode(self._keys.secret))
        socket.set(zmq.RECONNECT_IVL, int(RECONNECT_MS * jitter))
        socket.set(zmq.RECONNECT_IVL_MAX, int(RECONNECT_MAX_MS * jitter))
        socket.set(zmq.SNDHWM, PEER_SEND_HWM)
        socket.set(zmq.RCVHWM, PEER_RECEIVE_HWM)
        socket.set(zmq.MAXMSGSIZE, WIRE_BYTES_MAX)
        notice_dead_ends(socket)
        if ":" in self._host:
            socket.set(zmq.IPV6, 1)
        return socket

    def _drain(self, socket: Socket, frames_max: int) -> list[bytes]:
        frames: list[bytes] = []
        for _ in range(frames_max):
            try:
                frame = socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            if frame.more:
                self.dropped_shape += 1
                _skip_rest(socket)
                continue
            frames.append(frame.bytes)
        return frames

    def _close_sockets(self, linger_ms: int) -> None:
        self._monitor.close()
        self.dealer.close(linger=linger_ms)
        if self.hints is not None:
            self.hints.close(linger=0)


def _skip_rest(socket: Socket) -> None:
    """Read and forget the other frames of a message; they are all here, libzmq sees to that."""
    while socket.recv(zmq.NOBLOCK, copy=False).more:
        pass


def _user_id(frame: zmq.Frame) -> str:
    """The name the doorman gave the sender's key; empty, and nobody's, if there is none."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""


def _is_auto_id(peer: bytes) -> bool:
    # A peer that names itself could come back as itself, or as another: see docs/security.md.
    return len(peer) == _AUTO_ID_BYTES and peer[0] == 0


# No others. libzmq 4.3.5 reports a frame it cannot open as HANDSHAKE_FAILED_PROTOCOL, whenever it
# comes, and where that is watched it then takes the connection for one that waits: nothing is read
# from it any more, and it is never closed, not even when its peer is gone. A descriptor each.
_MASTER_EVENTS: Final = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
_LINKS: Final[dict[int, Link]] = {
    zmq.EVENT_HANDSHAKE_SUCCEEDED: Link.CONNECTED,
    zmq.EVENT_DISCONNECTED: Link.DISCONNECTED,
    zmq.EVENT_CONNECT_RETRIED: Link.RETRYING,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: Link.REFUSED,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: Link.FAILED,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: Link.BROKEN,
}
_PEER_EVENTS: Final = sum(int(event) for event in _LINKS)
