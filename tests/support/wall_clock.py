"""A wall clock of its own for a process and its children; time that only passes stays true."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Final

SOURCE: Final = Path(__file__).with_suffix(".c")


class WallClock:
    """Lives in the folder; the processes see a step at once.

    offset_s: whole seconds ahead of the true time.
    """

    def __init__(self, folder: Path, offset_s: int = 0) -> None:
        self._file = folder / "wall_clock"
        self._library = folder / "wall_clock.so"
        folder.mkdir(exist_ok=True)
        self.step(offset_s)
        compiler = ("gcc", "-O1", "-shared", "-fPIC", "-o")
        subprocess.run([*compiler, str(self._library), str(SOURCE), "-ldl"], check=True)

    @property
    def prefix(self) -> tuple[str, ...]:
        """Before a command: it runs by this clock, and so do its children."""
        return ("env", f"LD_PRELOAD={self._library}", f"WALL_CLOCK={self._file}")

    def step(self, offset_s: int) -> None:
        # In place, for those that have it mapped.
        with self._file.open("r+b" if self._file.exists() else "wb") as stream:
            stream.write(offset_s.to_bytes(8, sys.byteorder, signed=True))


@cache
def can_fake_time() -> bool:
    """Tried: wall time is a day off, monotonic time is not."""
    if not shutil.which("gcc"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        try:
            plain = _clocks()
            faked = _clocks(*WallClock(Path(folder), 86_400).prefix)
        except (subprocess.SubprocessError, OSError, ValueError):
            return False
    return faked[0] - plain[0] > 86_000 and abs(faked[1] - plain[1]) < 60


def _clocks(*prefix: str) -> tuple[float, float]:
    code = "import time; print(time.time(), time.monotonic())"
    wall, monotonic = subprocess.check_output([*prefix, sys.executable, "-c", code]).split()
    return float(wall), float(monotonic)
