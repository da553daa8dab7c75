"""Wiring of a whole process: what is made, in which order it starts, in which order it stops."""

from zmqcluster.services.distribution import (
    DistributionServices,
    init_distribution_services,
    run,
    start_distribution_services,
    stop_distribution_services,
)

__all__ = [
    "DistributionServices",
    "init_distribution_services",
    "run",
    "start_distribution_services",
    "stop_distribution_services",
]
