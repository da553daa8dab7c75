"""Checks of what task code hands in: each returns the value, or raises ValueError saying why not.

Structs check their bounds when they are decoded, not when they are made; an oversize child that
left a host unchecked would make the whole frame of results unreadable.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence

from zmqcluster.model import LABEL_PATTERN, LABELS_MAX


@functools.lru_cache(maxsize=1024)
def checked_name(name: str, value: str, pattern: str) -> str:
    """A short identifier; remembered, as a task uses few of them many times."""
    if not isinstance(value, str) or re.fullmatch(pattern.strip("^$"), value) is None:
        raise ValueError(f"{name}: {value!r:.80} does not fit {pattern}")
    return value


def checked_range(name: str, value: int, least: int, most: int) -> int:
    """A whole number within least..most."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name}: {value!r:.40} given, allowed is {least}..{most}")
    return value


def checked_text(name: str, value: str, chars_max: int) -> str:
    """A text that UTF-8 can carry, of at most chars_max characters."""
    if not isinstance(value, str) or len(value) > chars_max:
        raise ValueError(f"{name}: must be a text of at most {chars_max} characters")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name}: holds a lone surrogate") from None
    return value


def checked_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """At most LABELS_MAX labels, each fitting LABEL_PATTERN."""
    if isinstance(labels, str) or len(labels) > LABELS_MAX:
        raise ValueError(f"labels: must be a list of at most {LABELS_MAX} texts")
    return tuple(checked_name("labels", label, LABEL_PATTERN) for label in labels)


def milliseconds(name: str, seconds: float, least_ms: int, most_ms: int) -> int:
    """Seconds as whole milliseconds, rounded up so that a small wait stays a wait."""
    if not math.isfinite(seconds):
        raise ValueError(f"{name}: {seconds!r} is not a duration")
    return checked_range(name, math.ceil(seconds * 1000), least_ms, most_ms)
