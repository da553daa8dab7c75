"""One seed, one run: whatever the hash seed of the process, everything said is the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SEEDS = range(100, 108)
EVENTS = 4_000
_DIGESTS = """
import sys
from tests.simulation.cluster import Report
from tests.simulation.runs import case_of, run
for seed in map(int, sys.argv[2:]):
    outcome = run(case_of(seed, int(sys.argv[1])))
    assert isinstance(outcome, Report), outcome
    print(seed, outcome.events, outcome.virtual_ms, outcome.digest)
"""


def digests(hash_seed: int) -> subprocess.Popen[str]:
    words = [str(EVENTS), *map(str, SEEDS)]
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed)}
    command = [sys.executable, "-c", _DIGESTS, *words]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def test_the_same_seed_is_the_same_run_under_any_hash_seed() -> None:
    with digests(1) as one, digests(2) as other:
        told, _ = one.communicate()
        told_again, _ = other.communicate()

    assert len(told.splitlines()) == len(SEEDS)
    assert told == told_again
