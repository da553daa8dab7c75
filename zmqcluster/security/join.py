"""How a worker gets an identity of its own that the master knows.

    folder has keys and the master's public key ............ known: nothing to do
    a join token (given, or left by the master in data_dir)  enrol with its bootstrap key
    neither, but the master is on this machine ............. wait for it to leave a token
    neither ................................................ say what is missing

The own key pair is on disk before it is sent, and `server.pub` is written only after the master
said yes: a process killed in between asks again with the same key, which costs no second use.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from msgspec import Struct

from zmqcluster.codec import decode_to_worker, encode
from zmqcluster.errors import ConfigError, MasterUnreachable, RemoteProtocolError, StartError
from zmqcluster.messages import Enrol, Enrolled, Refused
from zmqcluster.model import PROTOCOL_VERSION, DeviceId, RefusalCode, Role, SchedulerMode
from zmqcluster.security.datadir import DataDir, WorkerFolder, make_device_id
from zmqcluster.security.keys import (
    KeyPair,
    load_key_pair,
    load_or_create_key_pair,
    load_public_key,
    save_public_key,
)
from zmqcluster.security.tokens import (
    JoinToken,
    decode_join_token,
    load_join_token,
    require_unexpired,
)

KEY_NAME: Final = "worker"
LOCAL_HOSTS: Final = frozenset({"localhost", "127.0.0.1", "::1"})
# What a configuration says when nobody said anything; tests compare it with the configuration.
DEFAULT_MASTER_PORT: Final = 7989
POLL_MS: Final = 200
# The master commits before it answers; asked again with the same key, it only answers again.
ASK_AGAIN_MS: Final = 5_000
FIRST_WORDS_MS: Final = 2_000
SAY_EVERY_MS: Final = 30_000
# A master that starts at this moment may leave a new token between our reading and our knocking.
LOCAL_TRIES: Final = 5
LOCAL_RETRY_MS: Final = 1_000


class Clock(Protocol):
    def monotonic_ms(self) -> int: ...
    def wall_ms(self) -> int: ...


class Channel(Protocol):
    """A connection to the master: runtime.transport.PeerSockets."""

    def send(self, frame: bytes) -> bool: ...
    def receive(self, frames_max: int) -> list[bytes]: ...
    def poll_monitor(self) -> Sequence[str]: ...
    def poll(self, timeout_ms: int) -> bool: ...
    def close(self) -> None: ...


# host, dispatch port, control port (0: none), the server's public key, the keys to use.
Connect = Callable[[str, int, int, bytes, KeyPair], Channel]


class JoinConfig(Protocol):
    """The part of ClusterConfig that matters here."""

    @property
    def device_id(self) -> str: ...
    @property
    def device_name(self) -> str: ...
    @property
    def join_token(self) -> str: ...
    @property
    def master_host(self) -> str: ...
    @property
    def master_port(self) -> int: ...
    @property
    def dispatch_port(self) -> int: ...
    @property
    def control_port(self) -> int: ...


class Identity(Struct, frozen=True):
    """Who this worker is, and where and how it recognises its master."""

    device_id: DeviceId
    keys: KeyPair
    server_public: bytes
    master_host: str
    dispatch_port: int
    control_port: int


class _TokenRefused(Exception):
    """The master does not know the bootstrap key."""


def ensure_enrolled(
    config: JoinConfig,
    data_dir: DataDir,
    folder: WorkerFolder,
    *,
    connect: Connect,
    clock: Clock,
    rng: random.Random,
    say: Callable[[str], None],
    stop: threading.Event,
    patience_ms: int | None = None,
) -> Identity | None:
    """The identity of the worker that holds this folder; None when `stop` came first.

    Blocks while the master is away, says so once, and again every 30 s. patience_ms: give up
    after so long; None never does.

    Raises ConfigError or StartError when waiting will not help, and MasterUnreachable when
    patience is over.
    """
    wait = _Wait(clock, say, stop, patience_ms)
    given = decode_join_token(config.join_token) if config.join_token else None
    device_id = _settle_device_id(config, folder, clock, rng)
    for _ in range(LOCAL_TRIES):
        token = given or _local_token(config, data_dir, folder, wait)
        if stop.is_set():
            return None
        known = _known_identity(config, folder, device_id, token)
        if known is not None:
            return known
        if token is None:
            raise _no_token(config)
        _require_worker_token(token, clock)
        try:
            return _enrol(config, folder, device_id, token, connect, wait)
        except _TokenRefused:
            if given is not None:
                raise _unknown_token() from None
            stop.wait(LOCAL_RETRY_MS / 1000)
    raise _unknown_token()


def master_address(config: JoinConfig, token: JoinToken | None) -> tuple[str, int, int]:
    """Host, dispatch port and control port: what the operator said, else what the token says.

    A host or port that was left at its default is not something the operator said.
    """
    host = config.master_host
    dispatch_port = config.dispatch_port or config.master_port + 1
    control_port = config.control_port or config.master_port + 2
    if token is None:
        return host, dispatch_port, control_port
    return (
        token.host if token.host and host in LOCAL_HOSTS else host,
        token.dispatch_port if dispatch_port == DEFAULT_MASTER_PORT + 1 else dispatch_port,
        token.control_port if control_port == DEFAULT_MASTER_PORT + 2 else control_port,
    )


def words_for_refused_key(folder: WorkerFolder) -> str:
    """For a worker that had enrolled and is turned away at the door."""
    return (
        "the master refuses this device's key: it was revoked, or belongs to another master. "
        f"To join again, stop this worker, delete {folder.path} and start it with a join token"
    )


class _Wait:
    """Patience with a master that is not there: how long, and when to say so."""

    def __init__(
        self,
        clock: Clock,
        say: Callable[[str], None],
        stop: threading.Event,
        patience_ms: int | None,
    ) -> None:
        self.clock = clock
        self.stop = stop
        self._say = say
        self._patience_ms = patience_ms
        self._began_ms = clock.monotonic_ms()
        self._say_at_ms = self._began_ms + FIRST_WORDS_MS

    def goes_on(self, words: str) -> bool:
        """False when asked to stop. Raises MasterUnreachable when patience is over."""
        if self.stop.is_set():
            return False
        now_ms = self.clock.monotonic_ms()
        if self._patience_ms is not None and now_ms - self._began_ms >= self._patience_ms:
            raise MasterUnreachable(words)
        if now_ms >= self._say_at_ms:
            self._say(f"{words}; trying again")
            self._say_at_ms = now_ms + SAY_EVERY_MS
        return True


def _settle_device_id(
    config: JoinConfig, folder: WorkerFolder, clock: Clock, rng: random.Random
) -> DeviceId:
    known = folder.device_id()
    if config.device_id:
        chosen = DeviceId(config.device_id)
    else:
        chosen = known or make_device_id(SchedulerMode.WORKER, clock.wall_ms(), rng)
    if chosen != known:
        folder.remember(chosen)
    return chosen


def _known_identity(
    config: JoinConfig, folder: WorkerFolder, device_id: DeviceId, token: JoinToken | None
) -> Identity | None:
    """None as well when the token is of another master than the one this folder knows."""
    keys = load_key_pair(folder.path, KEY_NAME)
    server_public = load_public_key(folder.server_public_file)
    if keys is None or server_public is None:
        return None
    if token is not None and token.server_public != server_public:
        return None
    return Identity(device_id, keys, server_public, *master_address(config, token))


def _local_token(
    config: JoinConfig, data_dir: DataDir, folder: WorkerFolder, wait: _Wait
) -> JoinToken | None:
    """What the master of this data directory left for us; waits for it if it has to come."""
    while True:
        token = load_join_token(data_dir)
        enrolled = load_public_key(folder.server_public_file) is not None
        if token is not None or enrolled or config.master_host not in LOCAL_HOSTS:
            return token
        words = f"No master has started in {data_dir.path} yet, and no --join-token was given"
        if not wait.goes_on(words):
            return None
        wait.stop.wait(POLL_MS / 1000)


def _enrol(
    config: JoinConfig,
    folder: WorkerFolder,
    device_id: DeviceId,
    token: JoinToken,
    connect: Connect,
    wait: _Wait,
) -> Identity | None:
    keys = load_or_create_key_pair(folder.path, KEY_NAME)
    host, dispatch_port, control_port = master_address(config, token)
    request = Enrol(PROTOCOL_VERSION, keys.public, device_id, config.device_name)
    channel = connect(host, dispatch_port, 0, token.server_public, token.bootstrap_keys)
    try:
        accepted = _ask(channel, encode(request), f"Master {host}:{dispatch_port}", wait)
    finally:
        channel.close()
    if not accepted:
        return None
    save_public_key(folder.server_public_file, token.server_public)
    return Identity(device_id, keys, token.server_public, host, dispatch_port, control_port)


def _ask(channel: Channel, request: bytes, master: str, wait: _Wait) -> bool:
    """Ask until the master answers; False when asked to stop.

    Raises _TokenRefused, and what _answer raises.
    """
    words = f"{master} not reachable"
    connected = False
    ask_at_ms = 0
    while wait.goes_on(words):
        channel.poll(POLL_MS)
        for link in channel.poll_monitor():
            connected, words, ask_at_ms = _after(link, master, connected, words, ask_at_ms)
        now_ms = wait.clock.monotonic_ms()
        if connected and now_ms >= ask_at_ms and channel.send(request):
            ask_at_ms = now_ms + ASK_AGAIN_MS
        if any(_answer(frame) for frame in channel.receive(16)):
            return True
    return False


def _after(
    link: str, master: str, connected: bool, words: str, ask_at_ms: int
) -> tuple[bool, str, int]:
    """What a turn of the connection means: are we through, what to tell people, when to ask."""
    match link:
        case "connected":
            # What was asked before may have died with the old connection.
            return True, f"{master} does not answer", 0
        case "handshake_failed_auth":
            raise _TokenRefused
        case "handshake_failed_protocol" | "handshake_failed_no_detail":
            problem = "is not the master this join token is for, or is just starting"
            return False, f"What listens at {master.removeprefix('Master ')} {problem}", 0
        case "disconnected":
            return False, words, 0
        case _:
            return connected, words, ask_at_ms


def _answer(frame: bytes) -> bool:
    """True: enrolled. False: not an answer, or one that means "later"."""
    try:
        message = decode_to_worker(frame)
    except RemoteProtocolError:
        return False
    match message:
        case Enrolled():
            return True
        case Refused(code=RefusalCode.BUSY | RefusalCode.STOPPING):
            return False
        case Refused(code=RefusalCode.FORBIDDEN, problem=problem):
            raise ConfigError("join_token", problem)
        case Refused(problem=problem):
            raise StartError(f"the master refused this device: {problem}")
        case _:
            return False


def _require_worker_token(token: JoinToken, clock: Clock) -> None:
    if token.role is not Role.WORKER:
        raise ConfigError("join_token", f"it is for a {token.role.value}, not for a worker")
    require_unexpired(token, clock.wall_ms())


def _no_token(config: JoinConfig) -> ConfigError:
    return ConfigError(
        "join_token",
        f"needed, because this machine has not joined {config.master_host} yet: "
        "run `distribute token create` on the master",
    )


def _unknown_token() -> ConfigError:
    return ConfigError(
        "join_token",
        "the master does not know it (revoked, or of another master): "
        "make a new one with `distribute token create`",
    )
