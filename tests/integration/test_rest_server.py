"""The REST API over real sockets: well-behaved clients, slow ones, and noise."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.rest_bench import TOKEN, BenchBackend, rest_bench
from zmqcluster.errors import StartError
from zmqcluster.rest import connection
from zmqcluster.rest.app import create_app
from zmqcluster.rest.server import RestServer

DEADLINE_S = 10.0
JSON = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[BenchBackend]:
    with rest_bench(tmp_path) as bench:
        yield bench.backend


@pytest.fixture
def server(backend: BenchBackend) -> Iterator[RestServer]:
    server = RestServer(create_app(backend, api_token=TOKEN), "127.0.0.1", 0)
    server.start()
    yield server
    server.stop()


def ask(
    server: RestServer, method: str, path: str, body: Any = None, headers: Any = None
) -> tuple[http.client.HTTPResponse, bytes]:
    client = http.client.HTTPConnection("localhost", server.port, timeout=DEADLINE_S)
    try:
        client.request(method, path, body, headers or {})
        answer = client.getresponse()
        return answer, answer.read()
    finally:
        client.close()


def talk(server: RestServer, *pieces: bytes) -> bytes:
    """Send these bytes, and all that comes back until the server hangs up."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=DEADLINE_S) as client:
        for piece in pieces:
            client.sendall(piece)
        answer = b""
        while chunk := _receive(client):
            answer += chunk
        return answer


def _receive(client: socket.socket) -> bytes:
    try:
        return client.recv(65_536)
    except ConnectionResetError:
        return b""


def test_the_two_curl_lines_work_as_they_stand(server: RestServer) -> None:
    for path, key in (("devices", "devices"), ("tasks", "tasks")):
        answer, body = ask(server, "GET", f"/api/distribution/{path}", headers={"Accept": "*/*"})

        assert answer.status == 200
        assert json.loads(body)[key] == []
        assert answer.getheader("server") is None


def test_a_batch_is_queued_and_seen_over_one_connection(server: RestServer) -> None:
    client = http.client.HTTPConnection("127.0.0.1", server.port, timeout=DEADLINE_S)
    body = json.dumps([{"task_type": "noop"}] * 3_000)

    client.request("POST", "/api/distribution/tasks", body, JSON)
    answer = client.getresponse()
    assert answer.status == 201
    assert len(json.loads(answer.read())["task_ids"]) == 3_000
    client.request("GET", "/api/distribution/tasks?limit=1000")
    assert len(json.loads(client.getresponse().read())["tasks"]) == 1_000
    client.close()


def test_a_body_in_chunks_is_read(server: RestServer) -> None:
    pieces = iter([b'{"task_type"', b': "noop"}'])

    answer, body = ask(server, "POST", "/api/distribution/tasks", pieces, JSON)

    assert answer.status == 201, body


def test_a_body_beyond_the_limit_gets_its_answer(server: RestServer) -> None:
    body = b"[" + b" " * (9 * 1024 * 1024) + b"]"

    answer, problem = ask(server, "POST", "/api/distribution/tasks", body, JSON)
    assert answer.status == 413
    assert "8388608" in json.loads(problem)["detail"]

    pieces = (b" " * 65_536 for _ in range(9 * 16))
    answer, problem = ask(server, "POST", "/api/distribution/tasks", pieces, JSON)
    assert answer.status == 413


@pytest.mark.parametrize(
    "noise",
    [
        b"\x00" * 100,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xff" * 200,
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET \xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 70_000,
    ],
)
def test_noise_is_answered_by_a_problem_and_a_hang_up(server: RestServer, noise: bytes) -> None:
    head, _, body = talk(server, noise).partition(b"\r\n\r\n")

    # A peer still sending may see the reset before the words.
    if head:
        assert head.startswith(b"HTTP/1.1 400")
        assert b"application/problem+json" in head
        assert b"nosniff" in head
        assert "valid HTTP" in json.loads(body)["detail"]
    assert ask(server, "GET", "/healthz")[0].status == 200


def test_a_client_that_sends_no_request_is_dropped(
    server: RestServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS_MAX", 0.2)

    for pieces in ([], [b"GET /healthz HT"], [b"GET /healthz HTTP/1.1\r\nHost: loc"]):
        began = time.monotonic()
        assert talk(server, *pieces) == b""
        assert time.monotonic() - began < 5


def test_a_second_request_that_stops_half_way_is_dropped_too(
    server: RestServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEADER_SECONDS_MAX", 0.2)
    whole = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"

    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(whole)
        assert client.recv(65_536).endswith(b"ok\n")
        client.sendall(whole[:20])
        assert _receive(client) == b""


def test_connections_beyond_the_limit_are_told_so(
    server: RestServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CONNECTIONS_MAX", 2)
    address = ("127.0.0.1", server.port)

    with socket.create_connection(address), socket.create_connection(address):
        crowded = talk(server)

    assert crowded.startswith(b"HTTP/1.1 503")
    assert b"Retry-After" in crowded


def test_a_taken_port_is_one_line_of_advice(server: RestServer) -> None:
    second = RestServer(_nothing, "127.0.0.1", server.port)

    with pytest.raises(StartError, match=rf"port {server.port} is in use.*--master-port"):
        second.start()
    second.stop()


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_of_another_machine_is_one_line_of_advice(host: str) -> None:
    with pytest.raises(StartError, match="is not an address of this machine"):
        RestServer(_nothing, host, 0).bind()


def test_stop_is_quick_and_may_come_twice_or_first(server: RestServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as idle:
        idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert idle.recv(65_536)
        began = time.monotonic()
        server.stop()
        server.stop()
        assert time.monotonic() - began < 3
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port))
    RestServer(_nothing, "127.0.0.1", 0).stop()


def test_a_request_in_hand_is_answered_before_the_stop(
    server: RestServer, backend: BenchBackend
) -> None:
    reading, go_on = threading.Event(), threading.Event()
    counts = backend.queries.counts

    def slow_counts() -> Any:
        reading.set()
        assert go_on.wait(DEADLINE_S)
        return counts()

    backend.queries.counts = slow_counts  # type: ignore[method-assign]  # slows it down
    answers: list[int] = []
    client = threading.Thread(
        target=lambda: answers.append(ask(server, "GET", "/api/distribution/tasks/stats")[0].status)
    )
    client.start()
    assert reading.wait(DEADLINE_S)
    server.stop_soon()
    go_on.set()
    client.join(DEADLINE_S)

    assert answers == [200]


def test_it_serves_on_a_loop_of_the_caller(backend: BenchBackend) -> None:
    server = RestServer(create_app(backend, api_token=TOKEN), "localhost", 0)
    statuses: list[int] = []

    async def main() -> None:
        started = asyncio.Event()
        serving = asyncio.create_task(server.serve(started.set))
        await asyncio.wait_for(started.wait(), DEADLINE_S)
        answer, _ = await asyncio.to_thread(ask, server, "GET", "/healthz")
        statuses.append(answer.status)
        server.stop_soon()
        await asyncio.wait_for(serving, DEADLINE_S)

    asyncio.run(main())

    assert statuses == [200]


async def _nothing(scope: Any, receive: Any, send: Any) -> None:
    """An application nobody asks."""


def test_head_of_a_request_is_bounded_also_when_it_comes_at_once(server: RestServer) -> None:
    filler = b"X: " + b"a" * connection.HEADER_BYTES_MAX + b"\r\n"

    answer = talk(server, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + filler + b"\r\n")

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"at most 16384 bytes of headers" in answer
    assert answer.count(b"HTTP/1.1") == 1
