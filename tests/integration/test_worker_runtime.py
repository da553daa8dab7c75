"""A whole agent over real sockets with real executor hosts; only its master is a toy."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]  # ships no types
import msgspec
import pytest

from tests.support.mini_master import Door, MiniMaster
from zmqcluster.config import ClusterConfig
from zmqcluster.errors import ConfigError, StartError
from zmqcluster.messages import (
    Abort,
    AttemptRef,
    Enrol,
    Goodbye,
    Hello,
    Hint,
    Results,
    Returned,
    Started,
    TaskOrder,
)
from zmqcluster.model import DeviceId, Outcome, SchedulerMode
from zmqcluster.runtime.worker import WorkerRuntime
from zmqcluster.security.tokens import encode_join_token

WAIT_S = 20.0
ROOT = Path(__file__).parents[2]


class Agent:
    """A WorkerRuntime in a thread of its own."""

    def __init__(self, config: ClusterConfig) -> None:
        self.runtime = WorkerRuntime(config)
        self.code: int | None = None
        self.error: Exception | None = None
        self.identity: tuple[DeviceId, str] | None = None
        self._thread = threading.Thread(target=self._run, name="agent")
        self._thread.start()

    def _run(self) -> None:
        try:
            self.code = self.runtime.run(on_registered=self._note)
        except (ConfigError, StartError) as error:
            self.error = error

    def _note(self, device_id: DeviceId, master: str) -> None:
        self.identity = (device_id, master)

    def end(self) -> int | None:
        """Wait for the end by itself."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive(), "the agent ends"
        return self.code

    def kill(self) -> None:
        """Stop at once, whatever is going on."""
        if self._thread.is_alive():
            self.runtime.terminate()
            self.runtime.terminate()
            self.end()


Start = Callable[..., Agent]
Configured = Callable[..., ClusterConfig]


@pytest.fixture
def door() -> Door:
    return Door()


@pytest.fixture
def master(door: Door) -> Iterator[MiniMaster]:
    master = MiniMaster(door)
    yield master
    master.close()


@pytest.fixture
def configured(tmp_path: Path, door: Door, master: MiniMaster) -> Configured:
    def configure(**keys: Any) -> ClusterConfig:
        assert door.token is not None
        fields: dict[str, Any] = {
            "data_dir": str(tmp_path / "data"),
            "device_id": "d1",
            "master_host": "127.0.0.1",
            "dispatch_port": door.dispatch_port,
            "control_port": door.control_port,
            "join_token": encode_join_token(door.token),
            "concurrent_tasks": 4,
            **keys,
        }
        return ClusterConfig(mode=SchedulerMode.WORKER, **fields)

    return configure


@pytest.fixture
def start(configured: Configured) -> Iterator[Start]:
    agents = []

    def start_agent(**keys: Any) -> Agent:
        agents.append(Agent(configured(**keys)))
        return agents[-1]

    yield start_agent
    for agent in agents:
        agent.kill()


def order(task_id: int, task_type: str = "noop", attempt: int = 1, **data: Any) -> TaskOrder:
    body: bytes = msgpack.packb(data)
    return TaskOrder(task_id, attempt, task_type, body, 60_000)


def wait_until(what: Callable[[], bool]) -> None:
    """For things inside the agent, which has no signal for them."""
    deadline = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def test_agent_enrols_registers_and_runs_tasks(start: Start, master: MiniMaster) -> None:
    agent = start(labels=("gpu",), device_name="first")
    hello = master.hello()
    master.assign(order(1), order(2, "echo", value="hi"), order(3, "fail"))

    assert master.wait_for_result(1).outcome is Outcome.COMPLETED
    assert msgpack.unpackb(master.wait_for_result(2).result) == "hi"
    assert master.wait_for_result(3).outcome is Outcome.FAILED
    assert (hello.device_id, hello.name, hello.labels) == ("d1", "first", ("gpu",))
    assert hello.capabilities.cpu_count >= 1
    assert {"noop", "noop_sync"} <= {offer.task_type for offer in hello.task_types}
    wait_until(lambda: agent.runtime.is_registered)
    wait_until(lambda: agent.identity == ("d1", f"127.0.0.1:{master.door.dispatch_port}"))


def test_first_signal_drains_and_ends_with_goodbye(start: Start, master: MiniMaster) -> None:
    agent = start(concurrent_tasks=1)
    master.assign(order(1, "sleep", seconds=0.5), order(2))
    master.wait_for_message(Started)

    agent.runtime.terminate()

    assert agent.end() == 0
    master.wait_for_message(Goodbye)
    assert master.results[1, 1].outcome is Outcome.COMPLETED
    (returned,) = master.of(Returned)
    assert isinstance(returned, Returned)
    assert returned.refs == (AttemptRef(2, 1),)


def test_second_signal_ends_it_at_once(start: Start, master: MiniMaster) -> None:
    agent = start()
    master.assign(order(1, "sleep", seconds=600))
    master.wait_for_message(Started)

    agent.runtime.terminate()
    agent.runtime.terminate()

    assert agent.end() == 130


def test_abort_kills_the_run_and_a_hint_is_enough(start: Start, master: MiniMaster) -> None:
    start()
    master.assign(order(1, "sleep", seconds=600), order(2, "sleep_sync", seconds=600))
    master.wait_for(lambda heard: len(heard.of(Started)) > 0)

    master.say(Abort((AttemptRef(1, 1),)))
    assert master.wait_for_result(1).outcome is Outcome.CANCELLED
    master.say(Hint(master.epoch, 0, (AttemptRef(2, 1),)))

    assert master.wait_for_result(2).outcome is Outcome.CANCELLED


