"""What the library refuses by itself, before anything is sent. No master."""

from __future__ import annotations

import asyncio
import math
from datetime import date
from typing import Any

import msgpack  # type: ignore[import-untyped]  # ships no types
import pytest

from zmqcluster.client import DistributionClient, task
from zmqcluster.errors import RequestRefused
from zmqcluster.security.keys import new_key_pair

KEYS = new_key_pair()


def client() -> DistributionClient:
    return DistributionClient("localhost", 1, KEYS.public, KEYS)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"priority": "high"}, r"got `str` \(task 1: priority\)"),
        ({"priority": 10}, r"task 1: priority"),
        ({"timeout_s": -1}, "timeout_ms"),
        ({"labels": ["no blanks"]}, "labels"),
        ({"rate_key": "x" * 5_000}, "rate_key"),
        ({"max_retry_count": 10**30}, "serialize ints"),
    ],
)
def test_field_the_master_could_not_decode_is_refused_and_named(
    wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestRefused, match=words):
        asyncio.run(client().submit_many([task("echo"), task("echo", **wrong)]))


def test_batch_that_does_not_fit_a_frame_says_so() -> None:
    specs = [task("echo", {"value": "x" * 200_000})] * 50

    with pytest.raises(RequestRefused, match="bytes, at most"):
        asyncio.run(client().submit_many(specs))


def test_task_number_that_is_none_is_refused() -> None:
    with pytest.raises(RequestRefused, match="int"):
        asyncio.run(client().wait(["seven"], timeout_s=1))  # type: ignore[list-item]  # on purpose


def test_wait_is_over_in_time_when_nobody_answers_at_all() -> None:
    async def scenario() -> None:
        async with client() as nobody_there:
            with pytest.raises(TimeoutError):
                await nobody_there.wait([1], timeout_s=0.05)

    asyncio.run(asyncio.wait_for(scenario(), 5))


def test_status_of_a_device_is_one_of_three_words() -> None:
    with pytest.raises(ValueError, match="busy"):
        asyncio.run(client().update_device_status("busy"))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"labels": "eu"}, "labels: give a list"),
        ({"timeout_s": math.inf}, "timeout_s"),
        ({"data": {"value": object()}}, "not a plain value"),
        ({"data": [1]}, "must be a mapping"),
    ],
)
def test_task_that_cannot_be_meant_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        task("echo", **wrong)


def test_data_of_everyday_life_travels_as_plain_values() -> None:
    spec = task("echo", {"value": {date(2024, 1, 2)}}, timeout_s=0.0001)

    assert msgpack.unpackb(spec.data) == {"value": ["2024-01-02"]}
    assert spec.timeout_ms == 1
