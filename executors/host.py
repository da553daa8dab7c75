"""An executor host: the child process in which task code runs.

It has one stream socket to the agent and nothing else of ours: no keys, no database, no network of
the cluster. It comes to life forked from the warden with all modules loaded, or as
`python -m executors.host FD`, and ends when told to, when the socket closes, or by SIGKILL.
"""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import resource
import signal
import socket
import sys
from contextlib import suppress

from executors.channel import Channel
from executors.host_async import AsyncHost
from executors.host_sync import SyncHost
from executors.hostwire import SETTINGS, STACK_SIGNAL, Begin
from executors.proctree import name_process
from executors.registry import Registry
from zmqcluster.errors import ClusterError
from zmqcluster.model import Pool


def main(argv: list[str]) -> int:
    """Entry of a host that was not forked: argv[1] is the number of its socket."""
    return serve(socket.socket(fileno=int(argv[1])), None)


def serve(sock: socket.socket, registry: Registry | None) -> int:
    """Be a host until the end; the exit code.

    registry: what the warden loaded; None: load it here, from the modules that Begin names.
    """
    prepare_process()
    keep_to_ourselves(sock)
    channel = Channel(sock)
    begin = channel.receive()
    if not isinstance(begin, Begin):
        return 0 if begin is None else 2
    try:
        known = registry if registry is not None else Registry.load(begin.modules, built_in=())
    except ClusterError as error:
        sys.stderr.write(f"{error}\n")
        return 3
    settings = SETTINGS.decode(begin.settings)
    name_process(f"zmqc-host-{begin.pool}")
    host = AsyncHost if begin.pool is Pool.ASYNC else SyncHost
    return host(channel, known, settings).serve()


def prepare_process() -> None:
    """Signals, output and crash reports of this process."""
    # Handlers that do nothing, not SIG_IGN: a program started by a task must not inherit deafness.
    # Ctrl-C and a service manager's SIGTERM are the agent's business; it drains us.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _ignore)
    sys.stdin = open(os.devnull)  # noqa: SIM115  # stays for the life of the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What a crash leaves in a buffer is what one would like to read.
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    faulthandler.enable()
    # For ShowStack; done in C, so it works while nothing of Python does.
    faulthandler.register(STACK_SIGNAL, all_threads=False)
    spare_the_machine()
    logging.basicConfig(
        level=logging.INFO,
        format="%(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
        force=True,
    )


def keep_to_ourselves(sock: socket.socket) -> None:
    """A copy of this process that a task makes with os.fork() loses the channel.

    It would go on as a second host on the same socket, take orders out of it that nobody answers,
    and answer others twice. Reading nothing but the end, it exits.
    """
    channel, nothing = sock.fileno(), os.open(os.devnull, os.O_RDWR)
    os.register_at_fork(after_in_child=lambda: os.dup2(nothing, channel, inheritable=False))


def spare_the_machine() -> None:
    """When memory runs out a host goes first, not the agent; and a crash writes no core file."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("500")
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _ignore(number: int, frame: object) -> None:
    """SIGTERM and the like do not end a host; SIGKILL and Close do."""


if __name__ == "__main__":
    sys.exit(main(sys.argv))
