"""Real processes, killed on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Clusters with this config, closed at the end of the test; the master is not started."""
    clusters: list[Cluster] = []

    def make(**config: object) -> Cluster:
        folder = tmp_path / str(len(clusters))
        folder.mkdir()
        clusters.append(Cluster(folder, **config))
        return clusters[-1]

    yield make
    for cluster in clusters:
        cluster.close()
