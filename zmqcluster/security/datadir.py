"""The data directory: where everything lies, who may read it, and who is using it.

Secrets are files of mode 0600 in directories of mode 0700, whatever the umask. A secret that
others can read is refused, not repaired: it may be known already, and only the operator can tell.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import re
import stat
from pathlib import Path
from typing import Final, Self

from zmqcluster.errors import ConfigError, StartError
from zmqcluster.model import DEVICE_ID_PATTERN, DeviceId, SchedulerMode

DIR_MODE: Final = 0o700
FILE_MODE: Final = 0o600
OTHERS: Final = 0o077
# Nothing we keep in a small file is longer; a bound, so that a device file cannot fill memory.
SMALL_FILE_BYTES_MAX: Final = 4096
# More worker processes on one machine than anybody means to start.
WORKERS_MAX: Final = 1024

_DEVICE_ID: Final = re.compile(DEVICE_ID_PATTERN)


class FileLock:
    """An exclusive lock on a file, held until close() or the end of this process.

    The kernel drops it with the process, so a killed holder never leaves a stale lock. The file
    keeps the holder's pid, for people only.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def try_take(cls, path: Path) -> Self | None:
        """The lock, or None while somebody else (also in this process) holds it.

        Raises StartError when the file cannot be made, opened or locked.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, FILE_MODE)
        except OSError as error:
            raise StartError(f"{path} cannot be opened: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            raise StartError(f"{path} cannot be locked: {error.strerror}") from None
        # A full disk has no room for the pid, and the lock holds without it.
        with contextlib.suppress(OSError):
            os.fchmod(descriptor, FILE_MODE)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return cls(descriptor)

    def close(self) -> None:
        """Let go; harmless when done twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WorkerFolder:
    """What one worker process on this machine keeps: its id, its keys, unacknowledged results.

    Locked for as long as the process lives, so two workers never share an identity.
    """

    def __init__(self, path: Path, lock: FileLock) -> None:
        self.path = path
        self.device_id_file = path / "device-id"
        self.server_public_file = path / "server.pub"
        self.spool = path / "spool"
        self._lock = lock

    def device_id(self) -> DeviceId | None:
        """The id this folder was used with before, if any."""
        return _read_device_id(self.device_id_file)

    def remember(self, device_id: DeviceId) -> None:
        write_small_file(self.device_id_file, device_id + "\n")

    def close(self) -> None:
        """Give the folder to whoever comes next."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class DataDir:
    """Paths below data_dir. Made private on creation; refused when others could read it.

    Raises ConfigError(data_dir) when it cannot be made, written or kept private.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self.database = self.path / "cluster.db"
        self.api_token_file = self.path / "api-token"
        self.join_token_file = self.path / "join-token"
        self.lock_file = self.path / "master.lock"
        self.device_id_file = self.path / "device-id"
        self.keys = self.path / "keys"
        self.workers = self.path / "workers"
        _ensure_private_root(self.path)

    def keys_folder(self) -> Path:
        """Folder of the server's and the local client's keys; made when missing."""
        return self._folder(self.keys)

    def lock_master(self) -> FileLock:
        """Be the only master of this directory. Raises StartError when there is one already."""
        lock = FileLock.try_take(self.lock_file)
        if lock is None:
            raise StartError(
                f"another master{_pid_in(self.lock_file)} already uses {self.path}: "
                "stop it, or give this one its own --data-dir"
            )
        return lock

    def master_device_id(self, wanted: str, wall_ms: int, rng: random.Random) -> DeviceId:
        """The wanted id, else the one remembered, else a new one; remembered from now on."""
        known = _read_device_id(self.device_id_file)
        chosen = DeviceId(wanted) if wanted else known
        if chosen is None:
            chosen = make_device_id(SchedulerMode.MASTER, wall_ms, rng)
        if chosen != known:
            write_small_file(self.device_id_file, chosen + "\n")
        return chosen

    def take_worker_folder(self, wanted: str = "") -> WorkerFolder:
        """Lock a folder for a worker process.

        wanted: a device id given by the operator takes the folder that had it before, else one
        that belongs to nobody; without it the lowest folder not in use.

        Raises StartError when the wanted device id lives in another process of this machine.
        """
        self._folder(self.workers)
        if wanted and (known := self._folder_of(wanted)) is not None:
            return self._take_known(known, wanted)
        for number in range(WORKERS_MAX):
            folder = self._try_worker_folder(self.workers / str(number), nameless=bool(wanted))
            if folder is not None:
                return folder
        raise StartError(f"{WORKERS_MAX} workers already run from {self.path}")

    def _take_known(self, path: Path, wanted: str) -> WorkerFolder:
        folder = self._try_worker_folder(path, nameless=False)
        if folder is None:
            raise StartError(
                f"device id {wanted} is already live on this machine{_pid_in(path / 'lock')}: "
                "stop that worker, or give this one another --device-id"
            )
        return folder

    def _folder_of(self, device_id: str) -> Path | None:
        numbers = (path for path in self.workers.iterdir() if path.name.isdecimal())
        for path in sorted(numbers, key=lambda path: int(path.name)):
            if _read_device_id(path / "device-id") == device_id:
                return path
        return None

    def _try_worker_folder(self, path: Path, *, nameless: bool) -> WorkerFolder | None:
        """nameless: only a folder that has no device id yet will do."""
        self._folder(path)
        lock = FileLock.try_take(path / "lock")
        if lock is None:
            return None
        folder = WorkerFolder(path, lock)
        if nameless and folder.device_id() is not None:
            folder.close()
            return None
        self._folder(folder.spool)
        return folder

    def _folder(self, path: Path) -> Path:
        try:
            _make_private(path)
        except OSError as error:
            raise _unusable(path, error) from None
        return path


