"""Python value to MessagePack, with explicit limits and an error a task author understands.

Everything a task hands out (result, records, children's data) passes here, so whatever leaves a
host can be read by plain `msgpack` anywhere: dates become ISO text, sets become lists, structs and
dataclasses become maps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]  # ships no types
import msgspec

# Nesting is bounded by msgpack's own packing limit, 511 levels; it raises ValueError there.


class Unpackable(ValueError):
    """This value cannot be sent: wrong type somewhere inside, too deep, or too large."""


def pack(value: object, bytes_max: int, what: str) -> bytes:
    """One MessagePack value of at most bytes_max.

    what: names the value in the error, as in "result". Raises Unpackable.
    """
    try:
        packed: bytes = _PACKER.pack(value)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise Unpackable(f"{what} cannot be sent as MessagePack: {_reason(error)}") from None
    if len(packed) > bytes_max:
        kind = type(value).__name__
        raise Unpackable(
            f"{what} ({kind}) takes {len(packed):,} bytes packed; at most {bytes_max:,} are allowed"
        )
    return packed


def pack_map(value: msgspec.Struct | Mapping[str, object], bytes_max: int, what: str) -> bytes:
    """Like pack, for what must be a map."""
    if not isinstance(value, msgspec.Struct | Mapping):
        raise Unpackable(f"{what} must be a mapping or a Struct, not {type(value).__name__}")
    if isinstance(value, msgspec.Struct) and value.__struct_config__.array_like:
        raise Unpackable(f"{what}: {type(value).__name__} is array_like; it must be a map")
    return pack(value, bytes_max, what)


def _plain(value: Any) -> Any:
    """What msgpack does not know itself, as something it does; called for such values only."""
    if isinstance(value, msgspec.Struct):
        return {name: getattr(value, name) for name in value.__struct_fields__}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    try:
        return msgspec.to_builtins(value, builtin_types=(bytes,))
    except TypeError:
        kind = type(value)
        raise TypeError(f"{kind.__module__}.{kind.__qualname__} is not a plain value") from None


def _reason(error: Exception) -> str:
    if isinstance(error, OverflowError):
        return "an integer does not fit into 64 bits"
    if isinstance(error, UnicodeEncodeError):
        return "a text holds a lone surrogate, which UTF-8 cannot carry"
    return str(error) or type(error).__name__


_PACKER: Final = msgpack.Packer(default=_plain)
