"""The disk fails at any one thing asked of it: once, or from there on.

The quick tier tries every few operations; `scripts/storage_faults.py` tries all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from sqlite_utils import Database

from storage import database, writer
from tests.storage_faults.conftest import Tell
from tests.storage_faults.sweep import EIO, TROUBLES, Totals, Trouble, sweep
from tests.support import sqlite_tap
from tests.support.memory_folder import memory_folder
from zmqcluster.core.effects import Changes
from zmqcluster.errors import StorageError

pytestmark = pytest.mark.skipif(bool(sqlite_tap.missing()), reason=f"no {sqlite_tap.missing()}")

# Coprime to the number of operations of a turn, so that all kinds come up.
STEP = 17


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.mark.parametrize("stays", [False, True], ids=["once", "for_good"])
@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda one: one.name)
def test_a_failing_disk_ends_the_master_in_one_sentence_and_costs_nothing_acknowledged(
    folder: Path, trouble: Trouble, stays: bool, tell: Tell
) -> None:
    totals = Totals()

    sweep(folder, trouble, stays=stays, totals=totals, step=STEP)

    tell(totals)
    assert totals.operations > 10
    assert totals.stopped > totals.operations // 2, "the rig is broken: nobody noticed"
    assert not totals.stories, totals.stories


def test_control_a_failed_commit_that_is_acknowledged_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    totals, apply = Totals(), writer.apply

    def careless(database: Database, changes: Changes) -> bool:
        with suppress(StorageError):
            return apply(database, changes)
        return False

    monkeypatch.setattr(writer, "apply", careless)

    sweep(folder, EIO, stays=False, totals=totals, step=STEP)

    assert any("were acknowledged, others are there" in one for one in totals.stories)


def test_control_an_error_of_another_kind_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    totals = Totals()

    @contextmanager
    def no_words(doing: str, path: Path | None = None) -> Iterator[None]:
        yield

    monkeypatch.setattr(database, "storage_errors", no_words)

    sweep(folder, EIO, stays=False, totals=totals, step=STEP)

    assert any("OperationalError: disk I/O error" in one for one in totals.stories)
