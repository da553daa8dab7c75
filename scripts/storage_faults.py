"""Cut the power of a master thousands of times, and fail its disk at every single operation.

    python scripts/storage_faults.py                  # the CI tier: about two minutes
    python scripts/storage_faults.py --images 20000   # more of it
    python scripts/storage_faults.py --seed 42        # those images once more

Ends with its totals. Exit codes: 0 nothing was lost, 1 something acknowledged was, a file was
damaged, or a control found no loss (then the rig is broken); 2 bad usage. How it works:
docs/storage-faults.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from random import SystemRandom
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.storage_faults import images, sweep
from tests.storage_faults.images import Verdict, cut_power
from tests.support import sqlite_tap
from tests.support.memory_folder import memory_folder
from zmqcluster.model import Durability

IMAGES: Final = 2_000
# A life: long enough for many checkpoints, and so many images of it that recording costs little.
LIFE_COMMITS: Final = 250
LIFE_IMAGES: Final = 200
# The first syncs make the database; those of commits and checkpoints follow.
FAILING_SYNCS: Final = 50
# Of a hundred images of each kind with full durability, so many are of a control as well.
NORMAL_PCT: Final = 15
OFF_PCT: Final = 5


def main() -> int:
    arguments = _arguments()
    if missing := sqlite_tap.missing():
        print(f"SKIPPED, storage faults: this machine has no {missing}")
        return 0
    print(f"seed {arguments.seed}", flush=True)
    began = time.monotonic()
    tried = Counter[str]()
    problems = [*_power_loss(arguments.images, arguments.seed, tried), *_failing_disk(tried)]
    print(*problems, sep="\n", end="\n" if problems else "")
    told = ", ".join(f"{count:,} {what}" for what, count in tried.items())
    print(f"{told}: {len(problems)} problems in {time.monotonic() - began:.0f} s")
    return 1 if problems else 0


def _power_loss(count: int, seed: int, tried: Counter[str]) -> list[str]:
    """What is wrong with the images; prints a line for each kind, and counts all."""
    full = images.Totals(Durability.FULL)
    for number, wanted in enumerate(_shares(count * 7 // 10, LIFE_IMAGES), start=seed):
        cut_power(full.durability, images=wanted, commits=LIFE_COMMITS, seed=number, totals=full)
    _say("lives", full, tried)
    making = images.Totals(Durability.FULL)
    for number, wanted in enumerate(_shares(count // 10, LIFE_IMAGES), start=seed):
        cut_power(making.durability, images=wanted, commits=2, seed=number, totals=making)
    _say("while the database is made", making, tried)
    failing = images.Totals(Durability.FULL)
    for number, wanted in enumerate(_shares(count * 2 // 10, 10)):
        cut_power(
            failing.durability,
            images=wanted,
            commits=20,
            seed=seed + number,
            totals=failing,
            failing_sync=1 + number % FAILING_SYNCS,
            kills=number % 4 > 0,
        )
    _say("after a sync that failed", failing, tried)
    normal, off = images.Totals(Durability.NORMAL), images.Totals(None)
    for control, percent in ((normal, NORMAL_PCT), (off, OFF_PCT)):
        wanted = count * percent // 100
        cut_power(
            control.durability, images=wanted, commits=LIFE_COMMITS, seed=seed, totals=control
        )
        _say("control", control, tried)
    problems = [story for one in (full, making, failing) for story in one.stories]
    if not normal.verdicts[Verdict.LOST]:
        problems.append("the rig is broken: synchronous=normal lost nothing")
    if normal.verdicts[Verdict.REFUSED] + normal.verdicts[Verdict.DAMAGED]:
        problems.append("synchronous=normal damaged a file")
    if not off.verdicts[Verdict.REFUSED] + off.verdicts[Verdict.DAMAGED]:
        problems.append("the rig is broken: synchronous=off damaged nothing")
    return problems


def _failing_disk(tried: Counter[str]) -> list[str]:
    """What is wrong with how a master takes each failure; prints a line for each kind."""
    problems = list[str]()
    for trouble in sweep.TROUBLES:
        for stays in (False, True):
            totals = sweep.Totals()
            with memory_folder() as folder:
                sweep.sweep(folder, trouble, stays=stays, totals=totals)
            _say(f"{trouble.name} {'for good' if stays else 'once'}", totals, tried)
            problems += totals.stories
            if not totals.stopped:
                problems.append(f"the rig is broken: nobody noticed {trouble.name}")
    return problems


def _shares(count: int, most: int) -> list[int]:
    """count in parts of at most so many."""
    return [min(most, count - start) for start in range(0, count, most)]


def _say(what: str, totals: images.Totals | sweep.Totals, tried: Counter[str]) -> None:
    print(f"{what}: {totals}", flush=True)
    tried.update(totals.tried)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=IMAGES, help=f"default {IMAGES}")
    seed = SystemRandom().randrange(1_000_000)
    parser.add_argument("--seed", type=int, default=seed, help="default: a fresh one")
    arguments = parser.parse_args()
    if arguments.images < 100:
        parser.error("--images: at least 100, or the controls find nothing")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
