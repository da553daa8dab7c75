"""An HTTP server on loopback that answers as a test tells it, for the client side of REST."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import msgspec
from msgspec import Struct, field


class Asked(Struct):
    """One request as the server saw it. path: without the API prefix and the query."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


class Reply(Struct):
    """status 0: close the connection without a word. close: close it after the answer."""

    status: int = 200
    body: Any = None
    close: bool = False
    raw: bytes | None = None


Answer = Reply | Callable[[Asked], Reply]


class FakeRest(Struct):
    """answers: by "METHOD /path"; a list is used up one by one, its last staying."""

    port: int = 0
    answers: dict[str, Answer | list[Answer]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    def answer(self, asked: Asked) -> Reply:
        self.asked.append(asked)
        found = self.answers.get(f"{asked.method} {asked.path}")
        if found is None:
            return problem(404, "not_found", f"no answer prepared for {asked.path}")
        if isinstance(found, list):
            found = found.pop(0) if len(found) > 1 else found[0]
        return found if isinstance(found, Reply) else found(asked)

    def bodies(self, request: str) -> list[Any]:
        """The JSON bodies of all requests "METHOD /path"."""
        return [
            msgspec.json.decode(each.body)
            for each in self.asked
            if f"{each.method} {each.path}" == request
        ]


def problem(status: int, code: str, detail: str) -> Reply:
    """An application/problem+json answer."""
    return Reply(status, {"title": "no", "status": status, "detail": detail, "code": code})


@contextmanager
def fake_rest() -> Iterator[FakeRest]:
    """A server for the time of a with block."""
    fake = FakeRest()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    server.daemon_threads = True
    fake.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(fake: FakeRest) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30
        # Head and body in one packet, or the client's delayed ACK costs 40 ms an answer.
        wbufsize = -1

        def handle_one(self) -> None:
            parts = urlsplit(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            asked = Asked(
                self.command,
                parts.path.removeprefix("/api/distribution"),
                dict(parse_qsl(parts.query)),
                {name.lower(): value for name, value in self.headers.items()},
                self.rfile.read(length),
            )
            reply = fake.answer(asked)
            if reply.status == 0:
                self.close_connection = True
                return
            data = reply.raw if reply.raw is not None else msgspec.json.encode(reply.body)
            self.send_response(reply.status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            # Without a Connection header the client believes the connection stays.
            self.close_connection = reply.close

        do_GET = do_POST = do_PUT = do_DELETE = handle_one

        def log_message(self, format: str, *args: Any) -> None:
            """Tests print nothing."""

    return Handler
