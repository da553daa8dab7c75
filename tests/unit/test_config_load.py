"""File, environment and flags become one config, or one sentence that says what is wrong."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqcluster.config import DEFAULTS, KEYS, ClusterConfig, load_config, read_file
from zmqcluster.config.load import FILE_BYTES_MAX
from zmqcluster.errors import ConfigError
from zmqcluster.model import Durability, SchedulerMode, Strategy


def refusal(**sources: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(**sources)
    return caught.value


def test_nothing_given_is_the_documented_defaults() -> None:
    config = load_config()

    assert config == ClusterConfig()
    assert (config.master_port, config.dispatch_port, config.control_port) == (7989, 7990, 7991)
    assert config.durability is Durability.FULL
    assert config.load_balance_strategy is Strategy.LEAST_TASKS
    assert config.rest_url == "http://localhost:7989"


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text('{"heartbeat_interval": 1, "device_timeout": 30, "max_retry_count": 9}')

    config = load_config(
        file=file,
        env={"ZMQCLUSTER_HEARTBEAT_INTERVAL": "2", "ZMQCLUSTER_DEVICE_TIMEOUT": "40", "HOME": "/"},
        flags={"heartbeat_interval": "3.5"},
    )

    assert config.heartbeat_interval == 3.5
    assert config.device_timeout == 40.0
    assert config.max_retry_count == 9
    assert config.task_timeout == DEFAULTS.task_timeout


def test_every_key_can_come_from_each_of_the_three_sources(tmp_path: Path) -> None:
    texts = {
        "mode": "worker",
        "device_id": "w-1",
        "device_name": "Büro links",
        "master_host": "fd00::1",
        "master_port": "8000",
        "dispatch_port": "8010",
        "control_port": "8020",
        "bind": "0.0.0.0",
        "rest_bind": "localhost",
        "allowed_hosts": "Cluster.example:80,[::1]",
        "data_dir": "/var/lib/zc",
        "dispatch_interval": "0.5",
        "load_balance_strategy": "weighted",
        "max_tasks_per_device": "7",
        "concurrent_tasks": "8",
        "heartbeat_interval": "1e0",
        "device_timeout": "3",
        "task_timeout": "60",
        "task_memory_max": "0",
        "max_retry_count": "0",
        "durability": "normal",
        "executors": "my.tasks,other",
        "labels": "gpu,zone=eu",
        "egress_allow": "127.0.0.0/8,192.168.1.7,fd00::/8",
        "contact": "https://example.org/bot",
        "join_token": "zc1.abc",
        "log_level": "debug",
        "retention_days": "0.5",
        "spool_bytes_max": "64MiB",
    }
    assert set(texts) == {key.name for key in KEYS}
    by_flags = load_config(flags=texts)
    by_env = load_config(env={key.env: texts[key.name] for key in KEYS})
    file = tmp_path / "c.json"
    file.write_bytes(msgspec.json.encode(by_flags))
    by_file = load_config(file=file)

    assert by_flags == by_env == by_file
    assert by_flags.mode is SchedulerMode.WORKER
    assert by_flags.rest_bind == "127.0.0.1"
    assert by_flags.allowed_hosts == ("cluster.example:80", "[::1]")
    assert by_flags.egress_allow == ("127.0.0.0/8", "192.168.1.7/32", "fd00::/8")
    assert by_flags.spool_bytes_max == 64 * 2**20
    assert by_flags.rest_url == "http://[fd00::1]:8000"


def test_a_number_has_as_many_decimals_as_its_float_needs() -> None:
    for seconds in (0.0010000000000000002, 0.1 + 0.2, 59.99999999999999):
        config = load_config(flags={"dispatch_interval": repr(seconds)})

        assert config.dispatch_interval == seconds


def test_empty_environment_variable_counts_as_not_set() -> None:
    assert load_config(env={"ZMQCLUSTER_MASTER_PORT": ""}).master_port == 7989


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("mode", "boss", "master, worker, standalone"),
        ("device_id", "-x", "letters, digits"),
        ("device_id", "a" * 65, "at most 64"),
        ("device_name", "a\x1b[31m", "printable"),
        ("master_host", "http://example.org", "a host name or an IP address"),
        ("master_port", "70000", "from 0 to 65535"),
        ("master_port", "80 80", "a whole number"),
        ("master_port", "٣", "a whole number"),
        ("bind", "example.org", "an IP address"),
        ("allowed_hosts", "http://x", "with or without :port"),
        ("data_dir", "", "a path"),
        ("dispatch_interval", "0", "at least 0.001"),
        ("heartbeat_interval", "nan", "seconds"),
        ("heartbeat_interval", "-5", "seconds"),
        ("device_timeout", "inf", "at most 3600"),
        ("task_timeout", "604801", "at most 604800"),
        ("load_balance_strategy", "best", "least_tasks, round_robin, weighted, random"),
        ("concurrent_tasks", "-1", "from 0 to 4096"),
        ("durability", "FULL", "full, normal"),
        ("executors", "my-tasks", "a dotted module name"),
        ("executors", "a,a", "given twice"),
        ("labels", "x,,y", "a list of at most 16"),
        ("labels", ",".join(f"l{n}" for n in range(17)), "at most 16"),
        ("egress_allow", "10.1.2.3/8", "did you mean 10.0.0.0/8?"),
        ("egress_allow", "intranet", "a network such as"),
        ("contact", "me", "a mail address or an http(s) URL"),
        ("contact", "me@example.org) Mozilla/5.0 (x", "a mail address"),
        ("log_level", "loud", "debug, info, warning, error"),
        ("retention_days", "0", "days"),
        ("spool_bytes_max", "1MB", "such as 256MiB"),
        ("spool_bytes_max", "1", "from 1048576"),
    ],
)
def test_wrong_value_is_named_with_what_was_given_and_what_is_allowed(
    name: str, text: str, allowed: str
) -> None:
    error = refusal(flags={name: text})

    assert error.key == name
    assert f"--{name.replace('_', '-')}" in error.problem
    assert json.dumps(text)[:60] in error.problem
    assert allowed in error.problem
    assert str(error).isprintable()


@pytest.mark.parametrize(
    ("document", "name"),
    [
        ('{"master_port": true}', "master_port"),
        ('{"master_port": "8000"}', "master_port"),
        ('{"master_port": 8000.0}', "master_port"),
        ('{"heartbeat_interval": true}', "heartbeat_interval"),
        ('{"heartbeat_interval": 1e999}', "heartbeat_interval"),
        ('{"heartbeat_interval": 9999999999999999999}', "heartbeat_interval"),
        ('{"labels": "gpu"}', "labels"),
        ('{"labels": {}}', "labels"),
        ('{"labels": [1]}', "labels"),
        ('{"contact": null}', "contact"),
        ('{"contact": "\\ud800@x"}', "contact"),
        ('{"mode": ["master"]}', "mode"),
        ('{"heartbeat_interval": NaN}', "heartbeat_interval"),
        ('{"heartbeat_interval": -Infinity}', "heartbeat_interval"),
        ('{"master_port": ' + "9" * 5000 + "}", "master_port"),
        ('{"device_timeout": ' + "9" * 5000 + "}", "device_timeout"),
    ],
)
def test_wrong_json_type_is_refused_not_converted(document: str, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_file(document.encode(), "c.json")

    assert caught.value.key == name
    assert "allowed: " in caught.value.problem


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (b'{\n "mode": "master",\n}', "line 3, column 1"),
        (b"", "line 1, column 1"),
        (b'{"mode": "master", "mode": "worker"}', '"mode" is given twice'),
        (b"[]", "one JSON object"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b" " * (FILE_BYTES_MAX + 1), "larger than"),
    ],
)
def test_file_that_is_no_config_is_named_with_the_place(document: bytes, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_file(document, "c.json")

    assert caught.value.key == "c.json"
    assert words in caught.value.problem


def test_unknown_key_gets_a_suggestion_from_each_source() -> None:
    with pytest.raises(ConfigError, match="did you mean heartbeat_interval") as caught:
        read_file(b'{"hearbeat-interval": 1}', "c.json")
    assert caught.value.key == "hearbeat-interval"

    error = refusal(env={"ZMQCLUSTER_HEARBEAT": "1", "OTHER": "x"})
    assert error.key == "ZMQCLUSTER_HEARBEAT"
    assert "ZMQCLUSTER_HEARTBEAT_INTERVAL" in error.problem

    assert "docs/configuration.md" in refusal(env={"ZMQCLUSTER_QQQQ": "1"}).problem


def test_variables_of_ours_that_are_no_keys_are_left_alone() -> None:
    config = load_config(env={"ZMQCLUSTER_API_TOKEN": "x", "ZMQCLUSTER_CONFIG": "c.json"})

    assert config == DEFAULTS


def test_missing_file_is_named(tmp_path: Path) -> None:
    error = refusal(file=tmp_path / "gone.json")

    assert error.key == "--config"
    assert "gone.json" in error.problem
    assert "No such file" in error.problem
    assert "directory" in refusal(file=tmp_path).problem


def test_device_timeout_must_exceed_the_heartbeat() -> None:
    error = refusal(flags={"device_timeout": "5"})

    assert error.key == "device_timeout"
    assert "above heartbeat_interval (5 s)" in error.problem


def test_ports_must_differ_and_fit() -> None:
    assert "three different ports" in refusal(flags={"dispatch_port": "7989"}).problem
    assert "three different ports" in refusal(flags={"control_port": "7990"}).problem
    assert refusal(flags={"master_port": "65534"}).key == "control_port"


def test_port_zero_is_for_a_master_only() -> None:
    config = load_config(flags={"master_port": "0", "mode": "master"})
    assert (config.master_port, config.dispatch_port, config.control_port) == (0, 0, 0)

    assert refusal(flags={"master_port": "0", "mode": "worker"}).key == "master_port"


def test_worker_that_was_told_no_port_leaves_it_to_its_token() -> None:
    told = load_config(flags={"mode": "worker", "master_port": "9000"})
    partly = load_config(flags={"mode": "worker", "dispatch_port": "9001"})
    untold = load_config(flags={"mode": "worker"})

    assert (told.dispatch_port, told.control_port) == (9001, 9002)
    assert (partly.dispatch_port, partly.control_port) == (9001, 0)
    assert (untold.dispatch_port, untold.control_port) == (0, 0)


def test_a_wrong_secret_is_not_repeated() -> None:
    error = refusal(flags={"join_token": "hunter2 hunter2"})

    assert "hunter2" not in str(error)
    assert "distribute token create" in error.problem


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
key_names = st.sampled_from([key.name for key in KEYS])


@given(
    st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.dictionaries(key_names | st.text(max_size=12), json_values, max_size=4).map(
        lambda document: json.dumps(document).encode()
    )
)
def test_any_bytes_are_a_config_or_a_config_error(data: bytes) -> None:
    problem = ""
    try:
        ClusterConfig(**read_file(data, "c.json"))
    except ConfigError as error:
        problem = str(error)

    assert problem.isprintable()
    assert len(problem) < 1000


@given(key_names, st.text(max_size=40) | st.text(string.digits + ".eE+-/", max_size=12))
def test_any_text_of_a_flag_is_a_config_or_a_config_error(name: str, text: str) -> None:
    problem = ""
    try:
        load_config(flags={name: text})
    except ConfigError as error:
        problem = str(error)

    assert problem.isprintable()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"master_port": "65535"}, "dispatch_port: would be 65536, next to master_port; allowed: "),
        ({"control_port": "7989"}, "control_port: 7989, as is master_port; allowed: three diff"),
        ({"data_dir": " "}, 'data_dir: given " " (--data-dir); allowed: a path'),
        (
            {"bind": "m1"},
            "allowed: an IP address of this machine, or 0.0.0.0 or :: for all of them",
        ),
        (
            {"master_host": "m1:80"},
            "allowed: a host name or an IP address, without scheme and port",
        ),
        ({"egress_allow": "10.0.0.1/8"}, "fd00::/8 (did you mean 10.0.0.0/8?)"),
        ({"egress_allow": "lan"}, "each a network such as 10.0.0.0/8 or fd00::/8"),
    ],
)
def test_a_refusal_says_what_is_allowed_and_nothing_of_python(
    flags: dict[str, str], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(flags=flags)

    assert told in str(caught.value)
    assert "appear" not in str(caught.value)


def test_a_key_without_a_name_is_shown_as_what_it_is() -> None:
    with pytest.raises(ConfigError, match=r'^"": no such key'):
        read_file(b'{"": 1}', "c.json")
