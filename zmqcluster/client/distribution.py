"""DistributionClient: submit, wait and ask from an asyncio program, over the dispatch socket.

What is asked again, and when, is for ClientCore to decide; here are its sockets, its clock and the
futures of those who wait.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, assert_never

import msgspec

from zmqcluster import codec
from zmqcluster.client.channel import Channel
from zmqcluster.client.device_session import DeviceSession
from zmqcluster.client.packing import frame_of, task, unpack
from zmqcluster.config import ClusterConfig
from zmqcluster.core.client import ANSWER_MS, ClientCore
from zmqcluster.core.client_events import (
    Answered,
    Ask,
    Await,
    ClientEvent,
    Drop,
    Ended,
    Forget,
    FromMaster,
    LinkDown,
    LinkUp,
    SendToMaster,
    Unanswered,
)
from zmqcluster.errors import (
    MasterUnreachable,
    RemoteProtocolError,
    RequestRefused,
    StartError,
)
from zmqcluster.messages import (
    Answer,
    AskDevices,
    AskOverview,
    CancelTasks,
    Changed,
    ClientMessage,
    Finished,
    RateRule,
    Refused,
    RetryTasks,
    Submit,
    Submitted,
    TaskEnd,
    TaskSpec,
    ToClient,
    Watch,
)
from zmqcluster.model import (
    SUBMIT_TASKS_MAX,
    DeviceId,
    DeviceState,
    RefusalCode,
    SchedulerMode,
    TaskId,
)
from zmqcluster.runtime.transport import Link, PeerSockets
from zmqcluster.security.datadir import DataDir
from zmqcluster.security.keys import KeyPair, load_key_pair, load_public_key
from zmqcluster.views import DeviceView, OverviewView

A = TypeVar("A", bound=ToClient)
T = TypeVar("T")


class DistributionClient:
    """A connection to one master. Use it as `async with`, from one event loop."""

    def __init__(
        self, master_host: str, dispatch_port: int, server_public: bytes, keys: KeyPair
    ) -> None:
        self._address = f"{master_host}:{dispatch_port}"
        self._channel = Channel(
            lambda: PeerSockets(master_host, dispatch_port, 0, server_public, keys),
            self._on_frame,
            self._on_link,
        )
        self._device: DeviceSession | None = None
        self._data_dir: Path | None = None
        self._dispatch_port = dispatch_port
        self._master_host = master_host
        self._core = ClientCore(random.SystemRandom())
        self._answers: dict[bytes, asyncio.Future[ToClient]] = {}
        self._ends: dict[TaskId, asyncio.Future[TaskEnd]] = {}
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    def of_data_dir(
        cls, data_dir: str | Path, master_host: str = "localhost", dispatch_port: int = 7990
    ) -> Self:
        """A client on the master's own machine, with the key the master left for it."""
        if not Path(data_dir).expanduser().is_dir():
            raise StartError(f"there is no data directory {data_dir}: start a master with it first")
        folder = DataDir(data_dir).keys_folder()
        keys, server_public = (
            load_key_pair(folder, "client"),
            load_public_key(folder / "server.pub"),
        )
        if keys is None or server_public is None:
            raise StartError(f"{folder} has no client key: start a master with this data_dir first")
        client = cls(master_host, dispatch_port, server_public, keys)
        client._data_dir = Path(data_dir)
        return client

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """Open the sockets. The master need not be there yet."""
        self._channel.open()

    async def close(self) -> None:
        """Close the sockets; whoever still waits is told. Harmless when done twice."""
        device, self._device = self._device, None
        if device is not None:
            await device.close()
        self._channel.close()
        if self._timer is not None:
            self._timer.cancel()
        error = MasterUnreachable("this client was closed")
        waiting: list[asyncio.Future[Any]] = [*self._answers.values(), *self._ends.values()]
        for future in waiting:
            if not future.done():
                future.set_exception(error)
                # Nobody may be waiting for it any more; that is no error.
                future.exception()

    # --- tasks ----------------------------------------------------------------------------------

    async def submit(
        self,
        task_type: str,
        data: dict[str, Any] | None = None,
        *,
        job_id: int = 0,
        **fields: Any,
    ) -> TaskId:
        """Queue one task; returns its id once it is on disk. fields: as in task()."""
        answer = await self.submit_many([task(task_type, data, **fields)], job_id=job_id)
        return TaskId(answer.task_ids[0])

    async def submit_many(
        self,
        specs: Sequence[TaskSpec],
        *,
        job_id: int = 0,
        job_name: str = "",
        rates: Sequence[RateRule] = (),
        watch: bool = True,
    ) -> Submitted:
        """Queue a batch of at most SUBMIT_TASKS_MAX; returns once it is on disk.

        watch: the master tells this client of each end, for wait(). Raises RequestRefused naming
        the first task that does not fit; then none was queued.
        """
        if len(specs) > SUBMIT_TASKS_MAX:
            problem = f"{len(specs)} tasks in one batch, at most {SUBMIT_TASKS_MAX}"
            raise RequestRefused(RefusalCode.BAD_REQUEST, problem)
        message = Submit(
            self._core.new_request_id(), tuple(specs), job_id, job_name, tuple(rates), watch
        )
        return await self._ask(message, Submitted)

    async def wait(
        self, task_ids: Iterable[int], *, timeout_s: float | None = None
    ) -> list[TaskEnd]:
        """The ends of these tasks, in the order given.

        Goes on while a master is away that was there when this began. Raises TimeoutError, and
        MasterUnreachable when nobody answers at the beginning.
        """
        wanted = [TaskId(one) for one in task_ids]
        unknown = [one for one in wanted if not self._core.watches(one)]
        futures = [self._end_of(one) for one in wanted]
        async with asyncio.timeout(timeout_s):
            for start in range(0, len(unknown), SUBMIT_TASKS_MAX):
                portion = tuple(unknown[start : start + SUBMIT_TASKS_MAX])
                await self._ask(Watch(self._core.new_request_id(), portion), Finished)
            self._feed(Await(tuple(wanted)))
            waiting = [one for one in futures if not one.done()]
            if waiting:
                await asyncio.wait(waiting)
        return [one.result() for one in futures]

    async def results(
        self, task_ids: Iterable[int], *, timeout_s: float | None = None
    ) -> AsyncIterator[Any]:
        """The unpacked results of these tasks, in order. Raises RequestRefused for a failed one."""
        for end in await self.wait(task_ids, timeout_s=timeout_s):
            if end.state != "completed":
                raise RequestRefused(end.state, f"task {end.task_id} is {end.state}: {end.error}")
            yield unpack(end.result)

    def forget(self, task_ids: Iterable[int]) -> None:
        """Drop ends kept for wait(), for a program that submits for ever."""
        forgotten = tuple(map(TaskId, task_ids))
        for task_id in forgotten:
            self._ends.pop(task_id, None)
        self._feed(Forget(forgotten))

    async def cancel(self, task_ids: Sequence[int] = (), *, job_id: int = 0) -> Changed:
        """Cancel tasks, or a job. Returns when no new attempt can start any more."""
        return await self._ask(
            CancelTasks(self._core.new_request_id(), tuple(task_ids), job_id), Changed
        )

    async def retry(self, task_ids: Sequence[int]) -> Changed:
        """Give failed, dead or cancelled tasks another life; wait() waits for its end."""
        changed = await self._ask(RetryTasks(self._core.new_request_id(), tuple(task_ids)), Changed)
        self.forget(changed.task_ids)
        return changed

    async def status(self) -> OverviewView:
        """The cluster at a glance."""
        answer = await self._ask(AskOverview(self._core.new_request_id()), Answer)
        return msgspec.msgpack.decode(answer.body, type=OverviewView)

    async def devices(self, device_id: str = "") -> list[DeviceView]:
        """All devices, or one."""
        answer = await self._ask(AskDevices(self._core.new_request_id(), device_id), Answer)
        return msgspec.msgpack.decode(answer.body, type=list[DeviceView])

    # --- being a device -------------------------------------------------------------------------

    async def register_device(
        self, device_id: str = "", *, name: str = "", labels: Sequence[str] = ()
    ) -> DeviceId:
        """Join this program as a device that runs no tasks; its id, once the master welcomed it.

        device_id: empty takes the one remembered in data_dir, or a new one. Beats are sent by
        start_heartbeat(). Raises RequestRefused when the id is live elsewhere, MasterUnreachable
        when nobody answers.
        """
        if self._data_dir is None:
            raise StartError("register_device() needs a client made by of_data_dir()")
        if self._device is None:
            config = ClusterConfig(
                mode=SchedulerMode.WORKER,
                device_id=device_id,
                device_name=name,
                labels=tuple(labels),
                master_host=self._master_host,
                master_port=self._dispatch_port - 1,
                dispatch_port=self._dispatch_port,
                data_dir=str(self._data_dir),
            )
            self._device = await DeviceSession.join(config)
        known = self._device.device_id
        if device_id and device_id != known:
            raise StartError(f"this client is device {known} already; {device_id} needs another")
        return known

    async def update_device_status(self, status: DeviceState | str) -> None:
        """Tell the master: online, draining, or offline (which also ends the session).

        Raises ValueError for another word.
        """
        status = DeviceState(status)
        device = self._registered()
        await device.update(status)
        if status is DeviceState.OFFLINE:
            self._device = None
            await device.close()

    async def start_heartbeat(self) -> None:
        """Beat at the master's interval from now on. Again: nothing happens."""
        self._registered().start_beating()

    async def stop_heartbeat(self) -> None:
        """Stop beating; the lease ends after the device timeout. Again: nothing happens."""
        await self._registered().stop_beating()

    def _registered(self) -> DeviceSession:
        if self._device is None:
            raise StartError("register_device() comes first")
        return self._device

    # --- asking ---------------------------------------------------------------------------------

    async def _ask(self, message: ClientMessage, kind: type[A]) -> A:
        frame_of(message)
        if not self._channel.is_open:
            raise MasterUnreachable("connect() first")
        request_id = message.request_id
        future = self._answers[request_id] = asyncio.get_running_loop().create_future()
        try:
            self._feed(Ask(message))
            answer = await future
        except asyncio.CancelledError:
            self._feed(Drop(request_id))
            raise
        finally:
            del self._answers[request_id]
        if isinstance(answer, Refused):
            raise RequestRefused(answer.code, answer.problem)
        if not isinstance(answer, kind):
            raise MasterUnreachable(f"the master answered {type(answer).__name__}")
        return answer

    def _end_of(self, task_id: TaskId) -> asyncio.Future[TaskEnd]:
        future = self._ends.get(task_id)
        if future is None:
            future = self._ends[task_id] = asyncio.get_running_loop().create_future()
        return future

    # --- the machine ----------------------------------------------------------------------------

    def _feed(self, *events: ClientEvent) -> None:
        """Tell the core what happened, and do what it wants done."""
        if not self._channel.is_open:
            return
        loop = asyncio.get_running_loop()
        for effect in self._core.handle(int(loop.time() * 1000), *events):
            match effect:
                case SendToMaster(message):
                    self._channel.send(codec.encode(message))
                case Answered(request_id, answer):
                    _settle(self._answers.get(request_id), answer)
                case Unanswered(request_id):
                    _fail(self._answers.get(request_id), self._unreachable())
                case Ended(end):
                    _settle(self._end_of(TaskId(end.task_id)), end)
                case _:
                    assert_never(effect)
        self._plan(loop)

    def _plan(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wake the core when it wants to be woken; an earlier timer finds nothing to do."""
        due_ms = self._core.next_ms()
        if due_ms is None:
            return
        due_s = due_ms / 1000
        timer = self._timer
        if timer is None or timer.cancelled() or timer.when() <= loop.time():
            self._timer = loop.call_at(due_s, self._feed)
        elif timer.when() > due_s:
            timer.cancel()
            self._timer = loop.call_at(due_s, self._feed)

    def _unreachable(self) -> MasterUnreachable:
        return MasterUnreachable(
            f"no answer from the master at {self._address} for {ANSWER_MS // 1000} s: "
            "is it running?"
        )

    def _on_link(self, link: Link) -> None:
        if link is Link.DISCONNECTED:
            self._feed(LinkDown())
        elif link is Link.CONNECTED:
            self._feed(LinkUp())

    def _on_frame(self, frame: bytes) -> None:
        try:
            message = codec.decode_to_client(frame)
        except RemoteProtocolError:
            return
        self._feed(FromMaster(message))


def _settle(future: asyncio.Future[T] | None, value: T) -> None:
    if future is not None and not future.done():
        future.set_result(value)


def _fail(future: asyncio.Future[Any] | None, error: Exception) -> None:
    if future is not None and not future.done():
        future.set_exception(error)


def get_async_distribution_client(
    data_dir: str | Path = "data", master_host: str = "localhost", dispatch_port: int = 7990
) -> DistributionClient:
    """A client of the master whose data directory this is; connect it with `async with`."""
    return DistributionClient.of_data_dir(data_dir, master_host, dispatch_port)
