"""Values on the command line, checked where they are read; argparse names the argument."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

from zmqcluster.cli.times import duration_text, seconds_of
from zmqcluster.config import shown
from zmqcluster.config.kinds import host_name
from zmqcluster.model import DEVICE_ID_PATTERN, LABEL_PATTERN, TASK_TYPE_PATTERN

_ID_MAX: Final = 2**63 - 1


def task_id(text: str) -> int:
    """The number of a task or a job."""
    if re.fullmatch(r"[0-9]{1,19}", text) and 1 <= int(text) <= _ID_MAX:
        return int(text)
    raise argparse.ArgumentTypeError(f"given {shown(text)}; allowed: the number of a task or job")


def whole(least: int, most: int) -> Callable[[str], int]:
    """Reads a whole number in bounds."""

    def read(text: str) -> int:
        if re.fullmatch(r"[0-9]{1,9}", text) and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(
            f"given {shown(text)}; allowed: a whole number from {least} to {most}"
        )

    return read


def duration(most_s: float, *, zero: bool = False) -> Callable[[str], float]:
    """Reads seconds, or a number with s, m, h or d; above zero unless zero is allowed."""
    bounds = f"{'from' if zero else 'above'} 0 to {duration_text(most_s)}"

    def read(text: str) -> float:
        try:
            seconds = seconds_of(text)
        except ValueError:
            seconds = -1.0
        if 0 < seconds <= most_s or (zero and seconds == 0):
            return seconds
        raise argparse.ArgumentTypeError(
            f"given {shown(text)}; allowed: a time such as 90, 0.5, 15m, 24h or 7d, {bounds}"
        )

    return read


def instant(text: str) -> str:
    """A moment of the calendar, with its zone."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is not None and moment.tzinfo is not None:
        return moment.isoformat()
    raise argparse.ArgumentTypeError(
        f"given {shown(text)}; allowed: date, time and zone, such as 2030-01-31T08:00:00Z"
    )


def key(chars_max: int) -> Callable[[str], str]:
    """Reads a key of ours or of somebody else; an empty one is most likely an unset variable."""

    def read(text: str) -> str:
        if 1 <= len(text) <= chars_max and text.isprintable():
            return text
        raise argparse.ArgumentTypeError(
            f"given {shown(text)}; allowed: 1 to {chars_max} printable characters"
        )

    return read


def host(text: str) -> str:
    """Where others find a machine."""
    kind = host_name()
    try:
        return kind.from_text(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"given {shown(text)}; allowed: {kind.allowed}") from None


def device_id(text: str) -> str:
    """The name of a device."""
    return _fitting(text, DEVICE_ID_PATTERN, "a device id, as `distribute devices` lists them")


def task_type(text: str) -> str:
    """The name of a task type."""
    return _fitting(text, TASK_TYPE_PATTERN, "a task type, such as crawl")


def label(text: str) -> str:
    """A label a device must have."""
    return _fitting(text, LABEL_PATTERN, "a label, such as gpu or zone=eu")


def token_id(text: str) -> str:
    """The id of a join token; it becomes a part of a path."""
    return _fitting(text, r"[A-Za-z0-9_-]{1,64}", "a token id, as `distribute token list` shows")


def pair(text: str) -> tuple[str, Any]:
    """key=value; the value is JSON when it reads as JSON, else text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"given {shown(text)}; allowed: key=value")
    if not _is_whole_text(text):
        raise argparse.ArgumentTypeError(f"given {shown(text)}; allowed: text in UTF-8")
    return name, json_or_text(value)


def json_or_text(text: str) -> Any:
    """What a person means by a bare value: 5 is a number, true a truth, abc a text."""
    try:
        return read_json(text)
    except ValueError:
        return text


def read_json(text: str) -> Any:
    """One JSON value that can be sent on as it is. Raises ValueError, which says why not."""
    try:
        value = json.loads(
            text,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_bounded_int,
            object_pairs_hook=_members,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not _is_whole_text(json.dumps(value, ensure_ascii=False)):
        raise ValueError("holds half a character, which is no text")
    return value


def _fitting(text: str, pattern: str, allowed: str) -> str:
    if re.fullmatch(pattern.strip("^$"), text):
        return text
    raise argparse.ArgumentTypeError(f"given {shown(text)}; allowed: {allowed}")


def _is_whole_text(text: str) -> bool:
    """Whether it has no lone surrogates, as bytes that are no UTF-8 become on a command line."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("the same name is given twice")
    return members


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is out of range")
    return number


def _bounded_int(text: str) -> int:
    if len(text) > 20:
        raise ValueError("a whole number must fit in 64 bits")
    return int(text)
