"""Clients that want to hear of ends, and telling them once the ends are on disk."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeVar

from zmqcluster.core.events import Facts, Peer
from zmqcluster.core.state import MasterState, Watcher
from zmqcluster.messages import Finished, Refused, TaskEnd, Watch
from zmqcluster.model import JobId, RefusalCode, TaskId, TaskState

K = TypeVar("K", JobId, TaskId)

# One Finished stays well below FRAME_BYTES_MAX.
_FINISHED_BYTES: Final = 1024 * 1024
_FINISHED_ENDS: Final = 5_000
# All clients together; beyond, a client has to ask instead of being told.
WATCHED_MAX: Final = 1_000_000


def on_watch(state: MasterState, peer: Peer, message: Watch, facts: Facts) -> None:
    """Report ends from now on, and at once those that have come already."""
    watcher = Watcher(peer, message.request_id)
    state.watching.setdefault(peer, {})
    if message.job_id:
        if state.known_job(JobId(message.job_id), facts) is None:
            problem = f"there is no job {message.job_id}"
            state.send(peer, Refused(message.request_id, RefusalCode.NOT_FOUND, problem))
            return
        state.job_watchers.setdefault(JobId(message.job_id), {})[watcher] = None
    ended: list[TaskEnd] = []
    waiting: list[TaskId] = []
    for task_id in map(TaskId, message.task_ids):
        known = state.row_of(task_id) or facts.tasks.get(task_id)
        if known is None:
            ended.append(TaskEnd(task_id, TaskState.FAILED, b"", "there is no such task"))
        elif known.state.is_terminal:
            ended.append(TaskEnd(task_id, known.state, known.result, known.error, known.attempt))
        else:
            waiting.append(task_id)
    watch_tasks(state, watcher, waiting)
    # Also when nothing has ended yet: an empty list says that the watch is set.
    state.ends.setdefault(watcher, []).extend(ended)


def watch_tasks(state: MasterState, watcher: Watcher, task_ids: Iterable[TaskId]) -> None:
    """Tell watcher when these open tasks end."""
    mine = state.watching.setdefault(watcher.peer, {})
    for task_id in task_ids:
        if len(state.task_watchers) >= WATCHED_MAX:
            problem = f"{WATCHED_MAX} tasks are watched already: ask for this one"
            end = TaskEnd(task_id, TaskState.PENDING, b"", problem)
            state.ends.setdefault(watcher, []).append(end)
            continue
        state.task_watchers.setdefault(task_id, {})[watcher] = None
        mine[task_id] = None


def tell_watchers(state: MasterState) -> None:
    """Send the ends of this turn, in frames of bounded size."""
    for watcher, ends in state.ends.items():
        start = size = 0
        for index, end in enumerate(ends):
            size += len(end.result) + len(end.error) + 64
            if size > _FINISHED_BYTES or index - start == _FINISHED_ENDS:
                state.send(watcher.peer, Finished(watcher.request_id, tuple(ends[start:index])))
                start, size = index, len(end.result)
        state.send(watcher.peer, Finished(watcher.request_id, tuple(ends[start:])))
    state.ends.clear()


def forget_watcher(state: MasterState, peer: Peer) -> None:
    """A client is gone."""
    for task_id in state.watching.pop(peer, ()):
        _without(state.task_watchers, task_id, peer)
    for job_id in [key for key, some in state.job_watchers.items() if _is_among(some, peer)]:
        _without(state.job_watchers, job_id, peer)


def _is_among(watchers: dict[Watcher, None], peer: Peer) -> bool:
    return any(one.peer == peer for one in watchers)


def _without(watchers: dict[K, dict[Watcher, None]], key: K, peer: Peer) -> None:
    kept = {one: None for one in watchers.pop(key, ()) if one.peer != peer}
    if kept:
        watchers[key] = kept
