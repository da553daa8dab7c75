"""Where a page is parsed: small ones at once, large ones in a child process with a deadline.

The HTML parser cannot be stopped, and pages exist on which it takes time in the square of their
size (measured: 64 KiB of open tags 0.4 s, 1 MB 86 s). In the host's loop that would hold every
other task, so what is large goes to one helper process, which is killed when it takes too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import struct
import sys
from pathlib import Path
from typing import Final

import msgspec

from executors.html import Page, read_page

# At this size the worst page seen takes 0.35 s in the loop. A usual page of it takes 0.5 ms.
INLINE_BYTES_MAX: Final = 64 * 1024
PARSE_DEADLINE_S: Final = 5.0
# The helper dies by itself, whatever became of its parent.
_CPU_S_PER_PAGE: Final = 10
_MEMORY_BYTES_MAX: Final = 2 * 1024**3
_LENGTH: Final = struct.Struct("!I")
_SEND_BYTES: Final = 1024 * 1024
_RECEIVE_BYTES: Final = 256 * 1024
# The helper is started as a module of this package, from wherever the host runs.
_ROOT: Final = str(Path(__file__).resolve().parent.parent)


class _Order(msgspec.Struct, frozen=True, array_like=True):
    """What goes before a page's bytes."""

    body_bytes: int
    header_charset: str
    follow_nofollow: bool


_page_decoder: Final = msgspec.msgpack.Decoder(Page)
_order_decoder: Final = msgspec.msgpack.Decoder(_Order)
_encoder: Final = msgspec.msgpack.Encoder()


class Unparseable(Exception):
    """This page takes the parser too long, or kills it."""


class PageParser:
    """Parses pages for one event loop. Owns at most one helper process; close() ends it."""

    def __init__(self, deadline_s: float = PARSE_DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._helper: asyncio.subprocess.Process | None = None
        self._socket: socket.socket | None = None
        self._turn = asyncio.Lock()

    async def parse(self, body: bytes, header_charset: str, follow_nofollow: bool) -> Page:
        """The page, or Unparseable when it is large and takes longer than the deadline."""
        if len(body) <= INLINE_BYTES_MAX:
            return read_page(body, header_charset, follow_nofollow=follow_nofollow)
        async with self._turn:
            return await self._ask(_Order(len(body), header_charset, follow_nofollow), body)

    async def close(self) -> None:
        """End the helper, if one was started."""
        async with self._turn:
            await self._kill()

    async def _ask(self, order: _Order, body: bytes) -> Page:
        """One page through the helper. Whatever goes wrong, the next one gets a fresh helper."""
        whole = False
        try:
            async with asyncio.timeout(self._deadline_s):
                answer = await self._exchange(_encoder.encode(order), body)
            whole = True
        except TimeoutError:
            raise Unparseable(f"parsing took more than {self._deadline_s:g} s") from None
        except (EOFError, ConnectionError):
            raise Unparseable("the parser died on it") from None
        finally:
            if not whole:
                await self._kill()
        return _page_decoder.decode(answer)

    async def _exchange(self, order: bytes, body: bytes) -> bytes:
        if self._socket is None or self._helper is None or self._helper.returncode is not None:
            await self._start()
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._socket, _LENGTH.pack(len(order)) + order)
        await loop.sock_sendall(self._socket, body)
        answer = bytearray()
        need = _LENGTH.size
        while len(answer) < need:
            part = await loop.sock_recv(self._socket, _RECEIVE_BYTES)
            if not part:
                raise EOFError
            answer += part
            if len(answer) >= _LENGTH.size:
                need = _LENGTH.size + _LENGTH.unpack_from(answer)[0]
        return bytes(memoryview(answer)[_LENGTH.size :])

    async def _start(self) -> None:
        await self._kill()
        ours, theirs = socket.socketpair()
        with theirs:
            ours.setblocking(False)
            # A usual page fits, so it is sent with one call.
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BYTES)
            self._socket = ours
            self._helper = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "executors.parser", stdin=theirs.fileno(), cwd=_ROOT
            )

    async def _kill(self) -> None:
        helper, self._helper = self._helper, None
        ours, self._socket = self._socket, None
        if ours is not None:
            ours.close()
        if helper is not None:
            with contextlib.suppress(ProcessLookupError):
                helper.kill()
            await helper.wait()


def main() -> None:
    """The helper: pages in and facts out on the socket at descriptor 0, until it is closed."""
    _limit(resource.RLIMIT_AS, _MEMORY_BYTES_MAX)
    with socket.socket(fileno=0) as door, door.makefile("rwb") as stream:
        while len(head := stream.read(_LENGTH.size)) == _LENGTH.size:
            order = _order_decoder.decode(stream.read(_LENGTH.unpack(head)[0]))
            body = stream.read(order.body_bytes)
            used = resource.getrusage(resource.RUSAGE_SELF)
            _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + _CPU_S_PER_PAGE)
            page = read_page(body, order.header_charset, follow_nofollow=order.follow_nofollow)
            answer = _encoder.encode(page)
            stream.write(_LENGTH.pack(len(answer)) + answer)
            stream.flush()


def _limit(which: int, soft: int) -> None:
    """Lower a limit where the system has it; macOS refuses some of them."""
    _, hard = resource.getrlimit(which)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(which, (soft, hard))


if __name__ == "__main__":
    main()
