"""Instants, durations, sizes and counts in the words of commands."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

_UNITS_S: Final = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_DURATION: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(s|m|h|d)?")


def wall_text(wall_ms: int) -> str:
    """A wall-clock instant in the zone of who reads it; empty for "not yet"."""
    if not wall_ms:
        return ""
    moment = datetime.fromtimestamp(wall_ms / 1000, tz=UTC).astimezone()
    return moment.strftime("%Y-%m-%d %H:%M:%S")


def duration_text(seconds: float) -> str:
    """A length of time in at most two units: 1.5 s, 3 m 20 s, 2 h 5 m, 4 d 1 h."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    for big, small, name, below in ((86_400, 3600, "d", "h"), (3600, 60, "h", "m")):
        if whole >= big:
            return _two_units(whole // big, name, whole % big // small, below)
    return _two_units(whole // 60, "m", whole % 60, "s")


def _two_units(many: int, big: str, few: int, small: str) -> str:
    return f"{many} {big}" + (f" {few} {small}" if few else "")


def count_text(count: int, noun: str) -> str:
    """A count and what is counted: 1 page, 2 pages."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def bytes_text(count: int) -> str:
    """A size with three digits or so: 512 B, 1.5 KiB, 16 GiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def seconds_of(text: str) -> float:
    """The seconds in "90", "90s", "15m", "24h" or "7d". Raises ValueError."""
    found = _DURATION.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{text!r} is no duration; write 90, 15m, 24h or 7d")
    return float(found[1]) * _UNITS_S[found[2] or ""]
