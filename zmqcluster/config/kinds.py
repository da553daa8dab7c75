"""The kinds of values a config key can have: each reads a flag's text and parsed JSON alike.

A kind says what it allows in words; a reader raises ValueError (its text is an extra hint, or
empty) and nothing else.
"""

from __future__ import annotations

import ipaddress
import math
import re
from abc import abstractmethod
from collections.abc import Callable
from enum import StrEnum
from os.path import expanduser
from typing import Any, Final, Self

from msgspec import Struct

_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,18}")
# 17 digits tell any two floats apart; those of 0.001 begin behind three zeros.
_NUMBER: Final = re.compile(
    r"[+-]?([0-9]{1,18}(\.[0-9]{0,30})?|\.[0-9]{1,30})([eE][+-]?[0-9]{1,3})?"
)
_BYTES: Final = re.compile(r"([0-9]{1,18})\s*(B|KiB|MiB|GiB|TiB)?")
_UNIT_BYTES: Final = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_HOST: Final = r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})"


class Kind(Struct, frozen=True):
    """What the value of a key may be."""

    @property
    @abstractmethod
    def allowed(self) -> str:
        """In words, for error messages and the manual."""

    @abstractmethod
    def from_text(self, text: str) -> Any:
        """The value written as a flag or an environment variable. Raises ValueError."""

    @abstractmethod
    def from_json(self, value: object) -> Any:
        """The value as it stood in a JSON file. Raises ValueError."""


class Text(Kind, frozen=True):
    """Printable text. normal: turns a good text into its one spelling, or raises ValueError."""

    words: str
    pattern: str = ""
    chars_max: int = 256
    empty: bool = False
    normal: Callable[[str], str] | None = None

    @property
    def allowed(self) -> str:
        return self.words

    def from_text(self, text: str) -> str:
        if not text and self.empty:
            return ""
        if not text.strip() or len(text) > self.chars_max or not text.isprintable():
            raise ValueError
        if self.pattern and not re.fullmatch(self.pattern, text):
            raise ValueError
        return self.normal(text) if self.normal else text

    def from_json(self, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError
        return self.from_text(value)


class Choice(Kind, frozen=True):
    """One of a few words."""

    choices: tuple[str, ...]
    make: Callable[[str], Any] = str

    @classmethod
    def of(cls, words: type[StrEnum]) -> Self:
        """A choice among the members of an enum; the value is the member."""
        return cls(tuple(words), words)

    @property
    def allowed(self) -> str:
        return ", ".join(str(choice) for choice in self.choices)

    def from_text(self, text: str) -> Any:
        if text not in self.choices:
            raise ValueError
        return self.make(text)

    def from_json(self, value: object) -> Any:
        if not isinstance(value, str):
            raise ValueError
        return self.from_text(value)


class Whole(Kind, frozen=True):
    """A whole number in bounds."""

    min: int
    max: int

    @property
    def allowed(self) -> str:
        return f"a whole number from {self.min} to {self.max}"

    def from_text(self, text: str) -> int:
        if not _INTEGER.fullmatch(text.strip()):
            raise ValueError
        return self.from_json(int(text))

    def from_json(self, value: object) -> int:
        # JSON's true is Python's 1: a slip we do not want to guess about.
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError
        if not self.min <= value <= self.max:
            raise ValueError
        return value


class Seconds(Kind, frozen=True):
    """A time above zero. unit: its name for people."""

    max: float
    unit: str = "seconds"

    @property
    def allowed(self) -> str:
        return f"{self.unit}, at least 0.001 and at most {self.max:.10g}"

    def from_text(self, text: str) -> float:
        if not _NUMBER.fullmatch(text.strip()):
            raise ValueError
        return self.from_json(float(text))

    def from_json(self, value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError
        # Compared before float(): a huge int does not fit into one. NaN fails every comparison.
        if not 0.001 <= value <= self.max or not math.isfinite(value):
            raise ValueError
        return float(value)


class ByteCount(Kind, frozen=True):
    """A size: bytes, or text with a unit such as "256MiB"."""

    min: int
    max: int

    @property
    def allowed(self) -> str:
        return f"bytes, or a text such as 256MiB, from {self.min} to {self.max}"

    def from_text(self, text: str) -> int:
        found = _BYTES.fullmatch(text.strip())
        if not found:
            raise ValueError
        return self._bounded(int(found[1]) * _UNIT_BYTES[found[2] or "B"])

    def from_json(self, value: object) -> int:
        if isinstance(value, str):
            return self.from_text(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError
        return self._bounded(value)

    def _bounded(self, value: int) -> int:
        if not self.min <= value <= self.max:
            raise ValueError
        return value


class ListOf(Kind, frozen=True):
    """Several texts, none twice: a JSON array, or one text with commas."""

    item: Text
    items_max: int

    @property
    def allowed(self) -> str:
        return f"a list of at most {self.items_max}, each {self.item.allowed}"

    def from_text(self, text: str) -> tuple[str, ...]:
        return self.from_json([part.strip() for part in text.split(",")] if text.strip() else [])

    def from_json(self, value: object) -> tuple[str, ...]:
        if not isinstance(value, list) or len(value) > self.items_max:
            raise ValueError
        items = tuple(self.item.from_json(item) for item in value)
        if len(set(items)) < len(items):
            raise ValueError("one is given twice")
        return items


def days(max_days: float) -> Seconds:
    """A number of days above zero."""
    return Seconds(max_days, "days")


def folder() -> Text:
    """A path, with ~ for the home folder."""
    return Text("a path of at most 1024 characters", chars_max=1024, normal=expanduser)


def host_name() -> Text:
    """A host name or an address, without scheme, port or brackets."""
    return Text(
        "a host name or an IP address, without scheme and port", chars_max=253, normal=_normal_host
    )


def host_with_port() -> Text:
    """What a Host header may hold."""
    return Text(
        "a host name or address, with or without :port",
        pattern=rf"({_HOST}|\[[0-9a-fA-F:.]+\])(:[0-9]{{1,5}})?",
        chars_max=260,
        normal=str.lower,
    )


def ip_address() -> Text:
    """An address to listen on."""
    return Text(
        "an IP address of this machine, or 0.0.0.0 or :: for all of them",
        chars_max=64,
        normal=_normal_address,
    )


def network() -> Text:
    """A network in CIDR form; a lone address is a network of one."""
    return Text("a network such as 10.0.0.0/8 or fd00::/8", chars_max=64, normal=_normal_network)


def _normal_host(text: str) -> str:
    if ":" in text:
        return _spelled(ipaddress.IPv6Address, text)
    if not re.fullmatch(_HOST, text):
        raise ValueError
    return text


def _normal_address(text: str) -> str:
    # People type localhost; a socket wants one address, not whatever a resolver makes of it.
    return "127.0.0.1" if text == "localhost" else _spelled(ipaddress.ip_address, text)


def _spelled(read: Callable[[str], object], text: str) -> str:
    """An address in its one spelling; what the reader thinks of a bad one helps nobody."""
    try:
        return str(read(text))
    except ValueError:
        raise ValueError from None


def _normal_network(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text))
    except ValueError:
        # A network with host bits set is most likely a slip: say which one it would be.
        wide = _spelled(lambda network: ipaddress.ip_network(network, strict=False), text)
        raise ValueError(f"did you mean {wide}?") from None
