"""One scripted life of a database, and a disk that fails at the N-th thing asked of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Final

from msgspec import Struct, field
from sqlite_utils import Database

from storage import recovery, writer
from storage.database import open_writer
from storage.queries import Queries
from tests.support import sqlite_tap as tap
from tests.support.sqlite_tap import Kind, Operation, tapped
from tests.support.storage_bench import attempt, ended, job, task
from tests.support.storage_workload import content
from zmqcluster.core.effects import Changes
from zmqcluster.core.rows import RecordRow, TaskRow, UniqueKeyRow
from zmqcluster.errors import StorageError
from zmqcluster.model import JobId, TaskId, TaskState

# No sentence that says what to do is longer.
SENTENCE_CHARS_MAX: Final = 400
# Linux takes a write over page by page.
MEMORY_PAGE_BYTES: Final = 4096


class Trouble(Struct, frozen=True):
    """A way for a disk to fail. codes: what SQLite hears; operations not named go on as ever.

    short: a write puts down what belongs to earlier pages of memory than its end, before it fails.
    """

    name: str
    codes: dict[Kind, int]
    short: bool = False


EIO: Final = Trouble(
    "EIO",
    {
        Kind.OPEN: tap.CANTOPEN,
        Kind.READ: tap.IOERR_READ,
        Kind.WRITE: tap.IOERR_WRITE,
        Kind.TRUNCATE: tap.IOERR_TRUNCATE,
        Kind.SYNC: tap.IOERR_FSYNC,
        Kind.DELETE: tap.IOERR_DELETE,
    },
)
# A full disk still reads and deletes. SQLite's own layer reports a sync without room as IOERR.
ENOSPC: Final = Trouble(
    "ENOSPC", {Kind.OPEN: tap.CANTOPEN, Kind.WRITE: tap.FULL, Kind.SYNC: tap.IOERR_FSYNC}
)
SHORT: Final = Trouble("short write", {Kind.WRITE: tap.FULL}, short=True)
TROUBLES: Final = (EIO, ENOSPC, SHORT)


class FailingDisk:
    """A handler of the tap. fails_at: number of the operation, among those this trouble concerns.

    stays: once it has failed it fails for good.
    """

    def __init__(self, trouble: Trouble, fails_at: int, *, stays: bool) -> None:
        self.trouble = trouble
        self.fails_at = fails_at
        self.stays = stays
        self.asked = 0
        self.failed: list[Operation] = []

    @property
    def short_bytes(self) -> int:
        write = self.failed[-1]
        end = (write.at + len(write.data)) // MEMORY_PAGE_BYTES * MEMORY_PAGE_BYTES
        return max(0, end - write.at) if self.trouble.short else 0

    def on_operation(self, operation: Operation) -> int:
        code = self.trouble.codes.get(operation.kind)
        if code is None:
            return tap.OK
        self.asked += 1
        is_due = self.asked >= self.fails_at if self.stays else self.asked == self.fails_at
        if not is_due:
            return tap.OK
        self.failed.append(operation)
        return code


class Totals(Struct):
    """What a sweep came to. stopped: runs that ended with a StorageError; others went on."""

    operations: int = 0
    stopped: int = 0
    stories: list[str] = field(default_factory=list)

    @property
    def tried(self) -> dict[str, int]:
        return {"failed disk operations": self.operations}

    def __str__(self) -> str:
        return (
            f"failing disk: {self.operations} operations failed one by one, {self.stopped} of "
            f"them ended the master, {len(self.stories)} broke a promise"
        )


def sweep(
    folder: Path, trouble: Trouble, *, stays: bool, totals: Totals, step: int = 1, first: int = 1
) -> None:
    """Fail operation N of the life, for every step-th N from first on, until a life goes well."""
    states = list[int]()
    _live(_new(folder / "clean") / "cluster.db", lambda database: states.append(content(database)))
    for fails_at in count(first, step):
        disk = FailingDisk(trouble, fails_at, stays=stays)
        problem = _try_life(_new(folder / "life"), disk, states, totals)
        if not disk.failed:
            return
        totals.operations += 1
        if problem:
            what = f"{disk.failed[0].kind} of {disk.failed[0].name}"
            lasting = "for good" if stays else "once"
            totals.stories.append(
                f"{trouble.name} {lasting} at operation {fails_at}, {what}: {problem}"
            )


def _try_life(folder: Path, disk: FailingDisk, states: list[int], totals: Totals) -> str:
    """What is wrong with how the life ends and what is left of it; "" when nothing is."""
    acknowledged = 0
    killed = folder.with_name("killed")
    shutil.rmtree(killed, ignore_errors=True)

    def acknowledge(_: Database) -> None:
        nonlocal acknowledged
        acknowledged += 1

    def die() -> None:
        shutil.copytree(folder, killed, ignore=shutil.ignore_patterns("*-shm"))

    try:
        with tapped(disk):
            _live(folder / "cluster.db", acknowledge, die)
    except StorageError as error:
        totals.stopped += 1
        if found := _misled(str(error)):
            return found
    except Exception as error:  # noqa: BLE001  # that there is no other is what is tested
        return f"{type(error).__name__}: {error}"
    remains = (folder, killed) if killed.exists() else (folder,)
    problems = (_look(one, states, acknowledged) for one in remains)
    return next(filter(None, problems), "")


def _misled(sentence: str) -> str:
    """The file is well: nobody may be told to throw it away."""
    if "\n" in sentence or not 0 < len(sentence) <= SENTENCE_CHARS_MAX:
        return f"not one sentence: {sentence}"
    return f"bad advice: {sentence}" if "damaged" in sentence or "move it" in sentence else ""


def _look(folder: Path, states: list[int], acknowledged: int) -> str:
    """What a new master finds when the disk is well again."""
    try:
        with closing(open_writer(folder / "cluster.db")) as database:
            (found,) = database.conn.execute("PRAGMA integrity_check(1)").fetchone()
            recovery.load(database)
            state = content(database)
    except StorageError as error:
        return f"cannot be opened again: {error}"
    if found != "ok":
        return f"damaged: {found}"
    # states: after each acknowledgement. One commit more may be there, which nobody was told of.
    allowed = states[max(0, acknowledged - 1) : acknowledged + 1]
    return "" if state in allowed else f"{acknowledged} commits were acknowledged, others are there"


def _live(
    path: Path,
    acknowledge: Callable[[Database], None],
    die: Callable[[], None] = lambda: None,
) -> None:
    """Make a database, fill it, look into it, checkpoint, prune; close it, and once more.

    acknowledge: called when all that was written so far is on disk for sure. die: called when the
    disk failed, before anything is closed. Raises what the storage raises.
    """
    for round_ in range(2):
        database = open_writer(path)
        with closing(database):
            try:
                acknowledge(database)
                database.conn.execute("PRAGMA wal_autocheckpoint = 20")
                recovery.begin_epoch(database)
                acknowledge(database)
                recovery.load(database)
                for changes in _changes(1 + 100 * round_):
                    writer.apply(database, changes)
                    acknowledge(database)
                with closing(Queries(path)) as queries:
                    queries.tasks_by_id([1, 2, 3])
            except StorageError:
                die()
                raise


def _changes(first: int) -> Iterator[Changes]:
    """A few turns of a master: each kind of row is made, changed and forgotten once."""

    def table(*rows: TaskRow) -> dict[TaskId, TaskRow]:
        return {row.task_id: row for row in rows}

    bodies = {first + i: bytes([i]) * 1_500 for i in range(12)}
    yield Changes(
        new_tasks=table(*(task(i, task_data=data) for i, data in bodies.items())),
        unique_keys=[UniqueKeyRow(JobId(0), b"%16d" % first, TaskId(first))],
        jobs={JobId(first): job(first, pending=12)},
        clock_ms=first,
    )
    yield Changes(
        tasks=table(task(first, state=TaskState.ASSIGNED, attempt=1)),
        assignments={(TaskId(first), 1): attempt(first)},
    )
    yield Changes(new_tasks=table(task(first + 50, task_data=bytes(9_000))), clock_ms=first + 1)
    record = RecordRow("pages", f"p{first}", JobId(0), TaskId(first), 1, 3_000, b"x" * 900)
    yield Changes(
        tasks=table(ended(first, 5_000), ended(first + 1, 6_000)),
        records={("pages", f"p{first}"): record},
    )
    yield Changes(prune_before_wall=5_500, clock_ms=first + 2)


def _new(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
