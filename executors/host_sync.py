"""The host of plain functions: one task at a time, in the main thread of a process of its own."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import threading
import time
from functools import partial
from typing import Any

from executors.base import TaskExecutor
from executors.channel import Channel, NoteGate, call_setup
from executors.context import ExecutorSettings, TaskContext
from executors.hostwire import (
    Began,
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
from executors.proctree import child_pids
from executors.registry import Registry
from zmqcluster.messages import AttemptRef, ProgressNote, RateRule, TaskOrder, TaskResult

log = logging.getLogger("host")


class SyncHost:
    """Takes an order, runs it, reports it; cancelled only by being killed."""

    def __init__(self, channel: Channel, registry: Registry, settings: ExecutorSettings) -> None:
        self._channel = channel
        self._registry = registry
        self._settings = settings
        self._open: dict[str, TaskExecutor] = {}
        self._at_rest = _company()

    def serve(self) -> int:
        """Run until Close, the end of the channel, or a task that left something behind."""
        self._send(frame(Ready()))
        while (message := self._channel.receive()) is not None:
            match message:
                case Run(orders=orders, sent_ms=sent_ms):
                    for order in orders:
                        result = self._run(order, sent_ms)
                        is_last = self._has_leftovers()
                        self._send(frame(Finished((result,), is_last)))
                        if is_last:
                            log.warning("task %d left processes or threads behind", order.task_id)
                            return 0
                case Ping(seq=seq):
                    self._send(frame(Pong(seq)))
                case Close():
                    break
                case _:
                    pass
        self._close()
        return 0

    def _run(self, order: TaskOrder, sent_ms: int) -> TaskResult:
        gate = NoteGate(self._emit, time.monotonic())
        context = TaskContext(
            order.task_id,
            order.attempt,
            task_type=order.task_type,
            job_id=order.job_id,
            timeout_ms=order.timeout_ms,
            settings=self._settings,
            check=self._registry.check,
            emit=lambda note: gate(note, time.monotonic()),
            on_begun=partial(self._tell_begun, order) if order.start_within_ms else None,
        )
        started = time.perf_counter_ns()
        try:
            params = self._registry.decode(order.task_type, order.data)
            executor = self._open.get(order.task_type) or self._set_up(order.task_type)
            window_ms = order.start_within_ms
            # Looked at last: a first task waits for its executor to be opened.
            if window_ms and host_clock_ms() - sent_ms > window_ms:
                return returned(order, "its start window passed before a host was free")
            if window_ms and not executor.tells_begin:
                context.tell_begun()
            value = executor.run(context, params)
            return completed(order, context, value, (time.perf_counter_ns() - started) // 1000)
        # One of the three doors: whatever a task raises, SystemExit too, becomes its result.
        except BaseException as error:  # noqa: BLE001
            log_failure(log, order, error)
            return ended(order, context, error, (time.perf_counter_ns() - started) // 1000)

    def _set_up(self, task_type: str) -> TaskExecutor:
        executor = self._registry.get(task_type)
        opening = call_setup(executor, self._settings)
        if opening is not None:
            asyncio.run(_awaited(opening))
        self._open[task_type] = executor
        self._at_rest = _company()
        return executor

    def _has_leftovers(self) -> bool:
        """Whether the last task left a process or a thread: then this host ends, as it cannot be
        trusted to be clean, and the warden kills what it leaves."""
        threads, children = self._at_rest
        if threading.active_count() > threads:
            return True
        # One system call as a rule; the list of children costs twenty times as much.
        return _has_children() and not children.issuperset(child_pids())

    def _close(self) -> None:
        for executor in self._open.values():
            try:
                closing = executor.close()
                if inspect.isawaitable(closing):
                    asyncio.run(_awaited(closing))
            # The author's code: one that cannot close must not keep the others from it.
            except Exception as error:  # noqa: BLE001
                log.warning("%s.close failed: %s", executor.task_type, error)

    def _emit(self, note: ProgressNote | RateRule) -> None:
        if isinstance(note, ProgressNote):
            self._send(frame(Notes(progress=(note,))))
        else:
            self._send(frame(Notes(rates=(note,))))

    def _tell_begun(self, order: TaskOrder) -> None:
        self._send(frame(Began((AttemptRef(order.task_id, order.attempt),))))

    def _send(self, data: bytes) -> None:
        self._channel.sock.sendall(data)


def _company() -> tuple[int, frozenset[int]]:
    """How many threads this process has, and its children."""
    return threading.active_count(), frozenset(child_pids())


def _has_children() -> bool:
    if not hasattr(os, "waitid"):
        return False
    try:
        # WNOWAIT: a zombie may belong to a Popen that an executor keeps; it counts all the same.
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


async def _awaited(thing: Any) -> Any:
    return await thing
