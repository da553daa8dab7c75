"""Which faults are chosen, and how a run is summed up."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pytest

from scripts import chaos
from tests.chaos.catalogue import CAN, Fault, Tier, load_all
from tests.chaos.rig import Rig


def broken(_: Rig) -> None:
    raise AssertionError("a task was lost")


def nothing(_: Rig) -> None:
    pass


ARGS = argparse.Namespace(seed=1, keep=False, jobs=2)


def fault(number: int, inject: object = nothing, needs: tuple[str, ...] = ()) -> Fault:
    return Fault(number, f"fault {number}", "here", Tier.CI, needs, inject)  # type: ignore[arg-type]  # as typed


def test_faults_are_chosen_by_number_or_by_words_of_their_names() -> None:
    assert [one.number for one in chaos.chosen("8")] == [8]
    assert {22, 23} <= {one.number for one in chaos.chosen("partition")}
    with pytest.raises(SystemExit, match="2"):
        chaos.chosen("no such words")


def test_tier_holds_those_below_it() -> None:
    quick, all_of_them = chaos.of_tier(Tier.QUICK), chaos.of_tier(Tier.LONG)

    assert {one.tier for one in quick} == {Tier.QUICK}
    assert len(all_of_them) == len(load_all())


def test_whatever_a_fault_may_need_can_be_probed() -> None:
    assert {need for one in load_all().values() for need in one.needs} <= set(CAN)


def test_one_broken_fault_fails_the_run_and_a_skipped_one_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(CAN, "a second disk", lambda: False)
    faults = [fault(1), fault(2, broken), fault(3, needs=("a second disk",))]

    assert chaos.run(faults, ARGS) == 1

    said = capsys.readouterr().out
    assert "PARTLY, 1 faults held, 1 broken, 1 skipped" in said
    assert "a task was lost" in said
    assert "skipped 3 fault 3: a second disk is missing" in said
    assert chaos.run([fault(1)], ARGS) == 0
    assert "PARTLY" not in capsys.readouterr().out


def test_a_run_in_which_nothing_was_injected_proves_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CAN, "a second disk", lambda: False)

    assert chaos.run([fault(3, needs=("a second disk",))], ARGS) == 1

    assert "No fault was injected" in capsys.readouterr().out


def test_sparkline_spans_the_least_and_the_greatest() -> None:
    assert chaos.sparkline([]) == ""
    assert chaos.sparkline([5.0, 5.0]) == "▁▁"
    assert chaos.sparkline([0.0, 1.0, 2.0])[0::2] == "▁█"
    assert len(chaos.sparkline([float(n) for n in range(1000)])) <= chaos.SPARK_COLUMNS
