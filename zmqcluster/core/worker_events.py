"""What goes into WorkerCore.handle() and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from zmqcluster.messages import (
    AttemptRef,
    Capabilities,
    Hint,
    Labels,
    PoolOffer,
    ProgressNote,
    RateRule,
    Resources,
    Started,
    TaskOrder,
    TaskResult,
    ToWorker,
    TypeOffer,
    WorkerMessage,
)
from zmqcluster.model import DeviceId, Outcome


class WorkerSettings(Struct, frozen=True):
    """Who this device is and what it may hold. The master's Welcome overrides both intervals.

    boot_id: 16 random bytes of this process. master: "host:port", for people.
    running_max: most tasks at once over all pools, 0 is no cap but the slots.
    kept_bytes_max: unacknowledged results beyond this stop the intake of work.
    refused_key_advice: what a person can do when the master refuses this worker's key.
    """

    device_id: DeviceId
    boot_id: bytes
    name: str = ""
    capabilities: Capabilities = Capabilities()
    task_types: tuple[TypeOffer, ...] = ()
    pools: tuple[PoolOffer, ...] = ()
    labels: Labels = ()
    master: str = "the master"
    running_max: int = 0
    heartbeat_interval_ms: int = 5_000
    device_timeout_ms: int = 15_000
    kept_bytes_max: int = 256 * 1024 * 1024
    refused_key_advice: str = "the master does not accept this worker's key: join again"


# --- events --------------------------------------------------------------------------------------


class Connected(Struct, frozen=True):
    """A connection to the master stands, and both sides proved who they are."""


class Disconnected(Struct, frozen=True):
    """The connection is gone; the transport tries again by itself."""


class KeyRefused(Struct, frozen=True):
    """The master does not let this worker's key in; the transport has given up."""


class HandshakeFailed(Struct, frozen=True):
    """Something answers there, but the handshake broke: another master's key, or none at all."""


class FromMaster(Struct, frozen=True):
    """A decoded message of the dispatch socket, or a hint of the control socket."""

    message: ToWorker | Hint


HostReport = Started | TaskResult | ProgressNote | RateRule


class HostsReported(Struct, frozen=True):
    """News of the executor hosts, in the order it happened."""

    reports: Sequence[HostReport]


class Sampled(Struct, frozen=True):
    """What this device uses right now, for the next heartbeat."""

    resources: Resources


class Terminated(Struct, frozen=True):
    """Somebody asked this process to end: the first time it drains, the second it stops."""


WorkerEvent = (
    Connected
    | Disconnected
    | KeyRefused
    | HandshakeFailed
    | FromMaster
    | HostsReported
    | Sampled
    | Terminated
)

# --- effects, to be carried out in order --------------------------------------------------------


class SendToMaster(Struct, frozen=True):
    """Hand this to the dispatch socket without waiting. Losing it costs time, never truth."""

    message: WorkerMessage


class RunTasks(Struct, frozen=True):
    """Start these in the executor hosts; each has a free slot."""

    orders: tuple[TaskOrder, ...]


class KillTask(Struct, frozen=True):
    """End this run, with its whole process tree, and report it once nothing is left of it."""

    ref: AttemptRef
    outcome: Outcome


class SpoolResults(Struct, frozen=True):
    """Keep these where a restart of this process finds them."""

    results: tuple[TaskResult, ...]


class ForgetResults(Struct, frozen=True):
    """These need not be kept any longer."""

    refs: tuple[AttemptRef, ...]


class Reconnect(Struct, frozen=True):
    """Throw the sockets away and connect anew."""


class StopWorker(Struct, frozen=True):
    """The end: close everything and exit with code."""

    code: int
    text: str


class Say(Struct, frozen=True):
    """A line for the operator. level: "info", "warning" or "error"."""

    level: str
    text: str


WorkerEffect = (
    SendToMaster | RunTasks | KillTask | SpoolResults | ForgetResults | Reconnect | StopWorker | Say
)
