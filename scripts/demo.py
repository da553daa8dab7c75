"""`make demo`: a cluster and a small web site on this machine, one crawl, and what came of it."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
READY_S: Final = 30.0
STOP_S: Final = 20.0
CRAWL_S: Final = 90.0
PORTS_FROM, PORTS_TO = 18_000, 32_000


class Failed(Exception):
    """The demo cannot go on; the text says why."""


def main() -> int:
    folder = Path(tempfile.mkdtemp(prefix="zmqcluster-demo-"))
    try:
        code = run(folder)
    except Failed as failed:
        print(f"The demo failed: {failed}\nIts logs and data are in {folder}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        return 130
    return code


def run(folder: Path) -> int:
    """The whole demo, with everything it leaves behind below folder."""
    port = three_free_ports()
    with site(folder) as url, cluster(folder, port) as master:
        say(f"A web site of about 80 pages runs at {url}")
        say(f"A standalone cluster runs at http://localhost:{port} (log: {folder}/cluster.log)")
        # The delay is there to see something: without it all is over in half a second.
        words = ("crawl", url, "--scope", "host", "--delay", "0.03")
        code = command(folder, port, *words, timeout_s=CRAWL_S)
        command(folder, port, "distribute", "status")
        stop(master, "the cluster")
    say(f"\nEverything is stopped. The data stays in {folder}/data; to look at it again:")
    say(f"  .venv/bin/python main.py distribute standalone --data-dir {folder}/data")
    say(f"To be rid of it: rm -r {folder}")
    return code


# --- the parts -----------------------------------------------------------------------------------


@contextlib.contextmanager
def site(folder: Path) -> Iterator[str]:
    """The demo site; its URL."""
    with started(folder / "site.log", "scripts/demo_site.py", "--port", "0") as process:
        line = wait_for_line(process, folder / "site.log", "http://")
        yield "http://" + line.partition("http://")[2].strip()
        stop(process, "the site")


@contextlib.contextmanager
def cluster(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A standalone cluster, ready for work."""
    words = ["main.py", "distribute", "standalone", "--master-port", str(port)]
    words += ["--data-dir", str(folder / "data"), "--egress-allow", "127.0.0.0/8"]
    log = folder / "cluster.log"
    with started(log, *words) as process:
        deadline = time.monotonic() + READY_S
        while not is_ready(port):
            if process.poll() is not None:
                raise Failed(f"the cluster ended at once:\n{tail(log)}")
            if time.monotonic() > deadline:
                raise Failed(f"the cluster was not ready within {READY_S:.0f} s:\n{tail(log)}")
            time.sleep(0.05)
        yield process


def command(folder: Path, port: int, *words: str, timeout_s: float = 30.0) -> int:
    """Run a command of ours on this terminal; its exit code."""
    words = (*words, "--master-port", str(port), "--data-dir", str(folder / "data"))
    say("\n$ python main.py " + " ".join(words) + "\n")
    try:
        return subprocess.run(
            [sys.executable, "main.py", *words],
            cwd=ROOT,
            env=environment(),
            timeout=timeout_s,
            check=False,
        ).returncode
    except subprocess.TimeoutExpired:
        raise Failed(f"{words[0]} took longer than {timeout_s:.0f} s") from None


# --- processes -----------------------------------------------------------------------------------


@contextlib.contextmanager
def started(log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process with its output in a file; killed in the end if it still runs."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Ctrl-C is for this script: it stops the others in order.
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def stop(process: subprocess.Popen[bytes], name: str) -> None:
    """Ask it to end, and insist that it does so in good order."""
    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        raise Failed(f"{name} did not stop within {STOP_S:.0f} s") from None
    if code != 0:
        raise Failed(f"{name} stopped with exit code {code}")


def wait_for_line(process: subprocess.Popen[bytes], log: Path, needle: str) -> str:
    """The first line of its output that holds needle."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        for line in log.read_text(errors="replace").splitlines(keepends=True):
            if needle in line and line.endswith("\n"):
                return line
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise Failed(f"{log.stem} did not start:\n{tail(log)}")


def is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def three_free_ports() -> int:
    """The first of three neighbouring ports that nobody listens on."""
    for port in range(PORTS_FROM + os.getpid() % 5000, PORTS_TO, 3):
        with contextlib.ExitStack() as stack:
            try:
                for number in (port, port + 1, port + 2):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", number))
            except OSError:
                continue
        return port
    raise Failed("no three free ports in a row")


def environment() -> dict[str, str]:
    """This process's, without a user's own cluster in it."""
    return {name: text for name, text in os.environ.items() if not name.startswith("ZMQCLUSTER_")}


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
