"""Run the cluster's real cores in a virtual world where everything goes wrong.

    python scripts/simulate.py                        # 3,000 fresh seeds
    python scripts/simulate.py --seed 42              # one run, again
    python scripts/simulate.py --seeds 1-500 --jobs 2
    python scripts/simulate.py --ci                   # as many fresh seeds as fit into 5 minutes

A run that breaks a promise is told first with its seed and all that was drawn from it, then made
as small as possible. Exit codes: 0 no violation, 1 a violation, 2 bad usage. How it works and what
an event is: docs/simulation.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path
from random import SystemRandom
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.simulation.cluster import Report
from tests.simulation.options import FAULTS
from tests.simulation.runs import (
    EVENTS,
    Case,
    Failure,
    case_of,
    parse_numbers,
    run,
    with_words,
)
from tests.simulation.shrink import shrink

SEEDS: Final = 3_000
CI_MINUTES: Final = 5.0
# So many runs go to a process at once: talk between processes is not free.
PORTION: Final = 4
LINE_EVERY_S: Final = 10
SHRINK_S: Final = 120


class Totals:
    """What all runs together came to."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.seeds = self.events = self.virtual_ms = self.tasks = 0
        self.faults: Counter[str] = Counter()
        self.failures: list[Failure] = []

    def add(self, outcome: Report | Failure) -> None:
        self.seeds += 1
        if isinstance(outcome, Failure):
            self.events += outcome.at_event
            self.failures.append(outcome)
            return
        self.events += outcome.events
        self.virtual_ms += outcome.virtual_ms
        self.tasks += outcome.tasks
        self.faults.update(outcome.faults)

    @property
    def line(self) -> str:
        took_s = time.monotonic() - self.began
        return (
            f"{self.seeds:,} seeds  {self.events:,} events  {self.events / took_s:,.0f} events/s  "
            f"{self.faults.total():,} faults  {len(self.failures)} violations  {took_s:.0f} s"
        )

    @property
    def total(self) -> str:
        """What it all came to, in one line that a log can be searched for."""
        return (
            f"simulation: {self.seeds:,} seeds, {self.events:,} events, {self.virtual_hours:,.1f} "
            f"hours of virtual time, {self.tasks:,} tasks, {len(self.failures)} violations"
        )

    @property
    def virtual_hours(self) -> float:
        return self.virtual_ms / 3_600_000

    def table(self) -> Table:
        """Totals for people. Faults by kind, the most frequent first."""
        table = Table(title="simulation", title_justify="left", show_header=False)
        table.add_row("seeds", f"{self.seeds:,}")
        table.add_row("events", f"{self.events:,}")
        table.add_row("events/s", f"{self.events / (time.monotonic() - self.began):,.0f}")
        # Of this process and those that have ended, their start included.
        cpu_s = sum(os.times()[:4])
        table.add_row("events a second of CPU", f"{self.events / cpu_s:,.0f}")
        table.add_row("virtual time", f"{self.virtual_hours:,.1f} hours")
        table.add_row("tasks", f"{self.tasks:,}")
        kinds = ", ".join(f"{kind} {number:,}" for kind, number in self.faults.most_common())
        table.add_row(f"{self.faults.total():,} faults", kinds)
        table.add_row("violations", str(len(self.failures)))
        return table


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    console = Console()
    try:
        cases = _cases(args)
    except ValueError as error:
        console.print(f"simulate: {error}", markup=False)
        return 2
    totals = Totals()
    if args.seed is not None:
        case = next(cases)
        console.print(case.options.told(), markup=False)
        outcome = run(case)
        totals.add(outcome)
        if isinstance(outcome, Report):
            console.print(f"digest {outcome.digest}")
        else:
            _tell(outcome, console)
    else:
        _run_all(cases, args, totals, console)
    if totals.failures and args.shrink:
        for number, failure in enumerate(totals.failures[: args.failures], start=1):
            console.print(f"\nMaking violation {number} smaller, at most {SHRINK_S} s ...")
            _shrink(failure, console)
    console.print(totals.table())
    console.print(totals.total, markup=False, soft_wrap=True)
    return 1 if totals.failures else 0


