"""DistributionClient: submit, wait and ask from an asyncio program, over the dispatch socket.

Whatever was asked is asked again after a broken connection or a restarted master, under the same
request id, so nothing is queued twice and no end is missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import msgspec

from zmqcluster import codec
from zmqcluster.client.channel import Channel
from zmqcluster.client.device_session import DeviceSession
from zmqcluster.client.packing import frame_of, task, unpack
from zmqcluster.config import ClusterConfig
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

# Long enough for a full commit queue, short enough to notice a master that was restarted.
ASK_AGAIN_S: Final = 2.0
ANSWER_S: Final = 30.0
# Silence after which wait() sets its watches anew, and the most it grows to.
WATCH_AGAIN_S: Final = 5.0
WATCH_AGAIN_MAX_S: Final = 60.0

A = TypeVar("A", bound=ToClient)


class _Question:
    """A request under way. times: how often it was sent."""

    def __init__(self, frame: bytes, future: asyncio.Future[ToClient]) -> None:
        self.frame = frame
        self.future = future
        self.times = 0

    def is_early(self, message: ToClient) -> bool:
        """Submit with watch: an end may come under the same id; only Submitted answers it."""
        return isinstance(message, Finished) and b"submit" in self.frame[:16]


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
        self._asked: dict[bytes, _Question] = {}
        self._ends: dict[TaskId, asyncio.Future[TaskEnd]] = {}
        self._watched: dict[TaskId, None] = {}
        self._rewatching: asyncio.Task[None] | None = None
        self._is_down = False
        self._heard = 0

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
        if self._rewatching is not None:
            self._rewatching.cancel()
        error = MasterUnreachable("this client was closed")
        waiting: list[asyncio.Future[Any]] = [one.future for one in self._asked.values()]
        waiting += self._ends.values()
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
        message = Submit(_request_id(), tuple(specs), job_id, job_name, tuple(rates), watch)
        answer, is_certain = await self._ask_once(message, Submitted)
        if watch and is_certain:
            # Asked more than once, the answer may come from a master that has no watch of ours:
            # wait() then sets one.
            existing = {answer.task_ids[index] for index in answer.existing}
            for task_id in map(TaskId, answer.task_ids):
                if task_id not in existing:
                    self._watched[task_id] = None
        return answer

    async def wait(
        self, task_ids: Iterable[int], *, timeout_s: float | None = None
    ) -> list[TaskEnd]:
        """The ends of these tasks, in the order given.

        Goes on while a master is away that was there when this began. Raises TimeoutError, and
        MasterUnreachable when nobody answers at the beginning.
        """
        wanted = [TaskId(one) for one in task_ids]
        loop = asyncio.get_running_loop()
        unknown = [one for one in wanted if one not in self._ends and one not in self._watched]
        for task_id in wanted:
            if task_id not in self._ends:
                self._ends[task_id] = loop.create_future()
        async with asyncio.timeout(timeout_s):
            for start in range(0, len(unknown), SUBMIT_TASKS_MAX):
                await self._watch(unknown[start : start + SUBMIT_TASKS_MAX])
            await self._all_ended(wanted)
        return [self._ends[one].result() for one in wanted]

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
        for task_id in map(TaskId, task_ids):
            self._ends.pop(task_id, None)
            self._watched.pop(task_id, None)

    async def cancel(self, task_ids: Sequence[int] = (), *, job_id: int = 0) -> Changed:
        """Cancel tasks, or a job. Returns when no new attempt can start any more."""
        return await self._ask(CancelTasks(_request_id(), tuple(task_ids), job_id), Changed)

    async def retry(self, task_ids: Sequence[int]) -> Changed:
        """Give failed, dead or cancelled tasks another life; wait() waits for its end."""
        changed = await self._ask(RetryTasks(_request_id(), tuple(task_ids)), Changed)
        self.forget(changed.task_ids)
        return changed

    async def status(self) -> OverviewView:
        """The cluster at a glance."""
        answer = await self._ask(AskOverview(_request_id()), Answer)
        return msgspec.msgpack.decode(answer.body, type=OverviewView)

    async def devices(self, device_id: str = "") -> list[DeviceView]:
        """All devices, or one."""
        answer = await self._ask(AskDevices(_request_id(), device_id), Answer)
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
        return (await self._ask_once(message, kind))[0]

    async def _ask_once(self, message: ClientMessage, kind: type[A]) -> tuple[A, bool]:
        """The answer, and whether it is the answer to the only time this was asked."""
        frame = frame_of(message)
        if not self._channel.is_open:
            raise MasterUnreachable("connect() first")
        question = _Question(frame, asyncio.get_running_loop().create_future())
        self._asked[message.request_id] = question
        try:
            self._put(question)
            answer = await self._answer(question)
        finally:
            self._asked.pop(message.request_id, None)
        if isinstance(answer, Refused):
            raise RequestRefused(answer.code, answer.problem)
        if not isinstance(answer, kind):
            raise MasterUnreachable(f"the master answered {type(answer).__name__}")
        return answer, question.times == 1

    async def _answer(self, question: _Question) -> ToClient:
        """Wait for it, asking again now and then: frames may be lost, requests never."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_S):
                while True:
                    done, _ = await asyncio.wait([question.future], timeout=ASK_AGAIN_S)
                    if done:
                        return question.future.result()
                    self._put(question)
        raise MasterUnreachable(
            f"no answer from the master at {self._address} for {ANSWER_S:.0f} s: is it running?"
        )

    def _put(self, question: _Question) -> None:
        question.times += 1
        self._channel.send(question.frame)

    async def _all_ended(self, task_ids: Sequence[TaskId]) -> None:
        """Until these have ended. When nothing is heard for long, the watches are set anew.

        A client that did not read for a while may have missed an end: the master keeps only so
        much for it.
        """
        patience_s = WATCH_AGAIN_S
        while waiting := [one for one in task_ids if not self._is_ended(one)]:
            heard = self._heard
            await asyncio.wait([self._ends[one] for one in waiting], timeout=patience_s)
            if self._heard == heard:
                patience_s = min(2 * patience_s, WATCH_AGAIN_MAX_S)
                # It may be away for long; what it runs goes on meanwhile.
                with contextlib.suppress(MasterUnreachable):
                    for start in range(0, len(waiting), SUBMIT_TASKS_MAX):
                        await self._watch(waiting[start : start + SUBMIT_TASKS_MAX])

    async def _watch(self, task_ids: Sequence[TaskId]) -> None:
        message = Watch(_request_id(), tuple(task_ids))
        for task_id in task_ids:
            self._watched[task_id] = None
        self._take_ends(await self._ask(message, Finished))

    async def _watch_again(self) -> None:
        """The connection is new: a master that was restarted knows nothing of our watches."""
        open_ids = [one for one in self._watched if not self._is_ended(one)]
        for start in range(0, len(open_ids), SUBMIT_TASKS_MAX):
            with contextlib.suppress(MasterUnreachable, RequestRefused):
                await self._watch(open_ids[start : start + SUBMIT_TASKS_MAX])

    # --- frames ---------------------------------------------------------------------------------

    def _on_link(self, link: Link) -> None:
        if link is Link.DISCONNECTED:
            self._is_down = True
        elif link is Link.CONNECTED and self._is_down:
            self._is_down = False
            for question in self._asked.values():
                self._put(question)
            if self._watched:
                self._rewatching = asyncio.get_running_loop().create_task(self._watch_again())

    def _on_frame(self, frame: bytes) -> None:
        try:
            message = codec.decode_to_client(frame)
        except RemoteProtocolError:
            return
        request_id = getattr(message, "request_id", b"")
        asked = self._asked.get(request_id)
        if asked is not None and not asked.future.done() and not asked.is_early(message):
            asked.future.set_result(message)
        elif isinstance(message, Finished):
            self._take_ends(message)

    def _take_ends(self, message: Finished) -> None:
        self._heard += len(message.ends)
        for end in message.ends:
            task_id = TaskId(end.task_id)
            self._watched.pop(task_id, None)
            future = self._ends.get(task_id)
            if future is None:
                future = self._ends[task_id] = asyncio.get_running_loop().create_future()
            if not future.done():
                future.set_result(end)

    def _is_ended(self, task_id: TaskId) -> bool:
        future = self._ends.get(task_id)
        return future is not None and future.done()


def get_async_distribution_client(
    data_dir: str | Path = "data", master_host: str = "localhost", dispatch_port: int = 7990
) -> DistributionClient:
    """A client of the master whose data directory this is; connect it with `async with`."""
    return DistributionClient.of_data_dir(data_dir, master_host, dispatch_port)


def _request_id() -> bytes:
    return secrets.token_bytes(16)
