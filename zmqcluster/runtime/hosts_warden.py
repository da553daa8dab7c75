"""The agent's end of the warden: see executors/warden.py."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from typing import Any, Final

from executors.hostwire import (
    FROM_WARDEN,
    READ_BYTES,
    Framer,
    Kill,
    Load,
    Ping,
    ShowStack,
    Spawn,
    frame,
)
from zmqcluster.errors import RemoteProtocolError, StartError
from zmqcluster.runtime.hosts_output import OutputTail
from zmqcluster.runtime.hosts_settings import HostSettings

# How long the executor modules may take to import.
LOAD_S: Final = 60.0
# The warden itself gives up on unkillable processes after 5 s.
GONE_S: Final = 6.0


class WardenLost(Exception):
    """The warden is gone, and with it every host."""


class WardenLink:
    """One warden process, from birth to burial."""

    def __init__(self, settings: HostSettings) -> None:
        """Starts the process and tells it what to load; the answer comes through receive()."""
        self.output = OutputTail("warden")
        # Pings since it said anything; its first word is that the modules are in.
        self.unanswered = 0
        self.has_spoken = False
        self.sock, theirs = socket.socketpair()
        try:
            self._process = _launch(theirs, self.output.child_fd)
        except OSError as error:
            self.sock.close()
            self.output.close()
            raise StartError(f"cannot start the executor hosts: {error.strerror}") from None
        finally:
            theirs.close()
            os.close(self.output.child_fd)
        self._framer = Framer(FROM_WARDEN)
        self._send(frame(Load(settings.modules, settings.built_in, settings.start_method)))
        self.sock.setblocking(False)

    def spawn(self, host_id: int, descriptors: tuple[int, int]) -> None:
        """Start a host with this channel and this output; both may be closed here afterwards."""
        data = frame(Spawn(host_id))
        try:
            sent = socket.send_fds(self.sock, [data], descriptors)
        except OSError as error:
            raise WardenLost(str(error)) from None
        if sent != len(data):
            raise WardenLost("it does not read")

    def kill(self, host_id: int) -> None:
        """Kill this host and everything below it; Exited follows when nothing is left."""
        self._send(frame(Kill(host_id)))

    def show_stack(self, host_id: int) -> None:
        """Have this host print where it is."""
        self._send(frame(ShowStack(host_id)))

    def ping(self) -> None:
        """Ask for a sign of life."""
        self.unanswered += 1
        self._send(frame(Ping(self.unanswered)))

    def receive(self) -> list[Any]:
        """What it said. Raises WardenLost when it is gone."""
        try:
            data = self.sock.recv(READ_BYTES)
            if not data:
                raise WardenLost("its socket is closed")
            self.unanswered = 0
            self.has_spoken = True
            return self._framer.feed(data)
        except BlockingIOError:
            return []
        except (OSError, RemoteProtocolError) as error:
            raise WardenLost(str(error)) from None

    def wait(self, timeout_s: float) -> list[Any]:
        """Like receive, but waits for something to come; nothing after timeout_s."""
        readable, _, _ = select.select([self.sock], [], [], timeout_s)
        return self.receive() if readable else []

    def close(self, is_lost: bool = False) -> None:
        """End it: it kills all hosts with all processes below them, then itself.

        is_lost: it is dead or stuck, so do not wait for it; its hosts die with it.
        """
        self.sock.close()
        if is_lost:
            self._process.kill()
        try:
            self._process.wait(GONE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.output.close()

    def _send(self, data: bytes) -> None:
        try:
            sent = self.sock.send(data)
        except OSError as error:
            raise WardenLost(str(error)) from None
        if sent != len(data):
            raise WardenLost("it does not read")


def _launch(theirs: socket.socket, output_fd: int) -> subprocess.Popen[bytes]:
    # No settings of the cluster, least of all its tokens, for code that tasks bring along.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("ZMQCLUSTER_")
    }
    own_path = environment.get("PYTHONPATH", "")
    # It finds the modules this process would find; -P, as "here" may be another place for it.
    environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    arguments = [sys.executable, "-P", "-m", "executors.warden", str(theirs.fileno()), own_path]
    return subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=output_fd,
        stderr=output_fd,
        env=environment,
        pass_fds=(theirs.fileno(),),
        start_new_session=True,
    )
