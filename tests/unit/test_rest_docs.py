"""The description of the API: complete, true, and readable offline."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.support.rest_bench import RestBench, rest_bench
from zmqcluster.rest.app import http_routes
from zmqcluster.rest.openapi import operations

DOCS = Path(__file__).parents[2] / "docs" / "rest.md"


@pytest.fixture
def rest(tmp_path: Path) -> Iterator[RestBench]:
    with rest_bench(tmp_path) as bench:
        yield bench


def every_operation(rest: RestBench) -> set[str]:
    found = operations(http_routes(rest.app))
    return {f"{method} {re.sub(r':[a-z]+}', '}', path)}" for path, method, _ in found}


def test_every_route_is_described_with_its_token_and_its_shapes(rest: RestBench) -> None:
    document = rest.get("//openapi.json").json()

    described = {
        f"{method.upper()} {path}": about
        for path, methods in document["paths"].items()
        for method, about in methods.items()
    }
    assert set(described) == every_operation(rest)
    for name, about in described.items():
        assert about["summary"].endswith("."), name
        assert ("security" in about) is (name != "GET /healthz")
        is_read = name.startswith("GET")
        assert name == "GET /healthz" or ({} in about["security"]) is is_read
        slots = set(re.findall(r"\{(\w+)\}", name))
        assert slots == {each["name"] for each in about["parameters"] if each["in"] == "path"}
        assert about["responses"].keys() - {"200", "201"} == {"4XX", "503"}, name
    assert described["POST /api/distribution/tasks"]["responses"].keys() == {"201", "4XX", "503"}
    names = {each["name"] for each in described["GET /api/distribution/tasks"]["parameters"]}
    assert {"state", "task_type", "job_id", "device_id", "rate_key", "cursor", "limit"} <= names


def test_the_description_means_the_same_outside_python(rest: RestBench) -> None:
    reply = rest.get("//openapi.json")

    assert b"\\\\Z" not in reply.body
    paths = reply.json()["paths"]
    submit = paths["/api/distribution/tasks"]["post"]
    assert submit["requestBody"]["required"]
    [key] = submit["parameters"]
    assert (key["name"], key["schema"]["minLength"], key["schema"]["maxLength"]) == (
        "Idempotency-Key",
        1,
        255,
    )
    assert not paths["/api/distribution/tokens"]["post"]["requestBody"]["required"]


def test_answers_are_described_as_what_they_are(rest: RestBench) -> None:
    paths = rest.get("//openapi.json").json()["paths"]

    def kinds(path: str, status: str) -> list[str]:
        return list(paths[path]["get"]["responses"][status]["content"])

    for path in ("/docs", "/openapi.json", "/healthz", "/readyz", "/metrics"):
        given = rest.get(f"/{path}").headers["content-type"].partition(";")[0]
        assert kinds(path, "200") == [given], path
    # Not ready is an answer, not a refusal; a refusal of the door is a problem all the same.
    assert kinds("/readyz", "503") == ["application/json", "application/problem+json"]


def test_the_data_of_a_task_is_described_as_an_object(rest: RestBench) -> None:
    shapes = rest.get("//openapi.json").json()["components"]["schemas"]

    assert shapes["TaskBody"]["properties"]["task_data"]["type"] == "object"


def test_every_reference_leads_somewhere(rest: RestBench) -> None:
    document = rest.get("//openapi.json").json()

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from ([value["$ref"]] if "$ref" in value else [])
            for each in value.values():
                yield from references(each)
        elif isinstance(value, list):
            for each in value:
                yield from references(each)

    found = set(references(document))
    assert len(found) > 20
    for reference in found:
        assert reference.rpartition("/")[2] in document["components"]["schemas"], reference


class Page(HTMLParser):
    """Collects what a browser would fetch, run or style."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.styles: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._in_style = tag == "style"
        for name, value in attrs:
            if name in ("src", "srcset", "style") or name.startswith("on"):
                self.fetched.append(f"{name}={value}")
            if name == "id":
                self.ids.add(str(value))
            if name == "href":
                self.links.append(str(value))

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.styles.append(data)
            self._in_style = False


def test_the_page_lists_every_route_and_needs_nothing_else(rest: RestBench) -> None:
    reply = rest.get("//docs")

    text = reply.body.decode()
    page = Page()
    page.feed(text)
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert page.fetched == []
    assert not {"script", "img", "link", "iframe", "form"} & set(page.tags)
    for link in page.links:
        assert link == "/openapi.json" or link.removeprefix("#") in page.ids, link
    for name in every_operation(rest):
        method, path = name.split(" ")
        assert f'{method}</span><span class="path">{path}</span>' in text, name


def test_the_policy_of_the_page_allows_its_style_and_nothing_else(rest: RestBench) -> None:
    reply = rest.get("//docs")

    page = Page()
    page.feed(reply.body.decode())
    [style] = page.styles
    digest = base64.b64encode(sha256(style.encode()).digest()).decode()
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert f"style-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy


def test_the_guide_has_every_route(rest: RestBench) -> None:
    text = DOCS.read_text()

    missing = [name for name in every_operation(rest) if f"`{name}`" not in text]
    assert missing == []
    named = set(re.findall(r"`((?:GET|POST|PUT|DELETE) /[^`]*)`", text))
    assert named <= every_operation(rest)
