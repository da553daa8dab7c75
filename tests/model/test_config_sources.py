"""Any mixture of file, environment and flags: the config that was asked for, or a refusal."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct, structs

from tests.support.tiers import scaled
from zmqcluster.config import DEFAULTS, KEYS, ClusterConfig, Key, load_config
from zmqcluster.config.keys import PORT_MAX
from zmqcluster.config.kinds import ByteCount, Choice, ListOf, Seconds, Text, Whole
from zmqcluster.errors import ConfigError
from zmqcluster.model import SchedulerMode

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
ROW = re.compile(r"^\| `(?P<name>\w+)` \| (`(?P<text>[^`]*)`|none) \|", re.MULTILINE)
# What no key can know alone may be said of these.
TOGETHER = {"master_port", "dispatch_port", "control_port", "device_timeout"}
PORTS = ("master_port", "dispatch_port", "control_port")

TEXTS = {
    "device_id": ["", "w-1", "W.2_3"],
    "device_name": ["", "Büro links", "#1"],
    "master_host": ["localhost", "m_1.example", "fd00::1", "10.0.0.1"],
    "bind": ["127.0.0.1", "::", "0.0.0.0"],
    "rest_bind": ["127.0.0.1", "::1"],
    "allowed_hosts": ["a.example", "a.example:80", "[::1]:7"],
    "data_dir": ["data", "/var/lib/x y", "é"],
    "executors": ["my.tasks", "_x", "a1.b2"],
    "labels": ["gpu", "zone=eu", "1"],
    "egress_allow": ["127.0.0.0/8", "10.1.2.3/32", "fd00::/8"],
    "contact": ["", "me@example.org", "https://example.org/bot?a=1"],
    "join_token": ["", "ck1.abc"],
}
# No key takes any of these.
NEVER: tuple[Any, ...] = (
    *(None, True, {}, [1], [None], ["a", "a"]),
    *(-1, 1e400, 10**30, float("nan"), "\ud800", "a\n", "\0"),
)
NEVER_JSON = st.sampled_from(NEVER)
NEVER_TEXT = st.sampled_from(["\n", "a\tb", "\x1b[1m", "-1e", "nan", "\ud800", "x" * 2000, " "])


class Given(Struct):
    """One way to give a key: as JSON and as text, and what it means. WRONG: it is refused."""

    name: str
    json: Any
    text: str
    value: Any


WRONG = object()


@st.composite
def givens(draw: st.DrawFn) -> Given:
    key = draw(st.sampled_from(KEYS))
    if draw(st.integers(0, 9)) == 0:
        text = draw(NEVER_TEXT.filter(lambda each: not _takes(key, each)))
        return Given(key.name, draw(NEVER_JSON), text, WRONG)
    return draw(_rightly(key))


def _rightly(key: Key) -> st.SearchStrategy[Given]:
    """A value the key takes. Ports and times are small sets, so that they meet."""
    name, kind = key.name, key.kind
    match kind:
        case Whole() if name in PORTS:
            ports = st.sampled_from([0, 1, 2, 7989, 7990, 65_534, 65_535])
            return ports.map(lambda each: Given(name, each, str(each), each))
        case Whole() | ByteCount():
            return st.integers(kind.min, kind.max).map(lambda n: Given(name, n, f" {n} ", n))
        case Seconds():
            times = st.sampled_from([0.001, 0.5, 5.0, 15.0]) | st.floats(0.001, kind.max)
            return times.map(lambda each: Given(name, each, repr(each), each))
        case Choice():
            return st.sampled_from(kind.choices).map(
                lambda each: Given(name, each, each, kind.make(each))
            )
        case Text():
            return st.sampled_from(TEXTS[name]).map(lambda each: Given(name, each, each, each))
        case ListOf():
            items = st.lists(st.sampled_from(TEXTS[name]), unique=True)
            return items.map(lambda each: Given(name, each, ", ".join(each), tuple(each)))
        case _:
            raise AssertionError(f"{name} is of a kind unknown here")


def _takes(key: Key, text: str) -> bool:
    """Odd text can still be fine as a name or a folder."""
    try:
        key.kind.from_text(text)
    except ValueError:
        return False
    return True


sources = st.lists(givens(), max_size=5, unique_by=lambda each: each.name)


def _loaded_or_refused(
    file: list[Given], env: list[Given], flags: list[Given]
) -> ClusterConfig | ConfigError:
    try:
        return _load(file, env, flags)
    except ConfigError as error:
        return error


def _load(file: list[Given], env: list[Given], flags: list[Given]) -> ClusterConfig:
    keys = {key.name: key for key in KEYS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.json"
        path.write_text(json.dumps({each.name: each.json for each in file}))
        return load_config(
            file=path,
            env={keys[each.name].env: each.text for each in env},
            flags={each.name: each.text for each in flags},
        )


@settings(max_examples=scaled(300))
@given(sources, sources, sources)
def test_the_later_source_wins_or_a_key_is_named(
    file: list[Given], env: list[Given], flags: list[Given]
) -> None:
    # An empty variable is as good as none.
    told = [*file, *(each for each in env if each.text), *flags]
    wrong = {each.name for each in told if each.value is WRONG}
    asked = {each.name: each.value for each in told}
    found = _loaded_or_refused(file, env, flags)
    if isinstance(found, ConfigError):
        assert str(found).isprintable()
        assert found.key in (wrong or TOGETHER), found
        assert wrong or _do_clash(asked), found
        return
    assert not wrong
    assert found == ClusterConfig(**asked)
    for name, value in asked.items():
        assert name in PORTS or getattr(found, name) == value
    assert not _do_clash(asked)


def _do_clash(asked: dict[str, Any]) -> bool:
    """Is there something wrong with keys together, as the page has it?"""
    config = ClusterConfig(**asked)
    ports = [getattr(config, name) for name in PORTS]
    given = [port for port in ports if port]
    return (
        config.device_timeout <= config.heartbeat_interval
        or (config.master_port == 0 and config.mode is SchedulerMode.WORKER)
        or (config.master_port > 0 and len(set(given)) < len(given))
        or max(ports) > PORT_MAX
    )


@given(sources)
def test_a_config_written_down_is_read_back(flags: list[Given]) -> None:
    config = _loaded_or_refused([], [], flags)
    if isinstance(config, ConfigError):
        return
    written = json.loads(json.dumps(structs.asdict(config)))

    again = _load([Given(name, value, "", value) for name, value in written.items()], [], [])

    assert again == config


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_what_a_key_does_not_take_is_refused_by_its_name(key: Key) -> None:
    twice = (
        [[text, text] for text in TEXTS.get(key.name, ())] if isinstance(key.kind, ListOf) else []
    )
    small = [0, 0.0009] if isinstance(key.kind, Seconds) else []

    for value in (*NEVER, *twice, *small):
        found = _loaded_or_refused([Given(key.name, value, "", WRONG)], [], [])

        assert isinstance(found, ConfigError), (key.name, value)
        assert found.key == key.name


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_the_documented_default_is_the_default_from_every_source(key: Key) -> None:
    texts = {found["name"]: found["text"] or "" for found in ROW.finditer(PAGE.read_text())}
    text, default = texts[key.name], getattr(DEFAULTS, key.name)
    as_json = list(default) if isinstance(default, tuple) else default

    assert _load([], [], [Given(key.name, None, text, None)]) == DEFAULTS
    assert _load([], [Given(key.name, None, text, None)], []) == DEFAULTS
    assert _load([Given(key.name, as_json, "", None)], [], []) == DEFAULTS
    assert set(texts) >= {each.name for each in KEYS}
