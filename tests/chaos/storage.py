"""Disks that are full, slow, broken, locked, moved and damaged under a master that is at work."""

from __future__ import annotations

import contextlib
import errno
import itertools
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Final

from sqlite_utils import Database

from storage import schema
from tests.chaos.catalogue import CAN, fault
from tests.chaos.own_tasks import events, submit
from tests.chaos.rig import Rig
from tests.support.cluster import Node, trace_lines, wait_until
from zmqcluster.client import task

SUPPORT: Final = Path(__file__).resolve().parents[1] / "support"
SECTOR: Final = 512
MIB: Final = 1024 * 1024
READING_S: Final = 10.0


def _can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder],
            capture_output=True,
            check=False,
        )
        if mounted.returncode:
            return False
        subprocess.run(["umount", folder], check=True)
        return True


CAN["tmpfs"] = lambda: shutil.which("mount") is not None and _can_mount()


@fault(
    2,
    "master dies in a migration, before and after a commit is on disk, and in a checkpoint",
    needs=("gcc",),
)
def master_dies_at_point(rig: Rig) -> None:
    cluster = rig.cluster
    path = cluster.data_dir / "cluster.db"
    _make_old(path)
    with bad_disk(rig) as orders:
        for number in (1, 2):
            rig.step(f"before the end of step {number} of the migration")
            orders.write_text(f"sync 0 0 -wal before {number}")
            _is_killed(cluster._start("master", "--master-port", str(cluster.port)))
        orders.unlink()
        master = cluster.start_master()
        cluster.start_worker()
        with rig.load() as load, ThreadPoolExecutor(1) as pool:
            for name, moment, megabytes in (
                ("before a commit is on disk", "sync 0 0 -wal before 5", 0),
                ("when it is on disk, and nobody was told", "sync 0 0 -wal after 5", 0),
                ("in a checkpoint", "write 0 0 cluster.db$ before 100", 24),
            ):
                rig.flows(load, 20)
                rig.step(name)
                orders.write_text(moment)
                filled = pool.submit(_fill, rig, megabytes)
                _is_killed(master)
                orders.unlink()
                master = cluster.start_master()
                filled.result()
            rig.flows(load, 20)
        rig.judge()
    assert rig.verdict.carried_out, "of some that was on disk nobody was told"
    with _database(rig) as looker:
        assert looker.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@fault(61, "the master's disk is full, of files and of bytes", needs=("tmpfs",))
def disk_full(rig: Rig) -> None:
    cluster = rig.cluster
    with small_disk(cluster.data_dir, 4) as folder:
        master = cluster.start_master()
        cluster.start_worker()
        with rig.load() as load:
            rig.flows(load, 20)
            rig.step("no room for another file")
            fillers = list(_fill_files(folder))
            rig.flows(load, 20)
            # Stopped well, it leaves no log: the next one has to make it.
            master.end()
            _stops_with(cluster._start("master", "--master-port", str(cluster.port)), "space")
            for one in fillers:
                one.unlink()
            master = cluster.start_master()
            rig.flows(load, 20)
            rig.step("no room for another byte")
            _fill(rig)
            _stops_with(master, "the disk is full: free some space and start again")
            again = cluster._start("master", "--master-port", str(cluster.port))
            _stops_with(again, "space")
            subprocess.run(["mount", "-o", "remount,size=128m", str(folder)], check=True)
            cluster.start_master()
            rig.flows(load, 20)
        rig.judge()
        _end_all(rig)


@fault(62, "the disk fails at a write, a sync and a read, once and for good", needs=("gcc",))
def disk_fails(rig: Rig) -> None:
    cluster = rig.cluster
    with bad_disk(rig) as orders:
        master = cluster.start_master()
        cluster.start_worker()
        with rig.load() as load:
            for call in ("write", "sync", "read"):
                rig.flows(load, 20)
                rig.step(f"one {call} fails")
                # A second try would succeed, and hide what the first one lost.
                orders.write_text(f"{call} {errno.EIO} 0 -wal once 1")
                _stops_with(master, "the disk failed")
                rig.step(f"each {call} fails")
                orders.write_text(f"{call} {errno.EIO} 0 -wal")
                again = cluster._start("master", "--master-port", str(cluster.port))
                _stops_with(again, "the disk failed")
                orders.unlink()
                master = cluster.start_master()
            rig.flows(load, 20)
        rig.judge()


