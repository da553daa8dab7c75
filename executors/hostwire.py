"""What the agent, the warden and the executor hosts say to each other on one machine.

Frames on a stream socket: 4 bytes of length (big-endian), then one MessagePack array whose first
element is its tag. Both ends are ours, but a host also runs other people's code: whatever it writes
is decoded with all bounds, and a bad frame costs it its life.
"""

from __future__ import annotations

import signal
import struct
import time
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from executors.context import ExecutorSettings
from zmqcluster.errors import RemoteProtocolError
from zmqcluster.messages import (
    AttemptRef,
    ProgressNote,
    RateRule,
    TaskOrder,
    TaskResult,
    TypeOffer,
    Wire,
)
from zmqcluster.model import FRAME_BYTES_MAX, Pool

# One result with everything it carries fits into FRAME_BYTES_MAX; a batch ends above BATCH_BYTES.
BATCH_BYTES: Final = 1024 * 1024
HOST_FRAME_BYTES_MAX: Final = FRAME_BYTES_MAX + 2 * BATCH_BYTES
READ_BYTES: Final = 256 * 1024
NOTES_MAX: Final = 4096
STACK_SIGNAL: Final = signal.SIGUSR1

HostId = Annotated[int, Meta(ge=1)]


# --- agent to host ------------------------------------------------------------------------------


class Begin(Wire, frozen=True, tag="begin"):
    """First frame on a channel. modules: for a host that was not forked with them loaded."""

    pool: Pool
    settings: bytes
    modules: tuple[str, ...] = ()


class Run(Wire, frozen=True, tag="run"):
    """Run these. sent_ms: host_clock_ms(); the orders' start windows begin there."""

    orders: tuple[TaskOrder, ...]
    sent_ms: int


class Cancel(Wire, frozen=True, tag="cancel"):
    """Raise CancelledError in these, and report them when they are done with it."""

    refs: tuple[AttemptRef, ...]


class Ping(Wire, frozen=True, tag="ping"):
    """Are you there?"""

    seq: int


class Close(Wire, frozen=True, tag="close"):
    """Give back what runs, close what is open, exit."""


# --- host to agent ------------------------------------------------------------------------------


class Ready(Wire, frozen=True, tag="ready"):
    """Everything is loaded; from now on a death has to do with a task."""


class Began(Wire, frozen=True, tag="began"):
    """These attempts with a start window have reached what it guards, just now."""

    refs: Annotated[tuple[AttemptRef, ...], Meta(max_length=NOTES_MAX)]


class Finished(Wire, frozen=True, tag="finished"):
    """These attempts ended. last: this host takes no more, and is about to exit."""

    results: tuple[TaskResult, ...]
    last: bool = False


class Notes(Wire, frozen=True, tag="notes"):
    """What running tasks say meanwhile."""

    progress: Annotated[tuple[ProgressNote, ...], Meta(max_length=NOTES_MAX)] = ()
    rates: Annotated[tuple[RateRule, ...], Meta(max_length=NOTES_MAX)] = ()


class Pong(Wire, frozen=True, tag="pong"):
    """Here."""

    seq: int


# --- agent to warden (Ping too), and back (Pong) ------------------------------------------------


class Load(Wire, frozen=True, tag="load"):
    """First frame. start_method: "fork" (from the warden, modules loaded) or "spawn" (fresh)."""

    modules: tuple[str, ...]
    built_in: tuple[str, ...]
    start_method: str


class Spawn(Wire, frozen=True, tag="spawn"):
    """Start a host. Two descriptors come along: its channel, and where its output goes."""

    host_id: HostId


class Kill(Wire, frozen=True, tag="kill"):
    """Kill this host with everything it ever started."""

    host_id: HostId


class ShowStack(Wire, frozen=True, tag="show_stack"):
    """Make this host print where its main thread is, even if it holds the interpreter lock."""

    host_id: HostId


class Loaded(Wire, frozen=True, tag="loaded"):
    """All modules are in. pid: the warden's."""

    offers: tuple[TypeOffer, ...]
    pid: int


class LoadFailed(Wire, frozen=True, tag="load_failed"):
    """A module cannot be used: becomes ConfigError(key, problem)."""

    key: str
    problem: str


class Spawned(Wire, frozen=True, tag="spawned"):
    """The host lives, as pid."""

    host_id: HostId
    pid: int


class Exited(Wire, frozen=True, tag="exited"):
    """The host and everything below it is gone. status: negative signal, or exit code.

    orphans: processes it left behind, killed. problem: why it could not even be started.
    """

    host_id: HostId
    status: int
    orphans: int = 0
    problem: str = ""


ToHost = Begin | Run | Cancel | Ping | Close
FromHost = Ready | Began | Finished | Notes | Pong
ToWarden = Load | Spawn | Kill | ShowStack | Ping
FromWarden = Loaded | LoadFailed | Spawned | Exited | Pong

TO_HOST: Final[msgspec.msgpack.Decoder[ToHost]] = msgspec.msgpack.Decoder(ToHost)
FROM_HOST: Final[msgspec.msgpack.Decoder[FromHost]] = msgspec.msgpack.Decoder(FromHost)
TO_WARDEN: Final[msgspec.msgpack.Decoder[ToWarden]] = msgspec.msgpack.Decoder(ToWarden)
FROM_WARDEN: Final[msgspec.msgpack.Decoder[FromWarden]] = msgspec.msgpack.Decoder(FromWarden)
SETTINGS: Final = msgspec.msgpack.Decoder(ExecutorSettings)

_ENCODER: Final = msgspec.msgpack.Encoder()
_LENGTH: Final = struct.Struct(">I")


def frame(message: ToHost | FromHost | ToWarden | FromWarden) -> bytes:
    """The bytes of one message, length first."""
    body = _ENCODER.encode(message)
    return _LENGTH.pack(len(body)) + body


def pack_settings(settings: ExecutorSettings) -> bytes:
    """For Begin: settings are a map, so that they may grow."""
    return _ENCODER.encode(settings)


def host_clock_ms() -> int:
    """A monotonic clock that all processes of this machine share; only compared with itself."""
    return time.monotonic_ns() // 1_000_000


class Framer:
    """Cuts a byte stream into messages of one union."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[Any]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()
        self._broken: RemoteProtocolError | None = None

    def feed(self, data: bytes | memoryview) -> list[Any]:
        """The messages that are complete now, in order.

        Raises RemoteProtocolError for a frame that is too long or no message; the stream is
        beyond repair then. What was said before it still counts: it is returned, and check()
        (or the next call) raises.
        """
        self.check()
        buffer = self._buffer
        buffer += data
        messages: list[Any] = []
        start, end = 0, len(buffer)
        with memoryview(buffer) as view:
            while end - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(view, start)
                try:
                    if length > HOST_FRAME_BYTES_MAX:
                        raise RemoteProtocolError(f"frame of {length} bytes between processes")
                    body = start + _LENGTH.size
                    if end - body < length:
                        break
                    messages.append(self._decode(view[body : body + length]))
                except RemoteProtocolError as error:
                    self._broken = error
                    break
                start = body + length
        del buffer[:start]
        if not messages:
            self.check()
        return messages

    def check(self) -> None:
        """Raises the RemoteProtocolError after which nothing more can be read, if there was one."""
        if self._broken is not None:
            raise self._broken

    def _decode(self, body: memoryview) -> Any:
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RemoteProtocolError(f"bad frame between processes: {error}") from None
        finally:
            body.release()
