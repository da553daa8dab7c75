"""Where a page is parsed: small ones at once, large ones in a child process with a deadline.

The HTML parser cannot be stopped, and pages exist on which it takes time in the square of their
size (measured: 64 KiB of open tags 0.4 s, 1 MB 86 s). In the host's loop that would hold every
other task, so what is large goes to one helper process, which is killed when it takes too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import struct
import sys
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


class Job(msgspec.Struct, frozen=True, array_like=True):
    """One page for the helper."""

    body: bytes
    header_charset: str
    follow_nofollow: bool


_page_decoder: Final = msgspec.msgpack.Decoder(Page)
_job_decoder: Final = msgspec.msgpack.Decoder(Job)
_encoder: Final = msgspec.msgpack.Encoder()


class Unparseable(Exception):
    """This page takes the parser too long, or kills it."""


class PageParser:
    """Parses pages for one event loop. Owns at most one helper process; close() ends it."""

    def __init__(self, deadline_s: float = PARSE_DEADLINE_S) -> None:
        self._deadline_s = deadline_s
        self._helper: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def parse(self, body: bytes, header_charset: str, follow_nofollow: bool) -> Page:
        """The page, or Unparseable when it is large and takes longer than the deadline."""
        if len(body) <= INLINE_BYTES_MAX:
            return read_page(body, header_charset, follow_nofollow=follow_nofollow)
        async with self._turn:
            return await self._ask(Job(body, header_charset, follow_nofollow))

    async def close(self) -> None:
        """End the helper, if one was started."""
        await self._kill()

    async def _ask(self, job: Job) -> Page:
        """One page through the helper. Whatever goes wrong, the next one gets a fresh helper."""
        whole = False
        try:
            async with asyncio.timeout(self._deadline_s):
                answer = await self._exchange(_encoder.encode(job))
            whole = True
        except TimeoutError:
            raise Unparseable(f"parsing took more than {self._deadline_s:g} s") from None
        except (asyncio.IncompleteReadError, ConnectionError):
            raise Unparseable("the parser died on it") from None
        finally:
            if not whole:
                await self._kill()
        return _page_decoder.decode(answer)

    async def _exchange(self, frame: bytes) -> bytes:
        if self._helper is None or self._helper.returncode is not None:
            self._helper = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "executors.parser",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
        reader, writer = self._helper.stdout, self._helper.stdin
        assert reader is not None
        assert writer is not None
        writer.write(_LENGTH.pack(len(frame)) + frame)
        await writer.drain()
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return await reader.readexactly(length)

    async def _kill(self) -> None:
        helper, self._helper = self._helper, None
        if helper is None:
            return
        with contextlib.suppress(ProcessLookupError):
            helper.kill()
        # Closes the pipes too, so nothing is left for the garbage collector to find.
        await helper.communicate()


def main() -> None:
    """The helper: pages in on stdin, facts out on stdout, until stdin ends."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    _limit(resource.RLIMIT_AS, _MEMORY_BYTES_MAX)
    while len(head := source.read(_LENGTH.size)) == _LENGTH.size:
        (length,) = _LENGTH.unpack(head)
        job = _job_decoder.decode(source.read(length))
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + _CPU_S_PER_PAGE)
        page = read_page(job.body, job.header_charset, follow_nofollow=job.follow_nofollow)
        answer = _encoder.encode(page)
        sink.write(_LENGTH.pack(len(answer)) + answer)
        sink.flush()


def _limit(which: int, soft: int) -> None:
    """Lower a limit where the system has it; macOS refuses some of them."""
    _, hard = resource.getrlimit(which)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(which, (soft, hard))


if __name__ == "__main__":
    main()
