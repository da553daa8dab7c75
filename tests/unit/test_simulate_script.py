"""What scripts/simulate.py says in the end."""

from __future__ import annotations

import re

import pytest

from scripts import simulate


def test_the_last_line_is_what_all_runs_came_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main(["--seed", "4", "--events", "300"]) == 0

    *_, last = capsys.readouterr().out.splitlines()

    form = (
        r"simulation: 1 seeds, (\d[\d,]*) events, \d+\.\d hours of virtual time, (\d+) tasks, "
        r"0 violations"
    )
    found = re.fullmatch(form, last)
    assert found, last
    assert int(found[1].replace(",", "")) >= 300
    assert int(found[2]) > 0
