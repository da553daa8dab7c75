"""Plant bugs in the cores, one at a time, and prove that the simulation catches each.

    python scripts/mutants.py                     # all of tests/mutants/table.py
    python scripts/mutants.py no_fence            # these
    python scripts/mutants.py --jobs 2 --seeds 2000

A mutant fails that survives, whose text does not fit the source any more, or whose run breaks a
promise without the bug, too. Exit codes: 0 all were caught, 1 not, 2 bad usage.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.mutants.planting import Mutant, NotPlanted, plant
from tests.mutants.table import MUTANTS

ROOT: Final = Path(__file__).resolve().parent.parent
SEEDS: Final = 2_000
# Most bugs show early in a run, and another seed is another swarm: short runs catch sooner.
EVENTS: Final = 6_000


class Hunt(Struct):
    """What came of one mutant. seeds, events: that were run; caught_by: a seed, 0 is none.

    kind: the error's, as in "Violation".
    """

    text: str
    caught_by: int = 0
    kind: str = ""
    seeds: int = 0
    events: int = 0
    took_s: float = 0.0


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    by_name = {one.name: one for one in MUTANTS}
    unknown = [name for name in args.names if name not in by_name]
    if unknown:
        print(f"mutants: there is no mutant {unknown[0]}; there are: {', '.join(by_name)}")
        return 2
    chosen = [by_name[name] for name in args.names] if args.names else list(MUTANTS)
    if args.inside:
        print(msgspec.json.encode(_hunt(chosen[0], args.seeds, args.events)).decode())
        return 0
    return _hunt_all(chosen, args)


def _hunt_all(mutants: list[Mutant], args: argparse.Namespace) -> int:
    console = Console(soft_wrap=True)
    began = time.monotonic()
    caught = seeds = events = 0
    kinds = Counter[str]()
    # Those that need options are the hardest to find: begun last, one of them alone would end last.
    ordered = sorted(mutants, key=lambda one: not one.options)
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(_apart, one, args): one for one in ordered}
        for done in as_completed(running):
            mutant, hunt = running[done], done.result()
            problem = hunt.text
            if hunt.caught_by:
                # In this process nothing was planted.
                problem = _without_the_bug(mutant, hunt.caught_by, args.events)
            caught += not problem
            kinds[hunt.kind] += not problem
            seeds += hunt.seeds
            events += hunt.events
            told = f"seed {hunt.caught_by:>4}, {hunt.took_s:4.1f} s: {hunt.text[:110]}"
            console.print(f"{mutant.name:<32} {problem or told}", markup=False, highlight=False)
    took_s = time.monotonic() - began
    # A Violation is the judge's own word; other errors are how the core noticed, or fell over it.
    told = ", ".join(f"{count} by {kind}" for kind, count in kinds.most_common() if count)
    console.print(f"caught: {told}", markup=False, highlight=False)
    console.print(
        f"{len(mutants)} mutants, {len(mutants) - caught} not caught, {seeds:,} seeds, "
        f"{events:,} events, {took_s:.0f} s",
        markup=False,
        highlight=False,
    )
    return 0 if caught == len(mutants) else 1


def _apart(mutant: Mutant, args: argparse.Namespace) -> Hunt:
    """In a fresh process."""
    command = [sys.executable, __file__, mutant.name, "--inside"]
    command += ["--seeds", str(args.seeds), "--events", str(args.events)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["it said nothing"]
        return Hunt(f"BROKEN: {lines[-1]}")
    return msgspec.json.decode(done.stdout, type=Hunt)


def _hunt(mutant: Mutant, seeds: int, events: int) -> Hunt:
    """In this process, which has imported nothing of the cores yet."""
    try:
        plant(mutant)
    except NotPlanted as error:
        return Hunt(f"NOT PLANTED: {error}")
    from tests.simulation.runs import Case, Failure, case_of, run, with_words

    hunt = Hunt(f"SURVIVED {seeds} seeds: {mutant.breaks}")
    began = time.monotonic()
    for seed in range(1, seeds + 1):
        options = with_words(case_of(seed).options, list(mutant.options))
        outcome = run(Case(options, events))
        hunt.seeds = seed
        hunt.events += outcome.at_event if isinstance(outcome, Failure) else outcome.events
        if isinstance(outcome, Failure):
            hunt.caught_by, hunt.text = seed, outcome.text
            hunt.kind = outcome.check.partition(" ")[0]
            break
    hunt.took_s = time.monotonic() - began
    return hunt


def _without_the_bug(mutant: Mutant, seed: int, events: int) -> str:
    """Why the run that caught it proves nothing; empty: it is sound without the bug."""
    from tests.simulation.runs import Case, Failure, case_of, run, with_words

    case = Case(with_words(case_of(seed).options, list(mutant.options)), events)
    outcome = run(case)
    if not isinstance(outcome, Failure):
        return ""
    return f"FAILS WITHOUT IT, TOO: {outcome.text}; again: {case.command}"


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
