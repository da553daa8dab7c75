"""A web server that does to a crawler what the worst ones do; notes what arrived, and when."""

from __future__ import annotations

import contextlib
import gzip
import os
import socket
import socketserver
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, Self

from tests.support.arrived import arrived_s

# Nobody holds a connection for longer, whatever is asked; tests must end.
PATIENCE_S: Final = 100.0
HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"
BOMB: Final = gzip.compress(bytes(100 * 1024 * 1024), 9)

# What is sent after a request, piece by piece; None in between is a pause of a tenth of a second.
Pieces = Iterator[bytes | None]


class HostileSite:
    """Serves until closed. robots: what /robots.txt does; the other paths are in PAGES.

    tls: it speaks https with this. address: where it listens; port 0 takes a free one.
    """

    def __init__(
        self,
        robots: Callable[[str], Pieces] | None = None,
        tls: ssl.SSLContext | None = None,
        address: tuple[str, int] = ("127.0.0.1", 0),
    ) -> None:
        self.arrivals: list[tuple[float, str]] = []
        # When requests came and were done with, by time.monotonic().
        self.stays: list[tuple[float, float]] = []
        self.robots = robots or _not_found
        self.tls = tls
        self.stopping = threading.Event()
        self._server = _Server(address, self)
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="hostile site")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def paths(self) -> list[str]:
        return [path for _, path in self.arrivals]

    def pieces_for(self, path: str) -> Pieces:
        if path == "/robots.txt":
            return self.robots(self.url)
        name = path[1:].partition("/")[0].partition("?")[0]
        return PAGES.get(name, _not_found)(path)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = False
    block_on_close = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], site: HostileSite) -> None:
        super().__init__(address, _Handler)
        self.site = site

    def get_request(self) -> tuple[socket.socket, Any]:
        line, address = super().get_request()
        if self.site.tls is not None:
            # The handshake comes with the first read, in the connection's own thread.
            line = self.site.tls.wrap_socket(line, server_side=True, do_handshake_on_connect=False)
        return line, address

    def handle_error(self, request: object, client_address: object) -> None:
        """A crawler that hangs up is none of our business."""


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        site, line = self.server.site, self.request
        assert isinstance(line, socket.socket)
        line.settimeout(1.0)
        until = time.monotonic() + PATIENCE_S
        with contextlib.suppress(OSError):
            asked = b""
            while b"\r\n\r\n" not in asked:
                block = line.recv(65536)
                if not block:
                    return
                asked += block
            path = asked.split(b" ")[1].decode("latin-1")
            came_s = arrived_s(line)
            site.arrivals.append((came_s, path))
            try:
                self._answer(line, path, until)
            finally:
                site.stays.append((came_s, time.monotonic()))

    def _answer(self, line: socket.socket, path: str, until: float) -> None:
        site = self.server.site
        for piece in site.pieces_for(path):
            if time.monotonic() > until or site.stopping.is_set():
                return
            if piece is None:
                site.stopping.wait(0.1)
            elif piece == RESET:
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return
            else:
                line.sendall(piece)


RESET: Final = b"\0RESET"


def page(body: bytes, head: bytes = b"") -> bytes:
    return HEAD + b"Connection: close\r\nContent-Length: %d\r\n" % len(body) + head + b"\r\n" + body


def moved(to: str) -> bytes:
    return (
        b"HTTP/1.1 302 Found\r\nConnection: close\r\nContent-Length: 0\r\n"
        b"Location: " + to.encode() + b"\r\n\r\n"
    )


def status(code: int, head: bytes = b"") -> bytes:
    return b"HTTP/1.1 %d No\r\nConnection: close\r\nContent-Length: 0\r\n%b\r\n" % (code, head)


def _once(*pieces: bytes) -> Callable[[str], Pieces]:
    return lambda _: iter(pieces)


def _for_ever(first: bytes, piece: bytes, pauses: int = 0) -> Callable[[str], Pieces]:
    def pieces(_: str) -> Pieces:
        yield first
        while True:
            yield piece
            yield from [None] * pauses

    return pieces


def _not_found(_: str) -> Pieces:
    yield status(404)


def _redirected(path: str) -> Pieces:
    yield moved(path.partition("?")[2])


def _step(path: str) -> Pieces:
    number = int(path.rpartition("/")[2] or 0)
    yield moved(f"/step/{number + 1}")


def _calendar(path: str) -> Pieces:
    """A month with a link to the next one, for ever."""
    month = int(path.rpartition("/")[2] or 0)
    yield page(f'<a href="/calendar/{month + 1}">next</a>'.encode())


PAGES: Final[dict[str, Callable[[str], Pieces]]] = {
    "good": _once(page(b"<title>good</title>")),
    # Without end.
    "drip": _for_ever(HEAD + b"\r\n", b"x", 5),
    "endless": _for_ever(HEAD + b"\r\n", b"<p>x</p>" * 4096),
    "chunks": _for_ever(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n" * 4096),
    "headers": _for_ever(HEAD, b"X-A: b\r\n" * 4),
    "hints": _for_ever(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "silent": _for_ever(b"", b"", 10),
    # Larger than they look.
    "bomb": _once(page(BOMB, b"Content-Encoding: gzip\r\n")),
    "bombs": _once(page(gzip.compress(BOMB), b"Content-Encoding: gzip, gzip\r\n")),
    "nested": _once(page(b"<div>" * 100_000 + b"x")),
    "attribute": _once(page(b'<a href="/' + b"z" * 4_000_000 + b'">x</a>')),
    "entities": _once(page(b"<!DOCTYPE a [<!ENTITY b SYSTEM '/good'>]>" + b"&b;" * 99_999)),
    # Elsewhere.
    "to": _redirected,
    "step": _step,
    "self": _once(moved("/self")),
    "calendar": _calendar,
    # Not HTTP, or no longer.
    "short": _once(HEAD + b"Content-Length: 5000\r\n\r\nhello"),
    "both": _once(HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nhello"),
    "length": _once(HEAD + b"Content-Length: 99999999999999999999\r\n\r\nhello"),
    "chunk": _once(HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n"),
    "long-header": _once(HEAD + b"X: " + b"a" * 1_000_000 + b"\r\n\r\nhello"),
    "status": _once(b"HTTP/1.1 999999 \xff\xfe\r\n\r\n"),
    "noise": _once(os.urandom(5000)),
    "reset": _once(RESET),
    # Later.
    "busy-huge": _once(status(503, b"Retry-After: 99999999999999999999\r\n")),
    "busy-junk": _once(status(429, b"Retry-After: soon\r\n")),
    "busy-past": _once(status(503, b"Retry-After: Wed, 21 Oct 2015 07:28:00 GMT\r\n")),
    "busy-negative": _once(status(429, b"Retry-After: -5\r\n")),
}
