"""user_apps, app_sync and data_sync against a real local service."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]  # ships no types
import pytest
from aiohttp import web

from executors.base import ExecutorSettings, TaskContext
from executors.registry import Registry
from executors.source_tasks import SourceTaskExecutor
from executors.sources import SHIPPED, load_source
from tests.support.web_site import Handler, Route, Site, reply, run, web_site
from zmqcluster.errors import RequestRefused, TaskRejected, TaskRetryable
from zmqcluster.messages import Record

MODULES = ("executors.user_apps", "executors.app_sync", "executors.data_sync")
REGISTRY = Registry.load(MODULES, built_in=())
LOOPBACK = ExecutorSettings(egress_allow=("127.0.0.0/8",), contact="crawler@example.com")


def json_reply(body: str, status: int = 200, **headers: str) -> Handler:
    return reply(body, status, Content_Type="application/json", **headers)


async def do(
    task_type: str,
    settings: ExecutorSettings = LOOPBACK,
    begun: list[int] | None = None,
    **data: Any,
) -> tuple[Any, TaskContext]:
    """Run one task in this process, as a host would. begun: of a paced task, gets its begin."""
    executor = REGISTRY.get(task_type)
    assert isinstance(executor, SourceTaskExecutor)
    context = TaskContext(
        1,
        task_type=task_type,
        settings=settings,
        check=REGISTRY.check,
        on_begun=None if begun is None else lambda: begun.append(1),
    )
    await executor.setup(settings)
    try:
        params = REGISTRY.decode(task_type, msgpack.packb(data))
        return await executor.run(context, params), context
    finally:
        await executor.close()


def rows(records: list[Record]) -> dict[str, Any]:
    return {record.key: msgpack.unpackb(record.body) for record in records}


SHOP: dict[str, Route] = {
    "/users/ann%20b/apps": json_reply('{"apps": [{"id": 1, "name": "One"}], "next": "?page=2"}'),
    "/users/ann%20b/apps?page=2": json_reply('{"apps": [{"id": 2, "name": "Two"}, {"x": 1}]}'),
    "/apps/1": json_reply('{"id": 1, "name": "One", "tags": ["a"]}'),
    "/apps/1/data?start=2024-01-01&end=2024-01-03": json_reply(
        '{"days": [{"date": "2024-01-01", "n": 5}, {"date": "2024-01-03", "n": 6},'
        ' {"date": "2024-01-09", "n": 7}, {"n": 8}]}'
    ),
}


def test_apps_of_a_user_are_listed_over_all_pages_and_followed() -> None:
    async def scenario() -> None:
        async with web_site(SHOP) as site:
            result, context = await do(
                "user_apps",
                source="json",
                username="ann b",
                base_url=site.origin,
                follow=True,
                start_date="2024-01-01",
                end_date="2024-01-03",
            )

            assert (result["app_ids"], result["skipped"], result["queued"]) == (["1", "2"], 1, 4)
            kept = rows(context.records)
            assert kept["json:ann b:2"]["name"] == "Two"
            assert [child.task_type for child in context.children] == ["app_sync", "data_sync"] * 2
            assert context.children[3].unique_key == "data_sync:json:2:2024-01-01:2024-01-03"
            assert {child.rate_key for child in context.children} == {site.origin}

    run(scenario())


def test_followed_children_are_runnable_as_they_are() -> None:
    async def scenario() -> None:
        async with web_site(SHOP) as site:
            _, context = await do(
                "user_apps", source="json", username="ann b", base_url=site.origin, follow=True
            )
            child = context.children[0]

            result, _ = await do(child.task_type, **msgpack.unpackb(child.data))

            assert result["name"] == "One"

    run(scenario())


def test_details_of_an_app_are_kept_whole_when_no_fields_are_named() -> None:
    async def scenario() -> None:
        async with web_site(SHOP) as site:
            result, context = await do("app_sync", source="json", app_id="1", base_url=site.origin)

            assert result == {
                "id": 1,
                "name": "One",
                "tags": ["a"],
                "source": "json",
                "app_id": "1",
            }
            assert rows(context.records) == {"json:1": result}

    run(scenario())


def test_data_outside_the_days_asked_for_is_left_out_and_counted() -> None:
    async def scenario() -> None:
        async with web_site(SHOP) as site:
            result, context = await do(
                "data_sync",
                source="json",
                app_id="1",
                start_date="2024-01-01",
                end_date="2024-01-03",
                base_url=site.origin,
            )

            assert (result["rows"], result["days"], result["left_out"]) == (2, 2, 2)
            assert rows(context.records)["json:1:2024-01-03:2024-01-03"]["n"] == 6

    run(scenario())


def test_busy_service_is_retried_and_the_whole_fleet_is_told() -> None:
    async def scenario() -> None:
        busy: dict[str, Route] = {"/apps/1": json_reply("", 429, Retry_After="30")}
        async with web_site(busy) as site:
            executor = REGISTRY.get("app_sync")
            assert isinstance(executor, SourceTaskExecutor)
            context = TaskContext(1)
            await executor.setup(LOOPBACK)
            params = REGISTRY.decode(
                "app_sync",
                msgpack.packb({"source": "json", "app_id": "1", "base_url": site.origin}),
            )

            with pytest.raises(TaskRetryable) as later:
                await executor.run(context, params)

            await executor.close()
            assert later.value.after_ms == 30_000
            assert context.rates[0].rate_key == site.origin
            assert (context.rates[0].closed_for_ms or 0) > 29_000

    run(scenario())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (json_reply("<html>"), "not JSON"),
        (json_reply("[" * 100_000), "not JSON"),
        (json_reply("", 404), "HTTP 404"),
        (json_reply('{"apps": [], "next": "http://127.0.0.2/x"}'), "another site"),
    ],
)
def test_answer_of_no_use_is_no_retry(answer: Route, words: str) -> None:
    async def scenario() -> None:
        async with web_site({"/users/u/apps": answer}) as site:
            with pytest.raises(TaskRejected, match=words):
                await do("user_apps", source="json", username="u", base_url=site.origin)

    run(scenario())


def test_pages_without_end_are_bounded() -> None:
    async def scenario() -> None:
        number = 0

        async def endless(_: web.BaseRequest) -> web.StreamResponse:
            nonlocal number
            number += 1
            return web.json_response({"apps": [], "next": f"/users/u/apps?page={number}"})

        pages: dict[str, Route] = {"/users/u/apps": endless}
        pages |= {f"/users/u/apps?page={page}": endless for page in range(1, 200)}
        async with web_site(pages) as site:
            with pytest.raises(TaskRejected, match="more than 100 pages"):
                await do("user_apps", source="json", username="u", base_url=site.origin)

        assert number == 100

    run(scenario())


def test_source_of_the_operator_wins_and_brings_its_own_limits(tmp_path: Path) -> None:
    async def scenario(site: Site) -> None:
        (tmp_path / "sources").mkdir()
        (tmp_path / "sources" / "shop.toml").write_text(
            f'title = "Shop"\nbase_url = "{site.origin}"\ndelay_s = 2.0\nconcurrency = 3\n'
            '[app_sync]\npath = "/apps/{app_id}"\nkey = "id"\n[app_sync.fields]\ntag = "tags.0"\n'
        )
        settings = ExecutorSettings(egress_allow=("127.0.0.0/8",), data_dir=str(tmp_path))

        result, context = await do("app_sync", settings, source="shop", app_id="1")

        assert result == {"tag": "a", "source": "shop", "app_id": "1"}
        assert (context.rates[0].delay_ms, context.rates[0].concurrency) == (2_000, 3)
        with pytest.raises(TaskRejected, match=r"no \[user_apps\]"):
            await do("user_apps", settings, source="shop", username="u")

    async def with_site() -> None:
        async with web_site(SHOP) as site:
            await scenario(site)

    run(with_site())


@pytest.mark.parametrize("is_paced", [True, False])
def test_pages_of_one_task_keep_the_delay_and_keep_others_away(
    tmp_path: Path, is_paced: bool
) -> None:
    arrivals: list[float] = []

    def noted(body: str) -> Handler:
        async def handle(_: web.BaseRequest) -> web.StreamResponse:
            arrivals.append(time.monotonic())
            return web.Response(body=body.encode(), content_type="application/json")

        return handle

    async def scenario() -> None:
        pages: dict[str, Route] = {
            "/u": noted('{"apps": [{"id": 1}], "next": "/u?2"}'),
            "/u?2": noted('{"apps": [{"id": 2}]}'),
            "/a/1": noted('{"id": 1}'),
        }
        async with web_site(pages) as site:
            (tmp_path / "shop.toml").write_text(
                f'title = "Shop"\nbase_url = "{site.origin}"\ndelay_s = 0.1\n'
                '[user_apps]\npath = "/u"\nitems = "apps"\nkey = "id"\nnext = "next"\n'
                '[app_sync]\npath = "/a/{app_id}"\nkey = "id"\n'
            )
            settings = ExecutorSettings(egress_allow=("127.0.0.0/8",), sources_dir=str(tmp_path))
            begun: list[int] = []

            _, context = await do(
                "user_apps", settings, begun if is_paced else None, source="shop", username="u"
            )
            after_pages = len(begun)
            await do("app_sync", settings, begun if is_paced else None, source="shop", app_id="1")

            assert arrivals[1] - arrivals[0] > 0.08
            assert (after_pages, len(begun)) == ((0, 1) if is_paced else (0, 0))
            closed_ms = context.rates[0].closed_for_ms
            assert (closed_ms is None) is is_paced

    run(scenario())


def test_unknown_or_broken_source_is_named_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(TaskRejected, match=r"no source 'amazon'; this worker has: itunes, json"):
        load_source("amazon")
    (tmp_path / "bad.toml").write_text("title = 3\n")

    with pytest.raises(TaskRejected, match=r"bad\.toml: Expected `str`"):
        load_source("bad", tmp_path)


def test_address_that_is_not_public_is_refused_without_leave() -> None:
    with pytest.raises(TaskRejected, match="egress_allow"):
        asyncio.run(
            do(
                "app_sync",
                ExecutorSettings(contact="x@example.com"),
                source="json",
                app_id="1",
                base_url="http://127.0.0.1:9",
            )
        )


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_sources_are_whole(path: Path) -> None:
    source = load_source(path.stem)

    assert source.user_apps is not None
    assert source.app_sync is not None
    assert source.data_sync is not None


def test_reviews_of_one_app_read_as_the_store_sends_them() -> None:
    endpoint = load_source("itunes").data_sync
    assert endpoint is not None
    entry = {
        "id": {"label": "77"},
        "updated": {"label": "2024-03-05T10:00:00-07:00"},
        "im:rating": {"label": "4"},
        "title": {"label": "Good"},
    }

    # The feed gives a list, or a lone review without one.
    for document in ({"feed": {"entry": [entry]}}, {"feed": {"entry": entry}}):
        (row,) = endpoint.rows(document)

        assert endpoint.key_of(row) == "77"
        assert str(endpoint.day_of(row)) == "2024-03-05"
        assert endpoint.kept(row)["rating"] == "4"


@pytest.mark.parametrize(
    ("task_type", "data", "words"),
    [
        ("user_apps", {"source": "../etc", "username": "u"}, "source"),
        ("user_apps", {"source": "json"}, "'username' is missing"),
        ("user_apps", {"source": "json", "username": "u", "start_date": "2024-01-01"}, "both"),
        ("app_sync", {"source": "json", "app_id": ""}, "app_id"),
        (
            "data_sync",
            {
                "source": "json",
                "app_id": "1",
                "start_date": "2024-02-01",
                "end_date": "2024-01-01",
            },
            "end_date: 2024-01-01 given",
        ),
    ],
)
def test_parameters_that_make_no_sense_are_refused_at_submission(
    task_type: str, data: dict[str, Any], words: str
) -> None:
    with pytest.raises(RequestRefused, match=words):
        REGISTRY.check(task_type, msgpack.packb(data))
