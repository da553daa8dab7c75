"""Who may come in, tried at every route there is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.rest_bench import STALL, TOKEN, RestBench, rest_bench
from zmqcluster.rest import door
from zmqcluster.rest.app import create_app, http_routes
from zmqcluster.rest.door import READ_METHODS

ELSEWHERE = "192.0.2.7"
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE", "QUERY")


@pytest.fixture
def rest(tmp_path: Path) -> Iterator[RestBench]:
    with rest_bench(tmp_path) as bench:
        yield bench


def every_path(rest: RestBench) -> list[str]:
    """Every route's path, from the root, its slots filled with a number."""
    paths = sorted({re.sub(r"\{\w+(:\w+)?\}", "7", route.path) for route in http_routes(rest.app)})
    assert len(paths) > 20
    return ["/" + path for path in paths]


def test_every_write_without_the_token_is_401_even_from_this_machine(rest: RestBench) -> None:
    for path in every_path(rest):
        for method in METHODS:
            if method not in READ_METHODS and path != "//healthz":
                reply = rest.call(method, path, {"tasks": []})

                assert reply.status == 401, (method, path)
                assert reply.headers["www-authenticate"] == "Bearer"
                assert "API token" in reply.problem()
    assert rest.backend.messages == []


def test_every_read_from_elsewhere_without_the_token_is_401(rest: RestBench) -> None:
    for path in every_path(rest):
        for method in READ_METHODS:
            if path != "//healthz":
                reply = rest.call(method, path, peer=ELSEWHERE)

                assert reply.status == 401, (method, path)
    assert rest.backend.messages == []


def test_paths_that_are_no_routes_are_shut_too(rest: RestBench) -> None:
    for path in ("//", "/nothing", "//healthz/", "//healthz/../docs", "//schema", "//HEALTHZ"):
        assert rest.call("GET", path, peer=ELSEWHERE).status == 401, path
        assert rest.call("POST", path).status == 401, path


def test_a_wrong_token_is_401_where_none_would_have_been_needed(rest: RestBench) -> None:
    for token in ("", "wrong", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "ü"):
        reply = rest.get("/tasks", token=token)

        assert reply.status == 401, token
        assert "invalid_token" in reply.headers["www-authenticate"]
    reply = rest.get("/tasks", headers={"authorization": f"Basic {TOKEN}"})
    assert reply.status == 401


def test_the_token_opens_from_anywhere(rest: RestBench) -> None:
    assert rest.get("/tasks", token=TOKEN, peer=ELSEWHERE).status == 200
    assert rest.post("/tasks", {"task_type": "noop"}, peer=ELSEWHERE).status == 201
    spelled = {"authorization": f"bearer {TOKEN}"}
    assert rest.get("/tasks", headers=spelled, peer=ELSEWHERE).status == 200


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
def test_reads_from_this_machine_are_open(rest: RestBench, peer: str) -> None:
    assert rest.get("/devices", peer=peer).status == 200
    assert rest.get("/tasks", peer=peer).status == 200


@pytest.mark.parametrize("peer", ["10.0.0.1", "::ffff:10.0.0.1", "fe80::1", "unix", ""])
def test_reads_from_no_loopback_address_are_not(rest: RestBench, peer: str) -> None:
    assert rest.get("/devices", peer=peer).status == 401


@pytest.mark.parametrize("name", ["x-forwarded-for", "forwarded", "via", "x-real-ip"])
def test_a_proxy_on_this_machine_does_not_make_strangers_local(rest: RestBench, name: str) -> None:
    assert rest.get("/tasks", headers={name: "127.0.0.1"}).status == 401
    assert rest.get("/tasks", headers={name: "127.0.0.1"}, token=TOKEN).status == 200


def test_healthz_is_open_to_all_and_says_nothing(rest: RestBench) -> None:
    reply = rest.get("//healthz", peer=ELSEWHERE, host="probe.example")

    assert (reply.status, reply.body) == (200, b"ok\n")
    assert rest.call("POST", "//healthz", peer=ELSEWHERE).status == 405


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7989", "localhost.evil.example", "", None, "10.1.2.3"]
)
def test_a_foreign_host_is_refused_even_with_the_token(rest: RestBench, host: str | None) -> None:
    reply = rest.get("/tasks", host=host, token=TOKEN)

    assert reply.status == 421
    assert "allowed_hosts" in reply.problem()


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:7989",
        "localhost:8000",
        "127.0.0.1:7989",
        "[::1]:7989",
        "crawler.example:7989",
    ],
)
def test_our_own_names_are_ours(rest: RestBench, host: str) -> None:
    assert rest.get("/tasks", host=host).status == 200


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://localhost", "https://localhost:7989", "localhost"],
)
def test_a_foreign_origin_is_refused_even_with_the_token(rest: RestBench, origin: str) -> None:
    for method, body in (("GET", None), ("POST", {"task_type": "noop"})):
        reply = rest.call(method, "/tasks", body, token=TOKEN, headers={"origin": origin})

        assert reply.status == 403
        assert "other web sites" in reply.problem()


