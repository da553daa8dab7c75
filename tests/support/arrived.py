"""When a request reached this machine, however late the test that serves it gets to see it."""

from __future__ import annotations

import socket
import struct
import sys
import time
from typing import Final

# struct tcp_info of Linux: eight single bytes, then numbers of 32 bits.
_INFO_BYTES: Final = 104
_LAST_DATA_AT: Final = 8 + 4 * 11


def arrived_s(line: socket.socket) -> float:
    """time.monotonic() of the moment in which the last data of this connection came in.

    By the kernel, to a few ms, where it can tell; else now. A machine that is busy lets a server
    wait for its turn by tens of ms, and two requests then seem closer than they were.
    """
    now_s = time.monotonic()
    if sys.platform != "linux":
        return now_s
    info = line.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    (ago_ms,) = struct.unpack_from("=I", info, _LAST_DATA_AT)
    return now_s - int(ago_ms) / 1000
