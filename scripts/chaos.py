"""Break a real cluster on this machine, on purpose, and see whether it keeps its promises.

    python scripts/chaos.py list                    what there is, and what this machine can do
    python scripts/chaos.py run 8 partition         by number, or by words of the name
    python scripts/chaos.py all --tier ci           everything of a tier and of those below it
    python scripts/chaos.py soak --minutes 30       steady load, a random fault every two minutes

Each fault gets a cluster of its own, and all of them end with one checker of histories. What this
machine cannot inject is skipped and named. Exit codes: 0 all held, 1 something did not, 2 usage.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from msgspec import Struct  # noqa: E402  # the project is found beside this folder
from rich.console import Console, Group  # noqa: E402
from rich.live import Live  # noqa: E402
from rich.progress_bar import ProgressBar  # noqa: E402
from rich.spinner import Spinner  # noqa: E402
from rich.table import Table  # noqa: E402
from rich.text import Text  # noqa: E402

from tests.chaos.catalogue import Fault, Tier, load_all  # noqa: E402
from tests.chaos.rig import Rig, Verdict  # noqa: E402
from tests.chaos.soak import Life, Soak  # noqa: E402

# Each tier holds those before it.
TIERS: Final = (Tier.QUICK, Tier.CI, Tier.LONG)
BARS: Final = "▁▂▃▄▅▆▇█"
SPARK_COLUMNS: Final = 24
LIFE_COLUMNS: Final = (
    *("process", "pid", "min", "RSS MiB", "below", "memory", "grown"),
    *("fds", "", "threads"),
)
# What a process takes while it starts would hide what it does later.
START_S: Final = 15.0
REFRESHES_PER_S: Final = 8
# Faults are mostly waited for; more at once would take each other's share of the machine.
JOBS: Final = min(2, len(os.sched_getaffinity(0)))
# Enough of a failure to see what it is; the folder has the rest.
PROBLEM_LINES: Final = 12

console = Console(width=None if sys.stdout.isatty() else 120)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse_args(argv)
    try:
        match args.verb:
            case "list":
                return show_list()
            case "soak":
                return soak(args)
            case "run":
                return run([one for word in args.faults for one in chosen(word)], args)
            case _:
                return run(of_tier(Tier(args.tier)), args)
    except KeyboardInterrupt:
        console.print("\nStopped.")
        return 130


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="chaos.py", description=__doc__, formatter_class=raw)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("list", help="all faults, and whether this machine can inject them")
    run_parser = verbs.add_parser("run", help="some faults, by number or words of their names")
    run_parser.add_argument("faults", nargs="+", metavar="NUMBER|NAME")
    all_parser = verbs.add_parser("all", help="all faults of a tier and of those below it")
    all_parser.add_argument("--tier", choices=[one.value for one in TIERS], default="ci")
    soak_parser = verbs.add_parser("soak", help="steady load and a random fault now and then")
    soak_parser.add_argument("--minutes", type=float, default=30.0)
    soak_parser.add_argument("--every", type=float, default=120.0, help="seconds between faults")
    soak_parser.add_argument(
        "--rate", type=float, default=0.0, help="tasks/s; default: half of what was measured"
    )
    for one in (run_parser, all_parser):
        one.add_argument("--jobs", type=int, default=JOBS, help=f"faults at once ({JOBS})")
    for one in (run_parser, all_parser, soak_parser):
        one.add_argument("--seed", type=int, default=1, help="of load and moments (1)")
        one.add_argument("--keep", action="store_true", help="keep the folders of those that held")
    return parser.parse_args(argv)


# --- which ---------------------------------------------------------------------------------------


def show_list() -> int:
    table = Table(box=None, pad_edge=False)
    for name in ("#", "fault", "group", "tier", "here"):
        table.add_column(name, justify="right" if name == "#" else "left")
    faults = load_all().values()
    for one in faults:
        here = Text(f"no: {one.why_not}", "yellow") if one.missing else Text("yes", "green")
        table.add_row(str(one.number), one.name, one.group, one.tier.value, here)
    console.print(table)
    able = sum(not one.missing for one in faults)
    console.print(f"\n{len(faults)} faults, {able} of them can be injected here.")
    return 0


def chosen(word: str) -> list[Fault]:
    """The fault of this number, or all with these words in their names."""
    faults = load_all()
    if word.isdecimal() and int(word) in faults:
        return [faults[int(word)]]
    found = [one for one in faults.values() if word.lower() in one.name.lower()]
    if not found:
        print(f"no such fault: {word}; see `python scripts/chaos.py list`", file=sys.stderr)
        raise SystemExit(2)
    return found


def of_tier(tier: Tier) -> list[Fault]:
    wanted = TIERS[: TIERS.index(tier) + 1]
    return [one for one in load_all().values() if one.tier in wanted]


# --- some at once ---------------------------------------------------------------------------------


class Run(Struct):
    """A fault on its way. state: waiting, running, held, broken or skipped."""

    fault: Fault
    state: str = "waiting"
    began_s: float = 0.0
    took_s: float = 0.0
    rig: Rig | None = None
    verdict: Verdict = Verdict()
    problem: str = ""
    folder: str = ""


MARKS: Final = {
    "waiting": "[dim]·[/]",
    "held": "[green]✓[/]",
    "broken": "[red]✗[/]",
    "skipped": "[yellow]–[/]",
}


class View:
    """All runs, drawn anew a few times a second while faults run."""

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs
        self._spinner = Spinner("dots")

    def __rich__(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for name in ("", "#", "fault", "s", "tasks", "runs", "unknown", "now"):
            table.add_column(
                name, justify="right" if name in ("#", "s", "tasks", "runs") else "left"
            )
        for one in self._shown():
            table.add_row(
                self._spinner if one.state == "running" else MARKS[one.state],
                str(one.fault.number),
                one.fault.name,
                f"{_took_s(one):.1f}" if one.began_s else "",
                *_figures(one.verdict),
                _now(one),
            )
        return table

    def _shown(self) -> list[Run]:
        """As many as fit, around the one that runs."""
        fit = max(5, console.height - 6)
        at = next((i for i, one in enumerate(self.runs) if one.state == "running"), len(self.runs))
        first = max(0, min(at - fit // 2, len(self.runs) - fit))
        return self.runs[first : first + fit]


def run(faults: list[Fault], args: argparse.Namespace) -> int:
    runs = [Run(one) for one in faults]
    began_s = time.monotonic()
    view = View(runs)
    with (
        Live(view, console=console, refresh_per_second=REFRESHES_PER_S, transient=True) as live,
        ThreadPoolExecutor(args.jobs) as pool,
    ):
        ends = [pool.submit(inject, one, args) for one in runs]
        try:
            # On a terminal the view shows it; elsewhere each end is a line of the log.
            for end in as_completed(ends):
                if not console.is_terminal:
                    print(_line(end.result()), flush=True)
        except KeyboardInterrupt:
            console.print("Stopping: what has begun ends first.")
            pool.shutdown(cancel_futures=True)
            raise
        live.update(Text(""))
    if console.is_terminal:
        console.print(View(runs)) if len(runs) < console.height else [print(_line(r)) for r in runs]
    return sum_up(runs, time.monotonic() - began_s)


def inject(one: Run, args: argparse.Namespace) -> Run:
    """Run it to its verdict."""
    if one.fault.missing:
        one.state = "skipped"
        return one
    folder = Path(tempfile.mkdtemp(prefix=f"chaos-{one.fault.number}-"))
    one.state, one.began_s, one.folder = "running", time.monotonic(), str(folder)
    try:
        with Rig(folder, args.seed) as one.rig:
            one.fault.inject(one.rig)
        one.state = "held"
    except Exception as error:  # noqa: BLE001  # whatever went wrong, the promise was not shown
        one.state = "broken"
        one.problem = f"{type(error).__name__}: {error}"
    one.took_s = time.monotonic() - one.began_s
    if one.rig is not None:
        one.verdict = one.rig.verdict
    if one.state == "held" and not args.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return one


def sum_up(runs: list[Run], took_s: float) -> int:
    states = {name: [one for one in runs if one.state == name] for name in MARKS}
    for one in states["skipped"]:
        console.print(
            f"[yellow]skipped[/] {one.fault.number} {one.fault.name}: {one.fault.why_not}"
        )
    for one in states["broken"]:
        console.print(f"\n[red]broken[/] {one.fault.number} {one.fault.name}: see {one.folder}")
        console.print("\n".join(one.problem.splitlines()[:PROBLEM_LINES]), markup=False)
    done = [one.verdict for one in runs]
    console.print(
        f"\n{'PARTLY, ' if states['skipped'] else ''}"
        f"{len(states['held'])} faults held, {len(states['broken'])} broken, "
        f"{len(states['skipped'])} skipped in {took_s:.0f} s: "
        f"{sum(one.tasks for one in done)} tasks, {sum(one.starts for one in done)} runs and "
        f"{sum(one.unknown for one in done)} unanswered requests judged",
        soft_wrap=True,
    )
    if len(states["skipped"]) == len(runs):
        console.print("No fault was injected: this machine can do none of them.")
    return 1 if states["broken"] or not states["held"] else 0


def _took_s(one: Run) -> float:
    return one.took_s or time.monotonic() - one.began_s


def _figures(verdict: Verdict) -> Iterator[str]:
    for figure in (verdict.tasks, verdict.starts, verdict.unknown):
        yield str(figure) if verdict.tasks else ""


def _now(one: Run) -> Text:
    match one.state:
        case "running":
            return Text(one.rig.steps[-1] if one.rig and one.rig.steps else "", "cyan")
        case "broken":
            return Text(one.problem.splitlines()[0][:60] if one.problem else "", "red")
        case "skipped":
            return Text(one.fault.why_not, "yellow")
        case _:
            return Text("")


def _line(one: Run) -> str:
    verdict = one.verdict
    figures = f"{verdict.tasks} tasks, {verdict.starts} runs, {verdict.unknown} unanswered"
    figures += f" of which {verdict.carried_out} were carried out" if verdict.unknown else ""
    return f"{one.state:<8} {one.fault.number:>3} {one.fault.name} ({one.took_s:.1f} s, {figures})"


# --- for a long time ------------------------------------------------------------------------------


class SoakView:
    """What a soak is doing, and what its processes take."""

    def __init__(self, soak: Soak, minutes: float) -> None:
        self._soak = soak
        self._total_s = minutes * 60

    def __rich__(self) -> Group:
        soak = self._soak
        bar = ProgressBar(self._total_s, min(soak.elapsed_s, self._total_s), width=40)
        acknowledged = soak.load.acknowledged if soak.load else 0
        words = f"{soak.elapsed_s / 60:.1f} min · {soak.per_s:.0f} tasks/s · "
        words += f"{acknowledged} acknowledged · {len(soak.strikes)} faults · "
        head = Text.assemble(words, (soak.now, "cyan"))
        return Group(bar, head, life_table([one for one in soak.lives if not one.is_over]))


def soak(args: argparse.Namespace) -> int:
    folder = Path(tempfile.mkdtemp(prefix="chaos-soak-"))

    def say(words: str) -> None:
        if not console.is_terminal:
            print(f"{one.elapsed_s if one else 0.0:7.1f} s  {words}", flush=True)

    one: Soak | None = None
    one = Soak(folder, args.seed, say)
    over = threading.Event()
    worker = threading.Thread(target=_run_soak, args=(one, args, over), name="soak")
    view = SoakView(one, args.minutes)
    with Live(view, console=console, refresh_per_second=2, transient=True):
        worker.start()
        # Not join(): interrupted, it takes the thread for ended (Python 3.11).
        try:
            over.wait()
        except KeyboardInterrupt:
            # Judged as far as it came.
            one.end_early()
            over.wait()
    console.print(life_table(one.lives))
    verdict = one.rig.verdict
    for name in sorted(set(one.strikes)):
        console.print(f"  {one.strikes.count(name)} × {name}")
    for problem in one.problems[:PROBLEM_LINES]:
        console.print(f"[red]broken[/] {problem}")
    console.print(
        f"\n{len(one.strikes)} faults in {one.elapsed_s / 60:.1f} min at {one.per_s:.0f} tasks/s: "
        f"{verdict.tasks} tasks, {verdict.starts} runs and {verdict.unknown} unanswered requests "
        f"judged, {len(one.judged_lives)} of {len(one.lives)} lives long enough to be judged, "
        f"{len(one.problems)} problems",
        soft_wrap=True,
    )
    if one.problems:
        console.print(f"Everything is in {folder}")
        return 1
    if not args.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def _run_soak(one: Soak, args: argparse.Namespace, over: threading.Event) -> None:
    try:
        one.run(args.minutes, args.every, args.rate)
    except Exception as error:  # noqa: BLE001  # whatever went wrong, the promise was not shown
        one.problems.append(f"{type(error).__name__}: {error}")
    finally:
        over.set()


def life_table(lives: list[Life]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in LIFE_COLUMNS:
        left = name in ("process", "memory", "")
        table.add_column(name, justify="left" if left else "right")
    for life in lives:
        if not life.samples:
            continue
        last = life.samples[-1]
        table.add_row(
            life.name,
            str(life.node.pid),
            f"{last.at_s / 60:.1f}",
            f"{last.rss_bytes / 2**20:.0f}",
            f"{last.below_bytes / 2**20:.0f}",
            sparkline(_taken(life)),
            f"{life.growth_bytes / 2**20:+.1f} MiB" if life.is_long else "short",
            str(last.descriptors),
            sparkline([float(one.descriptors) for one in life.samples]),
            str(last.threads),
        )
    return table


def _taken(life: Life) -> list[float]:
    """Its memory with all that is below it, once it has started."""
    warm = [one for one in life.samples if one.at_s > START_S]
    return [float(one.rss_bytes + one.below_bytes) for one in warm]


def sparkline(values: list[float]) -> str:
    """The whole series in a few columns, from its least to its greatest value."""
    if not values:
        return ""
    step = max(1, -(-len(values) // SPARK_COLUMNS))
    columns = [max(values[at : at + step]) for at in range(0, len(values), step)]
    low, high = min(columns), max(columns)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((one - low) * scale)] for one in columns)


if __name__ == "__main__":
    sys.exit(main())
