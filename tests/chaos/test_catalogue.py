"""Every fault of the quick tier, injected for real; the others are for scripts/chaos.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.catalogue import Fault, Tier, load_all
from tests.chaos.rig import Rig
from tests.conftest import Tried

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]

QUICK = [one for one in load_all().values() if one.tier is Tier.QUICK]


@pytest.mark.parametrize("fault", QUICK, ids=lambda one: f"{one.number:03d}-{one.name}")
def test_promises_hold_under(fault: Fault, tmp_path: Path, tried: Tried) -> None:
    if fault.missing:
        pytest.skip(f"this machine cannot inject it: {fault.why_not}")
    with Rig(tmp_path) as rig:
        fault.inject(rig)
    tried({"real faults": 1})
