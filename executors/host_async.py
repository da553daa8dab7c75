"""The asyncio host: many tasks at once on one loop.

Frames come in and go out in batches: what arrives in one read starts together, what ends in one
turn of the loop leaves as one frame.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import time
from functools import partial
from typing import Any, Final, cast

from executors.base import TaskExecutor
from executors.channel import Channel, call_setup
from executors.context import ExecutorSettings, TaskContext
from executors.hostwire import (
    BATCH_BYTES,
    NOTES_MAX,
    Began,
    Cancel,
    Close,
    Finished,
    Notes,
    Ping,
    Pong,
    Ready,
    Run,
    frame,
    host_clock_ms,
)
from executors.outcome import completed, ended, log_failure, returned
from executors.registry import Registry
from zmqcluster.errors import RemoteProtocolError
from zmqcluster.messages import AttemptRef, ProgressNote, RateRule, TaskOrder, TaskResult

CLOSE_S: Final = 2.0
# Notes are for people: the newest of each task, this often.
NOTES_S: Final = 0.1
# libuv looks up names in half of its threads at once. Of its own four that is two: two domains
# whose name servers are gone held up every other look-up of the host.
UV_THREADS: Final = 128

log = logging.getLogger("host")

Ref = tuple[int, int]


class Live:
    """A run and what is known of it."""

    __slots__ = ("context", "has_begun", "run")

    def __init__(self, context: TaskContext) -> None:
        self.context = context
        self.run: asyncio.Task[None] | None = None
        self.has_begun = False


class AsyncHost(asyncio.Protocol):
    """Runs orders as asyncio tasks and reports their ends."""

    def __init__(self, channel: Channel, registry: Registry, settings: ExecutorSettings) -> None:
        self._channel = channel
        self._registry = registry
        self._settings = settings
        self._running: dict[Ref, Live] = {}
        self._open: dict[str, TaskExecutor] = {}
        self._opening: dict[str, asyncio.Lock] = {}
        self._results: list[TaskResult] = []
        self._result_bytes = 0
        self._progress: dict[Ref, ProgressNote] = {}
        self._rates: list[RateRule] = []
        self._flushing = False
        self._noting = False
        self._closing: asyncio.Task[None] | None = None

    def serve(self) -> int:
        """Run until Close or the end of the channel; the exit code."""
        self._loop = _new_loop()
        asyncio.set_event_loop(self._loop)
        connecting = self._loop.create_task(self._connect())
        self._forever()
        connecting.cancel()
        self._loop.close()
        return 0

    # --- asyncio.Protocol -----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not of asyncio's classes, only like them.
        self._transport = cast("asyncio.Transport", transport)
        transport = self._transport
        transport.write(frame(Ready()))
        for message in self._channel.inbox:
            self._on_message(message)

    def data_received(self, data: bytes) -> None:
        try:
            messages = self._channel.framer.feed(data)
        except RemoteProtocolError:
            log.exception("the agent sent something unreadable")
            self._loop.stop()
            return
        for message in messages:
            self._on_message(message)

    def connection_lost(self, exc: Exception | None) -> None:
        # The agent is gone; the warden is already killing us.
        self._loop.stop()

    # --- messages -------------------------------------------------------------------------------

    def _on_message(self, message: Any) -> None:
        match message:
            case Run(orders=orders, sent_ms=sent_ms):
                for order in orders:
                    self._start(order, sent_ms)
            case Cancel(refs=refs):
                for ref in refs:
                    self._cancel(ref)
            case Ping(seq=seq):
                self._transport.write(frame(Pong(seq)))
            case Close():
                self._closing = self._closing or self._loop.create_task(self._close())
            case _:
                pass

    def _start(self, order: TaskOrder, sent_ms: int) -> None:
        context = TaskContext(
            order.task_id,
            order.attempt,
            task_type=order.task_type,
            job_id=order.job_id,
            timeout_ms=order.timeout_ms,
            settings=self._settings,
            check=self._registry.check,
            emit=self._emit,
            on_begun=partial(self._tell_begun, order) if order.start_within_ms else None,
        )
        live = Live(context)
        self._running[order.task_id, order.attempt] = live
        live.run = self._loop.create_task(self._run(order, live, sent_ms))

    def _cancel(self, ref: AttemptRef) -> None:
        live = self._running.get((ref.task_id, ref.attempt))
        if live is None or live.context.cancelled:
            return
        live.context.cancelled = True
        # A task cancelled before its first step would never run, and so never report.
        if live.has_begun and live.run is not None:
            live.run.cancel()

    # --- one run --------------------------------------------------------------------------------

    async def _run(self, order: TaskOrder, live: Live, sent_ms: int) -> None:
        live.has_begun = True
        context = live.context
        started = time.perf_counter_ns()
        try:
            if context.cancelled:
                raise asyncio.CancelledError
            params = self._registry.decode(order.task_type, order.data)
            executor = self._open.get(order.task_type)
            if executor is None:
                executor = await self._set_up(order.task_type)
            window_ms = order.start_within_ms
            # Looked at last: a first task waits for its executor to be opened.
            if window_ms and host_clock_ms() - sent_ms > window_ms:
                result = returned(order, "its start window passed in a busy host")
            else:
                if window_ms and not executor.tells_begin:
                    context.tell_begun()
                value = await executor.run(context, params)
                result = completed(order, context, value, _us_since(started))
        # One of the three doors: whatever a task raises, SystemExit and the like too, becomes its
        # result; asyncio would let those stop the whole loop.
        except BaseException as error:  # noqa: BLE001
            result = ended(order, context, error, _us_since(started))
            log_failure(log, order, error)
        self._running.pop((order.task_id, order.attempt), None)
        self._report(result, context.output_bytes)

    async def _set_up(self, task_type: str) -> TaskExecutor:
        """The executor, opened once; a failed opening is tried again by the next task."""
        executor = self._registry.get(task_type)
        async with self._opening.setdefault(task_type, asyncio.Lock()):
            if task_type not in self._open:
                opening = call_setup(executor, self._settings)
                if opening is not None:
                    await opening
                self._open[task_type] = executor
        return executor

    # --- what goes out --------------------------------------------------------------------------

    def _report(self, result: TaskResult, output_bytes: int) -> None:
        self._results.append(result)
        self._result_bytes += len(result.result) + output_bytes
        if self._result_bytes > BATCH_BYTES:
            self._flush()
        else:
            self._flush_soon()

    def _emit(self, note: ProgressNote | RateRule) -> None:
        if isinstance(note, RateRule):
            # A site said "not now" to the whole fleet: that does not wait.
            self._transport.write(frame(Notes(rates=(note,))))
            return
        self._progress[note.task_id, note.attempt] = note
        if not self._noting:
            self._noting = True
            self._loop.call_later(NOTES_S, self._note)

    def _tell_begun(self, order: TaskOrder) -> None:
        # The whole fleet waits for this before it touches the key again.
        self._transport.write(frame(Began((AttemptRef(order.task_id, order.attempt),))))

    def _note(self) -> None:
        self._noting = False
        live = [note for ref, note in self._progress.items() if ref in self._running]
        self._progress.clear()
        for start in range(0, len(live), NOTES_MAX):
            self._transport.write(frame(Notes(tuple(live[start : start + NOTES_MAX]))))

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        if self._results:
            self._transport.write(frame(Finished(tuple(self._results))))
            self._results.clear()
            self._result_bytes = 0

    # --- life of the loop -----------------------------------------------------------------------

    async def _connect(self) -> None:
        await self._loop.connect_accepted_socket(lambda: self, self._channel.sock)

    def _forever(self) -> None:
        """Run the loop; SystemExit from a task's own sub-task must not end the host."""
        while True:
            try:
                self._loop.run_forever()
            except (SystemExit, KeyboardInterrupt) as error:
                log.error("a background task raised %s; ignored", type(error).__name__)
            else:
                return

    async def _close(self) -> None:
        """Cancel what runs, close what is open, each within CLOSE_S, and stop the loop."""
        runs = [live.run for live in self._running.values() if live.run is not None]
        for ref in list(self._running):
            self._cancel(AttemptRef(*ref))
        if runs:
            await asyncio.wait(runs, timeout=CLOSE_S)
        for executor in self._open.values():
            try:
                closing = executor.close()
                if inspect.isawaitable(closing):
                    await asyncio.wait_for(closing, CLOSE_S)
            # The author's code again: one that cannot close must not keep the others from it.
            except Exception as error:  # noqa: BLE001
                log.warning("%s.close failed: %s", executor.task_type, error)
        self._flush()
        self._transport.close()


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    os.environ.setdefault("UV_THREADPOOL_SIZE", str(UV_THREADS))
    return uvloop.new_event_loop()


def _us_since(started_ns: int) -> int:
    return (time.perf_counter_ns() - started_ns) // 1000
