"""Tell a WAL whose end was cut off by a power loss from one that was damaged.

SQLite reads a WAL up to the first frame that is not as it was written, and takes that for its end.
So it is when the power went while a transaction was written, and nothing is lost. But when a frame
of a later transaction lies behind it, the damaged one had been synced, and somebody was told of it.

The format: https://www.sqlite.org/fileformat2.html#walformat and /walformat.html.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Final

from zmqcluster.errors import StorageError

HEADER_BYTES: Final = 32
FRAME_HEADER_BYTES: Final = 24
SECTOR_BYTES: Final = 512
# The last bit says in which byte order the checksums are.
_MAGIC: Final = 0x377F0682
_MAX_FRAME_AT: Final = 16


def probe_wal(path: Path) -> None:
    """Look at the WAL of the database at path, which a connection of ours has just read.

    Only for a WAL that was synced with every commit. Raises StorageError when it was damaged.
    """
    wal, index = (Path(f"{path.resolve()}{suffix}") for suffix in ("-wal", "-shm"))
    # Without its index SQLite may not write here, and will say so.
    if not (wal.exists() and wal.stat().st_size > HEADER_BYTES and index.exists()):
        return
    with wal.open("rb") as file:
        header = file.read(HEADER_BYTES)
        if not _is_whole(header):
            _refuse(wal)
        page_bytes = int.from_bytes(header[8:12], "big")
        frame_bytes = FRAME_HEADER_BYTES + page_bytes
        at = HEADER_BYTES + _frames_read(index) * frame_bytes
        is_behind_commit = False
        while file.seek(at) and len(frame := file.read(FRAME_HEADER_BYTES)) == FRAME_HEADER_BYTES:
            # Frames of former rounds through the file have another salt.
            if frame[8:16] == header[16:24]:
                if is_behind_commit:
                    _refuse(wal)
                # Torn between two sectors it has the new salt, and the rest of a former frame.
                may_be_torn = at // SECTOR_BYTES != (at + 15) // SECTOR_BYTES
                is_behind_commit = frame[4:8] != bytes(4) and not may_be_torn
            at += frame_bytes


def _refuse(wal: Path) -> None:
    raise StorageError(
        f"{wal} is damaged, and what was committed behind the damage would be lost: restore a "
        "backup, or start once with durability=normal to go on without"
    )


def _is_whole(header: bytes) -> bool:
    """Is its checksum right? It lies in one sector, and is synced before any frame is written."""
    magic = int.from_bytes(header[:4], "big")
    if magic & ~1 != _MAGIC:
        return False
    words = struct.unpack(f"{'>' if magic & 1 else '<'}6I", header[:24])
    first = second = 0
    for one, other in zip(words[::2], words[1::2], strict=True):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + other + first) & 0xFFFFFFFF
    return struct.pack(">2I", first, second) == header[24:32]


def _frames_read(index: Path) -> int:
    """How many frames SQLite takes for good: it says so in the index it makes of them."""
    with index.open("rb") as file:
        file.seek(_MAX_FRAME_AT)
        return int.from_bytes(file.read(4), sys.byteorder)
