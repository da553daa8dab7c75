"""Values on the command line, checked where they are read; argparse names the argument."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any, Final

from zmqcluster.cli.times import seconds_of
from zmqcluster.config import shown
from zmqcluster.model import DEVICE_ID_PATTERN, LABEL_PATTERN, TASK_TYPE_PATTERN

_ID_MAX: Final = 2**63 - 1


def task_id(text: str) -> int:
    """The number of a task or a job."""
    if re.fullmatch(r"[0-9]{1,19}", text) and 1 <= int(text) <= _ID_MAX:
        return int(text)
    raise argparse.ArgumentTypeError(f"given {shown(text)}; allowed: the number of a task or job")


def positive(text: str) -> int:
    """A count of at least one."""
    if re.fullmatch(r"[0-9]{1,9}", text) and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"given {shown(text)}; allowed: a whole number of at least 1")


def natural(text: str) -> int:
    """A count, zero included."""
    if re.fullmatch(r"[0-9]{1,9}", text):
        return int(text)
    raise argparse.ArgumentTypeError(f"given {shown(text)}; allowed: a whole number from 0")


def duration(text: str) -> float:
    """Seconds, or a number with s, m, h or d."""
    try:
        return seconds_of(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"given {shown(text)}; allowed: a time such as 90, 0.5, 15m, 24h or 7d"
        ) from None


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
    return name, json_or_text(value)


def json_or_text(text: str) -> Any:
    """What a person means by a bare value: 5 is a number, true a truth, abc a text."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_int=_bounded_int)
    except (ValueError, RecursionError):
        return text


def _fitting(text: str, pattern: str, allowed: str) -> str:
    if re.fullmatch(pattern.strip("^$"), text):
        return text
    raise argparse.ArgumentTypeError(f"given {shown(text)}; allowed: {allowed}")


def _refuse(text: str) -> None:
    raise ValueError(text)


def _bounded_int(text: str) -> int:
    if len(text) > 20:
        raise ValueError("a number of that many digits is a text")
    return int(text)
