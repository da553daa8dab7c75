"""A documentation site, crawled by two workers while processes are killed: every page once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cluster import ROOT, Cluster, free_ports, wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

PAGES = 400
LINKS = 12


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """The URL of a folder of PAGES pages; each links to its next few and to two far ones."""
    folder = tmp_path / "site"
    folder.mkdir()
    for number in range(PAGES):
        near = [(number + step) % PAGES for step in range(1, LINKS)]
        far = [number * 7 % PAGES, number * 13 % PAGES]
        links = " ".join(f'<a href="p{other}.html">{other}</a>' for other in near + far)
        text = f"<title>Page {number}</title><p>{'word ' * 200}</p>{links}"
        (folder / f"p{number}.html").write_text(text)
    port = free_ports(1)
    command = [sys.executable, str(ROOT / "scripts" / "serve_folder.py"), str(folder)]
    with subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as server:
        assert server.stdout is not None
        server.stdout.readline()
        yield f"http://127.0.0.1:{port}/"
        server.terminate()


def test_every_page_once_though_a_worker_and_the_master_are_killed(
    make_cluster: Callable[..., Cluster], site: str
) -> None:
    cluster = make_cluster(egress_allow=["127.0.0.0/8"], concurrent_tasks=8)
    master = cluster.start_master()
    first = cluster.start_worker()
    cluster.start_worker()
    seed = {"url": f"{site}p0.html", "delay_s": 0, "concurrency": 0}

    cluster.submit("crawl", seed, unique_key=f"{site}p0.html", rate_key=site.rstrip("/"))
    wait_until(lambda: cluster.counts().get("completed", 0) > 20, "the crawl is under way")
    first.kill()
    wait_until(lambda: cluster.counts().get("completed", 0) > 60, "the crawl goes on")
    running = cluster.rows(
        "SELECT task_id, attempt FROM tasks WHERE state IN ('assigned', 'running') "
        "AND device_id IN (SELECT device_id FROM devices WHERE state = 'online')"
    )
    master.kill()
    cluster.start_master()
    cluster.start_worker()

    open_states = {"pending", "assigned", "running"}
    wait_until(lambda: not open_states & set(cluster.counts()), "the crawl ends", 60)
    assert cluster.counts() == {"completed": PAGES}
    urls = cluster.rows("SELECT count(DISTINCT unique_key) FROM tasks")
    assert urls == [(PAGES,)]
    completions = cluster.rows(
        "SELECT count(*), count(DISTINCT task_id) FROM task_assignments WHERE outcome = 'completed'"
    )
    assert completions == [(PAGES, PAGES)]
    assert running
    assert cluster.rows("SELECT count(*) FROM records") == [(PAGES,)]
