"""Joining: over real sockets with a small master of the test's own, and pure where it can be."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from zmqcluster.codec import decode_inbound, encode
from zmqcluster.config import ClusterConfig
from zmqcluster.core.events import Principal
from zmqcluster.errors import ConfigError, MasterUnreachable, StartError
from zmqcluster.messages import Enrol, Enrolled, Refused
from zmqcluster.model import DeviceId, RefusalCode, Role, SchedulerMode
from zmqcluster.runtime.clock import SystemClock
from zmqcluster.runtime.transport import MasterSockets, PeerSockets
from zmqcluster.security import join
from zmqcluster.security.datadir import DataDir
from zmqcluster.security.join import Identity, JoinConfig, ensure_enrolled, master_address
from zmqcluster.security.keys import KeyPair, load_or_create_key_pair, new_key_pair
from zmqcluster.security.tokens import (
    JoinToken,
    encode_join_token,
    new_join_token,
    save_join_token,
)
from zmqcluster.security.zap import Allowlist

Answer = Enrolled | Refused
FOR_EVER_MS = 20_000


class Config(msgspec.Struct, frozen=True):
    """The keys of the configuration that joining reads."""

    device_id: str = ""
    device_name: str = "a friendly name"
    join_token: str = ""
    master_host: str = "localhost"
    master_port: int = 7989
    dispatch_port: int = 0
    control_port: int = 0


class Master:
    """Answers enrolments in a thread of its own, as the given function says."""

    def __init__(self, answer: Callable[[Enrol], Answer | None], port: int = 0) -> None:
        self.keys = new_key_pair()
        self.enrols: list[Enrol] = []
        self._answer = answer
        self._allowlist = Allowlist()
        self._port = port
        self._stop = threading.Event()
        self._bound = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.token = new_join_token(
            host="",
            dispatch_port=1,
            control_port=1,
            server_public=self.keys.public,
            expires_wall_ms=0,
        )
        bootstrap = Principal(Role.ENROL, token_id=self.token.token_id)
        self._allowlist.allow(self.token.bootstrap_keys.public, bootstrap)

    def start(self) -> None:
        self._thread.start()
        assert self._bound.wait(5)

    def close(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        sockets = MasterSockets("127.0.0.1", self._port, 0, self.keys, self._allowlist)
        ports = {"dispatch_port": sockets.dispatch_port, "control_port": sockets.control_port}
        self.token = msgspec.structs.replace(self.token, **ports)
        self._bound.set()
        while not self._stop.is_set():
            sockets.serve_door(5)
            for peer, principal, frame in sockets.receive(10):
                message = decode_inbound(principal.role, frame)
                assert isinstance(message, Enrol)
                self.enrols.append(message)
                reply = self._answer(message)
                if reply is not None:
                    sockets.send(peer, encode(reply))
        sockets.close()


def yes(message: Enrol) -> Answer:
    return Enrolled(message.device_id)


def no(code: RefusalCode, problem: str) -> Callable[[Enrol], Answer]:
    return lambda _: Refused(b"", code, problem)


@pytest.fixture
def masters() -> Iterator[Callable[..., Master]]:
    started: list[Master] = []

    def start(answer: Callable[[Enrol], Answer | None] = yes, port: int = 0) -> Master:
        started.append(Master(answer, port))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.close()


Masters = Callable[..., Master]


class Newcomer:
    """A worker process that wants to join; keeps what it said to its operator."""

    def __init__(self, tmp_path: Path, name: str = "newcomer") -> None:
        self.data_dir = DataDir(tmp_path / name)
        self.folder = self.data_dir.take_worker_folder()
        self.said: list[str] = []
        self.on_first_words: Callable[[], object] = lambda: None
        self.stop = threading.Event()

    def join(self, config: Config, patience_ms: int = FOR_EVER_MS) -> Identity | None:
        return ensure_enrolled(
            config,
            self.data_dir,
            self.folder,
            connect=PeerSockets,
            clock=SystemClock(),
            rng=random.Random(1),
            say=self._say,
            stop=self.stop,
            patience_ms=patience_ms,
        )

    def close(self) -> None:
        self.folder.close()

    def _say(self, words: str) -> None:
        self.said.append(words)
        if len(self.said) == 1:
            self.on_first_words()


@pytest.fixture
def newcomer(tmp_path: Path) -> Iterator[Newcomer]:
    one = Newcomer(tmp_path)
    yield one
    one.close()


def given(token: JoinToken, **other: str) -> Config:
    return Config(join_token=encode_join_token(token), **other)  # type: ignore[arg-type]  # all str


def test_newcomer_with_a_token_enrols_a_key_of_its_own(
    masters: Masters, newcomer: Newcomer
) -> None:
    master = masters()

    identity = newcomer.join(given(master.token, device_id="w1"))

    assert identity is not None
    assert identity.device_id == "w1"
    assert identity.server_public == master.keys.public
    assert (identity.dispatch_port, identity.control_port) == (
        master.token.dispatch_port,
        master.token.control_port,
    )
    assert [(one.public_key, one.device_id, one.name) for one in master.enrols] == [
        (identity.keys.public, "w1", "a friendly name")
    ]
    assert identity.keys.public != master.token.bootstrap_keys.public
    assert newcomer.said == []


def test_second_start_asks_nobody(masters: Masters, newcomer: Newcomer) -> None:
    master = masters()
    first = newcomer.join(given(master.token))
    master.close()

    second = newcomer.join(Config())
    with_the_same_command = newcomer.join(given(master.token))

    assert first is not None
    assert second is not None
    assert (second.device_id, second.keys) == (first.device_id, first.keys)
    assert with_the_same_command == first
    assert len(master.enrols) == 1


def test_worker_beside_its_master_needs_no_token(masters: Masters, newcomer: Newcomer) -> None:
    master = masters()
    save_join_token(newcomer.data_dir, master.token)

    identity = newcomer.join(Config())

    assert identity is not None
    assert identity.device_id.startswith("worker-")
    assert newcomer.folder.device_id() == identity.device_id


def test_worker_started_before_its_master_waits_and_says_so(
    masters: Masters, newcomer: Newcomer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "FIRST_WORDS_MS", 0)
    newcomer.on_first_words = lambda: save_join_token(newcomer.data_dir, masters().token)

    identity = newcomer.join(Config())

    assert identity is not None
    assert len(newcomer.said) == 1
    assert "No master has started in" in newcomer.said[0]


def test_master_that_comes_later_is_found(
    masters: Masters, newcomer: Newcomer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "FIRST_WORDS_MS", 0)
    probe = masters()
    token = probe.token
    probe.close()
    later = Master(yes, token.dispatch_port)
    later.keys, later.token, later._allowlist = probe.keys, token, probe._allowlist
    newcomer.on_first_words = later.start

    identity = newcomer.join(given(token))
    later.close()

    assert identity is not None
    assert "not reachable; trying again" in newcomer.said[0]


def test_patience_ends_with_what_was_wrong(masters: Masters, newcomer: Newcomer) -> None:
    master = masters()
    master.close()

    with pytest.raises(MasterUnreachable, match=rf"localhost:{master.token.dispatch_port} not re"):
        newcomer.join(given(master.token), patience_ms=300)


def test_stop_ends_the_wait_at_once(newcomer: Newcomer) -> None:
    newcomer.stop.set()

    assert newcomer.join(Config()) is None


def test_lost_answer_is_asked_for_again_with_the_same_key(
    masters: Masters, newcomer: Newcomer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "ASK_AGAIN_MS", 50)
    answers = iter([None, None, Enrolled(DeviceId("w1"))])
    master = masters(lambda _: next(answers))

    identity = newcomer.join(given(master.token, device_id="w1"))

    assert identity is not None
    assert [one.public_key for one in master.enrols] == [identity.keys.public] * 3


def test_newcomer_killed_before_the_answer_asks_again_with_the_same_key(
    masters: Masters, newcomer: Newcomer
) -> None:
    silent = masters(lambda _: None)
    with pytest.raises(MasterUnreachable, match="does not answer"):
        newcomer.join(given(silent.token), patience_ms=400)
    assert not newcomer.folder.server_public_file.exists()
    silent._answer = yes

    identity = newcomer.join(given(silent.token))

    assert identity is not None
    assert {one.public_key for one in silent.enrols} == {identity.keys.public}


@pytest.mark.parametrize(
    ("code", "problem", "error"),
    [
        (RefusalCode.FORBIDDEN, "join token abc has expired", ConfigError),
        (RefusalCode.FORBIDDEN, "join token abc is used up", ConfigError),
        (RefusalCode.CONFLICT, "device w1 has joined with another key", StartError),
        (RefusalCode.VERSION, "protocol version 1; this master speaks 2", StartError),
    ],
)
def test_refusal_ends_it_in_the_masters_words(
    masters: Masters, newcomer: Newcomer, code: RefusalCode, problem: str, error: type[Exception]
) -> None:
    master = masters(no(code, problem))

    with pytest.raises(error, match=problem):
        newcomer.join(given(master.token))
    assert not newcomer.folder.server_public_file.exists()


def test_busy_master_is_asked_again(
    masters: Masters, newcomer: Newcomer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "ASK_AGAIN_MS", 50)
    answers = iter([Refused(b"", RefusalCode.BUSY, "later"), Enrolled(DeviceId("w1"))])
    master = masters(lambda _: next(answers))

    assert newcomer.join(given(master.token)) is not None


def test_token_the_master_does_not_know_is_refused_at_the_door(
    masters: Masters, newcomer: Newcomer
) -> None:
    master = masters()
    forged = msgspec.structs.replace(master.token, secret=new_key_pair().secret)

    with pytest.raises(ConfigError, match=r"join_token: the master does not know it"):
        newcomer.join(given(forged))
    assert master.enrols == []


def test_local_token_replaced_in_the_meantime_is_read_again(
    masters: Masters, newcomer: Newcomer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "LOCAL_RETRY_MS", 0)
    master = masters()
    stale = msgspec.structs.replace(master.token, secret=new_key_pair().secret)
    tokens = iter([stale, master.token])
    monkeypatch.setattr(join, "load_join_token", lambda _: next(tokens))

    assert newcomer.join(Config()) is not None


def test_master_that_is_not_the_tokens_is_not_told_the_secret(
    masters: Masters, newcomer: Newcomer
) -> None:
    master = masters()
    foreign = msgspec.structs.replace(master.token, server_public=new_key_pair().public)

    with pytest.raises(MasterUnreachable, match="is not the master this join token is for"):
        newcomer.join(given(foreign), patience_ms=500)
    assert master.enrols == []


def test_folder_of_a_former_master_is_enrolled_anew_with_the_new_masters_token(
    masters: Masters, newcomer: Newcomer
) -> None:
    first = newcomer.join(given(masters().token))
    new_master = masters()

    second = newcomer.join(given(new_master.token))

    assert first is not None
    assert second is not None
    assert second.server_public == new_master.keys.public
    assert second.device_id == first.device_id


def test_stranger_without_a_token_is_told_what_is_missing(newcomer: Newcomer) -> None:
    with pytest.raises(ConfigError, match=r"not joined m\.example yet.*distribute token create"):
        newcomer.join(Config(master_host="m.example"))


def test_token_that_expired_or_is_for_a_client_is_refused_before_knocking(
    newcomer: Newcomer,
) -> None:
    token = new_join_token(
        host="", dispatch_port=1, control_port=2, server_public=b"s" * 32, expires_wall_ms=1
    )

    with pytest.raises(ConfigError, match="expired"):
        newcomer.join(given(token))
    with pytest.raises(ConfigError, match="for a client"):
        newcomer.join(given(msgspec.structs.replace(token, role=Role.CLIENT, expires_wall_ms=0)))


@pytest.mark.parametrize(
    ("config", "token_host", "address"),
    [
        (Config(), "", ("localhost", 11, 12)),
        (Config(), "m.example", ("m.example", 11, 12)),
        (Config(master_host="10.0.0.1"), "m.example", ("10.0.0.1", 11, 12)),
        (Config(dispatch_port=5, control_port=6), "", ("localhost", 5, 6)),
        (Config(dispatch_port=7990, control_port=7991), "", ("localhost", 11, 12)),
        (Config(master_port=9000), "", ("localhost", 9001, 9002)),
        (ClusterConfig(mode=SchedulerMode.WORKER), "m.example", ("m.example", 11, 12)),
    ],
)
def test_operator_has_the_first_word_on_the_address_and_the_token_the_second(
    config: JoinConfig, token_host: str, address: tuple[str, int, int]
) -> None:
    token = new_join_token(
        host=token_host, dispatch_port=11, control_port=12, server_public=b"", expires_wall_ms=0
    )

    assert master_address(config, token) == address
    assert master_address(Config(master_host="h", master_port=100), None) == ("h", 101, 102)


def test_keys_of_an_unfinished_join_stay_the_same(tmp_path: Path) -> None:
    newcomer = Newcomer(tmp_path)
    keys: KeyPair = load_or_create_key_pair(newcomer.folder.path, join.KEY_NAME)
    newcomer.stop.set()

    assert newcomer.join(Config(join_token="")) is None
    assert load_or_create_key_pair(newcomer.folder.path, join.KEY_NAME) == keys
    newcomer.close()
