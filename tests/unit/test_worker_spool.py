"""What a restarted worker finds of the results a former process kept."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from zmqcluster.errors import StartError
from zmqcluster.messages import AttemptRef, TaskResult
from zmqcluster.model import Outcome
from zmqcluster.runtime import spool as spool_module
from zmqcluster.runtime.spool import Spool

BYTES_MAX = 1 << 20


def done(task_id: int, result: bytes = b"\xc0") -> TaskResult:
    return TaskResult(task_id, 1, Outcome.COMPLETED, result)


def refs(*task_ids: int) -> list[AttemptRef]:
    return [AttemptRef(task_id, 1) for task_id in task_ids]


def opened(folder: Path) -> tuple[Spool, list[int]]:
    spool = Spool(folder, BYTES_MAX)
    return spool, [one.task_id for one in spool.load()]


def test_results_survive_the_process_that_kept_them(tmp_path: Path) -> None:
    first, found = opened(tmp_path)
    assert found == []
    first.keep([done(1), done(2)])
    first.keep([done(3)])
    first.forget(refs(2, 99))
    # Nothing is closed: the process was killed.
    second = Spool(tmp_path, BYTES_MAX)

    assert [one for one in second.load() if one.task_id != 2] == [done(1), done(3)]
    first.close()
    second.close()


def test_folder_of_a_quiet_worker_is_empty(tmp_path: Path) -> None:
    spool, _ = opened(tmp_path)
    spool.keep([done(1), done(2)])
    spool.forget(refs(1, 2))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 0
    spool.close()

    _, found = opened(tmp_path)

    assert found == []
    assert list(tmp_path.iterdir()) == []


def test_segments_go_when_all_their_results_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES", 1_000)
    spool, _ = opened(tmp_path)
    for task_id in range(1, 31):
        spool.keep([done(task_id, b"x" * 300)])
    assert len(list(tmp_path.iterdir())) > 5

    spool.forget(refs(*range(1, 30)))

    assert len(list(tmp_path.iterdir())) == 1
    spool.close()


def test_results_of_a_former_process_are_forgotten_like_any(tmp_path: Path) -> None:
    first, _ = opened(tmp_path)
    first.keep([done(1), done(2)])
    first.close()
    second, found = opened(tmp_path)
    assert found == [1, 2]
    second.keep([done(3)])

    second.forget(refs(1, 2))
    second.close()

    third, found = opened(tmp_path)
    assert found == [3]
    third.close()


@pytest.mark.parametrize("where", ["head", "body", "tail"])
def test_damaged_entries_are_skipped_and_counted(tmp_path: Path, where: str) -> None:
    spool, _ = opened(tmp_path)
    for task_id in (1, 2, 3):
        spool.keep([done(task_id, b"x" * 50)])
    spool.close()
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    entry_bytes = len(content) // 3
    match where:
        case "head":
            content[entry_bytes + 1] ^= 0xFF
        case "body":
            content[entry_bytes + 50] ^= 0xFF
        case _:
            del content[-5:]
    path.write_bytes(content)

    second, found = opened(tmp_path)

    assert found == {"head": [1], "body": [1, 3], "tail": [1, 2]}[where]
    assert second.damaged == 1
    second.close()


@given(content=st.binary(max_size=200))
@hypothesis_settings(max_examples=50, deadline=None)
def test_no_bytes_on_disk_stop_a_start(
    content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    (folder / "00000001.spool").write_bytes(content)

    spool, found = opened(folder)

    assert found == []
    assert spool.damaged > 0 or not content
    spool.close()


def test_full_spool_refuses_and_goes_on(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 1_000)
    spool.load()
    spool.keep([done(1, b"x" * 600)])
    spool.keep([done(2, b"x" * 600)])
    assert spool.refused == 1
    spool.forget(refs(1))

    spool.keep([done(3, b"x" * 600)])
    spool.close()

    assert opened(tmp_path)[1] == [3]


def test_disk_that_fails_in_mid_write_hides_nothing_that_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, _ = opened(tmp_path)
    spool.keep([done(1)])
    write, calls = os.write, 0

    def half_then_fail(descriptor: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:5])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half_then_fail)
        spool.keep([done(2)])
    spool.keep([done(3)])
    spool.close()

    again, found = opened(tmp_path)
    assert found == [1, 3]
    assert (spool.refused, again.damaged) == (1, 0)
    again.close()


def test_disk_that_stays_full_is_not_filled_with_empty_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    spool, _ = opened(tmp_path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        for task_id in range(20):
            spool.keep([done(task_id)])

    assert list(tmp_path.iterdir()) == []
    assert spool.refused == 20
    spool.keep([done(1)])
    assert len(spool) == 1
    spool.close()


def test_files_are_private(tmp_path: Path) -> None:
    spool, _ = opened(tmp_path)
    spool.keep([done(1)])
    spool.close()

    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600


def test_unreadable_folder_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")

    with pytest.raises(StartError, match="cannot be read"):
        opened(tmp_path / "file")