def _run_all(
    cases: Iterator[Case], args: argparse.Namespace, totals: Totals, console: Console
) -> None:
    minutes = CI_MINUTES if args.ci else args.minutes
    until = None if minutes is None else totals.began + 60 * minutes
    # Fresh processes: nothing of this one, its threads least of all, is in them.
    pool = ProcessPoolExecutor(args.jobs, get_context("spawn"))
    with pool, Live(console=console, auto_refresh=False, transient=True) as live:
        waiting: set[Future[list[Report | Failure]]] = set()
        told_s = time.monotonic()
        try:
            while True:
                is_over = until is not None and time.monotonic() >= until
                is_over = is_over or len(totals.failures) >= args.failures
                while not is_over and len(waiting) < 2 * args.jobs:
                    portion = list(islice(cases, PORTION))
                    if not portion:
                        break
                    waiting.add(pool.submit(run_some, portion))
                if not waiting:
                    break
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for one in done:
                    for outcome in one.result():
                        totals.add(outcome)
                        if isinstance(outcome, Failure):
                            _tell(outcome, console)
                if console.is_terminal:
                    live.update(totals.line, refresh=True)
                elif time.monotonic() - told_s >= LINE_EVERY_S:
                    told_s = time.monotonic()
                    console.print(totals.line, soft_wrap=True)
        except KeyboardInterrupt:
            for one in waiting:
                one.cancel()
            console.print("interrupted; so far:")


def run_some(cases: list[Case]) -> list[Report | Failure]:
    """In a process of its own: run these."""
    return [run(case) for case in cases]


def _tell(failure: Failure, console: Console) -> None:
    case = failure.case
    console.print(f"\nVIOLATION {case.options.told()}", markup=False, soft_wrap=True)
    console.print(f"again:  {case.command}", markup=False, soft_wrap=True)
    console.print(f"{failure.check}, event {failure.at_event}", markup=False, soft_wrap=True)
    console.print(failure.text, markup=False, soft_wrap=True)


def _shrink(failure: Failure, console: Console) -> None:
    small = shrink(failure, SHRINK_S, lambda line: console.print(line, markup=False))
    console.print(small.text, markup=False, soft_wrap=True)


def _cases(args: argparse.Namespace) -> Iterator[Case]:
    """The runs asked for. Raises ValueError for words that say nothing."""
    if args.seed is not None:
        seeds: Iterator[int] = iter([args.seed])
    elif args.seeds:
        first, _, last = args.seeds.partition("-")
        seeds = iter(range(int(first), int(last or first) + 1))
    else:
        # Fresh ones each time: what was fine yesterday says nothing new today.
        start = SystemRandom().randrange(1, 10**9)
        has_end = not (args.ci or args.minutes)
        seeds = iter(range(start, start + SEEDS)) if has_end else count(start)
    left_out = parse_numbers(args.left_out) if args.left_out else frozenset()
    unknown = [one for one in args.without if one not in FAULTS]
    if unknown:
        raise ValueError(f"--without {unknown[0]}: there are {', '.join(FAULTS)}")
    with_words(case_of(0).options, args.set)

    def cases() -> Iterator[Case]:
        for seed in seeds:
            options = with_words(case_of(seed).options, args.set)
            for fault in args.without:
                options = options.without(fault)
            yield Case(options, args.events, left_out)

    return cases()


def _parse(argv: list[str] | None) -> argparse.Namespace:
    text = __doc__ or ""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seed", type=int, help="one run")
    which.add_argument("--seeds", metavar="A-B", help="these runs")
    which.add_argument("--minutes", type=float, help="fresh seeds for so long")
    which.add_argument("--ci", action="store_true", help=f"the same as --minutes {CI_MINUTES:g}")
    parser.add_argument(
        "--events", type=int, default=EVENTS, help=f"with faults, a run ({EVENTS:,})"
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help=f"processes ({cores})")
    parser.add_argument("--failures", type=int, default=1, help="stop after so many violations (1)")
    parser.add_argument(
        "--without", action="append", default=[], metavar="FAULT", help=", ".join(FAULTS)
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an option, not drawn"
    )
    parser.add_argument("--left-out", metavar="1-3,7", help="numbers of faults that do not happen")
    parser.add_argument(
        "--no-shrink", dest="shrink", action="store_false", help="tell a violation as it is"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
