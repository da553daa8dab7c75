"""One checked configuration out of a JSON file, the environment and flags; the later wins.

KEYS is the only list of keys: the file, ZMQCLUSTER_… variables, command line flags and the table in
docs/configuration.md are all made from it. Whatever is wrong is a ConfigError that names the key,
what was given and what is allowed, raised before anything starts.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from msgspec import Struct, structs

from zmqcluster.config_kinds import (
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
from zmqcluster.errors import ConfigError
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
# Variables of ours that are no config keys: the REST token and the path of the config file.
ENV_OTHERS: Final = frozenset({"ZMQCLUSTER_API_TOKEN", "ZMQCLUSTER_CONFIG"})
FILE_BYTES_MAX: Final = 1024 * 1024
PORT_MAX: Final = 65_535
# Beats and timeouts travel as ms in fields that end at one hour (messages.Welcome).
_HOUR_S: Final = 3600.0


class ClusterConfig(Struct, frozen=True, kw_only=True):
    """Everything a process is told before it starts; docs/configuration.md explains each key.

    Durations are in seconds. dispatch_port and control_port are never 0 unless master_port is:
    then the system picks all three (tests), and only the master knows them.
    """

    mode: SchedulerMode = SchedulerMode.STANDALONE
    device_id: str = ""
    device_name: str = ""
    master_host: str = "localhost"
    master_port: int = 7989
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
        if self.master_port:
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
        "Port of the dispatch socket (ROUTER). 0: master_port + 1.",
    ),
    Key(
        "control_port",
        Whole(min=0, max=PORT_MAX),
        "Port of the control socket (PUB). 0: master_port + 2.",
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
_BY_NAME: Final[dict[str, Key]] = {key.name: key for key in KEYS}


def load_config(
    *,
    file: Path | None = None,
    env: Mapping[str, str] | None = None,
    flags: Mapping[str, str] | None = None,
) -> ClusterConfig:
    """The checked config of one process.

    env: the whole environment; only ZMQCLUSTER_… is read, and an empty variable counts as not set.
    flags: key name to the text given on the command line; lists are comma-separated.

    Raises ConfigError.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if file is not None:
        values = read_file(_file_bytes(file), str(file))
        origins = dict.fromkeys(values, str(file))
    for key, text in _env_texts(env or {}):
        values[key.name] = _checked(key, text, key.env, text_form=True)
        origins[key.name] = key.env
    for name, text in (flags or {}).items():
        key = known_key(name, "the command line")
        values[name] = _checked(key, text, key.flag, text_form=True)
        origins[name] = key.flag
    config = ClusterConfig(**values)
    _check_together(config, origins)
    return config


def read_file(data: bytes, name: str) -> dict[str, Any]:
    """The checked values of a JSON config file with these bytes; name: for error messages.

    Raises ConfigError, and never any other error, whatever the bytes.
    """
    document = _json_object(data, name)
    return {
        given: _checked(known_key(given, name), value, name, text_form=False)
        for given, value in document.items()
    }


def known_key(name: str, origin: str) -> Key:
    """The key of this name. Raises ConfigError with the nearest name there is."""
    key = _BY_NAME.get(name)
    if key is None:
        raise ConfigError(shown(name, quote=False), f"no such key ({origin}){_nearest(name)}")
    return key


def shown(value: object, *, quote: bool = True) -> str:
    """A given value as one short printable text, for error messages."""
    if isinstance(value, str) and not quote:
        text = ascii(value)[1:-1]
    else:
        try:
            text = json.dumps(value)
        except (ValueError, RecursionError):
            text = f"a {type(value).__name__} too odd to show"
    return text if len(text) <= 80 else text[:77] + "…"


# --- the file ------------------------------------------------------------------------------------


