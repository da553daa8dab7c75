"""Python value to MessagePack, with explicit limits and an error a task author understands.

Everything a task hands out (result, records, children's data) passes here, so whatever leaves a
host can be read by plain `msgpack` anywhere: dates become ISO text, sets become lists, structs and
dataclasses become maps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]  # ships no types
import msgspec

# Far more than anybody means, and little enough for every reader's own limit.
DEPTH_MAX: Final = 100
_SCALARS: Final = frozenset({str, bytes, int, float, bool, type(None)})


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
    if type(value) not in _SCALARS and (problem := _problem_inside(value)):
        raise Unpackable(f"{what} {problem}")
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


def _problem_inside(value: object) -> str:
    """What packs, but not every reader can unpack: too many levels, or a key made of parts."""
    level = [value]
    for _ in range(DEPTH_MAX + 1):
        if any(_has_compound_key(part) for part in level):
            return "has a key made of parts (a tuple or the like); keys must be plain values"
        level = [one for part in level for one in _inside(part) if type(one) not in _SCALARS]
        if not level:
            return ""
    return f"is nested deeper than {DEPTH_MAX} levels"


def _has_compound_key(value: object) -> bool:
    """Does a key pack to an array or a map? Python and other languages refuse such keys."""
    if not isinstance(value, dict | Mapping) or _SCALARS.issuperset(map(type, value)):
        return False
    return any(
        isinstance(key, tuple | frozenset | msgspec.Struct) or dataclasses.is_dataclass(key)
        for key in value
    )


def _inside(value: Any) -> Iterable[object]:
    match value:
        case dict() | Mapping():  # dict first: the usual case, and a quicker look
            return value.values()
        case list() | tuple() | set() | frozenset():
            return value
        case msgspec.Struct():
            return [getattr(value, name) for name in value.__struct_fields__]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return ()


def _reason(error: Exception) -> str:
    if isinstance(error, OverflowError):
        return "an integer does not fit into 64 bits"
    if isinstance(error, UnicodeEncodeError):
        return "a text holds a lone surrogate, which UTF-8 cannot carry"
    return str(error) or type(error).__name__


_PACKER: Final = msgpack.Packer(default=_plain)
