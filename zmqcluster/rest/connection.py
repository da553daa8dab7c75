"""One HTTP connection: uvicorn's, with deadlines and bounds it does not have of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from zmqcluster.rest.door import SECURITY_HEADERS
from zmqcluster.rest.problems import PROBLEM_JSON, Problem, bad_request, unavailable

CONNECTIONS_MAX: Final = 512
HEADER_BYTES_MAX: Final = 16 * 1024
HEADER_SECONDS_MAX: Final = 5.0
IDLE_SECONDS_MAX: Final = 60
# What is written but not fetched by the client is dropped this long after the answer.
FETCH_SECONDS_MAX: Final = 60.0


class BoundedConnection(H11Protocol):
    """A client gets HEADER_SECONDS_MAX for the head of a request, from its first byte or from
    the connection on; the body has its own deadline at the door."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        # The base class narrows the argument in the same way.
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS_MAX:
            self._refuse(unavailable("Too many connections; ask again in a moment."))
        else:
            self._arm()

    def data_received(self, data: bytes) -> None:
        for piece in self._pieces(data):
            super().data_received(piece)
        if self._is_answering():
            self._disarm()
        elif self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]:
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What h11 cannot read; msg is uvicorn's and says less."""
        limit = f"at most {HEADER_BYTES_MAX} bytes of headers are read"
        self._refuse(bad_request(f"This is not a valid HTTP request; {limit}."))

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(FETCH_SECONDS_MAX, self.transport.abort)

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        """h11 looks at the size of a head only while it is not whole, so it gets no more at once
        than makes one too large."""
        start = 0
        while start < len(data) and not self.transport.is_closing():
            room = HEADER_BYTES_MAX + 1 - len(self.conn.trailing_data[0])
            end = start + (room if room > 0 else HEADER_BYTES_MAX)
            yield data[start:end]
            start = end

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _arm(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEADER_SECONDS_MAX, self._on_deadline)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        self._deadline = None
        if not self._is_answering():
            self.transport.abort()

    def _refuse(self, problem: Problem) -> None:
        """Answer outside any request, and hang up."""
        body = problem.body()
        headers: list[tuple[bytes, bytes]] = [
            (b"content-type", PROBLEM_JSON.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            *((name.encode(), text.encode()) for name, text in problem.headers.items()),
            *SECURITY_HEADERS.items(),
        ]
        head = f"HTTP/1.1 {problem.status.value} {problem.status.phrase}\r\n".encode()
        lines = b"".join(name + b": " + text + b"\r\n" for name, text in headers)
        self.transport.write(head + lines + b"\r\n" + body)
        self.transport.close()


def uvicorn_settings() -> dict[str, Any]:
    """What every server of ours gives to uvicorn.Config."""
    return {
        "http": BoundedConnection,
        "ws": "none",
        "lifespan": "off",
        "log_config": None,
        "log_level": "error",
        "access_log": False,
        "server_header": False,
        # X-Forwarded-For is anybody's claim; the door looks at the real peer.
        "proxy_headers": False,
        "h11_max_incomplete_event_size": HEADER_BYTES_MAX,
        "timeout_keep_alive": IDLE_SECONDS_MAX,
        "timeout_graceful_shutdown": 5,
    }
