"""Log lines for the operator, written by a thread of their own.

A terminal stopped with Ctrl-S or a full pipe blocks whoever writes to it. The loops that keep
leases must never be that one, so they only put a line into a bounded queue; lines that find it
full are counted, and the count is logged once there is room.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
from collections.abc import Iterator
from typing import Final, TextIO

LINE_FORMAT: Final = "%(asctime)s - %(levelname)s - %(message)s"
TIME_FORMAT: Final = "%Y-%m-%d %H:%M:%S"
LINES_MAX: Final = 10_000
LINE_CHARS_MAX: Final = 8_000
FLUSH_S: Final = 2.0

# Chatty at info, and about things our own lines already say.
_QUIET: Final = ("uvicorn", "uvicorn.error", "uvicorn.access", "litestar", "asyncio", "aiohttp")

# Text from peers and pages may end up in a line: it must neither start a new line nor drive the
# terminal. Tabs stay.
_CONTROL: Final = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code != ord("\t")
} | {0x2028: "\\u2028", 0x2029: "\\u2029"}


class LineFormatter(logging.Formatter):
    """One record, one line; only a traceback of our own has more."""

    def __init__(self) -> None:
        super().__init__(LINE_FORMAT, TIME_FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = record.message.translate(_CONTROL)[:LINE_CHARS_MAX]
        return super().formatMessage(record)


class QueuedStream(logging.Handler):
    """Formats in the caller's thread, writes in its own. close() writes what is left."""

    def __init__(self, stream: TextIO, lines_max: int = LINES_MAX) -> None:
        super().__init__()
        self.setFormatter(LineFormatter())
        self.dropped = 0
        self._stream = stream
        self._lines: queue.Queue[str | threading.Event | None] = queue.Queue(lines_max)
        # A daemon: a stream that blocks for ever must not keep the process from ending.
        self._thread = threading.Thread(target=self._write_all, name="log-writer", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except (TypeError, ValueError):
            # Arguments that do not fit their message: a bug of ours, but no reason to stop.
            line = f"unprintable log record from {record.pathname}:{record.lineno}"
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def flush(self, timeout_s: float = FLUSH_S) -> None:
        """Wait until everything logged before is written, at most timeout_s."""
        written = threading.Event()
        # Full: the stream is stuck; waiting longer would make us part of the jam.
        with contextlib.suppress(queue.Full):
            self._lines.put(written, timeout=timeout_s)
            written.wait(timeout_s)

    def close(self) -> None:
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._lines.put(None, timeout=FLUSH_S)
            self._thread.join(FLUSH_S)
        super().close()

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            if isinstance(line, threading.Event):
                line.set()
                continue
            self._write(line)
            if self.dropped and self._lines.empty():
                dropped, self.dropped = self.dropped, 0
                self._write(self.format(_loss(dropped)))

    def _write(self, line: str) -> None:
        # A closed terminal or a full disk: the cluster goes on without its log.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(line + "\n")
            self._stream.flush()


def _loss(lines: int) -> logging.LogRecord:
    text = "%d log lines were dropped: nobody read them in time"
    return logging.LogRecord(__name__, logging.WARNING, __file__, 0, text, (lines,), None)


@contextlib.contextmanager
def logging_to(stream: TextIO | None = None, level: str = "info") -> Iterator[QueuedStream]:
    """Send all log lines of this process to stream (stderr) while inside."""
    handler = QueuedStream(stream if stream is not None else sys.stderr)
    root = logging.getLogger()
    earlier_level = root.level
    root.setLevel(level.upper())
    root.addHandler(handler)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    try:
        yield handler
    finally:
        root.removeHandler(handler)
        root.setLevel(earlier_level)
        handler.close()


def flush_logs() -> None:
    """Write out what was logged: before an end that runs no clean-up (os._exit)."""
    for handler in logging.getLogger().handlers:
        handler.flush()
