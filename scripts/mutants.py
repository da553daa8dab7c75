"""Plant bugs in the cores, one at a time, and prove that the simulation catches each.

    python scripts/mutants.py                     # all of tests/mutants/table.py
    python scripts/mutants.py no_fence            # these
    python scripts/mutants.py --jobs 2 --seeds 2000

A mutant that survives, or whose text does not fit the source any more, fails. Exit codes: 0 all
were caught, 1 not, 2 bad usage.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Final

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.mutants.planting import Mutant, NotPlanted, plant
from tests.mutants.table import MUTANTS

ROOT: Final = Path(__file__).resolve().parent.parent
SEEDS: Final = 2_000
# Most bugs show early in a run, and another seed is another swarm: short runs catch sooner.
EVENTS: Final = 6_000


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    by_name = {one.name: one for one in MUTANTS}
    unknown = [name for name in args.names if name not in by_name]
    if unknown:
        print(f"mutants: there is no mutant {unknown[0]}; there are: {', '.join(by_name)}")
        return 2
    chosen = [by_name[name] for name in args.names] if args.names else list(MUTANTS)
    if args.inside:
        return _hunt(chosen[0], args.seeds, args.events)
    return _hunt_all(chosen, args)


def _hunt_all(mutants: list[Mutant], args: argparse.Namespace) -> int:
    console = Console(soft_wrap=True)
    began = time.monotonic()
    survived = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(_apart, one, args): one for one in mutants}
        for done in as_completed(running):
            is_caught, text = done.result()
            survived += not is_caught
            console.print(f"{running[done].name:<32} {text}", markup=False, highlight=False)
    took_s = time.monotonic() - began
    console.print(f"{len(mutants)} mutants, {survived} not caught, {took_s:.0f} s", markup=False)
    return 1 if survived else 0


def _apart(mutant: Mutant, args: argparse.Namespace) -> tuple[bool, str]:
    """In a fresh process: was it caught, and what is there to say?"""
    command = [sys.executable, __file__, mutant.name, "--inside"]
    command += ["--seeds", str(args.seeds), "--events", str(args.events)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines() or ["it said nothing"]
    return done.returncode == 0, lines[-1]


def _hunt(mutant: Mutant, seeds: int, events: int) -> int:
    """In this process, which has imported nothing of the cores yet."""
    try:
        plant(mutant)
    except NotPlanted as error:
        print(f"NOT PLANTED: {error}")
        return 1
    from tests.simulation.runs import Case, Failure, case_of, run, with_words

    began = time.monotonic()
    for seed in range(1, seeds + 1):
        options = with_words(case_of(seed).options, list(mutant.options))
        outcome = run(Case(options, events))
        if isinstance(outcome, Failure):
            took_s = time.monotonic() - began
            print(f"caught by seed {seed:>4}, {took_s:4.1f} s: {outcome.text[:110]}")
            return 0
    print(f"SURVIVED {seeds} seeds: {mutant.breaks}")
    return 1


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="these only")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"at most, each ({SEEDS:,})")
    parser.add_argument("--events", type=int, default=EVENTS, help=f"a run ({EVENTS:,})")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help=f"processes ({cores})")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
