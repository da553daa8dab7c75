"""Reads a response body as a stream and unpacks it, never past its cap: a bomb costs its cap."""

from __future__ import annotations

import zlib
from typing import Final

import aiohttp

# More members than this in one gzip stream is an attack on our time, not a page.
GZIP_MEMBERS_MAX: Final = 64


async def read_body(
    answer: aiohttp.ClientResponse, cap: int, keep_cut: bool
) -> tuple[bytes, int, str]:
    """Body unpacked, bytes on the wire, and why it was cut ("" when whole)."""
    announced = answer.content_length or 0
    encodings = answer.headers.get("Content-Encoding", "").lower().strip()
    if encodings not in ("", "identity", "gzip", "x-gzip", "deflate"):
        # We asked for one layer of gzip or deflate; whoever sends more is not read.
        return b"", announced, "undecodable"
    if announced > cap and not keep_cut:
        return b"", announced, "too_big"
    read = _read_plain if encodings in ("", "identity") else _read_packed
    body, wire_bytes, cut = await read(answer.content, cap)
    if cut == "too_big":
        return (body[:cap] if keep_cut else b""), max(announced, wire_bytes), cut
    return body, wire_bytes, cut


async def _read_plain(stream: aiohttp.StreamReader, cap: int) -> tuple[bytes, int, str]:
    chunks = []
    size = 0
    while size <= cap and (chunk := await stream.readany()):
        size += len(chunk)
        chunks.append(chunk)
    body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    return body, size, "too_big" if size > cap else ""


async def _read_packed(stream: aiohttp.StreamReader, cap: int) -> tuple[bytes, int, str]:
    unpacker = _Unpacker(cap)
    size = 0
    while size <= cap and not unpacker.is_full and (chunk := await stream.readany()):
        size += len(chunk)
        try:
            unpacker.feed(chunk)
        except zlib.error:
            return b"", size, "undecodable"
    # A stream that stops early is shown by browsers as far as it goes, so we keep it too.
    is_cut = size > cap or unpacker.is_full
    return unpacker.body(), size, "too_big" if is_cut else ""


class _Unpacker:
    """gzip and deflate, whichever it turns out to be, never more than cap bytes of output."""

    def __init__(self, cap: int) -> None:
        self._cap = cap
        self._members = 1
        self._inner = zlib.decompressobj(wbits=47)  # 32 + 15: gzip or zlib, told by the header.
        self._began = False
        self._parts: list[bytes] = []
        self._size = 0

    @property
    def is_full(self) -> bool:
        return self._size > self._cap

    def feed(self, data: bytes) -> None:
        """Unpack as far as the cap allows. Raises zlib.error."""
        while data and not self.is_full:
            if self._inner.eof:
                # Members may follow each other; anything else after the end is padding.
                if not data.startswith(b"\x1f\x8b") or self._members >= GZIP_MEMBERS_MAX:
                    return
                self._members += 1
                self._inner = zlib.decompressobj(wbits=47)
            self._take(self._unpack(data))
            data = self._inner.unused_data or self._inner.unconsumed_tail

    def body(self) -> bytes:
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)

    def _unpack(self, data: bytes) -> bytes:
        room = self._cap - self._size + 1
        try:
            part = self._inner.decompress(data, room)
        except zlib.error:
            if self._began:
                raise
            # "deflate" without the zlib header, as some servers always sent it.
            self._inner = zlib.decompressobj(wbits=-15)
            part = self._inner.decompress(data, room)
        self._began = True
        return part

    def _take(self, part: bytes) -> None:
        if part:
            self._parts.append(part)
            self._size += len(part)
