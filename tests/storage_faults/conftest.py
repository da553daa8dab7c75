"""What the rigs came to is told at the end of the run, not only when a test fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest

from tests.conftest import Tried
from tests.storage_faults import images, sweep

Tell = Callable[[images.Totals | sweep.Totals], None]

_TOLD: Final = pytest.StashKey[list[str]]()


@pytest.fixture
def tell(request: pytest.FixtureRequest, tried: Tried) -> Tell:
    """Call it with totals."""
    told = request.config.stash.setdefault(_TOLD, [])

    def note(totals: images.Totals | sweep.Totals) -> None:
        told.append(str(totals))
        tried(totals.tried)

    return note


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    told: list[str] = config.stash.get(_TOLD, [])
    for line in sorted(told):
        terminalreporter.write_line(line)
