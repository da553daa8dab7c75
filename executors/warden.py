"""The warden: a small process that starts executor hosts and sees to it that none outlives its use.

It loads all executor modules once and forks a host from there in a few ms. It lives as long as
the agent's end of its socket is open: when the agent is killed, however hard, the socket closes,
and the warden kills every host with all processes below it, then goes itself. No task code runs in
it beyond the import of the modules.
"""

from __future__ import annotations

import array
import gc
import os
import selectors
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any, Final, NoReturn

from executors.host import serve
from executors.hostwire import (
    READ_BYTES,
    STACK_SIGNAL,
    TO_WARDEN,
    Exited,
    Framer,
    FromWarden,
    Kill,
    Load,
    Loaded,
    LoadFailed,
    Ping,
    Pong,
    ShowStack,
    Spawn,
    Spawned,
    frame,
)
from executors.proctree import (
    become_subreaper,
    child_pids,
    die_with_parent,
    kill_children_but,
    kill_tree,
    name_process,
)
from executors.registry import Registry
from zmqcluster.errors import ConfigError

DESCRIPTORS_MAX: Final = 64
SWEEP_S: Final = 0.02
# How long to insist at the end; only a process in uninterruptible sleep needs longer.
LAST_SWEEP_S: Final = 5.0


class Warden:
    """Starts, kills and buries hosts; its owner is at the other end of sock."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._framer = Framer(TO_WARDEN)
        self._descriptors: list[int] = []
        self._registry: Registry | None = None
        self._load = Load((), (), "fork")
        self._hosts: dict[int, int] = {}  # pid: host id
        # Dead hosts that still have something living below them: host id -> (status, orphans).
        self._dying: dict[int, tuple[int, int]] = {}

    def run(self) -> None:
        """Serve until the agent is gone, then leave nothing behind."""
        become_subreaper()
        self._wake_r, self._wake_w = os.pipe()
        for descriptor in (self._wake_r, self._wake_w):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _noted)
        with selectors.DefaultSelector() as selector:
            self._selector = selector
            selector.register(self._sock, selectors.EVENT_READ)
            selector.register(self._wake_r, selectors.EVENT_READ)
            while self._turn():
                pass
        self._end()

    def _turn(self) -> bool:
        """Wait for something and handle it; False when the agent is gone."""
        timeout = SWEEP_S if self._dying else None
        alive = True
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self._sock:
                alive = self._receive()
            else:
                with suppress(BlockingIOError):
                    os.read(self._wake_r, 4096)
        if alive:
            self._reap()
        return alive

    def _receive(self) -> bool:
        room = socket.CMSG_SPACE(DESCRIPTORS_MAX * array.array("i").itemsize)
        try:
            data, ancillary, _, _ = self._sock.recvmsg(READ_BYTES, room)
        except ConnectionError:
            return False
        for level, kind, raw in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                got = array.array("i")
                got.frombytes(raw[: len(raw) - len(raw) % got.itemsize])
                self._descriptors.extend(got)
        for message in self._framer.feed(data):
            self._on_message(message)
        return bool(data)

    def _on_message(self, message: Any) -> None:
        match message:
            case Load():
                self._load_modules(message)
            case Spawn(host_id=host_id):
                self._spawn(host_id)
            case Kill(host_id=host_id):
                for pid in self._pids_of(host_id):
                    kill_tree(pid)
            case ShowStack(host_id=host_id):
                for pid in self._pids_of(host_id):
                    os.kill(pid, STACK_SIGNAL)  # a child not yet reaped, so nobody else's number
            case Ping(seq=seq):
                self._send(Pong(seq))
            case _:
                pass

    def _pids_of(self, host_id: int) -> list[int]:
        return [pid for pid, known in self._hosts.items() if known == host_id]

    def _load_modules(self, load: Load) -> None:
        self._load = load
        try:
            self._registry = Registry.load(load.modules, load.built_in)
        except ConfigError as error:
            self._send(LoadFailed(error.key, error.problem))
            return
        if _thread_count() > 1:
            # A fork of a process with threads may deadlock; start hosts from scratch instead.
            self._load = Load(load.modules, load.built_in, "spawn")
        gc.collect()
        gc.freeze()  # so that hosts share these pages until they write to them
        self._send(Loaded(self._registry.offers(), os.getpid()))

    # --- birth ----------------------------------------------------------------------------------

    def _spawn(self, host_id: int) -> None:
        channel, output = self._descriptors[:2]
        del self._descriptors[:2]
        try:
            sys.stdout.flush()
            sys.stderr.flush()
            warden_pid = os.getpid()
            pid = os.fork()
            if pid == 0:
                self._be_host(warden_pid, channel, output)
        except OSError as error:
            self._send(Exited(host_id, 1, 0, f"cannot start a process: {error.strerror}"))
        else:
            self._hosts[pid] = host_id
            self._send(Spawned(host_id, pid))
        finally:
            os.close(channel)
            os.close(output)

    def _be_host(self, warden_pid: int, channel: int, output: int) -> NoReturn:
        """In the child: shed what is the warden's, then be a host and exit."""
        code = 70
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            die_with_parent(warden_pid)
            become_subreaper()
            with open(os.devnull, "rb") as nothing:
                os.dup2(nothing.fileno(), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.close(output)
            self._selector.close()
            self._sock.close()
            os.close(self._wake_r)
            os.close(self._wake_w)
            if self._load.start_method == "spawn":
                _exec_host(channel)
            code = serve(socket.socket(fileno=channel), self._registry)
            sys.stdout.flush()
            sys.stderr.flush()
        # The top of a process: said once, where the agent keeps it, and nothing of the warden runs.
        except BaseException:  # noqa: BLE001
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)

    # --- death ----------------------------------------------------------------------------------

    def _reap(self) -> None:
        """Bury dead hosts; report each once nothing of it is left."""
        for pid, status in _dead_children():
            host_id = self._hosts.pop(pid, 0)
            if host_id:
                self._dying[host_id] = (status, 0)
        if not self._dying:
            return
        left = kill_children_but(set(self._hosts))
        for host_id, (status, orphans) in list(self._dying.items()):
            if left:
                self._dying[host_id] = (status, orphans + left)
            else:
                del self._dying[host_id]
                self._send(Exited(host_id, status, orphans))

    def _end(self) -> None:
        """Kill everything below, again and again, as the dead leave their children to us."""
        deadline = time.monotonic() + LAST_SWEEP_S
        while time.monotonic() < deadline:
            for pid in self._hosts:
                kill_tree(pid)
            self._hosts.clear()
            if not kill_children_but(set()):
                return
            for _ in _dead_children():
                pass
            if child_pids():
                time.sleep(SWEEP_S / 4)

    def _send(self, message: FromWarden) -> None:
        # Few and small: the agent not reading them is the agent being gone.
        with suppress(OSError):
            self._sock.sendall(frame(message))


def main(argv: list[str]) -> int:
    """argv[1]: the number of the socket to the agent. argv[2]: the operator's own PYTHONPATH."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _noted)
    name_process("zmqc-warden")
    # What let this process find its modules is not for programs that tasks start.
    os.environ.pop("PYTHONPATH", None)
    if argv[2]:
        os.environ["PYTHONPATH"] = argv[2]
    Warden(socket.socket(fileno=int(argv[1]))).run()
    return 0


def _exec_host(channel: int) -> NoReturn:
    os.set_inheritable(channel, True)
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    os.execv(sys.executable, [sys.executable, "-P", "-m", "executors.host", str(channel)])


def _dead_children() -> list[tuple[int, int]]:
    """(pid, status) of children that ended; status: exit code, or the negative signal."""
    dead = []
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            dead.append((pid, os.waitstatus_to_exitcode(status)))
    return dead


def _thread_count() -> int:
    """Of this process, threads of libraries too where the system tells."""
    with suppress(OSError):
        return len(os.listdir("/proc/self/task"))
    return threading.active_count()


def _noted(number: int, frame: object) -> None:
    """Signals only wake the loop; the closed socket is what ends the warden."""


if __name__ == "__main__":
    sys.exit(main(sys.argv))
