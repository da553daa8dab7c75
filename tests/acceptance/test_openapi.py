"""The description of the API is kept by a running master, rightly and wrongly called."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import ROOT, Cluster
from tests.support.tiers import IS_USUAL, scaled
from zmqcluster.client import task

CONFIG = ROOT / "tests" / "support" / "schemathesis.toml"
SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
# A fixed seed where the build depends on it; a fresh one, which is printed, by night.
SEED = ("--seed", "7") if IS_USUAL else ()

TASKS = [task(name) for name in ("fail", "vanish", "noop")]

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("openapi"))
    try:
        cluster.start_master()
        for _ in range(2):
            cluster.ask(lambda client: client.submit_many(TASKS, job_name="a job"))
        cluster.start_worker()
        yield cluster
    finally:
        cluster.close()


def called(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    """All operations by their description; a run fails when an answer does not keep it."""
    url = f"http://localhost:{cluster.port}/openapi.json"
    command = [str(SCHEMATHESIS), "--config-file", str(CONFIG), "run", url, *SEED, *arguments]
    return subprocess.run(
        [*command, "--continue-on-failure", "--no-color"],
        cwd=cluster.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=scaled(60),
        check=False,
    )


def test_every_answer_is_as_described(cluster: Cluster) -> None:
    token = (cluster.data_dir / "api-token").read_text().strip()

    done = called(
        cluster, "-H", f"Authorization: Bearer {token}", "--max-examples", str(scaled(15))
    )

    assert done.returncode == 0, done.stdout


def test_without_the_token_every_answer_is_as_described(cluster: Cluster) -> None:
    done = called(cluster, "--phases", "coverage,fuzzing", "--max-examples", str(scaled(5)))

    assert done.returncode == 0, done.stdout
