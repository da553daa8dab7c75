"""The library: submit, wait and ask from an asyncio program, or be a device of the cluster."""

from zmqcluster.client.distribution import DistributionClient, get_async_distribution_client
from zmqcluster.client.packing import task, unpack

__all__ = ["DistributionClient", "get_async_distribution_client", "task", "unpack"]