def test_our_own_origin_is_ours(rest: RestBench) -> None:
    assert rest.get("/tasks", headers={"origin": "http://localhost:7989"}).status == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_that_is_no_json_is_415(rest: RestBench, kind: str) -> None:
    reply = rest.post("/tasks", {"task_type": "noop"}, headers={"content-type": kind})

    assert reply.status == 415
    assert "application/json" in reply.problem()


def test_a_compressed_body_is_415(rest: RestBench) -> None:
    reply = rest.post("/tasks", b"\x1f\x8b", headers={"content-encoding": "gzip"})

    assert reply.status == 415


def test_a_body_announced_too_large_is_413_unread(rest: RestBench) -> None:
    reply = rest.post("/tasks", b"{}", headers={"content-length": str(8 * 1024 * 1024 + 1)})

    assert reply.status == 413
    assert "8388608" in reply.problem()


def test_a_body_that_grows_too_large_is_413(rest: RestBench) -> None:
    reply = rest.post("/tasks", chunks=[b" " * (1024 * 1024)] * 9)

    assert reply.status == 413
    reply.problem()


def test_many_large_bodies_at_once_are_503_and_room_comes_back(
    rest: RestBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "BODIES_BYTES_MAX", 10_000)

    for _ in range(3):
        crowded = rest.post("/tasks", chunks=[b" " * 9_000, b" " * 9_000])
        assert crowded.status == 503
        assert crowded.headers["retry-after"] == "1"

        alone = rest.post("/tasks", chunks=[b'{"task_type": "noop"}', b" " * 9_000])
        assert alone.status == 201


def test_a_body_that_does_not_come_is_408(rest: RestBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "BODY_SECONDS_MAX", 0.05)

    reply = rest.post("/tasks", chunks=[b"{", STALL])

    assert reply.status == 408
    assert "did not arrive" in reply.problem()


def test_every_answer_is_fenced_against_browsers(rest: RestBench) -> None:
    for path in every_path(rest):
        for reply in (rest.get(path), rest.get(path, peer=ELSEWHERE), rest.post(path, b"[")):
            assert reply.headers["x-content-type-options"] == "nosniff", path
            assert "default-src 'none'" in reply.headers["content-security-policy"]
            assert reply.headers["cache-control"] == "no-store"
            assert "access-control-allow-origin" not in reply.headers


def test_a_master_without_a_token_cannot_be_made(rest: RestBench) -> None:
    with pytest.raises(ValueError, match="empty API token"):
        create_app(rest.backend, api_token="")


def test_no_refusal_repeats_the_token(rest: RestBench) -> None:
    replies: list[Any] = [
        rest.get("/tasks", token=TOKEN + "x"),
        rest.post("/tasks", {"task_type": TOKEN}, token="y"),
        rest.get("/nothing", token=TOKEN),
    ]
    assert all(TOKEN.encode() not in reply.body for reply in replies)


@pytest.mark.parametrize("path", ["/tasks", "//healthz", "/tasks/1"])
def test_head_is_get_without_its_body(rest: RestBench, path: str) -> None:
    head, get = rest.call("HEAD", path), rest.get(path)

    assert (head.status, head.body) == (get.status, b"")
    assert head.headers["content-length"] == get.headers["content-length"]
    assert head.headers["content-type"] == get.headers["content-type"]


def test_allow_names_every_method_of_a_path_in_one_order(rest: RestBench) -> None:
    assert rest.call("OPTIONS", "/tasks").headers["allow"] == "GET, HEAD, OPTIONS, POST"
    assert rest.call("OPTIONS", "/tasks/1").headers["allow"] == "GET, HEAD, OPTIONS"
    assert rest.call("OPTIONS", "/devices/d1").headers["allow"] == "DELETE, GET, HEAD, OPTIONS"
    assert rest.call("DELETE", "/tasks", token=TOKEN).headers["allow"] == "GET, HEAD, OPTIONS, POST"


def test_every_path_says_what_it_allows_whatever_is_in_its_slots(rest: RestBench) -> None:
    for route in http_routes(rest.app):
        path = re.sub(r"{\w+:int}", "7", re.sub(r"{\w+:str}", "d1", route.path))

        reply = rest.call("OPTIONS", f"/{path}")

        assert (reply.status, reply.body) in ((200, b""), (204, b"")), path
        assert "OPTIONS" in reply.headers["allow"], path


@pytest.mark.parametrize(
    ("method", "path", "body", "detail"),
    [
        ("GET", "/devices?x=1", None, 'query: there is no "x"; allowed are none.'),
        ("GET", "/tasks/1?x=1", None, 'query: there is no "x"; allowed are none.'),
        ("POST", "/tasks/1/cancel", {"why": "no"}, 'body: there is no "why"; allowed are none.'),
        ("POST", "/tasks/1/cancel", b"no", "body: not valid JSON: "),
    ],
)
def test_what_a_route_does_not_take_is_refused_not_ignored(
    rest: RestBench, method: str, path: str, body: Any, detail: str
) -> None:
    reply = rest.call(method, path, body, token=TOKEN)

    assert reply.status in (400, 422)
    assert detail in reply.problem()
