"""The little web servers of scripts/, as processes."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def served(*arguments: str, end_with: int = signal.SIGTERM) -> Iterator[int]:
    """Run a script that serves; its port. It must end by itself, and well, at the signal."""
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline().rpartition(":")[2].strip().rstrip("/"))
        finally:
            process.send_signal(end_with)
            process.wait(10)
        assert process.stderr is not None
        assert (process.returncode, process.stderr.read()) == (0, "")


def get(port: int, path: str) -> tuple[int, str, bytes]:
    """Status, Location or Content-Type, body; the path goes out as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        told = answer.getheader("Location") or answer.getheader("Content-Type") or ""
        return answer.status, told, answer.read()


@pytest.mark.parametrize("end_with", [signal.SIGTERM, signal.SIGINT])
def test_a_folder_is_served_and_nothing_outside_of_it(tmp_path: Path, end_with: int) -> None:
    root = tmp_path / "site"
    (root / "sub").mkdir(parents=True)
    (root / "index.html").write_text("home")
    (root / "sub" / "index.html").write_text("below")
    (root / "a b.txt").write_text("text")
    (tmp_path / "secret").write_text("secret")
    os.symlink(tmp_path / "secret", root / "leak")

    with served("scripts/serve_folder.py", str(root), end_with=end_with) as port:
        assert get(port, "/") == (200, "text/html", b"home")
        assert get(port, "/sub/") == (200, "text/html", b"below")
        assert get(port, "/sub")[:2] == (301, "/sub/")
        assert get(port, "/a%20b.txt") == (200, "text/plain", b"text")
        assert [get(port, path)[0] for path in ("/leak", "/../secret", "/%2e%2e/secret")] == [
            404
        ] * 3


def test_the_demo_site_answers_the_same_every_time() -> None:
    bodies = []
    for _ in range(2):
        with served("scripts/demo_site.py", end_with=signal.SIGINT) as port:
            bodies.append([get(port, path) for path in ("/", "/articles/7.html", "/big.html")])

    assert bodies[0] == bodies[1]


@pytest.mark.parametrize("script", ["scripts/demo_site.py", "scripts/serve_folder.py"])
def test_a_taken_port_is_said_in_one_line(script: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        folder = [str(tmp_path)] if "folder" in script else []
        ended = subprocess.run(
            [sys.executable, script, *folder, "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith("Cannot ")
    assert ended.stderr.count("\n") == 1