def _file_bytes(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(FILE_BYTES_MAX + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError("--config", f"cannot read {shown(str(file))}: {reason}") from None


def _json_object(data: bytes, name: str) -> dict[str, Any]:
    """The one object a config file is, no member of it given twice."""
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(name, f"larger than {FILE_BYTES_MAX} bytes")
    try:
        document = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_members,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
        )
    except json.JSONDecodeError as error:
        problem = f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise ConfigError(name, problem) from None
    except UnicodeDecodeError as error:
        raise ConfigError(name, f"not UTF-8 text: bad byte at offset {error.start}") from None
    except RecursionError:
        raise ConfigError(name, "nested too deeply; a config is one flat object") from None
    except ValueError as error:
        raise ConfigError(name, str(error)) from None
    if not isinstance(document, dict):
        raise ConfigError(name, 'a config is one JSON object: {"key": value, …}')
    return document


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"{shown(name)} is given twice")
        members[name] = value
    return members


def _bounded_int(text: str) -> int:
    # int() is quadratic in the digits, and no key allows more than this.
    if len(text) > 20:
        raise ValueError(f"a number of {len(text)} digits; at most 19")
    return int(text)


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


# --- values --------------------------------------------------------------------------------------


def _env_texts(env: Mapping[str, str]) -> Iterable[tuple[Key, str]]:
    for variable, text in sorted(env.items()):
        if not variable.startswith(ENV_PREFIX) or variable in ENV_OTHERS or not text:
            continue
        name = variable.removeprefix(ENV_PREFIX)
        if name != name.upper() or name.lower() not in _BY_NAME:
            raise ConfigError(
                shown(variable, quote=False),
                f"no such key (environment){_nearest(name.lower(), env=True)}",
            )
        yield _BY_NAME[name.lower()], text


def _checked(key: Key, value: object, origin: str, *, text_form: bool) -> Any:
    """The value of a key as its field holds it, from a flag's text or from parsed JSON."""
    try:
        if text_form:
            return key.kind.from_text(str(value))
        return key.kind.from_json(value)
    except ValueError as error:
        given = "what was given (a secret, not shown)" if key.secret else f"given {shown(value)}"
        hint = f" ({error})" if str(error) and not key.secret else ""
        problem = f"{given} ({origin}); allowed: {key.kind.allowed}{hint}"
        raise ConfigError(key.name, problem) from None


def _nearest(name: str, *, env: bool = False) -> str:
    near = difflib.get_close_matches(name[:64].lower().replace("-", "_"), _BY_NAME, n=1)
    if near:
        return f"; did you mean {_BY_NAME[near[0]].env if env else near[0]}?"
    return "; the keys are in docs/configuration.md"


def _check_together(config: ClusterConfig, origins: Mapping[str, str]) -> None:
    """What no key can know alone."""
    _check_ports(config)
    if config.device_timeout <= config.heartbeat_interval:
        _refuse_pair(
            "device_timeout",
            config.device_timeout,
            f"above heartbeat_interval ({config.heartbeat_interval:g} s), best three times as long",
            origins,
        )


def _check_ports(config: ClusterConfig) -> None:
    ports = {
        "master_port": config.master_port,
        "dispatch_port": config.dispatch_port,
        "control_port": config.control_port,
    }
    if config.master_port == 0:
        if config.mode is SchedulerMode.WORKER:
            raise ConfigError("master_port", f"given 0; allowed for a worker: 1 to {PORT_MAX}")
        return
    for name, port in ports.items():
        if port > PORT_MAX:
            raise ConfigError(name, f"would be {port}; allowed: at most {PORT_MAX}")
    if len(set(ports.values())) < len(ports):
        listed = ", ".join(f"{name} {port}" for name, port in ports.items())
        raise ConfigError("master_port", f"{listed}; allowed: three different ports")


def _refuse_pair(name: str, value: float, allowed: str, origins: Mapping[str, str]) -> None:
    origin = origins.get(name, "default")
    raise ConfigError(name, f"given {value:g} ({origin}); allowed: {allowed}")
