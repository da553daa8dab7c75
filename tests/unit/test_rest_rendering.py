"""Packed values as JSON, whatever an executor packed."""

from __future__ import annotations

import base64
from typing import Any

import msgpack  # type: ignore[import-untyped]  # ships no types
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqcluster.rest.rendering import json_value


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, None),
        ({"a": [1, -1.5, "é", True, None]}, {"a": [1, -1.5, "é", True, None]}),
        (b"\x00\xff", {"base64": "AP8="}),
        ({b"k": 1, 2: 3, None: 4}, {"aw==": 1, "2": 3, "None": 4}),
        ([float("nan"), float("inf")], ["nan", "inf"]),
        (2**64 - 1, 2**64 - 1),
    ],
)
def test_values_show_in_the_shapes_of_json(value: Any, shown: Any) -> None:
    assert json_value(msgpack.packb(value)) == shown


def test_nothing_is_null() -> None:
    assert json_value(b"") is None


@pytest.mark.parametrize(
    "packed",
    [
        b"\xc1",
        b"\xdf\xff\xff\xff\xff",
        b"\x01\x02",
        b"\xa2\xff\xfe",
        b"\x91" * 65 + b"\xc0",
        b"\x91" * 100_000 + b"\xc0",
        b"\x81\x91\x01\x02",
        b"\xd6\xff\xff\xff\xff",
    ],
)
def test_what_has_no_such_shape_shows_as_its_bytes(packed: bytes) -> None:
    assert json_value(packed) == {"base64": base64.b64encode(packed).decode()}


def test_a_timestamp_shows_as_text() -> None:
    assert "seconds=1" in json_value(b"\xd6\xff\x00\x00\x00\x01")


@given(st.binary(max_size=64))
def test_any_bytes_can_be_shown(packed: bytes) -> None:
    msgspec.json.encode(json_value(packed))
