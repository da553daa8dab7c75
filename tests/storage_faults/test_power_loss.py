"""The power goes at any moment, and the disk keeps what it likes of what was not synced.

The quick tier; `scripts/storage_faults.py` cuts thousands of times.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from storage.database import open_writer
from tests.storage_faults.conftest import Tell
from tests.storage_faults.images import Totals, Verdict, cut_power
from tests.support import sqlite_tap
from tests.support.power_loss import Recording
from tests.support.sqlite_tap import Kind, tapped
from zmqcluster.model import Durability

pytestmark = pytest.mark.skipif(bool(sqlite_tap.missing()), reason=f"no {sqlite_tap.missing()}")

FULL = Durability.FULL
ONE_LIFE = 200


def test_power_loss_costs_nothing_that_was_acknowledged(tell: Tell) -> None:
    totals = Totals(FULL)

    cut_power(FULL, images=150, commits=ONE_LIFE, seed=1, totals=totals)

    tell(totals)
    assert totals.verdicts == {Verdict.KEPT: 150}, totals.stories


def test_a_frame_that_was_torn_between_two_sectors_is_no_damage(tell: Tell) -> None:
    totals = Totals(FULL)

    cut_power(FULL, images=200, commits=250, seed=647725, totals=totals)

    tell(totals)
    assert totals.verdicts == {Verdict.KEPT: 200}, totals.stories


def test_power_loss_while_the_database_is_made_leaves_one_that_opens(tell: Tell) -> None:
    totals = Totals(FULL)

    cut_power(FULL, images=100, commits=2, seed=2, totals=totals)

    tell(totals)
    assert totals.verdicts == {Verdict.KEPT: 100}, totals.stories


def test_a_database_whose_first_page_was_torn_is_begun_anew(tmp_path: Path) -> None:
    recording, path = Recording(), tmp_path / "cluster.db"
    with tapped(recording):
        open_writer(tmp_path / "whole.db").close()
    journal = bytearray(512)
    for one in recording.operations:
        assert one is not None
        if one.kind is Kind.WRITE and one.name == "whole.db-journal":
            journal[one.at : one.at + len(one.data)] = one.data

    # The page's first sector did not make it, but a later one did.
    path.write_bytes(bytes(4096))
    path.with_name("cluster.db-journal").write_bytes(journal)

    with closing(open_writer(path)) as database:
        assert "tasks" in database.table_names()


@pytest.mark.parametrize("kills", [True, False])
def test_a_sync_that_failed_costs_nothing_that_was_acknowledged_before_or_later(
    kills: bool, tell: Tell
) -> None:
    totals = Totals(FULL)

    for failing in range(1, 50, 8):
        cut_power(
            FULL,
            images=15,
            commits=20,
            seed=failing,
            totals=totals,
            failing_sync=failing,
            kills=kills,
        )

    tell(totals)
    assert totals.verdicts == {Verdict.KEPT: 105}, totals.stories


def test_control_without_a_sync_for_each_commit_some_are_lost_and_none_is_damaged(
    tell: Tell,
) -> None:
    totals = Totals(Durability.NORMAL)

    cut_power(Durability.NORMAL, images=50, commits=ONE_LIFE, seed=3, totals=totals)

    tell(totals)
    assert totals.verdicts[Verdict.LOST] > 10, "the rig is broken: it finds no loss"
    assert set(totals.verdicts) == {Verdict.KEPT, Verdict.LOST}, totals.stories


def test_control_without_any_sync_databases_are_damaged(tell: Tell) -> None:
    totals = Totals(None)

    cut_power(None, images=30, commits=ONE_LIFE, seed=4, totals=totals)

    tell(totals)
    broken = totals.verdicts[Verdict.REFUSED] + totals.verdicts[Verdict.DAMAGED]
    assert broken > 10, "the rig is broken: it finds no damage"
