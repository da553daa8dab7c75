"""Disks as a power cut may leave them, out of a recording of what was done to the files.

What was synced is there. Of what came later each write is there, or not, or in parts: a disk writes
sectors of 512 bytes whole and in any order. Names follow the journal of a file system: what was
made or deleted since the folder was last synced is there up to some point, in order.

After a sync that failed the writes before it are gone for good, though whoever reads the file still
finds them: Linux keeps such pages in memory, takes them for clean, and has the next sync succeed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from random import Random
from typing import Final

from msgspec import Struct, field, structs

from tests.support.sqlite_tap import IOERR_FSYNC, OK, Kind, Operation

SECTOR_BYTES: Final = 512
# How likely a write survived, drawn for each image: all lost and all kept are cases of their own.
_KEPT: Final = (0.0, 0.2, 0.5, 0.8, 0.95, 1.0)
_TORN: Final = (0.0, 0.1, 0.5)


class Image(Struct, frozen=True):
    """The files after the cut, by name. acknowledged: how many states were reached for sure.

    point: how many operations came before the cut.
    """

    files: dict[str, bytes]
    acknowledged: int
    point: int


class Recording:
    """A handler of the tap that lets everything happen, and keeps it.

    mark() says that somebody was told of all that was written so far. fails_at: number of the sync
    that fails. is_off: what happens now is not part of the story.
    """

    short_bytes = 0

    def __init__(self, fails_at: int = 0) -> None:
        self.operations: list[Operation | None] = []
        self.is_off = False
        self._fails_at = fails_at
        self._syncs = 0

    def on_operation(self, operation: Operation) -> int:
        if operation.kind is Kind.READ or self.is_off:
            return OK
        self._syncs += operation.kind is Kind.SYNC
        fails = operation.kind is Kind.SYNC and self._syncs == self._fails_at
        self.operations.append(structs.replace(operation, fails=fails))
        return IOERR_FSYNC if fails else OK

    def mark(self) -> None:
        self.operations.append(None)

    def images(self, count: int, rng: Random) -> Iterator[Image]:
        """So many of them, cut at random points, in the order of those."""
        points = sorted(rng.randrange(len(self.operations) + 1) for _ in range(count))
        disk, done, acknowledged = _Disk(), 0, 0
        for point in points:
            for operation in self.operations[done:point]:
                if operation is None:
                    acknowledged += 1
                else:
                    disk.take(operation)
            done = point
            yield Image(disk.after_a_cut(rng), acknowledged, point)


class _File(Struct, eq=False):
    """durable: what a sync has reached. later: writes and truncations since.

    is_new: its next sync takes the folder along, as SQLite does for a journal or WAL it made.
    """

    durable: bytearray = field(default_factory=bytearray)
    later: list[Operation] = field(default_factory=list)
    is_new: bool = False


class _Disk:
    """The platter and the cache in front of it."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        self._durable_names: dict[str, _File] = {}
        self._later_names: list[tuple[str, _File | None]] = []

    def take(self, operation: Operation) -> None:
        """One operation that happened."""
        name = operation.name
        match operation.kind:
            case Kind.OPEN:
                if name not in self._files:
                    self._files[name] = _File(is_new=operation.makes)
                    self._later_names.append((name, self._files[name]))
            case Kind.WRITE | Kind.TRUNCATE:
                self._files[name].later.append(operation)
            case Kind.SYNC:
                file = self._files[name]
                if not operation.fails:
                    _write(file.durable, file.later)
                file.later.clear()
                if file.is_new and not operation.fails:
                    file.is_new = False
                    self._sync_names()
            case Kind.DELETE:
                del self._files[name]
                self._later_names.append((name, None))
                if operation.syncs_folder:
                    self._sync_names()

    def after_a_cut(self, rng: Random) -> dict[str, bytes]:
        """What may be found when the power is back."""
        names = dict(self._durable_names)
        kept = rng.randint(0, len(self._later_names))
        _rename(names, self._later_names[:kept])
        kept_share, torn_share = rng.choice(_KEPT), rng.choice(_TORN)
        return {name: _content(file, kept_share, torn_share, rng) for name, file in names.items()}

    def _sync_names(self) -> None:
        _rename(self._durable_names, self._later_names)
        self._later_names.clear()


def _rename(names: dict[str, _File], changes: Iterable[tuple[str, _File | None]]) -> None:
    for name, file in changes:
        if file is None:
            names.pop(name, None)
        else:
            names[name] = file


def _content(file: _File, kept_share: float, torn_share: float, rng: Random) -> bytes:
    content = bytearray(file.durable)
    for operation in file.later:
        if rng.random() < torn_share and operation.kind is Kind.WRITE:
            _write(content, [part for part in _sectors(operation) if rng.random() < 0.5])
        elif rng.random() < kept_share:
            _write(content, [operation])
    return bytes(content)


def _write(content: bytearray, operations: Iterable[Operation]) -> None:
    for one in operations:
        if one.kind is Kind.TRUNCATE:
            del content[one.at :]
        if len(content) < one.at:
            content.extend(bytes(one.at - len(content)))
        content[one.at : one.at + len(one.data)] = one.data


def _sectors(write: Operation) -> Iterator[Operation]:
    """The parts of a write that lie in different sectors."""
    start, end = write.at, write.at + len(write.data)
    while start < end:
        stop = min(end, (start // SECTOR_BYTES + 1) * SECTOR_BYTES)
        part = write.data[start - write.at : stop - write.at]
        yield Operation(Kind.WRITE, write.name, start, part)
        start = stop
