"""The config itself, and KEYS: the one list its file, environment, flags and manual come from."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct, structs

from zmqcluster.config.kinds import (
    ByteCount,
    Choice,
    Kind,
    ListOf,
    Seconds,
    Text,
    Whole,
    days,
    folder,
    host_name,
    host_with_port,
    ip_address,
    network,
)
from zmqcluster.model import (
    CREDIT_MAX,
    DEVICE_ID_PATTERN,
    LABEL_PATTERN,
    LABELS_MAX,
    NAME_CHARS_MAX,
    RETRIES_MAX,
    SLOTS_MAX,
    TIMEOUT_MS_MAX,
    Durability,
    SchedulerMode,
    Strategy,
)

ENV_PREFIX: Final = "ZMQCLUSTER_"
PORT_MAX: Final = 65_535
MASTER_PORT_DEFAULT: Final = 7989
# Beats and timeouts travel as ms in fields that end at one hour (messages.Welcome).
_HOUR_S: Final = 3600.0


class ClusterConfig(Struct, frozen=True, kw_only=True):
    """Everything a process is told before it starts; docs/configuration.md explains each key.

    Durations are in seconds. dispatch_port and control_port are 0 in two cases: master_port is 0
    too, so the system picks all three; or this is a worker that was told no port at all, so its
    join token (or the master's data directory) says where to go.
    """

    mode: SchedulerMode = SchedulerMode.STANDALONE
    device_id: str = ""
    device_name: str = ""
    master_host: str = "localhost"
    master_port: int = MASTER_PORT_DEFAULT
    dispatch_port: int = 0
    control_port: int = 0
    bind: str = "127.0.0.1"
    rest_bind: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()
    data_dir: str = "data"
    dispatch_interval: float = 1.0
    load_balance_strategy: Strategy = Strategy.LEAST_TASKS
    max_tasks_per_device: int = 0
    concurrent_tasks: int = 0
    heartbeat_interval: float = 5.0
    device_timeout: float = 15.0
    task_timeout: float = 900.0
    task_memory_max: int = 2048
    max_retry_count: int = 3
    durability: Durability = Durability.FULL
    executors: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    egress_allow: tuple[str, ...] = ()
    contact: str = ""
    join_token: str = ""
    log_level: str = "info"
    retention_days: float = 7.0
    spool_bytes_max: int = 256 * 1024 * 1024

    def __post_init__(self) -> None:
        told_nothing = self.mode is SchedulerMode.WORKER and self.master_port == MASTER_PORT_DEFAULT
        if self.master_port and not told_nothing:
            structs.force_setattr(self, "dispatch_port", self.dispatch_port or self.master_port + 1)
            structs.force_setattr(self, "control_port", self.control_port or self.master_port + 2)

    @property
    def rest_url(self) -> str:
        """Where the master's REST API is, as seen from here."""
        host = f"[{self.master_host}]" if ":" in self.master_host else self.master_host
        return f"http://{host}:{self.master_port}"


class Key(Struct, frozen=True):
    """One config key. used_by: the modes whose command line shows its flag."""

    name: str
    kind: Kind
    help: str
    used_by: frozenset[SchedulerMode] = frozenset(SchedulerMode)
    secret: bool = False

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def default(self) -> Any:
        return getattr(DEFAULTS, self.name)


_MASTER: Final = frozenset({SchedulerMode.MASTER, SchedulerMode.STANDALONE})
_WORKER: Final = frozenset({SchedulerMode.WORKER, SchedulerMode.STANDALONE})

KEYS: Final[tuple[Key, ...]] = (
    Key(
        "mode",
        Choice.of(SchedulerMode),
        "What this process is; the verb on the command line sets it.",
    ),
    Key(
        "device_id",
        Text(
            "letters, digits, '.', '_' and '-', first a letter or digit, at most 64, or empty",
            pattern=DEVICE_ID_PATTERN,
            empty=True,
        ),
        "Name of this device in the cluster. Empty: made once and remembered in data_dir.",
    ),
    Key(
        "device_name",
        Text(
            f"at most {NAME_CHARS_MAX} printable characters", chars_max=NAME_CHARS_MAX, empty=True
        ),
        "A friendly name for people. Empty: made from the host name.",
    ),
    Key("master_host", host_name(), "Where the master is, for workers and commands."),
    Key(
        "master_port",
        Whole(min=0, max=PORT_MAX),
        "Port of the REST API. 0: any free port, also for the next two (master only).",
    ),
    Key(
        "dispatch_port",
        Whole(min=0, max=PORT_MAX),
        "Port of the dispatch socket (ROUTER). 0: master_port + 1, or what a join token says.",
    ),
    Key(
        "control_port",
        Whole(min=0, max=PORT_MAX),
        "Port of the control socket (PUB). 0: master_port + 2, or what a join token says.",
    ),
    Key(
        "bind",
        ip_address(),
        "Address the dispatch and control sockets listen on; 0.0.0.0 lets other machines join.",
        _MASTER,
    ),
    Key(
        "rest_bind",
        ip_address(),
        "Address the REST API listens on. It speaks plain HTTP: keep it on loopback or behind TLS.",
        _MASTER,
    ),
    Key(
        "allowed_hosts",
        ListOf(host_with_port(), items_max=64),
        "Host headers the REST API answers to, beside its own address and localhost.",
        _MASTER,
    ),
    Key(
        "data_dir",
        folder(),
        "Folder of the database, keys, tokens and spooled results; made with access for you alone.",
    ),
    Key(
        "dispatch_interval",
        Seconds(max=60.0),
        "Longest time a due thing waits for the sweep, in s. Dispatch itself is immediate.",
        _MASTER,
    ),
    Key(
        "load_balance_strategy",
        Choice.of(Strategy),
        "How a device is picked among those that could take a task.",
        _MASTER,
    ),
    Key(
        "max_tasks_per_device",
        Whole(min=0, max=CREDIT_MAX),
        "Most tasks running at once on one device. 0: what the device can do.",
        _MASTER,
    ),
    Key(
        "concurrent_tasks",
        Whole(min=0, max=SLOTS_MAX),
        "Most tasks this device runs at once. 0: decided by its executors and cores.",
        _WORKER,
    ),
    Key(
        "heartbeat_interval",
        Seconds(max=_HOUR_S),
        "Time between two heartbeats of a device, in s; the master tells its workers.",
        _MASTER,
    ),
    Key(
        "device_timeout",
        Seconds(max=_HOUR_S),
        "A device silent for this long, in s, is offline, and its tasks go elsewhere.",
        _MASTER,
    ),
    Key(
        "task_timeout",
        Seconds(max=TIMEOUT_MS_MAX / 1000),
        "Longest run of one attempt, in s, unless the task says otherwise.",
        _MASTER,
    ),
    Key(
        "task_memory_max",
        Whole(min=0, max=2**24),
        "Most memory of a process that runs tasks, in MiB; one with more is killed. 0: no limit.",
        _WORKER,
    ),
    Key(
        "max_retry_count",
        Whole(min=0, max=RETRIES_MAX),
        "How often a failing task is tried again, unless the task says otherwise.",
        _MASTER,
    ),
    Key(
        "durability",
        Choice.of(Durability),
        "full: what was acknowledged survives power loss. normal: it survives any process death.",
        _MASTER,
    ),
    Key(
        "executors",
        ListOf(
            Text(
                "a dotted module name",
                pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$",
                chars_max=256,
            ),
            items_max=64,
        ),
        "Modules with your own task types. Give them to the master and to its workers.",
    ),
    Key(
        "labels",
        ListOf(
            Text(
                "letters, digits and '.', '_', '=', '-', first a letter or digit, at most 64",
                pattern=LABEL_PATTERN,
            ),
            items_max=LABELS_MAX,
        ),
        "What this device offers; a task may ask for labels.",
        _WORKER,
    ),
    Key(
        "egress_allow",
        ListOf(network(), items_max=256),
        "Networks tasks may reach beside public addresses, such as 127.0.0.0/8.",
    ),
    Key(
        "contact",
        Text(
            "a mail address or an http(s) URL, at most 200 characters",
            pattern=r"^(https?://[!-'*-~]+|[!-'*-?A-~]+@[!-'*-?A-~]+)$",
            chars_max=200,
            empty=True,
        ),
        "Who answers for this crawler; part of its user agent. Public sites need it.",
    ),
    Key(
        "join_token",
        Text(
            "the text that `distribute token create` printed",
            pattern=r"^[!-~]+$",
            chars_max=1024,
            empty=True,
        ),
        "Lets a worker on another machine join; only needed until it has enrolled its own key.",
        frozenset({SchedulerMode.WORKER}),
        secret=True,
    ),
    Key(
        "log_level",
        Choice(("debug", "info", "warning", "error")),
        "The least important lines that are logged.",
    ),
    Key(
        "retention_days",
        days(max_days=36_500.0),
        "Finished tasks and events are kept for this many days.",
        _MASTER,
    ),
    Key(
        "spool_bytes_max",
        ByteCount(min=1024 * 1024, max=2**50),
        "Most disk for results a worker keeps until the master has them, in bytes.",
        _WORKER,
    ),
)

DEFAULTS: Final = ClusterConfig()
KEYS_BY_NAME: Final[dict[str, Key]] = {key.name: key for key in KEYS}
