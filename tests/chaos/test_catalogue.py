"""Every fault of the quick tier, injected for real; the others are for scripts/chaos.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import processes  # noqa: F401  # enters its faults
from tests.chaos.catalogue import CATALOGUE, Fault, Tier
from tests.chaos.rig import Rig

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]

QUICK = [one for one in CATALOGUE.values() if one.tier is Tier.QUICK]


@pytest.mark.parametrize("fault", QUICK, ids=lambda one: f"{one.number:03d}-{one.name}")
def test_promises_hold_under(fault: Fault, tmp_path: Path) -> None:
    if fault.missing:
        pytest.skip(f"this machine cannot inject it: {', '.join(fault.missing)} missing")
    with Rig(tmp_path) as rig:
        fault.inject(rig)
