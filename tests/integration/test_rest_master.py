"""The REST API of a real master: its loop, its database, its sockets."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import free_ports
from zmqcluster.config import ClusterConfig
from zmqcluster.model import SchedulerMode
from zmqcluster.services import DistributionServices

PREFIX = "/api/distribution"
DEADLINE_S = 10.0


class Client:
    """One connection to a master on this machine."""

    def __init__(self, port: int, token: str) -> None:
        self._http = http.client.HTTPConnection("localhost", port, timeout=DEADLINE_S)
        self._token = token

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        headers |= {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        payload = None if body is None else json.dumps(body)
        self._http.request(method, PREFIX + path, payload, headers)
        answer = self._http.getresponse()
        return answer.status, json.loads(answer.read())

    def close(self) -> None:
        self._http.close()


@pytest.fixture
def config(tmp_path: Path) -> ClusterConfig:
    rest = free_ports(3)
    dispatch, control = rest + 1, rest + 2
    return ClusterConfig(
        mode=SchedulerMode.MASTER,
        master_port=rest,
        dispatch_port=dispatch,
        control_port=control,
        data_dir=str(tmp_path / "data"),
    )


def started(config: ClusterConfig) -> DistributionServices:
    services = DistributionServices(config)
    services.start()
    return services


@pytest.fixture
def master(config: ClusterConfig) -> Iterator[DistributionServices]:
    services = started(config)
    yield services
    services.stop()


@pytest.fixture
def client(master: DistributionServices, config: ClusterConfig) -> Iterator[Client]:
    with closing(client_of(config)) as client:
        yield client


def client_of(config: ClusterConfig) -> Client:
    token = (Path(config.data_dir) / "api-token").read_text().strip()
    return Client(config.master_port, token)


def test_nothing_is_acknowledged_into_a_deleted_database(
    client: Client, config: ClusterConfig
) -> None:
    (Path(config.data_dir) / "cluster.db").unlink()

    status, _ = client.ask("POST", "/tasks", {"task_type": "noop", "task_data": {}})

    assert status == 503


def test_a_submission_is_answered_once_it_can_be_read_back(client: Client) -> None:
    task = {"task_type": "echo", "task_data": {"value": {"a": [1, "é"]}}, "unique_key": "k"}

    status, answer = client.ask("POST", "/tasks", {"tasks": [task] * 2, "job_name": "j"})

    assert (status, answer["existing"]) == (201, [1])
    task_id = answer["task_ids"][0]
    status, shown = client.ask("GET", f"/tasks/{task_id}")
    assert (status, shown["task_data"]) == (200, task["task_data"])
    assert client.ask("GET", "/tasks/stats")[1]["pending"] == 1
    assert client.ask("GET", f"/jobs/{answer['job_id']}")[1]["name"] == "j"
    assert client.ask("POST", f"/tasks/{task_id}/cancel")[0] == 200
    assert client.ask("GET", f"/tasks/{task_id}")[1]["state"] == "cancelled"


def test_parameters_no_executor_takes_are_refused_with_the_position(client: Client) -> None:
    status, problem = client.ask(
        "POST", "/tasks", [{"task_type": "noop"}, {"task_type": "crawl", "task_data": {"url": 7}}]
    )

    assert status == 422
    assert problem["detail"].startswith("tasks[1]: crawl: url: ")
    assert client.ask("GET", "/tasks")[1]["tasks"] == []


def test_an_idempotency_key_holds_across_a_restart_of_the_master(config: ClusterConfig) -> None:
    answers = []
    for _ in range(2):
        services = started(config)
        key = {"Idempotency-Key": "only once"}
        with closing(client_of(config)) as client:
            answers.append(client.ask("POST", "/tasks", {"task_type": "noop"}, **key))
            counts = client.ask("GET", "/system/overview")[1]["tasks"]
        services.stop()

    assert answers[0] == answers[1]
    assert counts["pending"] == 1


def test_a_token_is_made_shown_once_and_revoked(client: Client) -> None:
    status, made = client.ask("POST", "/tokens", {"uses": 2})
    assert (status, made["token"][:4]) == (201, "ck1.")
    listed = client.ask("GET", "/tokens")[1]["tokens"]
    assert made["token_id"] in {each["token_id"] for each in listed}
    assert client.ask("DELETE", f"/tokens/{made['token_id']}") == (200, {"done": True})
