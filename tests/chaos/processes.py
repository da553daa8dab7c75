"""Processes that die, stop and come back."""

from __future__ import annotations

from tests.chaos.catalogue import Tier, fault
from tests.chaos.rig import Rig


@fault(1, "master killed under submissions, five times", tier=Tier.QUICK)
def master_killed(rig: Rig) -> None:
    cluster = rig.cluster
    master = cluster.start_master()
    cluster.start_worker()
    cluster.start_worker()
    with rig.load() as load:
        for _ in range(5):
            rig.flows(load, 40)
            master.kill()
            master = cluster.start_master()
        rig.flows(load, 40)
    rig.judge()