def make_device_id(mode: SchedulerMode, wall_ms: int, rng: random.Random) -> DeviceId:
    """`worker-{timestamp}-{random}`: readable, sortable, unique enough without coordination."""
    return DeviceId(f"{mode.value}-{wall_ms // 1000}-{rng.getrandbits(32):08x}")


def write_small_file(path: Path, text: str) -> None:
    """Replace a file in one step, mode 0600: a reader or a crash sees the old text or the new.

    Raises StartError when it cannot be written.
    """
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        _write_through(fresh, text.encode())
        fresh.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise StartError(f"{path} cannot be written: {error.strerror}") from None


def read_small_file(path: Path, *, secret: bool) -> str | None:
    """The stripped text of a small file, or None when there is no such file.

    Raises StartError when it cannot be read, or is a secret that others can read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StartError(f"{path} cannot be read: {error.strerror}") from None
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode) or facts.st_size > SMALL_FILE_BYTES_MAX:
        os.close(descriptor)
        raise StartError(f"{path} is not one of our files: move it away")
    with open(descriptor, "rb") as file:
        if secret and facts.st_mode & OTHERS:
            raise StartError(
                f"{path} can be read by other users (mode {stat.S_IMODE(facts.st_mode):04o}): "
                f"run `chmod 600 {path}`, or delete it if somebody else may know it"
            )
        return file.read().decode("utf-8", "replace").strip()


def _read_device_id(path: Path) -> DeviceId | None:
    text = read_small_file(path, secret=False)
    if not text:
        return None
    if not _DEVICE_ID.match(text):
        raise StartError(f"{path} holds no device id: delete it to get a new one")
    return DeviceId(text)


def _pid_in(lock_file: Path) -> str:
    text = read_small_file(lock_file, secret=False) or ""
    return f" (pid {text})" if text.isdecimal() else ""


def _ensure_private_root(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _make_private(path)
        facts = path.stat()
        if facts.st_mode & OTHERS and facts.st_uid == os.geteuid() and not any(path.iterdir()):
            # Made a moment ago with a plain `mkdir`, for us: closing it surprises nobody.
            path.chmod(DIR_MODE)
            facts = path.stat()
    except OSError as error:
        raise _unusable(path, error) from None
    if facts.st_mode & OTHERS:
        raise ConfigError(
            "data_dir",
            f"{path} is open to other users (mode {stat.S_IMODE(facts.st_mode):04o}) and will hold "
            f"secrets: run `chmod 700 {path}`, or name another directory",
        )
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise _unusable(path, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def _make_private(path: Path) -> None:
    try:
        path.mkdir(mode=DIR_MODE)
    except FileExistsError:
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
    else:
        # mkdir's mode passes through the umask, which may take away our own rights.
        path.chmod(DIR_MODE)


def _unusable(path: Path, error: OSError) -> ConfigError:
    if isinstance(error, NotADirectoryError | FileExistsError):
        return ConfigError("data_dir", f"{path} is or lies in a file: name a directory")
    return ConfigError(
        "data_dir",
        f"{path} cannot be used ({error.strerror}): make it writable for this user, "
        "or name another directory",
    )


def _write_through(path: Path, content: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    descriptor = os.open(path, flags, FILE_MODE)
    with open(descriptor, "wb") as file:
        os.fchmod(descriptor, FILE_MODE)
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
