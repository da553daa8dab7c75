"""A failing example is made small before it is told, which takes longer than a test may."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiers import scaled

HERE = Path(__file__).parent
SHRINK_S = 300


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.timeout(scaled(SHRINK_S)))
