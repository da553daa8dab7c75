"""What a host prints: read without ever holding up the agent, the last of it kept as evidence.

A host that prints without end is slowed down by its full pipe, not the agent by reading: a read
that found the pipe full is followed by a pause, and of what is in it only the end is looked at.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import struct
import termios
from collections.abc import Iterator
from typing import Final

TAIL_BYTES_MAX: Final = 64 * 1024
# The most a process without rights may ask for.
PIPE_BYTES: Final = 1024 * 1024
# A full pipe every so often is about 500 MB/s, at a fifth of a core.
PAUSE_MS: Final = 2
READ_BYTES: Final = 4 * TAIL_BYTES_MAX
LINES_PER_S: Final = 20
LINE_CHARS_MAX: Final = 500
# A library's frames are often on top of the one its author knows.
FRAMES_SHOWN: Final = 3

# How faulthandler begins the stack of one thread.
_STACK: Final = "(most recent call first):"
_COUNT: Final = struct.Struct("i")
_UNPRINTABLE: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LEVELS: Final = {
    "DEBUG": logging.DEBUG,
    "INFO": logging.INFO,
    "WARNING": logging.WARNING,
    "ERROR": logging.ERROR,
    "CRITICAL": logging.ERROR,
}

log = logging.getLogger("zmqcluster.host")


class OutputTail:
    """Reads one pipe; keeps its last TAIL_BYTES_MAX bytes and shows some lines in the log."""

    def __init__(self, label: str) -> None:
        """child_fd: the writing end, to be given away; the caller closes it."""
        self.fd, self.child_fd = os.pipe()
        self._nowhere = os.open(os.devnull, os.O_WRONLY)
        os.set_blocking(self.fd, False)
        _enlarge(self.fd)
        self._label = label
        self._tail = bytearray()
        self._total = 0
        self._line = b""
        self._lines_left = LINES_PER_S
        self._lines_since_ms = 0
        self._hidden = 0
        self.is_open = True

    def read(self, now_ms: int) -> bool:
        """Take what is there. True: there is so much that the caller should pause PAUSE_MS."""
        try:
            thrown_away = self._throw_away()
            data = os.read(self.fd, READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self.is_open = False
            return False
        self._total += thrown_away + len(data)
        self._hidden += thrown_away
        self._tail += data[-TAIL_BYTES_MAX:]
        if len(self._tail) > 2 * TAIL_BYTES_MAX:
            del self._tail[:-TAIL_BYTES_MAX]
        self._show(data, now_ms)
        return thrown_away + len(data) >= PIPE_BYTES // 2

    def text(self) -> str:
        """The end of everything printed, as readable text; says how much came before."""
        tail = bytes(self._tail[-TAIL_BYTES_MAX:])
        skipped = self._total - len(tail)
        shown = _UNPRINTABLE.sub("?", tail.decode(errors="replace"))
        return f"[… {skipped:,} bytes before this are not kept …]\n{shown}" if skipped else shown

    def last_line(self) -> str:
        """The last line with something in it, for an error in one line; "" when there is none."""
        lines = [line.strip() for line in self.text().splitlines() if line.strip()]
        return lines[-1][:LINE_CHARS_MAX] if lines else ""

    def standing_in(self) -> str:
        """Where its main thread was when it was last asked (ShowStack), innermost frame first; ""
        when it was not."""
        _, found, stack = self.text().rpartition(_STACK)
        frames = stack.splitlines()[1 : 1 + FRAMES_SHOWN] if found else []
        return ", called from ".join(frame.strip()[:LINE_CHARS_MAX] for frame in frames)

    def drain(self, now_ms: int) -> None:
        """Take the rest; for a host that is gone, so that there is an end to it."""
        for _ in range(64):
            before = self._total
            self.read(now_ms)
            if not self.is_open or self._total == before:
                return

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._nowhere)
        self.is_open = False

    def _throw_away(self) -> int:
        """All that is waiting but the end of it, uncopied; how many bytes that was."""
        if not hasattr(os, "splice"):
            return 0
        (waiting,) = _COUNT.unpack(fcntl.ioctl(self.fd, termios.FIONREAD, bytes(_COUNT.size)))
        too_much = int(waiting) - 2 * TAIL_BYTES_MAX
        return os.splice(self.fd, self._nowhere, too_much) if too_much > 0 else 0

    def _show(self, data: bytes, now_ms: int) -> None:
        if now_ms - self._lines_since_ms >= 1000:
            self._lines_since_ms, self._lines_left = now_ms, LINES_PER_S
            if self._hidden:
                log.info("%s printed %d bytes more", self._label, self._hidden)
                self._hidden = 0
        if not self._lines_left:
            self._hidden += len(data)
            return
        for line in self._whole_lines(data):
            if not self._lines_left:
                self._hidden += len(line) + 1
                continue
            self._lines_left -= 1
            text = _UNPRINTABLE.sub("?", line[: 4 * LINE_CHARS_MAX].decode(errors="replace"))
            # Lines of logging in the host begin with their level; bare prints are details.
            level = _LEVELS.get(text.partition(" ")[0], logging.DEBUG)
            log.log(level, "%s: %s", self._label, text[:LINE_CHARS_MAX])

    def _whole_lines(self, data: bytes) -> Iterator[bytes]:
        *lines, rest = (self._line + data).split(b"\n")
        self._line = rest[:LINE_CHARS_MAX]
        return iter(lines)


def _enlarge(fd: int) -> None:
    """A larger pipe wakes the agent less often; where that cannot be had, do without."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        try:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            return