@fault(64, "each sync of the disk takes a second", needs=("gcc",))
def slow_disk(rig: Rig) -> None:
    cluster = rig.cluster
    with bad_disk(rig) as orders:
        cluster.start_master()
        cluster.start_worker()
        with rig.load() as load:
            rig.flows(load, 20)
            orders.write_text("sync 0 1000 -wal")
            began = time.monotonic()
            rig.flows(load, 15)
            assert time.monotonic() - began > 1.5, "the disk was slow"
            # Longer than device_timeout: somebody would have been given up by now.
            wait_until(lambda: time.monotonic() - began > 4.5, "some seconds of it")
            orders.unlink()
            rig.flows(load, 50)
        rig.judge()
    assert events(rig, "device_lost") == 0, "heartbeats do not wait for the disk"


@fault(65, "somebody reads the database for ten seconds")
def long_reader(rig: Rig) -> None:
    cluster = rig.cluster
    cluster.start_master()
    cluster.start_worker()
    wal = cluster.data_dir / "cluster.db-wal"
    with rig.load() as load:
        rig.flows(load, 20)
        with _database(rig) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM tasks").fetchone()
            began = time.monotonic()
            _fill(rig, 20)
            # Nobody waits for it to end.
            while time.monotonic() - began < READING_S:
                rig.flows(load, 20)
            pinned = wal.stat().st_size
        _fill(rig, 3)
        rig.flows(load, 20)
        assert pinned > 16 * MIB, "the reader kept the log from being used again"
        assert wal.stat().st_size < pinned + 8 * MIB, "it is used again"
    rig.judge()
    assert events(rig, "device_lost") == 0


@fault(66, "the database is moved away, or another lies in its place")
def database_moved(rig: Rig) -> None:
    cluster = rig.cluster
    path = cluster.data_dir / "cluster.db"
    aside = cluster.data_dir / "aside"
    master = cluster.start_master()
    cluster.start_worker()
    with rig.load() as load:
        for is_replaced in (False, True):
            rig.flows(load, 10)
            aside.mkdir()
            for part in cluster.data_dir.glob("cluster.db*"):
                part.rename(aside / part.name)
            if is_replaced:
                path.write_bytes(b"another")
            _stops_with(master, "was moved or deleted while it was in use")
            path.unlink(missing_ok=True)
            for part in aside.iterdir():
                part.rename(cluster.data_dir / part.name)
            aside.rmdir()
            master = cluster.start_master()
        rig.flows(load, 10)
    rig.judge()


@fault(67, "bits are flipped and sectors lost in the stopped database, and in its log")
def bits_flipped(rig: Rig) -> None:
    cluster = rig.cluster
    master = cluster.start_master()
    cluster.start_worker()
    with rig.load() as load:
        rig.flows(load, 100)
    rig.rests()
    master.kill()
    path = cluster.data_dir / "cluster.db"
    log_path = path.with_name("cluster.db-wal")
    short, log = path.read_bytes(), log_path.read_bytes()
    rng = Random(rig.seed)

    def refuses() -> bool:
        """Or it starts, and all that was acknowledged is there."""
        damaged = cluster._start("master", "--master-port", str(cluster.port))
        try:
            if _starts(damaged):
                # What is damaged may be a page of no consequence, or a letter of a result; rows
                # that are counted in an index cannot vanish without being noticed.
                kept = {row[0] for row in cluster.rows("SELECT task_id FROM tasks")}
                assert {one for sent in load.submissions for one in sent.task_ids} <= kept
                return False
            text = damaged.log.read_text()
            assert "restore a backup" in text or "is not a database: move it away" in text, text
            return True
        finally:
            damaged.kill()
            _remove_logs(path)

    for where in (0.1, 0.5):
        rig.step(f"one bit of the log, {where:.0%} of the way")
        path.write_bytes(short)
        log_path.write_bytes(_flipped(log, round(len(log) * where)))
        assert refuses(), "what was committed behind it would be lost"
    path.write_bytes(short)
    log_path.write_bytes(log)
    cluster.start_master().end()
    good = path.read_bytes()
    assert not log_path.exists(), "all of it is in the database now"
    refused = 0
    for bits in (1, 100):
        rig.step(f"{bits} bits of the database")
        path.write_bytes(_flipped(good, *(rng.randrange(len(good)) for _ in range(bits))))
        refused += refuses()
    for sectors in (4, 200):
        rig.step(f"{sectors} sectors of the database")
        path.write_bytes(_without(good, sectors, rng))
        refused += refuses()
    assert refused >= 2, "damage is noticed"
    path.write_bytes(good)
    cluster.start_master()
    rig.judge()


