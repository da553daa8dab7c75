"""The client of the REST API: typed answers, one kept connection, errors in plain words."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_rest import FakeRest, Reply, fake_rest, problem
from zmqcluster.cli.http import TOKEN_ENV, Api, find_token
from zmqcluster.config import ClusterConfig
from zmqcluster.errors import (
    ConfigError,
    MasterUnreachable,
    RemoteProtocolError,
    RequestRefused,
    StartError,
)
from zmqcluster.rest.schemas import DoneView, StrategyView, SubmittedView

STRATEGY = Reply(body={"strategy": "random"})
SUBMITTED = Reply(body={"job_id": 0, "task_ids": [1], "existing": []})


@pytest.fixture
def master() -> Iterator[FakeRest]:
    with fake_rest() as fake:
        yield fake


@pytest.fixture
def api(master: FakeRest) -> Iterator[Api]:
    client = Api(ClusterConfig(master_host="127.0.0.1", master_port=master.port), "s3cret")
    yield client
    client.close()


def test_answer_is_typed_and_the_token_goes_along(master: FakeRest, api: Api) -> None:
    master.answers["GET /strategy"] = STRATEGY

    assert api.get("/strategy", StrategyView, {"a": None, "b": "x y"}) == StrategyView("random")

    assert master.asked[0].headers["authorization"] == "Bearer s3cret"
    assert master.asked[0].query == {"b": "x y"}


def test_post_without_body_still_says_its_length(master: FakeRest, api: Api) -> None:
    master.answers["POST /devices/d1/drain"] = Reply(body={"done": True})

    api.ask("POST", "/devices/d1/drain", DoneView)

    assert master.asked[0].headers["content-length"] == "0"


def test_refusal_carries_the_masters_sentence(master: FakeRest, api: Api) -> None:
    master.answers["GET /strategy"] = problem(422, "bad_parameters", "url: given 5")

    with pytest.raises(RequestRefused, match="url: given 5") as caught:
        api.get("/strategy", StrategyView)

    assert caught.value.code == "bad_parameters"


def test_wrong_token_is_told_as_such_and_never_printed(master: FakeRest, api: Api) -> None:
    master.answers["POST /tasks"] = problem(401, "unauthorized", "A token is needed.")

    with pytest.raises(RequestRefused) as caught:
        api.ask("POST", "/tasks", SubmittedView, {})

    assert str(caught.value) == "A token is needed."
    assert "s3cret" not in str(caught.value)


def test_missing_token_is_told_where_to_find_it(master: FakeRest) -> None:
    master.answers["POST /tasks"] = problem(401, "unauthorized", "A token is needed.")
    api = Api(ClusterConfig(master_host="127.0.0.1", master_port=master.port), "")

    with pytest.raises(RequestRefused, match="--api-token-file"):
        api.ask("POST", "/tasks", SubmittedView, {})

    api.close()
    assert "authorization" not in master.asked[0].headers


def test_nobody_there_says_what_to_do() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        api = Api(ClusterConfig(master_host="127.0.0.1", master_port=unused.getsockname()[1]), "")

        with pytest.raises(MasterUnreachable, match=r"refused.*distribute master"):
            api.get("/strategy", StrategyView)


def test_idle_connection_closed_by_the_master_is_opened_anew(master: FakeRest, api: Api) -> None:
    master.answers["GET /strategy"] = [STRATEGY, Reply(0), STRATEGY]

    answers = [api.get("/strategy", StrategyView) for _ in range(2)]

    assert [answer.strategy for answer in answers] == ["random", "random"]
    assert len(master.asked) == 3


def test_broken_submit_is_asked_again_only_under_its_key(master: FakeRest, api: Api) -> None:
    master.answers["GET /strategy"] = STRATEGY
    master.answers["POST /tasks"] = [Reply(0), SUBMITTED]
    api.get("/strategy", StrategyView)

    with pytest.raises(MasterUnreachable):
        api.ask("POST", "/tasks", SubmittedView, {})
    master.answers["POST /tasks"] = [Reply(0), SUBMITTED]
    api.get("/strategy", StrategyView)
    again = api.ask("POST", "/tasks", SubmittedView, {}, key="k1")

    keys = [each.headers.get("idempotency-key") for each in master.asked if each.method == "POST"]
    assert again.task_ids == [1]
    assert keys == [None, "k1", "k1"]


@pytest.mark.parametrize(
    "reply",
    [
        Reply(raw=b"<html>"),
        Reply(raw=b"\xff"),
        Reply(body={"strategy": 5}),
        Reply(body={"strategy": "random", "of_tomorrow": 1}),
        Reply(500, raw=b"<html>oops"),
    ],
)
def test_answer_that_makes_no_sense_is_one_sentence(
    master: FakeRest, api: Api, reply: Reply
) -> None:
    master.answers["GET /strategy"] = reply

    with pytest.raises(RemoteProtocolError, match="master"):
        api.get("/strategy", StrategyView)


def test_a_port_that_speaks_no_http_is_no_master() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        api = Api(ClusterConfig(master_host="127.0.0.1", master_port=server.getsockname()[1]), "")

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(MasterUnreachable, match="no master: check --master-host"):
            api.get("/strategy", StrategyView)
        thread.join()
        api.close()


def test_token_is_found_in_file_then_environment_then_data_directory(tmp_path: Path) -> None:
    config = ClusterConfig(data_dir=str(tmp_path))
    given = tmp_path / "given"
    given.write_text("from-flag\n")
    kept = tmp_path / "api-token"
    kept.write_text("from-dir\n")
    kept.chmod(0o600)

    assert find_token(config, str(given), {TOKEN_ENV: "from-env"}) == "from-flag"
    assert find_token(config, None, {TOKEN_ENV: "from-env"}) == "from-env"
    assert find_token(config, None, {}) == "from-dir"


def test_looking_for_a_token_makes_no_data_directory(tmp_path: Path) -> None:
    config = ClusterConfig(data_dir=str(tmp_path / "none"))

    assert find_token(config, None, {}) == ""
    assert not (tmp_path / "none").exists()


def test_token_others_can_read_is_refused(tmp_path: Path) -> None:
    kept = tmp_path / "api-token"
    kept.write_text("from-dir\n")
    kept.chmod(0o644)

    with pytest.raises(StartError, match="chmod 600"):
        find_token(ClusterConfig(data_dir=str(tmp_path)), None, {})


@pytest.mark.parametrize("content", [b"", b"two words", b"a\nb", b"\xff", b"x" * 2000])
def test_file_that_holds_no_token_is_a_config_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)

    with pytest.raises(ConfigError, match="holds no token"):
        find_token(ClusterConfig(), str(file), {})


def test_missing_token_file_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        find_token(ClusterConfig(), str(tmp_path / "none"), {})
