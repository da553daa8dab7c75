"""The HTTP server of a master: uvicorn on an event loop of its own, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import uvicorn

from zmqcluster.errors import StartError
from zmqcluster.rest.connection import uvicorn_settings

if TYPE_CHECKING:
    from litestar.types import ASGIApp

START_SECONDS_MAX: Final = 10.0
STOP_SECONDS_MAX: Final = 10.0
BACKLOG: Final = 512
_LOG: Final = logging.getLogger(__name__)


class RestServer:
    """Serves an ASGI application on host and port; port 0 takes a free one.

    Either start() and stop() from any thread, or bind() and `await serve()` on a loop of yours,
    with stop_soon() from any thread.
    """

    def __init__(self, app: ASGIApp, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self._app = app
        self._sockets: list[socket.socket] = []
        self._server: _Server | None = None
        self._is_stopping = False
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def bind(self) -> None:
        """Take the port, on every address that host names. Raises StartError."""
        if self._sockets:
            return
        try:
            for family, address in _addresses(self.host, self.port):
                self._listen(family, address)
        except OSError as error:
            self._close_sockets()
            raise StartError(_advice(self.host, self.port, error)) from None

    def _listen(self, family: socket.AddressFamily, address: Any) -> None:
        """One more address, on the port the first one got."""
        try:
            listener = _listener(family, (address[0], self.port, *address[2:]))
        except OSError as error:
            # A machine may name ::1 localhost and have no IPv6: the first address is enough.
            if self._sockets and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                return
            raise
        self._sockets.append(listener)
        self.port = listener.getsockname()[1]

    async def serve(self, on_started: Callable[[], None] | None = None) -> None:
        """Answer requests until stop_soon(); those in hand are finished first."""
        self.bind()
        config = uvicorn.Config(self._app, **uvicorn_settings())
        self._server = _Server(config, on_started)
        self._server.should_exit = self._is_stopping
        try:
            await self._server.serve(sockets=self._sockets)
        finally:
            self._close_sockets()

    def start(self) -> None:
        """Answer requests in a thread of its own, from now on. Raises StartError."""
        if self._thread is not None:
            return
        self.bind()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="rest")
        self._thread.start()
        if not started.wait(START_SECONDS_MAX) or self._failure is not None:
            self.stop()
            raise StartError(f"the REST API did not start: {self._failure or 'no answer in time'}")

    def stop_soon(self) -> None:
        """Take no more connections, finish what is in hand, and return from serve()."""
        self._is_stopping = True
        if self._server is not None:
            self._server.should_exit = True

    def stop(self) -> None:
        """Stop and wait for the end. Safe to call twice, and before start()."""
        self.stop_soon()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(STOP_SECONDS_MAX)
            if thread.is_alive():
                _LOG.error("the REST API did not stop within %.0f s", STOP_SECONDS_MAX)
        self._close_sockets()

    def _run(self, started: threading.Event) -> None:
        try:
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                runner.run(self.serve(started.set))
        except (OSError, RuntimeError) as error:
            self._failure = error
            _LOG.error("the REST API stopped: %s", error)
        finally:
            started.set()

    def _close_sockets(self) -> None:
        while self._sockets:
            self._sockets.pop().close()


class _Server(uvicorn.Server):
    """Leaves the signals of the process alone, and says when it listens."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_started is not None:
            self._on_started()


def _addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, Any]]:
    """Each address once, IPv4 first; `localhost` is usually two."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    unique = {entry[4]: (entry[0], entry[4]) for entry in found}
    return sorted(unique.values(), key=lambda each: each[0] is not socket.AF_INET)


def _listener(family: socket.AddressFamily, address: Any) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A restarted master must not wait for the last connections to be forgotten.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family is socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop


def _advice(host: str, port: int, error: OSError) -> str:
    """Why the port cannot be had, and what to do."""
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} is in use: another master may be running here; "
            "stop it, or choose another port with --master-port"
        )
    if error.errno == errno.EACCES:
        return f"port {port} may not be used by this user: choose one above 1023 (--master-port)"
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine: check --rest-bind"
    return f"cannot listen on {host} port {port}: {error.strerror or error}"
