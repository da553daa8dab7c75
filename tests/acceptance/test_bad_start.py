"""What cannot work is said in one plain line, before anything starts; never with a traceback."""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.cluster import ROOT, Cluster, free_ports

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(60)]


def run(*arguments: str, cwd: Path) -> tuple[int, str]:
    """The exit code and everything printed."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *arguments],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=40,
        check=False,
    )
    text = done.stdout.decode()
    assert "Traceback" not in text, text
    return done.returncode, text


def test_port_in_use_is_named(tmp_path: Path) -> None:
    base = free_ports(3)
    for offset in range(3):
        with socket.socket() as taken:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(("127.0.0.1", base + offset))
            taken.listen()

            code, text = run(
                "distribute", "master", "--data-dir", "data", "--master-port", str(base),
                cwd=tmp_path,
            )  # fmt: skip

            assert code == 1
            assert str(base + offset) in text
            assert "in use" in text


def test_data_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")

    code, text = run("distribute", "master", "--data-dir", "data", cwd=tmp_path)

    assert code == 2
    assert "data_dir" in text


def test_database_of_a_newer_version(make_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    cluster = make_cluster()
    cluster.start_master().end()
    base = sqlite3.connect(cluster.data_dir / "cluster.db")
    base.execute("PRAGMA user_version = 999")
    base.close()

    code, text = run(
        "distribute", "master", "--data-dir", str(cluster.data_dir), "--master-port",
        str(cluster.port), cwd=tmp_path,
    )  # fmt: skip

    assert code == 1
    assert "newer" in text
    assert "999" in text


def test_file_that_is_no_database(make_cluster: Callable[..., Cluster], tmp_path: Path) -> None:
    cluster = make_cluster()
    cluster.start_master().end()
    for name in ("cluster.db", "cluster.db-wal", "cluster.db-shm"):
        (cluster.data_dir / name).unlink(missing_ok=True)
    (cluster.data_dir / "cluster.db").write_text("not a database " * 100)

    code, text = run(
        "distribute", "master", "--data-dir", str(cluster.data_dir), "--master-port",
        str(cluster.port), cwd=tmp_path,
    )  # fmt: skip

    assert code == 1
    assert "not a database" in text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"master_port": "x"}', "master_port"),
        ('{"master_prt": 1}', "master_port"),
        ('{"heartbeat_interval": NaN}', "NaN"),
        ('{"device_timeout": 1}', "device_timeout"),
        ("{", "line 1"),
        ('{"device_id": "no spaces"}', "device_id"),
    ],
)
def test_wrong_config_is_refused_naming_the_key(tmp_path: Path, config: str, words: str) -> None:
    (tmp_path / "config.json").write_text(config)

    code, text = run("distribute", "master", "--config", "config.json", cwd=tmp_path)

    assert code == 2
    assert words in text


@pytest.mark.parametrize(
    "arguments",
    [
        ("distribute", "master", "--nonsense"),
        ("distribute", "fly"),
        ("distribute", "master", "--master-port", "70000"),
        ("distribute", "worker", "--join-token", "ck1.broken"),
        ("distribute", "master", "--executors", "no.such.module"),
    ],
)
def test_wrong_words_end_with_usage(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    code, text = run(*arguments, cwd=tmp_path)

    assert code == 2
    assert text.strip()


def test_master_that_is_not_there(tmp_path: Path) -> None:
    port = str(free_ports(3))

    code, text = run("distribute", "status", "--master-port", port, cwd=tmp_path)

    assert code == 3
    assert port in text


def test_wrong_token_unknown_type_and_parameters_that_do_not_fit(
    make_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    cluster = make_cluster()
    cluster.start_master()
    where = ("--master-port", str(cluster.port), "--data-dir", str(cluster.data_dir))
    token = tmp_path / "token"
    token.write_text("w" * 43)
    token.chmod(0o600)

    refused = {
        "unknown type": run("distribute", "submit", "flyy", *where, cwd=tmp_path),
        "wrong field": run("distribute", "submit", "sleep", "secnds=1", *where, cwd=tmp_path),
        "wrong value": run("distribute", "submit", "sleep", "seconds=-1", *where, cwd=tmp_path),
        "wrong token": run(
            "distribute", "submit", "noop", "--api-token-file", str(token), *where, cwd=tmp_path
        ),
    }

    codes = {name: code for name, (code, _) in refused.items()}
    assert codes == {"unknown type": 2, "wrong field": 2, "wrong value": 2, "wrong token": 1}
    assert "flyy" in refused["unknown type"][1]
    assert "secnds" in refused["wrong field"][1]
    assert "seconds" in refused["wrong value"][1]
    assert "token" in refused["wrong token"][1]
    assert json.loads(run("distribute", "status", "--json", *where, cwd=tmp_path)[1])
    assert cluster.counts() == {}
