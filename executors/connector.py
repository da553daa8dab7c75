"""The client's connections, with a bound the client itself does not have."""

from __future__ import annotations

import asyncio
import functools
from typing import Any, Final

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import RawResponseMessage
from aiohttp.http_exceptions import BadHttpMessage
from aiohttp.streams import StreamReader

# Before an answer come one or two of these (100 Continue, 103 Early Hints).
INTERIM_MAX: Final = 16


class Connector(aiohttp.TCPConnector):
    """A connection pool that leaves a site which announces an answer without end.

    The client reads announcements in a loop that gives way to nobody: sent without a pause they
    held up all tasks of a host for 5.5 s (measured on loopback), which then was killed for it.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # There is no public way to say which protocol a connection speaks.
        protocol: type[ResponseHandler] = _BoundedHandler
        self._factory = functools.partial(protocol, loop=self._loop)


class _BoundedHandler(ResponseHandler):
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._interim = 0

    def feed_data(self, data: tuple[RawResponseMessage, StreamReader], size: int = 0) -> None:
        is_interim = 100 <= data[0].code < 200
        self._interim = self._interim + 1 if is_interim else 0
        if self._interim <= INTERIM_MAX:
            super().feed_data(data, size)
        elif self.exception() is None:
            # As the client does with what it cannot read; its close() would forget the error.
            if self.transport is not None:
                self.transport.close()
            self.set_exception(BadHttpMessage("too many interim answers"))
