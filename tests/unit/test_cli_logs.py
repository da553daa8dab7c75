"""Log lines look as documented, cannot be forged, and never block who logs."""

from __future__ import annotations

import io
import logging
import re
import threading

from zmqcluster.runtime.logs import QueuedStream, flush_logs, logging_to


class StuckStream(io.StringIO):
    """A terminal somebody stopped: the first write waits until told."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.go_on = threading.Event()

    def write(self, text: str) -> int:
        self.entered.set()
        assert self.go_on.wait(10)
        return super().write(text)


def record(text: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord("x", logging.INFO, "file.py", 1, text, args, None)


def test_line_has_the_documented_shape() -> None:
    stream = io.StringIO()

    with logging_to(stream, "info"):
        logging.getLogger("zmqcluster").info("Starting %s node...", "master")
        logging.getLogger("zmqcluster").debug("not shown")
        flush_logs()
        at_once = stream.getvalue()

    pattern = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d - INFO - Starting master node\.\.\.\n"
    assert re.fullmatch(pattern, at_once)
    assert stream.getvalue() == at_once


def test_text_from_outside_can_neither_forge_a_line_nor_drive_the_terminal() -> None:
    stream = io.StringIO()

    with logging_to(stream):
        logging.warning("title: %s", "a\n2024-01-01 10:00:00 - INFO - all well\x1b[2J\x9b1m\u2028b")

    assert stream.getvalue().count("\n") == 1
    assert "\\x0a2024" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
    assert "\x9b" not in stream.getvalue()


def test_a_stuck_terminal_blocks_nobody_and_the_loss_is_told() -> None:
    stream = StuckStream()
    handler = QueuedStream(stream, lines_max=3)
    handler.emit(record("first"))
    assert stream.entered.wait(10)

    for number in range(5):
        handler.emit(record("line %d", number))
    dropped = handler.dropped
    stream.go_on.set()
    handler.flush()
    handler.close()

    assert dropped == 2
    assert "line 2" in stream.getvalue()
    assert "line 3" not in stream.getvalue()
    assert " - WARNING - 2 log lines were dropped" in stream.getvalue()


def test_a_closed_stream_and_a_bad_record_stop_nothing() -> None:
    stream = io.StringIO()

    with logging_to(stream) as handler:
        handler.emit(record("%d", "no number"))
        flush_logs()
        shown = stream.getvalue()
        stream.close()
        logging.info("into the void")

    assert "unprintable log record" in shown


def test_logging_ends_where_its_block_ends() -> None:
    before = list(logging.getLogger().handlers)

    with logging_to(io.StringIO()):
        inside = list(logging.getLogger().handlers)

    assert len(inside) == len(before) + 1
    assert logging.getLogger().handlers == before
