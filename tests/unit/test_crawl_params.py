"""What may be submitted as a crawl, and what a process remembers of a job."""

from __future__ import annotations

import msgspec
import pytest

from executors.crawl import Crawl, CrawlParams, child_data
from executors.registry import Registry
from executors.urls import ScopeKind
from executors.visited import Visited
from zmqcluster.errors import RequestRefused


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry([Crawl()])


def test_only_the_url_is_needed(registry: Registry) -> None:
    params = registry.decode("crawl", msgspec.msgpack.encode({"url": "http://h.example"}))

    assert params == CrawlParams(url="http://h.example")
    assert params.scope is ScopeKind.PREFIX


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({}, "'url' is missing"),
        ({"url": "h.example"}, "not a URL"),
        ({"url": "file:///etc/passwd"}, "only http and https"),
        ({"url": ""}, "url"),
        ({"url": "http://h.example", "scope_base": "ftp://h.example"}, "scope_base"),
        ({"url": "http://h.example", "scope": "planet"}, "'page', 'prefix', 'host', 'domain'"),
        ({"url": "http://h.example", "depth": -1}, "depth"),
        ({"url": "http://h.example", "delay_s": float("nan")}, "delay_s"),
        ({"url": "http://h.example", "hops": 11}, "hops"),
        ({"url": "http://h.example", "dept": 1}, "Did you mean 'depth'"),
        ({"url": "http://h.example/" + "a" * 3000}, "url"),
    ],
)
def test_what_does_not_fit_is_refused_at_submission(
    registry: Registry, data: dict[str, object], problem: str
) -> None:
    with pytest.raises(RequestRefused, match=problem):
        registry.check("crawl", msgspec.msgpack.encode(data))


def test_children_carry_every_parameter_that_is_not_a_default(registry: Registry) -> None:
    params = CrawlParams(
        url="http://h.example/",
        scope=ScopeKind.DOMAIN,
        delay_s=0.5,
        concurrency=3,
        bytes_max=2048,
        follow_nofollow=True,
        hops=4,
    )
    data = child_data(params, "http://h.example/", 7) | {"url": "http://h.example/x"}

    child = registry.decode("crawl", msgspec.msgpack.encode(data))

    assert child == msgspec.structs.replace(
        params, url="http://h.example/x", scope_base="http://h.example/", depth=7, hops=0
    )
    # Whoever adds a parameter must say here whether children inherit it.
    assert set(CrawlParams.__struct_fields__) == {
        *("url", "scope", "scope_base", "depth", "delay_s", "concurrency"),
        *("bytes_max", "follow_nofollow", "hops"),
    }


def test_urls_are_remembered_by_job_and_bounded() -> None:
    visited = Visited(urls_max=4)
    for url in ("a", "b", "b"):
        visited.add(1, url)
    visited.add(2, "c")
    assert visited.of(1) == {"a", "b"}

    visited.add(2, "d")
    visited.add(3, "e")

    assert visited.of(1) == frozenset()
    assert visited.of(2) == {"c", "d"}


def test_tasks_without_a_job_share_no_memory() -> None:
    visited = Visited()

    visited.add(0, "a")

    assert visited.of(0) == frozenset()
