"""Peers that do not behave: with a key of their own and any bytes, or with no ZeroMQ at all."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any, Final, Self

import zmq
from zmq.utils import z85

from zmqcluster import codec
from zmqcluster.messages import (
    Capabilities,
    Enrol,
    Enrolled,
    Heartbeat,
    Held,
    Hello,
    Inbound,
    PoolOffer,
    Resources,
    ToWorker,
    TypeOffer,
)
from zmqcluster.model import PROTOCOL_VERSION, DeviceId, Pool
from zmqcluster.security.datadir import DataDir
from zmqcluster.security.keys import KeyPair, load_key_pair, load_public_key, new_key_pair
from zmqcluster.security.tokens import load_join_token

ANSWER_S: Final = 8.0
# A ZMTP 3.1 greeting for CURVE, and a HELLO of the right shape that opens no box.
GREETING: Final = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
COMMAND: Final = b"\x04\xc8\x05HELLO\x01\x00" + bytes(72) + b"k" * 32 + bytes(8) + b"b" * 80


class Peer:
    """A DEALER with these keys. Everything it is told is kept in `heard`, undecoded."""

    def __init__(self, port: int, server_public: bytes | None, keys: KeyPair | None) -> None:
        self.heard: list[bytes] = []
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        if server_public is not None and keys is not None:
            self.socket.curve_serverkey = z85.encode(server_public)
            self.socket.curve_publickey = z85.encode(keys.public)
            self.socket.curve_secretkey = z85.encode(keys.secret)
        self.socket.connect(f"tcp://127.0.0.1:{port}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def say(self, *messages: Inbound | bytes) -> None:
        """Waits while the master takes no more."""
        for message in messages:
            frame = message if isinstance(message, bytes) else codec.encode(message)
            assert self.socket.poll(int(ANSWER_S * 1000), zmq.POLLOUT), "the master takes nothing"
            self.socket.send(frame)

    def try_say(self, frame: bytes) -> bool:
        """Without waiting; whether it went into the queue."""
        try:
            self.socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def hear(self, within_s: float = ANSWER_S) -> bytes | None:
        """The next frame, or None when nothing comes."""
        if not self.socket.poll(int(within_s * 1000)):
            return None
        frame: bytes = self.socket.recv()
        self.heard.append(frame)
        return frame

    def hears(self, kind: type[Any], within_s: float = ANSWER_S) -> Any:
        """The next message of this kind; others on the way are passed over."""
        deadline = time.monotonic() + within_s
        while (left_s := deadline - time.monotonic()) > 0:
            frame = self.hear(left_s)
            if frame is not None:
                message: ToWorker = codec.decode_to_worker(frame)
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind.__name__} within {within_s} s")


class Door:
    """What lies in a data directory, as seen by somebody who may read it."""

    def __init__(self, data_dir: Path, dispatch_port: int) -> None:
        self.port = dispatch_port
        self.data_dir = data_dir
        public = load_public_key(data_dir / "keys" / "server.pub")
        assert public is not None
        self.server_public = public

    def peer(self, keys: KeyPair) -> Peer:
        return Peer(self.port, self.server_public, keys)

    def client(self) -> Peer:
        """With the key of the command line."""
        keys = load_key_pair(self.data_dir / "keys", "client")
        assert keys is not None
        return self.peer(keys)

    def enrol(self, device_id: str) -> KeyPair:
        """The keys of a device that joined as it should."""
        token = load_join_token(DataDir(self.data_dir))
        assert token is not None
        keys = new_key_pair()
        with self.peer(token.bootstrap_keys) as newcomer:
            newcomer.say(Enrol(PROTOCOL_VERSION, keys.public, DeviceId(device_id)))
            newcomer.hears(Enrolled)
        return keys


def hello(device_id: str, *types: str, slots: int = 0, **fields: Any) -> Hello:
    """Of a device with these asynchronous task types."""
    given: dict[str, Any] = {
        "version": PROTOCOL_VERSION,
        "device_id": DeviceId(device_id),
        "boot_id": os.urandom(16),
        "name": device_id,
        "capabilities": Capabilities(),
        "task_types": tuple(TypeOffer(one, Pool.ASYNC) for one in types),
        "pools": (PoolOffer(Pool.ASYNC, slots),),
        "labels": (),
        "credit": slots,
    }
    return Hello(**(given | fields))


def beat(seq: int = 1, credit: int = 0, held: tuple[Held, ...] = ()) -> Heartbeat:
    return Heartbeat(seq, seq, Resources(), len(held), credit, seq, held)


@contextlib.contextmanager
def connected(ports: Iterable[int], first_words: bytes = b"") -> Iterator[list[socket.socket]]:
    """A plain connection to each of these ports, held open."""
    with contextlib.ExitStack() as stack:
        lines = []
        for port in ports:
            try:
                line = stack.enter_context(socket.create_connection(("127.0.0.1", port), 2))
            except OSError:
                continue
            with contextlib.suppress(OSError):
                line.sendall(first_words)
            lines.append(line)
        yield lines


def knock(port: int, words: bytes, patience_s: float = 0.0) -> bytes:
    """Say this on a fresh connection; what came back until it was closed, or patience ended."""
    answer = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as line:
        line.sendall(words)
        line.settimeout(patience_s or 0.001)
        while block := line.recv(65536):
            answer += block
    return answer


def is_closed_by_peer(line: socket.socket) -> bool:
    """Whether the other side has hung up; what it said is thrown away."""
    line.setblocking(False)
    try:
        while line.recv(65536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def mangled(words: bytes, rng: Random) -> bytes:
    """A few bytes changed, or the end cut off, or something put in."""
    changed = bytearray(words)
    match rng.randrange(4):
        case 0:
            return bytes(changed[: rng.randrange(len(changed) + 1)])
        case 1:
            at = rng.randrange(len(changed))
            changed[at:at] = rng.randbytes(rng.randrange(1, 40))
        case _:
            for _ in range(rng.randrange(1, 5)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)
