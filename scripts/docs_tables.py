"""Writes the tables in docs/ that are made from code. `make fix` runs it; a test compares."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from zmqcluster.cli.arguments import build_parser  # noqa: E402  # the path comes first
from zmqcluster.config import KEYS, Key  # noqa: E402  # the path comes first

_TABLE: Final = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def config_table() -> str:
    """Every config key: its bounds, default, and what it is for."""
    rows = [
        f"| `{key.name}` | {_default(key)} | {_cell(key.kind.allowed)} | {_cell(key.help)} |"
        for key in KEYS
    ]
    return "\n".join(["| key | default | allowed | what it is for |", "|---|---|---|---|", *rows])


def verbs_table() -> str:
    """Every verb with its example."""
    rows = [
        f"| `{' '.join(words)}` | {_cell(help)} | `{_cell(example)}` |"
        for words, help, example in verbs(build_parser())
    ]
    return "\n".join(["| verb | what it does | example |", "|---|---|---|", *rows])


def verbs(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """The words, help and example of every verb below a parser."""
    nested: list[Any] = [
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    ]
    for action in nested:
        for name, child in action.choices.items():
            yield from verbs(child, (*words, name))
    if not nested:
        example = (parser.epilog or "").rpartition("\n")[2].strip()
        yield words, (parser.description or "").rstrip("."), example


def with_tables(text: str) -> str:
    """A page with each of its tables made anew."""
    tables = {"config": config_table, "verbs": verbs_table}
    return _TABLE.sub(lambda found: f"{found[1]}{tables[found[2]]()}\n{found[3]}", text)


def pages() -> list[Path]:
    """The pages that may hold such tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = with_tables(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: tables brought up to date")
    return 0


def _default(key: Key) -> str:
    value = key.default
    if value in ("", ()):
        return "none"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
