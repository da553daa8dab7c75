"""A folder for files whose real syncs are nobody's subject: waiting for a disk is slow."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_MEMORY: Final = Path("/dev/shm")


@contextmanager
def memory_folder() -> Iterator[Path]:
    """In memory where there is such a place, else among the temporary files; gone afterwards."""
    with tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        yield Path(folder)
