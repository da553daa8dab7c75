"""What commands print: tables for people, aligned text for pipes, JSON for programs.

Results go to stdout, everything about the way there (progress, hints, errors) to stderr. Text from
peers and pages never reaches the terminal with its control characters.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Final, TextIO

import msgspec

CELL_CHARS_MAX: Final = 300


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
        print(_encodable(clean(text), self.stdout), file=self.stdout)

    def note(self, text: str) -> None:
        """A line beside the result."""
        print(_encodable(clean(text), self.stderr), file=self.stderr, flush=True)

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
        widths = [max(len(line[n]) for line in lines) for n in range(len(columns))]
        right = _numeric_columns(len(columns), cells)
        for line in lines:
            padded = (
                text.rjust(width) if n in right else text.ljust(width)
                for n, (text, width) in enumerate(zip(line, widths, strict=True))
            )
            self.line("  ".join(padded).rstrip())

    def _rich_table(self, columns: Sequence[str], cells: list[list[str]], title: str) -> None:
        # rich takes 60 ms to load: only when somebody looks.
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        right = _numeric_columns(len(columns), cells)
        for n, column in enumerate(columns):
            table.add_column(column, justify="right" if n in right else "left", overflow="fold")
        for row in cells:
            # Text, not str: a title in [brackets] is no markup.
            table.add_row(*(Text(cell) for cell in row))
        console = Console(file=self.stdout)
        if title:
            # Not the table's own title: that one wraps at the width of a narrow table.
            console.print(Text(title, style="bold"))
        console.print(table)


def _numeric_columns(count: int, cells: list[list[str]]) -> set[int]:
    return {
        n
        for n in range(count)
        if cells and all(row[n].replace(".", "", 1).isdecimal() or row[n] == "" for row in cells)
    }


def _encodable(text: str, stream: TextIO) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
