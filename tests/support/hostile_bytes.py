"""MessagePack as nobody should write it: any value in its widest form, with lies inside."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

Path = tuple[int, ...]

# Bytes in the place of one value. Lengths that are announced and not there, nesting, types that no
# message has, numbers out of bounds, text that is none.
LIES: tuple[bytes, ...] = (
    *(head + b"\xff\xff\xff\xff" for head in (b"\xc6", b"\xdb", b"\xdd", b"\xdf", b"\xc9")),
    *(head + b"\xff\xff" for head in (b"\xc5", b"\xda", b"\xdc", b"\xde", b"\xc8\x01")),
    *(head + b"\xff" for head in (b"\xc4", b"\xd9", b"\xc7\x05")),
    *(opening * depth for opening in (b"\x91", b"\x81\x01", b"\x81") for depth in (33, 3_000)),
    b"\xc1",
    b"\xc0",
    b"\xc2",
    b"\xd4\x05\x00",
    b"\xd6\xff\x00\x00\x00\x00",
    b"\xd8\x01" + bytes(16),
    b"\xc7\x0c\xff" + b"\xff" * 12,
    b"\xcb\x7f\xf8" + bytes(6),
    b"\xcb\xff\xf0" + bytes(6),
    b"\xcb\x7f\xef" + b"\xff" * 6,
    b"\xca\x7f\xc0\x00\x00",
    b"\xcf" + b"\xff" * 8,
    b"\xd3\x80" + bytes(7),
    b"\xcf\x80" + bytes(7),
    b"\xff",
    b"\xa1\xff",
    b"\xa3\xed\xa0\x80",
    b"\xa2\xc0\x80",
    b"\xa1\x00",
    b"\xa1\n",
    b"\xa0",
    b"\xc4\x00",
    b"\x90",
    b"\x80",
    b"\x82\x00\x01\x00\x02",
    b"\x82\xa1a\x01\xa1a\x02",
)
lies = st.sampled_from(LIES) | st.binary(max_size=12)


def paths(value: Any, here: Path = ()) -> Iterator[Path]:
    """The place of every value in nested lists, the whole first."""
    yield here
    if isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from paths(each, (*here, index))


def widest(value: Any, swaps: dict[Path, bytes] | None = None, here: Path = ()) -> bytes:
    """The longest legal form of value; at the paths in swaps, those bytes instead."""
    if swaps and here in swaps:
        return swaps[here]
    match value:
        case None:
            return b"\xc0"
        case bool():
            return b"\xc3" if value else b"\xc2"
        case int() if value >= 0:
            return b"\xcf" + struct.pack(">Q", value)
        case int():
            return b"\xd3" + struct.pack(">q", value)
        case float():
            return b"\xcb" + struct.pack(">d", value)
        case str():
            text = value.encode()
            return b"\xdb" + struct.pack(">I", len(text)) + text
        case bytes():
            return b"\xc6" + struct.pack(">I", len(value)) + value
        case list() | tuple():
            parts = [widest(each, swaps, (*here, index)) for index, each in enumerate(value)]
            return b"\xdd" + struct.pack(">I", len(value)) + b"".join(parts)
        case _:
            raise TypeError(type(value).__name__)
