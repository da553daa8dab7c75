"""The clock by which requests at an origin are judged: the kernel's, not that of who reads them."""

from __future__ import annotations

import socket
import sys
import time

import pytest

from tests.support.arrived import arrived_s
from tests.support.cluster import wait_until

LATE_S = 0.2
# The kernel counts in ticks of up to 10 ms.
TICK_S = 0.02


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells when data came in")
def test_what_is_read_late_came_when_it_was_sent() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
        server.accept()[0] as line,
    ):
        wait_until(lambda: time.monotonic() > arrived_s(line) + LATE_S, "it says nothing yet")
        before_s = time.monotonic()
        client.sendall(b"GET / HTTP/1.1\r\n\r\n")
        after_s = time.monotonic()
        wait_until(lambda: time.monotonic() > after_s + LATE_S, "nobody reads it yet")

        came_s = arrived_s(line)

        assert before_s - TICK_S <= came_s <= after_s + TICK_S
        assert line.recv(100) == b"GET / HTTP/1.1\r\n\r\n"
