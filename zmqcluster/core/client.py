"""ClientCore: what a client does so that no request is lost and no end is missed. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from random import Random
from typing import Final, assert_never

from msgspec import Struct

from zmqcluster.core.client_events import (
    Answered,
    Ask,
    Await,
    ClientEffect,
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
from zmqcluster.messages import (
    ClientMessage,
    Enrolled,
    Finished,
    Submit,
    Submitted,
    ToClient,
    Watch,
)
from zmqcluster.model import SUBMIT_TASKS_MAX, TaskId

# Long enough for a full commit queue, short enough to notice a master that was restarted.
ASK_AGAIN_MS: Final = 2_000
ANSWER_MS: Final = 30_000
# Silence after which awaited tasks are watched anew, and the most it grows to.
WATCH_AGAIN_MS: Final = 5_000
WATCH_AGAIN_MS_MAX: Final = 60_000
REQUEST_ID_BYTES: Final = 16


class _Question(Struct):
    """A request under way. times: how often it was sent. is_ours: a Watch nobody asked for."""

    message: ClientMessage
    asked_ms: int
    again_ms: int = 0
    times: int = 0
    is_ours: bool = False


class ClientCore:
    """Events in, effects out.

    It promises: a request is repeated under its request_id until it is answered or given up, so
    that it is carried out once; the end of an awaited task is told, whatever was lost.
    """

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._asked: dict[bytes, _Question] = {}
        # When to ask which one again, in order of time; what was answered since is skipped.
        self._repeats: deque[tuple[int, bytes]] = deque()
        # Open tasks the master tells us of, and those somebody waits for.
        self._watched: dict[TaskId, None] = {}
        self._awaited: dict[TaskId, None] = {}
        self._ended: dict[TaskId, None] = {}
        self._was_down = False
        self._patience_ms = WATCH_AGAIN_MS
        self._heard_ms = 0

    @property
    def open_requests(self) -> int:
        return len(self._asked)

    def new_request_id(self) -> bytes:
        return self._rng.randbytes(REQUEST_ID_BYTES)

    def watches(self, task_id: TaskId) -> bool:
        """Will the end of this task be told, or was it?"""
        return task_id in self._watched or task_id in self._ended or task_id in self._awaited

    def handle(self, now_ms: int, *events: ClientEvent) -> list[ClientEffect]:
        """One turn. Without events only time has passed. now_ms: never stepping back."""
        effects: list[ClientEffect] = []
        for event in events:
            self._on_event(now_ms, event, effects)
        self._repeat(now_ms, effects)
        self._watch_again(now_ms, effects)
        return effects

    def next_ms(self) -> int | None:
        """When handle() wants to be called again though nothing happens; None: never."""
        dues = [self._heard_ms + self._patience_ms] if self._awaited else []
        if self._asked:
            dues.append(self._repeats[0][0])
        return min(dues, default=None)

    # --- taking in ------------------------------------------------------------------------------

    def _on_event(self, now_ms: int, event: ClientEvent, effects: list[ClientEffect]) -> None:
        match event:
            case Ask():
                self._ask(now_ms, event.message, effects)
            case Drop():
                self._asked.pop(event.request_id, None)
            case Await():
                self._await(now_ms, event.task_ids, effects)
            case Forget():
                for task_id in event.task_ids:
                    for kept in (self._watched, self._awaited, self._ended):
                        kept.pop(task_id, None)
            case LinkDown():
                self._was_down = True
            case LinkUp():
                self._on_link_up(now_ms, effects)
            case FromMaster():
                self._on_message(now_ms, event.message, effects)
            case _:
                assert_never(event)

    def _on_link_up(self, now_ms: int, effects: list[ClientEffect]) -> None:
        if not self._was_down:
            return
        self._was_down = False
        for question in self._asked.values():
            self._put(now_ms, question, effects)
        # A master that was restarted knows nothing of our watches.
        self._watch(now_ms, self._watched, effects)

    def _on_message(self, now_ms: int, message: ToClient, effects: list[ClientEffect]) -> None:
        if isinstance(message, Enrolled):
            # Joining is over before this machine starts.
            return
        question = self._asked.get(message.request_id)
        # Submit with watch: an end may come under the same id; only Submitted answers it.
        is_early = question is not None and isinstance(question.message, Submit)
        if isinstance(message, Finished):
            self._take_ends(now_ms, message, effects, has_news=is_early)
            if is_early:
                return
        if question is None:
            return
        del self._asked[message.request_id]
        if not self._asked:
            self._repeats.clear()
        if isinstance(message, Submitted):
            self._watch_submitted(question, message)
        if not question.is_ours:
            effects.append(Answered(message.request_id, message))

    def _watch_submitted(self, question: _Question, answer: Submitted) -> None:
        # Asked more than once, the answer may come from a master that has no watch of ours:
        # awaiting then sets one.
        asked = question.message
        if not isinstance(asked, Submit) or not asked.watch or question.times > 1:
            return
        existing = dict.fromkeys(answer.existing)
        for index, task_id in enumerate(map(TaskId, answer.task_ids)):
            if index not in existing and task_id not in self._ended:
                self._watched[task_id] = None

    def _take_ends(
        self, now_ms: int, message: Finished, effects: list[ClientEffect], *, has_news: bool
    ) -> None:
        """Tell each end once. has_news: these may be tasks whose receipt is still on its way."""
        if message.ends:
            self._heard_ms, self._patience_ms = now_ms, WATCH_AGAIN_MS
        for end in message.ends:
            task_id = TaskId(end.task_id)
            is_wanted = has_news or task_id in self._watched or task_id in self._awaited
            self._watched.pop(task_id, None)
            # Not ended: the master watches too many tasks, and is asked for this one again later.
            if is_wanted and end.state.is_terminal and task_id not in self._ended:
                self._awaited.pop(task_id, None)
                self._ended[task_id] = None
                effects.append(Ended(end))

    # --- deciding -------------------------------------------------------------------------------

    def _ask(
        self,
        now_ms: int,
        message: ClientMessage,
        effects: list[ClientEffect],
        *,
        is_ours: bool = False,
    ) -> None:
        if isinstance(message, Watch):
            self._watched.update(dict.fromkeys(map(TaskId, message.task_ids)))
        question = _Question(message, now_ms, is_ours=is_ours)
        self._asked[message.request_id] = question
        self._put(now_ms, question, effects)

    def _put(self, now_ms: int, question: _Question, effects: list[ClientEffect]) -> None:
        question.times += 1
        question.again_ms = now_ms + ASK_AGAIN_MS
        self._repeats.append((question.again_ms, question.message.request_id))
        effects.append(SendToMaster(question.message))

    def _repeat(self, now_ms: int, effects: list[ClientEffect]) -> None:
        """Frames may be lost, requests never: ask again now and then."""
        repeats = self._repeats
        while repeats and repeats[0][0] <= now_ms:
            due_ms, request_id = repeats.popleft()
            question = self._asked.get(request_id)
            if question is None or question.again_ms != due_ms:
                continue
            if now_ms - question.asked_ms < ANSWER_MS:
                self._put(now_ms, question, effects)
                continue
            del self._asked[request_id]
            if not question.is_ours:
                effects.append(Unanswered(request_id))

    def _await(self, now_ms: int, task_ids: Iterable[TaskId], effects: list[ClientEffect]) -> None:
        if not self._awaited:
            self._heard_ms, self._patience_ms = now_ms, WATCH_AGAIN_MS
        wanted = [one for one in task_ids if one not in self._ended]
        unknown = [one for one in wanted if one not in self._watched]
        self._awaited.update(dict.fromkeys(wanted))
        self._watch(now_ms, unknown, effects)

    def _watch_again(self, now_ms: int, effects: list[ClientEffect]) -> None:
        """A client that did not read for a while may have missed an end: the master keeps only so
        much for it, and forgets all of it when it dies."""
        if self._awaited and now_ms - self._heard_ms >= self._patience_ms:
            self._heard_ms = now_ms
            self._patience_ms = min(2 * self._patience_ms, WATCH_AGAIN_MS_MAX)
            self._watch(now_ms, self._awaited, effects)

    def _watch(self, now_ms: int, task_ids: Iterable[TaskId], effects: list[ClientEffect]) -> None:
        wanted = list(task_ids)
        for start in range(0, len(wanted), SUBMIT_TASKS_MAX):
            portion = tuple(wanted[start : start + SUBMIT_TASKS_MAX])
            self._ask(now_ms, Watch(self.new_request_id(), portion), effects, is_ours=True)
