"""Say what is wrong with a database file, in words that say what to do about it."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path
from typing import Final

from sqlite_utils import Database

from zmqcluster.errors import StorageError

HEADER: Final = b"SQLite format 3\x00"
HEADER_BYTES: Final = 100
# A whole check of 32 MiB takes about 0.3 s; a larger file gets only the cheap look.
CHECKED_BYTES_MAX: Final = 32 * 1024 * 1024

# What the check says of a page that cannot be read: the disk's fault, and not the file's.
_UNREAD: Final = ("unable to get the page", "failed to get page")


def probe_file(path: Path) -> None:
    """Look at the file before SQLite does: at its header, and whether its end is missing.

    Raises StorageError for what is not a SQLite file at all, or one that was cut off.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
    except FileNotFoundError:
        size = 0
    except OSError as error:
        raise StorageError(f"cannot open the database {path}: {explain(error, path)}") from error
    if size == 0 and _has_log(path, "-wal"):
        # SQLite would take it for a new database, and throw the log away.
        raise StorageError(f"{path} {damaged('it is empty, and its -wal file is not')}")
    if not is_made(path):
        return
    if len(header) < HEADER_BYTES or not header.startswith(HEADER):
        raise StorageError(f"{path} is not a database: move it away, or use another data_dir")
    # A WAL may hold the missing end: SQLite sorts that out itself.
    if size < _pages_end(header) and not _has_log(path, "-wal"):
        raise StorageError(f"{path} {damaged('its end is missing')}")


def is_made(path: Path) -> bool:
    """Is there a database, or only what is left when the making of one was cut short?

    Then a rollback journal lies beside it: SQLite clears up and begins anew.
    """
    return path.exists() and path.stat().st_size > 0 and not _has_log(path, "-journal")


def damaged(how: str) -> str:
    """What to say of a file that is."""
    return f"is damaged ({how}): restore a backup, or start with another data_dir"


def probe_content(database: Database, path: Path) -> None:
    """Let SQLite read through a small file and its indexes, and the schema of a large one.

    Raises StorageError when it finds damage, or cannot read.
    """
    if path.stat().st_size > CHECKED_BYTES_MAX:
        database.table_names()
        return
    (found,) = database.conn.execute("PRAGMA integrity_check(1)").fetchone()
    if found == "ok":
        return
    last = str(found).splitlines()[-1]
    if any(words in last for words in _UNREAD):
        failed = _WORDS["SQLITE_IOERR"].format(error=last)
        raise StorageError(f"cannot read the database {path}: {failed}")
    raise StorageError(f"{path} {damaged(last)}")


def explain(error: sqlite3.Error | OSError, path: Path | None = None) -> str:
    """One clause for people: what is wrong, and what to do.

    path: of the file, from whoever opens it; without it, it is in use.
    """
    if isinstance(error, PermissionError):
        return f"permission denied: make {_folder(path)} writable, or use another data_dir"
    if isinstance(error, OSError) and error.errno in _AS_SQLITE:
        # What the system says of a file that we read or write ourselves.
        return _WORDS[_AS_SQLITE[error.errno]].format(folder=_folder(path), error=error.strerror)
    if isinstance(error, OSError):
        return f"{(error.strerror or str(error)).lower()}: check {_folder(path)}"
    name = getattr(error, "sqlite_errorname", "")
    if path is None and name.startswith("SQLITE_CORRUPT"):
        return _UNREADABLE.format(error=error)
    for prefix, words in _WORDS.items():
        if name.startswith(prefix):
            return words.format(folder=_folder(path), error=error)
    return str(error)


# SQLite calls a read that failed with EIO damage as well (SQLITE_IOERR_CORRUPTFS becomes CORRUPT).
# Who opens the file reads it by itself as well, and can tell; who uses it cannot.
_UNREADABLE: Final = (
    "the disk failed or the file is damaged ({error}): check the disk and start again, and restore "
    "a backup only if that start says damaged"
)
_AS_SQLITE: Final = {errno.EIO: "SQLITE_IOERR", errno.ENOSPC: "SQLITE_FULL"}
_WORDS: Final = {
    "SQLITE_BUSY": "another process holds it locked: stop the other master or tool that uses it",
    "SQLITE_LOCKED": "another process holds it locked: stop the other master or tool that uses it",
    "SQLITE_READONLY": "it cannot be written: make {folder} writable, or use another data_dir",
    # Also where a disk has no room for another file, its log.
    "SQLITE_CANTOPEN": (
        "it cannot be opened: make {folder} writable, with space for new files, or use another "
        "data_dir"
    ),
    "SQLITE_PERM": "permission denied: make {folder} writable, or use another data_dir",
    "SQLITE_FULL": "the disk is full: free some space and start again",
    # It maps the -shm file into memory, so there must be room for it.
    "SQLITE_IOERR_SHM": "there is no room for its -shm file: free some space and start again",
    "SQLITE_IOERR": "the disk failed ({error}): check it, then start again",
    "SQLITE_CORRUPT": "it " + damaged("{error}"),
    "SQLITE_NOTADB": "it is not a database: move it away, or use another data_dir",
    "SQLITE_ERROR": "{error}: if it worked before it is damaged, restore a backup",
}


def _folder(path: Path | None) -> str:
    return str(path.parent) if path else "its folder"


def _pages_end(header: bytes) -> int:
    """Where the last page ends, by the header; 0 when the header does not vouch for it."""
    page_bytes = int.from_bytes(header[16:18], "big")
    page_bytes = 65_536 if page_bytes == 1 else page_bytes
    vouched = header[24:28] == header[92:96]
    return page_bytes * int.from_bytes(header[28:32], "big") if vouched else 0


def _has_log(path: Path, suffix: str) -> bool:
    log = path.with_name(path.name + suffix)
    return log.exists() and log.stat().st_size > 0
