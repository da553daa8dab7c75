"""Live progress of a job: a small panel that redraws itself, or a line now and then."""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Final, Protocol

from msgspec import Struct, field

from zmqcluster.cli.output import Output, clean
from zmqcluster.cli.times import count_text, duration_text
from zmqcluster.rest.schemas import JobView

if TYPE_CHECKING:
    from rich.console import RenderableType

# The rate shown is that of the last few seconds, not of the whole run.
RATE_WINDOW_S: Final = 10.0
PLAIN_LINE_EVERY_S: Final = 5.0


class Progress(Struct):
    """What is known of a followed job. Times are one steady clock's, in s."""

    unit: str = "page"
    since_s: float | None = None
    now_s: float = 0.0
    view: JobView | None = None
    codes: Counter[str] = field(default_factory=Counter)
    current: list[str] = field(default_factory=list)
    _ended: deque[tuple[float, int]] = field(default_factory=deque)

    def feed(self, now_s: float, view: JobView) -> None:
        """Take a new look at the job into account."""
        if self.since_s is None:
            self.since_s = now_s
        self.now_s = now_s
        self.view = view
        self._ended.append((now_s, view.tasks.completed))
        while self._ended and self._ended[0][0] < now_s - RATE_WINDOW_S and len(self._ended) > 2:
            self._ended.popleft()

    @property
    def elapsed_s(self) -> float:
        return self.now_s - (self.since_s if self.since_s is not None else self.now_s)

    @property
    def per_second(self) -> float:
        """Completed a second, over the window; 0 before there are two looks."""
        if len(self._ended) < 2:
            return 0.0
        (first_s, first), (last_s, last) = self._ended[0], self._ended[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else 0.0

    @property
    def ended(self) -> int:
        if self.view is None:
            return 0
        tasks = self.view.tasks
        return tasks.completed + tasks.failed + tasks.cancelled + tasks.dead

    @property
    def known(self) -> int:
        """All tasks of the job so far; grows while pages are found."""
        return self.ended + (self.view.tasks.pending + self.view.tasks.running if self.view else 0)

    def line(self) -> str:
        """All of it in one line."""
        if self.view is None:
            return "waiting"
        tasks = self.view.tasks
        codes = "".join(f", {count} x {code}" for code, count in sorted(self.codes.items()))
        return (
            f"{count_text(tasks.completed, self.unit)} done, {tasks.pending} pending, "
            f"{tasks.running} running, {tasks.failed + tasks.dead} failed, "
            f"{self.per_second:.1f} {self.unit}s/s, {duration_text(self.elapsed_s)}{codes}"
        )


class Display(Protocol):
    """Where progress is shown."""

    def show(self, progress: Progress) -> None:
        """Progress was fed."""

    def close(self) -> None:
        """No more will come; leave the last state standing."""


class PlainDisplay:
    """A line every few seconds, and one at the end."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._last_s: float | None = None
        self._last_line = ""
        self._line = ""

    def show(self, progress: Progress) -> None:
        self._line = progress.line()
        due = self._last_s is None or progress.now_s - self._last_s >= PLAIN_LINE_EVERY_S
        if due and progress.ended:
            self._last_s = progress.now_s
            self._write()

    def close(self) -> None:
        self._write()

    def _write(self) -> None:
        if self._line and self._line != self._last_line:
            self._last_line = self._line
            self._out.note(self._line)


class LiveDisplay:
    """A panel on the terminal, redrawn at each look."""

    def __init__(self, out: Output) -> None:
        from rich.console import Console
        from rich.live import Live

        # No refresh thread: each look redraws, and a look is never far.
        self._live = Live(console=Console(file=out.stderr), auto_refresh=False)
        self._live.start()

    def show(self, progress: Progress) -> None:
        self._live.update(render(progress), refresh=True)

    def close(self) -> None:
        self._live.stop()


def display_for(out: Output) -> Display:
    """A panel for somebody who looks, lines for a pipe."""
    return LiveDisplay(out) if out.stderr.isatty() else PlainDisplay(out)


def render(progress: Progress) -> RenderableType:
    """The panel for this progress."""
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    view = progress.view
    if view is None:
        return Text("waiting")
    lines: list[Any] = [
        ProgressBar(total=max(1, progress.known), completed=progress.ended, width=None),
        _counts(progress),
    ]
    if progress.codes:
        codes = "   ".join(f"{code} x {count}" for code, count in sorted(progress.codes.items()))
        lines.append(Text("HTTP  " + clean(codes), style="dim"))
    for url in progress.current:
        lines.append(Text("→ " + clean(url), style="dim", overflow="ellipsis", no_wrap=True))
    title = Text(f"job {view.job_id}: {clean(view.name)}")
    grid = Table.grid(expand=True)
    for line in lines:
        grid.add_row(line)
    return Panel(grid, title=title, title_align="left")


def _counts(progress: Progress) -> Any:
    from rich.text import Text

    assert progress.view is not None
    tasks = progress.view.tasks
    failed = tasks.failed + tasks.dead
    text = Text()
    text.append(f"{tasks.completed} done", style="bold green")
    text.append(f"   {tasks.running} running   {tasks.pending} pending   ")
    text.append(f"{failed} failed", style="bold red" if failed else "")
    text.append(
        f"   {progress.per_second:.1f} {progress.unit}s/s   {duration_text(progress.elapsed_s)}"
    )
    return text
