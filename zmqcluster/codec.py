"""Frame to message and back. Whatever the bytes, a bad frame is a RemoteProtocolError."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from zmqcluster.errors import LocalProtocolError, RemoteProtocolError
from zmqcluster.messages import (
    ClientMessage,
    Enrol,
    Hint,
    Inbound,
    Message,
    ToClient,
    ToWorker,
    WorkerMessage,
)
from zmqcluster.model import FRAME_BYTES_MAX, Role

# Which messages a role may send is the type its frames are decoded as: a worker's "submit" is as
# undecodable as noise.
_INBOUND: Final[dict[Role, msgspec.msgpack.Decoder[Any]]] = {
    Role.ENROL: msgspec.msgpack.Decoder(Enrol),
    Role.WORKER: msgspec.msgpack.Decoder(WorkerMessage),
    Role.CLIENT: msgspec.msgpack.Decoder(ClientMessage),
}
_TO_WORKER: Final[msgspec.msgpack.Decoder[Any]] = msgspec.msgpack.Decoder(ToWorker)
_TO_CLIENT: Final[msgspec.msgpack.Decoder[Any]] = msgspec.msgpack.Decoder(ToClient)
_HINT: Final[msgspec.msgpack.Decoder[Any]] = msgspec.msgpack.Decoder(Hint)
_ENCODER: Final = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """One wire frame.

    Raises LocalProtocolError when it would exceed FRAME_BYTES_MAX: the sender splits its batches.
    """
    frame = _ENCODER.encode(message)
    if len(frame) > FRAME_BYTES_MAX:
        name = type(message).__name__
        raise LocalProtocolError(f"{name} of {len(frame)} bytes, at most {FRAME_BYTES_MAX}")
    return frame


def decode_inbound(role: Role, frame: bytes) -> Inbound:
    """A frame the master received from a peer of this role.

    frame: untrusted bytes, at most FRAME_BYTES_MAX long; longer is refused unread.

    Raises RemoteProtocolError, and never any other error, whatever the bytes.
    """
    message: Inbound = _decode(_INBOUND[role], frame)
    return message


def decode_to_worker(frame: bytes) -> ToWorker:
    """A frame a worker received from its master; same promise as decode_inbound."""
    message: ToWorker = _decode(_TO_WORKER, frame)
    return message


def decode_to_client(frame: bytes) -> ToClient:
    """A frame a client received from the master; same promise as decode_inbound."""
    message: ToClient = _decode(_TO_CLIENT, frame)
    return message


def decode_hint(frame: bytes) -> Hint:
    """A frame from the PUB socket; same promise as decode_inbound."""
    message: Hint = _decode(_HINT, frame)
    return message


def _decode(decoder: msgspec.msgpack.Decoder[Any], frame: bytes) -> Any:
    if len(frame) > FRAME_BYTES_MAX:
        raise RemoteProtocolError(f"frame of {len(frame)} bytes, at most {FRAME_BYTES_MAX}")
    try:
        return decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(str(error)) from None
