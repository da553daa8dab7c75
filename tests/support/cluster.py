"""Real processes on loopback: start, watch, kill. Every wait has a deadline and a reason."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import psutil  # type: ignore[import-untyped]  # ships no types

from zmqcluster.client import DistributionClient
from zmqcluster.views import DeviceView

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[2]
START_S = 30.0


# Below what systems give to outgoing connections; processes begin far apart.
_FIRST_PORT, _PORTS = 21_000, 11_000
_next_port = itertools.count(os.getpid() * 97)
_choosing = threading.Lock()


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that are free, and not those of an earlier call.

    Whoever asked before may not listen yet, or not at the moment.
    """
    with _choosing:
        for _ in range(_PORTS // count):
            ports = [_FIRST_PORT + next(_next_port) % _PORTS for _ in range(count)]
            if ports[-1] - ports[0] == count - 1 and all(map(_is_free, ports)):
                return ports[0]
    raise AssertionError("no free ports")


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def wait_until(condition: Callable[[], T], what: str, timeout_s: float = START_S) -> T:
    """The condition's first true value. Fails, naming what, when the time is over."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.01)
    raise AssertionError(f"not within {timeout_s} s: {what}")


class Node:
    """One process of the cluster, in a process group of its own; its log goes to a file.

    prefix: a command that becomes ours (`env`, `nsenter`), so that the pid is the node's own.
    environment: added to this process's own. root: where the program lies.
    """

    def __init__(
        self,
        verb: str,
        log: Path,
        arguments: list[str],
        prefix: tuple[str, ...] = (),
        environment: Mapping[str, str] = MappingProxyType({}),
        root: Path = ROOT,
    ) -> None:
        self.verb = verb
        self.log = log
        command = [sys.executable, str(root / "main.py"), "distribute", verb, *arguments]
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [*prefix, *command],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                # With an empty entry, a stray module of the test's folder would be importable.
                env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def says(self, words: str) -> bool:
        return words in self.log.read_text(errors="replace")

    def wait_for(self, words: str, timeout_s: float = START_S) -> None:
        """Until its log has these words; a process that ended says why instead."""

        def found() -> bool:
            if self.says(words):
                return True
            code = self.process.poll()
            assert code is None, f"ended with {code}:\n{self.log.read_text()[-2000:]}"
            return False

        wait_until(found, f"{words!r} in {self.log}", timeout_s)

    def kill(self) -> None:
        """kill -9 of this process alone, as an OOM killer would."""
        self.process.kill()
        self.process.wait()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, timeout_s: float = 15.0) -> int:
        """SIGTERM, then SIGKILL for the whole group; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.process.terminate()
                self.process.kill()
                self.process.wait()
        return self.process.returncode


class Cluster:
    """A master and workers in one data directory, ended and checked by close()."""

    def __init__(self, folder: Path, **config: object) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        # Where clients of the rig find the master.
        self.host = "localhost"
        self.port = free_ports(3)
        self.config = {"executors": ["tests.support.accept_tasks"], **config}
        self.nodes: list[Node] = []
        # Of all nodes that are started from now on.
        self.environment: dict[str, str] = {}
        self.root = ROOT
        self._logs = 0

    def start_master(self, *arguments: str, prefix: tuple[str, ...] = ()) -> Node:
        node = self._start("master", "--master-port", str(self.port), *arguments, prefix=prefix)
        node.wait_for("Master node started")
        return node

    def start_worker(self, *arguments: str, prefix: tuple[str, ...] = ()) -> Node:
        node = self._start("worker", "--master-port", str(self.port), *arguments, prefix=prefix)
        node.wait_for("Device registered successfully")
        return node

    def ask(self, work: Callable[[DistributionClient], Coroutine[Any, Any, T]]) -> T:
        """Run work with a connected client, in an event loop of its own."""

        async def session() -> T:
            client = DistributionClient.of_data_dir(self.data_dir, self.host, self.port + 1)
            async with client:
                return await work(client)

        return asyncio.run(session())

    def submit(self, task_type: str, data: dict[str, Any] | None = None, **fields: Any) -> int:
        return self.ask(lambda client: client.submit(task_type, data, **fields))

    def devices(self) -> list[DeviceView]:
        return self.ask(lambda client: client.devices())

    def rows(self, sql: str, *arguments: object) -> list[tuple[Any, ...]]:
        """What the database says, read beside the running master."""
        with self.snapshot() as rows:
            return rows(sql, *arguments)

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[Callable[..., list[tuple[Any, ...]]]]:
        """Like rows, for several questions about one moment."""
        uri = f"file:{self.data_dir / 'cluster.db'}?mode=ro"
        connection = sqlite3.connect(uri, uri=True, timeout=10, isolation_level=None)
        try:
            connection.execute("BEGIN")
            yield lambda sql, *arguments: connection.execute(sql, arguments).fetchall()
        finally:
            connection.close()

    def state(self, task_id: int) -> str:
        return str(self.rows("SELECT state FROM tasks WHERE task_id = ?", task_id)[0][0])

    def counts(self) -> dict[str, int]:
        return dict(self.rows("SELECT state, count(*) FROM tasks GROUP BY state"))

    def wait_state(self, task_id: int, state: str, timeout_s: float = START_S) -> None:
        wait_until(lambda: self.state(task_id) == state, f"task {task_id} is {state}", timeout_s)

    def close(self) -> None:
        for node in reversed(self.nodes):
            node.end()
        for log in self.folder.glob("*.log"):
            text = log.read_text(errors="replace")
            # A task's own error is told within a line.
            assert "\nTraceback" not in text, f"{log}:\n{text[-3000:]}"

    def _start(self, verb: str, *arguments: str, prefix: tuple[str, ...] = ()) -> Node:
        self._logs += 1
        config = self.folder / "config.json"
        config.write_text(json.dumps(self.config))
        flags = ["--config", str(config), "--data-dir", str(self.data_dir), *arguments]
        log = self.folder / f"{self._logs}-{verb}.log"
        node = Node(verb, log, flags, prefix, self.environment, self.root)
        self.nodes.append(node)
        return node


def trace_lines(path: Path, word: str) -> list[list[str]]:
    """Lines of a trace file that begin with word, split."""
    if not path.exists():
        return []
    lines = [line.split() for line in path.read_text().splitlines()]
    return [line for line in lines if line[0] == word]


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def freeze(pid: int) -> None:
    for process in family(pid):
        process.suspend()


def thaw(pid: int) -> None:
    for process in family(pid):
        process.resume()


def lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def holder(workers: Iterable[Node], host: int) -> Node:
    """The worker that this executor host is a child of."""
    return next(one for one in workers if host in [child.pid for child in family(one.pid)])
