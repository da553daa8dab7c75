"""What commands print: tables for people, aligned text for pipes, JSON for programs.

Results go to stdout, everything about the way there (progress, hints, errors) to stderr. Text from
peers and pages never reaches the terminal with its control characters.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any, Final, TextIO

import msgspec

if TYPE_CHECKING:
    from rich.table import Table

CELL_CHARS_MAX: Final = 300
# A longer text may be folded to this width where the terminal is narrow; a shorter one stays whole.
FOLDED_CHARS_MIN: Final = 18


def clean(text: object) -> str:
    """Text without what drives a terminal: control, format and line-breaking characters."""
    return "".join(
        char for char in str(text) if unicodedata.category(char) not in _NEVER or char == " "
    )


# Cc: escapes. Cf: bidi overrides that make text read backwards. Cs: lone surrogates, which no
# terminal encoding takes. Zl, Zp: line breaks beside \n.
_NEVER: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


class Output:
    """Where a command prints. as_json: results as JSON, and no tables."""

    def __init__(self, stdout: TextIO, stderr: TextIO, *, as_json: bool = False) -> None:
        self.stdout = stdout
        self.stderr = stderr
        self.as_json = as_json

    @property
    def is_terminal(self) -> bool:
        return self.stdout.isatty()

    def line(self, text: str = "") -> None:
        """A line of the result."""
        print(encodable(clean(text), self.stdout), file=self.stdout)

    def note(self, text: str) -> None:
        """A line beside the result. Nobody there to read it is no reason to fail."""
        with suppress(OSError):
            print(encodable(clean(text), self.stderr), file=self.stderr, flush=True)

    def data(self, value: Any) -> None:
        """A view (or list of views) as JSON, escaped down to ASCII, so it is safe to look at."""
        plain = msgspec.to_builtins(value)
        print(json.dumps(plain, indent=2), file=self.stdout)

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = ""
    ) -> None:
        """Rows under their column names; numbers stand to the right."""
        cells = [[clean(cell)[:CELL_CHARS_MAX] for cell in row] for row in rows]
        if self.is_terminal:
            self._rich_table(columns, cells, title)
        else:
            self._plain_table(columns, cells)

    def fields(self, pairs: Iterable[tuple[str, object]]) -> None:
        """Names and values, one a line."""
        listed = [(name, clean(value)) for name, value in pairs]
        width = max((len(name) for name, _ in listed), default=0)
        for name, value in listed:
            self.line(f"{name:<{width}}  {value}")

    def _plain_table(self, columns: Sequence[str], cells: list[list[str]]) -> None:
        lines = [list(columns), *cells]
        widths = _widths(columns, cells)
        right = _numeric_columns(len(columns), cells)
        for line in lines:
            padded = (
                text.rjust(width) if n in right else text.ljust(width)
                for n, (text, width) in enumerate(zip(line, widths, strict=True))
            )
            self.line("  ".join(padded).rstrip())

    def _rich_table(self, columns: Sequence[str], cells: list[list[str]], title: str) -> None:
        # rich takes 60 ms to load: only when somebody looks.
        from rich.console import Console
        from rich.text import Text

        console = Console(file=self.stdout)
        columns, cells = _without_empty(columns, cells)
        gap = _gap(columns, cells, console.width)
        if gap is None:
            # Columns of two letters help nobody: let the terminal wrap whole lines.
            self._plain_table(columns, cells)
            return
        if title:
            # Not the table's own title: that one wraps at the width of a narrow table.
            console.print(Text(title, style="bold"))
        console.print(_framed(columns, cells, gap))


def _framed(columns: Sequence[str], cells: list[list[str]], gap: int) -> Table:
    """The table for a terminal it fits into: only long texts are folded."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    # The box itself puts one column between two.
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, gap - 1, 0, 0))
    right = _numeric_columns(len(columns), cells)
    for n, width in enumerate(_widths(columns, cells)):
        table.add_column(
            columns[n],
            justify="right" if n in right else "left",
            overflow="fold",
            no_wrap=width <= FOLDED_CHARS_MIN,
        )
    for row in cells:
        # Text, not str: a title in [brackets] is no markup.
        table.add_row(*(Text(cell) for cell in row))
    return table


def _without_empty(
    columns: Sequence[str], cells: list[list[str]]
) -> tuple[Sequence[str], list[list[str]]]:
    """Only the columns that say something."""
    kept = [n for n in range(len(columns)) if not cells or any(row[n] for row in cells)]
    return [columns[n] for n in kept], [[row[n] for n in kept] for row in cells]


def _gap(columns: Sequence[str], cells: list[list[str]], width: int) -> int | None:
    """Blanks between columns, two or at least one, so that the table fits; None: it cannot."""
    widths = _widths(columns, cells)
    least = sum(min(each, FOLDED_CHARS_MIN) for each in widths)
    if sum(widths) + 2 * len(widths) <= width:
        return 2
    return 1 if least + len(widths) + 1 <= width else None


def _widths(columns: Sequence[str], cells: list[list[str]]) -> list[int]:
    return [max(len(line[n]) for line in [columns, *cells]) for n in range(len(columns))]


def _numeric_columns(count: int, cells: list[list[str]]) -> set[int]:
    return {
        n
        for n in range(count)
        if cells and all(row[n].replace(".", "", 1).isdecimal() or row[n] == "" for row in cells)
    }


def encodable(text: str, stream: IO[str]) -> str:
    """The text, with ? for what the stream's encoding does not have."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
