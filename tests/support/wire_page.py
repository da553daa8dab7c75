"""docs/protocol.md as data: its tables read back, and the same tables as the code has them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final, get_args

import msgspec
from msgspec import inspect

from zmqcluster import messages
from zmqcluster.messages import Wire

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"
# "### `submit` Submit" is a message, "### TaskSpec" a part of others.
_HEADING: Final = re.compile(r"^### (?:`(?P<tag>[a-z_]+)` )?(?P<name>[A-Z]\w+)$", re.M)
_ROW: Final = re.compile(r"^\| (?P<at>\d+) \| `(?P<field>\w+)` \| (?P<type>[^|]*) \|", re.M)

Table = list[tuple[int, str, str]]


def tables_of_the_page() -> dict[tuple[str, str], Table]:
    """(tag, name) -> rows of (position, field, type). A part has the tag ""."""
    text = PAGE.read_text()
    text = text[text.index("\n## From a newcomer") : text.index("\n## A complete worker")]
    heads = list(_HEADING.finditer(text))
    ends = [one.start() for one in heads[1:]] + [len(text)]
    return {
        (head["tag"] or "", head["name"]): [
            (int(row["at"]), row["field"], row["type"].strip())
            for row in _ROW.finditer(text[head.end() : end])
        ]
        for head, end in zip(heads, ends, strict=True)
    }


def tables_of_the_code() -> dict[tuple[str, str], Table]:
    return {(tag_of(one), one.__name__): _table(one) for one in structs()}


def structs() -> list[type[Wire]]:
    """Every message and part of one."""
    return [
        one
        for one in vars(messages).values()
        if isinstance(one, type) and issubclass(one, Wire) and one is not Wire
    ]


def tag_of(struct: type[Wire]) -> str:
    return str(struct.__struct_config__.tag or "")


def senders(union: Any) -> set[str]:
    """The tags of a union of messages."""
    return {tag_of(one) for one in get_args(union)} or {tag_of(union)}


def described(kind: inspect.Type) -> str:
    """A type in the words of the page."""
    match kind:
        case inspect.IntType():
            return f"int {kind.ge}…{_power(kind.le)}"
        case inspect.FloatType():
            return f"float {kind.ge:g}…{kind.le:g}"
        case inspect.BoolType():
            return "bool"
        case inspect.BytesType() if kind.min_length == kind.max_length:
            return f"bin {kind.max_length} B"
        case inspect.BytesType():
            least = f"{kind.min_length}…" if kind.min_length else "≤ "
            return f"bin {least}{kind.max_length} B"
        case inspect.StrType() if kind.pattern:
            return f"str `{kind.pattern}`"
        case inspect.StrType():
            least = f"{kind.min_length}…" if kind.min_length else "≤ "
            return f"str {least}{kind.max_length} chars"
        case inspect.EnumType():
            return f"str: one of {kind.cls.__name__}"
        case inspect.VarTupleType():
            return f"array ≤ {kind.max_length} of {described(kind.item_type)}"
        case inspect.UnionType():
            return " or ".join(described(one) for one in kind.types)
        case inspect.NoneType():
            return "nil"
        case inspect.StructType():
            return str(kind.cls.__name__)
        case _:
            raise AssertionError(f"nobody described {kind}")


def _table(struct: type[Wire]) -> Table:
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    first = 1 if tag_of(struct) else 0
    return [
        (at, field.name, described(field.type) + _default(field))
        for at, field in enumerate(info.fields, first)
    ]


def _default(field: inspect.Field) -> str:
    if field.required:
        return ""
    value = field.default
    if isinstance(value, Wire):
        return ", optional: all defaults"
    plain = msgspec.to_builtins(value)
    shown = {None: "nil", "": '""', b"": "empty", True: "true", False: "false"}
    if isinstance(plain, tuple | list):
        return ", optional: empty"
    if isinstance(value, bytes):
        return ", optional: empty"
    return f", optional: {shown.get(plain, plain) if not _is_number(plain) else plain}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _power(bound: int | None) -> str:
    assert bound is not None
    for bits in (31, 32, 53, 63):
        if bound == 2**bits - 1:
            return f"2^{bits}-1"
    return str(bound)
