"""Unacknowledged results on disk: what a worker that was killed finds again when it starts.

Segments of appended entries, each 4 bytes of length, 4 of CRC-32, and one packed Results. A batch
is one write; nothing is synced, so a process may die, but power must not fail: the master then
hands the task out again. A segment whose results are all forgotten is deleted or emptied, so what
a restart finds may hold some results that were acknowledged; the master fences these.
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from zmqcluster.errors import StartError
from zmqcluster.messages import AttemptRef, Results, TaskResult
from zmqcluster.model import FRAME_BYTES_MAX, RESULTS_PER_FRAME_MAX

SEGMENT_BYTES: Final = 4 * 1024 * 1024
# A batch that is cut off by a crash costs at most this many results.
ENTRY_RESULTS_MAX: Final = 256
_SUFFIX: Final = ".spool"
_HEAD: Final = struct.Struct(">II")
_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Results)

assert ENTRY_RESULTS_MAX <= RESULTS_PER_FRAME_MAX
assert ENTRY_RESULTS_MAX * FRAME_BYTES_MAX < 2**32, "the length of an entry takes 4 bytes"

log = logging.getLogger(__name__)

_Key = tuple[int, int]


class _Segment(Struct, eq=False):
    """One file. live: results in it that are not forgotten."""

    path: Path
    size: int = 0
    live: int = 0


class Spool:
    """The results in one folder. One owner, one thread; never blocks for longer than a write.

    bytes_max: on disk, dead results in living segments included; what would exceed it is not
    written (and stays in memory, whose bound is the core's).
    """

    def __init__(self, folder: Path, bytes_max: int) -> None:
        self.bytes_kept = 0
        self.damaged = 0
        self.refused = 0
        self._folder = folder
        self._bytes_max = bytes_max
        self._segment_of: dict[_Key, _Segment] = {}
        self._segments: dict[Path, _Segment] = {}
        self._current: _Segment | None = None
        self._descriptor = -1
        self._next_number = 1
        self._is_failing = False

    def __len__(self) -> int:
        return len(self._segment_of)

    def load(self) -> list[TaskResult]:
        """What a former process left here, oldest first; called once, before anything else.

        Damaged entries are counted and skipped. Raises StartError when the folder cannot be read.
        """
        results: list[TaskResult] = []
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            paths = sorted(self._folder.glob(f"*{_SUFFIX}"))
            for path in paths:
                results.extend(self._load_segment(path))
        except OSError as error:
            raise StartError(
                f"the results kept in {self._folder} cannot be read: {error.strerror}"
            ) from None
        numbers = [int(path.stem) for path in paths if path.stem.isdecimal()]
        self._next_number = max(numbers, default=0) + 1
        if self.damaged:
            log.warning("%d damaged entries skipped in %s", self.damaged, self._folder)
        return results

    def keep(self, results: Sequence[TaskResult]) -> None:
        """Write these down. What cannot be written is said once, counted, and not an error."""
        for first in range(0, len(results), ENTRY_RESULTS_MAX):
            self._keep_entry(results[first : first + ENTRY_RESULTS_MAX])

    def forget(self, refs: Iterable[AttemptRef]) -> None:
        """These need not be found again. Unknown ones do not matter."""
        for ref in refs:
            segment = self._segment_of.pop((ref.task_id, ref.attempt), None)
            if segment is not None:
                segment.live -= 1
                if not segment.live:
                    self._empty(segment)

    def close(self) -> None:
        """Let go of the files; what is in them stays. Harmless when done twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor, self._current = -1, None

    def _load_segment(self, path: Path) -> list[TaskResult]:
        content = path.read_bytes()
        segment = _Segment(path, size=len(content))
        results: list[TaskResult] = []
        for body in self._entries(content):
            try:
                batch = _DECODER.decode(body).results
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                self.damaged += 1
                continue
            for result in batch:
                key = (result.task_id, result.attempt)
                if key not in self._segment_of:
                    self._segment_of[key] = segment
                    segment.live += 1
                    results.append(result)
        if results:
            self._segments[path] = segment
            self.bytes_kept += segment.size
        else:
            path.unlink()
        return results

    def _entries(self, content: bytes) -> Iterable[bytes]:
        start = 0
        while start < len(content):
            if start + _HEAD.size > len(content):
                self.damaged += 1
                return
            length, checksum = _HEAD.unpack_from(content, start)
            body = content[start + _HEAD.size : start + _HEAD.size + length]
            start += _HEAD.size + length
            if len(body) < length or zlib.crc32(body) != checksum:
                self.damaged += 1
                continue
            yield body

    def _keep_entry(self, results: Sequence[TaskResult]) -> None:
        body = _ENCODER.encode(Results(tuple(results)))
        entry = _HEAD.pack(len(body), zlib.crc32(body)) + body
        if self.bytes_kept + len(entry) > self._bytes_max:
            self._refuse(len(results), f"more than {self._bytes_max} bytes")
            return
        try:
            segment = self._write(entry)
        except OSError as error:
            self._refuse(len(results), error.strerror or str(error))
            return
        self._is_failing = False
        self.bytes_kept += len(entry)
        for result in results:
            key = (result.task_id, result.attempt)
            if key not in self._segment_of:
                self._segment_of[key] = segment
                segment.live += 1

    def _write(self, entry: bytes) -> _Segment:
        segment = self._current
        if segment is None or segment.size >= SEGMENT_BYTES:
            segment = self._begin_segment()
        written = 0
        try:
            while written < len(entry):
                written += os.write(self._descriptor, entry[written:])
        except OSError:
            # Half an entry would hide all that follow it: cut it off, or write elsewhere.
            self.close()
            if segment.size:
                os.truncate(segment.path, segment.size)
            else:
                # A disk that stays full must not fill with empty files.
                del self._segments[segment.path]
                segment.path.unlink()
            raise
        segment.size += len(entry)
        return segment

    def _begin_segment(self) -> _Segment:
        self.close()
        path = self._folder / f"{self._next_number:08d}{_SUFFIX}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        self._next_number += 1
        self._current = self._segments[path] = _Segment(path)
        return self._current

    def _empty(self, segment: _Segment) -> None:
        """Nothing in this segment matters any more."""
        self.bytes_kept -= segment.size
        try:
            if segment is self._current:
                os.ftruncate(self._descriptor, 0)
                segment.size = 0
            else:
                del self._segments[segment.path]
                segment.path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be cleared: %s", segment.path, error.strerror)

    def _refuse(self, count: int, why: str) -> None:
        self.refused += count
        if not self._is_failing:
            self._is_failing = True
            log.warning(
                "Results cannot be kept in %s (%s): they stay in memory only", self._folder, why
            )
