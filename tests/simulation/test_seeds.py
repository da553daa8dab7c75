"""A few runs of the simulation in every test run: fixed ones, those that once failed, a fresh one.

Thousands: `make sim`, `make sim-long`, scripts/simulate.py.
"""

from __future__ import annotations

from pathlib import Path
from random import SystemRandom

import pytest

from tests.conftest import Tried
from tests.simulation.runs import Case, Failure, case_of, parse_numbers, run, with_words

FIXED = range(1, 25)
EVENTS = 10_000
SEEDS = Path(__file__).with_name("seeds.txt")


def holds(case: Case, tried: Tried) -> None:
    outcome = run(case)
    if isinstance(outcome, Failure):
        again = f"{case.options.told()}\nagain: {case.command}"
        pytest.fail(f"{again}\n{outcome.check}\n{outcome.text}", pytrace=False)
    tried(
        {
            "simulated seeds": 1,
            "simulated events": outcome.events,
            "simulated faults": sum(outcome.faults.values()),
        }
    )


@pytest.mark.parametrize("seed", FIXED)
def test_fixed_seed_breaks_no_promise(seed: int, tried: Tried) -> None:
    holds(case_of(seed, EVENTS), tried)


def kept() -> list[Case]:
    cases = []
    for line in SEEDS.read_text().splitlines():
        if line and not line.startswith("#"):
            seed, events, words, *_ = line.split()
            options = case_of(int(seed)).options
            changed = with_words(options, [] if words == "-" else words.split(","))
            cases.append(Case(changed, int(events)))
    return cases


@pytest.mark.parametrize("case", kept(), ids=lambda case: str(case.options.seed))
def test_what_once_failed_holds(case: Case, tried: Tried) -> None:
    holds(case, tried)


def test_fresh_seed_breaks_no_promise(tried: Tried) -> None:
    holds(case_of(SystemRandom().randrange(10**9), EVENTS), tried)


def test_a_run_is_told_by_what_makes_it_again() -> None:
    case = Case(with_words(case_of(7).options, ["devices=9", "loss=0.5"]), 12, frozenset({1, 2, 5}))

    command = case.command

    assert "--seed 7 --events 12" in command
    assert "--set devices=9" in command
    assert "--set loss=0.5" in command
    assert "--left-out 1-2,5" in command
    assert parse_numbers("1-2,5") == case.left_out
