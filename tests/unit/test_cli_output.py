"""Tables, values and times as people read them."""

from __future__ import annotations

import argparse
import io
import re
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqcluster.cli import values
from zmqcluster.cli.output import Output, clean
from zmqcluster.cli.times import bytes_text, duration_text, seconds_of, wall_text


class Terminal(io.StringIO):
    """A stream that says somebody looks."""

    def isatty(self) -> bool:
        return True


class Latin(io.TextIOWrapper):
    """A terminal of another time."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="ascii", newline="")


@given(st.text())
def test_clean_text_is_one_printable_line(text: str) -> None:
    cleaned = clean(text)

    assert len(cleaned.splitlines()) <= 1
    assert "\x1b" not in cleaned
    assert clean(cleaned) == cleaned


def test_clean_keeps_what_people_write() -> None:
    assert clean("Grüße, 世界 🎉  two blanks") == "Grüße, 世界 🎉  two blanks"


def test_plain_table_lines_up_and_numbers_stand_right() -> None:
    stream = io.StringIO()

    Output(stream, stream).table(("id", "name"), [(7, "a"), (1234, "b")])

    assert stream.getvalue() == "  id  name\n   7  a\n1234  b\n"


def test_terminal_table_takes_no_markup_from_text() -> None:
    stream = Terminal()

    Output(stream, stream).table(("title",), [("[bold]x[/bold]",)], title="pages")

    assert "[bold]x[/bold]" in stream.getvalue()
    assert "pages" in stream.getvalue()


DEVICE_ROWS: Final = [("worker-1795558181-10415871", "online", n, "") for n in range(2)]


@pytest.mark.parametrize(
    ("width", "rows"),
    [
        (80, [["worker-1795558181-10415871", "online", "0"]]),
        # The long one is folded, the short ones stay words.
        (32, [["worker-1795558181-", "online", "0"], ["10415871"]]),
        # Too narrow even for that: lines as in a pipe, for the terminal to wrap.
        (20, [["worker-1795558181-10415871", "online", "0"]]),
    ],
)
def test_a_terminal_table_folds_long_texts_and_never_words(
    width: int, rows: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()

    Output(stream, stream).table(("device", "state", "busy", "error"), DEVICE_ROWS)

    shown = re.sub(r"\x1b\[[0-9]*m", "", stream.getvalue())
    words = [line.split() for line in shown.splitlines()]
    assert ["device", "state", "busy"] in words or width == 20
    at = words.index(rows[0])
    assert words[at : at + len(rows)] == rows


def test_terminal_of_a_small_alphabet_gets_question_marks_not_an_error() -> None:
    stream = Latin()
    output = Output(stream, stream)

    output.line("Größe 世")
    stream.flush()
    written = stream.buffer.getvalue()  # type: ignore[attr-defined]  # a BytesIO, see above
    stream.close()

    assert written == b"Gr??e ?\n"


def test_json_is_ascii_whatever_is_in_it() -> None:
    stream = io.StringIO()

    Output(stream, stream, as_json=True).data({"t": "\x9b2J\u202eé"})

    assert stream.getvalue().isascii()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (1.25, "1.2 s"),
        (59.4, "59 s"),
        (200, "3 m 20 s"),
        (3725, "1 h 2 m"),
        (90_000, "1 d 1 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**34, "16 GiB"), (2**42, "4.0 TiB")],
)
def test_sizes(count: int, text: str) -> None:
    assert bytes_text(count) == text


def test_no_instant_is_no_text() -> None:
    assert wall_text(0) == ""
    assert wall_text(1_700_000_000_000).startswith("2023-11-1")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("0.5s", 0.5), ("15m", 900), ("24h", 86_400), ("7d", 604_800)]
)
def test_times_on_the_command_line(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "1w", "nan", "1e9", "1 h m", "٣"])
def test_what_is_no_time_is_refused_with_what_would_be(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="15m"):
        values.duration(3600.0)(text)


@pytest.mark.parametrize("text", ["0", "-1", "x", "9" * 19, "9" * 5000, "1.0", ""])
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="allowed: "):
        values.task_id(text)


@given(st.text(max_size=30))
def test_any_word_is_a_value(text: str) -> None:
    value = values.json_or_text(text)

    assert value == text or not isinstance(value, str) or text.strip().startswith('"')


@pytest.mark.parametrize("text", ["NaN", "1e999", '"\\ud800"', '{"a": 1, "a": 2}', "9" * 40])
def test_json_that_cannot_be_sent_on_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        values.read_json(text)


def test_values_that_are_no_json_stay_text() -> None:
    for text in ("NaN", "Infinity", "1" * 5000, "[" * 100_000, "01", "abc"):
        assert values.json_or_text(text) == text