@fault(68, "a copy is restored: with the log of a later time beside it, and alone")
def stale_log(rig: Rig) -> None:
    cluster = rig.cluster
    path = cluster.data_dir / "cluster.db"
    master = cluster.start_master()
    worker = cluster.start_worker()
    with rig.load() as load:
        rig.flows(load, 50)
    rig.rests()
    master.end()
    copy = path.read_bytes()
    for _ in range(2):
        # What was seen of later epochs shows the copy to be an old one.
        master.kill()
        master = cluster.start_master()
    _fill(rig, 24)  # More than a checkpoint, so the log is of a database the copy never was.
    rig.rests()
    master.kill()
    newest, log = path.read_bytes(), path.with_name("cluster.db-wal").read_bytes()
    assert log, "the killed master left its log"
    path.write_bytes(copy)
    path.with_name("cluster.db-shm").unlink()

    rig.step("with the log of a later time")
    restored = cluster._start("master", "--master-port", str(cluster.port))
    if _starts(restored):
        found = sqlite3.connect(path).execute("PRAGMA integrity_check").fetchall()
        restored.kill()
        assert found == [("ok",)], f"a mixture of two times is served: {found[:3]}"
    rig.step("alone")
    path.write_bytes(copy)
    _remove_logs(path)
    restored = cluster.start_master()
    worker.wait_for("an old copy of it answers", 10)
    worker.end()
    cluster.start_worker()
    # Its numbers are given out once more: to other tasks, which must run all the same.
    again = [cluster.submit("trace", {"path": str(rig.folder / "again")}) for _ in range(20)]
    for task_id in again:
        cluster.wait_state(task_id, "completed", 10)
    restored.kill()
    rig.step("back to the newest state")
    _remove_logs(path)
    path.write_bytes(newest)
    path.with_name("cluster.db-wal").write_bytes(log)
    cluster.start_master()
    rig.judge()


@fault(69, "a tool holds the database locked for five seconds")
def lock_held(rig: Rig) -> None:
    cluster = rig.cluster
    cluster.start_master()
    cluster.start_worker()
    with rig.load() as load:
        rig.flows(load, 20)
        with _database(rig) as holder:
            holder.execute("BEGIN EXCLUSIVE")
            began, acknowledged = time.monotonic(), load.acknowledged
            wait_until(lambda: time.monotonic() - began > 5.0, "five seconds")
            # One batch may have been on its way.
            assert load.acknowledged <= acknowledged + 5
            holder.execute("ROLLBACK")
        rig.flows(load, 50)
    rig.judge()
    assert events(rig, "device_lost") == 0, "heartbeats do not wait for the disk"


@fault(70, "the file system turns read-only", needs=("gcc", "tmpfs"))
def read_only(rig: Rig) -> None:
    cluster = rig.cluster
    with small_disk(cluster.data_dir, 64) as folder, bad_disk(rig) as orders:
        master = cluster.start_master()
        cluster.start_worker()
        with rig.load() as load:
            rig.flows(load, 20)
            orders.write_text(f"write {errno.EROFS} 0 cluster.db")
            _stops_with(master, "cannot save to the database")
            for node in cluster.nodes:
                if node.process.poll() is None:
                    node.kill()
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
            orders.unlink()
            again = cluster._start("master", "--master-port", str(cluster.port))
            assert again.process.wait(20) == 2
            assert "make it writable" in again.log.read_text(), again.log.read_text()
            subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
            cluster.start_master()
            cluster.start_worker()
            rig.flows(load, 20)
        rig.judge()
        _end_all(rig)


