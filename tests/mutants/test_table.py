"""The table of planted bugs fits the source. That each is caught: `make mutants`."""

from __future__ import annotations

import pytest

from tests.conftest import Tried
from tests.mutants.planting import Mutant, NotPlanted, mutated, source_of
from tests.mutants.table import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_can_be_planted(mutant: Mutant, tried: Tried) -> None:
    source = mutated(mutant, source_of(mutant.module))

    compile(source, mutant.module, "exec")
    tried({"bugs that can be planted": 1})


def test_names_are_not_given_twice() -> None:
    assert len({one.name for one in MUTANTS}) == len(MUTANTS)


def test_text_that_is_not_there_once_is_refused() -> None:
    mutant = Mutant("gone", "zmqcluster.core.rates", "no such text", "", "nothing")

    with pytest.raises(NotPlanted, match="0 times"):
        mutated(mutant, source_of(mutant.module))