def test_running_work_goes_on_while_the_master_restarts_and_its_result_arrives(
    start: Start, master: MiniMaster, door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    start()
    master.assign(order(1, "sleep", seconds=1.0))
    master.wait_for_message(Started)
    master.close()

    second = MiniMaster(door, epoch=2)
    try:
        hello = second.hello()
        result = second.wait_for_result(1)
    finally:
        second.close()

    assert [(held.task_id, held.attempt) for held in hello.inventory] == [(1, 1)]
    assert result.outcome is Outcome.COMPLETED
    assert "Device registered successfully" in caplog.messages
    assert "Connected to the master again" in caplog.messages


def test_result_nobody_acknowledged_is_sent_by_the_next_process(
    start: Start, master: MiniMaster, tmp_path: Path
) -> None:
    master.acks = False
    first = start()
    master.assign(order(1, "echo", value="kept"))
    master.wait_for_result(1)
    first.kill()
    assert list((tmp_path / "data" / "workers").glob("*/spool/*/*.spool"))
    master.results.clear()
    master.acks = True

    start()

    master.wait_for(lambda heard: len(heard.of(Hello)) == 2)
    assert msgpack.unpackb(master.wait_for_result(1).result) == "kept"
    assert [held.phase for held in master.hello().inventory] == [2]
    assert len(master.of(Enrol)) == 1


AGENT = """
import sys, msgspec
from zmqcluster.config import ClusterConfig
from zmqcluster.runtime.worker import WorkerRuntime
WorkerRuntime(msgspec.json.decode(sys.argv[1], type=ClusterConfig)).run()
"""


def test_killed_agent_leaves_its_results_for_the_next_process(
    configured: Configured, start: Start, master: MiniMaster, tmp_path: Path
) -> None:
    master.acks = False
    config = msgspec.json.encode(configured()).decode()
    agent = subprocess.Popen([sys.executable, "-c", AGENT, config], cwd=ROOT)
    try:
        master.assign(order(1, "echo", value="kept"), order(2, "sleep", seconds=600))
        master.wait_for_result(1)
        spools = tmp_path / "data" / "workers"
        wait_until(lambda: any(one.stat().st_size for one in spools.glob("*/spool/*/*.spool")))
    finally:
        agent.kill()
        agent.wait(WAIT_S)
    master.results.clear()
    master.acks = True

    start()

    assert msgpack.unpackb(master.wait_for_result(1).result) == "kept"
    hello = master.hello()
    assert [(held.task_id, held.phase) for held in hello.inventory] == [(1, 2)]


def test_silent_master_is_left_and_greeted_again(start: Start, master: MiniMaster) -> None:
    agent = start()
    wait_until(lambda: agent.runtime.is_registered)
    master.be_silent()

    wait_until(
        lambda: agent.runtime.loop is not None and agent.runtime.loop.counters.reconnects > 0
    )

    assert not agent.runtime.is_registered


def test_frames_that_are_no_messages_are_dropped_and_counted(
    start: Start, master: MiniMaster
) -> None:
    agent = start()
    master.hello()
    master.say(b"\xc1")  # type: ignore[arg-type]  # Encoded as bytes: well-formed, but no message.
    master.assign(order(1))

    master.wait_for_result(1)

    assert agent.runtime.loop is not None
    assert agent.runtime.loop.counters.frames_refused == 1


def test_revoked_key_is_told_in_plain_words(
    start: Start, master: MiniMaster, door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    start()
    master.hello()
    (enrol,) = master.of(Enrol)
    assert isinstance(enrol, Enrol)
    door.allowlist.deny(enrol.public_key)
    master.close()

    second = MiniMaster(door, epoch=2)
    try:
        wait_until(lambda: "the master refuses this device's key" in caplog.text)
    finally:
        second.close()


def test_wrong_executor_module_is_said_before_anything_waits(start: Start) -> None:
    agent = start(executors=("no_such_module",), dispatch_port=1, control_port=2)

    agent.end()

    assert isinstance(agent.error, ConfigError)
    assert "no_such_module" in str(agent.error)


def test_second_worker_with_the_same_device_id_on_this_machine_is_refused(
    start: Start, master: MiniMaster
) -> None:
    start()
    master.hello()
    second = start()

    second.end()

    assert isinstance(second.error, StartError)
    assert "already live" in str(second.error)


def test_signal_while_nobody_answers_ends_the_wait(start: Start) -> None:
    agent = start(dispatch_port=1, control_port=2)
    agent.runtime.terminate()

    assert agent.end() == 0


def test_thousands_of_tasks_come_back_once_each(start: Start, master: MiniMaster) -> None:
    start(concurrent_tasks=100)
    master.hello()
    count = 3_000
    for first in range(1, count, 500):
        master.assign(*(order(task_id) for task_id in range(first, first + 500)))

    master.wait_for(lambda heard: len(heard.results) == count)

    sent = [one for message in master.of(Results) if isinstance(message, Results)
            for one in message.results]  # fmt: skip
    assert {one.outcome for one in sent} == {Outcome.COMPLETED}
    assert len(sent) == count
