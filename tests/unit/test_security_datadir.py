"""The data directory: private, or refused with words that help; one user of each at a time."""

from __future__ import annotations

import errno
import os
import random
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from zmqcluster.errors import ConfigError, StartError
from zmqcluster.model import DEVICE_ID_PATTERN, DeviceId, SchedulerMode
from zmqcluster.security.datadir import (
    DataDir,
    FileLock,
    make_device_id,
    read_small_file,
    write_small_file,
)

WALL_MS = 1_704_103_200_000


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o000, 0o022, 0o377], ids=oct)
def any_umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("any_umask")
def test_everything_made_is_private_whatever_the_umask(tmp_path: Path) -> None:
    data = DataDir(tmp_path / "data")

    write_small_file(data.api_token_file, "secret\n")
    with data.take_worker_folder() as folder, data.lock_master():
        folders = [data.path, data.keys_folder(), data.workers, folder.path, folder.spool]
        assert [mode_of(path) for path in folders] == [0o700] * 5
        files = [data.api_token_file, data.lock_file, folder.path / "lock"]
        assert [mode_of(path) for path in files] == [0o600] * 3


def test_directory_open_to_others_is_refused_with_the_command_that_helps(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.mkdir(mode=0o755)
    path.chmod(0o755)
    (path / "something").write_text("of the user")

    with pytest.raises(ConfigError, match=rf"data_dir: .*mode 0755.*chmod 700 {path}"):
        DataDir(path)
    assert mode_of(path) == 0o755


def test_empty_directory_of_ours_is_made_private(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.mkdir()
    path.chmod(0o755)

    DataDir(path)

    assert mode_of(path) == 0o700


@pytest.mark.parametrize("where", ["a-file/data", "a-file"])
def test_directory_that_cannot_be_is_refused_before_anything_starts(
    tmp_path: Path, where: str
) -> None:
    (tmp_path / "a-file").write_text("in the way")

    with pytest.raises(ConfigError, match=r"data_dir: .*is or lies in a file: name a directory"):
        DataDir(tmp_path / where)


def test_secret_that_others_can_read_is_refused_and_left_alone(tmp_path: Path) -> None:
    secret = tmp_path / "api-token"
    write_small_file(secret, "s3cret\n")
    assert read_small_file(secret, secret=True) == "s3cret"
    secret.chmod(0o640)

    with pytest.raises(StartError, match=r"mode 0640.*chmod 600") as caught:
        read_small_file(secret, secret=True)

    assert "s3cret" not in str(caught.value)
    assert mode_of(secret) == 0o640


def test_only_plain_small_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "big").write_text("x" * 5000)
    (tmp_path / "link").symlink_to(tmp_path / "big")
    os.mkfifo(tmp_path / "pipe")

    assert read_small_file(tmp_path / "missing", secret=False) is None
    for name in ("big", "link", "pipe"):
        with pytest.raises(StartError, match=name):
            read_small_file(tmp_path / name, secret=False)


def test_interrupted_write_leaves_the_old_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "device-id"
    write_small_file(path, "old\n")

    def no_space(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StartError, match="device-id cannot be written: No space left"):
        write_small_file(path, "new\n")
    assert path.read_text() == "old\n"
    assert [one.name for one in tmp_path.iterdir()] == ["device-id"]


def test_second_master_is_told_who_is_there(tmp_path: Path) -> None:
    data = DataDir(tmp_path / "data")

    with (
        data.lock_master(),
        pytest.raises(StartError, match=rf"another master \(pid {os.getpid()}\)"),
    ):
        DataDir(tmp_path / "data").lock_master()

    data.lock_master().close()


def test_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    ready_read, ready_write = os.pipe()
    child = os.fork()
    if child == 0:
        FileLock.try_take(tmp_path / "lock")
        os.write(ready_write, b"1")
        os.kill(os.getpid(), 9)
    os.read(ready_read, 1)
    os.waitpid(child, 0)
    os.close(ready_read)
    os.close(ready_write)

    lock = FileLock.try_take(tmp_path / "lock")

    assert lock is not None
    lock.close()


def test_lock_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    data = DataDir(tmp_path / "data")
    data.lock_file.mkdir()

    with pytest.raises(StartError, match=f"^{data.lock_file} cannot be opened: Is a directory$"):
        data.lock_master()


def test_full_disk_does_not_keep_a_lock_from_holding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", no_room)
    data = DataDir(tmp_path / "data")

    with data.lock_master(), pytest.raises(StartError, match="another master already uses"):
        data.lock_master()


def test_workers_take_the_lowest_free_folder_and_find_their_id_again(tmp_path: Path) -> None:
    data = DataDir(tmp_path / "data")

    first, second = data.take_worker_folder(), data.take_worker_folder()
    first.remember(make_device_id(SchedulerMode.WORKER, WALL_MS, random.Random(1)))
    remembered = first.device_id()
    first.close()
    again = data.take_worker_folder()

    assert (first.path.name, second.path.name) == ("0", "1")
    assert again.path == first.path
    assert again.device_id() == remembered
    again.close()
    second.close()


def test_named_worker_gets_its_own_folder_and_never_anothers(tmp_path: Path) -> None:
    data = DataDir(tmp_path / "data")
    with data.take_worker_folder() as stranger:
        stranger.remember(make_device_id(SchedulerMode.WORKER, WALL_MS, random.Random(1)))

    with data.take_worker_folder("alpha") as folder:
        folder.remember(DeviceId("alpha"))
        assert folder.path != stranger.path

        with pytest.raises(StartError, match=r"device id alpha is already live.*--device-id"):
            data.take_worker_folder("alpha")

    with data.take_worker_folder("alpha") as again:
        assert again.path == folder.path


def test_master_id_is_made_once_and_an_explicit_one_replaces_it(tmp_path: Path) -> None:
    data = DataDir(tmp_path / "data")
    rng = random.Random(7)

    made = data.master_device_id("", WALL_MS, rng)

    assert re.fullmatch(r"master-1704103200-[0-9a-f]{8}", made)
    assert re.match(DEVICE_ID_PATTERN, made)
    assert data.master_device_id("", WALL_MS + 5000, rng) == made
    assert data.master_device_id("boss", WALL_MS, rng) == "boss"
    assert data.master_device_id("", WALL_MS, rng) == "boss"


def test_damaged_device_id_is_refused_by_name(tmp_path: Path) -> None:
    data = DataDir(tmp_path / "data")
    data.device_id_file.write_text("not an id!\n")

    with pytest.raises(StartError, match="device-id holds no device id: delete it"):
        data.master_device_id("", WALL_MS, random.Random(1))