@fault(73, "a backup is taken under load, and restored under workers that know more")
def restored_backup(rig: Rig) -> None:
    cluster = rig.cluster
    path, backup, again = (
        cluster.data_dir / "cluster.db",
        rig.folder / "backup",
        rig.folder / "again",
    )
    master = cluster.start_master()
    worker = cluster.start_worker()
    with rig.load() as load:
        rig.flows(load, 50)
        known = {one for sent in load.submissions for one in sent.task_ids}
        rig.step("backup")
        with _database(rig) as source, contextlib.closing(sqlite3.connect(backup)) as target:
            source.backup(target)
            assert target.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            copied = {row[0] for row in target.execute("SELECT task_id FROM tasks")}
        assert known <= copied, "all that was acknowledged before is in it"
        rig.flows(load, 50)
    rig.step("restored")
    # What these run is not in the backup, and their numbers will be those of others.
    late = rig.running("trace", 20, seconds=3.0)
    assert not copied & {one.task_id for one in late}
    master.kill()
    # What is seen from now on is of another history.
    parts = (rig.trace, *path.parent.glob("cluster.db*"))
    newest = {part: part.read_bytes() for part in parts}
    _remove_logs(path)
    path.write_bytes(backup.read_bytes())
    master = cluster.start_master()
    others = cluster.ask(
        lambda client: client.submit_many(
            [task("trace", {"path": str(again), "seconds": 1.0}) for _ in range(200)], watch=False
        )
    ).task_ids
    assert {one.task_id for one in late} & set(others), "numbers are given out again"
    for task_id in others:
        cluster.wait_state(task_id, "completed", 20)
    began = {(int(line[1]), int(line[2])) for line in trace_lines(again, "start")}
    done = "SELECT task_id, attempt FROM task_assignments WHERE outcome = 'completed'"
    ours = {one for one in cluster.rows(done) if one[0] in others}
    assert ours <= began, "each has a result of its own, and not of its namesake"
    assert events(rig, "device_astray") > 0, "it is on record"
    master.kill()
    worker.kill()
    rig.step("back to the newest state")
    for part, content in newest.items():
        part.write_bytes(content)
    cluster.start_master()
    cluster.start_worker()
    rig.judge()


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A disk of this size, for some 250 files, mounted there. End what uses it before this ends."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    options = f"size={megabytes}m,nr_inodes=256,mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        # Whoever still has a file open there keeps it until he closes it.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextlib.contextmanager
def bad_disk(rig: Rig) -> Iterator[Path]:
    """Processes started in here have a disk that obeys the file this gives; see bad_disk.c."""
    orders = rig.folder / "orders"
    with preloaded(rig, "bad_disk", BAD_DISK=str(orders)):
        try:
            yield orders
        finally:
            orders.unlink(missing_ok=True)


@contextlib.contextmanager
def preloaded(rig: Rig, name: str, **environment: str) -> Iterator[None]:
    """Processes started in here have tests/support/{name}.c preloaded, and this environment."""
    library = rig.folder / f"{name}.so"
    source = SUPPORT / f"{name}.c"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True
    )
    environment["LD_PRELOAD"] = str(library)
    rig.cluster.environment.update(environment)
    try:
        yield
    finally:
        for one in environment:
            del rig.cluster.environment[one]


@contextlib.contextmanager
def _database(rig: Rig) -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(
        rig.cluster.data_dir / "cluster.db", timeout=10, isolation_level=None
    )
    try:
        yield connection
    finally:
        connection.close()


def _fill(rig: Rig, megabytes: int = 8) -> None:
    """Submit so much, or as much as the master takes."""
    with contextlib.suppress(TimeoutError):
        for _ in range(megabytes):
            submit(rig, "trace", 20, data={"path": str(rig.trace), "note": "x" * 50_000})


def _fill_files(folder: Path) -> Iterator[Path]:
    """As many empty ones as there is room for."""
    for number in itertools.count():
        path = folder / f"filler{number}"
        try:
            path.touch()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return
        yield path


def _make_old(path: Path) -> None:
    """A database of the first schema there was, with nothing in it."""
    path.parent.mkdir(mode=0o700, parents=True)
    path.touch(mode=0o600)
    with contextlib.closing(Database(path)) as old:
        old.enable_wal()
        schema.migrate(old, path, schema.MIGRATIONS[:1])


def _is_killed(node: Node) -> None:
    wait_until(lambda: node.process.poll() is not None, f"{node.log} ends")
    assert node.process.returncode == -signal.SIGKILL, node.log.read_text()


def _stops_with(node: Node, words: str) -> None:
    """It ends by itself, with code 1 and one line with these words."""
    wait_until(lambda: node.process.poll() is not None, f"{node.log} ends")
    text = node.log.read_text()
    assert node.process.returncode == 1, text
    assert words in text, text


def _starts(node: Node) -> bool:
    """Whether it came up; it has ended otherwise."""
    ended = node.process.poll
    wait_until(lambda: node.says("Master node started") or ended() is not None, "it starts or ends")
    return ended() is None


def _end_all(rig: Rig) -> None:
    for node in reversed(rig.cluster.nodes):
        node.end()


def _flipped(content: bytes, *places: int) -> bytes:
    """One bit of each of these bytes is another one."""
    damaged = bytearray(content)
    for at in places:
        damaged[at] ^= 1 << at % 8
    return bytes(damaged)


def _without(content: bytes, sectors: int, rng: Random) -> bytes:
    """Random bytes in so many sectors, wherever they are."""
    damaged = bytearray(content)
    for _ in range(sectors):
        at = rng.randrange(len(content) // SECTOR) * SECTOR
        damaged[at : at + SECTOR] = rng.randbytes(SECTOR)
    return bytes(damaged)


def _remove_logs(path: Path) -> None:
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
