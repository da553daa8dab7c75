"""The bare floor: one ROUTER, one DEALER process, SQLite group commit, and nothing of what a
cluster is for: no encryption, fences, leases, retries, hosts or REST. What is above it is ours."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import Final

import msgpack  # type: ignore[import-untyped]  # ships no types
import zmq

CHUNK: Final = 250
ROOT: Final = Path(__file__).resolve().parent.parent


def tasks_per_second(count: int) -> float:
    """Insert, hand out, run (nothing), and store the end of `count` tasks, durably."""
    port = free_ports(1)
    process = multiprocessing.get_context("spawn").Process(target=_worker, args=(port,))
    process.start()
    try:
        with tempfile.TemporaryDirectory(dir=ROOT) as folder:
            return _master(port, count, Path(folder) / "floor.db")
    finally:
        process.join(10)


def free_ports(count: int) -> int:
    """The first of `count` neighbouring ports that are free right now."""
    for base in range(23_000 + os.getpid() % 5_000, 32_000, count):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(base, base + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return base
    raise SystemExit("no free ports")


def _master(port: int, count: int, path: Path) -> float:
    base = sqlite3.connect(path, isolation_level=None)
    base.execute("PRAGMA journal_mode = WAL")
    base.execute("PRAGMA synchronous = FULL")
    base.execute("CREATE TABLE tasks (id INTEGER PRIMARY KEY, state INTEGER, data BLOB)")
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(f"tcp://127.0.0.1:{port}")
    peer = router.recv_multipart()[0]
    began = time.perf_counter()
    for start in range(0, count, CHUNK):
        ids = range(start, start + CHUNK)
        base.execute("BEGIN")
        base.executemany("INSERT INTO tasks VALUES (?, 1, ?)", [(one, b"\x80") for one in ids])
        base.execute("COMMIT")
        router.send_multipart([peer, msgpack.packb(list(ids))])
    done = 0
    while done < count:
        ended = msgpack.unpackb(router.recv_multipart()[1])
        base.execute("BEGIN")
        base.executemany("UPDATE tasks SET state = 2 WHERE id = ?", [(one,) for one in ended])
        base.execute("COMMIT")
        done += len(ended)
    rate = count / (time.perf_counter() - began)
    router.send_multipart([peer, b""])
    context.destroy(linger=1000)
    base.close()
    return rate


def _worker(port: int) -> None:
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(f"tcp://127.0.0.1:{port}")
    dealer.send(b"hello")
    while frame := dealer.recv():
        dealer.send(msgpack.packb(msgpack.unpackb(frame)))
    context.destroy(linger=1000)
