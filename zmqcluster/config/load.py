"""File, environment and flags into one ClusterConfig; the later wins.

Whatever is wrong is a ConfigError that names the key, what was given and what is allowed, raised
before anything starts.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from zmqcluster.config.keys import ENV_PREFIX, KEYS_BY_NAME, PORT_MAX, ClusterConfig, Key
from zmqcluster.errors import ConfigError
from zmqcluster.model import SchedulerMode

# Variables of ours that are no config keys: the REST token and the path of the config file.
ENV_OTHERS: Final = frozenset({"ZMQCLUSTER_API_TOKEN", "ZMQCLUSTER_CONFIG"})
FILE_BYTES_MAX: Final = 1024 * 1024


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
    key = KEYS_BY_NAME.get(name)
    if key is None:
        raise ConfigError(shown(name, quote=not name), f"no such key ({origin}){_nearest(name)}")
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


def _bounded_int(text: str) -> int | float:
    # int() is quadratic in the digits. No key allows such a number: its own check says so.
    return int(text) if len(text) <= 20 else float(text)


# --- values --------------------------------------------------------------------------------------


def _env_texts(env: Mapping[str, str]) -> Iterable[tuple[Key, str]]:
    for variable, text in sorted(env.items()):
        if not variable.startswith(ENV_PREFIX) or variable in ENV_OTHERS or not text:
            continue
        name = variable.removeprefix(ENV_PREFIX)
        if name != name.upper() or name.lower() not in KEYS_BY_NAME:
            raise ConfigError(
                shown(variable, quote=False),
                f"no such key (environment){_nearest(name.lower(), env=True)}",
            )
        yield KEYS_BY_NAME[name.lower()], text


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
    near = difflib.get_close_matches(name[:64].lower().replace("-", "_"), KEYS_BY_NAME, n=1)
    if near:
        return f"; did you mean {KEYS_BY_NAME[near[0]].env if env else near[0]}?"
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
            problem = f"would be {port}, next to master_port; allowed: at most {PORT_MAX}"
            raise ConfigError(name, problem)
    first_by_port: dict[int, str] = {}
    for name, port in ports.items():
        first = first_by_port.setdefault(port, name) if port else name
        if first != name:
            raise ConfigError(name, f"{port}, as is {first}; allowed: three different ports")


def _refuse_pair(name: str, value: float, allowed: str, origins: Mapping[str, str]) -> None:
    origin = origins.get(name, "default")
    raise ConfigError(name, f"given {value:g} ({origin}); allowed: {allowed}")
