"""A cable to a network namespace of its own: lossy, slow, cut in either direction, for real."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Final, Self

_NUMBERS: Final = itertools.count()


class Cable:
    """A veth pair; one end is in this namespace (`near`), one in a new one (`far`).

    What is started with `prefix` lives at the far end and sees nothing but the cable.
    """

    def __init__(self) -> None:
        number = next(_NUMBERS)
        mark = os.getpid() % 65_536
        self.name = f"zc{mark:04x}n{number}"
        self._net = f"10.{200 + number % 50}.{mark % 256}"
        self._ends = (f"zc{mark:04x}a{number}", f"zc{mark:04x}b{number}")
        self.near, self.far = f"{self._net}.1", f"{self._net}.2"
        self.prefix = ("nsenter", f"--net=/run/netns/{self.name}", "--")
        try:
            self._lay()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The pair goes with the namespace, unless a process still holds it."""
        for words in (("ip", "link", "del", self._ends[0]), ("ip", "netns", "del", self.name)):
            with contextlib.suppress(subprocess.CalledProcessError):
                _run(*words)

    def lose(self, hook: str, which: str = "") -> None:
        """Silently lose packets at the far end. hook: `input` (what comes) or `output` (what
        leaves). which: all that nft matches with this; all there are unless told."""
        self._nft(f"add rule inet chaos {hook} {which} counter drop")

    def cut(self, *hooks: str) -> None:
        """Silently lose what comes in (`input`) or leaves (`output`); both unless told."""
        for hook in hooks or ("input", "output"):
            self.lose(hook)

    def mend(self) -> int:
        """Lose nothing any more; how many packets were lost since it was last mended."""
        counted = self._nft("list table inet chaos")
        self._nft("flush table inet chaos")
        return sum(map(int, re.findall(r"counter packets (\d+)", counted)))

    def narrow(self, rate: str) -> None:
        """Both ends send no faster, such as 64kbit."""
        shape = ("root", "tbf", "rate", rate, "burst", "3kb", "latency", "2s")
        _run("tc", "qdisc", "add", "dev", self._ends[0], *shape)
        self.inside("tc", "qdisc", "add", "dev", self._ends[1], *shape)

    def move(self) -> str:
        """Give the far end another address; the new one."""
        old, self.far = self.far, f"{self._net}.{int(self.far.rpartition('.')[2]) + 1}"
        # In this order: with the first address of a network go all others of it.
        self.inside("ip", "addr", "del", f"{old}/24", "dev", self._ends[1])
        self.inside("ip", "addr", "add", f"{self.far}/24", "dev", self._ends[1])
        return self.far

    def second_near(self) -> str:
        """One more address of the near end."""
        address = f"{self._net}.101"
        _run("ip", "addr", "add", f"{address}/24", "dev", self._ends[0])
        return address

    def names(self) -> Names:
        """Names that only those see who are started with its prefix."""
        return Names(self)

    def refused(self) -> int:
        """Connections the far end's kernel turned away because a listener's queue was full."""
        names, figures = (
            line.split()
            for line in self.inside("cat", "/proc/self/net/netstat").splitlines()
            if line.startswith("TcpExt:")
        )
        return int(dict(zip(names, figures, strict=True))["ListenOverflows"])

    def inside(self, *words: str) -> str:
        """Run a command at the far end; what it printed."""
        return _run(*self.prefix, *words)

    def _lay(self) -> None:
        near, far = self._ends
        _run("ip", "netns", "add", self.name)
        _run("ip", "link", "add", near, "type", "veth", "peer", "name", far)
        _run("ip", "link", "set", far, "netns", self.name)
        _run("ip", "addr", "add", f"{self.near}/24", "dev", near)
        _run("ip", "link", "set", near, "up")
        self.inside("ip", "addr", "add", f"{self.far}/24", "dev", far)
        self.inside("ip", "link", "set", far, "up")
        self.inside("ip", "link", "set", "lo", "up")
        self._nft("add table inet chaos")
        for hook in ("input", "output"):
            chain = f"{{ type filter hook {hook} priority 0; }}"
            self._nft(f"add chain inet chaos {hook} {chain}")

    def _nft(self, words: str) -> str:
        return self.inside("nft", words)


class Names:
    """The far end's own /etc/hosts."""

    def __init__(self, cable: Cable) -> None:
        self._folder = Path("/etc/netns") / cable.name
        self._folder.mkdir(parents=True)
        self.prefix = ("ip", "netns", "exec", cable.name)
        self.say("", "")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder)

    def say(self, name: str, address: str) -> None:
        """The only name beside localhost; in place, since the file is mounted."""
        lines = ["127.0.0.1 localhost", f"{address} {name}" if name else ""]
        (self._folder / "hosts").write_text("\n".join(lines) + "\n")
        # Nobody else is asked.
        (self._folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")


def _run(*words: str) -> str:
    return subprocess.run(
        words, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, text=True
    ).stdout


@cache
def can_lay_cables() -> bool:
    """Tried, with a rule and a queue: a kernel may lack either, and a container the right."""
    if not all(map(shutil.which, ("ip", "nft", "tc", "nsenter"))):
        return False
    try:
        with Cable() as cable:
            cable.lose("input", "numgen random mod 100 < 30")
            cable.narrow("64kbit")
            Path(f"/run/netns/{cable.name}").stat()
    except (subprocess.SubprocessError, OSError):
        return False
    return True
