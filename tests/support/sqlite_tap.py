"""Sit between this Python's own SQLite and its files: see every operation, and fail any of them.

A VFS is SQLite's layer to the operating system. The one of the platform is copied here and put in
front as the default, with seven of its functions leading through Python; all others, and the shared
memory, stay native. So the code under test, its SQL and its connections are what they always are.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_char_p, c_int, c_int64, c_void_p
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, Final, Protocol

from msgspec import Struct

OK: Final = 0
IOERR_READ: Final = 266
IOERR_WRITE: Final = 778
IOERR_FSYNC: Final = 1034
IOERR_TRUNCATE: Final = 1546
IOERR_DELETE: Final = 2570
FULL: Final = 13
CANTOPEN: Final = 14

_NAME: Final = b"tap"
_OPEN_CREATE: Final = 0x4
# Files that outlive a process: the database, its rollback journal and its WAL.
_KEPT: Final = 0x100 | 0x800 | 0x80000


class Kind(StrEnum):
    """What is done to a file."""

    OPEN = "open"
    READ = "read"
    WRITE = "write"
    TRUNCATE = "truncate"
    SYNC = "sync"
    DELETE = "delete"


class Operation(Struct, frozen=True):
    """One of them, just before it happens. name: of the file, without its folder.

    at: where it begins, or the length a truncation leaves. data: of a write. makes: the file is
    not there yet. syncs_folder: a deletion that is to be durable. fails: for a handler's own notes.
    """

    kind: Kind
    name: str
    at: int = 0
    data: bytes = b""
    makes: bool = False
    syncs_folder: bool = False
    fails: bool = False


class Handler(Protocol):
    """Says what becomes of an operation: OK lets it happen, any other code is SQLite's to hear.

    A write that fails has written the first `short_bytes` of its data.
    """

    @property
    def short_bytes(self) -> int: ...

    def on_operation(self, operation: Operation) -> int: ...


def missing() -> str:
    """What this Python lacks for a tap; "" when nothing."""
    if not Path("/proc/self/fd").is_dir():
        return "/proc"
    try:
        ctypes.CDLL(_sqlite3.__file__).sqlite3_vfs_find  # noqa: B018  # looks the name up
    except (AttributeError, OSError):
        return "a sqlite3 module with a library of its own"
    return ""


@contextmanager
def tapped(handler: Handler) -> Iterator[None]:
    """Databases opened inside lead through handler. Close them inside too.

    So does what Python itself writes by os.pwrite and syncs by os.fsync.
    """
    tap = _tap()
    tap.install(handler)
    try:
        with _python_tapped(handler):
            yield
    finally:
        tap.remove()


@contextmanager
def _python_tapped(handler: Handler) -> Iterator[None]:
    write, sync = os.pwrite, os.fsync

    def ask(kind: Kind, file: int, at: int = 0, data: bytes = b"") -> None:
        name = Path(os.readlink(f"/proc/self/fd/{file}")).name
        if handler.on_operation(Operation(kind, name, at, data)) != OK:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def asking_write(file: int, data: bytes, at: int) -> int:
        ask(Kind.WRITE, file, at, data)
        return write(file, data, at)

    def asking_sync(file: int) -> None:
        ask(Kind.SYNC, file)
        sync(file)

    python: Any = os
    python.pwrite, python.fsync = asking_write, asking_sync
    try:
        yield
    finally:
        python.pwrite, python.fsync = write, sync


class _Vfs(Structure):
    pass


# Paths as addresses: SQLite keeps an open file's, and has the URI's parameters lie behind it.
_Open = ctypes.CFUNCTYPE(c_int, POINTER(_Vfs), c_void_p, c_void_p, c_int, POINTER(c_int))
_Delete = ctypes.CFUNCTYPE(c_int, POINTER(_Vfs), c_void_p, c_int)

_Vfs._fields_ = [
    ("iVersion", c_int),
    ("szOsFile", c_int),
    ("mxPathname", c_int),
    ("pNext", c_void_p),
    ("zName", c_char_p),
    ("pAppData", c_void_p),
    ("xOpen", _Open),
    ("xDelete", _Delete),
    # xAccess … xNextSystemCall: taken over as they are.
    ("others", c_void_p * 14),
]

_Close = ctypes.CFUNCTYPE(c_int, c_void_p)
# Reads have the same shape.
_Write = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64)
_Truncate = ctypes.CFUNCTYPE(c_int, c_void_p, c_int64)
_Sync = ctypes.CFUNCTYPE(c_int, c_void_p, c_int)


class _Methods(Structure):
    _fields_ = (
        ("iVersion", c_int),
        ("xClose", _Close),
        ("xRead", _Write),
        ("xWrite", _Write),
        ("xTruncate", _Truncate),
        ("xSync", _Sync),
        # xFileSize … xUnfetch: taken over as they are.
        ("others", c_void_p * 13),
    )


class _Tap:
    """One for the process: SQLite keeps pointers to it."""

    def __init__(self) -> None:
        # The very library that the sqlite3 module uses, by way of that module.
        self._sqlite: Any = ctypes.CDLL(_sqlite3.__file__)
        self._sqlite.sqlite3_vfs_find.restype = POINTER(_Vfs)
        self._handler: Handler | None = None
        self._names: dict[int, str] = {}
        self._native_of: dict[int, _Methods] = {}
        # The tables that lead here, by the address of the native table each is a copy of.
        self._methods: dict[int, _Methods] = {}
        self._native = self._sqlite.sqlite3_vfs_find(None)
        self._vfs = _Vfs.from_buffer_copy(self._native.contents)
        self._vfs.zName = _NAME
        self._vfs.xOpen = _Open(self._open)
        self._vfs.xDelete = _Delete(self._delete)
        self._close, self._read = _Close(self._on_close), _Write(self._on_read)
        self._write = _Write(self._on_write)
        self._truncate, self._sync = _Truncate(self._on_truncate), _Sync(self._on_sync)

    def install(self, handler: Handler) -> None:
        assert self._handler is None, "one tap at a time"
        self._handler = handler
        assert self._sqlite.sqlite3_vfs_register(ctypes.byref(self._vfs), 1) == OK

    def remove(self) -> None:
        self._handler = None
        self._sqlite.sqlite3_vfs_unregister(ctypes.byref(self._vfs))
        assert self._sqlite.sqlite3_vfs_register(self._native, 1) == OK
        left = sorted(self._names.values())
        assert not left, f"still open through the tap: {left}"

    def _ask(self, operation: Operation) -> int:
        return self._handler.on_operation(operation) if self._handler is not None else OK

    def _open(self, vfs: Any, path: int, file: int, flags: int, out: Any) -> int:
        if not flags & _KEPT:
            return int(self._native.contents.xOpen(vfs, path, file, flags, out))
        here = _path(path)
        makes = bool(flags & _OPEN_CREATE) and not here.exists()
        code = self._ask(Operation(Kind.OPEN, here.name, makes=makes))
        methods = c_void_p.from_address(file)
        if code != OK:
            # No methods: there is nothing to close.
            methods.value = None
            return code
        code = int(self._native.contents.xOpen(vfs, path, file, flags, out))
        if code == OK:
            assert methods.value is not None
            self._names[file] = here.name
            self._native_of[file] = _Methods.from_address(methods.value)
            methods.value = ctypes.addressof(self._leading_here(methods.value))
        return code

    def _leading_here(self, native: int) -> _Methods:
        if native not in self._methods:
            copy = _Methods.from_buffer_copy(_Methods.from_address(native))
            copy.xClose, copy.xRead, copy.xWrite = self._close, self._read, self._write
            copy.xTruncate, copy.xSync = self._truncate, self._sync
            self._methods[native] = copy
        return self._methods[native]

    def _delete(self, vfs: Any, path: int, sync: int) -> int:
        name = _path(path).name
        code = self._ask(Operation(Kind.DELETE, name, syncs_folder=bool(sync)))
        return code or int(self._native.contents.xDelete(vfs, path, sync))

    def _on_close(self, file: int) -> int:
        del self._names[file]
        return int(self._native_of.pop(file).xClose(file))

    def _on_read(self, file: int, into: int, length: int, at: int) -> int:
        code = self._ask(Operation(Kind.READ, self._names[file], at))
        return code or int(self._native_of[file].xRead(file, into, length, at))

    def _on_write(self, file: int, data: int, length: int, at: int) -> int:
        operation = Operation(Kind.WRITE, self._names[file], at, ctypes.string_at(data, length))
        code = self._ask(operation)
        if code != OK:
            assert self._handler is not None
            length = min(length, self._handler.short_bytes)
        written = int(self._native_of[file].xWrite(file, data, length, at)) if length else OK
        return code or written

    def _on_truncate(self, file: int, length: int) -> int:
        code = self._ask(Operation(Kind.TRUNCATE, self._names[file], length))
        return code or int(self._native_of[file].xTruncate(file, length))

    def _on_sync(self, file: int, flags: int) -> int:
        code = self._ask(Operation(Kind.SYNC, self._names[file]))
        return code or int(self._native_of[file].xSync(file, flags))


def _path(address: int) -> Path:
    return Path(ctypes.string_at(address).decode())


@cache
def _tap() -> _Tap:
    return _Tap()
