"""A TCP proxy in front of a ZeroMQ port that knows where frames begin, and spoils what it is told.

What goes through is CURVE: a whole frame can be lost without anybody noticing at once, but one that
comes twice, late, early or changed costs its connection. That is what the proxy is there to show;
it cannot forge a frame, and neither can anybody else on the way.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from enum import StrEnum
from random import Random
from typing import Any, Final, Self

from msgspec import Struct, field

GREETING_BYTES: Final = 64
LONG: Final = 0x02
START_S: Final = 10.0
# A stalled way keeps this many pieces, then TCP itself holds the sender back.
HELD_MAX: Final = 4096
PIECE_BYTES: Final = 1024
LOOK_S: Final = 0.01


class Way(StrEnum):
    """Which way a frame goes: UP to the master, DOWN from it."""

    UP = "up"
    DOWN = "down"


# What goes on instead of a frame: nothing, the same, the same twice, something else.
Edit = Callable[[Way, bytes], list[bytes]]


def is_message(frame: bytes) -> bool:
    """Is it one of ours, and not of the handshake?"""
    body = frame[9:] if frame[0] & LONG else frame[2:]
    return body.startswith(b"\x07MESSAGE")


def untouched(_: Way, frame: bytes) -> list[bytes]:
    return [frame]


class Weather(Struct):
    """What the way is like now; changed at any time. bytes_per_s: 0 for no limit.

    stalled: nothing arrives, and nobody is told; it goes on where it was. refuses: new connections
    are reset. cut_after: a connection is reset once so many bytes went through, 0 for never.
    """

    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    bytes_per_s: int = 0
    stalled: set[Way] = field(default_factory=set)
    refuses: bool = False
    cut_after: int = 0
    edit: Edit = untouched


class Proxy:
    """Listens on `port` of loopback until close(); each connection goes on to target_port."""

    def __init__(self, target_port: int, seed: int = 1) -> None:
        self.weather = Weather()
        self.port = 0
        self.connections = 0
        self._target_port = target_port
        self._rng = Random(seed)
        self._open: set[_Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()
        assert self._ready.wait(START_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_S)

    def reset_all(self) -> None:
        """RST on every connection, both sides."""
        self._call(self._reset_all())

    def clear(self) -> None:
        """Good weather again."""
        self.weather = Weather()

    async def _reset_all(self) -> None:
        for one in self._open:
            one.reset()

    def _call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(START_S)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        async with asyncio.TaskGroup() as group:
            self._group = group
            await self._stop.wait()
            server.close()
            await self._reset_all()
            for one in self._open:
                one.end()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # In our own group: a task the server made would be cancelled by nobody.
        self._group.create_task(self._carry(reader, writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.weather.refuses:
            _reset(writer)
            return
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            _reset(writer)
            return
        self.connections += 1
        one = _Connection(self, writer, far_writer)
        self._open.add(one)
        try:
            await one.carry(reader, far_reader, self._rng)
        finally:
            self._open.discard(one)
            one.reset()


class _Connection:
    def __init__(self, proxy: Proxy, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self._proxy = proxy
        self._near = near
        self._far = far
        self._carried = 0
        self._ended = asyncio.Event()

    def reset(self) -> None:
        _reset(self._near)
        _reset(self._far)

    def end(self) -> None:
        self._ended.set()

    async def carry(
        self, near: asyncio.StreamReader, far: asyncio.StreamReader, rng: Random
    ) -> None:
        """Until one side ends, or the proxy does."""
        up = asyncio.create_task(self._pump(Way.UP, near, self._far, rng))
        down = asyncio.create_task(self._pump(Way.DOWN, far, self._near, rng))
        over = asyncio.create_task(self._ended.wait())
        try:
            await asyncio.wait({up, down, over}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in (up, down, over):
                one.cancel()
            await asyncio.gather(up, down, over, return_exceptions=True)

    async def _pump(
        self, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: Random
    ) -> None:
        held: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue(HELD_MAX)
        sending = asyncio.create_task(self._send(way, held, writer))
        loop = asyncio.get_running_loop()
        due, seen = 0.0, 0
        try:
            while frame := await _next_frame(reader, GREETING_BYTES - seen):
                seen = min(seen + len(frame), GREETING_BYTES)
                weather = self._proxy.weather
                edited = weather.edit(way, frame) if is_message(frame) else [frame]
                wait_ms = weather.delay_ms + rng.uniform(-1, 1) * weather.jitter_ms
                # TCP keeps the order, so a slow one holds up those behind it.
                due = max(due, loop.time() + wait_ms / 1000)
                for piece in edited:
                    await held.put((due, piece))
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            # What came before the end still arrives, as it would in a cable.
            with contextlib.suppress(asyncio.QueueFull):
                held.put_nowait(None)
            try:
                await sending
            finally:
                sending.cancel()

    async def _send(
        self,
        way: Way,
        held: asyncio.Queue[tuple[float, bytes] | None],
        writer: asyncio.StreamWriter,
    ) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while (item := await held.get()) is not None:
                due, frame = item
                if due > loop.time():
                    await asyncio.sleep(due - loop.time())
                weather = self._proxy.weather
                size = PIECE_BYTES if weather.bytes_per_s else len(frame)
                for start in range(0, len(frame), size):
                    piece = frame[start : start + size]
                    while way in self._proxy.weather.stalled:  # noqa: ASYNC110  # set by a thread
                        await asyncio.sleep(LOOK_S)
                    if weather.bytes_per_s:
                        await asyncio.sleep(len(piece) / weather.bytes_per_s)
                    writer.write(piece)
                    await writer.drain()
                    self._carried += len(piece)
                    if 0 < weather.cut_after <= self._carried:
                        return self.reset()
        return None


async def _next_frame(reader: asyncio.StreamReader, greeting_left: int) -> bytes:
    """The next frame with its head, or a part of the greeting, which comes first; b"" at the end.

    A part, since each side waits for the first words of the other before it says the rest.
    """
    if greeting_left:
        return await reader.read(greeting_left)
    head = await reader.read(1)
    if not head:
        return b""
    size = await reader.readexactly(8 if head[0] & LONG else 1)
    return head + size + await reader.readexactly(int.from_bytes(size, "big"))


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST: what was not read yet is lost."""
    peer = writer.get_extra_info("socket")
    if peer is not None and not writer.transport.is_closing():
        with contextlib.suppress(OSError):
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
